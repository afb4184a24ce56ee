"""Where tasks run: in this process, or on Ray actors. Both give results in the tasks' order and report progress as it is made.

A worker is whatever a factory makes, once in each process; a task is a method of it with its arguments. Tasks are functions of their
arguments, so the task of a Ray actor that died is given to another one, and nothing else has to be undone. A death with the actor's node
costs nothing, however often it happens. A task that ends four workers on nodes that live ends the work.
"""

import heapq
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from ..store.errors import BusyError, NotFoundError, UsageError, WorkerError
from .progress import Reporter

_DEATHS = 4
_POLL_SECONDS = 0.5
_PLACE_SECONDS = 120.0  # how long to wait for room on the cluster
_PAUSE_SECONDS = 5.0  # before a worker that died while it started is started again
_KNOCK_SECONDS = 5
_MOST = 1024
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}

Factory = Callable[[], Any]


@dataclass(frozen=True)
class Resources:
    """How many workers of how many threads, on which cluster (None is a local Ray), on which device.

    `own_code` says that workers import modules of their user's from the working directory.
    """

    workers: int = 1
    threads: int = 1
    address: str | None = None
    device: str = "auto"
    own_code: bool = False

    def __post_init__(self) -> None:
        for name in ("workers", "threads"):
            if not 1 <= getattr(self, name) <= _MOST:
                raise UsageError(f"--{name} is {getattr(self, name)}; it must be from 1 to {_MOST}")


@runtime_checkable
class Executor(Protocol):
    """Runs a worker's methods."""

    def call(self, method: str) -> Any:
        """A method of one worker, without arguments."""

    def map(self, method: str, shared: Sequence[Any], tasks: Sequence[Any], reporter: Reporter) -> Iterator[Any]:
        """`method(*shared, *task)` for every task, on any worker; yields the results in the tasks' order, as they come."""


@contextmanager
def open_executor(factory: Factory, resources: Resources) -> Iterator[Executor]:
    """One worker in this process, or Ray actors on a local or named cluster.

    Args:
        factory: makes a worker; picklable, and free of this process's working directory.
    """
    if resources.workers == 1 and resources.address is None:
        yield InProcess(factory())
    else:
        with _ray(factory, resources) as executor:
            yield executor


class InProcess:
    """One worker, here."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    def call(self, method: str) -> Any:
        """See `Executor`."""
        return getattr(self._worker, method)()

    def map(self, method: str, shared: Sequence[Any], tasks: Sequence[Any], reporter: Reporter) -> Iterator[Any]:
        """See `Executor`."""
        done = [0, 0]

        def progress(examples: int, tokens: int) -> None:
            done[0] += examples
            done[1] += tokens
            reporter.update(*done)

        for task in tasks:
            yield getattr(self._worker, method)(*shared, *task, progress=progress)


class _Actor:
    """Holds a worker, and tells a ledger how far its task is; a task that is redone overwrites what it told before."""

    def __init__(self, factory: Factory) -> None:
        self._factory = factory

    def where(self) -> str:
        import ray

        return ray.get_runtime_context().get_node_id()

    def start(self) -> None:
        self._worker = self._factory()

    def call(self, method: str) -> Any:
        return getattr(self._worker, method)()

    def run(self, method: str, ledger: Any, task: tuple[int, int], *args: Any) -> tuple[Any, tuple[int, int]]:
        """The method's result, and how many examples and tokens it took."""
        examples, tokens, told = 0, 0, 0.0

        def progress(more: int, more_tokens: int) -> None:
            nonlocal examples, tokens, told
            examples, tokens = examples + more, tokens + more_tokens
            if time.monotonic() - told > _POLL_SECONDS:
                told = time.monotonic()
                with suppress(Exception):  # that it cannot be told is not a failure
                    ledger.record.remote(task, (examples, tokens))

        return getattr(self._worker, method)(*args, progress=progress), (examples, tokens)


class _Ledger:
    """An actor that hears how far tasks are and tells what is new."""

    def __init__(self) -> None:
        self._news: dict[tuple[int, int], tuple[int, int]] = {}

    def record(self, task: tuple[int, int], done: tuple[int, int]) -> None:
        self._news[task] = done

    def news(self) -> dict[tuple[int, int], tuple[int, int]]:
        told, self._news = self._news, {}
        return told


class _Progress:
    """The driver's view of a ledger. It lives on the driver's node; that nothing is heard of it is no failure."""

    def __init__(self, ray: Any) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._ray, self._asked = ray, None
        self.ledger = ray.remote(_Ledger).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote()

    def news(self) -> dict[tuple[int, int], tuple[int, int]]:
        """What was told since it was last asked, if that has arrived."""
        with suppress(Exception):
            self._asked = self._asked or self.ledger.news.remote()
            if self._ray.wait([self._asked], timeout=0)[0]:
                asked, self._asked = self._asked, None
                return self._ray.get(asked)
        return {}


@dataclass
class _Slot:
    """A worker's place on the cluster: the actor there, and the one call that it has not answered yet.

    Attributes:
        step: what that call is, `place`, `start` or `work`; without a call, `idle`, or `empty` before there is a (new) actor.
        nodes: the node where the actor is; until that is known, the nodes that lived when it was asked for.
        since: when a new actor may be made, by the monotonic clock.
    """

    bundle: int
    step: str = "empty"
    actor: Any = None
    pending: Any = None
    task: int | None = None
    nodes: frozenset[str] = frozenset()
    since: float = 0.0

    def ask(self, step: str, pending: Any, task: int | None = None) -> None:
        self.step, self.pending, self.task = step, pending, task


@dataclass
class _Death:
    """An actor's, with its task, or None while it started. `proven` when another has started in its place, so the node had lived on."""

    slot: _Slot
    task: int | None
    nodes: frozenset[str]
    error: Exception
    proven: bool = False


class _OnRay:
    """Workers in a placement group, one to a bundle. Ray moves the bundles of nodes that died; who dies is replaced from here."""

    def __init__(self, ray: Any, factory: Factory, group: Any, bundle: Mapping[str, float]) -> None:
        self._ray, self._factory, self._group, self._bundle = ray, factory, group, bundle
        self._slots = [_Slot(number) for number in range(group.bundle_count)]
        self._progress = _Progress(ray)
        self._maps = 0

    def call(self, method: str) -> Any:
        """See `Executor`."""
        ((_, value),) = (found for round in self._work(1, (), lambda actor, *_: actor.call.remote(method)) for found in round)
        return value

    def map(self, method: str, shared: Sequence[Any], tasks: Sequence[Any], reporter: Reporter) -> Iterator[Any]:
        """See `Executor`."""
        self._maps += 1
        this, ledger = self._maps, self._progress.ledger
        results: dict[int, Any] = {}
        unfinished, done = set(range(len(tasks))), dict[int, tuple[int, int]]()
        next_result = 0

        def give(actor: Any, number: int, references: Sequence[Any]) -> Any:
            return actor.run.remote(method, ledger, (this, number), *references, *tasks[number])

        for found in self._work(len(tasks), shared, give):
            for number, (result, counted) in found:
                results[number], done[number] = result, counted
                unfinished.remove(number)
            done.update({number: told for (of, number), told in self._progress.news().items() if of == this and number in unfinished})
            reporter.update(sum(examples for examples, _ in done.values()), sum(tokens for _, tokens in done.values()))
            while next_result in results:
                yield results.pop(next_result)
                next_result += 1

    def _work(self, count: int, shared: Sequence[Any], give: Callable[..., Any]) -> Iterator[list[tuple[int, Any]]]:
        """Has tasks 0, 1, ... done: what each round of waiting finished, perhaps nothing.

        Args:
            shared: put into Ray's store, again if it is lost there.
            give: starts a task, given an actor, the task's number and references of what is shared.
        """
        from ray.exceptions import ObjectLostError, RayError, RayTaskError, UnserializableException

        for slot in self._slots:
            if slot.task is not None:  # of a map that was given up
                self._bury(slot)
        references = [self._ray.put(value) for value in shared]
        waiting, left = list(range(count)), count
        deaths: list[_Death] = []
        alone = 0.0
        while left:
            self._judge(deaths)
            self._replace()
            for slot in self._slots:
                number = self._next(waiting, deaths) if slot.step == "idle" else None
                if number is not None:
                    slot.ask("work", give(slot.actor, number, references), number)
            began, found = time.monotonic(), list[tuple[int, Any]]()
            for slot in self._answered():
                try:
                    value = self._ray.get(slot.pending)
                except UnserializableException as error:
                    raise WorkerError(f"a worker failed with {str(error).strip().splitlines()[-1].strip()}") from error
                except RayError as error:
                    cause = error.cause if isinstance(error, RayTaskError) else error
                    if isinstance(error, RayTaskError) and not isinstance(cause, ObjectLostError):
                        raise cause if isinstance(cause, Exception) else error from None
                    if isinstance(cause, ObjectLostError):
                        references = [self._ray.put(value) for value in shared]
                    if slot.task is not None:
                        heapq.heappush(waiting, slot.task)
                    deaths.append(_Death(slot, slot.task, slot.nodes, error))
                    self._bury(slot)
                else:
                    if slot.task is not None:
                        found.append((slot.task, value))
                        left -= 1
                    self._advance(slot, value, deaths)
            alone = 0.0 if any(slot.step in ("start", "work", "idle") for slot in self._slots) else alone + time.monotonic() - began
            if alone > _PLACE_SECONDS:
                raise WorkerError(
                    f"all workers are gone with their nodes, and for {_PLACE_SECONDS:.0f} s no node had {_amounts(self._bundle)} free for "
                    "one; what is finished is kept: run the same command again when there is one"
                ) from (deaths[-1].error if deaths else None)
            yield found

    def _answered(self) -> list[_Slot]:
        """Slots whose call has been answered, or failed; waits a little for one."""
        asked = {slot.pending: slot for slot in self._slots if slot.pending is not None}
        if not asked:
            time.sleep(_POLL_SECONDS)
            return []
        return [asked[pending] for pending in self._ray.wait(list(asked), timeout=_POLL_SECONDS)[0]]

    def _advance(self, slot: _Slot, value: Any, deaths: list[_Death]) -> None:
        if slot.step == "place":
            slot.nodes = frozenset([value])
            slot.ask("start", slot.actor.start.remote())
            return
        if slot.step == "start":
            deaths[:] = [death for death in deaths if death.slot is not slot or death.task is not None]
            for death in deaths:
                death.proven |= death.slot is slot
        slot.ask("idle", None)

    def _bury(self, slot: _Slot) -> None:
        """Give up the slot's actor, which is dead or out of reach."""
        with suppress(Exception):
            self._ray.kill(slot.actor)
        slot.since = time.monotonic() + (_PAUSE_SECONDS if slot.task is None else 0.0)
        slot.actor = None
        slot.ask("empty", None)

    def _replace(self) -> None:
        """Ask for actors where there are none. Ray holds one back until its bundle has a node again."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        for slot in self._slots:
            if slot.step == "empty" and time.monotonic() >= slot.since:
                slot.nodes = self._living()
                options = {
                    "num_cpus": self._bundle["CPU"],
                    "num_gpus": self._bundle.get("GPU", 0),
                    "max_restarts": 0,
                    "max_task_retries": 0,
                }
                strategy = PlacementGroupSchedulingStrategy(self._group, slot.bundle)
                slot.actor = self._ray.remote(_Actor).options(**options, scheduling_strategy=strategy).remote(self._factory)
                slot.ask("place", slot.actor.where.remote())

    def _living(self) -> frozenset[str]:
        return frozenset(node["NodeID"] for node in self._ray.nodes() if node["Alive"])

    def _judge(self, deaths: list[_Death]) -> None:
        """Forget deaths whose node is gone.

        Raises:
            WorkerError: a task ended too many workers on nodes that live, or a worker did not start as often.
        """
        if not deaths:
            return
        living = self._living()
        deaths[:] = [death for death in deaths if death.nodes <= living]
        for last in deaths:
            if last.task is None:
                count = sum(death.task is None and death.slot is last.slot for death in deaths)
            else:
                count = sum(death.task == last.task and death.proven for death in deaths)
            if count >= _DEATHS:
                raise WorkerError(
                    f"a worker died {_DEATHS} times (killed for memory?); what is finished is kept: run the same command with fewer "
                    "`workers` or a smaller `batch_tokens`"
                ) from last.error

    @staticmethod
    def _next(waiting: list[int], deaths: Sequence[_Death]) -> int | None:
        """The first task that waits; one with so many deaths that one more might end the work waits until they are explained."""
        held = []
        try:
            while waiting:
                number = heapq.heappop(waiting)
                if sum(death.task == number for death in deaths) < _DEATHS:
                    return number
                held.append(number)
            return None
        finally:
            for number in held:
                heapq.heappush(waiting, number)


def _knock(address: str) -> None:
    """Refuse an address where nobody listens at once; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=_KNOCK_SECONDS).close()
        except OSError as error:
            raise NotFoundError(
                f"the Ray cluster at {address} cannot be reached: {error.strerror or error}; see ray status there"
            ) from error


def gpus_of_each(nodes: Sequence[float], wanted: Resources) -> float:
    """How many GPUs each worker gets of nodes with so many.

    One or an equal share of one; a worker that spreads its model (--device map) as many as every worker can have on one node.

    Raises:
        UsageError: there are fewer GPUs than workers that want several.
    """
    if wanted.device == "cpu" or not sum(nodes):
        return 0
    if wanted.device != "map":
        return 1 / math.ceil(wanted.workers / sum(nodes))  # what divides a GPU without rest: workers are not spread over two
    for each in range(int(max(nodes)), 0, -1):
        if sum(int(node) // each for node in nodes) >= wanted.workers:
            return each
    raise UsageError(
        f"{wanted.workers} workers of `device` map need a GPU each at least, the cluster has {sum(nodes):.0f}; use fewer `workers`"
    )


@contextmanager
def _ray(factory: Factory, wanted: Resources) -> Iterator[_OnRay]:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # local clusters would otherwise leave a token in the home directory
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # Ray's own reports of every death, on standard output
    import logging

    import ray

    variables = dict(_ALLOCATOR)
    if wanted.own_code:
        variables["PYTHONPATH"] = os.pathsep.join(p for p in (os.getcwd(), os.environ.get("PYTHONPATH")) if p)
    local = wanted.address is None
    if wanted.address is not None:
        _knock(wanted.address)
    try:
        ray.init(
            address="local" if local else wanted.address,
            num_cpus=wanted.workers * wanted.threads if local else None,
            include_dashboard=False if local else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": variables},
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = "a local Ray" if local else f"the Ray cluster at {wanted.address}"
        raise NotFoundError(f"{where} cannot be reached: {str(error).splitlines()[0]}") from error
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = gpus_of_each([node.get("GPU", 0.0) for node in nodes], wanted)
        bundle = {"CPU": float(wanted.threads)} | ({"GPU": gpus} if gpus else {})
        room = sum(min(int(node.get(name, 0) / amount + 1e-6) for name, amount in bundle.items()) for node in nodes)
        if room < wanted.workers:
            cpus, each = sum(node.get("CPU", 0) for node in nodes), "; ".join(map(_amounts, nodes))
            raise UsageError(
                f"the Ray cluster has {cpus:.0f} CPUs, {wanted.workers} workers of {wanted.threads} threads need {_amounts(bundle)} each "
                f"on one node, and its nodes ({each}) have room for {room}; ask for fewer `workers` or `threads`"
            )
        yield _OnRay(ray, factory, _placed(ray, bundle, wanted), bundle)
    except ConnectionError as error:
        raise WorkerError("the Ray cluster went away; what is finished is kept: run the same command again when it is back") from error
    finally:
        ray.shutdown()


def _amounts(resources: Mapping[str, float]) -> str:
    gpus = resources.get("GPU", 0)
    return f"{resources.get('CPU', 0):g} CPUs" + (f" and {gpus:.3g} GPUs" if gpus else "")


def _placed(ray: Any, bundle: Mapping[str, float], wanted: Resources) -> Any:
    """A placement group with a bundle for each worker.

    Raises:
        BusyError: others hold what it needs, for longer than is waited.
    """
    group = ray.util.placement_group([dict(bundle)] * wanted.workers, strategy="PACK")
    deadline = time.monotonic() + _PLACE_SECONDS
    while not group.wait(_POLL_SECONDS):  # in short waits, which an interruption ends
        if time.monotonic() > deadline:
            free, whole = _amounts(ray.available_resources()), _amounts(ray.cluster_resources())
            raise BusyError(
                f"{wanted.workers} workers wait for {_amounts(bundle)} each on one node; the Ray cluster has {free} free now of {whole}, "
                "other jobs hold the rest; run the same command again when they are done, or with fewer `workers`"
            )
    return group
