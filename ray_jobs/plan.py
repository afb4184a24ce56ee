"""What a build will cost, said before it is begun: the corpus is counted, a sample of it encoded, and a few batches are measured.

Rows, tokens and times are extrapolated from the sample, so they are estimates; the components are those that the build will choose but for
what the sample's tokens differ from the corpus's. Nothing is written.
"""

import random
import resource
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ..indexer.budget import count_tokens, row_cost
from ..indexer.curvature import Arrays
from ..indexer.encoder import Encoder
from ..indexer.fit import Fit, with_known_sample
from ..indexer.tasks import find_task
from ..store.corpus import Document, read_corpus
from ..store.documents import Example
from ..store.errors import DataError
from .build import longest_example
from .config import BuildConfig
from .schema import select_components
from .worker import Worker, document_encoder, encode_rows

_SAMPLED = 512
_MEASURED_BATCHES = 6


@dataclass(frozen=True)
class Cost:
    """An estimate of a build.

    Attributes:
        documents: counted. `rows` and `tokens`: estimated from a sample.
        components: name, and what is stored of it.
        bytes_per_example, bytes_of_rows, encoder_bytes: of the index, without documents.
        memory_per_worker: the most that this process has held while it measured, bytes.
        fit_seconds, row_seconds: of the fitting passes and of the rows, by `workers` processes that do not hinder one another.
    """

    documents: int
    rows: int
    tokens: int
    components: tuple[dict[str, Any], ...]
    bytes_per_example: float
    bytes_of_rows: int
    encoder_bytes: int
    memory_per_worker: int
    fit_seconds: float
    row_seconds: float
    workers: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, as `wherefrom plan --json` prints it."""
        return asdict(self)


def estimate(config: BuildConfig) -> Cost:
    """Count, sample and measure.

    Raises:
        UsageError, DataError, NotFoundError, ...: what the build would raise, as far as the sample shows it.
    """
    task, worker = find_task(config.task), Worker(config)
    models, plan, _ = worker.describe()
    encoder = document_encoder(config, worker.sources, longest_example(config, models))
    fields = config.fields if task.form == "auto" else replace(config.fields, form=task.form)
    documents, sample = _sampled(config, fields)
    examples: list[Example] = []
    for example in encoder.documents(sample):
        if isinstance(example, Example):
            examples.append(example)
        elif config.bad_documents == "error":
            raise example
    if not examples:
        raise DataError(f"there is no usable document in {', '.join(config.sources)}")
    scale = documents / len(sample)
    rows = max(1, round(len(examples) * scale))
    counts = count_tokens(examples)
    plan = select_components(config, plan, examples)
    fitted = min(config.fit_examples, rows)
    plan = with_known_sample(plan, fitted)
    measured = _some(examples, plan.batch_tokens * _MEASURED_BATCHES)
    tokens_each = sum(e.tokens for e in examples) / len(examples)
    arrays, fit_seconds = Arrays(), 0.0
    fit = Fit(plan)
    fit_rate = measured_tokens = sum(e.tokens for e in measured)
    for step in range(len(fit.steps)):
        worker_encoder = Encoder(task, worker.models, plan, arrays)
        if step == 0:
            fit.measure(worker_encoder, step, measured[:1])  # the first pass pays for what is made once
        started = time.perf_counter()
        sums = fit.measure(worker_encoder, step, measured)
        fit_seconds += (time.perf_counter() - started) / fit_rate * tokens_each * fitted / config.workers
        started = time.perf_counter()
        arrays = fit.finish(step, arrays, sums)
        fit_seconds += time.perf_counter() - started
    worker_encoder = Encoder(task, worker.models, plan, arrays)
    encode_rows(worker_encoder, measured[:1])
    started = time.perf_counter()
    encode_rows(worker_encoder, measured)
    row_seconds = (time.perf_counter() - started) / measured_tokens * tokens_each * rows / config.workers
    cost = sum(row_cost(s, counts) for s in plan.components)
    return Cost(
        documents=documents,
        rows=rows,
        tokens=round(tokens_each * rows),
        components=tuple(s.sizes() | {"bytes_per_example": round(row_cost(s, counts), 1)} for s in plan.components),
        bytes_per_example=round(cost, 1),
        bytes_of_rows=round(cost * rows),
        encoder_bytes=sum(array.nbytes for array in arrays.values()),
        memory_per_worker=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        fit_seconds=round(fit_seconds, 1),
        row_seconds=round(row_seconds, 1),
        workers=config.workers,
    )


def _sampled(config: BuildConfig, fields: Any) -> tuple[int, list[Document | DataError]]:
    """How many documents there are, and a seeded sample of them (reservoir sampling: Vitter, algorithm R) in the corpus's order."""
    generator, kept = random.Random(config.seed), list[tuple[int, Document | DataError]]()
    number = -1
    for number, document in enumerate(read_corpus(config.sources, fields)):
        at = number if number < _SAMPLED else generator.randrange(number + 1)
        if at < _SAMPLED:
            kept[at : at + 1] = [(number, document)]
    return number + 1, [document for _, document in sorted(kept, key=lambda pair: pair[0])]


def _some(examples: list[Example], tokens: int) -> list[Example]:
    total = np.cumsum([e.tokens for e in examples])
    return examples[: max(1, int(np.searchsorted(total, tokens, side="right")))]
