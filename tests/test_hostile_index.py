"""Indexes from strangers: whatever an index's files hold, nothing outside of it is run, read, written or removed, and no answer is wrong
without an error. Manifests are sealed again after every change, as whoever makes such an index would do.
"""

import contextlib
import copy
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import uuid
import zipfile

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from helpers import random_texts, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wherefrom import BuildConfig, Client
from wherefrom.cli import main
from wherefrom.ray_jobs.add import add
from wherefrom.ray_jobs.build import build
from wherefrom.store.arrays import ArrayFile, _append, page_checksums, write_arrays
from wherefrom.store.documents import Documents, batch_checksums
from wherefrom.store.errors import IntegrityError, UsageError, WherefromError
from wherefrom.store.files import exclusive, sha256
from wherefrom.store.index import Index
from wherefrom.store.manifest import latest_manifest, seal
from wherefrom.store.printable import printable, to_json
from wherefrom.store.shard import documents_path, publish_index, read_table, rows_path, table_arrays
from wherefrom.store.update import compact, delete, prune


@pytest.fixture(scope="module")
def index_800(tmp_path_factory, model_dir, corpus_file):
    """Head, embeddings and blocks, in several shards."""
    out = tmp_path_factory.mktemp("indexes") / "small.wherefrom"
    build(
        BuildConfig(
            model=str(model_dir), data=(str(corpus_file),), out=str(out), components=("head", "embeddings", "blocks"), shard_rows=32
        )
    )
    return out


@pytest.fixture
def index(tmp_path, index_800):
    shutil.copytree(index_800, tmp_path / "copy.wherefrom")
    return tmp_path / "copy.wherefrom"


def rewrite(path, change=lambda contents: None):
    """Change the entries of a file of arrays, and make all of its checksums right again."""
    with zipfile.ZipFile(path) as archive:
        contents = {}
        for entry in archive.filelist:
            with archive.open(entry) as file:
                file._expected_crc = None
                contents[entry.filename] = file.read()
    change(contents)
    for name in [name for name in contents if "_pages/c/" in name]:
        (of,) = [other for other in contents if other.startswith(name.partition("_pages/")[0] + "/c/")]
        contents[name] = page_checksums(np.frombuffer(contents[of], np.uint8)).tobytes()
    with zipfile.ZipFile(path, "w") as archive:
        for name in sorted(contents):
            _append(archive, name, contents[name])


def reseal(index, change=lambda content: None, shard_change=lambda entries: entries):
    """Take into the index's checksums what its files are now, and apply changes to its newest manifest and to the entries of its shards."""
    path = latest_manifest(index)
    content = json.loads(path.read_text())
    content.pop("checksum")
    table = index / content["table"]["path"]
    shards, deleted = read_table(ArrayFile(table), content["shards"], len(content["components"]), content["rows"])
    entries = []
    for shard in shards:
        rows, documents = rows_path(index, shard.id), documents_path(index, shard.id)
        with contextlib.suppress(OSError, zipfile.BadZipFile, ValueError, IntegrityError, NotImplementedError, pa.ArrowException, EOFError):
            offsets, checksums = batch_checksums(documents)

            def right(contents, offsets=offsets, checksums=checksums):
                contents["documents_offsets/c/0"], contents["documents_checksums/c/0"] = offsets.tobytes(), checksums.tobytes()

            rewrite(rows, right)
        directory = shard.directory
        with contextlib.suppress(IntegrityError):
            directory = ArrayFile(rows).directory
        sizes = {"bytes": rows.stat().st_size, "documents_bytes": documents.stat().st_size, "directory": directory}
        entries.append(shard._replace(sha256=sha256(rows), documents_sha256=sha256(documents), **sizes))
    new_table = index / "manifests" / f"{uuid.uuid4()}.zarr.zip"
    write_arrays(new_table, {"": table_arrays(shard_change(entries), deleted)})
    for record in (content["encoder"], content["table"]):
        file = index / record["path"] if record is content["encoder"] else new_table
        record.update(path=file.relative_to(index).as_posix(), bytes=file.stat().st_size, sha256=sha256(file))
    change(content)
    path.write_bytes(seal(content))


def use(index):
    """Everything that reads an index without its model; returns the rows of an answer."""
    opened = Index(index)
    opened.summary()
    assert opened.arrays
    for shard in opened.shards:
        documents = opened.documents(shard)
        for row in range(len(documents)):
            documents[row]
        opened.losses(shard)
    client = Client(index)
    answer = client.query(row=3, k=5, where="year >= 1900")
    client.query(row=3, k=5, mode="loss-normalized", group_by="source")
    return [a.row for a in answer.proponents]


@contextlib.contextmanager
def within(seconds):
    """Fail what takes longer, such as a read of a pipe that nobody writes."""

    def late(*_):
        raise AssertionError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# Code


@pytest.mark.parametrize("named", ["task", "options"])
def test_add_runs_no_code_that_an_index_names(tmp_path, index, model_dir, corpus_file, monkeypatch, named):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Task: pass\n")
    monkeypatch.chdir(tmp_path)

    def change(content):
        content["build"]["inputs"]["options"] |= {"trust_remote_code": True, "task": "evil:Task"}
        if named == "task":
            content["task"] = "evil:Task"

    reseal(index, change)
    more = write_jsonl(tmp_path / "more.jsonl", [{"id": "new", "text": "w1 w2 w3", "year": 2000}])
    if named == "task":
        with pytest.raises(UsageError, match="whose code runs only when you name it"):
            add(index, [str(more)])
    else:  # the options' own task is not what decides
        with contextlib.suppress(WherefromError):
            add(index, [str(more)])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("allowed", [False, True])
def test_code_of_a_model_runs_only_when_the_caller_asks(tmp_path, allowed):
    from wherefrom.indexer.models import ModelSource, load_causal_lm
    from wherefrom.store.errors import IncompatibleError

    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(IncompatibleError, match="cannot be loaded" if allowed else "custom code"):
        load_causal_lm(ModelSource(str(model), trust_remote_code=allowed))
    assert (tmp_path / "ran").exists() == allowed


# Links


@pytest.mark.parametrize("folder", ["documents", "rows", "encoder", "manifests", "search", "staging", ".lock"])
def test_no_writer_follows_a_link_out_of_the_index(tmp_path, index, corpus_file, model_dir, folder):
    outside = tmp_path / "outside"
    if folder == ".lock":
        outside.write_text("precious")
        (index / ".lock").unlink(missing_ok=True)
    elif (index / folder).exists():
        shutil.move(index / folder, outside)
    else:
        outside.mkdir()
    if outside.is_dir():
        (outside / "precious.txt").write_text("precious")
    (index / folder).symlink_to(outside)
    before = {p: p.read_bytes() for p in sorted([outside, *outside.rglob("*")]) if p.is_file()}
    more = write_jsonl(tmp_path / "more.jsonl", [{"id": "new", "text": "w1 w2 w3", "year": 2000}])
    config = BuildConfig(
        model=str(model_dir), data=(str(corpus_file),), out=str(index), components=("head", "embeddings", "blocks"), shard_rows=32
    )
    writers = [
        lambda: add(index, [str(more)]),
        lambda: delete(index, ["d1"]),
        lambda: compact(index),
        lambda: prune(index),
        lambda: build(config),
    ]
    for writer in writers:
        with pytest.raises(UsageError, match="is a link"):
            writer()
    done = CliRunner().invoke(main, ["reindex", str(index)])
    assert done.exit_code == 2, done.output
    assert {p: p.read_bytes() for p in sorted([outside, *outside.rglob("*")]) if p.is_file()} == before


def test_no_writer_follows_a_link_within_a_folder(tmp_path, index):
    outside = tmp_path / "outside"
    place = next((index / "search").glob("*.zarr.zip"))
    shutil.move(place, outside)
    place.symlink_to(outside)
    content = outside.read_bytes()
    with pytest.raises(UsageError, match="is a link"), exclusive(index):
        pass
    assert outside.read_bytes() == content


def test_pruning_removes_files_of_our_naming_alone(index):
    delete(index, ["d1", "d40"])
    compact(index)
    strange = [
        index / "rows/notes.txt",
        index / "documents/mine.arrow",
        index / "manifests/readme.json",
        index / "rows/a.zarr.zip",
        index / "own",
    ]
    for path in strange:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    before = len(list((index / "rows").glob("*-*.zarr.zip")))
    assert prune(index) > 0
    assert all(path.read_text() == "mine" for path in strange)
    assert len(list((index / "rows").glob("*-*.zarr.zip"))) < before
    assert use(index)


# Files that are none


@pytest.mark.parametrize("kind", ["fifo", "zero", "folder"])
def test_pipes_and_devices_in_the_place_of_files_end_in_a_sentence(tmp_path, index_800, kind):
    files = [f for f in sorted(index_800.rglob("*")) if f.is_file()]
    kinds = {}  # one file of each kind
    for file in files:
        parts = file.relative_to(index_800).parts
        kinds.setdefault((parts[0], *(p for p in parts[2:] if len(p) < 20)), file)
    for original in kinds.values():
        copy_ = tmp_path / "copy.wherefrom"
        shutil.rmtree(copy_, ignore_errors=True)
        shutil.copytree(index_800, copy_)
        path = copy_ / original.relative_to(index_800)
        path.unlink()
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "zero":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
        with within(60):
            try:
                use(copy_)
                assert path.relative_to(copy_).parts[0] in ("search", ".lock", "rows", "encoder"), path
                list(Index(copy_).verify())
            except WherefromError:
                continue


@pytest.mark.parametrize("place", ["staging", "search", "documents", "manifests", "staging/inputs.json", "search/odd.zarr.zip"])
def test_files_in_the_place_of_folders_end_in_a_sentence(index, model_dir, corpus_file, place):
    path = index / place
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(exist_ok=True)
    if "." in place:
        path.mkdir()
    else:
        path.write_bytes(b"x")
    writers = (
        lambda: delete(index, ids=["w"]),
        lambda: compact(index),
        lambda: add(index, [str(corpus_file)]),
        lambda: build(BuildConfig(model=str(model_dir), data=(str(corpus_file),), out=str(index))),
    )
    for writer in writers:
        with pytest.raises(WherefromError, match=place):
            writer()
    assert path.exists()


def test_an_index_of_which_every_row_is_deleted_is_not_compacted(index):
    opened = Index(index)
    with pytest.raises(UsageError, match="every example"):
        delete(index, ids=[id for shard in opened.shards for id in opened.documents(shard).ids()])

    publish_index(index, opened.shards, np.arange(len(opened)), {**dict(opened.manifest), "number": 2})
    with pytest.raises(UsageError, match="every example"):
        compact(index)
    with pytest.raises(UsageError, match="every row of this index was deleted"):
        Client(index).query(text="w1 w2")


def test_an_index_larger_than_the_limit_of_open_files_is_read(tmp_path, model_dir, corpus_file):
    out = tmp_path / "many.wherefrom"
    build(BuildConfig(model=str(model_dir), data=(str(corpus_file),), out=str(out), components=("head", "blocks"), shard_rows=2))
    script = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
from wherefrom import Client
client = Client({str(out)!r})
client.index.summary()
print([a.row for a in client.query(row=5, mode="cosine", where="year > 0", k=1).proponents])
assert all(problem is None for _, problem in client.index.verify())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[5]")


# Places


def test_files_and_arrays_that_changed_places_are_noticed_when_they_are_read(tmp_path, index_800):
    for name in ("rows", "head/norms/c/0", "embeddings/norms/c/0", "blocks/norms/c/0", "blocks/codes/c/0/0", "losses/c/0"):
        copy_ = tmp_path / name.replace("/", "-")
        shutil.copytree(index_800, copy_)
        a, b = (rows_path(copy_, shard.id) for shard in Index(copy_).shards[:2])
        if name == "rows":
            content = a.read_bytes()
            a.write_bytes(b.read_bytes())
            b.write_bytes(content)
        else:
            with zipfile.ZipFile(a) as one, zipfile.ZipFile(b) as other:
                swapped = {a: other.read(name), b: one.read(name)}
            for path, content in swapped.items():
                rewrite(path, lambda contents, name=name, content=content: contents.update({name: content}))
        shutil.rmtree(copy_ / "search")
        with pytest.raises(IntegrityError, match="belong"):
            use(copy_)


def test_a_newest_state_that_is_gone_is_noticed(index):
    delete(index, ["d3"])
    newest = latest_manifest(index)
    newest.unlink()
    with pytest.raises(IntegrityError, match=r"000002\.json is missing, the newest state"):
        Index(index)
    (index / "manifests/latest").unlink()
    assert Index(index).manifest.deleted == 0
    assert [p for p, problem in Index(index).verify() if problem] == ["manifests/latest"]


def test_an_older_state_under_a_newer_name_is_noticed(index):
    delete(index, ["d3"])
    shutil.copy(index / "manifests/000001.json", index / "manifests/000003.json")
    with pytest.raises(IntegrityError, match="under another's name"):
        Index(index)


def test_a_gap_between_states_is_said_by_verify(index):
    delete(index, ["d40"])
    delete(index, ["d41"])
    (index / "manifests/000002.json").unlink()
    assert [p for p, problem in Index(index).verify() if problem] == ["manifests/000002.json"]
    assert use(index)


def test_a_forged_search_cache_is_found_by_verify_and_mended_by_reindex(index):
    opened = Index(index)
    group = opened.groups[0]
    path = opened._cache_path(group)
    right = use(index)

    def turned(contents):
        factors = np.frombuffer(contents["head/factors/c/0"], np.float32)
        contents["head/factors/c/0"] = factors[::-1].tobytes()

    def other_years(contents):
        contents["columns/0/c/0"] = contents["columns/1/c/0"]
        contents["columns/0/zarr.json"] = contents["columns/1/zarr.json"]

    for change in (turned, other_years):
        rewrite(path, change)
        assert [p for p, problem in Index(index).verify() if problem] == [path.relative_to(index).as_posix()]
        assert Index(index).reindex(compare=True) == 1
    assert not [p for p, problem in Index(index).verify() if problem]
    assert use(index) == right


# Sizes


@pytest.mark.parametrize("rows", [10**12, 2**62])
def test_more_rows_than_the_files_hold_allocate_nothing(index, rows):
    def longer(entries):
        return [*entries[:-1], entries[-1]._replace(rows=rows)]

    def change(content):
        content["rows"] += rows - last

    last = Index(index).shards[-1].rows
    reseal(index, change, longer)
    with pytest.raises(IntegrityError, match="does not list the shards"):
        Index(index)


def test_sizes_that_the_files_do_not_have_allocate_nothing(index):
    last = Index(index).shards[-1].rows

    def longer(entries):
        return [*entries[:-1], entries[-1]._replace(rows=10**12, bytes=10**13)]

    reseal(index, lambda content: content.update(rows=content["rows"] + 10**12 - last), longer)
    with pytest.raises(IntegrityError, match="where"):
        use(index)


def test_an_odd_record_of_the_build_is_damage_and_no_defect(index):
    for change in (
        lambda c: c["build"].pop("documents"),
        lambda c: c["build"].update(weighed=[1]),
        lambda c: c["build"]["inputs"].update(options={"task": 5}),
        lambda c: c.update(build=[]),
        lambda c: c["build"].update(batch_tokens=-3),
    ):
        saved = latest_manifest(index).read_bytes()
        reseal(index, change)
        for command in (["info"], ["verify"], ["query", "--row", "1"]):
            done = CliRunner().invoke(main, [command[0], str(index), *command[1:]])
            assert (done.exit_code, "is damaged" in done.output) == (4, True), done.output
        latest_manifest(index).write_bytes(saved)


# Escapes

HOSTILE = "a\x1b]0;owned\x07b\x9b31mc\u202edfe\u2066\x7f\r"


def test_the_printable_filter_spells_out_what_commands_terminals():
    shown = printable(HOSTILE)
    assert shown == r"a\x1b]0;owned\x07b\x9b31mc\u202edfe\u2066\x7f\r"
    assert json.loads(to_json({HOSTILE: [HOSTILE]})) == {HOSTILE: [HOSTILE]}
    assert not set(to_json({HOSTILE: [HOSTILE]})) & set("\x1b\x07\x9b\u202e\u2066\x7f\r")
    assert printable("naïve 東京 👩\u200d🔬\tx\ny") == "naïve 東京 👩\u200d🔬\tx\ny"


@given(st.text())
def test_json_comes_back_whatever_it_holds(text):
    shown = to_json([text])
    assert json.loads(shown) == [text]
    assert printable(shown) == shown
    assert json.loads(to_json([text], ascii_only=True)) == [text]
    assert to_json([text], ascii_only=True).isascii()


def test_nothing_printed_commands_the_terminal(tmp_path, index):
    def change(content):
        content["models"][0]["id"] = content["models"][0]["architecture"] = content["wherefrom"] = content["created"] = HOSTILE
        content["build"]["notes"] = [HOSTILE]
        content["build"]["skipped_first"] = [HOSTILE]
        content["build"]["tracked"][0]["left_out"] = [HOSTILE]

    reseal(index, change)
    place = tmp_path / "x\x1b]0;owned\x07\u202e.wherefrom"
    index.rename(place)
    commands = [
        ["info", str(place)],
        ["info", str(place), "--json"],
        ["verify", str(place)],
        ["query", str(place), "--row", "1"],
        ["query", str(place), "--row", "1", "--json"],
        ["query", str(place), "--text", "w1 w2"],
        ["query", str(place), "--row", "1", "--where", f"{HOSTILE!s} == 1"],
        ["query", str(place), HOSTILE],
        ["add", str(place), "--data", str(tmp_path / HOSTILE)],
        ["build", "--model", HOSTILE, "--data", HOSTILE, "--out", str(tmp_path / "o")],
        ["delete", str(place), "--ids", HOSTILE],
        ["explain", str(place), "--row", "1", "--example", "2", "--no-tokens"],
    ]
    for command in commands:
        done = CliRunner().invoke(main, command, env={"HF_HUB_OFFLINE": "1"})
        assert not set(done.stdout + done.stderr) & set("\x1b\x07\x9b\u202e\u2066\x7f\r"), (command, done.output)
    next((place / "rows").iterdir()).unlink()
    assert "\x1b" not in CliRunner().invoke(main, ["verify", str(place)]).output


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_output_in_any_encoding_is_whole(tmp_path, model_dir, encoding):
    texts = random_texts(8, seed=1)
    path = write_jsonl(tmp_path / "d.jsonl", [{"id": f"é東{i}", "text": t, "word": "naïve 東京"} for i, t in enumerate(texts)])
    build(BuildConfig(model=str(model_dir), data=(str(path),), out=str(tmp_path / "i"), rank=2))
    for as_json in (True, False):
        command = [
            sys.executable,
            "-c",
            "from wherefrom.cli import main; main()",
            "query",
            str(tmp_path / "i"),
            "--row",
            "1",
            *["--json"] * as_json,
        ]
        done = subprocess.run(command, capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": encoding})
        assert done.returncode == 0, done.stderr
        text = done.stdout.decode(encoding)
        if as_json:
            assert json.loads(text)["proponents"][0]["metadata"] == {"word": "naïve 東京"}
        else:
            assert "proponents" in text


# Fuzzed files, in a process of their own, since a crash is what is looked for

FUZZ = """
import json, random, shutil, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_hostile_index import reseal, use
from wherefrom.store.errors import WherefromError
index, kind, seed, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
generator = random.Random(seed)
wanted = {{
    "arrow": lambda p: p.suffix == ".arrow",
    "safetensors": lambda p: p.suffix == ".safetensors",
    "rows": lambda p: "rows" in p.parts,
    "search": lambda p: "search" in p.parts,
}}[kind]
files = [p for p in sorted(index.rglob("*")) if p.is_file() and wanted(p)]
manifest = next((index / "manifests").glob("*.json"))
sealed, right, refused, answered = manifest.read_bytes(), use(index), 0, 0
for number in range(rounds):
    path = generator.choice(files)
    whole = path.read_bytes()
    data = bytearray(whole)
    for _ in range(generator.choice((1, 1, 2, 8))):
        at = generator.randrange(len(data)) if generator.random() < 0.6 else generator.randrange(min(len(data), 4096))
        style = generator.random()
        if style < 0.5:
            data[at] ^= 1 << generator.randrange(8)
        elif style < 0.8:
            size = generator.choice((4, 8))
            number_ = generator.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, generator.randrange(2**32)))
            data[at : at + size] = number_.to_bytes(8, "little")[:size]
        elif style < 0.9:
            del data[at : at + generator.randrange(1, 64)]
        else:
            data[at:at] = bytes(generator.randrange(256) for _ in range(generator.randrange(1, 64)))
    before = {{p.relative_to(index): p.read_bytes() for p in (index / "rows").iterdir()}} | {{path.relative_to(index): whole}}
    path.write_bytes(bytes(data))
    print(number, path.relative_to(index), file=sys.stderr, flush=True)
    if kind != "search":
        reseal(index)
    try:
        found = use(index)
        answered += 1
        assert kind != "search" or found == right
    except WherefromError:
        refused += 1
    for name, content in before.items():
        (index / name).write_bytes(content)
    manifest.write_bytes(sealed)
print(refused, answered)
"""


@pytest.mark.parametrize("kind", ["arrow", "safetensors", "rows", "search"])
def test_no_mutated_file_ends_in_a_crash_or_a_traceback(index, kind):
    rounds = int(os.environ.get("WHEREFROM_FUZZ_ROUNDS", "40"))
    script = FUZZ.format(tests=os.path.dirname(__file__))
    command = [sys.executable, "-c", script, str(index), kind, os.environ.get("WHEREFROM_FUZZ_SEED", "0"), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=570)
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])
    refused, answered = map(int, done.stdout.split())
    assert refused + answered == rounds
    assert refused > 0 or kind == "search"


def test_an_arrow_file_with_one_changed_offset_is_refused(index):
    """The offsets of the texts point beyond their bytes."""
    opened = Index(index)
    rows = opened.shards[0].rows
    path = index / "documents" / f"{opened.shards[0].id}.arrow"
    with pa.OSFile(str(path)) as file:  # not mapped, since it is written below
        batch = pa.ipc.open_file(file).get_batch(0)
    offsets = batch.column("text").buffers()[1].to_pybytes()
    data = path.read_bytes()
    assert data.count(offsets) == 1
    last = int.from_bytes(offsets[4 * batch.num_rows : 4 * batch.num_rows + 4], "little")
    offset = data.index(offsets) + 4 * batch.num_rows
    for value in (last + 10**6, last + 1, 2**31 - 1):
        path.write_bytes(data[:offset] + value.to_bytes(4, "little") + data[offset + 4 :])
        with pytest.raises(IntegrityError, match="not a whole Arrow file"):
            Documents(path, rows).check()


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_a_compressed_batch_is_read_if_its_size_is_what_it_says_and_not_too_large(index, codec):
    opened = Index(index)
    path = index / "documents" / f"{opened.shards[0].id}.arrow"
    before = [Documents(path, opened.shards[0].rows)[row] for row in range(opened.shards[0].rows)]
    with pa.OSFile(str(path)) as file:
        table = pa.ipc.open_file(file).read_all()
    path.unlink()
    with pa.ipc.new_file(str(path), table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as sink:
        sink.write_table(table)
    after = Documents(path, table.num_rows)
    assert all(repr(after[row]) == repr(example) for row, example in enumerate(before))
    data = path.read_bytes()
    text = sum(len(example.text.encode()) for example in before).to_bytes(8, "little")
    if codec == "lz4":  # whose buffers' sizes are too common to be found
        return
    assert data.count(text) == 1
    for size, message in (
        (1 << 29, "at most 536,870,912 are read"),
        (1 << 62, "at most"),
        (-7, "no size"),
        (5, "not a whole"),
        (1 << 20, "not a whole"),
    ):
        path.write_bytes(data.replace(text, size.to_bytes(8, "little", signed=True)))
        with pytest.raises(IntegrityError, match=message):
            Documents(path, table.num_rows).check()


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**12, 2**63, 2**200, -1, 1.5, 1e308]),
    st.text(max_size=5),
    st.just([]),
    st.just({}),
)


def places(content, path=()):
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content[:4]) if isinstance(content, list) else ()
    for name, value in items:
        yield from places(value, (*path, name))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_changed_manifest_ends_in_a_traceback(index_800, tmp_path_factory, data):
    source = latest_manifest(index_800)
    content = json.loads(source.read_text())
    content.pop("checksum")
    changed = copy.deepcopy(content)
    paths = [path_to_value for path_to_value in places(content) if path_to_value]
    path_to_value = paths[data.draw(st.integers(0, len(paths) - 1))]
    holder = changed
    for name in path_to_value[:-1]:
        holder = holder[name]
    action = data.draw(st.sampled_from(["replace", "remove", "copy"]))
    if action == "replace":
        holder[path_to_value[-1]] = data.draw(LEAVES)
    elif action == "remove":
        del holder[path_to_value[-1]]
    elif isinstance(holder, list):
        holder.append(copy.deepcopy(holder[path_to_value[-1]]))
    else:
        holder[str(path_to_value[-1]) + "x"] = holder[path_to_value[-1]]
    place = tmp_path_factory.mktemp("fuzz") / "i.wherefrom"
    place.mkdir()
    for name in ("rows", "documents", "encoder", "search"):
        (place / name).symlink_to(index_800 / name)
    (place / "manifests").mkdir()
    for table in (index_800 / "manifests").glob("*.zarr.zip"):
        (place / "manifests" / table.name).symlink_to(table)
    (place / "manifests" / source.name).write_bytes(seal(changed))
    with contextlib.suppress(WherefromError):
        use(place)
    shutil.rmtree(place)


def test_headers_of_safetensors_files_are_bounded(tmp_path):
    from wherefrom.indexer.models import safetensors_problem

    generator, path = random.Random(0), tmp_path / "model.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    good = len(header).to_bytes(8, "little") + header + bytes(8)
    path.write_bytes(good)
    assert safetensors_problem(path) is None
    for wrong in (
        b"",
        b"x",
        good[:-1],
        good + b"x",
        (2**62).to_bytes(8, "little") + header,
        b"version https://git-lfs.github.com/spec/v1\n",
    ):
        path.write_bytes(wrong)
        assert safetensors_problem(path), wrong
    for _ in range(500):
        data = bytearray(good)
        data[generator.randrange(len(data) - 8)] = generator.randrange(256)
        path.write_bytes(bytes(data))
        safetensors_problem(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: meta.update(codecs=5),
        lambda meta: meta.update(codecs=["bytes"]),
        lambda meta: meta.update(chunk_grid=7),
        lambda meta: meta.update(shape=["4", 128]),
        lambda meta: meta["chunk_grid"]["configuration"].update(chunk_shape=[1, 1]),
    ],
)
def test_odd_descriptions_of_arrays_are_damage(index, change):
    def odd(contents):
        meta = json.loads(contents["blocks/codes/zarr.json"])
        change(meta)
        contents["blocks/codes/zarr.json"] = json.dumps(meta).encode()

    for shard in Index(index).shards:
        rewrite(rows_path(index, shard.id), odd)
    reseal(index)
    with pytest.raises(IntegrityError):
        use(index)


def test_a_manifest_of_other_layers_than_the_models_is_damage(index):
    saved = latest_manifest(index).read_bytes()

    def swapped(content):
        for component in content["components"]:
            if component["kind"] == "sparse":
                component["role"] = {"head": "embeddings", "embeddings": "head"}[component["role"]]

    def renamed(content):
        content["components"][-1]["layers"][0]["name"] = "transformer.h.0.nothing"

    for change in (swapped, renamed):
        reseal(index, change)
        with pytest.raises(IntegrityError):
            Client(index).query(text="w1 w2 w3")
        latest_manifest(index).write_bytes(saved)
    assert Client(index).query(text="w1 w2 w3").proponents


def _doubled_layer(content):
    layers = content["components"][-1]["layers"]
    layers[1]["name"] = layers[0]["name"]


def _other_group(content):
    layers = content["components"][-1]["layers"]
    layers[0]["input_group"] = next(layer["name"] for layer in layers if layer["inputs"] != layers[0]["inputs"])


@pytest.mark.parametrize(
    "change",
    [
        _doubled_layer,
        _other_group,
        lambda content: content["components"][-1]["layers"][0].update(inputs=10**14),
        lambda content: content["components"][0].update(bits=10**14),
        lambda content: content["components"][-1]["layers"][0].update(input_rank=10**6),
        lambda content: content["encoder"].update(path="encoder/\0"),
        lambda content: content.update(number=10**16),
    ],
)
def test_manifests_that_contradict_themselves_are_damage(index, change):
    reseal(index, change)
    with pytest.raises(IntegrityError, match=r"is damaged|another's name"):
        Index(index)


@pytest.mark.parametrize("array", ["head/eigenvalues", "head/vocabulary", "blocks/transformer.h.0.mlp.c_fc/eigenvalues"])
def test_curvature_below_zero_is_damage(index, array):
    from safetensors.numpy import load_file, save_file

    path = index / Index(index).manifest.encoder.path
    arrays = load_file(path)
    arrays[array][0] = -1.0
    save_file(arrays, path)
    reseal(index)
    with pytest.raises(IntegrityError, match="numbers below 0"):
        Index(index).arrays  # noqa: B018
    assert any("numbers below 0" in (problem or "") for _, problem in Index(index).verify())


def test_an_id_that_two_rows_have_is_found_by_verify(index):
    from wherefrom.store.documents import write_documents

    opened = Index(index)
    for shard in opened.shards[:2]:
        examples = [opened.documents(shard)[row] for row in range(shard.rows)]
        examples[0] = dataclasses.replace(examples[0], id="twice")
        write_documents(index / "documents" / f"{shard.id}.arrow", examples)
    reseal(index)
    assert [problem for _, problem in Index(index).verify() if problem and "duplicate id 'twice'" in problem]
    delete(index, ids=["twice"])
    Index(index).reindex()
    assert not [problem for _, problem in Index(index).verify() if problem]


@pytest.mark.parametrize("kind", ["bad json", "deep json", "late", "negative token", "first token", "one token", "chunk"])
def test_examples_that_nobody_writes_are_damage(tmp_path, kind):
    import pyarrow as pa
    from wherefrom.store.documents import Example, write_documents

    path = tmp_path / "d.arrow"
    good = Example("a", "t", "s", np.array([1, 2, 3], np.int32), np.array([False, True, True]), metadata={"m": 1})
    write_documents(path, [good, good])
    assert Documents(path, 2)[1].metadata == {"m": 1}
    with pa.OSFile(str(path)) as file:
        table = pa.ipc.open_file(file).read_all()
    changes = {
        "bad json": pa.array(["{", "{"]),
        "deep json": pa.array(["[" * 100_000] * 2),
        "late": pa.array([2**62, 2**62], pa.timestamp("s")),
        "negative token": pa.array([[1, -2, 3]] * 2, pa.list_(pa.int32())),
        "first token": pa.array([[True, True, True]] * 2),
        "one token": pa.array([[1]] * 2, pa.list_(pa.int32())),
        "chunk": pa.array([0, -1], pa.int32()),
    }
    values = changes[kind]
    if kind in ("negative token", "first token", "one token", "chunk"):
        name = {"first token": "loss_mask", "chunk": "chunk"}.get(kind, "token_ids")
        column_number = table.schema.get_field_index(name)
        table = table.set_column(column_number, table.schema.field(column_number), values)
        if kind == "one token":
            column_number = table.schema.get_field_index("loss_mask")
            table = table.set_column(column_number, table.schema.field(column_number), pa.array([[False]] * 2))
    else:
        encoded = {b"wherefrom:encoding": b"json"} if "json" in kind else None
        field = pa.field("m", values.type, metadata=encoded)
        column_number = table.schema.get_field_index("metadata")
        struct = pa.StructArray.from_arrays([values], fields=[field])
        table = table.set_column(column_number, pa.field("metadata", struct.type, nullable=False), struct)
    with pa.ipc.new_file(str(path), table.schema) as sink:
        sink.write_table(table)
    with pytest.raises(IntegrityError):
        Documents(path, 2)[0]
