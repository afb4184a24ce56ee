"""Where tasks run: in this process, or on Ray actors. Both give results in the tasks' order and report progress as it is made.

A Ray actor that dies is started anew (it loads the model again) and its task is given again, three times; tasks are functions of their
arguments, so nothing else has to be undone.
"""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

from ..store.errors import NotFoundError, UsageError, WorkerError
from .config import BuildConfig
from .progress import Reporter
from .worker import Worker, absolute

_RESTARTS = 3
_POLL_SECONDS = 0.5
_KNOCK_SECONDS = 5
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}


class Executor(Protocol):
    """Runs a worker's methods."""

    def describe(self) -> Any:
        """`Worker.describe` on one worker."""

    def map(self, method: str, shared: Sequence[Any], tasks: Sequence[Any], reporter: Reporter) -> Iterator[Any]:
        """`method(*shared, *task)` for every task, on any worker; yields the results in the tasks' order, as they come."""


@contextmanager
def open_executor(config: BuildConfig) -> Iterator[Executor]:
    """One worker in this process, or `config.workers` Ray actors on a local or named cluster."""
    if config.workers == 1 and config.address is None:
        yield InProcess(config)
    else:
        with _ray(config) as executor:
            yield executor


class InProcess:
    """One worker, here."""

    def __init__(self, config: BuildConfig) -> None:
        self._worker = Worker(config)

    def describe(self) -> Any:
        """See `Executor`."""
        return self._worker.describe()

    def map(self, method: str, shared: Sequence[Any], tasks: Sequence[Any], reporter: Reporter) -> Iterator[Any]:
        """See `Executor`."""
        done = [0, 0]

        def progress(examples: int, tokens: int) -> None:
            done[0] += examples
            done[1] += tokens
            reporter.update(*done)

        for task in tasks:
            yield getattr(self._worker, method)(*shared, *task, progress=progress)


class _Actor(Worker):
    """A worker that tells a ledger how far its task is; a task that is redone overwrites what it told before."""

    def run(self, method: str, ledger: Any, task: int, *args: Any) -> Any:
        done = [0, 0]

        def progress(examples: int, tokens: int) -> None:
            done[0] += examples
            done[1] += tokens
            ledger.record.remote(task, *done)

        return getattr(self, method)(*args, progress=progress)


class _Ledger:
    """Progress of all tasks."""

    def __init__(self) -> None:
        self._tasks: dict[int, tuple[int, int]] = {}

    def record(self, task: int, examples: int, tokens: int) -> None:
        self._tasks[task] = (examples, tokens)

    def total(self) -> tuple[int, int]:
        return sum(e for e, _ in self._tasks.values()), sum(t for _, t in self._tasks.values())


class _OnRay:
    def __init__(self, ray: Any, config: BuildConfig, gpus: float) -> None:
        self._ray = ray
        options = {"num_cpus": config.threads, "num_gpus": gpus, "max_restarts": _RESTARTS, "max_task_retries": _RESTARTS}
        config = replace(config, model=absolute(config.model), out=absolute(config.out))  # an actor's working directory is its own
        self._actors = [ray.remote(_Actor).options(**options).remote(config) for _ in range(config.workers)]

    def describe(self) -> Any:
        return self._get(self._actors[0].describe.remote())

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


@contextmanager
def _ray(config: BuildConfig) -> Iterator[_OnRay]:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # local clusters would otherwise leave a token in the home directory
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import logging

    import ray

    local = config.address is None
    if config.address is not None:
        _knock(config.address)
    try:
        ray.init(
            address="local" if local else config.address,
            num_cpus=config.workers * config.threads if local else None,
            include_dashboard=False if local else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": _ALLOCATOR},
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = "a local Ray" if local else f"the Ray cluster at {config.address}"
        raise NotFoundError(f"{where} cannot be reached: {str(error).splitlines()[0]}") from error
    try:
        resources = ray.cluster_resources()
        if resources.get("CPU", 0) < config.workers * config.threads:
            raise UsageError(
                f"the Ray cluster has {resources.get('CPU', 0):.0f} CPUs, {config.workers} workers of {config.threads} threads need "
                f"{config.workers * config.threads}; ask for fewer --workers"
            )
        on_gpu = config.device != "cpu" and resources.get("GPU", 0) > 0
        yield _OnRay(ray, config, min(1.0, resources["GPU"] / config.workers) if on_gpu else 0)
    finally:
        ray.shutdown()
