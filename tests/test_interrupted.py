"""Work that was broken off: the same command again goes on, and leaves nothing of the broken one behind."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from helpers import random_texts, write_jsonl
from wherefrom import BuildConfig, Client
from wherefrom.cli import main
from wherefrom.ray_jobs.add import add
from wherefrom.ray_jobs.build import build
from wherefrom.store import shard as shard_module
from wherefrom.store.errors import DataError, NotFoundError
from wherefrom.store.index import Index
from wherefrom.store.manifest import latest_manifest
from wherefrom.store.update import compact, delete, prune


@pytest.fixture
def config(tmp_path, model_dir, corpus_file):
    options = dict(model=str(model_dir), data=(str(corpus_file),), out=str(tmp_path / "i"), components=("head", "blocks"), shard_rows=32)
    return BuildConfig(**options)


@pytest.fixture
def index(tmp_path, config):
    build(config)
    return tmp_path / "i"


@pytest.fixture
def more(tmp_path):
    return write_jsonl(tmp_path / "more.jsonl", [{"id": f"m{i}", "text": t, "year": 1} for i, t in enumerate(random_texts(20, seed=9))])


def contents(index):
    return {str(p.relative_to(index)): p.read_bytes() for p in sorted(index.rglob("*")) if p.is_file() and p.name != ".lock"}


def stop(*_, **__):
    raise KeyboardInterrupt


def test_a_build_stopped_between_the_manifests_folder_and_its_first_file_goes_on(config, tmp_path, monkeypatch):
    def made(directory, manifest):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shard_module, "publish_manifest", made)
        with pytest.raises(KeyboardInterrupt):
            build(config)
    with pytest.raises(NotFoundError, match="not finished"):
        Index(tmp_path / "i")
    assert build(config).rows == 120
    assert not (tmp_path / "i/staging").exists()


def test_an_addition_stopped_after_it_was_published_is_recognized(index, more, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("wherefrom.ray_jobs.add.refresh_search", stop)
        with pytest.raises(KeyboardInterrupt):
            add(index, [str(more)])
    published = latest_manifest(index)
    assert Index(index).manifest.rows == 140
    done = CliRunner().invoke(main, ["add", str(index), "--data", str(more)])
    assert done.exit_code == 0, done.output
    assert "had these documents already: 20 rows more, 140 in all" in done.output
    assert latest_manifest(index) == published
    assert not (index / "staging").exists()
    assert not [p for p, problem in Index(index).verify() if problem]
    assert len(list((index / "search").glob("*.zarr.zip"))) == len(Index(index).groups)


def test_the_same_files_can_be_added_again_after_their_rows_were_deleted(index, more):
    add(index, [str(more)])
    delete(index, [f"m{i}" for i in range(20)])
    assert add(index, [str(more)]).rows == 160
    assert add(index, [str(more)]).rows == 160  # the same content again is the addition that was made
    with more.open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match="is in the index already"):
        add(index, [str(more)])


@pytest.mark.parametrize("writer", ["build", "add", "compact", "prune"])
def test_search_files_that_cannot_be_written_are_a_note_and_are_made_by_the_next(index, config, more, monkeypatch, writer):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    shutil.rmtree(index / "search")
    before = Client(index).query(row=3, k=3)
    calls = {
        "build": lambda: build(config),
        "add": lambda: add(index, [str(more)]),
        "compact": lambda: (delete(index, ["d100"]), compact(index)),
        "prune": lambda: prune(index),
    }
    with monkeypatch.context() as patched:
        patched.setattr(Index, "reindex", full)
        with pytest.warns(UserWarning, match="could not be written .No space left on device.; run wherefrom reindex"):
            calls[writer]()
    after = [a.id for a in Client(index).query(row=3, k=6).proponents if a.id.startswith("d")]  # without the added documents
    assert after[:3] == [a.id for a in before.proponents]
    prune(index)
    assert list((index / "search").glob("*.zarr.zip"))


def test_what_a_killed_writer_left_in_staging_is_cleared_by_the_next(index, more):
    right = contents(index)
    (index / "staging").mkdir()
    (index / "staging/0d5ff3f2.zarr.zip").write_text("half")
    assert prune(index) == 0
    assert contents(index) == right
    (index / "staging").mkdir()
    (index / "staging/half.arrow").write_text("half")
    delete(index, ["d4"])
    assert not (index / "staging").exists()


def test_a_build_that_fails_before_its_first_row_leaves_no_folder(tmp_path, model_dir, corpus_file):
    twice = write_jsonl(tmp_path / "twice.jsonl", [{"id": "a", "text": "w1 w2"}, {"id": "a", "text": "w3 w4"}])
    with pytest.raises(DataError, match="duplicate id"):
        build(BuildConfig(model=str(model_dir), data=(str(twice),), out=str(tmp_path / "i")))
    assert not (tmp_path / "i").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="duplicate id"):
        build(BuildConfig(model=str(model_dir), data=(str(twice),), out=str(tmp_path / "mine")))
    assert (tmp_path / "mine").is_dir()  # which was there before


def test_batch_tokens_do_not_make_another_build(index, config):

    assert build(config.replace(batch_tokens=64)) == Index(index).manifest


@pytest.mark.processes
@pytest.mark.slow
def test_additions_and_compactions_killed_at_any_moment_go_on(tmp_path, index, more):
    """WHEREFROM_KILLS kills of each, at moments spread over the whole command; the same command then ends as one that was left alone."""
    kills = int(os.environ.get("WHEREFROM_KILLS", "1"))
    shutil.copytree(index, tmp_path / "left-alone")
    commands = [
        ["delete", "INDEX", "--where", "year > 2000"],
        ["add", "INDEX", "--data", str(more)],
        ["compact", "INDEX", "--prune"],
        ["reindex", "INDEX"],
    ]
    wherefrom = [sys.executable, "-c", "from wherefrom.cli import main; main()"]

    def run(command, place):
        return subprocess.Popen(
            [*wherefrom, *[str(place) if part == "INDEX" else part for part in command]], stderr=subprocess.PIPE, text=True
        )

    started = time.monotonic()
    for command in commands:
        assert run(command, tmp_path / "left-alone").wait() == 0
    longest = (time.monotonic() - started) / len(commands)
    right = Index(tmp_path / "left-alone")
    for number in range(kills):
        place = tmp_path / f"killed-{number}"
        shutil.copytree(index, place)
        for command in commands:
            process = run(command, place)
            time.sleep(longest * (0.3 + 1.2 * number / max(1, kills)))
            process.send_signal(signal.SIGKILL)
            process.wait()
            again = run(command, place)
            _, errors = again.communicate()
            assert again.returncode == 0, (command, errors)
            assert "Traceback" not in errors
        resumed = Index(place)
        assert not [problem for _, problem in resumed.verify() if problem]
        assert resumed.column("id").to_pylist() == right.column("id").to_pylist()
        assert not (place / "staging").exists()
        for shard, other in zip(resumed.shards, right.shards, strict=True):
            assert (shard.sha256, shard.documents_sha256) == (other.sha256, other.documents_sha256)
