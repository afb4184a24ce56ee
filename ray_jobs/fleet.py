"""The parts of an index in Ray actors, on one or several machines: `wherefrom serve --ray`.

Every part has replicas, each an actor. A call goes to the replica of the part that has the fewest calls at the time. All calls are reads,
so that one which is lost with its actor is given to another replica. An actor that dies is started again, where Ray finds room for it;
until then its part has one replica less, and a part without a replica is waited for, or left out where the caller says so.

A call names the state of the index (its manifest) that it is meant for, and an actor opens the states that it is asked for. So all parts of
one answer are of the same state, while others may already be asked for a newer one.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..query.parts import Part, Search
from ..query.scoring import Scorer
from ..store.errors import BusyError, IntegrityError, UsageError
from ..store.index import Index, ShardGroup
from ..store.shapes import Float32
from .cluster import amounts, connected, node_resources, room

_POLL_SECONDS = 0.2
_WATCH_SECONDS = 1.0
_WAIT_SECONDS = 60.0  # for a part without a replica
_START_SECONDS = 120.0
_PAUSE_SECONDS = 2.0  # before an actor that died while it started is started again
_CALLS = 4  # of an actor at the same time
_STATES = 2  # of the index that an actor keeps open
_AHEAD = 4  # groups whose scores an actor computes before they are taken

State = tuple[int, str]
"""The number of a manifest and the index's checksum."""


def split_groups(groups: Sequence[ShardGroup], parts: int) -> list[range]:
    """Return the numbers of the groups of each part: consecutive, about the same number of rows; no part is empty."""
    parts = min(parts, len(groups))
    ends = np.cumsum([group.rows for group in groups])
    bounds = [0]
    for part in range(1, parts):
        bound = int(np.searchsorted(ends, ends[-1] * part / parts)) + 1
        bounds.append(min(max(bound, bounds[-1] + 1), len(groups) - (parts - part)))
    return [range(first, last) for first, last in zip(bounds, [*bounds[1:], len(groups)], strict=True)]


class _Actor:
    """One replica of a part, in a Ray actor."""

    def __init__(self, path: str, number: int, parts: int, threads: int) -> None:
        self._path = path
        self._number = number
        self._parts = parts
        self._threads = threads
        self._lock = threading.Lock()
        self._states: OrderedDict[State, Part | None] = OrderedDict()

    def ping(self) -> None:
        """Return when the actor runs, with its compiled loops."""
        from ..store import kernels  # noqa: F401

    def open(self, state: State) -> None:
        """Open a state of the index, before it is asked for."""
        self._open(state)

    def call(self, state: State, method: str, search: Search | None, *arguments: Any) -> Any:
        """Call a method of the part."""
        shared = () if search is None else (search,)
        return getattr(self._part(state), method)(*shared, *arguments)

    def stream(self, state: State, search: Search, skipped: int) -> Iterator[Float32[np.ndarray, "queries rows"]]:
        """See `Part.scores`."""
        yield from self._part(state).scores(search, skipped)

    def _part(self, state: State) -> Part:
        part = self._open(state)
        if part is None:
            raise IntegrityError(f"{self._path} has no rows in part {self._number}; start the server again")
        return part

    def _open(self, state: State) -> Part | None:
        with self._lock:
            if state not in self._states:
                index = Index(self._path, state[0])
                if index.checksum != state[1]:
                    raise IntegrityError(
                        f"{self._path} is another index here than where it is served, or was replaced; give the same one to all machines"
                    )
                groups = split_groups(index.groups, self._parts)
                self._states[state] = Part(index, groups[self._number], self._threads) if self._number < len(groups) else None
                while len(self._states) > _STATES:
                    self._states.popitem(last=False)
            self._states.move_to_end(state)
            return self._states[state]


@dataclass
class _Replica:
    """An actor, and what is known of it.

    Attributes:
        handle: of the actor; None before it is started again.
        started: a reference that is ready when the actor has opened the index.
        is_up: the actor runs, as far as is known.
        pinged: a reference to the pending answer to a ping.
        calls: number of pending calls.
        problem: the error of its last start, such as an index that cannot be read on its node.
        earliest: time of the monotonic clock before which it is not started again.
    """

    part: int
    handle: Any = None
    started: Any = None
    is_up: bool = False
    pinged: Any = None
    calls: int = 0
    earliest: float = 0.0
    problem: str = ""


class Fleet:
    """The actors of all parts of an index.

    Args:
        index: which every node can read at its path.
        parts, replicas: numbers of parts, and of the actors of each.
        threads: of each actor, and CPUs that it takes.
    """

    def __init__(self, ray: Any, index: Index, parts: int, replicas: int, threads: int) -> None:
        self.parts = parts
        self.state: State = index.manifest.number, index.checksum
        self._ray = ray
        self._path = str(index.path.resolve())
        self._threads = threads
        self._lock = threading.RLock()
        self._replicas = [[self._start(_Replica(part)) for _ in range(replicas)] for part in range(parts)]
        self._stopped = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="wherefrom-fleet", daemon=True)
        self._watcher.start()

    def stop(self) -> None:
        """Stop watching; the actors end with the connection to Ray."""
        self._stopped.set()
        self._watcher.join()

    def up(self) -> list[int]:
        """Return for each part the number of its replicas that run."""
        with self._lock:
            return [sum(replica.is_up for replica in replicas) for replicas in self._replicas]

    def wait(self, seconds: float = _START_SECONDS) -> None:
        """Wait until every part has a replica.

        Raises:
            BusyError: it takes longer.
        """
        deadline = time.monotonic() + seconds
        while not all(self.up()):
            if time.monotonic() > deadline:
                raise BusyError(self._no_room(self.up().index(0)))
            time.sleep(_POLL_SECONDS)

    def restart(self) -> None:
        """Replace every actor by a new one, one after the other; parts with several replicas are there all the time."""
        for replicas in self._replicas:
            for replica in replicas:
                self._lose(replica, replica.handle)
                deadline = time.monotonic() + _START_SECONDS
                while not replica.is_up and time.monotonic() < deadline:
                    time.sleep(_POLL_SECONDS)

    def call(
        self, state: State, method: str, search: Search | None, arguments: Mapping[int, tuple[Any, ...]], partial: bool
    ) -> dict[int, Any]:
        """Call a method of some parts; see `Parts.call`.

        Raises:
            BusyError: a part has had no replica for a minute.
            WherefromError: as the method does.
        """
        shared = search if search is None or len(arguments) < 2 else self._ray.put(search)
        waiting = dict(arguments)
        pending: dict[Any, _Replica] = {}
        results: dict[int, Any] = {}
        deadline = time.monotonic() + _WAIT_SECONDS
        try:
            while waiting or pending:
                for number in list(waiting):
                    replica = self._take(number)
                    if replica is not None:
                        pending[replica.handle.call.remote(state, method, shared, *waiting.pop(number))] = replica
                        deadline = time.monotonic() + _WAIT_SECONDS
                    elif partial:
                        del waiting[number]
                    elif time.monotonic() > deadline:
                        raise BusyError(self._no_room(number))
                if not pending:
                    time.sleep(_POLL_SECONDS if waiting else 0)
                    continue
                for reference in self._ray.wait(list(pending), timeout=_POLL_SECONDS if waiting else None)[0]:
                    replica = pending.pop(reference)
                    handle = replica.handle
                    self._give_back(replica)
                    try:
                        results[replica.part] = self._result(reference)
                    except _LostError:
                        self._lose(replica, handle)
                        waiting[replica.part] = arguments[replica.part]
        finally:
            for replica in pending.values():
                self._give_back(replica)
        return {number: results[number] for number in sorted(results)}

    def stream(self, state: State, number: int, search: Search) -> Iterator[Float32[np.ndarray, "queries rows"]]:
        """Yield the scores of each group of a part; see `Part.scores`."""
        skipped = 0
        deadline = time.monotonic() + _WAIT_SECONDS
        while True:
            replica = self._take(number)
            if replica is None:
                if time.monotonic() > deadline:
                    raise BusyError(self._no_room(number))
                time.sleep(_POLL_SECONDS)
                continue
            handle = replica.handle
            options = {"num_returns": "streaming", "_generator_backpressure_num_objects": _AHEAD}
            try:
                for reference in handle.stream.options(**options).remote(state, search, skipped):
                    yield self._result(reference)
                    skipped += 1
                    deadline = time.monotonic() + _WAIT_SECONDS
            except _LostError:
                self._lose(replica, handle)
            except self._ray.exceptions.RayError:
                self._lose(replica, handle)
            else:
                return
            finally:
                self._give_back(replica)

    def _result(self, reference: Any) -> Any:
        """Return the result of a call, or raise its error; raise a `_LostError` if it was lost with its actor or node."""
        exceptions = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, exceptions.ObjectLostError):
                raise _LostError from error
            raise cause if isinstance(cause, Exception) else error from None
        except exceptions.RayError as error:
            raise _LostError from error

    def _take(self, number: int) -> _Replica | None:
        """Return the replica of a part that runs and has the fewest calls, and count one more; None if none runs."""
        with self._lock:
            running = [replica for replica in self._replicas[number] if replica.is_up]
            if not running:
                return None
            replica = min(running, key=lambda replica: replica.calls)
            replica.calls += 1
            return replica

    def _give_back(self, replica: _Replica) -> None:
        with self._lock:
            replica.calls = max(0, replica.calls - 1)

    def _start(self, replica: _Replica) -> _Replica:
        """Start the actor of a replica."""
        actor = self._ray.remote(_Actor).options(
            num_cpus=self._threads, max_restarts=0, max_task_retries=0, max_concurrency=_CALLS, scheduling_strategy="SPREAD"
        )
        replica.handle = actor.remote(self._path, replica.part, self.parts, self._threads)
        replica.started = replica.handle.open.remote(self.state)
        return replica

    def _lose(self, replica: _Replica, handle: Any) -> None:
        """Count an actor as dead, if it was not replaced already, and have it started again."""
        with self._lock:
            if replica.handle is not handle or handle is None:
                return
            replica.earliest = time.monotonic() + (0.0 if replica.is_up else _PAUSE_SECONDS)
            replica.handle = replica.started = replica.pinged = None
            replica.is_up = False
            replica.calls = 0
        with suppress(Exception):
            self._ray.kill(handle)

    def _watch(self) -> None:
        """Start dead actors again, and notice deaths while nobody asks."""
        rounds = 0
        while not self._stopped.wait(_POLL_SECONDS):
            rounds += 1
            pings = rounds % round(_WATCH_SECONDS / _POLL_SECONDS) == 0
            for replica in [replica for replicas in self._replicas for replica in replicas]:
                with suppress(Exception):  # of a connection that ends
                    self._look_at(replica, pings)

    def _look_at(self, replica: _Replica, pings: bool) -> None:
        with self._lock:
            if replica.handle is None:
                if time.monotonic() >= replica.earliest:
                    self._start(replica)
                return
            handle = replica.handle
            if replica.is_up and pings and replica.pinged is None:
                replica.pinged = handle.ping.remote()
            awaited = replica.pinged if replica.is_up else replica.started
        if awaited is None or not self._ray.wait([awaited], timeout=0)[0]:
            return
        try:
            self._ray.get(awaited)
        except self._ray.exceptions.RayError as error:
            replica.problem = str(error.cause) if isinstance(error, self._ray.exceptions.RayTaskError) else ""
            self._lose(replica, handle)
            return
        with self._lock:
            if replica.handle is handle:
                replica.is_up = True
                replica.pinged = None

    def _no_room(self, number: int) -> str:
        """Return a sentence about a part without a replica."""
        problem = next((replica.problem for replica in self._replicas[number] if replica.problem), None)
        reason = problem or f"no node of the Ray cluster has had room for it ({amounts({'CPU': self._threads})} free)"
        return f"part {number + 1} of {self.parts} of {self._path} does not run: {reason}; send the query again later, or with `partial`"


class _LostError(Exception):
    """A call's result was lost with its actor or node."""


class FleetParts:
    """A state of an index whose parts are a fleet's; see `Parts`."""

    def __init__(self, fleet: Fleet, index: Index) -> None:
        self.index = index
        self.fleet = fleet
        self._state = index.manifest.number, index.checksum
        group_ranges = split_groups(index.groups, fleet.parts)
        self.firsts: Sequence[int] = tuple(index.groups[group_range.start].first for group_range in group_ranges)

    def call(self, method: str, search: Search | None, arguments: Mapping[int, tuple[Any, ...]], partial: bool = False) -> dict[int, Any]:
        """See `Parts`."""
        return self.fleet.call(self._state, method, search, arguments, partial)

    def stream(self, search: Search) -> Iterator[Float32[np.ndarray, "queries rows"]]:
        """See `Parts`."""
        for number in range(len(self.firsts)):
            yield from self.fleet.stream(self._state, number, search)

    def scorer(self, search: Search) -> Scorer:
        """See `Parts`; the actors prepare their own."""
        return Scorer.of(self.index, search.queries, search.metric, search.mixings)

    def up(self) -> list[int]:
        """See `Parts`."""
        return self.fleet.up()

    def moved_to(self, index: Index) -> "FleetParts":
        """See `Parts`."""
        self.fleet.state = index.manifest.number, index.checksum
        return FleetParts(self.fleet, index)


@contextmanager
def open_fleets(paths: Sequence[Path], address: str | None, parts: int | None, replicas: int, threads: int) -> Iterator[list[FleetParts]]:
    """Start the actors of some indexes on a Ray cluster, and stop them at the end.

    Args:
        address: of the cluster; None starts a local Ray.
        parts: of each index; by default one for each node.

    Raises:
        NotFoundError: the cluster cannot be reached.
        UsageError: the cluster is too small.
        BusyError: other jobs hold the CPUs.
    """
    indexes = [Index(path) for path in paths]
    wanted = (parts or 1) * replicas * len(indexes)
    with connected(address, wanted * threads) as ray:
        nodes = node_resources(ray)
        parts = parts or len(nodes)
        wanted = parts * replicas * len(indexes)
        fits = room(nodes, {"CPU": threads})
        if fits < wanted:
            raise UsageError(
                f"{wanted} processes of {amounts({'CPU': threads})} each are asked for ({parts} parts, {replicas} replicas, {len(indexes)} "
                f"indexes), and the Ray cluster ({'; '.join(map(amounts, nodes))}) has room for {fits}; ask for fewer `parts`, `replicas` "
                "or `threads`"
            )
        fleets = [Fleet(ray, index, parts, replicas, threads) for index in indexes]
        try:
            for fleet in fleets:
                fleet.wait()
            yield [FleetParts(fleet, index) for fleet, index in zip(fleets, indexes, strict=True)]
        finally:
            for fleet in fleets:
                fleet.stop()


def close(fleets: Sequence[FleetParts]) -> None:
    """End the actors of fleets, and the connection to Ray, before the process exits."""
    import ray

    for parts in fleets:  # all before the connection ends: a call of Ray would start another one
        parts.fleet.stop()
    ray.shutdown()
