"""An index that lives: what is added, deleted and compacted is what a build would have made, and readers keep what they opened."""

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import assert_close, make_model, make_tokenizer, random_texts, words, write_jsonl
from wherefrom import BuildConfig, Client, Query
from wherefrom.cli import main
from wherefrom.query.metric import Metric
from wherefrom.query.scoring import all_scores
from wherefrom.ray_jobs.add import add, drifted
from wherefrom.ray_jobs.build import build
from wherefrom.store.errors import BusyError, DataError, IncompatibleError, IntegrityError, UsageError
from wherefrom.store.files import exclusive
from wherefrom.store.index import Index
from wherefrom.store.manifest import latest_manifest
from wherefrom.store.shard import publish_index
from wherefrom.store.update import compact, delete, prune

OPTIONS = dict(components=("blocks", "head", "embeddings"), rank=4, row_dtype="1bit", head_bits=32, shard_rows=25)
QUERIES = [Query(text=t) for t in random_texts(4, seed=31)]


def records(first, last):
    texts = random_texts(last, seed=3)
    return [{"id": f"d{i}", "text": texts[i], "year": 1900 + i} for i in range(first, last)]


@pytest.fixture
def index(tmp_path, model_dir):
    data = write_jsonl(tmp_path / "first.jsonl", records(0, 60))
    build(BuildConfig(model=str(model_dir), data=(str(data),), out=str(tmp_path / "i"), **OPTIONS))
    return tmp_path / "i"


def scores(path, metric=Metric()):
    client = Client(path)
    return np.concatenate([s for _, s in all_scores(client.index, client.encode(QUERIES), metric)], axis=1)


def ids(path):
    index = Index(path)
    return np.array(index.column("id").to_pylist())[index.alive].tolist()


def codes(path):
    """Every stored row by id, to the bit: all arrays of all components."""
    index, actual = Index(path), {}
    for shard in index.shards:
        names = index.documents(shard).ids()
        for s in index.manifest.components:
            for i, name in enumerate(names):
                if s.kind == "dense":
                    rows = index.rows(shard, s)
                    block = np.concatenate([c for _, c in rows.blocks()])
                    actual[s.name, name] = (block[i].tobytes(), rows.norms[i], rows.scales[i])
                else:
                    rows = index.rows(shard, s)
                    actual[s.name, name] = (*(array.tobytes() for array in rows.entries(i, i + 1)), rows.norms[i])
    return actual


def test_added_examples_score_as_the_same_encoder_says(tmp_path, index):
    before, more = scores(index), write_jsonl(tmp_path / "more.jsonl", records(60, 100))
    old = Client(index)
    manifest = add(index, [str(more)])
    assert (manifest.rows, manifest.number, manifest.shards) == (100, 2, 5)
    assert ids(index) == [f"d{i}" for i in range(100)]
    after = scores(index)
    assert_close(after[:, :60] * 100, before * 60, 1e-6)  # nats of a larger training set
    client = Client(index)
    blocks = client.index.component("blocks")
    exact = client.encode_examples(client.to_examples(list(_documents(records(60, 100)))))["blocks"].values
    stored = np.concatenate([client.index.vectors(i, blocks).values for i in range(60, 100)])
    assert (np.einsum("rd,rd->r", exact, stored) > 0).all()
    np.testing.assert_allclose(np.linalg.norm(stored, axis=1), np.linalg.norm(exact, axis=1), rtol=0.1)
    for row in (60, 99):
        assert client.query(row=row, mode="cosine", k=1).proponents[0].row == row
    assert len(old.query(text=words(1, 2, 3), k=60).proponents) <= 60  # a reader keeps its snapshot
    assert old.index.manifest.number == 1
    assert not (index / "staging").exists()
    (added,) = Index(index).summary()["added"]
    assert added["rows"] == 40
    for name, drift in added["drift"].items():
        assert 0.7 < drift < 1.4, name  # the same distribution
    assert Index(index).matching("year >= 1960").sum() == 40
    assert all(problem is None for _, problem in Index(index).verify())


def _documents(actual):
    from wherefrom.store.corpus import Document

    return (Document(id=r["id"], source="s", where=r["id"], text=r["text"]) for r in actual)


def test_drift_sees_other_documents(tmp_path, index):
    odd = [{"id": f"x{i}", "text": words(*([1 + i % 3] * 18)), "year": 1} for i in range(20)]
    drift = add(index, [str(write_jsonl(tmp_path / "odd.jsonl", odd))]).build.added[0].drift
    assert drifted(drift)
    assert drifted({"a": 1.2, "b": 0.7}) == []
    assert drifted({"a": 1.6, "b": 0.6}) == ["a", "b"]


def test_what_cannot_be_added(tmp_path, index):
    before = latest_manifest(index)
    again = write_jsonl(tmp_path / "again.jsonl", records(59, 62))
    with pytest.raises(DataError, match="'d59' is in the index already"):
        add(index, [str(again)])
    more = write_jsonl(tmp_path / "more.jsonl", records(60, 62))
    other = tmp_path / "other"
    make_model("gpt2", "float32", seed=5).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    with pytest.raises(IncompatibleError, match="are not those that"):
        add(index, [str(more)], models=[str(other)])
    with exclusive(index), pytest.raises(BusyError):
        add(index, [str(more)])
    assert latest_manifest(index) == before
    delete(index, ["d59"])
    assert add(index, [str(again)]).rows == 63  # the deleted one's id is free again


def test_an_interrupted_addition_is_taken_up_and_another_takes_its_place(tmp_path, index, monkeypatch):
    more = write_jsonl(tmp_path / "more.jsonl", records(60, 100))
    monkeypatch.setattr("wherefrom.ray_jobs.add.publish_index", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        add(index, [str(more)])
    monkeypatch.undo()
    made = {p: p.stat().st_mtime_ns for p in (index / "rows").rglob("*") if p.is_file()}
    assert Index(index).manifest.number == 1
    add(index, [str(more)])
    assert {p: p.stat().st_mtime_ns for p in (index / "rows").rglob("*") if p.is_file()} == made
    monkeypatch.setattr("wherefrom.ray_jobs.add.publish_index", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        add(index, [str(write_jsonl(tmp_path / "b.jsonl", records(100, 110)))])
    monkeypatch.undo()
    add(index, [str(write_jsonl(tmp_path / "c.jsonl", records(110, 115)))])
    assert ids(index) == [f"d{i}" for i in (*range(100), *range(110, 115))]
    size = sum(p.stat().st_size for p in index.rglob("*") if p.is_file())
    freed = prune(index)  # what the forgotten addition left
    assert freed > 0
    assert sum(p.stat().st_size for p in index.rglob("*") if p.is_file()) == size - freed
    assert all(problem is None for _, problem in Index(index).verify())


def test_deleted_rows_are_in_no_answer_and_compacting_keeps_the_bits(tmp_path, index):
    before, codes_before = scores(index), codes(index)
    client = Client(index)
    gone = [3, 4, 30, *range(50, 60)]
    assert delete(index, [f"d{i}" for i in gone[:3]]) == 3
    assert delete(index, where="year >= 1950") == 10
    assert delete(index, where="year >= 1950") == 0
    alive = [i for i in range(60) if i not in gone]
    for mode in ("influence", "cosine", "loss-normalized"):
        answers = Client(index).query_many(QUERIES, k=60, mode=mode, group_by="year")
        for answer in answers:
            assert {a.row for a in (*answer.proponents, *answer.opponents)} <= set(alive)
            assert answer.search.rows == len(alive)
            assert sum(g.rows for g in answer.groups) == len(alive)
    assert len(client.query(row=3, k=1).proponents) == 1  # opened before
    with pytest.raises(UsageError, match="row 3 was deleted"):
        Client(index).query(row=3)
    assert Index(index).summary()["deleted"] == 13
    assert compact(index) == 13
    assert compact(index) == 0
    assert ids(index) == [f"d{i}" for i in alive]
    assert len(Index(index)) == 47
    assert_close(scores(index), before[:, alive], 1e-5)
    left = codes(index)
    assert left.keys() == {(s, f"d{i}") for s in ("blocks", "head", "embeddings") for i in alive}
    assert all(left[key] == codes_before[key] for key in left)
    assert all(problem is None for _, problem in Index(index).verify())
    assert len(client.query(row=3, k=60).proponents) > 0  # its files are still there
    assert client.index.manifest.number == 1
    assert prune(index) > 0
    assert {p.name for p in (index / "manifests").iterdir()} == {
        latest_manifest(index).name,
        Path(Index(index).manifest.table.path).name,
        "latest",
    }
    assert sorted(p.stem for p in (index / "documents").iterdir()) == sorted(s.id for s in Index(index).shards)
    assert_close(scores(index), before[:, alive], 1e-5)
    add(index, [str(write_jsonl(tmp_path / "back.jsonl", records(50, 60)))])
    assert_close(scores(index)[:, 47:] * 70, before[:, 50:60] * 60, 2e-3, 60 * np.abs(before).max())


def test_what_cannot_be_deleted(index):
    with pytest.raises(UsageError, match=r"1 of the ids are not in .*'nobody'; nothing was deleted"):
        delete(index, ["d1", "nobody"])
    with pytest.raises(UsageError, match="would delete every example"):
        delete(index, where="year > 0")
    assert ids(index) == [f"d{i}" for i in range(60)]
    opened = Index(index)
    for number, wrong in enumerate(([60], [4, 3], [2, 2], [-1])):
        publish_index(index, opened.shards, np.array(wrong), {**dict(opened.manifest), "number": number + 2})
        with pytest.raises(IntegrityError, match="deleted rows"):
            Index(index)


def _delete(path, id, results):
    try:
        results.put(delete(path, [id]))
    except BusyError:
        results.put("busy")


@pytest.mark.processes
def test_of_several_changes_at_once_none_is_lost(index):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_delete, args=(index, f"d{i}", results)) for i in range(4)]
    for w in workers:
        w.start()
    actual = [results.get(timeout=120) for _ in workers]
    for w in workers:
        w.join()
    assert set(actual) <= {1, "busy"}
    assert Index(index).manifest.deleted == actual.count(1)


def run(*arguments, **more):
    return CliRunner().invoke(main, [str(a) for a in arguments], **more)


def test_changes_from_the_command_line(tmp_path, index):
    (tmp_path / "more").mkdir()
    write_jsonl(tmp_path / "more/more.jsonl", records(60, 70))
    (tmp_path / "more/scan.pdf").write_text("x")
    done = run("add", index, "--data", tmp_path / "more", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rows"] == 10
    assert json.loads(done.stdout)["unread"] == {"files": 1, "first": ["scan.pdf (no kind of document)"]}
    assert json.loads(run("delete", index, "--ids", "-", "--json", input='d1\r\n\n{"id": "d2", "score": 1}\n').stdout) == {"deleted": 2}
    assert "1 rows were deleted" in run("delete", index, "--where", 'id == "d9"').stdout
    assert run("delete", index).exit_code == 2
    assert run("delete", index, "--ids", tmp_path / "none").exit_code == 3
    assert json.loads(run("compact", index, "--prune", "--json").stdout)["dropped"] == 3
    info = run("info", index).stdout
    assert "drift" in info
    assert run("verify", index).exit_code == 0
    done = run("add", index, "--data", write_jsonl(tmp_path / "two.jsonl", [{"id": f"y{i}", "text": words(*[5] * 19)} for i in range(9)]))
    assert done.exit_code == 0, done.output
    assert "build the index again" in done.stderr


def test_pruning_never_removes_a_link_that_the_index_needs(index, tmp_path):
    rows = next((index / "rows").iterdir())
    rows.rename(tmp_path / "elsewhere")
    rows.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="is a link"):
        prune(index)
    assert rows.is_symlink()
    assert (tmp_path / "elsewhere").exists()
    assert not [p for p, problem in Index(index).verify() if problem]
