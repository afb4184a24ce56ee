"""Workers of a build. A worker loads the models once, then computes sums over parts of the fitting sample and builds shards.

The result of a method depends only on its arguments and the models. So any worker can repeat the task of one that died, with the same
bytes. The same class runs in the driver's process (`workers` 1) and in a Ray actor.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import nn

from ..indexer import models
from ..indexer.calibrate import Agreement
from ..indexer.curvature import Arrays
from ..indexer.encoder import AskedExamples, EncodedBatch, Encoder, EncoderSettings, Progress, ignore_progress
from ..indexer.examples import DocumentConverter
from ..indexer.fit import Fit
from ..indexer.moments import moment_arrays
from ..indexer.sparse import HeadMean
from ..indexer.tasks import Task, find_task, load_model
from ..indexer.trained import find_trained, recorded_rate, recorded_times
from ..store.arrays import ArrayGroup
from ..store.corpus import Slice
from ..store.documents import Documents, Example
from ..store.errors import IncompatibleError, NotFoundError, UsageError
from ..store.files import publish, read_json, staging_folder, write_whole
from ..store.index import Index
from ..store.kinds import KINDS
from ..store.manifest import Component, DenseComponent, Model
from ..store.objects import local_or_store
from ..store.shapes import Float16, Float32
from ..store.shard import Shard, documents_path, is_whole, shard_entry, write_shard
from ..store.vectors import Rows, read_rows, write_rows
from .config import BuildConfig
from .corpus import CorpusWriter, WrittenPiece, WrittenShard
from .notes import ModelFacts
from .schema import candidate_components, component_name, unprojected_blocks, with_rates

Part = Sequence[tuple[str, int, Sequence[int]]]
"""Examples: for each shard with some of them its id, its number of rows, and their positions."""

_MEAN_TOKENS = 4096
_LARGEST_HALF = 65504.0


class Worker:
    """Worker of one build.

    Args:
        config: of the build. With one thread (the default), the rows are the same bits for any number of workers.
        sources: of the models; by default those of the configuration.
    """

    def __init__(self, config: BuildConfig, sources: Sequence[models.ModelSource] = ()) -> None:
        self._config = config
        self.sources = sources or model_sources(config)
        self._encoders: dict[str, Encoder] = {}
        self._converter: DocumentConverter | None = None

    @cached_property
    def task(self) -> Task:
        """The task of the build."""
        return find_task(self._config.task)

    @cached_property
    def models(self) -> tuple[nn.Module, ...]:
        """The models, loaded at the first use, so that an error of loading is the error of a task."""
        models.configure_memory()
        torch.set_num_threads(self._config.threads)
        return tuple(load_model(self.task, source) for source in self.sources)

    def describe(self) -> tuple[tuple[Model, ...], EncoderSettings, tuple[ModelFacts, ...]]:
        """Return descriptions of the models, the settings of their encoder before the fit, and facts for the record of the index.

        Raises:
            UsageError: no layer matches, or a matching layer does not run.
            IncompatibleError: the models have vocabularies of different sizes.
        """
        config = self._config
        descriptions: list[Model] = []
        components: list[Component] = []
        embeddings = [self.task.sparse_embeddings(model) for model in self.models]
        sizes = [0 if layer is None else layer.vocabulary for layer in embeddings]
        for number, (source, model) in enumerate(zip(self.sources, self.models, strict=True)):
            if sizes[number] != sizes[0]:
                raise IncompatibleError(
                    f"{source.id} embeds {sizes[number]} tokens and {config.models[0]} {sizes[0]}; use models with the same vocabulary"
                )
            models.refuse_zero_weights(model, source.id)
            find_trained(self.task, model, source, config.base)
            trained = models.loaded(model).trained
            descriptions.append(
                Model(
                    id=absolute(source.id),
                    revision=getattr(getattr(model, "config", None), "_commit_hash", None) or source.revision,
                    dtype=config.dtype,
                    fingerprint=models.model_fingerprint(model),
                    architecture=type(model).__name__,
                    parameters=sum(p.numel() for p in model.parameters()),
                    context=self.task.context(model),
                    base=models.loaded(model).base,
                    trained=None if trained is None else tuple(sorted(trained)),
                    learning_times=None if source.loaded is not None else recorded_times(source.id),
                )
            )
            components += candidate_components(config, self.task, model, number)
        if config.unit_length:
            components = list(with_rates(components, [None if s.loaded is not None else recorded_rate(s.id) for s in self.sources]))
        batch_tokens = config.batch_tokens or self.task.default_batch_tokens(self.models)
        settings = EncoderSettings(tuple(components), batch_tokens, config.hidden)
        return tuple(descriptions), settings, tuple(ModelFacts.of(model) for model in self.models)

    def count_lines(self, slice: Slice, progress: Progress = ignore_progress) -> int | None:
        """Count the lines of a range of a file; None if this machine does not have the file."""
        return slice.count_lines() if slice.is_here else None

    def write_documents(
        self, writer: CorpusWriter, number: int, slices: Sequence[Slice], progress: Progress = ignore_progress
    ) -> WrittenPiece | None:
        """Write a piece of the corpus (see `CorpusWriter.write`); return None if this machine does not have its files."""
        if not all(slice.is_here for slice in slices):
            return None
        if self._converter is None:
            self._converter = document_converter(self._config, self.sources, writer.max_tokens)
        return writer.write(self._config, self._converter, number, slices, progress)

    def unprojected_blocks(self) -> DenseComponent:
        """Return the component of recomputed rows; see `schema.unprojected_blocks`."""
        return unprojected_blocks(self._config, self.task, self.models[-1])

    def compare_exact(
        self, settings: EncoderSettings, arrays: Arrays, parts: Part, progress: Progress = ignore_progress
    ) -> dict[str, Agreement]:
        """Return, by component, the mean score of an example with itself, and the mean share, by rows that are not coded.

        With rows z of n examples, the mean score between two of them is (|sum z|^2 - sum |z|^2) / (n (n - 1)); so no more rows than those
        of a batch are in memory. The mean share of a sparse component is not computed: 0.
        """
        examples = [example for id, rows, positions in parts for example in self._examples(id, rows, positions)]
        encoder = self._encoder(settings, arrays, "compared")
        squares: dict[str, float] = {}
        sums: dict[str, Any] = {}
        for batch in encoder.batches(examples, progress, skip_nonfinite=True):
            for component in settings.components:
                vectors: Any = batch.exact[component.name]
                squares[component.name] = squares.get(component.name, 0.0) + float(vectors.squared_norms.sum())
                if component.has_wide_rows:
                    sums[component.name] = sums.get(component.name, 0.0) + vectors.values.sum(axis=0, dtype=np.float64)
        agreements = {}
        for name, total in squares.items():
            between = 0.0 if name not in sums or len(examples) < 2 else float((sums[name] ** 2).sum() - total) / (len(examples) - 1)
            agreements[name] = Agreement(total / len(examples), 1.0, between / total if total > 0 else 0.0)
        return agreements

    def vocabulary(self) -> int | None:
        """Return the number of tokens that all models embed; None without tokens."""
        sizes = [size for model in self.models if (size := self.task.vocabulary(model)) is not None]
        return min(sizes, default=None)

    def moments(self) -> Arrays:
        """Return the arrays of the optimizer's moments for the encoder of a build that scales gradients by them; else none.

        Raises:
            NotFoundError, IncompatibleError: see `moment_arrays`.
            UsageError: the model is in memory.
        """
        if self._config.optimizer is None:
            return {}
        arrays: Arrays = {}
        for component in self.describe()[1].components:
            source = self.sources[component.model]
            if source.loaded is not None:
                raise UsageError("a model in memory has no optimizer's moments beside it; save it, and name its directory")
            folder = Path(source.id) if Path(source.id).is_dir() else Path(source.id).parent
            arrays |= {f"{component.name}/{name}": array for name, array in moment_arrays(component, folder).items()}  # type: ignore[arg-type]
        return arrays

    def sum_statistics(
        self,
        settings: EncoderSettings,
        arrays: Arrays,
        step: int,
        parts: Part,
        progress: Progress = ignore_progress,
    ) -> Arrays:
        """Sum the statistics of a fitting pass over some examples.

        Args:
            parts: the examples.
        """
        examples = [example for id, rows, positions in parts for example in self._examples(id, rows, positions)]
        return Fit(settings).sum_statistics(self._encoder(settings, arrays, f"pass {step}"), step, examples, progress)

    def decompose(
        self,
        settings: EncoderSettings,
        name: str,
        number: int,
        group: str,
        sums: Arrays,
        examples: int,
        progress: Progress = ignore_progress,
    ) -> Arrays:
        """Compute the arrays of a group of layers from their sums; see `Fit.decompose`. All workers have the same number of threads."""
        with threadpool_limits(self._config.threads):
            return Fit(settings).decompose(name, number, group, sums, examples)

    def build(
        self, settings: EncoderSettings, arrays: Arrays, shard: WrittenShard, compared: int = 0, progress: Progress = ignore_progress
    ) -> Shard:
        """Write the rows of a shard, unless they are complete on disk, and return its entry.

        Args:
            compared: number of the shard's first rows that are also written to a file as they are before coding, for `read_compared`.
        """
        out = local_or_store(self._config.out)
        if is_whole(out, shard.id, shard.rows, settings.components) and (not compared or _compared_path(out).is_file()):
            progress(shard.rows, shard.tokens)
        else:
            examples = self._examples(shard.id, shard.rows, range(shard.rows))
            encoder = self._encoder(settings, arrays, "rows")
            head: Any = encoder.component_encoders.get(component_name(self._config, "head", len(self.models) - 1))
            comparison = Comparison(compared, HeadMean(head, _MEAN_TOKENS, compared) if head is not None and compared else None)
            rows = encode_rows(encoder, examples, progress, comparison)
            if compared:
                models.return_freed_memory()
                comparison.write(_compared_path(out))
            write_shard(out, shard.id, *rows)
        return shard_entry(out, shard.id, shard.first, shard.rows, shard.tokens, settings.components)

    def ask_examples(self, settings: EncoderSettings, arrays: Arrays, parts: Part, progress: Progress = ignore_progress) -> AskedExamples:
        """Encode examples as queries."""
        examples = [example for id, rows, positions in parts for example in self._examples(id, rows, positions)]
        return self._encoder(settings, arrays, "asked").ask(examples, progress=progress, skip_nonfinite=True)

    def write_search_cache(self, number: int, progress: Progress = ignore_progress) -> None:
        """Write the search cache of a group of shards of the published index, unless it is there.

        Raises:
            OSError: it cannot be written; each search can compute what it holds.
        """
        self._published.write_search_cache(number)
        progress(self._published.groups[number].rows, 0)

    @cached_property
    def _published(self) -> Index:
        return Index(self._config.out)

    def _examples(self, shard: str, rows: int, positions: Sequence[int]) -> list[Example]:
        documents = Documents(documents_path(local_or_store(self._config.out), shard), rows)
        return [documents[position] for position in positions]

    def _encoder(self, settings: EncoderSettings, arrays: Arrays, stage: str) -> Encoder:
        if stage not in self._encoders:
            self._encoders.clear()
            self._converter = None  # a tokenizer can take hundreds of megabytes
            models.return_freed_memory()
            self._encoders = {stage: Encoder(self.task, self.models, settings, arrays)}
        return self._encoders[stage]


@dataclass
class Comparison:
    """The first rows of a shard as they are before coding.

    Attributes:
        count: of rows.
        head: meter of the last model's head; None without a head.
        blocks: rows with their positions in the shard.
    """

    count: int = 0
    head: HeadMean | None = None
    blocks: list[tuple[list[int], Rows]] = field(default_factory=list)

    def add(self, batch: EncodedBatch) -> None:
        """Add the batch's rows that are among the first of the shard."""
        rows = [i for i, position in enumerate(batch.positions) if position < self.count]
        if rows:
            positions = [batch.positions[i] for i in rows]
            self.blocks.append((positions, {name: vectors.select(rows) for name, vectors in batch.exact.items()}))

    def write(self, path: Path) -> None:
        """Write the rows, and the mean share of the head's full gradients (see `HeadMean`)."""
        joined = {}
        for name, first in self.blocks[0][1].items():
            joined[name] = type(first).concatenate([(positions, rows[name]) for positions, rows in self.blocks], first.width)
        self.blocks.clear()  # as large as the rows
        share = None if self.head is None else self.head.mean_share
        write_whole(path.with_suffix(".json"), json.dumps({"head_mean_share": share}).encode())
        staged = path.with_suffix(".partial")
        write_rows(joined, staged)
        publish(staged, path)


def read_compared(out: Path) -> tuple[Rows, float | None]:
    """Read the rows that `Worker.build` wrote for comparison, and the mean share of the head's full gradients; None without a head."""
    path = _compared_path(out)
    return read_rows(path), read_json(path.with_suffix(".json"))["head_mean_share"]


def _compared_path(out: Path) -> Path:
    return staging_folder(out) / "compared.safetensors"


def encode_rows(
    encoder: Encoder, examples: Sequence[Example], progress: Progress = ignore_progress, comparison: Comparison | None = None
) -> tuple[dict[str, ArrayGroup], Float32[np.ndarray, " rows"], Float16[np.ndarray, "rows width"] | None]:
    """Compute the arrays of each component, the losses of the examples (nats), and their mean hidden states if the settings include them.

    Rows are coded batch by batch, so that memory holds the whitened rows of one batch only, and those of the comparison.
    """
    count = len(examples)
    writers = {c.name: KINDS[c.kind].writer(c, encoder.arrays, count) for c in encoder.settings.components}
    losses = np.zeros(count, np.float32)
    hidden: np.ndarray | None = None
    comparison = comparison or Comparison()
    meters = () if comparison.head is None else (comparison.head,)
    for batch in encoder.batches(examples, progress, skip_nonfinite=True, meters=meters, coded=not comparison.count):
        comparison.add(batch)
        losses[batch.positions] = batch.losses
        if batch.hidden is not None:
            if hidden is None:
                hidden = np.zeros((count, batch.hidden.shape[1]), np.float16)
            hidden[batch.positions] = batch.hidden.clip(-_LARGEST_HALF, _LARGEST_HALF).astype(np.float16)
        for name, writer in writers.items():
            writer.add(batch.positions, batch.rows[name])
        del batch  # before the next
    return {name: writer.arrays() for name, writer in writers.items()}, losses, hidden


def model_sources(config: BuildConfig) -> tuple[models.ModelSource, ...]:
    """Return the models of a configuration, with the options of their loading."""
    options = config.dtype, config.device, config.trust_remote_code
    return tuple(models.ModelSource(id, revision, *options) for id, revision in zip(config.models, config.revisions, strict=True))


def document_converter(config: BuildConfig, sources: Sequence[models.ModelSource], max_tokens: int | None = None) -> DocumentConverter:
    """Return the document encoder with the first model's tokenizer.

    Raises:
        IncompatibleError: another model has a different tokenizer.
    """
    task = find_task(config.task)
    first, *others = sources
    encoder = task.converter(first, max_tokens, config.long, config.append_eos)
    for other in others:
        try:
            differs = task.converter(other).fingerprint != encoder.fingerprint
        except NotFoundError:
            continue  # a checkpoint without a tokenizer: the vocabulary is compared when it is loaded
        if differs:
            raise IncompatibleError(f"the tokenizer of {other.id} is not that of {first.id}; use models with the same tokenizer")
    return encoder


def absolute(path: str) -> str:
    """Return the absolute path of a local path, for use in any working directory; return a hub id unchanged."""
    return str(Path(path).resolve()) if Path(path).exists() else path
