"""Engine of one served index: a bounded queue and one worker thread.

While a batch is processed, the next one accumulates. So an idle server adds no delay, and a busy one uses one pass of the model and the
rows for several queries. The client caches the rows of queries, so the same query with another filter, damping or mode needs only a search.
"""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ..client import Client
from ..query.answers import Answer
from ..query.metric import changes_rows
from ..query.options import Options, Query
from ..store.errors import BusyError
from ..store.presets import mixes

_SIZES = (1, 2, 4, 8, 16, 32)
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
Result = TypeVar("Result")


class Metrics:
    """Prometheus metrics of a server."""

    def __init__(self) -> None:
        r = self.registry = CollectorRegistry()
        self.seconds = Histogram("wherefrom_stage_seconds", "Wall time by stage.", ["index", "stage"], buckets=_BUCKETS, registry=r)
        self.batch = Histogram("wherefrom_batch_queries", "Queries answered in one pass.", ["index"], buckets=_SIZES, registry=r)
        self.candidates = Counter("wherefrom_candidates", "Rows that were read for answers.", ["index"], registry=r)
        self.cached_queries = Counter("wherefrom_cached_queries", "Queries whose rows were cached, or not.", ["index", "found"], registry=r)
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
    """Queue and worker thread of one index.

    Args:
        batch: largest number of queries in one pass.
        queue: largest number of waiting requests; more are rejected.
    """

    def __init__(self, name: str, client: Client, metrics: Metrics, batch: int, queue: int) -> None:
        self.name = name
        self.client = client
        self._metrics = metrics
        self._batch = batch
        self._queue: asyncio.Queue[_Job[Any]] = asyncio.Queue(queue)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"wherefrom-{name}")
        self._task: asyncio.Task[None] | None = None
        self._running: list[_Job[Any]] = []

    @property
    def alive(self) -> bool:
        """True while the engine processes requests."""
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
                job.future.set_exception(BusyError("the server is stopping; send the query again later"))
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
            raise BusyError(f"{self._queue.maxsize} requests wait already; send the query again later") from error
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
        """Process jobs on the worker thread; return a result or an error for each."""
        start = time.perf_counter()
        for job in jobs:
            self._metrics.seconds.labels(self.name, "queue").observe(start - job.since)
        self.client = self.client.refreshed()  # with the newest manifest of the index
        outcomes: dict[int, Any] = {}
        by_options: dict[str, list[int]] = {}
        for number, job in enumerate(jobs):
            if job.call is not None:
                outcomes[number] = _outcome(job.call, self.client)
            elif job.query is not None:
                alone = number if mixes(job.query[1]) else None  # queries of other requests are not asked together with it
                by_options.setdefault(json.dumps([job.query[1], alone], sort_keys=True), []).append(number)
        queries = {number: job.query for number, job in enumerate(jobs) if job.query is not None}
        self._encode([query for query, options in queries.values() if not changes_rows(options)])
        for numbers in by_options.values():
            options = queries[numbers[0]][1]
            answers = self._answers([queries[number][0] for number in numbers], options)
            outcomes |= dict(zip(numbers, answers, strict=True))
        return [outcomes[number] for number in range(len(jobs))]

    def _encode(self, queries: Sequence[Query]) -> None:
        """Encode queries with plain rows, of all options, in one pass of the model; the client caches the rows."""
        start = time.perf_counter()
        cached = sum(self.client.is_cached(query) for query in queries)
        self._metrics.cached_queries.labels(self.name, "hit").inc(cached)
        self._metrics.cached_queries.labels(self.name, "miss").inc(len(queries) - cached)
        if cached < len(queries):
            _outcome(lambda client: client.encode(queries), self.client)  # an error is raised again for the queries that cause it
            self._metrics.seconds.labels(self.name, "model").observe(time.perf_counter() - start)

    def _answers(self, queries: Sequence[Query], options: Options) -> list[Any]:
        """Answer queries with the same options; return an answer or an error for each."""
        answers = _outcome(lambda client: client.query_many(queries, **options), self.client)
        if isinstance(answers, BaseException):
            return [self._answers([query], options)[0] for query in queries] if len(queries) > 1 else [answers]
        self._metrics.batch.labels(self.name).observe(len(queries))
        self._metrics.seconds.labels(self.name, "search").observe(answers[0].search.seconds)
        self._metrics.candidates.labels(self.name).inc(sum(answer.search.candidates for answer in answers))
        return answers


def _outcome(function: Callable[[Client], Result], client: Client) -> Result | Exception:
    """Call a function of the client; return its result or its error."""
    try:
        return function(client)
    except Exception as error:
        return error
