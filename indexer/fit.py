"""Fitting projections and curvature: passes over a sample, each a sum that any split of the sample adds up to.

A step is `measure` (on parts of the sample, anywhere) -> `add_sums` -> `finish` (once), which returns the encoder's next arrays. A segment
needs one step or more (PCA where it is asked for, then the passes that its curvature declares); segments of one model whose
steps ask the same labels share them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..store.documents import Example
from ..store.errors import NumericalError
from ..store.manifest import DenseSegment, KeyedSegment, Layer
from . import keyed
from .capture import GradientSum, Map
from .curvature import GRADIENT_STATISTICS, STRATEGIES, TOKEN_STATISTICS, Arrays, Sums, whitening_scale
from .dense import DensePart, key
from .encoder import Encoder, EncoderPlan, Objective, Progress, backward, batches, ignore_progress
from .projection import principal_projection
from .tasks import Batch, Task

_PCA = ("input_covariance", "output_covariance")
Segment = DenseSegment | KeyedSegment


class Meter(Protocol):
    """Sums a segment's statistics, batch by batch."""

    layers: Sequence[Layer]
    maps: Mapping[str, tuple[Map, Map]]
    sums: dict[str, Tensor]

    def begin(self, batch: Batch) -> None:
        """The batch that comes next."""

    def __call__(self, layer: Layer, x: Float[Tensor, "batch tokens in_rank"], d: Float[Tensor, "batch tokens out_rank"]) -> None:
        """One call of one layer."""

    def end(self) -> None:
        """The batch is over."""


@dataclass(frozen=True)
class Fit:
    """The steps that an encoder's arrays need; labels that are sampled from the model are seeded by the segment's seed."""

    plan: EncoderPlan

    @property
    def steps(self) -> list[list[tuple[Segment, int]]]:
        """The segments of each step, and the pass that each is in."""
        steps: dict[tuple[int, int, int | None, bool], list[tuple[Segment, int]]] = {}
        for segment in self.plan.segments:
            for number in range(_passes(segment)):
                at = (number, segment.model, _label_seed(segment), segment.curvature.labels == "expected")
                steps.setdefault(at, []).append((segment, number))
        return [steps[at] for at in sorted(steps, key=lambda at: (at[0], at[1], at[2] is not None, at[3]))]

    def measure(self, encoder: Encoder, step: int, examples: Sequence[Example], progress: Progress = ignore_progress) -> Arrays:
        """The sums of a step over some examples.

        Args:
            encoder: this plan's, with the arrays of the steps before.

        Returns:
            `<segment>/<layer or input group>/<statistic>` -> float64 array, and `examples` and `tokens` counted beside them.
        """
        members = self.steps[step]
        meters: dict[str, Meter] = {s.name: _meter(s, number, encoder) for s, number in members}
        labels, seed = members[0][0].curvature.labels, _label_seed(members[0][0])
        model = encoder.models[members[0][0].model]
        classes = encoder.task.classes(model) if labels == "expected" else None
        objectives: list[Objective] = [partial(encoder.task.loss, sample_seed=seed)]
        if classes is not None:
            objectives = [partial(_weighted_loss, encoder.task, label=label) for label in range(classes)]
        counts = {"examples": 0, "tokens": 0}
        for chosen, batch in batches(encoder.task, (model,), examples, self.plan.batch_tokens):
            whole = torch.ones(len(chosen), dtype=torch.bool)
            for objective in objectives:
                for meter in meters.values():
                    meter.begin(batch)
                whole &= torch.isfinite(backward(model, batch, list(meters.values()), objective, tolerant=True).cpu())
                for meter in meters.values():
                    meter.end()
            counts["examples"] += int(whole.sum())
            counts["tokens"] += int(batch.valid[whole.to(batch.valid.device)].sum())
            progress(len(chosen), int(batch.valid.sum()))
        arrays = {f"{name}/{at}": v.to("cpu", torch.float64).numpy() for name, meter in meters.items() for at, v in meter.sums.items()}
        return arrays | {name: np.array(float(count)) for name, count in counts.items()}

    def finish(self, step: int, arrays: Arrays, totals: Arrays) -> Arrays:
        """The encoder's arrays after a step, from those before it and its merged sums.

        Raises:
            NumericalError: a statistic is not finite; names the layer. Or no example has a finite loss and gradient.
        """
        made, examples = dict(arrays), int(totals["examples"])
        if examples == 0:
            raise NumericalError("no example's loss and gradient are finite under this model; try float32, or look for broken weights")
        for segment, number in self.steps[step]:
            own = {at.removeprefix(f"{segment.name}/"): v for at, v in totals.items() if at.startswith(f"{segment.name}/")}
            if isinstance(segment, KeyedSegment):
                statistics = {name: _finite(own.get(name), name, segment.layer) for name in keyed.STATISTICS}
                found = keyed.finish(statistics, examples)
            else:
                found = _finish_dense(segment, number, own, examples)
            made |= {f"{segment.name}/{name}": array for name, array in found.items()}
            if isinstance(segment, DenseSegment) and segment.coordinates and number == _passes(segment) - 1:
                made |= _kept(segment, made)
        return made


def _weighted_loss(task: Task, model: nn.Module, batch: Batch, label: int) -> Float[Tensor, " batch"]:
    """The loss for a label, times the square root of the probability that the model gives it: squares of gradients, summed over all labels,
    are then their expectation under the model.
    """
    losses = task.loss(model, replace(batch, targets=torch.full_like(batch.targets, label)))
    return losses * torch.exp(-losses.detach() / 2)


def _passes(segment: Segment) -> int:
    if isinstance(segment, KeyedSegment):
        return 1
    return _pca(segment) + max(len(STRATEGIES[layer.curvature].passes) for layer in segment.layers)


def _label_seed(segment: Segment) -> int | None:
    """The seed of sampled labels; None where the data's are used, or a closed form needs none."""
    if segment.curvature.labels != "sampled" or (isinstance(segment, KeyedSegment) and segment.role == "head" and not segment.tail):
        return None
    return segment.seed if isinstance(segment, KeyedSegment) else segment.projection.seed


def _meter(segment: Segment, number: int, encoder: Encoder) -> Meter:
    if isinstance(segment, KeyedSegment):
        return keyed.KeyedMeter(segment)
    part = encoder.parts[segment.name]
    assert isinstance(part, DensePart)
    return DenseMeter(segment, number, part)


class DenseMeter:
    """Sums a dense segment's statistics; those of a shared input are summed by the group's first layer alone."""

    def __init__(self, segment: DenseSegment, number: int, part: DensePart) -> None:
        self._computed: dict[str, set[str]] = {layer.name: set() for layer in segment.layers}
        for layer in segment.layers:
            for statistic in _wanted(segment, number, layer):
                self._computed[_owner(layer, statistic)].add(statistic)
        self.layers: Sequence[Layer] = tuple(layer for layer in segment.layers if self._computed[layer.name])
        whole = number < _pca(segment)
        self.maps: Mapping[str, tuple[Map, Map]] = {n.name: (None, None) if whole else part.maps[n.name] for n in self.layers}
        self.sums: dict[str, Tensor] = {}

    def begin(self, batch: Batch) -> None:
        """See `Meter`."""
        self._gradients, self._valid = GradientSum(), batch.valid

    def __call__(self, layer: Layer, x: Float[Tensor, "batch tokens in_rank"], d: Float[Tensor, "batch tokens out_rank"]) -> None:
        """See `Meter`."""
        for statistic in self._computed[layer.name]:
            if statistic in TOKEN_STATISTICS:
                self._add(layer, statistic, TOKEN_STATISTICS[statistic](x, d, self._valid.to(x)))
        if any(s in GRADIENT_STATISTICS for s in self._computed[layer.name]):
            self._gradients(layer, x, d)

    def end(self) -> None:
        """See `Meter`."""
        for layer in self.layers:
            for statistic in self._computed[layer.name]:
                if statistic in GRADIENT_STATISTICS and layer.name in self._gradients.by_layer:
                    self._add(layer, statistic, GRADIENT_STATISTICS[statistic](self._gradients.by_layer[layer.name]))

    def _add(self, layer: Layer, statistic: str, value: Tensor) -> None:
        at = f"{layer.name}/{statistic}"
        self.sums[at] = value.double() if at not in self.sums else self.sums[at].add_(value)


def _finish_dense(segment: DenseSegment, number: int, totals: Mapping[str, np.ndarray], examples: int) -> Arrays:
    made: Arrays = {}
    for layer in segment.layers:
        wanted = _wanted(segment, number, layer)
        statistics = {s: _finite(totals.get(f"{_owner(layer, s)}/{s}"), s, layer.name) for s in wanted}
        if number < _pca(segment):
            found = {
                "input_projection": principal_projection(statistics["input_covariance"], layer.input_rank),
                "output_projection": principal_projection(statistics["output_covariance"], layer.output_rank),
            }
            made |= {key(_owner(layer, name), name): array for name, array in found.items() if array is not None}
        elif statistics:
            arrays = STRATEGIES[layer.curvature].finish[number - _pca(segment)](Sums(statistics, examples))
            made |= {key(_owner(layer, name), name): array for name, array in arrays.items()}
    return made


def _kept(segment: DenseSegment, arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Which coordinates a reduced segment keeps: those of most energy, as many as make the best estimate of all scores.

    A coordinate of eigenvalue l has the energy e = l / (l + a). Were coordinates independent, the scores between rows would have the
    variance sum e^2, and those of the kept ones, from m random projections (or their signs: c = pi / 2, without them c = 1), the variance
    sum e^2 + c (sum e)^2 / m about zero. What is kept maximises the correlation of the two. Where energy is spread out that is everything,
    where it falls off steeply it is less than could be stored.
    """
    spectra = [arrays.get(f"{segment.name}/{key(layer.name, 'eigenvalues')}") for layer in segment.layers]
    if any(values is None for values in spectra):
        return {}
    whitened = [values * whitening_scale(values, segment.curvature.damping) ** 2 for values in spectra if values is not None]
    energy = np.concatenate(whitened)
    order = np.argsort(-energy, kind="stable")
    signal, total = np.cumsum(energy[order] ** 2), np.cumsum(energy[order])
    count, one_bit = np.arange(1, len(energy) + 1), segment.dtype == "1bit"
    loss = np.where(count > segment.stored, np.pi / 2 if one_bit else 1.0, np.pi / 2 if one_bit else 0.0)
    fidelity = signal**2 / np.maximum(signal + loss * total**2 / segment.stored, np.finfo(np.float64).tiny)
    best = max(int(np.argmax(fidelity)) + 1, 1 if one_bit else segment.stored)
    return {} if best == len(energy) else {f"{segment.name}/kept": np.sort(order[:best])}


def _finite(value: np.ndarray | None, statistic: str, layer: str) -> np.ndarray:
    if value is None or not np.isfinite(value).all():
        raise NumericalError(
            f"the {statistic} of layer {layer} is {'missing: no gradient reaches it' if value is None else 'not finite'}; "
            "leave the layer out with --layers, try --dtype float32, or look for broken weights"
        )
    return value


def _wanted(segment: DenseSegment, number: int, layer: Layer) -> tuple[str, ...]:
    if number < _pca(segment):
        return _PCA
    passes = STRATEGIES[layer.curvature].passes
    return passes[number - _pca(segment)] if number - _pca(segment) < len(passes) else ()


def _pca(segment: DenseSegment) -> int:
    return 1 if segment.projection.kind == "pca" else 0


def _owner(layer: Layer, name: str) -> str:
    """Whose a statistic or an array is: what concerns inputs belongs to all layers that share the input."""
    return layer.input_group if name.startswith("input_") else layer.name


def with_known_sample(plan: EncoderPlan, examples: int) -> EncoderPlan:
    """The plan with each dense layer's curvature chosen for the sample that there really is."""
    from .curvature import choose_curvature

    segments: list[Segment] = []
    for segment in plan.segments:
        if isinstance(segment, DenseSegment):
            kinds = [choose_curvature(segment.curvature.kind, layer.size, examples) for layer in segment.layers]
            layers = tuple(n.model_copy(update={"curvature": k}) for n, k in zip(segment.layers, kinds, strict=True))
            segments.append(segment.model_copy(update={"layers": layers}))
        else:
            segments.append(segment)
    return replace(plan, segments=tuple(segments))
