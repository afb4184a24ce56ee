"""One index behind the server: a bounded queue, one thread that answers, and what it remembers of queries.

While a batch is being answered the next one gathers, so that an idle server adds no wait and a busy one shares passes over the model and
the rows. Rows of queries are remembered: asked again with another filter, damping or mode, a query costs a search alone.
"""

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ..client import Client
from ..query.answers import Answer, Query
from ..query.asking import Options
from ..query.metric import QueryRows, cut, join
from ..store.errors import BusyError

_REMEMBERED = 128
_SIZES = (1, 2, 4, 8, 16, 32)
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
Result = TypeVar("Result")


class Metrics:
    """What Prometheus is told."""

    def __init__(self) -> None:
        r = self.registry = CollectorRegistry()
        self.seconds = Histogram("wherefrom_stage_seconds", "Wall time by stage.", ["index", "stage"], buckets=_BUCKETS, registry=r)
        self.batch = Histogram("wherefrom_batch_queries", "Queries answered in one pass.", ["index"], buckets=_SIZES, registry=r)
        self.candidates = Counter("wherefrom_candidates", "Rows that were read for answers.", ["index"], registry=r)
        self.remembered = Counter("wherefrom_remembered", "Queries whose rows were remembered, or not.", ["index", "found"], registry=r)
        self.waiting = Gauge("wherefrom_waiting", "Requests that wait.", ["index"], registry=r)
        self.responses = Counter("wherefrom_responses", "Responses by path and status.", ["path", "status"], registry=r)


@dataclass
class _Job(Generic[Result]):
    """Something that waits for the thread: a query, or any call of the client."""

    done: "asyncio.Future[Result]"
    asked: tuple[Query, Options] | None = None
    call: Callable[[Client], Result] | None = None
    since: float = field(default_factory=time.perf_counter)


class Engine:
    """Answers queries about one index.

    Args:
        name: what requests call the index.
        client: opened on it.
        metrics: where times are counted.
        batch: queries in one pass, at most.
        queue: requests that may wait; more are refused.
    """

    def __init__(self, name: str, client: Client, metrics: Metrics, batch: int, queue: int) -> None:
        self.name, self.client, self._metrics, self._batch = name, client, metrics, batch
        self._queue: asyncio.Queue[_Job[Any]] = asyncio.Queue(queue)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"wherefrom-{name}")
        self._rows: OrderedDict[Query, QueryRows] = OrderedDict()
        self._task: asyncio.Task[None] | None = None
        self._running: list[_Job[Any]] = []

    @property
    def alive(self) -> bool:
        """Whether queries are being answered."""
        return self._task is not None and not self._task.done()

    def start(self) -> None:
        """Begin to answer; needs a running loop."""
        self._task = asyncio.create_task(self._serve())

    async def stop(self) -> None:
        """Answer no more; what waits is refused."""
        if self._task is not None:
            self._task.cancel()
        while not self._queue.empty():
            self._running.append(self._queue.get_nowait())
        for job in self._running:
            if not job.done.done():
                job.done.set_exception(BusyError("the server is stopping; ask again later"))
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def ask(self, query: Query, options: Options) -> Answer:
        """The answer to one query.

        Raises:
            BusyError: too many wait.
        """
        return await self._submit(_Job(asyncio.get_running_loop().create_future(), asked=(query, options)))

    async def call(self, function: Callable[[Client], Result]) -> Result:
        """What a function makes of the client, in its turn."""
        return await self._submit(_Job(asyncio.get_running_loop().create_future(), call=function))

    async def _submit(self, job: "_Job[Result]") -> Result:
        try:
            self._queue.put_nowait(job)
        except asyncio.QueueFull as error:
            raise BusyError(f"{self._queue.maxsize} requests wait already; ask again later") from error
        self._metrics.waiting.labels(self.name).set(self._queue.qsize())
        return await job.done

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            jobs = [await self._queue.get()]
            while len(jobs) < self._batch and not self._queue.empty():
                jobs.append(self._queue.get_nowait())
            self._metrics.waiting.labels(self.name).set(self._queue.qsize())
            self._running = [job for job in jobs if not job.done.done()]  # whoever asked may have gone
            jobs = self._running
            try:
                outcomes = await loop.run_in_executor(self._pool, self._work, jobs)
            except Exception as error:
                outcomes = [error] * len(jobs)
            for job, outcome in zip(jobs, outcomes, strict=True):
                if job.done.done():
                    continue
                if isinstance(outcome, BaseException):
                    job.done.set_exception(outcome)
                else:
                    job.done.set_result(outcome)

    def _work(self, jobs: Sequence[_Job[Any]]) -> list[Any]:
        """What becomes of each job: a result or an error. Runs in the thread."""
        started = time.perf_counter()
        for job in jobs:
            self._metrics.seconds.labels(self.name, "queue").observe(started - job.since)
        outcomes: dict[int, Any] = {}
        self._refresh()
        groups: dict[str, list[int]] = {}
        for number, job in enumerate(jobs):
            if job.call is not None:
                outcomes[number] = _outcome(job.call, self.client)
            elif job.asked is not None:
                groups.setdefault(json.dumps(job.asked[1], sort_keys=True), []).append(number)
        asked = [number for group in groups.values() for number in group]
        rows = self._measured([jobs[n].asked[0] for n in asked])  # type: ignore[index]
        by_job = dict(zip(asked, rows, strict=True))
        for group in groups.values():
            for number in group:
                if isinstance(by_job[number], BaseException):
                    outcomes[number] = by_job[number]
            left = [n for n in group if n not in outcomes]
            if left:
                outcomes |= dict(zip(left, self._answered([jobs[n].asked for n in left], [by_job[n] for n in left]), strict=True))
        return [outcomes[number] for number in range(len(jobs))]

    def _measured(self, queries: Sequence[Query]) -> list[Any]:
        """Each query's rows, or the error that it met."""
        started = time.perf_counter()
        missing = [q for q in dict.fromkeys(queries) if q not in self._rows]
        for found in ("hit", "miss"):
            count = len(missing) if found == "miss" else len(queries) - len(missing)
            self._metrics.remembered.labels(self.name, found).inc(count)
        made: dict[Query, Any] = {}
        if missing:
            together = _outcome(lambda client: client.rows(missing), self.client)
            for number, query in enumerate(missing):
                if isinstance(together, BaseException):
                    made[query] = _outcome(partial(_rows_of, query=query), self.client)
                else:
                    made[query] = cut(together, number, number + 1)
            self._metrics.seconds.labels(self.name, "model").observe(time.perf_counter() - started)
        result = [made[q] if q in made else self._rows[q] for q in queries]
        for query, rows in made.items():
            if not isinstance(rows, BaseException):
                self._rows[query] = rows
        for query in queries:
            if query in self._rows:
                self._rows.move_to_end(query)
        while len(self._rows) > _REMEMBERED:
            self._rows.popitem(last=False)
        return result

    def _answered(self, asked: Sequence[Any], rows: Sequence[QueryRows]) -> list[Any]:
        """The answers to queries that are asked the same way, or the errors that they met."""
        options = asked[0][1]
        together = _outcome(lambda client: client.answer([q for q, _ in asked], join(rows), **options), self.client)
        if isinstance(together, BaseException) and len(asked) > 1:
            return [self._answered([one], [own])[0] for one, own in zip(asked, rows, strict=True)]
        if isinstance(together, BaseException):
            return [together]
        self._metrics.batch.labels(self.name).observe(len(asked))
        self._metrics.seconds.labels(self.name, "search").observe(together[0].search.seconds)
        self._metrics.candidates.labels(self.name).inc(sum(answer.search.candidates for answer in together))
        return together

    def _refresh(self) -> None:
        """Go over to a newer state of the index."""
        newer = self.client.refreshed()
        if newer is not self.client:
            self.client = newer
            self._rows.clear()


def _rows_of(client: Client, query: Query) -> QueryRows:
    return client.rows([query])


def _outcome(function: Callable[[Client], Result], client: Client) -> Result | Exception:
    try:
        return function(client)
    except Exception as error:
        return error
