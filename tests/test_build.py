"""Builds: the same bytes whatever the workers, killed and taken up again, interrupted, crowded, starved of disk."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import wherefrom
from helpers import make_model, make_tokenizer, random_texts, words, write_jsonl
from wherefrom import BuildConfig, Client
from wherefrom.ray_jobs import corpus as corpus_pieces
from wherefrom.ray_jobs.build import build
from wherefrom.ray_jobs.progress import Console
from wherefrom.store.corpus import Slice
from wherefrom.store.errors import BusyError, DataError, NotFoundError, NumericalError, UsageError
from wherefrom.store.files import exclusive
from wherefrom.store.index import Index
from wherefrom.store.manifest import read_manifest

COUNTED = ("documents", "split", "truncated", "skipped", "skipped_first", "left_out_columns")


def config(model_dir, corpus, out, **options):
    data = (str(corpus),) if not isinstance(corpus, tuple) else corpus
    return BuildConfig(model=str(model_dir), data=data, out=str(out), **({"rank": 4, "shard_rows": 32} | options))


def checksums(out):
    """Names, sizes and checksums of all files, from the manifest."""
    index = Index(out)
    records = [(r.path, r.bytes, r.sha256) for r in (index.manifest.encoder, index.manifest.table)]
    for shard in index.shards:
        records.append((f"rows/{shard.id}.zarr.zip", shard.bytes, shard.sha256))
        records.append((f"documents/{shard.id}.arrow", shard.documents_bytes, shard.documents_sha256))
    return records


def texts(out):
    index = Index(out)
    return [(index.example(i).id, index.example(i).text) for i in range(len(index))]


def files(directory):
    return sorted(str(p.relative_to(directory)) for p in Path(directory).rglob("*") if p.is_file())


def test_a_finished_build_leaves_only_what_the_manifest_names(index_dir):
    named = [path for path, _, _ in checksums(index_dir)]
    caches = [f"search/{group.id}.zarr.zip" for group in Index(index_dir).groups]  # which no manifest names
    assert files(index_dir) == sorted([".lock", "manifests/000001.json", "manifests/latest", "usual.json", *named, *caches])


def test_a_corpus_may_be_one_plain_path(tmp_path, model_dir, corpus_file, index_dir):
    build(BuildConfig(model=str(model_dir), data=str(corpus_file), out=str(tmp_path / "i"), rank=4, shard_rows=32))
    assert checksums(tmp_path / "i") == checksums(index_dir)
    assert wherefrom.__version__ == Index(tmp_path / "i").manifest.wherefrom
    with pytest.raises(UsageError, match="model, data or out is empty"):
        BuildConfig(model=str(model_dir), data="", out=str(tmp_path / "j"))


def test_the_same_command_again_changes_nothing(tmp_path, model_dir, corpus_file):
    out = tmp_path / "i"
    first = build(config(model_dir, corpus_file, out))
    before = {f: (out / f).stat().st_mtime_ns for f in files(out)}
    assert build(config(model_dir, corpus_file, out, workers=1)) == first
    assert {f: (out / f).stat().st_mtime_ns for f in files(out)} == before


def test_the_manifest_says_how_the_index_was_built(index_dir, model_dir, corpus_file):
    manifest = read_manifest(index_dir)
    options = manifest.build.inputs.options.model_dump()
    assert (options["rank"], options["shard_rows"], options["damping"]) == (4, 32, None)
    assert manifest.components[0].curvature.damping == 0.1
    assert manifest.build.inputs.corpus[0]["path"] == str(corpus_file)
    assert manifest.models[0].id == str(Path(model_dir).resolve())
    assert manifest.components[0].curvature.examples == 120
    assert manifest.rows == 120
    assert manifest.tokens == sum(len(Index(index_dir).example(i).token_ids) - 1 for i in range(120))


@pytest.mark.parametrize("is_here", [True, False])
def test_a_corpus_in_parts_goes_on_with_the_parts_that_are_not_finished(tmp_path, model_dir, monkeypatch, is_here):
    """On workers that have the files, and by the driver where they do not."""
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": text} for text in random_texts(120, seed=3)])  # with default ids
    build(config(model_dir, corpus, tmp_path / "whole"))
    monkeypatch.setattr(corpus_pieces, "_LEAST_PIECE", corpus.stat().st_size // 5)
    monkeypatch.setattr(Slice, "is_here", is_here)
    write = corpus_pieces.CorpusWriter._write_shard
    written = []

    def stop_at_the_third(self, part, shards, examples):
        written.append(part)
        if len(written) == 3:
            raise KeyboardInterrupt
        return write(self, part, shards, examples)

    monkeypatch.setattr(corpus_pieces.CorpusWriter, "_write_shard", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        build(config(model_dir, corpus, tmp_path / "i"))
    damaged = json.loads((tmp_path / "i" / "staging" / "piece-0.json").read_text())["shards"][0]["id"]
    (tmp_path / "i" / "documents" / f"{damaged}.arrow").write_bytes(b"")
    build(config(model_dir, corpus, tmp_path / "i"))
    assert written == [0, 1, 2, 0, 2, 3, 4, 5][: len(written)]
    assert len(written) >= 7
    assert texts(tmp_path / "i") == texts(tmp_path / "whole")


def test_counts_and_errors_of_parts_are_those_of_the_corpus(tmp_path, model_dir, monkeypatch):
    records = [{"text": text, "n": number} for number, text in enumerate(random_texts(100, seed=3))]
    lines = [json.dumps(record) for record in records]
    for number in (7, 51, 99):
        lines[number] = "{"
    lines[60] = json.dumps({"id": "long", "text": words(*([1, 2, 3] * 40)), "raw": None})
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("\n".join(lines))
    options = {"max_tokens": 16, "bad_documents": "skip"}
    records = []
    for name, size in (("whole", 1 << 20), ("parts", 1000)):
        monkeypatch.setattr(corpus_pieces, "_LEAST_PIECE", size)
        records.append(build(config(model_dir, corpus, tmp_path / name, **options)).build)
    whole, parts = [{name: getattr(record, name) for name in COUNTED} for record in records]
    assert parts == whole
    assert (whole["documents"], whole["split"], whole["skipped"]) == (97, whole["split"], 3)
    assert [error.split(":")[0] for error in whole["skipped_first"]] == ["c.jsonl line 8", "c.jsonl line 52", "c.jsonl line 100"]
    assert texts(tmp_path / "parts") == texts(tmp_path / "whole")
    lines[80] = lines[20] = json.dumps({"id": "twice", "text": "w1 w2 w3"})
    corpus.write_text("\n".join(lines))
    with pytest.raises(DataError, match="duplicate id 'twice'"):
        build(config(model_dir, corpus, tmp_path / "refused", **options))
    with pytest.raises(DataError, match=r"c\.jsonl line 8: not valid JSON"):
        build(config(model_dir, corpus, tmp_path / "refused", max_tokens=16))


def test_what_of_a_folder_is_not_kept_is_recorded_and_changes_nothing(tmp_path, model_dir):
    from click.testing import CliRunner
    from wherefrom.cli import main

    folder = tmp_path / "corpus"
    folder.mkdir()
    images = [{"bytes": b"x", "path": None}] * 4
    pq.write_table(pa.table({"text": random_texts(4), "image": images}), folder / "c.parquet")
    (folder / "README.md").write_text("# A card")
    (folder / "scan.pdf").write_text("x")
    (folder / ".hidden").write_text("x")
    arguments = ["build", "--model", model_dir, "--data", folder, "--out", tmp_path / "i", "-o", "rank=2"]
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    assert "not read: 2 files: README.md (a dataset card or license), scan.pdf (no kind of document)\n" in done.stdout
    assert "left out columns: image (binary)\n" in done.stdout
    (folder / "scan.pdf").write_text("another")
    (folder / ".hidden").write_text("another")
    again = CliRunner().invoke(main, [str(a) for a in (*arguments, "--json")])
    summary = json.loads(again.stdout)
    unread = ["README.md (a dataset card or license)", "scan.pdf (no kind of document)"]
    assert (summary["unread"], summary["left_out_columns"]) == ({"files": 2, "first": unread}, {"image": "binary"})
    shown = " ".join(CliRunner().invoke(main, ["info", str(tmp_path / "i")]).stdout.split())
    assert "not read 2 files: README.md" in shown
    assert "left out columns image (binary)" in shown


def test_documents_with_tokens_that_the_model_lacks_can_be_skipped(tmp_path, corpus_file):
    model = make_model("gpt2", "float32")
    model.resize_token_embeddings(50)
    model.save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    records = [json.loads(line) for line in corpus_file.read_text().splitlines()]
    fitting = [r["id"] for r in records if all(int(w[1:]) < 50 for w in r["text"].split())]
    with pytest.raises(DataError, match=r"example 'd\d+' has token \d+, the model embeds only 50; .* \(`bad_documents=skip"):
        build(config(tmp_path / "m", corpus_file, tmp_path / "a"))
    build(config(tmp_path / "m", corpus_file, tmp_path / "b", bad_documents="skip"))
    assert Index(tmp_path / "b").column("id").to_pylist() == fitting
    assert 0 < len(fitting) < 120


def test_a_shards_documents_are_bounded_in_bytes(tmp_path, model_dir, corpus_file, index_dir, monkeypatch):
    monkeypatch.setattr("wherefrom.ray_jobs.corpus._SHARD_BYTES", 1000)
    build(config(model_dir, corpus_file, tmp_path / "i"))
    small, whole = Index(tmp_path / "i"), Index(index_dir)
    assert len(small.shards) > len(whole.shards)
    assert small.column("text").to_pylist() == whole.column("text").to_pylist()


@pytest.mark.processes
@pytest.mark.slow
def test_a_ray_cluster_at_an_address_makes_them_too(tmp_path, model_dir, corpus_file, index_dir):
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        with pytest.raises(UsageError, match="has 1 CPUs, 2 workers"):
            build(config(model_dir, corpus_file, tmp_path / "two", workers=2, address=cluster.address))
        build(config(model_dir, corpus_file, tmp_path / "one", workers=1, address=cluster.address))
    finally:
        cluster.shutdown()
    assert checksums(tmp_path / "one") == checksums(index_dir)
    with pytest.raises(NotFoundError, match="cannot be reached"):
        build(config(model_dir, corpus_file, tmp_path / "gone", address="localhost:1"))


@pytest.mark.processes
@pytest.mark.slow
def test_two_ray_workers_of_which_one_dies_make_the_very_same_files_as_one(tmp_path, monkeypatch):
    """Also of a corpus that is read in parts."""
    import threading

    import psutil

    model = make_slow_model(tmp_path / "model")
    corpus = slow_corpus(tmp_path)
    monkeypatch.setattr(corpus_pieces, "_LEAST_PIECE", corpus.stat().st_size // 5)
    alone, out = tmp_path / "alone", tmp_path / "out"
    expected = build(config(model, corpus, alone, shard_rows=24, fit_examples=64))
    killed = []

    def kill_one():
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not killed:
            if len(list(out.glob("rows/*.zarr.zip"))) >= 2 and not (out / "manifests").exists():
                for process in psutil.Process().children(recursive=True):  # of this test's own Ray
                    if process.cmdline() and process.cmdline()[0].startswith("ray::_Actor"):
                        process.kill()
                        killed.append(process.pid)
                        return
            time.sleep(0.005)

    watcher = threading.Thread(target=kill_one)
    watcher.start()
    manifest = build(config(model, corpus, out, shard_rows=24, fit_examples=64, workers=2))
    watcher.join()
    assert killed
    assert manifest.table == expected.table
    assert checksums(out) == checksums(alone)
    assert len(Index(out).shards) > -(-400 // 24)
    assert [text for _, text in texts(out)] == [json.loads(line)["text"] for line in corpus.read_text().splitlines()]


def make_slow_model(directory, width=192):
    """A model that takes some milliseconds a batch, so that there is time to kill its build."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=62, n_embd=width, n_layer=3, n_head=2, n_positions=64, eos_token_id=0)).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def slow_corpus(tmp_path, count=400):
    return write_jsonl(tmp_path / "slow.jsonl", [{"text": t} for t in random_texts(count, seed=8, shortest=20, longest=60)])


BUILDER = """
import os, sys
from wherefrom import BuildConfig
from wherefrom.ray_jobs.build import build
import wherefrom.ray_jobs.build, transformers.models.gpt2.modeling_gpt2
model, corpus = sys.argv[1:]
for out in sys.stdin:
    child = os.fork()
    if child == 0:
        build(BuildConfig(model=model, data=(corpus,), out=out.strip(), rank=4, shard_rows=24, fit_examples=64))
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@contextmanager
def builder(model, corpus):
    """A process that has imported all, and forks for each build; give a function that starts one, and returns its number."""
    command = [sys.executable, "-c", BUILDER, str(model), str(corpus)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def start(out):
            process.stdin.write(f"{out}\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        def wait():
            return int(process.stdout.readline())

        yield start, wait
        process.stdin.close()


@pytest.mark.processes
@pytest.mark.slow
def test_a_build_killed_at_ten_random_points_goes_on_to_the_very_same_files(tmp_path):
    model, corpus = make_slow_model(tmp_path / "model", 64), slow_corpus(tmp_path)
    with builder(model, corpus) as (start, wait):
        start(tmp_path / "undisturbed")
        started = time.monotonic()
        assert wait() == 0
        _kill_at_random_points(tmp_path, model, corpus, start, wait, time.monotonic() - started)


def _kill_at_random_points(tmp_path, model, corpus, start, wait, duration):
    expected = checksums(tmp_path / "undisturbed")
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)  # shown when the test fails
    generator = random.Random(seed)
    reached = []
    kills = int(os.environ.get("WHEREFROM_KILLS", "10"))
    for trial in range(kills):
        out = tmp_path / f"killed-{trial}"
        process = start(out)
        time.sleep((0.02 + 0.88 * (trial + generator.random()) / kills) * duration)  # spread over the whole build
        with suppress(ProcessLookupError):  # it has ended
            os.kill(process, signal.SIGKILL)
        wait()
        reached.append((len(list(out.glob("documents/*"))), len(list(out.glob("rows/*"))), (out / "manifests").exists()))
        build(config(model, corpus, out, shard_rows=24, fit_examples=64))
        assert checksums(out) == expected, (seed, trial)
        assert texts(out) == texts(tmp_path / "undisturbed")
        assert not (out / "staging").exists()
        shutil.rmtree(out)
    print(reached)
    assert any(rows and not finished for _, rows, finished in reached), (seed, reached)


def test_whole_shards_are_kept_and_damaged_ones_redone(tmp_path, model_dir, corpus_file, index_dir, monkeypatch):
    from wherefrom.ray_jobs import worker

    out = tmp_path / "i"
    calls = []
    original = worker.write_shard

    def write_two_then_fail(*arguments):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(arguments[0])
        original(*arguments)

    monkeypatch.setattr(worker, "write_shard", write_two_then_fail)
    with pytest.raises(KeyboardInterrupt):
        build(config(model_dir, corpus_file, out))
    assert not (out / "manifests").exists()
    kept, damaged = sorted((out / "rows").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-1])
    time_before = kept.stat().st_mtime_ns
    (out / "staging/half-written.zarr.zip").write_bytes(b"half")
    written = []
    monkeypatch.setattr(worker, "write_shard", lambda *a: (written.append(a[0]), original(*a)))
    build(config(model_dir, corpus_file, out))
    assert len(written) == 3
    assert kept.stat().st_mtime_ns == time_before
    assert checksums(out) == checksums(index_dir)


def test_a_damaged_encoder_is_fitted_again_with_its_rows(tmp_path, model_dir, corpus_file, index_dir, monkeypatch):
    from wherefrom.ray_jobs import build as module

    out = tmp_path / "i"
    monkeypatch.setattr(module, "_publish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build(config(model_dir, corpus_file, out))
    monkeypatch.undo()
    encoder = next((out / "encoder").iterdir())
    encoder.write_bytes(encoder.read_bytes()[:-3])
    build(config(model_dir, corpus_file, out))
    assert checksums(out) == checksums(index_dir)


def test_going_on_with_other_options_model_or_corpus_is_refused(tmp_path, model_dir, corpus_file):
    out, corpus = tmp_path / "i", shutil.copy(corpus_file, tmp_path / "c.jsonl")
    build(config(model_dir, corpus, out))
    before = checksums(out)
    with pytest.raises(UsageError, match="rank 4, now 8"):
        build(config(model_dir, corpus, out, rank=8))
    other = tmp_path / "model"
    make_model("gpt2", "float32", seed=1).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    with pytest.raises(UsageError, match="the model's weights"):
        build(config(other, corpus, out))
    os.utime(corpus, (1, 1))  # the content counts, not the time
    build(config(model_dir, corpus, out))
    assert checksums(out) == before
    with open(corpus, "a") as file:
        file.write('{"text": "w1 w2"}\n')
    with pytest.raises(UsageError, match="the corpus files"):
        build(config(model_dir, corpus, out))
    assert checksums(out) == before


def test_a_build_that_failed_before_any_row_can_be_given_again_otherwise(tmp_path, model_dir, corpus_file, index_dir):
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": "w1 w2"}, {"text": ""}])
    with pytest.raises(DataError):
        build(config(model_dir, corpus, tmp_path / "i"))
    build(config(model_dir, corpus_file, tmp_path / "i"))
    assert checksums(tmp_path / "i") == checksums(index_dir)


def test_two_builds_at_once_into_one_directory(tmp_path, model_dir, corpus_file):
    out = tmp_path / "i"
    with exclusive(out), pytest.raises(BusyError, match="another build"):
        build(config(model_dir, corpus_file, out))
    build(config(model_dir, corpus_file, out))


def test_ids_that_stand_twice_are_refused_by_name(tmp_path, model_dir):
    first = write_jsonl(tmp_path / "a.jsonl", [{"id": f"x{i}", "text": words(1, 2)} for i in range(70)])
    second = write_jsonl(tmp_path / "b.jsonl", [{"id": "x33", "text": words(3, 4)}])
    with pytest.raises(DataError, match=r"duplicate id 'x33' .*a.jsonl and b.jsonl"):
        build(config(model_dir, (str(first), str(second)), tmp_path / "i"))
    assert not (tmp_path / "i/manifests").exists()


def test_bad_documents_end_a_build_or_are_counted(tmp_path, model_dir):
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"text": "w1 w2"}\n{"text": ""}\nnonsense\n{"text": "w3 w4"}\n')
    with pytest.raises(DataError, match=r"c.jsonl line 2: the text is empty.*`bad_documents=skip"):
        build(config(model_dir, corpus, tmp_path / "i"))
    manifest = build(config(model_dir, corpus, tmp_path / "j", bad_documents="skip"))
    assert (manifest.rows, manifest.build.skipped) == (2, 2)
    assert "line 2" in manifest.build.skipped_first[0]
    corpus.write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="no usable document"):
        build(config(model_dir, corpus, tmp_path / "k", bad_documents="skip"))


def test_chunks_point_to_their_document(tmp_path, model_dir):
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"id": "long", "text": words(*range(1, 41))}, {"id": "short", "text": words(1, 2)}])
    out = tmp_path / "i"
    manifest = build(config(model_dir, corpus, out, max_tokens=16))
    assert (manifest.build.documents, manifest.build.split) == (2, 1)
    found = [Index(out).example(i) for i in range(manifest.rows)]
    assert [(e.id, e.document, e.chunk) for e in found] == [
        ("long#0", "long", 0),
        ("long#1", "long", 1),
        ("long#2", "long", 2),
        ("short", "short", 0),
    ]
    assert {a.document for a in Client(out).query(row=1).proponents} <= {"long", "short"}


def test_weights_that_are_not_finite_end_the_build_and_leave_nothing(tmp_path, corpus_file):
    import torch

    model = make_model("gpt2", "float32")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = float("inf")
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(NumericalError, match="no example's loss and gradient are finite"):
        build(config(tmp_path / "model", corpus_file, tmp_path / "i"))
    assert not (tmp_path / "i").exists()


@pytest.mark.parametrize("options", [{"rank": 4}, {"rank": 4, "curvature": "fisher", "labels": "sampled"}, {"bytes_per_example": 800}])
def test_an_example_that_is_not_finite_is_a_row_of_zeros_and_the_others_are_as_without_it(tmp_path, options):
    """The embedding of one token is infinite: documents with it have no finite loss."""
    import torch

    model = make_model("gpt2", "float32")
    with torch.no_grad():
        model.transformer.wte.weight[7, 0] = float("inf")  # tied: in every logit for token 7, whose probability is then not a number
        model.lm_head.weight = torch.nn.Parameter(model.transformer.wte.weight.nan_to_num(posinf=0.0).clone())
        model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    tokenizer = make_tokenizer()
    texts = random_texts(60, seed=1)
    bad = [f"d{i}" for i, text in enumerate(texts) if 7 in tokenizer(text).input_ids]
    good = [{"id": f"d{i}", "text": text} for i, text in enumerate(texts) if f"d{i}" not in bad]
    assert 0 < len(bad) < 60
    everything = write_jsonl(tmp_path / "all.jsonl", [{"id": f"d{i}", "text": text} for i, text in enumerate(texts)])
    with pytest.warns(UserWarning, match=f"{len(bad)} rows are stored as zeros"):
        manifest = build(config(tmp_path / "model", everything, tmp_path / "a", **options))
    build(config(tmp_path / "model", write_jsonl(tmp_path / "good.jsonl", good), tmp_path / "b", **options))
    assert (manifest.build.not_finite, list(manifest.build.not_finite_first)) == (len(bad), bad[:20])
    a, b = Client(tmp_path / "a"), Client(tmp_path / "b")
    ids = a.index.column("id").to_pylist()
    for component in a.index.manifest.components:
        norms, others = a.index.norms(component), b.index.norms(b.index.component(component.name))
        assert not norms[[ids.index(i) for i in bad]].any()
        np.testing.assert_allclose(norms[[ids.index(d["id"]) for d in good]], others, rtol=1e-3)
    answer = a.query(text=good[0]["text"], k=60)
    assert not {p.id for p in (*answer.proponents, *answer.opponents)} & set(bad)
    (nats,) = [s for _, s in all_scores_of(a, good[0]["text"])]
    assert np.isfinite(nats).all()
    with pytest.raises(NumericalError, match="not finite"):
        a.query(text=texts[int(bad[0][1:])])


def all_scores_of(client, text):
    from wherefrom import Query
    from wherefrom.query.metric import Metric
    from wherefrom.query.scoring import all_scores

    return all_scores(client.index, client.encode([Query(text=text)]), Metric("loss-normalized"))


@pytest.mark.parametrize(
    "options",
    [{"projection": "pca"}, {"curvature": "ekfac", "labels": "sampled"}, {"dtype": "bfloat16", "row_dtype": "int8"}, {"dtype": "float64"}],
)
def test_every_kind_of_index_finds_its_own_rows(tmp_path, model_dir, corpus_file, options):
    out = tmp_path / "i"
    build(config(model_dir, corpus_file, out, **options))
    client = Client(out)
    for row in (0, 50, 119):
        answer = client.query(text=client.index.example(row).text, k=1, mode="cosine")
        assert answer.proponents[0].row == row
        assert answer.proponents[0].score > 0.98


def test_layers_can_be_chosen(tmp_path, model_dir, corpus_file):
    manifest = build(config(model_dir, corpus_file, tmp_path / "i", layers=("h.1.mlp.*", "*.h.0.attn.c_attn")))
    names = [layer.name for layer in manifest.components[0].layers]
    assert names == ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"]


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_a_bar_with_rates_on_a_terminal_and_lines_elsewhere(tmp_path, model_dir, corpus_file, capsys):
    terminal = _Terminal()
    with Console(terminal) as reporter:
        build(config(model_dir, corpus_file, tmp_path / "i"), reporter)
    assert "building rows" in terminal.getvalue()
    assert "120/120" in terminal.getvalue()
    assert "tokens/s" in terminal.getvalue()
    with Console(sys.stderr) as reporter:
        build(config(model_dir, corpus_file, tmp_path / "j"), reporter)
    lines = [line for line in capsys.readouterr().err.splitlines() if "examples/s" in line]
    stages = ["reading the corpus", "fitting, pass 1 of 1", "building rows", "asking with training examples"]
    assert [line.split(":")[0] for line in lines] == stages


def test_a_bar_shows_the_whole_count_beside_high_rates(monkeypatch):
    """A terminal of 80 columns."""
    monkeypatch.setattr("wherefrom.ray_jobs.progress.time", SimpleNamespace(monotonic=count(step=0.5).__next__))
    monkeypatch.setenv("COLUMNS", "80")
    terminal = _Terminal()
    with Console(terminal) as reporter:
        reporter.stage("reading the corpus", 12_723)
        reporter.update(12_723, 2_300_000)
    assert "12723/12723" in terminal.getvalue()
    assert "tokens/s" in terminal.getvalue()


@pytest.mark.processes
@pytest.mark.slow
def test_an_interrupted_command_says_so_and_goes_on(tmp_path):
    model, corpus, out = make_slow_model(tmp_path / "model", 64), slow_corpus(tmp_path, 1600), tmp_path / "i"
    command = ["build", "--model", model, "--data", corpus, "--out", out, "-o", "rank=4", "-o", "shard_rows=24", "-o", "fit_examples=64"]
    run = [sys.executable, "-c", "from wherefrom.cli import main; main()", *map(str, command)]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background inherits that it is ignored
    process = subprocess.Popen(run, stderr=subprocess.PIPE, text=True, preexec_fn=heard)  # noqa: PLW1509
    deadline = time.monotonic() + 120
    while not list(out.glob("rows/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "the same command continues it" in err
    assert "Traceback" not in err
    assert not (out / "manifests").exists()
    kept = len(list(out.glob("rows/*")))
    assert subprocess.run(run, check=False, capture_output=True).returncode == 0
    assert read_manifest(out).shards > kept > 0


@pytest.mark.processes
@pytest.mark.slow
def test_a_full_disk_is_a_sentence_and_the_build_goes_on_when_there_is_room(tmp_path):
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let tests mount a small disk")
    model, corpus = make_slow_model(tmp_path / "model", 64), slow_corpus(tmp_path)
    build_command = (
        f"{sys.executable} -c 'from wherefrom.cli import main; main()' build --model {model} --data {corpus} -o rank=4 -o shard_rows=24"
    )
    script = f"""
    mkdir {tmp_path}/disk && mount -t tmpfs -o size=400k tmpfs {tmp_path}/disk
    {build_command} --out {tmp_path}/disk/i; echo "exit $?"
    ls {tmp_path}/disk/i/manifests 2>/dev/null; mount -o remount,size=100m {tmp_path}/disk
    {build_command} --out {tmp_path}/disk/i; echo "exit $?"; ls {tmp_path}/disk/i/manifests
    """
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], check=False, capture_output=True, text=True)
    assert "no space left on the disk" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    words_ = done.stdout.split()
    assert words_[:2] == ["exit", "1"], done.stdout
    assert words_[-5:-2] == ["exit", "0", "000001.json"], done.stdout + done.stderr


def test_the_fitting_sample_is_seeded_and_bounded(tmp_path, model_dir, corpus_file):
    a = build(config(model_dir, corpus_file, tmp_path / "a", fit_examples=30))
    b = build(config(model_dir, corpus_file, tmp_path / "b", fit_examples=30, seed=1))
    assert a.components[0].curvature.examples == b.components[0].curvature.examples == 30
    assert a.encoder.sha256 != b.encoder.sha256
    name = "blocks/transformer.h.0.mlp.c_fc/eigenvalues"
    assert not np.allclose(Index(tmp_path / "a").arrays[name], Index(tmp_path / "b").arrays[name])


def test_the_config_is_json(index_dir):
    json.dumps(read_manifest(index_dir).build.model_dump(mode="json"))
