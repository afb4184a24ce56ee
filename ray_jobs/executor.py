"""Where tasks run: in this process, or on Ray actors. Both give results in the tasks' order and report progress as it is made.

A worker is whatever a factory makes, once in each process; a task is a method of it with its arguments. A Ray actor that dies is started
anew and its task is given again, three times; tasks are functions of their arguments, so nothing else has to be undone.
"""

import math
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from ..store.errors import NotFoundError, UsageError, WorkerError
from .progress import Reporter

_RESTARTS = 3
_POLL_SECONDS = 0.5
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
        self._worker = factory()

    def call(self, method: str) -> Any:
        return getattr(self._worker, method)()

    def run(self, method: str, ledger: Any, task: int, *args: Any) -> Any:
        done = [0, 0]

        def progress(examples: int, tokens: int) -> None:
            done[0] += examples
            done[1] += tokens
            ledger.record.remote(task, *done)

        return getattr(self._worker, method)(*args, progress=progress)


class _Ledger:
    """Progress of all tasks."""

    def __init__(self) -> None:
        self._tasks: dict[int, tuple[int, int]] = {}

    def record(self, task: int, examples: int, tokens: int) -> None:
        self._tasks[task] = (examples, tokens)

    def total(self) -> tuple[int, int]:
        return sum(e for e, _ in self._tasks.values()), sum(t for _, t in self._tasks.values())


class _OnRay:
    def __init__(self, ray: Any, factory: Factory, resources: Resources, gpus: float) -> None:
        self._ray = ray
        options = {"num_cpus": resources.threads, "num_gpus": gpus, "max_restarts": _RESTARTS, "max_task_retries": _RESTARTS}
        self._actors = [ray.remote(_Actor).options(**options).remote(factory) for _ in range(resources.workers)]

    def call(self, method: str) -> Any:
        return self._get(self._actors[0].call.remote(method))

    def map(self, method: str, shared: Sequence[Any], tasks: Sequence[Any], reporter: Reporter) -> Iterator[Any]:
        ray = self._ray
        ledger = ray.remote(_Ledger).options(num_cpus=0).remote()
        references = [ray.put(value) for value in shared]
        waiting = iter(enumerate(tasks))
        results: dict[int, Any] = {}
        next_result = 0
        running: dict[Any, tuple[int, Any]] = {}

        def give(actor: Any) -> None:
            for number, task in waiting:
                running[actor.run.remote(method, ledger, number, *references, *task)] = (number, actor)
                return

        for actor in self._actors:
            give(actor)
        while running:
            finished, _ = ray.wait(list(running), timeout=_POLL_SECONDS)
            for future in finished:
                number, actor = running.pop(future)
                results[number] = self._get(future)
                give(actor)
            reporter.update(*ray.get(ledger.total.remote()))
            while next_result in results:
                yield results.pop(next_result)
                next_result += 1
        ray.kill(ledger)

    def _get(self, future: Any) -> Any:
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return self._ray.get(future)
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except RayActorError as error:
            raise WorkerError(
                f"a worker died {_RESTARTS + 1} times (killed for memory?); what is finished is kept: run the same command with fewer "
                "--workers or a smaller --batch-tokens"
            ) from error


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
        f"{wanted.workers} workers of --device map need a GPU each at least, the cluster has {sum(nodes):.0f}; use fewer --workers"
    )


@contextmanager
def _ray(factory: Factory, wanted: Resources) -> Iterator[_OnRay]:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # local clusters would otherwise leave a token in the home directory
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
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
        resources = ray.cluster_resources()
        nodes = [node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]]
        if resources.get("CPU", 0) < wanted.workers * wanted.threads:
            raise UsageError(
                f"the Ray cluster has {resources.get('CPU', 0):.0f} CPUs, {wanted.workers} workers of {wanted.threads} threads need "
                f"{wanted.workers * wanted.threads}; ask for fewer --workers"
            )
        yield _OnRay(ray, factory, wanted, gpus_of_each(nodes, wanted))
    finally:
        ray.shutdown()
