"""Estimates of the cost of a build, from a count of the corpus, a sample of its documents, and the time of a few batches.

Rows, tokens and times are extrapolated from the sample. The components are those of the build, as far as the sample's tokens are like the
corpus's. Nothing is written.
"""

import random
import resource
import time
from dataclasses import asdict, dataclass
from typing import Any

from ..indexer.budget import count_tokens, row_cost
from ..indexer.encoder import Encoder
from ..indexer.fit import Fit, with_known_sample
from ..indexer.tasks import find_task
from ..store.corpus import Document, read_corpus
from ..store.documents import Example
from ..store.errors import DataError
from .build import longest_example
from .config import BuildConfig
from .corpus import corpus_fields
from .progress import Reporter, Silent
from .schema import fit_examples, select_components, unused_options
from .worker import Worker, document_converter, encode_rows

_SAMPLED = 512
_MEASURED_BATCHES = 2


@dataclass(frozen=True)
class Cost:
    """An estimate of a build.

    Attributes:
        documents: number of documents, counted.
        rows, tokens: numbers of examples and of their tokens, estimated from the sample.
        components: names and sizes of the components.
        bytes_per_example, bytes_of_rows, encoder_bytes: sizes in the index; documents are not included.
        memory_per_worker: largest memory of this process during the measurement, in bytes.
        notes: sentences about options that had no effect.
        fit_seconds, row_seconds: times of the fitting passes and of the rows, if `workers` processes do not slow one another down.
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
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values, as `wherefrom plan --json` prints them."""
        return asdict(self)


def estimate(config: BuildConfig, reporter: Reporter = Silent()) -> Cost:
    """Estimate the cost of a build, from a sample of the corpus and a few measured batches.

    Raises:
        UsageError, DataError, NotFoundError, ...: the errors that the build would raise, as far as the sample shows them.
    """
    reporter.stage("loading the model", None)
    task = find_task(config.task)
    worker = Worker(config)
    models, settings, _ = worker.describe()
    encoder = document_converter(config, worker.sources, longest_example(config, models))
    reporter.stage("sampling the corpus", None)
    documents, sample = _sample_documents(config)
    examples: list[Example] = []
    for example in encoder.documents(sample):
        if isinstance(example, Example):
            examples.append(example)
        elif config.bad_documents == "error":
            raise example
    if not examples:
        raise DataError(f"there is no usable document in {', '.join(config.sources)}; check `data`")
    scale = documents / len(sample)
    rows = max(1, round(len(examples) * scale))
    counts = count_tokens(examples)
    settings = select_components(config, settings, examples, models)
    measured = _examples_of_all_lengths(examples, settings.batch_tokens * _MEASURED_BATCHES)
    measured_tokens = sum(e.tokens for e in measured)
    mean_tokens = sum(e.tokens for e in examples) / len(examples)
    fitted = fit_examples(config, settings.components, models, rows, round(mean_tokens * rows))
    settings = with_known_sample(settings, fitted)
    arrays = worker.moments()
    fit_seconds = 0.0
    fit = Fit(settings)
    for step in range(len(fit.steps)):
        reporter.stage(f"measuring the fit, pass {step + 1} of {len(fit.steps)}", None)
        worker_encoder = Encoder(task, worker.models, settings, arrays)
        if step == 0:
            fit.sum_statistics(worker_encoder, step, measured[:1])  # the first call is slower, so it is not timed
        started = time.perf_counter()
        sums = fit.sum_statistics(worker_encoder, step, measured)
        fit_seconds += (time.perf_counter() - started) / measured_tokens * mean_tokens * fitted / config.workers
        started = time.perf_counter()
        arrays = fit.finish(step, arrays, sums)
        fit_seconds += time.perf_counter() - started
    worker_encoder = Encoder(task, worker.models, settings, arrays)
    reporter.stage("measuring rows", None)
    encode_rows(worker_encoder, measured[:1])
    started = time.perf_counter()
    encode_rows(worker_encoder, measured)
    row_seconds = (time.perf_counter() - started) / measured_tokens * mean_tokens * rows / config.workers
    cost = sum(row_cost(s, counts) for s in settings.components)
    return Cost(
        documents=documents,
        rows=rows,
        tokens=round(mean_tokens * rows),
        components=tuple(s.sizes() | {"bytes_per_example": round(row_cost(s, counts), 1)} for s in settings.components),
        bytes_per_example=round(cost, 1),
        bytes_of_rows=round(cost * rows),
        encoder_bytes=sum(array.nbytes for array in arrays.values()),
        memory_per_worker=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        fit_seconds=round(fit_seconds, 1),
        row_seconds=round(row_seconds, 1),
        workers=config.workers,
        notes=tuple(unused_options(config, settings.components)),
    )


def _sample_documents(config: BuildConfig) -> tuple[int, list[Document | DataError]]:
    """Count the documents and draw a seeded sample of them, in the order of the corpus (reservoir sampling: Vitter, algorithm R)."""
    generator = random.Random(config.seed)
    reservoir: list[tuple[int, Document | DataError]] = []
    count = 0
    for number, document in enumerate(read_corpus(config.sources, corpus_fields(config))):
        count = number + 1
        position = number if number < _SAMPLED else generator.randrange(count)
        if position < _SAMPLED:
            reservoir[position : position + 1] = [(number, document)]
    return count, [document for _, document in sorted(reservoir, key=lambda pair: pair[0])]


def _examples_of_all_lengths(examples: list[Example], tokens: int) -> list[Example]:
    """Return examples at equal distances in the order of length, at least one, that have about so many tokens together."""
    mean_tokens = sum(e.tokens for e in examples) / len(examples)
    count = min(len(examples), max(1, round(tokens / mean_tokens)))
    by_length = sorted(examples, key=lambda e: e.tokens)
    return [by_length[int((number + 0.5) / count * len(examples))] for number in range(count)]
