"""The schema of a row: the components that a configuration and a model give, with their default options."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from torch import nn

from ..indexer.budget import LARGE, Training, allocate, count_tokens
from ..indexer.encoder import EncoderSettings
from ..indexer.layers import NARROWING, describe_layers, find_layers
from ..indexer.models import loaded
from ..indexer.tasks import Task, VocabularyLayer
from ..store.documents import Example
from ..store.errors import UsageError
from ..store.manifest import Component, Curvature, CurvatureKind, DenseComponent, LabelKind, Model, Projection, SparseComponent
from ..store.presets import PRESETS
from .config import BuildConfig, ComponentRole

_BITS = 64
_EKFAC_DAMPING = 0.1  # of texts, as in arXiv 2308.03296
_EKFAC_DAMPING_CLASSES = 1.0  # where labels are all classes by their probability
_UNPROJECTED = 1 << 20  # a rank above all sizes
_FIT_EXAMPLES = 5000
_FIT_SHARE_LARGE = 1 / 16
_FIT_TOKENS_LARGE = 8192
_BLOCKS_OPTIONS = ("layers", "rank", "projection", "curvature")


def candidate_components(config: BuildConfig, task: Task, model: nn.Module, number: int) -> tuple[Component, ...]:
    """Return the components of one model: those that are named, else those that a number of bytes may afford, else the blocks.

    Args:
        number: of the model, from 0.

    Raises:
        UsageError: a named component, layer or kind of labels is not possible with the model.
    """
    roles: tuple[ComponentRole, ...] = config.components or ("blocks",)
    if config.components is None and config.budget is not None:
        layers: dict[ComponentRole, VocabularyLayer | None] = {"head": task.sparse_head(model), "embeddings": task.sparse_embeddings(model)}
        # Embeddings alone say less than the blocks with the small head of a classifier: an LDS of 0.17, not 0.41 (benchmarks/kinds.py).
        with_head = layers["head"] is not None
        roles = (*(role for role, layer in layers.items() if layer is not None and with_head), "blocks")
    return tuple(
        _blocks(config, task, model, number) if role == "blocks" else _vocabulary_layer(config, task, model, number, role) for role in roles
    )


def select_components(
    config: BuildConfig, settings: EncoderSettings, examples: Sequence[Example], models: Sequence[Model]
) -> EncoderSettings:
    """Return the settings with the components and sizes that the budget affords.

    Args:
        examples: a sample of the corpus, whose tokens determine what fits.
    """
    if config.budget is None:
        return settings
    parameters = max(model.parameters for model in models)
    training = known_training(settings.components, models[-1])
    return replace(settings, components=allocate(config.budget, settings.components, count_tokens(examples), parameters, training))


def fit_examples(config: BuildConfig, components: Sequence[Component], models: Sequence[Model], rows: int, tokens: int) -> int:
    """Return the number of examples that projections and curvature are fitted on.

    For the second moments of a large model's layers, a sample of the corpus is as good as all of it (docs/components.md has the figures);
    the eigenvalues of EK-FAC and of the dense Fisher take as many examples as there are.

    Args:
        rows, tokens: of the corpus.
    """
    most = min(config.fit_examples or _FIT_EXAMPLES, rows)
    sampled = config.budget is not None and all(component.curvature.kind == "kfac" for component in components)
    if config.fit_examples or not sampled or max(model.parameters for model in models) < LARGE:
        return most
    return min(most, max(math.ceil(_FIT_SHARE_LARGE * rows), math.ceil(_FIT_TOKENS_LARGE * rows / max(1, tokens))))


def known_training(components: Sequence[Component], model: Model) -> Training:
    """Return what the training of a model changed, as far as its record says."""
    if model.trained is None:
        return "unknown"
    head, embeddings = (
        {name for component in components if component.role == role for name in component.layer_names} for role in ("head", "embeddings")
    )
    trained = set(model.trained)
    if model.base is not None and not trained & (head | embeddings):
        return "adapter"
    if not head:
        return "unknown"
    return "trained head" if trained & head else "frozen head"


def unused_options(config: BuildConfig, components: Sequence[Component]) -> list[str]:
    """Return a sentence about the options of blocks that were given where the budget affords none."""
    defaults = BuildConfig.model_fields
    given = [name for name in _BLOCKS_OPTIONS if getattr(config, name) != defaults[name].default]
    if config.budget is None or not given or any(component.role == "blocks" for component in components):
        return []
    names = " and ".join(component.name for component in components)
    return [f"{' and '.join(given)} had no effect: {config.budget:,} bytes an example afford {names}, and no blocks"]


def component_name(config: BuildConfig, role: str, number: int) -> str:
    """Return a component's name: its role and, with several models, the model's number from 1."""
    return role if len(config.models) == 1 else f"{role}-{number + 1}"


def _blocks(config: BuildConfig, task: Task, model: nn.Module, number: int) -> DenseComponent:
    by_bytes = config.budget is not None
    is_large = sum(p.numel() for p in model.parameters()) >= LARGE
    adapted = by_bytes and is_large and loaded(model).base is not None
    names = find_layers(model, config.layers or ((NARROWING,) if by_bytes and not adapted else ()), task.within_blocks)
    rank = config.rank or (128 if by_bytes else 16)
    labels: LabelKind = "data"
    kind: CurvatureKind = "auto"
    if by_bytes and task.classes(model) is None:
        labels = "sampled" if task.draws_labels else "data"
        kind = "kfac"
    elif by_bytes:
        labels = "expected"
    kind = config.curvature or kind
    layers = describe_layers(task, model, names, rank, kind, config.fit_examples or _FIT_EXAMPLES, explicit=bool(config.layers))
    if config.optimizer:  # whose scales differ between layers with the same input
        layers = tuple(layer.model_copy(update={"input_group": layer.name}) for layer in layers)
    curvature = Curvature(
        kind=kind,
        labels=_labels(config, task, model, labels),
        examples=0,
        tokens=0,
        damping=config.damping or (1.0 if by_bytes and not adapted else 0.1),
    )
    return DenseComponent(
        name=component_name(config, "blocks", number),
        kind="dense",
        model=number,
        weight=1.0,
        coordinates=config.coordinates,
        dtype=config.row_dtype or "float32",
        layers=layers,
        optimizer=config.optimizer,
        unit_length=config.unit_length,
        projection=Projection(kind=config.projection or ("pca" if by_bytes else "random"), rank=rank, seed=config.seed + number),
        curvature=curvature,
    )


def with_rates(components: Sequence[Component], rates: Sequence[float | None]) -> tuple[Component, ...]:
    """Return components of unit length with the learning rates of their checkpoints as weights, relative to the largest.

    Args:
        rates: of the models; where one is not known, all weigh the same.
    """
    known_rates = [rate for rate in rates if rate]
    if len(known_rates) < len(rates):
        return tuple(components)
    return tuple(c.model_copy(update={"weight": known_rates[c.model] / max(known_rates)}) for c in components)


def weight_notes(components: Sequence[Component]) -> list[str]:
    """Return a sentence about checkpoints of unit length that count the same."""
    if len(components) < 2 or len({c.weight for c in components}) > 1 or not all("unit-length" in c.features for c in components):
        return []
    return ["all checkpoints count the same: their learning rates are equal, or one is not recorded"]


def preset_note(config: BuildConfig) -> str:
    """Return a sentence about what the preset of a build with one sets."""
    preset = PRESETS[config.preset]  # type: ignore[index]
    return f"preset {config.preset} ({preset.paper}): {preset.settings({name: getattr(config, name) for name in preset.build})}"


def unprojected_blocks(config: BuildConfig, task: Task, model: nn.Module) -> DenseComponent:
    """Return a component for recomputed rows: all layers inside the blocks, or those that the build named, with EK-FAC, not projected."""
    names = find_layers(model, config.layers, task.within_blocks)
    has_tokens = task.classes(model) is None
    labels: LabelKind = "expected" if not has_tokens else "sampled" if task.draws_labels else "data"
    damping = _EKFAC_DAMPING if has_tokens else _EKFAC_DAMPING_CLASSES
    curvature = Curvature(kind="ekfac", labels=labels, examples=0, tokens=0, damping=damping)
    layers = describe_layers(task, model, names, _UNPROJECTED, "ekfac", _FIT_EXAMPLES, explicit=bool(config.layers))
    return DenseComponent(
        name="blocks",
        kind="dense",
        model=0,
        weight=1.0,
        coordinates=None,
        dtype="float32",
        layers=layers,
        projection=Projection(kind="random", rank=_UNPROJECTED, seed=config.seed),
        curvature=curvature,
    )


def _vocabulary_layer(
    config: BuildConfig, task: Task, model: nn.Module, number: int, role: Literal["head", "embeddings"]
) -> SparseComponent:
    layer = task.sparse_head(model) if role == "head" else task.sparse_embeddings(model)
    if layer is None:
        kind = "output head whose rows" if role == "head" else "embeddings that"
        raise UsageError(f"the model has no {kind} could be keyed by token (task {config.task}); leave {role} out of `components`")
    options = {
        "head": (config.head_bits, config.head_extra_tokens, config.head_max_tokens),
        "embeddings": (config.embedding_bits, 0, config.embedding_max_tokens),
    }
    bits, extra_tokens, max_tokens = options[role]
    return SparseComponent(
        name=component_name(config, role, number),
        kind="sparse",
        model=number,
        weight=1.0,
        role=role,
        layer=layer.name,
        vocabulary=layer.vocabulary,
        width=layer.width,
        bits=bits or _BITS,
        extra_tokens=extra_tokens,
        max_tokens=max_tokens,
        postprocessed=layer.postprocessed,
        seed=config.seed + number,
        curvature=Curvature(
            kind="kfac", labels=_labels(config, task, model, "sampled"), examples=0, tokens=0, damping=config.damping or 1.0
        ),
    )


def _labels(config: BuildConfig, task: Task, model: nn.Module, default: LabelKind) -> LabelKind:
    labels = config.labels or default
    if labels == "margin" and config.components != ("blocks",):
        raise UsageError("`labels` margin is for the blocks alone; give components blocks")
    if labels == "expected" and task.classes(model) is None:
        raise UsageError(f"`labels` expected sums over the classes of an example's one label, which task {config.task} has not")
    if labels == "sampled" and not task.draws_labels:
        raise UsageError(f"`labels` sampled draws labels from the model's distribution, and the loss of task {config.task} takes no seed")
    return labels
