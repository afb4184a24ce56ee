"""Indexes and corpora in an object store: moto's S3 server on loopback, with a proxy before it that makes trouble.

Tests without the proxy also run in a store of another kind, such as Azurite's: WHEREFROM_TEST_STORE=az://container names it, and obstore's
own variables say how it is reached.
"""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from contextlib import suppress
from itertools import count

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from helpers import random_texts, record, write_jsonl
from stores import BUCKET, Proxy, environment, s3_server
from wherefrom import BuildConfig, Client, Query
from wherefrom.cli import main
from wherefrom.ray_jobs.build import build
from wherefrom.store import objects
from wherefrom.store.corpus import Corpus, describe_sources
from wherefrom.store.errors import BusyError, IntegrityError, NotFoundError, StorageError, UsageError
from wherefrom.store.fields import Fields
from wherefrom.store.files import create_only, exclusive
from wherefrom.store.index import Index
from wherefrom.store.manifest import manifest_path
from wherefrom.store.objects import TRAFFIC, StorePath, fetched, local_or_store
from wherefrom.store.update import delete

pytestmark = pytest.mark.processes
NUMBERS = count()
QUERIES = [Query(row=3), Query(row=17)]


@pytest.fixture(scope="module")
def server():
    with s3_server() as port:
        yield port


@pytest.fixture
def proxy(server):
    proxy = Proxy(server)
    yield proxy
    proxy.close()


@pytest.fixture(autouse=True)
def machine(server, tmp_path, monkeypatch):
    """A machine that has read nothing yet; give a function that makes another one."""

    def fresh(port=server):
        for name, value in environment(port, tmp_path / f"cache{next(NUMBERS)}").items():
            monkeypatch.setenv(name, value)
        objects._MIRRORS.clear()
        TRAFFIC.requests = TRAFFIC.fetched = TRAFFIC.put = 0

    monkeypatch.setattr(objects, "_FIRST_PAUSE", 0.02)
    fresh()
    return fresh


@pytest.fixture
def prefix():
    store = os.environ.get("WHEREFROM_TEST_STORE", f"s3://{BUCKET}")
    return f"{store}/{os.getpid()}-{next(NUMBERS)}"


def made(out, model_dir, data, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build(BuildConfig(model=str(model_dir), data=data, out=out, **({"rank": 4, "shard_rows": 16, "group_rows": 32} | options)))
    return out


def without_path(answer):
    """The record of an answer, without the path of its index."""
    answer_record = record(answer)
    answer_record["index"].pop("path")
    return answer_record


def content(index):
    """Arrays of rows and search caches, and the examples, of an index, by their place; documents in a store are compressed."""
    arrays = {}
    for folder in ("rows", "search"):
        for path in (index.path / folder).iterdir():
            with zipfile.ZipFile(fetched(path)) as file:
                names = [name for name in file.namelist() if "/c/" in name and not name.startswith("documents_")]
                arrays |= {f"{folder}/{path.name}/{name}": file.read(name) for name in names}
    documents = {path.name for path in (index.path / "documents").iterdir()}
    return arrays, documents, [repr(index.example(row)) for row in np.flatnonzero(index.alive).tolist()]


OPTIONS = [{}, {"mode": "cosine", "group_by": "year"}, {"recall": 0.99999}, {"where": "year >= 1960", "k": 20}]


def test_an_index_in_a_store_is_that_on_a_disk(prefix, model_dir, corpus_file, tmp_path, machine):
    """Built from a corpus in a store, into the store, and asked from another machine, by the command line, too."""
    local_or_store(prefix).place[0].put("corpus/corpus.jsonl", corpus_file)
    stored_index = made(f"{prefix}/i", model_dir, f"{prefix}/corpus")
    here = made(str(tmp_path / "i"), model_dir, str(corpus_file))
    machine()
    far, near = Client(stored_index), Client(here)
    assert isinstance(far.index.path, StorePath)
    assert str(far.index.path) == stored_index
    for options in OPTIONS:
        assert list(map(without_path, far.query_many(QUERIES, **options))) == list(map(without_path, near.query_many(QUERIES, **options)))
    text = Query(text=random_texts(1, seed=5)[0])
    assert without_path(far.query(text)) == without_path(near.query(text))
    np.testing.assert_array_equal(far.scores(QUERIES), near.scores(QUERIES))
    assert [e.to_dict() for e in far.explain([5], QUERIES[0])] == [e.to_dict() for e in near.explain([5], QUERIES[0])]
    machine()
    shown = CliRunner().invoke(main, ["info", stored_index, "--json"])
    assert shown.exit_code == 0
    assert json.loads(shown.stdout)["path"] == stored_index
    for arguments in (
        ["verify", stored_index],
        ["query", stored_index, "--row", "3"],
        ["scores", stored_index, "--file", "-", "--out", str(tmp_path / "s.zarr")],
    ):
        done = CliRunner().invoke(main, arguments, input='{"row": 3}')
        assert done.exit_code == 0, done.output
    for path in (f"{prefix}/nothing", f"s3://{BUCKET}/{next(NUMBERS)}"):
        with pytest.raises(NotFoundError, match=f"there is no index at {path}; build one"):
            Index(path)
    with pytest.raises(NotFoundError, match=f"there is no object or prefix {prefix}/none.jsonl"):
        made(f"{prefix}/j", model_dir, f"{prefix}/none.jsonl")


def test_an_index_in_a_store_is_changed_as_one_on_a_disk(prefix, model_dir, corpus_file, tmp_path, machine):
    remote, local = made(f"{prefix}/i", model_dir, str(corpus_file)), made(str(tmp_path / "i"), model_dir, str(corpus_file))
    assert content(Index(remote)) == content(Index(local))
    more = tmp_path / "more.jsonl"
    write_jsonl(more, [{"id": f"new{i}", "text": text} for i, text in enumerate(random_texts(5, seed=7))])
    answer = without_path(Client(remote).query(row=3))
    removed = tmp_path / "ids.txt"
    removed.write_text("\n".join(a["id"] for a in answer["proponents"][1:3]))
    for arguments in (
        ("add", "--data", more),
        ("delete", "--ids", removed),
        ("compact", "--prune"),
        ("reindex",),
        ("reindex", "--faiss", "Flat"),
        ("fit", "--examples", 20),
    ):
        command, *rest = map(str, arguments)
        for place in (remote, local):
            machine()  # every command on another machine
            done = CliRunner().invoke(main, [command, place, *rest])
            assert done.exit_code == 0, done.output
        assert content(Index(remote)) == content(Index(local)), command
    machine()
    far, near = Client(remote), Client(local)
    assert len(far.index) == len(near.index) == 123
    for options in (*OPTIONS, {"engine": "faiss"}, {"rerank": 4}):
        assert list(map(without_path, far.query_many(QUERIES[:1], **options))) == list(
            map(without_path, near.query_many(QUERIES[:1], **options))
        )
    assert {p.name for p in far.index.path.iterdir()} == {
        "documents",
        "encoder",
        "faiss",
        "manifests",
        "rerank",
        "rows",
        "search",
        "usual.json",
    }
    assert not list((far.index.path / "staging").iterdir())
    delete(far.index.path, ["new1"])
    far._last_refresh = 0.0
    assert far.refreshed().index.manifest.number == far.index.manifest.number + 1


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_part_of_a_corpus_fetches_its_range(prefix, tmp_path, machine, monkeypatch, kind):
    """And a corpus is known by the store's tags, without being fetched."""
    monkeypatch.setattr(objects, "_PIECE", 1 << 12)
    texts = [{"text": text} for text in random_texts(5000, seed=3, shortest=20, longest=30)]
    file = tmp_path / f"c.{kind}"
    if kind == "jsonl":
        write_jsonl(file, texts)
    else:
        pq.write_table(pa.Table.from_pylist(texts), file, row_group_size=100, use_dictionary=False)
    size = file.stat().st_size
    address = f"{prefix}/corpus/c.{kind}"
    local_or_store(prefix).place[0].put(f"corpus/c.{kind}", file)
    machine()
    (described,) = describe_sources([address])
    assert (described["bytes"], described["sha256"], bool(described["tag"])) == (size, None, True)
    assert TRAFFIC.fetched == 0
    parts = Corpus([address]).divide(size // 8)
    assert len(parts) > 7
    machine()
    (slice,) = Corpus([address]).divide(size // 8)[3]
    slice = pickle.loads(pickle.dumps(slice))
    texts_of_part = [document.text for document in Corpus.of([slice], Fields())]
    position = [record["text"] for record in texts].index(texts_of_part[0])
    assert texts_of_part == [record["text"] for record in texts[position : position + len(texts_of_part)]]
    assert 400 < len(texts_of_part) < 900
    assert TRAFFIC.fetched < size / 2  # an eighth, and a footer
    local_or_store(prefix).place[0].put(f"corpus/c.{kind}", b"another content")
    machine()
    assert describe_sources([address])[0]["tag"] != described["tag"]


def test_a_query_fetches_what_it_touches(prefix, tmp_path, machine):
    """Of 20,000 sparse rows: the posting lists of the query's tokens, and the documents of the answer."""
    index = grown_sparse(tmp_path / "i")
    place = local_or_store(f"{prefix}/i")
    for path in sorted(p for p in index.path.rglob("*") if p.is_file()):
        place.place[0].put(path.relative_to(index.path).as_posix(), path)
    total = TRAFFIC.put
    machine()
    answer = Client(f"{prefix}/i").query(row=11, k=3)
    assert without_path(answer) == without_path(Client(index).query(row=11, k=3))
    assert TRAFFIC.fetched < total / 4
    assert TRAFFIC.requests < 200
    first = TRAFFIC.fetched
    assert without_path(Client(f"{prefix}/i").query(row=11, k=3)) == without_path(answer)  # what was fetched is there
    assert TRAFFIC.fetched - first < 20_000  # manifests alone
    objects._MIRRORS.clear()  # also for another process
    Client(f"{prefix}/i").query(row=11, k=3)
    assert TRAFFIC.fetched - first < 40_000


def grown_sparse(path):
    """An index of 20,000 rows with 20 of 4,000 tokens each."""
    import uuid

    from helpers import sparse_component
    from wherefrom.store.bits import rotate
    from wherefrom.store.documents import Example, write_documents
    from wherefrom.store.manifest import FileRecord
    from wherefrom.store.shard import documents_path, publish_index, shard_entry, write_shard
    from wherefrom.store.sparse import Coded, encode_sparse

    golden = Index(os.path.join(os.path.dirname(__file__), "golden/index.wherefrom"))
    component = sparse_component(4000, 64, 64)
    generator = np.random.default_rng(0)
    shards = []
    for first in range(0, 20_000, 5000):
        shard_id = str(uuid.UUID(int=first + 1))
        tokens, mask = np.array([1, 2], np.int32), np.array([False, True])
        write_documents(
            documents_path(path, shard_id), [Example(f"r{i}", "text " * 40, "s", tokens, mask, f"r{i}") for i in range(first, first + 5000)]
        )
        keys = np.stack([np.sort(generator.choice(4000, 20, replace=False)) for _ in range(5000)]).astype(np.uint32)
        codes = generator.integers(0, 256, (100_000, 8), np.uint8)
        lengths = generator.random(100_000).astype(np.float32)
        norms = np.sqrt((lengths.reshape(5000, 20) ** 2).sum(1))
        coded = Coded(np.full(5000, 20), keys.reshape(-1), codes, lengths, norms, norms**2)
        write_shard(path, shard_id, {"head": encode_sparse(coded, 4000, 64)}, np.ones(5000, np.float32))
        shards.append(shard_entry(path, shard_id, first, 5000, 10_000, [component]))
    encoder = path / "encoder" / f"{uuid.UUID(int=7)}.safetensors"
    encoder.parent.mkdir()
    from safetensors.numpy import save_file

    arrays = {"head/basis": np.eye(64), "head/eigenvalues": np.ones(64), "head/vocabulary": np.ones(4000)}
    save_file(arrays, encoder)
    fields = {**dict(golden.manifest), "components": (component,), "number": 1, "group_rows": 10_000, "features": ("sparse",)}
    publish_index(path, shards, np.zeros(0, np.int64), {**fields, "encoder": FileRecord.of(path, encoder)})
    Index(path).reindex()
    assert rotate(np.eye(64, dtype=np.float32), 64, 0).shape == (64, 64)
    return Index(path)


@pytest.mark.parametrize("what", ["slow", "refuse", "break"])
def test_a_store_with_troubles_is_asked_again(prefix, model_dir, corpus_file, tmp_path, machine, proxy, what):
    proxy.trouble = lambda method, path, number: what if number % (25 if what == "slow" else 5) == 0 else None
    machine(proxy.port)
    few = {"shard_rows": 40, "group_rows": 80}
    stored_index = made(f"{prefix}/i", model_dir, str(corpus_file), **few)
    here = made(str(tmp_path / "i"), model_dir, str(corpus_file), **few)
    machine(proxy.port)
    assert list(map(without_path, Client(stored_index).query_many(QUERIES))) == list(map(without_path, Client(here).query_many(QUERIES)))
    assert content(Index(stored_index)) == content(Index(here))
    assert len(proxy.requests) > 40


def test_a_store_that_does_not_answer_is_one_sentence(prefix, model_dir, corpus_file, machine, proxy, monkeypatch):
    stored_index = made(f"{prefix}/i", model_dir, str(corpus_file))
    monkeypatch.setattr(objects, "_MOST_RETRIES", 1)
    monkeypatch.setattr(objects, "_ATTEMPTS", 2)
    machine(proxy.port)
    index = Index(stored_index)
    proxy.trouble = lambda *_: "refuse"
    for call in (lambda: Client(index).query(row=3), lambda: Index(stored_index), lambda: delete(local_or_store(stored_index), ["x"])):
        with pytest.raises(StorageError, match=r"s3://.* cannot be (used|read or written): .*; try again|cannot use s3://"):
            call()
    machine(1)
    with pytest.raises(StorageError, match="s3://"):
        Index(stored_index)
    done = CliRunner().invoke(main, ["query", stored_index, "--row", "3", "--local"])
    assert done.exit_code == 1
    assert "Traceback" not in done.output
    assert done.stderr.startswith("Error: ")


def test_one_writer_wins_and_the_other_is_told(prefix, model_dir, corpus_file, machine, monkeypatch):
    monkeypatch.setattr(objects, "_LEASE_SECONDS", 3.0)
    monkeypatch.setattr(objects, "_RENEW_SECONDS", 0.3)
    out = local_or_store(f"{prefix}/i")
    with exclusive(out), pytest.raises(BusyError, match=f"another build is writing into {prefix}/i; wait for it"), exclusive(out):
        pass
    with exclusive(out):  # it was given back
        pass
    out.place[0].create(objects._LOCK, b"{}")  # by a writer that died
    started = time.monotonic()
    with exclusive(out):
        assert 3.0 <= time.monotonic() - started < 30
    outcomes = []

    def write():
        try:
            made(f"{prefix}/j", model_dir, str(corpus_file))
            outcomes.append("made")
        except BusyError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes, key=len)[0] == "made"
    assert "another build is writing" in max(outcomes, key=len) or outcomes == ["made", "made"]  # one after the other
    path = manifest_path(local_or_store(f"{prefix}/j"), 2)
    created, refused = [], []

    def create(number):
        try:
            create_only(path, f"{number}".encode())
            created.append(number)
        except BusyError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [str(created[0]).encode()] == [path.read_bytes()]
    assert len(created) == 1
    assert all("was published by somebody else meanwhile" in sentence for sentence in refused)


def test_a_build_that_was_killed_is_continued_by_another_machine(prefix, model_dir, corpus_file, tmp_path, machine, proxy, monkeypatch):
    """Killed while it uploads the rows of the third shard, by SIGKILL; what was uploaded before is not made again."""
    script = (
        "import sys; from wherefrom.cli import main; main(['build', '--model', sys.argv[1], '--data', sys.argv[2], '--out', sys.argv[3],"
        " '-o', 'rank=4', '-o', 'shard_rows=16', '-o', 'group_rows=32'])"
    )
    variables = {**os.environ, **environment(proxy.port, tmp_path / "first")}
    command = [sys.executable, "-c", script, str(model_dir), str(corpus_file), f"{prefix}/i"]
    running = []

    def trouble(method, path, number):
        rows = [p for m, p in proxy.requests if m == "PUT" and "/rows/" in p]
        if len(rows) == 3 and running:
            running[0].send_signal(signal.SIGKILL)
            time.sleep(0.2)

    proxy.trouble = trouble
    with subprocess.Popen(command, env=variables, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        running.append(process)
        assert process.wait(120) == -signal.SIGKILL
    monkeypatch.setattr(objects, "_LEASE_SECONDS", 2.0)
    machine()
    out = local_or_store(f"{prefix}/i")
    with pytest.raises(NotFoundError, match="holds a build that is not finished"):
        Index(f"{prefix}/i")
    before = {path.name: path.stat().st_mtime_ns for path in (out / "rows").iterdir()}
    assert 2 <= len(before) <= 3
    for place in (f"{prefix}/i", tmp_path / "i"):
        arguments = [
            "--model",
            model_dir,
            "--data",
            corpus_file,
            "--out",
            place,
            "-o",
            "rank=4",
            "-o",
            "shard_rows=16",
            "-o",
            "group_rows=32",
        ]
        assert CliRunner().invoke(main, ["build", *map(str, arguments)]).exit_code == 0
    after = {path.name: path.stat().st_mtime_ns for path in (out / "rows").iterdir()}
    assert len(after) == 8
    assert {name: after[name] for name in before} == before
    assert content(Index(f"{prefix}/i")) == content(Index(tmp_path / "i"))


FORKING = """
import json, os, sys, warnings
from wherefrom import BuildConfig
from wherefrom.ray_jobs.build import build
import transformers.models.gpt2.modeling_gpt2
warnings.simplefilter("ignore")
for line in sys.stdin:
    variables, config = json.loads(line)
    child = os.fork()
    if child == 0:
        os.environ.update(variables)
        build(BuildConfig(**config))
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.processes
def test_builds_killed_at_any_upload_are_continued_by_another_machine(
    prefix, model_dir, corpus_file, tmp_path, machine, proxy, monkeypatch
):
    """WHEREFROM_KILLS builds, each killed by SIGKILL at another request that writes; the index is that of an undisturbed build."""
    kills = int(os.environ.get("WHEREFROM_KILLS", "2"))
    options = {"model": str(model_dir), "data": (str(corpus_file),), "rank": 4, "shard_rows": 16, "group_rows": 32}
    expected = content(Index(made(str(tmp_path / "i"), model_dir, str(corpus_file))))
    monkeypatch.setattr(objects, "_LEASE_SECONDS", 0.5)
    generator = np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    killed, writes = [], []

    def trouble(method, path, number):
        if method in ("PUT", "POST", "DELETE"):
            writes.append(path)
            if killed and len(writes) >= killed[-1][1]:
                with suppress(ProcessLookupError):  # it has ended
                    os.kill(killed.pop()[0], signal.SIGKILL)
                time.sleep(0.05)

    proxy.trouble = trouble
    with subprocess.Popen([sys.executable, "-c", FORKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def start(out, cache):
            process.stdin.write(json.dumps([environment(proxy.port, tmp_path / cache), {**options, "out": out}]) + "\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        start(f"{prefix}/whole", "cache-whole")
        assert int(process.stdout.readline()) == 0
        total = len(writes)
        ends = []
        for trial in range(kills):
            out = f"{prefix}/killed-{trial}"
            place = 1 + int((trial + generator.random()) / kills * total)
            writes.clear()
            child = start(out, f"cache-{trial}")
            killed.append((child, place))
            ends.append(int(process.stdout.readline()))
            killed.clear()
            machine()
            assert content(Index(made(out, model_dir, str(corpus_file)))) == expected, (trial, place, total)
        process.stdin.close()
    assert -signal.SIGKILL in ends
    print(ends.count(-signal.SIGKILL), "of", kills, "builds were killed at one of", total, "writes")


def test_a_changed_object_is_an_error_and_the_mirror_keeps_to_its_size(prefix, model_dir, corpus_file, tmp_path, machine, monkeypatch):
    stored_index = made(f"{prefix}/i", model_dir, str(corpus_file))
    machine()
    index = Index(stored_index)
    mirror, _ = index.path.place
    path = next((index.path / "rows").iterdir())
    raw = path.read_bytes()
    mirror.put(f"rows/{path.name}", raw[:2000] + bytes([raw[2000] ^ 1]) + raw[2001:])
    machine()
    with pytest.raises(IntegrityError):
        [without_path(a) for a in Client(stored_index).query_many([Query(row=row) for row in range(0, 120, 7)], k=50)]
    assert CliRunner().invoke(main, ["verify", stored_index]).exit_code == 4
    mirror.put(f"rows/{path.name}", raw[:-100])
    machine()
    with pytest.raises(IntegrityError, match=r"has [\d,]+ bytes where [\d,]+ belong"):
        Client(stored_index).query(row=3)
    mirror.put(f"rows/{path.name}", raw)
    monkeypatch.setenv("WHEREFROM_CACHE_BYTES", "200000")
    monkeypatch.setattr(objects, "_EVICT_EVERY", 0)
    sizes = []
    for _ in range(3):
        objects._MIRRORS.clear()
        Client(stored_index).query_many(QUERIES)
        files = [os.stat(os.path.join(f, n)).st_blocks * 512 for f, _, names in os.walk(objects.cache_folder()) for n in names]
        sizes.append(sum(files))
    assert list(Client(stored_index).query(row=3).proponents)
    assert sizes[-1] < 2 * sizes[0] + 200_000
    shutil.rmtree(objects.cache_folder())  # while a process reads it
    assert Client(stored_index).query(row=17).proponents


def test_addresses_that_are_none_and_a_missing_library_are_refused(monkeypatch):
    assert local_or_store("s3:/x") != local_or_store(f"s3://{BUCKET}/x")
    assert not isinstance(local_or_store("http://x/y"), StorePath)
    assert str(local_or_store(f"s3://{BUCKET}/x/") / "rows" / "y") == f"s3://{BUCKET}/x/rows/y"
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(UsageError, match=r"an index or corpus in an object store needs the extra object-stores: pip install"):
        Index(f"s3://{BUCKET}/other")


@pytest.mark.slow
@pytest.mark.skipif("WHEREFROM_KILLS" not in os.environ, reason="takes most of a minute; set WHEREFROM_KILLS to run it")
def test_the_example_of_a_cluster_runs(model_dir, corpus_file, monkeypatch):
    """Two Ray nodes without a shared folder, one killed during the build; the answer through the server is that of one process."""
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    script = os.path.join(os.path.dirname(__file__), "../examples/cluster.py")
    done = subprocess.run(
        [sys.executable, script, "--model", str(model_dir), "--data", str(corpus_file)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the answer is that of one process: True" in done.stdout
    assert "a node was killed when" in done.stdout
