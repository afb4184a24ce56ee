"""The server, as a process of its own: the same answers as without it, and one clear sentence for whatever is wrong."""

import asyncio
import http.client
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from dataclasses import fields

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import assert_close, assert_same_ranking, random_texts, words
from wherefrom import BuildConfig, Client, Query, connect
from wherefrom.cli import main
from wherefrom.query.answers import Answer
from wherefrom.ray_jobs.build import build
from wherefrom.remote import RemoteClient, announce, find_server, servers_directory
from wherefrom.server.app import create_app
from wherefrom.store.errors import BusyError, NotFoundError, UsageError
from wherefrom.store.printable import to_json

TOKEN = "a-token-of-20-letters"


class Server:
    """`wherefrom serve` in a process of its own."""

    def __init__(self, arguments, environment):
        command = [sys.executable, "-c", "from wherefrom.cli import main; main()", "serve", *map(str, arguments), "--port", "0"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
        line = self.process.stderr.readline()
        if " at http" not in line:
            self.process.kill()
            raise AssertionError(line + self.process.stderr.read())
        self.url = line.split(" at ")[1].split()[0]
        self.port = int(self.url.rsplit(":", 1)[1])

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20), self.process.stderr.read()


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return {"XDG_RUNTIME_DIR": str(tmp_path_factory.mktemp("run"))}


@pytest.fixture(scope="module")
def paths(tmp_path_factory, model_dir, corpus_file):
    made = {}
    for name, options in {"dense": {"rank": 4}, "sparse": {"components": ("head",), "hidden": True}}.items():
        made[name] = tmp_path_factory.mktemp("served") / f"{name}.wherefrom"
        build(BuildConfig(model=str(model_dir), data=(str(corpus_file),), out=str(made[name]), shard_rows=50, **options))
    return made


@pytest.fixture(scope="module")
def server(paths, environment):
    server = Server([paths["dense"], f"head={paths['sparse']}"], environment)
    yield server
    code, said = server.stop()
    assert code in (0, -signal.SIGTERM), said
    assert "Traceback" not in said
    assert not list((servers_directory_of(environment)).glob("*.json"))


def servers_directory_of(environment):
    from pathlib import Path

    return Path(environment["XDG_RUNTIME_DIR"]) / "wherefrom"


def raw(port, method, path, body=None, headers=None, host=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest(method, path, skip_host=host is not None)
    if host is not None:
        connection.putheader("Host", host)
    body = body.encode() if isinstance(body, str) else body
    for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
        connection.putheader(name, value)
    if body is not None and "Content-Length" not in (headers or {}):
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, content, dict(response.getheaders())


def without_numbers(said, numbers):
    """An answer or explanation as JSON says it, without its time; its numbers are appended to a list instead."""
    content = said if isinstance(said, dict) else said.to_dict()
    search = content.get("search", {}) | {"seconds": None}
    search["rerank"] = search.get("rerank") and search["rerank"] | {"seconds": None}
    content = content | {"search": search}
    return json.loads(to_json(content), parse_float=lambda text: numbers.append(float(text)))


def assert_alike(actual, expected):
    """Two answers or explanations are equal but for the last digits of numbers: two processes computed them."""
    ours, theirs = [], []
    assert without_numbers(actual, ours) == without_numbers(expected, theirs)
    assert_close(ours, theirs, 1e-5)


QUERIES = [
    Query(prompt="w1 w2", completion=" w3"),
    Query(text=words(4, 5, 6)),
    Query(row=7),
    Query(prompt="w1", completion=" w2", against=" w9"),
]
OPTIONS = [
    {},
    {"k": 3, "mode": "cosine"},
    {"where": "year > 1950", "group_by": "source"},
    {"damping": 2.0, "opponents": False},
    {"recall": 0.9, "baselines": True},
    {"training": "0.01,50", "k": 3},
]


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_both_clients_answer_alike(server, paths, name):
    local, remote = Client(str(paths[name])), connect(server.url, index="head" if name == "sparse" else "dense")
    assert isinstance(remote, RemoteClient)
    for options in OPTIONS:
        for a, b in zip(local.query_many(QUERIES, **options), remote.query_many(QUERIES, **options), strict=True):
            assert_alike(b, a)
            assert isinstance(b, Answer)
    assert_alike(remote.query(prompt="w1 w2", completion=" w3", k=2), local.query(prompt="w1 w2", completion=" w3", k=2))
    (mean,) = remote.query_many(QUERIES[:3], mean=True)
    (mean_answer,) = local.query_many(QUERIES[:3], mean=True)
    assert_same_ranking(mean.proponents, mean_answer.proponents, 1e-5)
    for a, b in zip(local.explain([3, 70], QUERIES[0]), remote.explain([3, 70], QUERIES[0]), strict=True):
        assert_alike(b, a)
    assert remote.complete("w1 w2", 3) == local.complete("w1 w2", 3)
    for options in ({}, {"where": "year > 1950", "mode": "cosine", "damping": 2.0} if name == "dense" else {"where": "year > 1950"}):
        scores = local.scores(QUERIES, **options)
        assert scores.shape == (len(QUERIES), 120)
        assert np.isnan(scores).any() == ("where" in options)
        assert_close(np.nan_to_num(remote.scores(QUERIES, **options)), np.nan_to_num(scores), 1e-5)
    ours, theirs = local.encode(QUERIES), remote.encode(QUERIES)
    assert ours.keys() == theirs.keys()
    for component, vectors in ours.items():
        for field in (field for field in fields(vectors) if getattr(vectors, field.name) is not None):
            assert_close(getattr(theirs[component], field.name), getattr(vectors, field.name), 1e-5)
    with pytest.raises(UsageError, match="nothing is not an option"):
        remote.encode(QUERIES, nothing=1)
    ranked = [p.row for p in local.query(QUERIES[0], k=5, rerank=0).proponents]
    assert np.argsort(-local.scores(QUERIES[:1])[0], kind="stable")[:5].tolist() == ranked


def test_a_server_refines_no_longer_than_it_should(server):
    remote = connect(server.url, index="dense")
    for ask in (
        lambda: remote.query(prompt="w1", completion=" w2", refine=100),
        lambda: remote.scores(QUERIES[:1], refine=100),
        lambda: remote.explain([3], QUERIES[0], refine=100),
        lambda: remote.encode(QUERIES[:1], refine=100),
    ):
        with pytest.raises(UsageError, match="a server takes at most 10,000 for a request"):
            ask()
    with pytest.raises(UsageError, match="are a random projection, which has no inverse"):
        remote.query(prompt="w1", completion=" w2", refine=1)
    with pytest.raises(UsageError, match="are a random projection, which has no inverse"):
        remote.encode(QUERIES[:1], refine=1)


def test_the_command_line_asks_a_running_server_and_prints_the_same(server, paths, environment):
    index = str(paths["dense"])

    def run(*arguments, **more):
        done = CliRunner().invoke(main, list(arguments), env={**environment, **more})
        return done.exit_code, done.output

    arguments = ("query", index, "--prompt", "w1 w2", "--completion", " w3", "-k", "4", "--group-by", "source", "--json")
    (code, remote), (local_code, in_process) = run(*arguments), run(*arguments, "--local")
    assert (code, local_code) == (0, 0), remote + in_process
    assert_alike(json.loads(remote), json.loads(in_process))
    shown, local_table = run(*arguments[:-1])[1], run(*arguments[:-1], "--local")[1]
    assert shown.splitlines()[:20] == local_table.splitlines()[:20]
    for wrong in (("--where", "nothing == 1"), ("-k", "0"), ("--damping", "-3")):
        remote, in_process = run(*arguments, *wrong), run(*arguments, *wrong, "--local")
        assert remote[0] == in_process[0] != 0
    assert run("query", index, "--row", "999999", "--json")[0] == 2
    explained = run("explain", index, "--example", "3", "--prompt", "w1 w2", "--completion", " w3", "--json")
    assert json.loads(explained[1])["row"] == 3
    assert_alike(json.loads(run(*arguments, WHEREFROM_URL=server.url)[1]), json.loads(run(*arguments, "--local")[1]))
    code, said = run(*arguments, WHEREFROM_URL="http://127.0.0.1:9")
    assert code == 3
    assert "wherefrom serve" in said


def test_asking_a_server_loads_nothing_heavy(server, paths, environment):
    script = (
        "import sys\nfrom wherefrom.cli import main\ntry:\n"
        f"    main(['query', {str(paths['dense'])!r}, '--prompt', 'w1 w2', '--completion', ' w3', '--json'])\n"
        "except SystemExit:\n    pass\nprint(*sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**os.environ, **environment})
    assert json.loads(done.stdout.splitlines()[0])["proponents"]
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not {"numpy", "torch", "pydantic", "fastapi", "rich", "pyarrow", "jaxtyping", "numba"} & loaded


def test_what_the_pages_say(server, paths):
    def get(path):
        status, content, headers = raw(server.port, "GET", path)
        assert status == 200, content
        assert headers["x-content-type-options"] == "nosniff"
        return content

    assert json.loads(get("/healthz"))["status"] == "ok"
    assert json.loads(get("/readyz"))["status"] == "ok"
    assert [i["name"] for i in json.loads(get("/v1/indexes"))] == ["dense", "head"]
    assert json.loads(get("/v1/indexes/head"))["columns"]["year"] == "int64"
    row = json.loads(get("/v1/rows/5?index=dense"))
    assert (row["id"], row["metadata"]) == ("d5", {"year": 1905})
    assert row["loss"] > 0
    linked = json.loads(get('/v1/query?q={"index":"dense","row":7,"k":2}'.replace('"', "%22")))
    assert len(linked["proponents"]) == 2
    assert {"/v1/query", "/v1/explain", "/v1/scores"} <= set(json.loads(get("/openapi.json"))["paths"])
    body = json.dumps({"index": "dense", "row": 7})
    histogram = json.loads(raw(server.port, "POST", "/v1/scores", body)[1])
    assert sum(histogram["counts"]) == 120 == histogram["rows"]
    import numpy as np

    numbers = np.frombuffer(raw(server.port, "POST", "/v1/scores", json.dumps({"index": "dense", "row": 7, "format": "float32"}))[1], "<f4")
    best = Client(paths["dense"]).query(row=7, k=1).proponents[0]
    assert (int(np.argmax(numbers)), pytest.approx(best.score, rel=1e-5)) == (best.row, float(numbers.max()))
    metrics = get("/metrics").decode()
    for name in (
        "wherefrom_stage_seconds_bucket",
        "wherefrom_candidates_total",
        "wherefrom_cached_queries_total",
        "wherefrom_responses_total",
    ):
        assert name in metrics
    for page in ("/", "/docs", "/static/app.js", "/static/style.css", "/static/docs.js", "/static/icon.svg"):
        assert get(page)
    assert b"http" not in get("/").replace(b"http://www.w3.org", b"")  # nothing comes from elsewhere


BAD = {
    "no json": (b"{", 422, "JSON"),
    "not utf-8": (b'{"text": "\xff\xfe"}', (400, 422), ""),
    "a list": (b"[]", 422, ""),
    "unknown field": (b'{"index": "dense", "text": "w1 w2", "whatever": 1}', 422, "whatever"),
    "no query": (b'{"index": "dense"}', 422, "exactly one"),
    "two queries": (b'{"index": "dense", "text": "w1 w2", "row": 1}', 422, "exactly one"),
    "empty text": (b'{"index": "dense", "text": ""}', 422, ""),
    "no such row": (b'{"index": "dense", "row": 100000}', 422, "row 100000"),
    "negative row": (b'{"index": "dense", "row": -1}', 422, "row"),
    "huge row": (b'{"index": "dense", "row": 99999999999999999999999}', 422, "row"),
    "no such index": (b'{"index": "other", "row": 1}', 404, "dense, head"),
    "no index": (b'{"row": 1}', 404, "name an index"),
    "k of 0": (b'{"index": "dense", "row": 1, "k": 0}', 422, "k"),
    "k too large": (b'{"index": "dense", "row": 1, "k": 9007199254740993}', 422, "k"),
    "k a word": (b'{"index": "dense", "row": 1, "k": "many"}', 422, "k"),
    "NaN": (b'{"index": "dense", "row": 1, "damping": NaN}', 422, ""),
    "surrogate": (b'{"index": "dense", "text": "\\ud800 w1"}', 422, ""),
    "bad filter": (b'{"index": "dense", "row": 1, "where": "__import__(1)"}', 422, ""),
    "deep filter": (json.dumps({"index": "dense", "row": 1, "where": "(" * 1500 + "1" + ")" * 1500}).encode(), 422, ""),
    "bad layer": (b'{"index": "dense", "row": 1, "layers": ["nothing"]}', 422, "no layer"),
    "bad weight": (b'{"index": "dense", "row": 1, "weights": {"blocks": -1}}', 422, "weight"),
    "long text": (json.dumps({"index": "dense", "text": "w1 " * 5000}).encode(), 422, "context"),
    "surrogate in a filter": (rb'{"index": "dense", "row": 1, "where": "id == \"\\ud800\""}', 422, ""),
    "nested filter": (json.dumps({"index": "dense", "row": 1, "where": "not " * 985 + "chunk == 0"}).encode(), 422, ""),
    "huge number in a filter": (json.dumps({"index": "dense", "row": 1, "where": "chunk == 0x" + "F" * 3900}).encode(), 422, ""),
    "mean of nothing": (
        b'{"index": "dense", "mean": true, "queries": [{"row": 1, "weight": 0}, {"row": 2, "weight": 0}]}',
        422,
        "weight 0",
    ),
    "huge weight": (b'{"index": "dense", "row": 1, "weights": {"blocks": 1e38}}', 422, "1e6"),
    "row that is true": (b'{"index": "dense", "row": true}', 422, "row"),
    "too many answers": (json.dumps({"index": "dense", "queries": [{"row": 1}] * 250, "k": 120}).encode(), 422, "split the request"),
    "mean of one": (b'{"index": "dense", "row": 1, "mean": true}', 422, "mean"),
    "deep json": (b'{"index":' * 50_000, (400, 422), ""),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_get_one_sentence(server, name):
    body, expected, word = BAD[name]
    status, content, headers = raw(server.port, "POST", "/v1/query", body)
    assert status in (expected if isinstance(expected, tuple) else (expected,)), content
    assert headers["content-type"] == "application/problem+json"
    problem = json.loads(content)
    assert problem["status"] == status
    assert word in problem["detail"]
    assert "Traceback" not in problem["detail"]
    assert raw(server.port, "GET", "/healthz")[0] == 200


def test_both_clients_give_all_rows_where_more_are_asked_for(server, paths):
    answers = [client.query(row=1, k=10**9) for client in (Client(paths["dense"]), connect(server.url, index="dense"))]
    assert answers[0].proponents == answers[1].proponents
    assert len(answers[0].proponents) + len(answers[0].opponents) > 100


def test_a_body_that_is_not_said_to_be_json_is_refused(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        status, content, _ = raw(server.port, "POST", "/v1/query", b'{"index": "dense", "row": 1}', headers={"Content-Type": kind})
        assert status == 415
        assert "Content-Type: application/json" in json.loads(content)["detail"]


def test_both_clients_refuse_what_is_no_option(server, paths):
    for client in (Client(paths["dense"]), connect(server.url, index="dense")):
        for call in (lambda c: c.query(row=1, K=3), lambda c: c.explain([1], Query(row=2), whatever=1)):
            with pytest.raises(UsageError, match="is not an option; there are mode, damping"):
                call(client)


def test_hostile_paths_sizes_hosts_and_clients(server):
    for path in (
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%2fapp.py",
        "/static/nothing.js",
        "/v1/indexes/%2e%2e",
        "/nothing",
    ):
        status, content, _ = raw(server.port, "GET", path)
        assert status == 404, path
        assert b"import" not in content
    assert raw(server.port, "POST", "/v1/query", b"x" * (1 << 20 | 1))[0] == 413
    assert raw(server.port, "POST", "/v1/query", b"{}", {"Content-Length": "99999999"})[0] == 413
    status, content, _ = raw(server.port, "POST", "/healthz", b"")
    assert (status, json.loads(content)["detail"]) == (405, "/healthz does not take POST; /docs lists what it takes")
    assert json.loads(raw(server.port, "GET", "/nothing")[1])["detail"] == "there is no /nothing; /docs lists what there is"
    status, content, headers = raw(server.port, "GET", "/v1/indexes", host="evil.example:80")
    assert (status, content, headers["x-content-type-options"]) == (400, b"Invalid host header", "nosniff")
    for name in ("localhost", "LOCALHOST", "[::1]"):
        assert raw(server.port, "GET", "/v1/indexes", host=f"{name}:{server.port}")[0] == 200
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:  # half a request, then gone
        connection.sendall(b"POST /v1/query HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(b"\x00\xff\x00 nonsense\r\n\r\n")
        connection.recv(1000)
    assert raw(server.port, "GET", "/healthz")[0] == 200


def test_many_at_once_get_their_own_answers(server, paths):
    queries = [Query(text=t) for t in random_texts(24, seed=31)] + [Query(row=r) for r in range(8)]
    expected = Client(paths["dense"]).query_many(queries, k=3)
    answers, errors = [None] * len(queries), []

    def ask(number):
        client = RemoteClient(server.url, index="dense")
        query = queries[number]
        answers[number] = client.query(text=query.text, row=query.row, k=3)
        try:
            client.query(row=10**6)
        except UsageError as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(queries))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == len(queries)
    for a, b in zip(answers, expected, strict=True):  # batches change the last bits of a model's output
        assert_same_ranking(a.proponents, b.proponents, 1e-5)


def test_a_changed_index_is_picked_up(paths, environment, tmp_path):
    shutil.copytree(paths["dense"], tmp_path / "i.wherefrom")
    server = Server([tmp_path / "i.wherefrom"], environment)
    try:
        client = RemoteClient(server.url)
        best = client.query(text=words(1, 2, 3), k=1).proponents[0].row
        done = CliRunner().invoke(main, ["delete", str(tmp_path / "i.wherefrom"), "--ids", "-"], input=f"d{best}\n")
        assert done.exit_code == 0, done.output
        again = client.query(text=words(1, 2, 3), k=1)
        assert again.proponents[0].row != best
        assert again.index["manifest"] == 2
        shutil.move(tmp_path / "i.wherefrom", tmp_path / "gone")
        with pytest.raises(NotFoundError, match="no index"):
            client.query(row=1)
        shutil.copytree(paths["sparse"], tmp_path / "i.wherefrom")  # another index in its place, its manifest of a number as the first had
        assert client.query(row=1, k=1).index["components"] == ["head"]
    finally:
        assert server.stop()[0] in (0, -signal.SIGTERM)


def test_a_token_is_asked_for(paths, environment, tmp_path):
    (tmp_path / "token").write_text(TOKEN + "\n")
    server = Server([paths["dense"], "--token-file", tmp_path / "token"], environment)
    try:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"Authorization": "Bearer \xff"}):
            for path in ("/v1/indexes", "/metrics", "/openapi.json", "/v1/rows/1"):
                assert raw(server.port, "GET", path, headers=headers)[0] == 401
        assert raw(server.port, "GET", "/v1/indexes", headers={"Authorization": f"Bearer {TOKEN}"})[0] == 200
        for path in ("/healthz", "/", "/docs", "/static/app.js"):  # pages hold nothing of an index
            assert raw(server.port, "GET", path)[0] == 200
        assert RemoteClient(server.url, token=TOKEN).query(row=1).proponents
        with pytest.raises(UsageError, match="token"):
            RemoteClient(server.url).query(row=1)
        done = CliRunner().invoke(main, ["query", str(paths["dense"]), "--row", "1", "--json"], env=environment)
        assert done.exit_code == 0, done.output  # the owner's own command finds the token
        word = next(servers_directory_of(environment).glob(f"*-{server.process.pid}.json"))
        assert word.stat().st_mode & 0o077 == 0
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nothing.wherefrom"], 3, "no index"),
        (["{dense}", "--host", "0.0.0.0"], 2, "--token-file"),
        (["{dense}", "--token-file", "nothing"], 3, "no token file"),
        (["{dense}", "{dense}"], 2, "two indexes"),
        (["{dense}", "--port", "99999"], 2, "port"),
    ],
)
def test_a_server_that_cannot_be_says_why(paths, arguments, code, said):
    done = CliRunner().invoke(main, ["serve", *(a.format(dense=paths["dense"]) for a in arguments)])
    assert done.exit_code == code, done.output
    assert said in done.output


def test_a_port_that_is_taken_and_a_short_token(paths, tmp_path, server):
    done = CliRunner().invoke(main, ["serve", str(paths["dense"]), "--port", str(server.port)])
    assert (done.exit_code, "choose another --port" in done.output) == (2, True)
    (tmp_path / "t").write_text("short")
    assert CliRunner().invoke(main, ["serve", str(paths["dense"]), "--token-file", str(tmp_path / "t")]).exit_code == 2


def test_servers_that_were_killed_are_forgotten(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("WHEREFROM_URL", raising=False)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    word = announce("http://127.0.0.1:1", None, {"i": str(tmp_path / "i")}, gone.pid)
    assert find_server(str(tmp_path / "i")) is None
    assert not word.exists()
    host = socket.gethostname()
    good = {"url": "http://127.0.0.1:9", "pid": os.getpid(), "token": None, "indexes": {"i": "i"}}
    for number, wrong in enumerate(
        ["{", "[" * 100_000, json.dumps(good), json.dumps(good | {"pid": 10**20}), json.dumps(good | {"indexes": ["i"]})]
        + [json.dumps(good | change) for change in ({"url": 5}, {"url": "x"}, {"token": "a\nb"}, {"pid": "me"})]
    ):
        (servers_directory() / f"{host}-{number}.json").write_text(wrong)
    assert find_server("i") is None
    for address in (
        "http://127.0.0.1:99999",
        "http://127.0.0.1:abc",
        "http://[::1",
        "http://a..b",
        "http://u:p@127.0.0.1",
        "http://h/?x=1",
    ):
        with pytest.raises(UsageError, match="address"):
            RemoteClient(address)
    with pytest.raises(UsageError, match="ASCII"):
        RemoteClient("http://127.0.0.1:9", token="ключ")
    with pytest.raises(UsageError, match="address"):
        RemoteClient("127.0.0.1:80")
    with pytest.raises(NotFoundError, match="wherefrom serve"):
        RemoteClient("http://127.0.0.1:9").query(row=1)


def test_a_full_queue_refuses_and_a_body_that_does_not_end_is_not_waited_for(paths):
    """In process, where the queue can be made small and the body timeout short."""
    from wherefrom.server.engine import Engine, Metrics

    async def scenario():
        client = Client(paths["dense"])
        engine = Engine("i", client, Metrics(), batch=1, queue=2)
        waiting = [asyncio.create_task(engine.ask(Query(row=n), {})) for n in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(BusyError, match="2 requests wait"):
            await engine.ask(Query(row=5), {})
        engine.start()
        answers = await asyncio.gather(*waiting)
        assert [a.query["row"] for a in answers] == [0, 1]
        last = asyncio.create_task(engine.ask(Query(row=3), {}))
        await last
        await engine.stop()

        sent = []
        app = create_app({"i": client}, body_timeout=0.05)

        async def send(message):
            sent.append(message)

        async def never():
            await asyncio.sleep(10)

        began = time.perf_counter()
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json; charset=utf-8")]
        await app({"type": "http", "method": "POST", "path": "/v1/query", "headers": headers}, never, send)
        assert time.perf_counter() - began < 5
        assert sent[0]["status"] == 408

    asyncio.run(scenario())


@pytest.mark.slow
def test_schemathesis_finds_no_500(server):
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")

    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate], database=None)
        @given(operation.as_strategy())
        def fuzz(case):
            response = case.call(base_url=server.url)
            assert response.status_code < 500, (case.formatted_path, case.body, response.text)
            if response.status_code >= 400:
                kinds = response.headers["content-type"]
                assert str(kinds if isinstance(kinds, str) else kinds[0]).startswith("application/problem+json")

        fuzz()
    assert raw(server.port, "GET", "/healthz")[0] == 200


@pytest.mark.parametrize("said", [b"{}", b"[]", b"3", b"null", b"x", b'{"answers": [{}]}'])
@pytest.mark.parametrize("status", [200, 500])
def test_what_is_no_wherefrom_server_is_said_to_be_none(said, status):
    class Other(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *arguments):
            pass

    other = http.server.HTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    try:
        client = RemoteClient(f"http://127.0.0.1:{other.server_port}")
        for ask in (
            lambda: client.query(row=1),
            lambda: client.query_many([Query(row=1)] * 2),
            lambda: client.explain([1], Query(row=1)),
        ):
            with pytest.raises(NotFoundError, match="not as a Wherefrom server"):
                ask()
    finally:
        other.shutdown()
        other.server_close()


def test_an_engine_outlives_whatever_happens_and_drops_what_nobody_waits_for(paths, monkeypatch):
    from wherefrom.server.engine import Engine, Metrics

    async def scenario():
        engine = Engine("i", Client(paths["dense"]), Metrics(), batch=4, queue=9)
        engine.start()
        monkeypatch.setattr(Client, "refreshed", lambda self: (_ for _ in ()).throw(OSError("no more files")))
        with pytest.raises(OSError, match="no more files"):
            await engine.ask(Query(row=1), {})
        monkeypatch.undo()
        assert engine.alive
        assert (await engine.ask(Query(row=1), {})).proponents
        began = []
        slow = asyncio.create_task(engine.call(lambda client: time.sleep(0.3)))
        await asyncio.sleep(0.05)
        gone = asyncio.create_task(engine.call(lambda client: began.append(1)))
        await asyncio.sleep(0.05)
        gone.cancel()
        await slow
        assert (await engine.ask(Query(row=2), {})).proponents
        assert began == []
        waiting = asyncio.create_task(engine.call(lambda client: time.sleep(0.3)))
        await asyncio.sleep(0.05)
        await engine.stop()
        with pytest.raises(BusyError, match="stopping"):
            await waiting
        assert not engine.alive or engine._task.cancelled() or engine._task.cancelling()

    asyncio.run(scenario())


def test_pages_of_other_addresses_learn_nothing(server):
    """Browsers say where a request comes from; the answer's time must not tell whether a filter matches."""
    ask = "/v1/query?q=" + urllib.parse.quote(json.dumps({"row": 1, "where": "year > 1900", "index": "dense"}))
    for site in ("cross-site", "same-site", "CROSS-SITE"):
        for method, path in (("GET", ask), ("GET", "/v1/indexes"), ("POST", "/v1/query"), ("GET", "/openapi.json"), ("GET", "/metrics")):
            status, body, headers = raw(server.port, method, path, b"{}" if method == "POST" else None, {"Sec-Fetch-Site": site})
            assert status == 403, (site, path)
            assert "a page of another address cannot use" in json.loads(body)["detail"]
            assert headers["cross-origin-resource-policy"] == "same-origin"
    for site in ("same-origin", "none"):
        status, _, headers = raw(server.port, "GET", ask, headers={"Sec-Fetch-Site": site})
        assert (status, headers["cache-control"], headers["cross-origin-resource-policy"]) == (200, "no-store", "same-origin")
    assert raw(server.port, "GET", "/", headers={"Sec-Fetch-Site": "cross-site"})[0] == 200  # a link to the explorer


def test_requests_that_outlast_the_servers_grace_period_get_503():
    """uvicorn cancels them when its time of grace is over."""
    from wherefrom.server.access import Tokens
    from wherefrom.server.guard import Guard

    async def scenario():
        sent, begun = [], asyncio.Event()
        messages = [{"type": "http.request", "body": b"{}", "more_body": False}]

        async def never_answers(scope, receive, send):
            begun.set()
            await asyncio.sleep(60)

        async def receive():
            if not messages:
                await asyncio.sleep(60)
            return messages.pop()

        async def send(message):
            sent.append(message)

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/query", "headers": headers}
        request_task = asyncio.create_task(Guard(never_answers, Tokens({}), None, body_timeout=15)(scope, receive, send))
        await begun.wait()
        request_task.cancel()
        await request_task
        assert sent[0]["status"] == 503
        assert "the server is stopping" in json.loads(sent[1]["body"])["detail"]

    asyncio.run(scenario())


def test_work_for_a_client_that_is_gone_is_cancelled():
    from wherefrom.server.access import Tokens
    from wherefrom.server.guard import Guard

    async def scenario():
        messages = [{"type": "http.disconnect"}, {"type": "http.request", "body": b"{}"}]
        ended = []

        async def never_answers(scope, receive, send):
            assert (await receive())["body"] == b"{}"
            try:
                await asyncio.sleep(60)
            finally:
                ended.append(await receive())

        async def receive():
            return messages.pop()

        async def send(message):
            raise AssertionError(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/query", "headers": [(b"content-type", b"application/json")]}
        await asyncio.wait_for(Guard(never_answers, Tokens({}), None, body_timeout=15)(scope, receive, send), 5)
        assert ended == [{"type": "http.disconnect"}]

    asyncio.run(scenario())


def test_an_address_without_its_scheme_is_explained():
    with pytest.raises(UsageError, match=r"127\.0\.0\.1:8791 is neither an index nor an address; a server's address begins with http://"):
        connect("127.0.0.1:8791")
