"""Rights: what a token may read, the log of requests, and examples that are taken down."""

import json
import os
import signal

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from fastapi.testclient import TestClient
from helpers import build_kinds, random_texts, words, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from test_server import Server
from wherefrom import BuildConfig, Client
from wherefrom.cli import main
from wherefrom.query.faiss_index import make_faiss
from wherefrom.ray_jobs.build import build
from wherefrom.ray_jobs.progress import Silent
from wherefrom.remote import RemoteClient
from wherefrom.server.access import Access, Audit, read_tokens
from wherefrom.server.app import create_app
from wherefrom.store.errors import NotFoundError, UsageError
from wherefrom.store.index import Index
from wherefrom.store.shard import documents_path
from wherefrom.store.takedown import _contents, _occurring, takedown
from wherefrom.store.update import compact, delete

ALL, OLD, NONE = (f"token-of-{name}-with-20-letters" for name in ("all", "old", "none"))


@pytest.fixture(scope="module")
def client(tmp_path_factory, model_dir, corpus_file):
    kinds = {"i": {"components": ("head", "blocks"), "rank": 4, "hidden": True}}
    return Client(build_kinds(tmp_path_factory.mktemp("access"), model_dir, corpus_file, kinds, shard_rows=32)["i"])


@pytest.fixture(scope="module")
def grants(tmp_path_factory):
    path = tmp_path_factory.mktemp("grants") / "grants.jsonl"
    granted = [
        {"name": "owner", "token": ALL},
        {"name": "ann", "token": OLD, "where": "year < 1950"},
        {"name": "bob", "token": NONE, "where": "year < 0"},
    ]
    return write_jsonl(path, granted)


@pytest.fixture
def asking(client, grants, tmp_path):
    audit = Audit(tmp_path / "audit.jsonl")
    app = create_app({"i": client}, tokens=read_tokens(None, str(grants)), audit=audit)
    with TestClient(app) as web:

        def ask(token, path, body=None, method=None):
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            response = web.request(method or ("GET" if body is None else "POST"), path, headers=headers, json=body)
            return response.status_code, response.json() if response.headers.get("content-type", "").endswith("json") else response.content

        ask.log = lambda: [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
        yield ask


QUERY = {"text": words(3, 9, 27)}


def test_a_grant_is_a_filter_of_every_answer(asking, client):
    for body in (QUERY, {"row": 3}, {**QUERY, "where": "year >= 1940"}, {**QUERY, "group_by": "year"}, {**QUERY, "recall": 0.9}):
        status, answer = asking(OLD, "/v1/query", {**body, "k": 120, "rerank": 0})
        assert status == 200
        found = [a["metadata"]["year"] for side in ("proponents", "opponents") for a in answer[side]]
        assert found
        assert max(found) < 1950
        assert answer["search"]["rows"] == (10 if "where" in body else 50)
        assert all(group["value"] < 1950 for group in answer.get("groups", ()))
        both = {"where": f"year < 1950 and ({body.get('where', 'year < 1950')})", "k": 120, "rerank": 0}
        own = client.query(**{**body, **both})
        assert [a["id"] for a in answer["proponents"]] == [a.id for a in own.proponents]
    status, answers = asking(OLD, "/v1/query", {"queries": [QUERY, {"row": 1}], "rerank": 0, "k": 50})
    assert all(a["metadata"]["year"] < 1950 for answer in answers["answers"] for a in answer["proponents"])
    assert asking(ALL, "/v1/query", {**QUERY, "k": 120})[1]["search"]["rows"] == 120
    assert asking(NONE, "/v1/query", QUERY)[0] == 422  # no row matches


def test_scores_and_histograms_count_granted_rows_alone(asking):
    status, content = asking(OLD, "/v1/scores", {**QUERY, "format": "float32"})
    assert status == 200
    assert np.flatnonzero(np.isfinite(np.frombuffer(content, "<f4"))).tolist() == list(range(50))
    assert asking(OLD, "/v1/scores", QUERY)[1]["rows"] == 50


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/rows/60", None),
        ("/v1/rows/5000", None),
        ("/v1/query", {"row": 60}),
        ("/v1/query", {"queries": [{"row": 3}, {"row": 60}]}),
        ("/v1/explain", {**QUERY, "examples": [3, 60]}),
        ("/v1/explain", {"row": 60, "examples": [3]}),
        ("/v1/scores", {"row": 60}),
        ("/v1/encode", {"row": 60}),
    ],
)
def test_rows_outside_a_grant_are_as_if_they_were_not_there(asking, path, body):
    status, said = asking(OLD, path, body)
    assert status == 404
    assert "that this token may read" in said["detail"]
    inside = None if body is None else json.loads(json.dumps(body).replace("60", "4"))
    assert asking(OLD, path.replace("60", "4").replace("5000", "4"), inside)[0] == 200


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(
        ["year > 0) or (year > 0", "year > 0 # ", "year > 0\n", "True)", "not (year < 1950", "year >= 1950 or year < 3000", "1 == 1"]
    )
)
def test_no_filter_reaches_around_a_grant(client, where):
    access = Access("ann", "year < 1950")
    try:
        combined = access.restricted(where)
        mask = client.index.matching(combined)
    except UsageError:
        return
    assert not mask[50:].any()


def test_tokens_and_grants_that_cannot_be_are_refused(tmp_path):
    def refused(match, *lines, kind=UsageError):
        path = tmp_path / "grants.jsonl"
        path.write_text("\n".join(lines))
        with pytest.raises(kind, match=match):
            read_tokens(None, str(path))

    good = json.dumps({"name": "a", "token": ALL})
    refused("line 1 is not a grant", "{")
    refused("line 2 is not a grant", good, '{"name": "b"}')
    refused("at least 16", '{"name": "b", "token": "short"}')
    refused("token of another grant", good, good)
    refused("filter|where", json.dumps({"name": "a", "token": ALL, "where": "year <"}))
    refused("no grants")
    with pytest.raises(NotFoundError, match="there is no grants file"):
        read_tokens(None, str(tmp_path / "nothing"))


def test_the_log_has_every_request_with_its_query_and_the_ids_of_its_answer(asking):
    asking(OLD, "/v1/query", {**QUERY, "k": 3, "rerank": 0})
    asking(ALL, "/v1/rows/7")
    asking("wrong-token-of-20-letters", "/v1/query", QUERY)
    asking(OLD, "/v1/rows/60")
    asking(OLD, "/v1/exports", {"kind": "csv", "ids": ["d1", "d2"]})
    query, row, unknown, denied, export = asking.log()
    assert (query["name"], query["request"], query["status"]) == ("ann", "POST /v1/query", 200)
    assert query["asked"] == {**QUERY, "k": 3, "rerank": 0}
    assert len(query["answered"]) == query["answers"] == 6
    assert (row["name"], row["answered"]) == ("owner", ["d7"])
    assert (unknown["name"], unknown["status"]) == (None, 401)
    assert (denied["name"], denied["status"]) == ("ann", 404)
    asking(OLD, "/v1/query", {"row": 60})
    assert (asking.log()[-1]["status"], asking.log()[-1]["asked"]) == (404, {"row": 60})
    assert (export["asked"]["kind"], export["answered"]) == ("csv", ["d1", "d2"])
    assert not any(token in json.dumps(asking.log()) for token in (ALL, OLD, NONE))


def test_a_grant_holds_for_the_state_of_the_index_that_answers(tmp_path, model_dir, corpus_file, grants):
    """Rows move when an index is compacted; a request is checked and answered on the same state."""
    path = build_kinds(tmp_path, model_dir, corpus_file, {"i": {"rank": 4}}, shard_rows=50)["i"]
    app = create_app({"i": Client(path)}, tokens=read_tokens(None, str(grants)))
    with TestClient(app, base_url="http://127.0.0.1") as server:

        def ask(path, body):
            return server.post(path, json=body, headers={"Authorization": f"Bearer {OLD}"})

        bodies = {
            "/v1/query": lambda row: {"row": row, "k": 1},
            "/v1/explain": lambda row: {**QUERY, "examples": [row]},
            "/v1/scores": lambda row: {"row": row},
            "/v1/encode": lambda row: {"row": row},
        }
        for number, (route, body) in enumerate(bodies.items()):
            last = 49 - number  # of 1949
            assert ask(route, body(last)).status_code == 200
            delete(path, [f"d{number}"])
            compact(path)  # now that of 1950
            assert ask(route, body(last)).status_code == 404


def test_holders_of_grants_see_their_own_saved_queries_and_log_ids_that_they_may_read(asking):
    body = {"name": "mine", "query": QUERY}
    ids = {token: asking(token, "/v1/saved", body)[1]["id"] for token in (ALL, OLD)}

    def saved(token):
        return {entry["id"] for entry in asking(token, "/v1/saved")[1]["saved"]}

    assert saved(ALL) == set(ids.values())
    assert saved(OLD) == {ids[OLD]}
    assert asking(OLD, f"/v1/saved/{ids[ALL]}", method="DELETE")[0] == 404
    assert asking(OLD, f"/v1/saved/{ids[OLD]}", method="DELETE")[0] == 204
    assert saved(ALL) == {ids[ALL]}
    assert asking(OLD, "/v1/exports", {"kind": "csv", "ids": ["d1", "d60"]})[0] == 404
    assert asking(ALL, "/v1/exports", {"kind": "csv", "ids": ["d1", "nothing"]})[0] == 404
    assert [line["answered"] for line in asking.log() if line["request"] == "POST /v1/exports"] == [[], []]


def test_a_deep_filter_is_a_sentence(asking):
    status, said = asking(OLD, "/v1/query", {**QUERY, "where": "not " * 900 + "(year == 1)"})
    assert (status, "too deep" in said["detail"] or "filter" in said["detail"]) == (422, True)


def test_nothing_is_answered_that_cannot_be_logged(asking, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("logging.StreamHandler.flush", full)
    status, said = asking(OLD, "/v1/rows/7")
    assert status == 503
    assert "the audit log cannot be written" in said["detail"]


def test_the_log_is_appended_to_rotated_and_readable_by_its_owner_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("wherefrom.server.access._LOG_BYTES", 2000)
    path = tmp_path / "audit.jsonl"
    path.write_text('{"before": 1}\n')
    log = Audit(path)
    for number in range(40):
        log.add(Access("ann"), "GET", f"/v1/rows/{number}", 200, {})
    log.close()
    files = sorted(tmp_path.glob("audit.jsonl*"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len(files) > 2
    assert {file.stat().st_mode & 0o077 for file in files} == {0}
    assert len(lines) == 41
    assert {"before": 1} in lines
    Audit(tmp_path / "new.jsonl").close()
    assert (tmp_path / "new.jsonl").stat().st_mode & 0o077 == 0
    with pytest.raises(UsageError, match="cannot be written"):
        Audit(tmp_path / "nothing" / "audit.jsonl")


@pytest.mark.processes
def test_a_server_with_grants_serves_each_holder(client, grants, tmp_path):
    server = Server([client.index.path, "--grants", grants, "--audit", tmp_path / "log"], {"XDG_RUNTIME_DIR": str(tmp_path)})
    try:
        answer = RemoteClient(server.url, token=OLD).query(text=QUERY["text"], k=120)
        assert {a.metadata["year"] < 1950 for a in answer.proponents} == {True}
        with pytest.raises(UsageError, match="token"):
            RemoteClient(server.url).query(row=1)
        done = CliRunner().invoke(main, ["query", str(client.index.path), "--row", "60", "--json"], env={"XDG_RUNTIME_DIR": str(tmp_path)})
        assert done.exit_code == 0, done.output  # the owner's command has the token that reads all
        assert len((tmp_path / "log").read_text().splitlines()) == 3
    finally:
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(20)


# --- takedown


@pytest.fixture
def copy(tmp_path, model_dir):
    records = [{"id": f"doc-{i}-with-a-long-name", "text": t, "year": i} for i, t in enumerate(random_texts(40, seed=5, shortest=12))]
    records[9]["text"] = records[8]["text"]  # held twice
    data = write_jsonl(tmp_path / "c.jsonl", records)
    out = tmp_path / "i"
    options = {"components": ("head", "blocks"), "rank": 4, "head_bits": 16}
    build(BuildConfig(model=str(model_dir), data=(str(data),), out=str(out), shard_rows=16, **options))
    return out, records


def occurrences(out, needle):
    return [path for path in out.rglob("*") if path.is_file() and needle in path.read_bytes()]


def test_no_byte_of_an_example_is_left(copy):
    out, records = copy
    taken = [records[3], records[20]]
    for record in taken:
        assert occurrences(out, record["text"].encode())
        assert occurrences(out, record["id"].encode())
    tokens = Index(out).example(3).token_ids.astype("<i4").tobytes()
    assert occurrences(out, tokens)
    report = takedown(out, [record["id"] for record in taken])
    assert report.is_proven
    assert (report.found, report.rows, len(Index(out))) == ((), 38, 38)
    assert report.contents >= 8
    for record in taken:
        assert not occurrences(out, record["text"].encode())
        assert not occurrences(out, record["id"].encode())
    assert not occurrences(out, tokens)
    assert all(problem is None for _, problem in Index(out).verify())
    assert Client(out).query(text=records[3]["text"], rerank=0).proponents[0].id != taken[0]["id"]


def test_what_another_example_holds_too_is_named(copy):
    out, records = copy
    done = CliRunner().invoke(main, ["takedown", str(out), "--ids", "-", "--json"], input=records[8]["id"])
    report = json.loads(done.stdout)
    assert done.exit_code == 0
    assert report["proven"]
    assert {found["content"] for found in report["found"]} >= {"text", "tokens"}
    assert {tuple(found["others"]) for found in report["found"]} == {(records[9]["id"],)}


def test_what_is_left_in_a_file_of_ones_own_is_found(copy):
    out, records = copy
    (out / "notes.txt").write_text(f"look at {records[3]['text']}")
    done = CliRunner().invoke(main, ["takedown", str(out), "--ids", "-"], input=records[3]["id"])
    assert done.exit_code == 4
    assert "text of doc-3-with-a-long-name in notes.txt, which nothing explains" in " ".join(done.output.split())


def test_what_is_compressed_or_written_as_json_is_found_too(model_dir, tmp_path):
    """A local copy of an index from an object store has compressed documents."""
    text = 'w1 "w2" \\ w3 ' + random_texts(1, seed=9, shortest=20)[0]
    ids = [f'the "é" of number {i:03}' for i in range(40)]
    records = [{"id": ids[i], "text": text if i in (3, 38) else t} for i, t in enumerate(random_texts(40, seed=5))]
    out = tmp_path / "i"
    data = write_jsonl(tmp_path / "c.jsonl", records)
    build(BuildConfig(model=str(model_dir), data=(str(data),), out=str(out), shard_rows=16, rank=4))
    index = Index(out)
    contents = _contents(index, 3)
    last = documents_path(out, index.shards[-1].id)
    with pa.ipc.open_file(last) as reader:
        table = reader.read_all()
    with pa.ipc.new_file(last, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    assert text.encode() not in last.read_bytes()
    assert {name for _, name, _ in _occurring(last, contents)} == {"text", "tokens"}
    for notes in (json.dumps(text), json.dumps(ids[3]), json.dumps(ids[3], ensure_ascii=False), ids[3]):
        (out / "notes.txt").write_text(notes)
        assert list(_occurring(out / "notes.txt", contents))


def test_deleted_examples_older_states_and_faiss_go_too(copy):
    out, records = copy
    CliRunner().invoke(main, ["delete", str(out), "--ids", "-"], input=records[5]["id"])
    make_faiss(Index(out), "Flat", "", "blocks", Silent())
    assert occurrences(out, records[5]["text"].encode())
    report = takedown(out, [records[6]["id"]])
    assert report.is_proven
    assert not occurrences(out, records[5]["text"].encode())
    assert not (out / "faiss").exists()
    assert len(list((out / "manifests").glob("*.json"))) == 1


def test_short_examples_are_taken_down_and_what_is_too_short_is_counted(tmp_path, model_dir):
    records = [{"id": f"d{i}", "text": t} for i, t in enumerate(random_texts(40, seed=5))]
    records[3] = {"id": "doc3", "text": "w3 w4"}
    data = write_jsonl(tmp_path / "c.jsonl", records)
    out = tmp_path / "i"
    build(BuildConfig(model=str(model_dir), data=(str(data),), out=str(out), components=("head",), head_bits=8))
    (out / "notes.txt").write_text("look at id=doc3, and at doc30")
    report = takedown(out, ["doc3"])
    assert report.ids == ("doc3",)
    assert "doc3" not in {Index(out).example(row).id for row in range(39)}
    assert [(found.content, found.file, found.others) for found in report.found] == [("id", "notes.txt", ())]
    assert report.short > 0


def test_metadata_and_the_middle_of_a_text_are_searched_for(tmp_path, model_dir):
    long = " ".join(random_texts(1200, seed=1))
    records = [{"id": f"d{i}", "text": t, "author": f"the author number {i:03}"} for i, t in enumerate(random_texts(30, seed=5))]
    records[4]["text"] = long
    data = write_jsonl(tmp_path / "c.jsonl", records)
    out = tmp_path / "i"
    build(BuildConfig(model=str(model_dir), data=(str(data),), out=str(out), rank=4, long="truncate"))
    stored = next(e.text for e in map(Index(out).example, range(30)) if e.id == "d4")
    (out / "part.bin").write_bytes(stored[: len(stored) // 2].encode())
    (out / "authors.bin").write_bytes(b"by the author number 004.")
    report = takedown(out, ["d4"])
    assert {found.file for found in report.found if not found.others} >= {"authors.bin"}
    assert ("part.bin" in {found.file for found in report.found}) == (len(stored) > 8192)


@pytest.mark.parametrize("then", [(), ("compact",)])
def test_what_was_deleted_before_is_searched_for_and_removed(copy, then):
    """As after a takedown that was killed."""
    out, records = copy
    text = records[3]["text"].encode()
    assert CliRunner().invoke(main, ["delete", str(out), "--ids", "-"], input=records[3]["id"]).exit_code == 0
    for command in then:
        assert CliRunner().invoke(main, [command, str(out)]).exit_code == 0
    assert occurrences(out, text)
    (out / "stray.txt").write_bytes(text)
    report = takedown(out, [records[3]["id"], records[20]["id"]])
    assert set(report.ids) == {records[3]["id"], records[20]["id"]}
    assert not report.is_proven
    assert {found.file for found in report.found} == {"stray.txt"}
    assert occurrences(out, text) == [out / "stray.txt"]


def test_unknown_ids_take_nothing_down(copy):
    out, records = copy
    before = sorted(os.listdir(out / "manifests"))
    for ids in (["nothing"], [records[1]["id"], "nothing"], []):
        with pytest.raises(UsageError, match=r"nothing was taken down|there are no ids"):
            takedown(out, ids)
    assert sorted(os.listdir(out / "manifests")) == before
