"""Engine of one served index: a bounded queue, one worker thread, and a cache of query rows.

While a batch is processed the next one accumulates, so an idle server adds no delay and a busy one shares passes over the model and the
rows. The rows of queries are cached: the same query with another filter, damping or mode only costs a search.
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

_CACHED = 128
_SIZES = (1, 2, 4, 8, 16, 32)
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
Result = TypeVar("Result")


class Metrics:
    """Prometheus metrics."""

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
    """Job for the worker thread: a query, or a call of the client."""

    future: "asyncio.Future[Result]"
    query: tuple[Query, Options] | None = None
    call: Callable[[Client], Result] | None = None
    since: float = field(default_factory=time.perf_counter)


class Engine:
    """Queue and worker of one index.

    Args:
        name: of the index, in requests.
        client: of the index.
        metrics: to update.
        batch: most queries in one pass.
        queue: most requests that wait; more are rejected.
    """

    def __init__(self, name: str, client: Client, metrics: Metrics, batch: int, queue: int) -> None:
        self.name = name
        self.client = client
        self._metrics = metrics
        self._batch = batch
        self._queue: asyncio.Queue[_Job[Any]] = asyncio.Queue(queue)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"wherefrom-{name}")
        self._rows: OrderedDict[Query, QueryRows] = OrderedDict()
        self._task: asyncio.Task[None] | None = None
        self._running: list[_Job[Any]] = []

    @property
    def alive(self) -> bool:
        """True while queries are processed."""
        return self._task is not None and not self._task.done()

    def start(self) -> None:
        """Start processing; needs a running event loop."""
        self._task = asyncio.create_task(self._serve())

    async def stop(self) -> None:
        """Stop processing; reject the waiting jobs."""
        if self._task is not None:
            self._task.cancel()
        while not self._queue.empty():
            self._running.append(self._queue.get_nowait())
        for job in self._running:
            if not job.future.done():
                job.future.set_exception(BusyError("the server is stopping; ask again later"))
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def ask(self, query: Query, options: Options) -> Answer:
        """Answer one query.

        Raises:
            BusyError: the queue is full.
        """
        return await self._submit(_Job(asyncio.get_running_loop().create_future(), query=(query, options)))

    async def call(self, function: Callable[[Client], Result]) -> Result:
        """Run a function of the client on the worker thread."""
        return await self._submit(_Job(asyncio.get_running_loop().create_future(), call=function))

    async def _submit(self, job: "_Job[Result]") -> Result:
        try:
            self._queue.put_nowait(job)
        except asyncio.QueueFull as error:
            raise BusyError(f"{self._queue.maxsize} requests wait already; ask again later") from error
        self._metrics.waiting.labels(self.name).set(self._queue.qsize())
        return await job.future

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            jobs = [await self._queue.get()]
            while len(jobs) < self._batch and not self._queue.empty():
                jobs.append(self._queue.get_nowait())
            self._metrics.waiting.labels(self.name).set(self._queue.qsize())
            self._running = [job for job in jobs if not job.future.done()]  # requests may have been canceled
            jobs = self._running
            try:
                outcomes = await loop.run_in_executor(self._pool, self._work, jobs)
            except Exception as error:
                outcomes = [error] * len(jobs)
            for job, outcome in zip(jobs, outcomes, strict=True):
                if job.future.done():
                    continue
                if isinstance(outcome, BaseException):
                    job.future.set_exception(outcome)
                else:
                    job.future.set_result(outcome)

    def _work(self, jobs: Sequence[_Job[Any]]) -> list[Any]:
        """Process jobs on the worker thread; returns a result or an error for each."""
        start = time.perf_counter()
        for job in jobs:
            self._metrics.seconds.labels(self.name, "queue").observe(start - job.since)
        outcomes: dict[int, Any] = {}
        self._refresh()
        groups: dict[str, list[int]] = {}
        for number, job in enumerate(jobs):
            if job.call is not None:
                outcomes[number] = _outcome(job.call, self.client)
            elif job.query is not None:
                groups.setdefault(json.dumps(job.query[1], sort_keys=True), []).append(number)
        numbers = [number for group in groups.values() for number in group]
        rows = self._query_rows([jobs[n].query[0] for n in numbers])  # type: ignore[index]
        rows_by_job = dict(zip(numbers, rows, strict=True))
        for group in groups.values():
            for number in group:
                if isinstance(rows_by_job[number], BaseException):
                    outcomes[number] = rows_by_job[number]
            valid = [n for n in group if n not in outcomes]
            if valid:
                answers = self._answers([jobs[n].query for n in valid], [rows_by_job[n] for n in valid])
                outcomes |= dict(zip(valid, answers, strict=True))
        return [outcomes[number] for number in range(len(jobs))]

    def _query_rows(self, queries: Sequence[Query]) -> list[Any]:
        """Rows of each query from the cache or the model, or its error."""
        start = time.perf_counter()
        missing = [q for q in dict.fromkeys(queries) if q not in self._rows]
        self._metrics.remembered.labels(self.name, "hit").inc(len(queries) - len(missing))
        self._metrics.remembered.labels(self.name, "miss").inc(len(missing))
        outcomes: dict[Query, Any] = {}
        if missing:
            batch = _outcome(lambda client: client.rows(missing), self.client)
            for number, query in enumerate(missing):
                if isinstance(batch, BaseException):
                    outcomes[query] = _outcome(partial(_rows_of, query=query), self.client)
                else:
                    outcomes[query] = cut(batch, number, number + 1)
            self._metrics.seconds.labels(self.name, "model").observe(time.perf_counter() - start)
        result = [outcomes[q] if q in outcomes else self._rows[q] for q in queries]
        for query, rows in outcomes.items():
            if not isinstance(rows, BaseException):
                self._rows[query] = rows
        for query in queries:
            if query in self._rows:
                self._rows.move_to_end(query)
        while len(self._rows) > _CACHED:
            self._rows.popitem(last=False)
        return result

    def _answers(self, queries: Sequence[Any], rows: Sequence[QueryRows]) -> list[Any]:
        """Answers to queries with the same options, or their errors."""
        options = queries[0][1]
        answers = _outcome(lambda client: client.answer([query for query, _ in queries], join(rows), **options), self.client)
        if isinstance(answers, BaseException) and len(queries) > 1:
            return [self._answers([query], [query_rows])[0] for query, query_rows in zip(queries, rows, strict=True)]
        if isinstance(answers, BaseException):
            return [answers]
        self._metrics.batch.labels(self.name).observe(len(queries))
        self._metrics.seconds.labels(self.name, "search").observe(answers[0].search.seconds)
        self._metrics.candidates.labels(self.name).inc(sum(answer.search.candidates for answer in answers))
        return answers

    def _refresh(self) -> None:
        """Switch to a newer state of the index, if any."""
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
