"""The format on disk: round trips, exact bytes, reading with plain Zarr and Arrow, and every kind of damage."""

import json
import os
import resource
import shutil
import signal
import uuid
import zipfile

import google_crc32c
import numpy as np
import pyarrow as pa
import pytest
import zarr
from helpers import assert_close, dense_rows, open_zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from wherefrom.store.arrays import ArrayFile, ArrayGroup, _append, write_arrays
from wherefrom.store.dense import quantize
from wherefrom.store.documents import Documents, Example, write_documents
from wherefrom.store.errors import BusyError, IncompatibleError, IntegrityError, NotFoundError, NumericalError, StorageError, UsageError
from wherefrom.store.files import create_only, exclusive, publish, storage_errors, write_tensors
from wherefrom.store.index import Index
from wherefrom.store.manifest import latest_manifest, seal
from wherefrom.store.shard import rows_path
from wherefrom.store.vectors import DenseVectors, read_rows, to_bytes, write_rows


def random_rows(rows, dim, seed=0):
    generator = np.random.default_rng(seed)
    return (generator.normal(size=(rows, dim)) * generator.lognormal(size=(rows, 1))).astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 200), dim=st.integers(1, 60), dtype=st.sampled_from(["float32", "float16", "int8"]), seed=st.integers(0, 99))
def test_rows_come_back_within_their_dtype_and_the_same_through_plain_zarr(tmp_path_factory, rows, dim, dtype, seed):
    directory = tmp_path_factory.mktemp("rows")
    written = random_rows(rows, dim, seed)
    written[seed % rows] = 0
    read = dense_rows(directory, written, dim, dtype)
    tolerance = {"float32": 1e-6, "float16": 1e-3, "int8": 0.5 / 127 + 1e-6}[dtype]
    norms = np.linalg.norm(written, axis=1)
    largest = np.abs(written).max(axis=1) if dtype == "int8" else norms
    for i in range(rows):
        assert_close(read.row(i), written[i], tolerance, largest[i])
    plain = open_zarr(directory)["blocks"]
    codes = np.concatenate([codes for _, codes in read.blocks()])
    assert np.array_equal(plain["codes"][:], codes)
    assert np.array_equal(plain["norms"][:], read.norms)
    np.testing.assert_allclose(read.norms, norms, rtol=1e-6)
    if dtype == "int8":
        assert np.array_equal(plain["scales"][:], read.scales)


def test_the_bytes_of_a_file_of_arrays_are_those_of_the_specification(tmp_path):
    codes = np.arange(3 * 40_000, dtype="<f4").reshape(-1, 3)
    groups = {
        "": ArrayGroup({"losses": np.ones(2, "<f4")}, {"about": 1}),
        "blocks": ArrayGroup({"codes": codes}, paged=frozenset({"codes"})),
    }
    write_arrays(tmp_path / "a.zarr.zip", groups)
    raw = (tmp_path / "a.zarr.zip").read_bytes()
    write_arrays(tmp_path / "again.zarr.zip", groups)
    assert (tmp_path / "again.zarr.zip").read_bytes() == raw
    file = ArrayFile(tmp_path / "a.zarr.zip")
    pages = np.array([google_crc32c.value(codes.tobytes()[i : i + 65536]) for i in range(0, codes.nbytes, 65536)], "<u4")
    with zipfile.ZipFile(tmp_path / "a.zarr.zip") as archive:
        assert archive.testzip() is None
        assert archive.namelist() == sorted(archive.namelist())
        assert archive.read("blocks/codes/c/0/0") == codes.tobytes()
        assert archive.read("blocks/codes_pages/c/0") == pages.tobytes()
        assert archive.read("losses/c/0") == np.ones(2, "<f4").tobytes()
        for entry in archive.filelist:
            assert (entry.compress_type, entry.date_time) == (zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0))
            header = raw[entry.header_offset : entry.header_offset + 30]
            start = entry.header_offset + 30 + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
            assert start % 64 == 0
            assert raw[start : start + entry.file_size] == archive.read(entry.filename)
        assert file.directory == google_crc32c.value(raw[archive.start_dir :])
    assert file.paged("blocks/codes", codes.shape, "float32").values.flags.aligned


def test_entries_above_two_gibibytes_are_aligned_too(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    array = np.arange(5000)
    write_arrays(tmp_path / "a.zarr.zip", {"": ArrayGroup({"a": array, "b": array[:10]}, paged=frozenset({"a"}))})
    assert np.array_equal(ArrayFile(tmp_path / "a.zarr.zip").paged("a", (5000,), "int64").whole(), array)


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
        example = documents[i]
        assert (example.id, example.text, example.source, example.document, example.chunk) == (expected.id, expected.text, "s", f"d{i}", i)
        assert np.array_equal(example.token_ids, expected.token_ids)
        assert np.array_equal(example.loss_mask, expected.loss_mask)
        assert example.metadata == {k: v for k, v in expected.metadata.items() if v is not None}


def test_an_index_reads_with_plain_zarr_arrow_and_safetensors(index_dir):
    from safetensors.numpy import load_file

    def opened(path):
        return zarr.open_group(zarr.storage.ZipStore(path, mode="r"), mode="r")

    manifest = json.loads((index_dir / "manifests/000001.json").read_text())
    index = Index(index_dir)
    (component,) = index.manifest.components
    table, first = opened(index_dir / manifest["table"]["path"]), 0
    assert int(table["rows"][:].sum()) == manifest["rows"]
    for number in range(manifest["shards"]):
        shard_id = str(uuid.UUID(bytes=table["id"][number].tobytes()))
        group, size = opened(index_dir / "rows" / f"{shard_id}.zarr.zip"), int(table["rows"][number])
        rows = group["blocks/codes"][:] * group["blocks/norms"][:][:, None]
        documents = pa.ipc.open_file(index_dir / "documents" / f"{shard_id}.arrow").read_all()
        assert documents.num_rows == len(rows) == size
        for i in (0, size - 1):
            np.testing.assert_array_equal(rows[i], index.vectors(first + i, component).values[0])
            example = index.example(first + i)
            assert documents["text"][i].as_py() == example.text
            assert documents["metadata"][i].as_py() == dict(example.metadata)
            assert documents["token_ids"][i].as_py() == example.token_ids.tolist()
        first += size
    assert load_file(index_dir / manifest["encoder"]["path"]).keys() == index.arrays.keys()


def copy(index_dir, tmp_path):
    return shutil.copytree(index_dir, tmp_path / "copy.wherefrom")


def read_everything(path):
    index = Index(path)
    for shard in index.shards:
        index.reader(shard).check()
    for row in range(len(index)):
        index.example(row)
    return index.arrays


def flip(path, position=None):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3 if position is None else position] ^= 0x10
    path.write_bytes(raw)


@pytest.mark.parametrize("victim", ["blocks/codes/c/0/0", "blocks/norms/c/0", "losses/c/0", "documents", "encoder", "table"])
def test_a_flipped_byte_is_an_error_when_touched(index_dir, tmp_path, victim):
    path = copy(index_dir, tmp_path)
    index = Index(path)
    files = {
        "encoder": index.manifest.encoder.path,
        "table": index.manifest.table.path,
        "documents": f"documents/{index.shards[0].id}.arrow",
    }
    if victim in files:
        flip(path / files[victim])
    else:
        file = rows_path(path, index.shards[0].id)
        start, size, _ = ArrayFile(file)._entries[victim]
        flip(file, start + size // 3)
    with pytest.raises(IntegrityError, match=r"checksum|SHA-256|damaged"):
        read_everything(path)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_verify_finds_damage_in_every_single_file(index_dir, tmp_path, damage):
    path = copy(index_dir, tmp_path)
    assert {problem for _, problem in Index(path).verify()} == {None}
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p.parent.name in ("encoder", "rows", "documents", "search")):
        original = file.read_bytes()
        if damage == "flip":
            flip(file)
        elif damage == "truncate":
            file.write_bytes(original[:-1])
        else:
            file.unlink()
        problems = {p: problem for p, problem in Index(path).verify() if problem}
        if file.parent.name != "search" or damage != "remove":
            assert str(file) in problems[file.relative_to(path).as_posix()]
        file.write_bytes(original)


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_truncated_and_missing_row_files_are_refused(index_dir, tmp_path, damage):
    path = copy(index_dir, tmp_path)
    file = next((path / "rows").iterdir())
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


def test_compressed_entries_and_foreign_codecs_are_refused(index_dir, tmp_path):
    path = tmp_path / "a.zarr.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zarr.json", "{}")
    with pytest.raises(IntegrityError, match="compressed"):
        ArrayFile(path)
    contents = {}
    zarr.create_array(zarr.storage.MemoryStore(contents), name="a", data=np.arange(10.0))
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            _append(archive, name, content.to_bytes())
    with pytest.raises(IntegrityError, match="not one chunk of plain bytes"):
        ArrayFile(path).array("a", (10,), "float64")


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
    "deleted rows": (lambda m: m.update(deleted=3), IntegrityError, "whether rows were deleted"),
    "deleted rows of no table": (lambda m: m.update(deleted=3, features=["deleted", "dense"]), IntegrityError, "does not list the deleted"),
    "row count": (lambda m: m.update(rows=7), IntegrityError, "does not list the shards of 7 rows"),
    "shard count": (lambda m: m.update(shards=7), IntegrityError, "which the manifest promises"),
    "path outside": (lambda m: m["encoder"].update(path="../../etc/passwd"), IntegrityError, "inside the index"),
    "absolute path": (lambda m: m["table"].update(path="/etc/passwd"), IntegrityError, "inside the index"),
    "another file as the table": (lambda m: m["table"].update(path=m["encoder"]["path"]), IntegrityError, "bytes where"),
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
    first, second = (s.id for s in Index(path).shards[:2])
    suffix = "arrow" if what == "documents" else "zarr.zip"
    for source, target in ((first, "aside"), (second, first), ("aside", second)):
        (path / what / f"{source}.{suffix}").rename(path / what / f"{target}.{suffix}")
    with pytest.raises(IntegrityError, match=r"SHA-256|where|checksum|belongs there"):
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


def test_publishing_replaces_a_file_whole(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
        publish(tmp_path / name, tmp_path / "final")
    assert (tmp_path / "final").read_text() == "b"
    assert not (tmp_path / "b").exists()


def test_tensors_that_cannot_be_written_are_a_sentence(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot write .*a\.safetensors: File too large"):
            write_tensors(tmp_path / "a.safetensors", {"a": np.zeros(1 << 12)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)


def test_damaged_rows_are_a_sentence(tmp_path):
    rows = {"blocks": DenseVectors(np.arange(6, dtype=np.float32).reshape(2, 3))}
    write_rows(rows, tmp_path / "rows.safetensors")
    assert (tmp_path / "rows.safetensors").read_bytes() == to_bytes(rows)
    assert np.array_equal(read_rows(tmp_path / "rows.safetensors")["blocks"].values, rows["blocks"].values)
    (tmp_path / "rows.safetensors").write_bytes(to_bytes(rows)[:-4])
    with pytest.raises(IntegrityError, match=r"rows\.safetensors is damaged"):
        read_rows(tmp_path / "rows.safetensors")


def test_a_refusing_disk_is_a_sentence(tmp_path):
    import errno

    with pytest.raises(StorageError, match="no space left on the disk"), storage_errors(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(StorageError, match="Read-only"), storage_errors(tmp_path):
        raise OSError(errno.EROFS, "Read-only file system")
    assert os.path.isdir(tmp_path)
