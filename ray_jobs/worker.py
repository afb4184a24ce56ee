"""A worker: loads its models once, then measures parts of the fitting sample and builds whole shards.

Every method is a function of its arguments and the models alone, so that a task can be given again to any worker after one died, and gives
the same bytes. The same class runs in the driver's process (`--workers 1`) and as a Ray actor.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float16, Float32
from torch import nn

from ..indexer import models
from ..indexer.curvature import Arrays
from ..indexer.encoder import Encoder, EncoderPlan, Progress, backward, batches, ignore_progress
from ..indexer.examples import DocumentEncoder
from ..indexer.fit import Fit
from ..indexer.layers import NARROWING, find_layers, plan_layers
from ..indexer.sparse import HeadMean, SparsePart
from ..indexer.tasks import Task, find_task
from ..store.arrays import ArrayGroup
from ..store.dense import encode_dense
from ..store.documents import Documents, Example
from ..store.errors import IncompatibleError, NotFoundError, UsageError
from ..store.index import dense_reduction
from ..store.manifest import Curvature, DenseComponent, LabelKind, Model, Projection, SparseComponent
from ..store.shard import Shard, documents_path, is_whole, shard_entry, write_shard
from ..store.sparse import Coded, SparseVectors, code, encode_sparse, join
from .config import BuildConfig
from .corpus import ShardPlan

_MEAN_TOKENS = 4096
_LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class AboutModel:
    """What a build says of a model.

    Attributes:
        parameters: of each, the modules that own it, its name there, and its size.
        trained: of an adapter, the modules that it changed; None for other models, all of which is taken as trained.
        notes: what whoever reads the answers should know.
    """

    parameters: tuple[tuple[tuple[str, ...], str, int], ...]
    trained: frozenset[str] | None
    notes: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module) -> "AboutModel":
        """Of a model as it was loaded."""
        owners: dict[int, list[str]] = {}
        found: dict[int, tuple[str, int]] = {}
        for module_name, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                owners.setdefault(id(parameter), []).append(module_name)
                found[id(parameter)] = name, parameter.numel()
        about = models.loaded(model)
        return cls(tuple((tuple(owners[key]), *found[key]) for key in found), about.trained, about.notes)


class Worker:
    """Works for one build.

    Args:
        config: the build's; with one thread (the default) rows are the same bits whatever the number of workers.
        bases: of models that are adapters, where the models lie that they are merged into, if not where they say themselves.
    """

    def __init__(self, config: BuildConfig, bases: Sequence[str | None] = ()) -> None:
        self._config, self._bases = config, bases
        self._encoders: dict[str, Encoder] = {}

    @cached_property
    def task(self) -> Task:
        """What the models are asked."""
        return find_task(self._config.task)

    @cached_property
    def models(self) -> tuple[nn.Module, ...]:
        """The models, loaded when first needed (so that failing to load is this task's error)."""
        import torch

        models.keep_freed_memory()
        torch.set_num_threads(self._config.threads)
        return tuple(self.task.load(source).requires_grad_(False) for source in model_sources(self._config, self._bases))

    def describe(self) -> tuple[tuple[Model, ...], EncoderPlan, tuple[AboutModel, ...]]:
        """What the models are, the plan of their encoder before any fit, and what is to be said of the models.

        Raises:
            UsageError: no layer matches, or one of the matching ones does not run.
            IncompatibleError: one of several models does not read the same tokens.
        """
        c, descriptions, components = self._config, list[Model](), list[DenseComponent | SparseComponent]()
        sizes = [(self.task.sparse_embeddings(model) or ("", 0))[1] for model in self.models]
        for number, (source, model) in enumerate(zip(model_sources(c), self.models, strict=True)):
            if sizes[number] != sizes[0]:
                raise IncompatibleError(
                    f"{source.id} embeds {sizes[number]} tokens, {c.models[0]} {sizes[0]}; models of an index read the same"
                )
            models.refuse_zero_weights(model, source.id)
            descriptions.append(
                Model(
                    id=absolute(source.id),
                    revision=getattr(getattr(model, "config", None), "_commit_hash", None) or source.revision,
                    dtype=c.dtype,
                    fingerprint=models.model_fingerprint(model),
                    architecture=type(model).__name__,
                    parameters=sum(p.numel() for p in model.parameters()),
                    context=self.task.context(model),
                    base=models.loaded(model).base,
                )
            )
            names = c.components or self._available(model)
            components += [self._blocks(number) if name == "blocks" else self._sparse(name, number) for name in names]
        device = next(self.models[0].parameters()).device.type
        plan = EncoderPlan(tuple(components), c.batch_tokens or self.task.batch_tokens.get(device, self.task.batch_tokens["cpu"]), c.hidden)
        return tuple(descriptions), plan, tuple(AboutModel.of(model) for model in self.models)

    def vocabulary(self) -> int | None:
        """How many tokens all the models embed; None where there are no tokens."""
        known = [models.vocabulary_size(model) for model in self.models if hasattr(model, "get_input_embeddings")]
        return min(known, default=None) if self.task.form != "vector" else None

    def _available(self, model: nn.Module) -> tuple[str, ...]:
        """The components of a build that names none."""
        if self._config.budget is None:
            return ("blocks",)
        found = {"head": self.task.sparse_head(model), "embeddings": self.task.sparse_embeddings(model)}
        return (*(name for name, layer in found.items() if layer is not None), "blocks")

    def _blocks(self, number: int) -> DenseComponent:
        c, small, model = self._config, self._config.budget is not None, self.models[number]
        names = find_layers(model, c.layers or ((NARROWING,) if small else ()), self.task.within_blocks)
        rank, kind = c.rank or (128 if small else 16), c.projection or ("pca" if small else "random")
        layers = plan_layers(self.task, model, names, rank, c.curvature, c.fit_examples, explicit=bool(c.layers))
        damping = c.damping or (1.0 if small else 0.1)
        labels: LabelKind = "data" if not small else "sampled" if self.task.classes(model) is None else "expected"
        return DenseComponent(
            name=self._name("blocks", number),
            kind="dense",
            model=number,
            weight=1.0,
            coordinates=c.coordinates,
            dtype=c.row_dtype or "float32",
            layers=layers,
            projection=Projection(kind=kind, rank=rank, seed=c.seed + number),
            curvature=Curvature(kind=c.curvature, labels=self._labels(labels), examples=0, tokens=0, damping=damping),
        )

    def _labels(self, default: LabelKind) -> LabelKind:
        chosen = self._config.labels or default
        if chosen == "expected" and self.task.classes(self.models[0]) is None:
            raise UsageError(f"`labels` expected sums over the classes of an example's one label, which task {self._config.task} has not")
        return chosen

    def _sparse(self, role: Any, number: int) -> SparseComponent:
        c, task, model = self._config, self.task, self.models[number]
        found = task.sparse_head(model) if role == "head" else task.sparse_embeddings(model)
        if found is None:
            what = "output head whose rows" if role == "head" else "embeddings that"
            raise UsageError(f"the model has no {what} could be keyed by token (task {c.task}); leave {role} out of `components`")
        layer, vocabulary, width, *tail = found
        head = role == "head"
        return SparseComponent(
            name=self._name(role, number),
            kind="sparse",
            model=number,
            weight=1.0,
            role=role,
            layer=layer,
            vocabulary=vocabulary,
            width=width,
            bits=(c.head_bits if head else c.embedding_bits) or 64,
            others=c.head_others if head else 0,
            keys=c.head_keys if head else c.embedding_keys,
            tail=any(tail),
            seed=c.seed + number,
            curvature=Curvature(kind="kfac", labels=self._labels("sampled"), examples=0, tokens=0, damping=c.damping or 1.0),
        )

    def measure(
        self,
        plan: EncoderPlan,
        arrays: Arrays,
        step: int,
        parts: Sequence[tuple[str, int, Sequence[int]]],
        progress: Progress = ignore_progress,
    ) -> Arrays:
        """The sums of a fitting pass over some examples.

        Args:
            parts: (shard id, its rows, which of them) for every shard that the examples come from.
        """
        examples = [e for id, rows, chosen in parts for e in self._examples(id, rows, chosen)]
        return Fit(plan).measure(self._encoder(plan, arrays, f"pass {step}"), step, examples, progress)

    def build(self, plan: EncoderPlan, arrays: Arrays, shard: ShardPlan, progress: Progress = ignore_progress) -> Shard:
        """Write one shard's rows, unless they lie there whole already, and return its entry."""
        out = Path(self._config.out)
        if is_whole(out, shard.id, shard.rows, plan.components):
            progress(shard.rows, shard.tokens)
        else:
            examples = self._examples(shard.id, shard.rows, range(shard.rows))
            write_shard(out, shard.id, *encode_rows(self._encoder(plan, arrays, "rows"), examples, progress))
        return shard_entry(out, shard.id, shard.first, shard.rows, shard.tokens, plan.components)

    def exact_rows(
        self, plan: EncoderPlan, arrays: Arrays, shard: ShardPlan, count: int, progress: Progress = ignore_progress
    ) -> tuple[dict[str, np.ndarray | SparseVectors], float | None]:
        """The first rows of a shard as they were before tokens or coordinates were left out and coded, by component; and the share of a
        mean in the last model's head's whole gradients (see `HeadMean`).
        """
        whole = tuple(s.model_copy(update={"keys": None}) if isinstance(s, SparseComponent) else s for s in plan.components)
        encoder = Encoder(self.task, self.models, replace(plan, components=whole), arrays)
        examples = self._examples(shard.id, shard.rows, range(count))
        head = encoder.parts.get(self._name("head", len(self.models) - 1))
        if not isinstance(head, SparsePart):
            return encoder.rows(examples, progress=progress, tolerant=True), None
        mean = HeadMean(head, _MEAN_TOKENS)
        for _, batch in batches(self.task, (encoder.model,), examples, plan.batch_tokens):
            backward(encoder.model, batch, [mean], self.task.loss, tolerant=True)
        return encoder.rows(examples, progress=progress, tolerant=True), mean.mean_share

    def _name(self, part: str, number: int) -> str:
        """A component's name: its part and, of several models, which one."""
        return part if len(self._config.models) == 1 else f"{part}-{number + 1}"

    def pid(self) -> int:
        """The process that this worker runs in."""
        return os.getpid()

    def _examples(self, shard: str, rows: int, chosen: Sequence[int]) -> list[Example]:
        documents = Documents(documents_path(Path(self._config.out), shard), rows)
        return [documents[i] for i in chosen]

    def _encoder(self, plan: EncoderPlan, arrays: Arrays, stage: str) -> Encoder:
        if stage not in self._encoders:
            self._encoders = {stage: Encoder(self.task, self.models, plan, arrays)}
        return self._encoders[stage]


def encode_rows(
    encoder: Encoder, examples: Sequence[Example], progress: Progress = ignore_progress
) -> tuple[dict[str, ArrayGroup], Float32[np.ndarray, " rows"], Float16[np.ndarray, "rows width"] | None]:
    """The arrays of each component of a shard of these examples, their losses (nats), and perhaps their mean hidden states.

    Rows are reduced and sparse rows coded batch by batch, so that whole vectors never pile up.
    """
    components = encoder.plan.components
    reductions = {c.name: dense_reduction(c, encoder.arrays) for c in components if isinstance(c, DenseComponent)}
    dense = {c.name: np.zeros((len(examples), c.stored), np.float32) for c in components if isinstance(c, DenseComponent)}
    coded: dict[str, list[tuple[list[int], Coded]]] = {c.name: [] for c in components if isinstance(c, SparseComponent)}
    losses = np.zeros(len(examples), np.float32)
    hidden: np.ndarray | None = None
    for positions, rows in encoder.batches(examples, progress, tolerant=True):
        losses[positions] = np.asarray(rows["losses"])
        if encoder.plan.hidden:
            means = np.asarray(rows["hidden"]).clip(-_LARGEST_HALF, _LARGEST_HALF).astype(np.float16)
            hidden = np.zeros((len(examples), means.shape[1]), np.float16) if hidden is None else hidden
            hidden[positions] = means
        for component in components:
            block = rows[component.name]
            if isinstance(component, SparseComponent):
                assert isinstance(block, SparseVectors)
                coded[component.name].append((positions, code(block, component.bits, component.seed)))
            else:
                reduced = reductions[component.name].apply(block)  # type: ignore[arg-type]
                if dense[component.name].dtype != reduced.dtype:
                    dense[component.name] = dense[component.name].astype(reduced.dtype)
                dense[component.name][positions] = reduced
    groups = {
        c.name: encode_sparse(join(coded[c.name]), c.vocabulary, c.bits)
        if isinstance(c, SparseComponent)
        else encode_dense(dense[c.name], c.dtype)
        for c in components
    }
    return groups, losses, hidden


def model_sources(config: BuildConfig, bases: Sequence[str | None] = ()) -> tuple[models.ModelSource, ...]:
    """Which models a build loads, and how; `bases` as in `Worker`."""
    how = config.dtype, config.device, config.trust_remote_code
    places = zip(config.models, config.revisions, bases or [None] * len(config.models), strict=True)
    return tuple(models.ModelSource(id, revision, *how, base) for id, revision, base in places)


def document_encoder(config: BuildConfig, max_tokens: int | None = None, bases: Sequence[str | None] = ()) -> DocumentEncoder:
    """What turns the corpus into examples: the first model's tokenizer, which must be that of the others too, where these have one.

    Raises:
        IncompatibleError: two models have tokenizers that differ.
    """
    task, (first, *others) = find_task(config.task), model_sources(config, bases)
    encoder = task.encoder(first, max_tokens, config.long, config.append_eos)
    for other in others:
        try:
            differs = task.encoder(other).fingerprint != encoder.fingerprint
        except NotFoundError:
            continue  # checkpoints are often saved without one; the size of the vocabulary is compared when they are loaded
        if differs:
            raise IncompatibleError(f"the tokenizer of {other.id} is not that of {first.id}; the models of an index read the same tokens")
    return encoder


def absolute(path: str) -> str:
    """A local path made absolute, so that it means the same in any working directory; a hub id as it is."""
    return str(Path(path).resolve()) if Path(path).exists() else path
