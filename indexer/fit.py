"""Fitting projections and curvature: passes over a sample, each a sum that any split of the sample adds up to.

A step is `measure` (on parts of the sample, anywhere) -> `add_sums` -> `finish` (once), which returns the encoder's next arrays. A
component needs one step or more (PCA where it is asked for, then the passes that its curvature declares); components of one model whose
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
from ..store.manifest import DenseComponent, Layer, SparseComponent
from . import sparse
from .capture import GradientSum, Map
from .curvature import GRADIENT_STATISTICS, STRATEGIES, TOKEN_STATISTICS, Arrays, Sums, whitening_scale
from .dense import DensePart, key
from .encoder import Encoder, EncoderPlan, Objective, Progress, backward, batches, ignore_progress
from .projection import principal_projection
from .tasks import Batch, Task

_PCA = ("input_covariance", "output_covariance")
Component = DenseComponent | SparseComponent


class Meter(Protocol):
    """Sums a component's statistics, batch by batch."""

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
    """The steps that an encoder's arrays need; labels that are sampled from the model are seeded by the component's seed."""

    plan: EncoderPlan

    @property
    def steps(self) -> list[list[tuple[Component, int]]]:
        """The components of each step, and the pass that each is in."""
        steps: dict[tuple[int, int, int | None, bool], list[tuple[Component, int]]] = {}
        for component in self.plan.components:
            for number in range(_passes(component)):
                at = (number, component.model, _label_seed(component), component.curvature.labels == "expected")
                steps.setdefault(at, []).append((component, number))
        return [steps[at] for at in sorted(steps, key=lambda at: (at[0], at[1], at[2] is not None, at[3]))]

    def measure(self, encoder: Encoder, step: int, examples: Sequence[Example], progress: Progress = ignore_progress) -> Arrays:
        """The sums of a step over some examples.

        Args:
            encoder: this plan's, with the arrays of the steps before.

        Returns:
            `<component>/<layer or input group>/<statistic>` -> float64 array, and `examples` and `tokens` counted beside them.
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
        for component, number in self.steps[step]:
            own = {at.removeprefix(f"{component.name}/"): v for at, v in totals.items() if at.startswith(f"{component.name}/")}
            if isinstance(component, SparseComponent):
                statistics = {name: _finite(own.get(name), name, component.layer) for name in sparse.STATISTICS}
                found = sparse.finish(statistics, examples)
            else:
                found = _finish_dense(component, number, own, examples)
            made |= {f"{component.name}/{name}": array for name, array in found.items()}
            if isinstance(component, DenseComponent) and component.coordinates and number == _passes(component) - 1:
                made |= _kept(component, made)
        return made


def _weighted_loss(task: Task, model: nn.Module, batch: Batch, label: int) -> Float[Tensor, " batch"]:
    """The loss for a label, times the square root of the probability that the model gives it: squares of gradients, summed over all labels,
    are then their expectation under the model.
    """
    losses = task.loss(model, replace(batch, targets=torch.full_like(batch.targets, label)))
    return losses * torch.exp(-losses.detach() / 2)


def _passes(component: Component) -> int:
    if isinstance(component, SparseComponent):
        return 1
    return _pca(component) + max(len(STRATEGIES[layer.curvature].passes) for layer in component.layers)


def _label_seed(component: Component) -> int | None:
    """The seed of sampled labels; None where the data's are used, or a closed form needs none."""
    if component.curvature.labels != "sampled" or (
        isinstance(component, SparseComponent) and component.role == "head" and not component.tail
    ):
        return None
    return component.seed if isinstance(component, SparseComponent) else component.projection.seed


def _meter(component: Component, number: int, encoder: Encoder) -> Meter:
    if isinstance(component, SparseComponent):
        return sparse.SparseMeter(component)
    part = encoder.parts[component.name]
    assert isinstance(part, DensePart)
    return DenseMeter(component, number, part)


class DenseMeter:
    """Sums a dense component's statistics; those of a shared input are summed by the group's first layer alone."""

    def __init__(self, component: DenseComponent, number: int, part: DensePart) -> None:
        self._computed: dict[str, set[str]] = {layer.name: set() for layer in component.layers}
        for layer in component.layers:
            for statistic in _wanted(component, number, layer):
                self._computed[_owner(layer, statistic)].add(statistic)
        self.layers: Sequence[Layer] = tuple(layer for layer in component.layers if self._computed[layer.name])
        whole = number < _pca(component)
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


def _finish_dense(component: DenseComponent, number: int, totals: Mapping[str, np.ndarray], examples: int) -> Arrays:
    made: Arrays = {}
    for layer in component.layers:
        wanted = _wanted(component, number, layer)
        statistics = {s: _finite(totals.get(f"{_owner(layer, s)}/{s}"), s, layer.name) for s in wanted}
        if number < _pca(component):
            found = {
                "input_projection": principal_projection(statistics["input_covariance"], layer.input_rank),
                "output_projection": principal_projection(statistics["output_covariance"], layer.output_rank),
            }
            made |= {key(_owner(layer, name), name): array for name, array in found.items() if array is not None}
        elif statistics:
            arrays = STRATEGIES[layer.curvature].finish[number - _pca(component)](Sums(statistics, examples))
            made |= {key(_owner(layer, name), name): array for name, array in arrays.items()}
    return made


def _kept(component: DenseComponent, arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Which coordinates a reduced component keeps: those of most energy, as many as make the best estimate of all scores.

    A coordinate of eigenvalue l has the energy e = l / (l + a). Were coordinates independent, the scores between rows would have the
    variance sum e^2, and those of the kept ones, from m random projections (or their signs: c = pi / 2, without them c = 1), the variance
    sum e^2 + c (sum e)^2 / m about zero. What is kept maximises the correlation of the two. Where energy is spread out that is everything,
    where it falls off steeply it is less than could be stored.
    """
    spectra = [arrays.get(f"{component.name}/{key(layer.name, 'eigenvalues')}") for layer in component.layers]
    if any(values is None for values in spectra):
        return {}
    whitened = [values * whitening_scale(values, component.curvature.damping) ** 2 for values in spectra if values is not None]
    energy = np.concatenate(whitened)
    order = np.argsort(-energy, kind="stable")
    signal, total = np.cumsum(energy[order] ** 2), np.cumsum(energy[order])
    count, one_bit = np.arange(1, len(energy) + 1), component.dtype == "1bit"
    loss = np.where(count > component.stored, np.pi / 2 if one_bit else 1.0, np.pi / 2 if one_bit else 0.0)
    fidelity = signal**2 / np.maximum(signal + loss * total**2 / component.stored, np.finfo(np.float64).tiny)
    best = max(int(np.argmax(fidelity)) + 1, 1 if one_bit else component.stored)
    return {} if best == len(energy) else {f"{component.name}/kept": np.sort(order[:best])}


def _finite(value: np.ndarray | None, statistic: str, layer: str) -> np.ndarray:
    if value is None or not np.isfinite(value).all():
        raise NumericalError(
            f"the {statistic} of layer {layer} is {'missing: no gradient reaches it' if value is None else 'not finite'}; "
            "leave the layer out with --layers, try --dtype float32, or look for broken weights"
        )
    return value


def _wanted(component: DenseComponent, number: int, layer: Layer) -> tuple[str, ...]:
    if number < _pca(component):
        return _PCA
    passes = STRATEGIES[layer.curvature].passes
    return passes[number - _pca(component)] if number - _pca(component) < len(passes) else ()


def _pca(component: DenseComponent) -> int:
    return 1 if component.projection.kind == "pca" else 0


def _owner(layer: Layer, name: str) -> str:
    """Whose a statistic or an array is: what concerns inputs belongs to all layers that share the input."""
    return layer.input_group if name.startswith("input_") else layer.name


def with_known_sample(plan: EncoderPlan, examples: int) -> EncoderPlan:
    """The plan with each dense layer's curvature chosen for the sample that there really is."""
    from .curvature import choose_curvature

    components: list[Component] = []
    for component in plan.components:
        if isinstance(component, DenseComponent):
            kinds = [choose_curvature(component.curvature.kind, layer.size, examples) for layer in component.layers]
            layers = tuple(n.model_copy(update={"curvature": k}) for n, k in zip(component.layers, kinds, strict=True))
            components.append(component.model_copy(update={"layers": layers}))
        else:
            components.append(component)
    return replace(plan, components=tuple(components))
