"""Execution of tasks in this process or on Ray actors. Results come in the order of the tasks, with reports of progress.

A factory creates one worker in each process, and a task is a call of one of the worker's methods. The result of a task depends only on its
arguments, so when a Ray actor dies, its task is run again on another one. A death together with the actor's node is not counted. The work
fails when a task has ended four workers on nodes that are alive.
"""

import heapq
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from ..indexer.devices import SPREAD, TENSOR_PARALLEL, cooperating
from ..store.errors import BusyError, UsageError, WorkerError
from .cluster import amounts, connected, node_resources, room
from .progress import Reporter

_DEATHS = 4
_POLL_SECONDS = 0.5
_PLACE_SECONDS = 120.0  # longest wait for free CPUs and GPUs on the cluster
_PAUSE_SECONDS = 5.0  # before a worker that died while it started is started again
_LARGEST_COUNT = 1024

Factory = Callable[[], Any]


@dataclass(frozen=True)
class Resources:
    """Number and placement of workers.

    Attributes:
        threads: of each worker.
        address: of a Ray cluster; None is a local Ray.
        own_code: workers import the user's modules from the working directory.
    """

    workers: int = 1
    threads: int = 1
    address: str | None = None
    device: str = "auto"
    own_code: bool = False

    def __post_init__(self) -> None:
        for name in ("workers", "threads"):
            if not 1 <= getattr(self, name) <= _LARGEST_COUNT:
                raise UsageError(f"`{name}` is {getattr(self, name)}; it must be from 1 to {_LARGEST_COUNT}")


@runtime_checkable
class Executor(Protocol):
    """Interface of both executors."""

    def call(self, method: str) -> Any:
        """Call a method of one worker, without arguments."""

    def map(self, method: str, shared: Sequence[Any], tasks: Sequence[Any], reporter: Reporter) -> Iterator[Any]:
        """Call `method(*shared, *task)` for every task, on any worker; yield the results in the order of the tasks."""


@contextmanager
def open_executor(factory: Factory, resources: Resources) -> Iterator[Executor]:
    """Open one worker in this process, or Ray actors on a local or named cluster.

    Args:
        factory: creates a worker; it must be picklable and must not depend on the working directory of this process.
    """
    if resources.workers == 1 and resources.address is None:
        yield InProcess(factory())
    else:
        with _open_ray(factory, resources) as executor:
            yield executor


class InProcess:
    """One worker in this process."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    def call(self, method: str) -> Any:
        """See `Executor`."""
        return getattr(self._worker, method)()

    def map(self, method: str, shared: Sequence[Any], tasks: Sequence[Any], reporter: Reporter) -> Iterator[Any]:
        """See `Executor`."""
        totals = [0, 0]

        def progress(examples: int, tokens: int) -> None:
            totals[0] += examples
            totals[1] += tokens
            reporter.update(*totals)

        for task in tasks:
            yield getattr(self._worker, method)(*shared, *task, progress=progress)


class _Actor:
    """A worker in a Ray actor. Records the progress of its task in a ledger; a task that is run again overwrites its earlier record."""

    def __init__(self, factory: Factory) -> None:
        self._factory = factory

    def node_id(self) -> str:
        import ray

        return ray.get_runtime_context().get_node_id()

    def start(self) -> None:
        self._worker = self._factory()

    def call(self, method: str) -> Any:
        return getattr(self._worker, method)()

    def run(self, method: str, ledger: Any, task: tuple[int, int], *args: Any) -> tuple[Any, tuple[int, int]]:
        """Run a task; return its result and its numbers of examples and tokens."""
        examples = 0
        tokens = 0
        last_record = 0.0

        def progress(more_examples: int, more_tokens: int) -> None:
            nonlocal examples, tokens, last_record
            examples += more_examples
            tokens += more_tokens
            if time.monotonic() - last_record > _POLL_SECONDS:
                last_record = time.monotonic()
                with suppress(Exception):  # a lost record of progress is not a failure
                    ledger.record.remote(task, (examples, tokens))

        return getattr(self._worker, method)(*args, progress=progress), (examples, tokens)


class _Ledger:
    """A Ray actor that collects the progress of tasks."""

    def __init__(self) -> None:
        self._counts: dict[tuple[int, int], tuple[int, int]] = {}

    def record(self, task: tuple[int, int], counts: tuple[int, int]) -> None:
        self._counts[task] = counts

    def new_counts(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Return and remove what was recorded since the last call."""
        counts = self._counts
        self._counts = {}
        return counts


class _LedgerReader:
    """The driver's access to a ledger on the driver's node. A ledger that does not answer is not a failure."""

    def __init__(self, ray: Any) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        strategy = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._ray = ray
        self._pending: Any = None
        self.ledger = ray.remote(_Ledger).options(num_cpus=0, max_restarts=-1, scheduling_strategy=strategy).remote()

    def new_counts(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Return the counts of examples and tokens that arrived since the last call, by map and task."""
        with suppress(Exception):
            self._pending = self._pending or self.ledger.new_counts.remote()
            if self._ray.wait([self._pending], timeout=0)[0]:
                pending = self._pending
                self._pending = None
                return self._ray.get(pending)
        return {}


@dataclass
class _Slot:
    """A bundle of the placement group, with its actor and the actor's pending call.

    Attributes:
        step: `place`, `start` or `work` while such a call is pending; `idle` without a call; `empty` without an actor.
        nodes: the actor's node; until that is known, all nodes that were alive when the actor was created.
        earliest: time of the monotonic clock before which no new actor is created.
    """

    bundle: int
    step: str = "empty"
    actor: Any = None
    pending: Any = None
    task: int | None = None
    nodes: frozenset[str] = frozenset()
    earliest: float = 0.0

    def set_step(self, step: str, pending: Any = None, task: int | None = None) -> None:
        self.step = step
        self.pending = pending
        self.task = task


@dataclass
class _Death:
    """The death of an actor.

    Attributes:
        task: the actor's task; None if the actor died while it started.
        proven: another actor has started in the slot since, so the node did not die.
    """

    slot: _Slot
    task: int | None
    nodes: frozenset[str]
    error: Exception
    proven: bool = False


class _RayExecutor:
    """Workers in a placement group, one in each bundle. Ray moves the bundles of dead nodes; this class replaces dead actors."""

    def __init__(self, ray: Any, factory: Factory, group: Any, bundle: Mapping[str, float]) -> None:
        self._ray = ray
        self._factory = factory
        self._group = group
        self._bundle = bundle
        self._slots = [_Slot(number) for number in range(group.bundle_count)]
        self._progress = _LedgerReader(ray)
        self._maps = 0

    def call(self, method: str) -> Any:
        """See `Executor`."""
        ((_, value),) = (result for results in self._work(1, (), lambda actor, *_: actor.call.remote(method)) for result in results)
        return value

    def map(self, method: str, shared: Sequence[Any], tasks: Sequence[Any], reporter: Reporter) -> Iterator[Any]:
        """See `Executor`."""
        self._maps += 1
        map_number = self._maps
        ledger = self._progress.ledger
        results: dict[int, Any] = {}
        counts: dict[int, tuple[int, int]] = {}
        unfinished = set(range(len(tasks)))
        next_result = 0

        def start_task(actor: Any, number: int, references: Sequence[Any]) -> Any:
            return actor.run.remote(method, ledger, (map_number, number), *references, *tasks[number])

        for finished in self._work(len(tasks), shared, start_task):
            for number, (result, final_counts) in finished:
                results[number] = result
                counts[number] = final_counts
                unfinished.remove(number)
            for (counted_map, number), new_counts in self._progress.new_counts().items():
                if counted_map == map_number and number in unfinished:
                    counts[number] = new_counts
            reporter.update(sum(examples for examples, _ in counts.values()), sum(tokens for _, tokens in counts.values()))
            while next_result in results:
                yield results.pop(next_result)
                next_result += 1

    def _work(self, count: int, shared: Sequence[Any], start_task: Callable[..., Any]) -> Iterator[list[tuple[int, Any]]]:
        """Run tasks 0 to `count - 1`; after each wait, yield the finished tasks with their results, if any.

        Args:
            shared: values to put into Ray's store, again if they are lost there.
            start_task: starts a task, given an actor, the task's number and the references of the shared values.
        """
        from ray.exceptions import ObjectLostError, RayError, RayTaskError, UnserializableException

        for slot in self._slots:
            if slot.task is not None:  # of an earlier map that was not read to its end
                self._discard_actor(slot)
        references = [self._ray.put(value) for value in shared]
        waiting = list(range(count))
        remaining = count
        deaths: list[_Death] = []
        seconds_without_worker = 0.0
        while remaining:
            self._check_deaths(deaths)
            self._create_actors()
            for slot in self._slots:
                number = self._next_task(waiting, deaths) if slot.step == "idle" else None
                if number is not None:
                    slot.set_step("work", start_task(slot.actor, number, references), number)
            started = time.monotonic()
            finished: list[tuple[int, Any]] = []
            for slot in self._wait_for_calls():
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
                    self._discard_actor(slot)
                else:
                    if slot.task is not None:
                        finished.append((slot.task, value))
                        remaining -= 1
                    self._advance(slot, value, deaths)
            if any(slot.step in ("start", "work", "idle") for slot in self._slots):
                seconds_without_worker = 0.0
            else:
                seconds_without_worker += time.monotonic() - started
            if seconds_without_worker > _PLACE_SECONDS:
                raise WorkerError(
                    f"all workers are gone with their nodes, and for {_PLACE_SECONDS:.0f} s no node had {amounts(self._bundle)} free for "
                    "one; what is finished is kept: run the same command again when there is one"
                ) from (deaths[-1].error if deaths else None)
            yield finished

    def _wait_for_calls(self) -> list[_Slot]:
        """Wait briefly; return the slots whose call has returned or failed."""
        slots = {slot.pending: slot for slot in self._slots if slot.pending is not None}
        if not slots:
            time.sleep(_POLL_SECONDS)
            return []
        return [slots[pending] for pending in self._ray.wait(list(slots), timeout=_POLL_SECONDS)[0]]

    def _advance(self, slot: _Slot, value: Any, deaths: list[_Death]) -> None:
        """Move a slot to the step that follows its call, given the value of the call."""
        if slot.step == "place":
            slot.nodes = frozenset([value])
            slot.set_step("start", slot.actor.start.remote())
            return
        if slot.step == "start":
            deaths[:] = [death for death in deaths if death.slot is not slot or death.task is not None]
            for death in deaths:
                death.proven |= death.slot is slot
        slot.set_step("idle")

    def _discard_actor(self, slot: _Slot) -> None:
        """Kill the actor of a slot, which is dead, unreachable or busy with an abandoned task."""
        with suppress(Exception):
            self._ray.kill(slot.actor)
        slot.earliest = time.monotonic() + (_PAUSE_SECONDS if slot.task is None else 0.0)
        slot.actor = None
        slot.set_step("empty")

    def _create_actors(self) -> None:
        """Create actors in empty slots. Ray holds an actor back until its bundle has a node."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        for slot in self._slots:
            if slot.step == "empty" and time.monotonic() >= slot.earliest:
                slot.nodes = self._alive_nodes()
                actor_class = self._ray.remote(_Actor).options(
                    num_cpus=self._bundle["CPU"],
                    num_gpus=self._bundle.get("GPU", 0),
                    max_restarts=0,
                    max_task_retries=0,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, slot.bundle),
                )
                slot.actor = actor_class.remote(self._factory)
                slot.set_step("place", slot.actor.node_id.remote())

    def _alive_nodes(self) -> frozenset[str]:
        return frozenset(node["NodeID"] for node in self._ray.nodes() if node["Alive"])

    def _check_deaths(self, deaths: list[_Death]) -> None:
        """Remove deaths whose node is dead too, and check the number of the others.

        No task may end `_DEATHS` workers on nodes that are alive, and no worker may die as often while it starts.
        """
        if not deaths:
            return
        alive = self._alive_nodes()
        deaths[:] = [death for death in deaths if death.nodes <= alive]
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
    def _next_task(waiting: list[int], deaths: Sequence[_Death]) -> int | None:
        """Remove and return the first waiting task, if any. Tasks with `_DEATHS` deaths wait until these are proven or removed."""
        skipped = []
        try:
            while waiting:
                number = heapq.heappop(waiting)
                if sum(death.task == number for death in deaths) < _DEATHS:
                    return number
                skipped.append(number)
            return None
        finally:
            for number in skipped:
                heapq.heappush(waiting, number)


def gpus_of_each(nodes: Sequence[float], resources: Resources) -> float:
    """Compute the number of GPUs for each worker: one, or an equal share of one.

    With the devices "map" and "tp", a worker has its model on as many GPUs of a node as every worker can have; with "tp:N" on N.

    Args:
        nodes: the number of GPUs of each node.

    Raises:
        UsageError: the device is "map" or "tp", and there are fewer GPUs than workers.
    """
    if resources.device == "cpu" or not sum(nodes):
        return 0
    if resources.device.startswith(f"{TENSOR_PARALLEL}:"):
        return cooperating(resources.device)
    if resources.device not in (SPREAD, TENSOR_PARALLEL):
        return 1 / math.ceil(resources.workers / sum(nodes))  # an integer number of workers shares a GPU: none is spread over two
    for gpus in range(int(max(nodes)), 0, -1):
        if sum(int(node) // gpus for node in nodes) >= resources.workers:
            return gpus
    raise UsageError(
        f"{resources.workers} workers of `device` {resources.device} need a GPU each at least, the cluster has {sum(nodes):.0f}; use fewer "
        "`workers`"
    )


@contextmanager
def _open_ray(factory: Factory, resources: Resources) -> Iterator[_RayExecutor]:
    """Connect to Ray and open an executor on it."""
    cpus = resources.workers * resources.threads * cooperating(resources.device)
    with connected(resources.address, cpus, resources.own_code) as ray:
        nodes = node_resources(ray)
        gpus = gpus_of_each([node.get("GPU", 0.0) for node in nodes], resources)
        bundle = {"CPU": float(resources.threads * cooperating(resources.device))} | ({"GPU": gpus} if gpus else {})
        capacity = room(nodes, bundle)
        if capacity < resources.workers:
            own_cpus = sum(node.get("CPU", 0.0) for node in nodes)
            raise UsageError(
                f"the Ray cluster has {own_cpus:.0f} CPUs, {resources.workers} workers of {resources.threads} threads need "
                f"{amounts(bundle)} each on one node, and its nodes ({'; '.join(map(amounts, nodes))}) have room for {capacity}; ask for "
                "fewer `workers` or `threads`"
            )
        try:
            yield _RayExecutor(ray, factory, _placement_group(ray, bundle, resources.workers), bundle)
        except ConnectionError as error:
            raise WorkerError(
                "the connection to the Ray cluster was lost; what is finished is kept: run the same command again when it is back"
            ) from error


def _placement_group(ray: Any, bundle: Mapping[str, float], workers: int) -> Any:
    """Create a placement group with a bundle for each worker; wait `_PLACE_SECONDS` at most for CPUs and GPUs that other jobs hold."""
    group = ray.util.placement_group([dict(bundle)] * workers, strategy="PACK")
    deadline = time.monotonic() + _PLACE_SECONDS
    while not group.wait(_POLL_SECONDS):  # in short waits, so that it can be interrupted
        if time.monotonic() > deadline:
            raise BusyError(
                f"{workers} workers wait for {amounts(bundle)} each on one node; the Ray cluster has "
                f"{amounts(ray.available_resources())} free now of {amounts(ray.cluster_resources())}, other jobs hold the rest; run the "
                "same command again when they are done, or with fewer `workers`"
            )
    return group
