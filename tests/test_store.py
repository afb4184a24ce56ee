"""The format on disk: round trips, exact bytes, reading with plain Zarr and Arrow, and every kind of damage."""

import json
import os
import shutil
from functools import partial

import google_crc32c
import numpy as np
import pyarrow as pa
import pytest
import zarr
from helpers import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from wherefrom.store.documents import Documents, Example, write_documents
from wherefrom.store.errors import BusyError, IncompatibleError, IntegrityError, NotFoundError, NumericalError, StorageError, UsageError
from wherefrom.store.files import create_only, exclusive, publish, storage_errors
from wherefrom.store.index import Index
from wherefrom.store.manifest import latest_manifest, read_manifest, seal
from wherefrom.store.rows import DenseRows, chunk_rows, quantize, write_dense, write_shard


def random_rows(rows, dim, seed=0):
    generator = np.random.default_rng(seed)
    return (generator.normal(size=(rows, dim)) * generator.lognormal(size=(rows, 1))).astype(np.float32)


def reopen(directory, rows, dim, dtype):
    return DenseRows(directory / "blocks", rows, dim, dtype)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 200), dim=st.integers(1, 60), dtype=st.sampled_from(["float32", "float16", "int8"]), seed=st.integers(0, 99))
def test_rows_come_back_within_their_dtype_and_the_same_through_plain_zarr(tmp_path_factory, rows, dim, dtype, seed):
    directory = tmp_path_factory.mktemp("rows") / "a.zarr"
    written = random_rows(rows, dim, seed)
    written[seed % rows] = 0
    write_shard(directory, {"blocks": partial(write_dense, rows=written, dtype=dtype)}, {"any": 1})
    read = reopen(directory, rows, dim, dtype)
    tolerance = {"float32": 1e-6, "float16": 1e-3, "int8": 0.5 / 127 + 1e-6}[dtype]
    norms = np.linalg.norm(written, axis=1)
    largest = np.abs(written).max(axis=1) if dtype == "int8" else norms
    for i in range(rows):
        assert_close(read.row(i), written[i], tolerance, largest[i])
    plain = zarr.open_group(directory, mode="r")["blocks"]
    codes = np.concatenate([codes for _, codes in read.blocks()])
    assert np.array_equal(plain["codes"][:], codes)
    assert np.array_equal(plain["norms"][:], read.norms)
    np.testing.assert_allclose(read.norms, norms, rtol=1e-6)
    if dtype == "int8":
        assert np.array_equal(plain["scales"][:], read.scales)


def test_the_bytes_of_a_shard_are_those_of_the_specification(tmp_path):
    rows = np.tile(np.array([[3.0, 4.0], [0.0, 0.0], [0.0, -2.0]], np.float32), (1367, 1))
    write_shard(tmp_path / "a.zarr", {"blocks": partial(write_dense, rows=rows, dtype="float32")}, {"format": 1})
    assert chunk_rows(2, "float32") == 4096
    raw = (tmp_path / "a.zarr/blocks/codes/c/0/0").read_bytes()
    inner = np.zeros((4102, 2), "<f4")  # 4,101 rows in two chunks of 2,051
    inner[:4101] = np.tile(np.array([[0.6, 0.8], [0, 0], [0, -1]], "<f4"), (1367, 1))
    bodies = [inner[:2051].tobytes(), inner[2051:].tobytes()]
    stride = len(bodies[0]) + 4
    for i, body in enumerate(bodies):
        assert raw[i * stride : (i + 1) * stride] == body + google_crc32c.value(body).to_bytes(4, "little")
    index = np.array([[0, stride], [stride, stride]], "<u8").tobytes()
    assert raw[2 * stride :] == index + google_crc32c.value(index).to_bytes(4, "little")
    write_shard(tmp_path / "b.zarr", {"blocks": partial(write_dense, rows=rows[:3], dtype="float32")}, {"format": 1})
    assert (tmp_path / "b.zarr/blocks/codes/c/0/0").stat().st_size == 3 * 8 + 4 + 16 + 4  # a small shard is not padded
    norms = np.array([5, 0, 2] * 1367, "<f4").tobytes()
    assert (tmp_path / "a.zarr/blocks/norms/c/0").read_bytes() == norms + google_crc32c.value(norms).to_bytes(4, "little")


def test_quantizing_refuses_what_is_not_finite():
    for bad in (np.nan, np.inf, 3e38):
        with pytest.raises(NumericalError, match="row 1 of this shard"):
            quantize(np.array([[1.0, 1.0], [bad, bad]]), "float32")


_value = st.one_of(st.none(), st.booleans(), st.integers(-(2**40), 2**40), st.text(max_size=8), st.lists(st.integers(0, 9), max_size=3))
_metadata = st.dictionaries(st.sampled_from(["year", "tags", "note"]), _value, max_size=3)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=20), _metadata), min_size=1, max_size=12))
def test_documents_come_back_whatever_their_text_and_metadata(tmp_path_factory, contents):
    path = tmp_path_factory.mktemp("documents") / "a.arrow"
    ids = np.array([5, 6, 7], np.int32)
    mask = np.array([False, True, True])
    examples = [
        Example(f"e{i}", text, "s", ids[: 2 + i % 2], mask[: 2 + i % 2], f"d{i}", i, metadata)
        for i, (text, metadata) in enumerate(contents)
    ]
    write_documents(path, examples)
    documents = Documents(path, len(examples))
    assert documents.ids() == [e.id for e in examples]
    for i, expected in enumerate(examples):
        found = documents[i]
        assert (found.id, found.text, found.source, found.document, found.chunk) == (expected.id, expected.text, "s", f"d{i}", i)
        assert np.array_equal(found.token_ids, expected.token_ids)
        assert np.array_equal(found.loss_mask, expected.loss_mask)
        assert found.metadata == {k: v for k, v in expected.metadata.items() if v is not None}


def test_an_index_reads_with_plain_zarr_arrow_and_safetensors(index_dir):
    from safetensors.numpy import load_file

    manifest = json.loads((index_dir / "manifests/000001.json").read_text())
    index = Index(index_dir)
    (component,) = index.manifest.components
    for shard in manifest["shards"]:
        group = zarr.open_group(index_dir / "rows" / f"{shard['id']}.zarr", mode="r")
        rows = group["blocks/codes"][:] * group["blocks/norms"][:][:, None]
        table = pa.ipc.open_file(index_dir / "documents" / f"{shard['id']}.arrow").read_all()
        assert table.num_rows == len(rows) == shard["rows"]
        for i in (0, shard["rows"] - 1):
            np.testing.assert_array_equal(rows[i], index.row(shard["first"] + i, component))
            example = index.example(shard["first"] + i)
            assert table["text"][i].as_py() == example.text
            assert table["metadata"][i].as_py() == dict(example.metadata)
            assert table["token_ids"][i].as_py() == example.token_ids.tolist()
    assert load_file(index_dir / manifest["encoder"]["path"]).keys() == index.arrays.keys()


def copy(index_dir, tmp_path):
    return shutil.copytree(index_dir, tmp_path / "copy.wherefrom")


def read_everything(path):
    index = Index(path)
    for component in index.manifest.components:
        for _ in index.blocks(component):
            pass
    for row in range(len(index)):
        index.example(row)
    return index.arrays


def flip(path, position=None):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3 if position is None else position] ^= 0x10
    path.write_bytes(raw)


@pytest.mark.parametrize("victim", ["codes/c/0/0", "norms/c/0", "encoder"])
def test_a_flipped_byte_is_an_error_when_touched(index_dir, tmp_path, victim):
    path = copy(index_dir, tmp_path)
    file = next((path / "encoder").iterdir()) if victim == "encoder" else next((path / "rows").iterdir()) / "blocks" / victim
    flip(file)
    with pytest.raises(IntegrityError, match=r"checksum|SHA-256"):
        read_everything(path)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_verify_finds_damage_in_every_single_file(index_dir, tmp_path, damage):
    path = copy(index_dir, tmp_path)
    manifest = read_manifest(path)
    assert {problem for _, problem in Index(path).verify()} == {None}
    for record in [manifest.encoder, *(f for s in manifest.shards for f in s.files)]:
        file = path / record.path
        original = file.read_bytes()
        if damage == "flip":
            flip(file)
        elif damage == "truncate":
            file.write_bytes(original[:-1])
        else:
            file.unlink()
        found = {p: problem for p, problem in Index(path).verify() if problem}
        assert record.path in found
        assert str(file) in found[record.path]
        file.write_bytes(original)


@pytest.mark.parametrize("victim", ["codes/c/0/0", "norms/c/0", "codes/zarr.json"])
@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_truncated_and_missing_row_files_are_refused(index_dir, tmp_path, victim, damage):
    path = copy(index_dir, tmp_path)
    file = next((path / "rows").iterdir()) / "blocks" / victim
    file.write_bytes(file.read_bytes()[:-9]) if damage == "truncate" else file.unlink()
    with pytest.raises(IntegrityError, match=str(file)):
        read_everything(path)


def test_truncated_documents_are_refused(index_dir, tmp_path):
    path = copy(index_dir, tmp_path)
    file = next((path / "documents").iterdir())
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(IntegrityError, match="truncated"):
        read_everything(path)
    with pytest.raises(IntegrityError, match="not a whole Arrow file"):
        Documents(file, 32)


def test_foreign_zarr_codecs_are_refused(index_dir, tmp_path):
    path = copy(index_dir, tmp_path)
    shard = next((path / "rows").iterdir())
    array = zarr.open_array(shard / "blocks/codes", mode="r")
    values, shape = array[:], array.shape
    shutil.rmtree(shard / "blocks/codes")
    zarr.create_array(shard / "blocks/codes", shape=shape, dtype="float32", chunks=shape)[:] = values
    with pytest.raises(IncompatibleError, match="codecs"):
        reopen(shard, *shape, "float32")
    with pytest.raises(IntegrityError, match=r"zarr\.json"):
        read_everything(path)


def edit(path, change):
    file = latest_manifest(path)
    content = json.loads(file.read_text())
    del content["checksum"]
    change(content)
    file.write_bytes(seal(content))


MANIFEST_DAMAGE = {
    "version": (lambda m: m.update(version=99), IncompatibleError, "format version 99"),
    "feature": (lambda m: m["features"].append("telepathy"), IncompatibleError, "telepathy"),
    "format": (lambda m: m.update(format="other"), IntegrityError, "not a Wherefrom manifest"),
    "unknown field": (lambda m: m.update(surprise=1), IntegrityError, "surprise"),
    "missing field": (lambda m: m.pop("encoder"), IntegrityError, "encoder"),
    "wrong type": (lambda m: m.update(rows="many"), IntegrityError, "rows"),
    "gap between shards": (lambda m: m["shards"][1].update(first=40), IntegrityError, "begins at row 40"),
    "deleted rows": (lambda m: m.update(tombstones=[3]), IntegrityError, "deleted rows"),
    "row count": (lambda m: m.update(rows=7), IntegrityError, "not 7"),
    "path outside": (lambda m: m["encoder"].update(path="../../etc/passwd"), IntegrityError, "inside the index"),
    "absolute path": (lambda m: m["shards"][0]["files"][0].update(path="/etc/passwd"), IntegrityError, "inside the index"),
    "shard id": (lambda m: m["shards"][0].update(id="../../../etc"), IntegrityError, "id"),
    "component name": (lambda m: m["components"][0].update(name="../x"), IntegrityError, "name"),
    "huge row": (lambda m: m["components"][0]["layers"][0].update(output_rank=2**20), IntegrityError, "a rank above its size"),
}


@pytest.mark.parametrize("name", MANIFEST_DAMAGE)
def test_damaged_and_hostile_manifests_are_refused(index_dir, tmp_path, name):
    change, error, message = MANIFEST_DAMAGE[name]
    path = copy(index_dir, tmp_path)
    edit(path, change)
    with pytest.raises(error, match=message):
        Index(path)


def test_a_changed_digit_in_a_manifest_is_noticed(index_dir, tmp_path):
    path = copy(index_dir, tmp_path)
    file = latest_manifest(path)
    file.write_text(file.read_text().replace('"damping": 0.1', '"damping": 0.2'))
    with pytest.raises(IntegrityError, match="its checksum differs"):
        Index(path)


@pytest.mark.parametrize("what", ["documents", "rows"])
def test_shards_that_changed_places_are_noticed(index_dir, tmp_path, what):
    path = copy(index_dir, tmp_path)
    first, second = (s.id for s in read_manifest(path).shards[:2])
    suffix = "arrow" if what == "documents" else "zarr"
    for source, target in ((first, "aside"), (second, first), ("aside", second)):
        (path / what / f"{source}.{suffix}").rename(path / what / f"{target}.{suffix}")
    with pytest.raises(IntegrityError, match=r"SHA-256|where"):
        read_everything(path)


def test_manifests_that_are_not_json(index_dir, tmp_path):
    path = copy(index_dir, tmp_path)
    for content in (b"", b"{", b"\xff\xfe", b"[" * 100_000):
        latest_manifest(path).write_bytes(content)
        with pytest.raises(IntegrityError):
            Index(path)


def test_the_highest_manifest_is_the_index_and_is_never_replaced(index_dir, tmp_path):
    path = copy(index_dir, tmp_path)
    first = path / "manifests/000001.json"
    second = json.loads(first.read_text()) | {"number": 2, "created": "later"}
    del second["checksum"]
    snapshot = Index(path)
    create_only(path / "manifests/000002.json", seal(second))
    assert Index(path).manifest.created == "later"
    assert snapshot.manifest.number == 1
    with pytest.raises(BusyError, match="published by somebody else"):
        create_only(first, b"other")
    assert json.loads(first.read_text())["number"] == 1
    assert [p.name for p in (path / "manifests").iterdir() if p.name.startswith(".")] == []


def test_not_an_index(tmp_path):
    with pytest.raises(NotFoundError, match="there is no index"):
        Index(tmp_path / "nothing")
    with pytest.raises(NotFoundError, match="not a Wherefrom index"):
        Index(tmp_path)
    (tmp_path / "staging").mkdir()
    with pytest.raises(NotFoundError, match="not finished"):
        Index(tmp_path)


def test_rows_out_of_range(index_dir):
    index = Index(index_dir)
    for row in (-1, len(index), 10**9):
        with pytest.raises(UsageError, match=f"row {row} is not in the index"):
            index.example(row)


def test_one_writer_at_a_time(tmp_path):
    with exclusive(tmp_path / "x"), pytest.raises(BusyError, match="another build"), exclusive(tmp_path / "x"):
        pass
    with exclusive(tmp_path / "x"):
        pass


def test_publishing_what_is_there_keeps_the_first(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    publish(tmp_path / "a", tmp_path / "final")
    publish(tmp_path / "b", tmp_path / "final")
    assert (tmp_path / "final/file").read_text() == "a"
    assert not (tmp_path / "b").exists()


def test_a_refusing_disk_is_a_sentence(tmp_path):
    import errno

    with pytest.raises(StorageError, match="no space left on the disk"), storage_errors(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(StorageError, match="Read-only"), storage_errors(tmp_path):
        raise OSError(errno.EROFS, "Read-only file system")
    assert os.path.isdir(tmp_path)
