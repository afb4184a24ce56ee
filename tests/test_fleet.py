"""The parts of an index in Ray actors on several nodes: nodes and actors are killed while queries come, and no answer is wrong or lost."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from helpers import random_texts, record
from wherefrom import BuildConfig, Client, Query
from wherefrom.query.parts import call_all
from wherefrom.ray_jobs import fleet as module
from wherefrom.ray_jobs.build import build
from wherefrom.ray_jobs.fleet import open_fleets
from wherefrom.remote import RemoteClient
from wherefrom.store.errors import BusyError, UsageError
from wherefrom.store.index import Index
from wherefrom.store.update import delete

pytestmark = pytest.mark.processes
KILLS = int(os.environ.get("WHEREFROM_KILLS", "3"))
HEALTH = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
QUERIES = [Query(row=row) for row in (3, 17, 40)]
OPTIONS = [{"k": 5}, {"k": 8, "mode": "cosine", "group_by": "year"}, {"k": 5, "recall": 0.99999}, {"k": 4, "where": "year >= 1960"}]


@pytest.fixture(scope="module")
def index_path(tmp_path_factory, model_dir, corpus_file):
    out = tmp_path_factory.mktemp("fleet") / "i"
    build(BuildConfig(model=str(model_dir), data=(str(corpus_file),), out=str(out), rank=4, shard_rows=16, group_rows=32))
    assert len(Index(out).groups) == 4
    return out


@pytest.fixture(scope="module")
def cluster():
    """A head without room for an actor, and three nodes with room for two each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH})
    for _ in range(3):
        cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


def kill_an_actor():
    actors = [p for p in psutil.Process().children(recursive=True) if p.cmdline() and p.cmdline()[0].startswith("ray::_Actor")]
    if actors:
        random.choice(actors).kill()


def test_answers_stay_those_of_one_process_while_nodes_and_actors_die(cluster, index_path):
    whole = Client(index_path)
    expected = [list(map(record, whole.query_many(QUERIES, **options))) for options in OPTIONS]
    scores = whole.scores(QUERIES)
    with open_fleets([index_path], cluster.address, 3, 1, 1) as (parts,):
        client = Client(parts.index, parts=parts)
        stopped = threading.Event()
        wrong, asked = [], []

        def ask(seed):
            own = Client(parts.index, parts=parts)
            generator = random.Random(seed)
            while not stopped.is_set():
                number = generator.randrange(len(OPTIONS) + 1)
                if number == len(OPTIONS):
                    same = (own.scores(QUERIES) == scores).all()
                else:
                    same = list(map(record, own.query_many(QUERIES, **OPTIONS[number]))) == expected[number]
                asked.append(number)
                if not same:
                    wrong.append(number)

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        for number in range(KILLS):
            before = len(asked)
            if number % 3 == 0:
                node = random.choice(sorted(cluster.worker_nodes, key=str))
                cluster.remove_node(node, allow_graceful=False)
                cluster.add_node(num_cpus=2)
            else:
                kill_an_actor()
            deadline = time.monotonic() + 90
            while len(asked) < before + 6 and time.monotonic() < deadline:
                time.sleep(0.1)
            assert len(asked) >= before + 6, f"no answers after kill {number}"
        stopped.set()
        for thread in threads:
            thread.join()
        assert not wrong
        assert len(asked) > 6 * KILLS
        assert list(map(record, client.query_many(QUERIES, **OPTIONS[1]))) == expected[1]


def test_a_part_without_room_is_left_out_or_waited_for_as_asked(cluster, index_path, monkeypatch):
    monkeypatch.setattr(module, "_WAIT_SECONDS", 3.0)
    with open_fleets([index_path], cluster.address, 2, 1, 2) as (parts,):
        client = Client(parts.index, parts=parts)
        whole = record(client.query(row=3, k=5))
        nodes = list(cluster.worker_nodes)
        for node in nodes[1:]:
            cluster.remove_node(node, allow_graceful=False)  # one of three nodes stays, with room for one of two parts
        deadline = time.monotonic() + 60
        changed = time.monotonic()
        while time.monotonic() < min(deadline, changed + 4):  # both parts may have died, and not all deaths are known at once
            time.sleep(0.1)
            if sum(parts.up()) != 1:
                changed = time.monotonic()
        for options in ({}, {"recall": 0.999}):
            answer = client.query(row=3, k=5, partial=True, **options)
            assert answer.search.missing == len(parts.index) - answer.search.rows > 0
        with pytest.raises(BusyError, match=r"part \d of 2 of .* does not run: no node .* had room for it \(2 CPUs free\); send the query"):
            client.query(row=3)
        with pytest.raises(BusyError, match="does not run"):
            client.scores(QUERIES)
        cluster.add_node(num_cpus=2)
        cluster.add_node(num_cpus=2)
        parts.fleet.wait()
        assert record(client.query(row=3, k=5)) == whole
        assert client.query(row=3, k=5, partial=True).search.missing == 0


def test_all_parts_move_to_a_new_state_together_and_are_restarted_without_a_pause(cluster, index_path, tmp_path):
    import shutil

    path = tmp_path / "i"
    shutil.copytree(index_path, path)
    with open_fleets([path], cluster.address, 2, 2, 1) as (parts,):
        client = Client(parts.index, parts=parts)
        before = record(client.query(row=3, k=5))
        gone = [a["id"] for a in before["proponents"][1:3]]
        delete(path, gone)
        newer = client.refreshed()
        assert record(newer.query(row=3, k=5)) == record(Client(path).query(row=3, k=5)) != before
        assert record(client.query(row=3, k=5)) == before  # who holds the older state still gets its answers
        actors = [replica.handle for replicas in parts.fleet._replicas for replica in replicas]
        restart = threading.Thread(target=parts.fleet.restart)
        restart.start()
        missing = []
        while restart.is_alive():
            missing.append(newer.query(row=3, k=5, partial=True).search.missing)
        assert not any(missing)
        assert parts.up() == [2, 2]
        assert not any(replica.handle is actor for actor in actors for replicas in parts.fleet._replicas for replica in replicas)


def test_an_error_of_a_part_is_the_callers_and_a_cluster_too_small_is_said(cluster, index_path):
    with open_fleets([index_path], cluster.address, 2, 1, 1) as (parts,):
        client = Client(parts.index, parts=parts)
        with pytest.raises(UsageError, match="there is no column 'nothing'"):
            client.query(row=3, where="nothing == 1")
        with pytest.raises(UsageError, match="there is no column 'nothing'"):
            client.query(row=3, group_by="nothing")
        with pytest.raises(UsageError, match="there is no column 'nothing'"):
            client.scores(QUERIES, "nothing == 1")
        assert [len(own) for own in call_all(parts, "column_types", None).values()]
    with (
        pytest.raises(UsageError, match=r"64 processes of 1 CPUs each are asked for \(32 parts, 2 replicas, 1 indexes\).* room for 6; ask"),
        open_fleets([index_path], cluster.address, 32, 2, 1),
    ):
        pass


def test_the_server_searches_on_ray_and_answers_as_before(index_path, model_dir, tmp_path):
    """`wherefrom serve --ray`, in a process of its own with a Ray of its own."""
    port = tmp_path / "port"
    script = "from wherefrom.cli import main; main()"
    command = [sys.executable, "-c", script, "serve", str(index_path), "--port", "0", "--ray", "--parts", "2"]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    with open(port, "w") as log, subprocess.Popen(command, stderr=log, env=environment) as server:
        try:
            deadline = time.monotonic() + 120
            while "serving" not in port.read_text() and time.monotonic() < deadline and server.poll() is None:
                time.sleep(0.2)
            url = port.read_text().split(" at ")[1].split()[0]
            remote, local = RemoteClient(url), Client(index_path)
            assert remote.request("GET", "/readyz") == {"status": "ok", "parts": {"i": [1, 1]}}
            queries = [Query(text=text) for text in random_texts(3, seed=5)]
            for options in OPTIONS:
                assert list(map(record, remote.query_many(queries, **options))) == list(map(record, local.query_many(queries, **options)))
            answer = local.query(queries[0], k=1)
            row = answer.proponents[0].row
            assert remote.explain([row], queries[0])[0].score == local.explain([row], queries[0])[0].score
            processes = psutil.Process(server.pid).children(recursive=True)
            assert any("ray::_Actor" in " ".join(p.cmdline()) for p in processes)
            server.send_signal(signal.SIGTERM)
            server.wait(30)
            _, alive = psutil.wait_procs(processes, 30)
            assert not alive
        finally:
            server.kill()
    assert Path(index_path).is_dir()
