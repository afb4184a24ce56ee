"""Work on Ray clusters of several nodes: nodes, workers and the ledger are killed, places are missing; results stay whole and in order."""

import os
import random
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial

import numpy as np
import psutil
import pytest
from helpers import make_model, make_tokenizer, random_texts, write_jsonl
from wherefrom import BuildConfig
from wherefrom.ray_jobs import executor as module
from wherefrom.ray_jobs.build import build
from wherefrom.ray_jobs.executor import Resources, open_executor
from wherefrom.ray_jobs.progress import Silent
from wherefrom.store.errors import BusyError, DataError, UsageError, WorkerError
from wherefrom.store.index import Index
from wherefrom.store.manifest import read_manifest

pytestmark = pytest.mark.processes
KILLS = int(os.environ.get("WHEREFROM_KILLS", "3"))
HEALTH = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
LARGE = 60_000  # numbers of a result that Ray keeps on the worker's node


class OddError(ValueError):
    """Of two arguments, so that it cannot be unpickled."""

    def __init__(self, what, number):
        super().__init__(f"{what} {number}")


class Tasks:
    """A worker; each try of a task leaves a file that names its node."""

    def __init__(self, place):
        self.place = place

    def note(self, number):
        import ray

        (self.place / f"{number}-{ray.get_runtime_context().get_node_id()}-{time.monotonic_ns()}").touch()

    def square(self, shared, number, seconds, progress):
        self.note(number)
        time.sleep(seconds)
        progress(1, 10)
        return np.full(LARGE, number * number + int(shared[-1]))

    def where(self, number, seconds, progress):
        import ray

        time.sleep(seconds)
        progress(1, 0)
        return number, ray.get_runtime_context().get_node_id()

    def die(self, number, tries, progress):
        """Ends its process in the first tries of number 1."""
        self.note(number)
        if number == 1 and len(list(self.place.glob("1-*"))) <= tries:
            os.kill(os.getpid(), 9)
        return number

    def refuse(self, number, progress):
        raise number if isinstance(number, Exception) else OddError("nobody wants", number)

    def describe(self):
        self.note("describe")
        time.sleep(2)
        return "described"


class Stillborn(Tasks):
    def __init__(self, place):
        super().__init__(place)
        self.note("start")
        os.kill(os.getpid(), 9)


class Unwilling(Tasks):
    def __init__(self, place):
        raise DataError("cannot start")


class Heard(Silent):
    """Keeps the last report of progress; does something whenever one comes (in the main thread, where Ray adds nodes)."""

    def __init__(self, act=lambda: None):
        self.act, self.last, self.name = act, (0, 0), ""

    def stage(self, name, total):
        self.name = name

    def update(self, examples, tokens):
        self.last = (examples, tokens)
        self.act()


@pytest.fixture(scope="module")
def head():
    """A cluster of a head with one CPU that finds out about dead nodes within some two seconds."""
    import ray
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": HEALTH})
    yield cluster
    cluster.shutdown()


@pytest.fixture
def cluster(head):
    """The head; nodes that a test adds go with it."""
    yield head
    for node in list(head.worker_nodes):
        head.remove_node(node, allow_graceful=False)
    head.wait_for_nodes()


@contextmanager
def workers(cluster, place, count=2, threads=1, worker=Tasks):
    with open_executor(partial(worker, place), Resources(count, threads, cluster.address)) as executor:
        yield executor


def squares(executor, reporter, count=10, seconds=0.2):
    """The squares come whole, in order and counted."""
    shared, number = np.full(LARGE, 5), -1
    for number, values in enumerate(executor.map("square", (shared,), [(n, seconds) for n in range(count)], reporter)):
        np.testing.assert_array_equal(values, np.full(LARGE, number * number + 5))
    assert number == count - 1
    assert reporter.last == (count, 10 * count)


def kill(name):
    """SIGKILL a process of this test's cluster, if there is one of such a name."""
    processes = [p for p in psutil.Process().children(recursive=True) if p.cmdline() and p.cmdline()[0].startswith(f"ray::{name}")]
    if processes:
        random.choice(processes).kill()
    return bool(processes)


def test_work_goes_on_while_nodes_die_and_come(cluster, tmp_path):
    first, second, places, later = cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1), [], []

    def act():
        if len(set(places)) == 3 and not later:
            cluster.remove_node(first, allow_graceful=False)  # with what it was doing
            cluster.remove_node(second)
            later.append(len(places))
        elif later and len(places) > later[0] + 2 and len(later) == 1:
            later.append(cluster.add_node(num_cpus=2).node_id)

    with workers(cluster, tmp_path, count=3) as executor:
        numbers = []
        for number, place in executor.map("where", (), [(n, 0.2) for n in range(50)], Heard(act)):
            numbers.append(number)
            places.append(place)
    assert numbers == list(range(50))
    assert later[1] in places


def test_a_task_may_lose_any_number_of_nodes_but_then_needs_one(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_DEATHS", 2)
    nodes, lost = [cluster.add_node(num_cpus=2)], []

    def act():
        if len(list(tmp_path.glob("0-*"))) > len(lost) and len(lost) < 3:
            lost.append(nodes[-1])
            cluster.remove_node(nodes[-1])
            nodes.append(cluster.add_node(num_cpus=2))
        elif list(tmp_path.glob("2-*")) and len(lost) == 3:
            lost.append(nodes[-1])
            monkeypatch.setattr(module, "_PLACE_SECONDS", 5.0)  # only now, since a busy machine takes longer to start a node
            cluster.remove_node(nodes[-1])

    sentence = "for 5 s no node had 2 CPUs free for one; what is finished is kept: run the same command again when there is one"
    with workers(cluster, tmp_path, count=1, threads=2) as executor:  # for which the head has no room
        results = executor.map("square", ([5],), [(n, 1.5) for n in range(4)], Heard(act))
        assert [int(next(results)[0]) for _ in range(2)] == [5, 6]
        with pytest.raises(WorkerError, match=sentence):
            list(results)
    assert len(list(tmp_path.glob("0-*"))) == 4
    assert len(lost) == 4


def test_workers_and_ledgers_that_are_killed_are_replaced(cluster, tmp_path):
    killed = []

    def act():
        if heard.last[0] >= 4 * (len(killed) + 1) and len(killed) < 6:
            killed.append(kill("_Ledger" if len(killed) % 3 == 1 else "_Actor"))

    heard = Heard(act)
    cluster.add_node(num_cpus=1)
    with workers(cluster, tmp_path) as executor:
        squares(executor, heard, count=30, seconds=0.1)
    assert sum(killed) > 3


def test_a_task_that_ends_four_workers_ends_the_work(cluster, tmp_path):
    with workers(cluster, tmp_path, count=1) as executor:
        assert list(executor.map("die", (), [(n, 3) for n in range(3)], Heard())) == [0, 1, 2]
        assert len(list(tmp_path.glob("1-*"))) == 4
        with pytest.raises(WorkerError, match=r"a worker died 4 times \(killed for memory\?\); what is finished is kept"):
            list(executor.map("die", (), [(n, 99) for n in range(3)], Heard()))
    assert len(list(tmp_path.glob("1-*"))) == 8


def test_what_a_worker_raises_is_raised(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PAUSE_SECONDS", 0.1)
    with workers(cluster, tmp_path, count=1) as executor:
        with pytest.raises(DataError, match="nobody wants 3"):
            list(executor.map("refuse", (), [(DataError("nobody wants 3"),)], Heard()))
        with pytest.raises(WorkerError, match=r"a worker failed with .*OddError: nobody wants 4"):
            list(executor.map("refuse", (), [(4,)], Heard()))
        squares(executor, Heard(), count=2, seconds=0)
    with workers(cluster, tmp_path, count=1, worker=Unwilling) as executor, pytest.raises(DataError, match="cannot start"):
        executor.call("describe")
    monkeypatch.setattr(module, "_DEATHS", 2)
    with workers(cluster, tmp_path, count=1, worker=Stillborn) as executor, pytest.raises(WorkerError, match="a worker died 2 times"):
        executor.call("describe")
    assert len(list(tmp_path.glob("start-*"))) == 2


def test_a_call_outlives_its_node(cluster, tmp_path):
    def kill_when_called():
        while not (files := list(tmp_path.glob("describe-*"))):
            time.sleep(0.02)
        (node,) = {node for node in nodes if node.node_id == files[0].name.split("-")[1]}
        cluster.remove_node(node, allow_graceful=False)

    nodes = [cluster.add_node(num_cpus=2), cluster.add_node(num_cpus=2)]
    killer = threading.Thread(target=kill_when_called)
    killer.start()
    with workers(cluster, tmp_path, count=1, threads=2) as executor:
        assert executor.call("describe") == "described"
    killer.join()
    assert len(list(tmp_path.glob("describe-*"))) == 2


def test_what_is_shared_is_put_again_when_it_is_lost(cluster, tmp_path, monkeypatch):
    import ray

    def get(pending):
        value = real_get(pending)
        if isinstance(value, tuple) and isinstance(value[0], np.ndarray) and len(references) == 1:
            raise ray.exceptions.ObjectLostError(pending.hex(), None, "")
        return value

    real_put, real_get, references = ray.put, ray.get, []
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "put", lambda value: references.append(real_put(value)) or references[-1])
    with workers(cluster, tmp_path, count=1) as executor:
        squares(executor, Heard(), count=3, seconds=0)
    assert len(references) == 2


HOLDER = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False)
assert ray.util.placement_group([{"CPU": 1}]).wait(30)
print("held", flush=True)
time.sleep(1000)
"""


def test_workers_without_a_place_are_a_sentence(cluster, tmp_path, monkeypatch):
    cluster.add_node(num_cpus=1)
    began = time.monotonic()
    sentence = (
        "the Ray cluster has 2 CPUs, 1 workers of 2 threads need 2 CPUs each on one node, "
        r"and its nodes \(1 CPUs; 1 CPUs\) have room for 0; ask for fewer `workers` or `threads`"
    )
    with pytest.raises(UsageError, match=sentence), workers(cluster, tmp_path, count=1, threads=2):
        pass
    assert time.monotonic() - began < 10
    with subprocess.Popen([sys.executable, "-c", HOLDER, cluster.address], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            monkeypatch.setattr(module, "_PLACE_SECONDS", 1.0)
            sentence = "2 workers wait for 1 CPUs each on one node; the Ray cluster has 1 CPUs free now of 2 CPUs, other jobs hold the rest"
            with pytest.raises(BusyError, match=sentence), workers(cluster, tmp_path):
                pass
            monkeypatch.setattr(module, "_PLACE_SECONDS", 60.0)
            threading.Timer(2.0, holder.kill).start()
            with workers(cluster, tmp_path) as executor:
                squares(executor, Heard(), count=4, seconds=0)
        finally:
            holder.kill()


def checksums(out):
    index = Index(out)
    return [(index.manifest.encoder.sha256, shard.sha256, shard.documents_sha256) for shard in index.shards]


@pytest.mark.slow
def test_a_build_whose_node_is_killed_makes_the_very_same_files(cluster, tmp_path):
    make_model("gpt2", "float32").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"id": f"d{i}", "text": t} for i, t in enumerate(random_texts(320, seed=5))])
    config = partial(BuildConfig, model=str(tmp_path / "model"), data=str(corpus), rank=4, shard_rows=8)
    alone, out = tmp_path / "alone", tmp_path / "out"
    build(config(out=str(alone)))
    node, finished = cluster.add_node(num_cpus=1), []

    def kill_in_the_middle():
        if reporter.name == "building rows" and not finished and len(list(out.glob("rows/*.zarr.zip"))) > 2:
            finished.append(len(list(out.glob("rows/*.zarr.zip"))))
            cluster.remove_node(node, allow_graceful=False)

    reporter = Heard(kill_in_the_middle)
    build(config(out=str(out), workers=2, address=cluster.address), reporter)
    assert finished[0] < read_manifest(out).shards
    assert checksums(out) == checksums(alone)


@pytest.mark.slow
def test_a_model_is_split_on_a_node_of_a_cluster(cluster, tmp_path):
    make_model("llama", "float32").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"id": f"d{i}", "text": t} for i, t in enumerate(random_texts(40, seed=5))])
    config = partial(BuildConfig, model=str(tmp_path / "model"), data=str(corpus), rank=4, dtype="float64", components=("blocks",))
    cluster.add_node(num_cpus=2)
    build(config(out=str(tmp_path / "alone")))
    build(config(out=str(tmp_path / "split"), address=cluster.address, device="tp:2"))
    rows = [Index(tmp_path / name) for name in ("alone", "split")]
    (component,) = rows[0].manifest.components
    alone, split = (np.concatenate([index.vectors(row, component).values for row in range(40)]) for index in rows)
    np.testing.assert_allclose(split, alone, atol=1e-5 * np.abs(alone).max())


def test_random_kills_leave_results_whole(cluster, tmp_path):
    """WHEREFROM_KILLS of nodes, workers and ledgers, at random times."""
    seed = int.from_bytes(os.urandom(4), "little")
    generator, kills, nodes = random.Random(seed), [], [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
    next_kill = time.monotonic() + 2

    def kill_at_random():
        nonlocal next_kill
        if time.monotonic() < next_kill or len(kills) == KILLS:
            return
        next_kill = time.monotonic() + generator.uniform(0.1, 2.0)
        what = generator.choice(["node", "node at once", "worker", "worker", "ledger"])
        if len(nodes) == 1:
            nodes.append(cluster.add_node(num_cpus=1))
        elif what.startswith("node"):
            cluster.remove_node(nodes.pop(generator.randrange(2)), allow_graceful=what == "node")
            kills.append(what)
        elif kill("_Ledger" if what == "ledger" else "_Actor"):
            kills.append(what)

    began, rounds = time.monotonic(), 0
    with workers(cluster, tmp_path, count=3) as executor:
        while len(kills) < KILLS:
            squares(executor, Heard(kill_at_random), count=20, seconds=0.1)
            rounds += 1
    print("seed", seed, "rounds", rounds, "seconds", time.monotonic() - began, kills)


QUIET = """
import os, sys
from wherefrom.ray_jobs.executor import Resources, open_executor
from wherefrom.ray_jobs.progress import Silent

def worker():
    class Once:
        def die(self, place, progress):
            if not os.path.exists(place):
                open(place, "w").close()
                os.kill(os.getpid(), 9)
            return "done"
    return Once()

with open_executor(worker, Resources(1, 1, sys.argv[1])) as executor:
    print(*executor.map("die", (), [(sys.argv[2],)], Silent()))
"""


def test_a_death_writes_nothing_on_standard_output(cluster, tmp_path):
    done = subprocess.run([sys.executable, "-c", QUIET, cluster.address, tmp_path / "tried"], check=True, capture_output=True, text=True)
    assert done.stdout == "done\n"
