"""Fitting of projections and curvature: passes over a sample, each a sum that can be split over parts of the sample.

A step is `measure` (on parts of the sample, anywhere) -> `add_sums` -> `finish` (once), which returns the encoder's next arrays. A
component needs one or more steps (PCA if configured, then the passes that its curvature declares); components of one model share the steps
that use the same labels.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ..store.documents import Example
from ..store.errors import NumericalError
from ..store.manifest import Component, DenseComponent, Layer, SparseComponent
from ..store.shapes import Float, Float32, Float64
from . import sparse
from .batches import Batch
from .capture import GradientSum, Map, OutputGradient
from .curvature import COUNTS, GRADIENT_STATISTICS, MOMENTS, STRATEGIES, Arrays, choose_curvature, second_moment, whitening_scale
from .encoder import Encoder, EncoderSettings, Progress, StatisticsVisitor, backward, ignore_progress
from .projection import principal_components, principal_projection, sketch_matrix
from .tasks import Objective

_PCA = ("input_covariance", "output_covariance")


@runtime_checkable
class StatisticsMeter(StatisticsVisitor, Protocol):
    """Statistics visitor of a component, with its sums."""

    sums: dict[str, Tensor]


@runtime_checkable
class ComponentFit(Protocol):
    """Fit of a kind of component: its passes and statistics.

    Attributes:
        passes: number of passes over the sample.
        label_seed: seed of labels that are sampled from the model; None for the data's labels.
        any_labels: the statistics do not depend on labels.
    """

    passes: int
    label_seed: int | None
    any_labels: bool

    def meter(self, number: int, encoder: Encoder) -> StatisticsMeter:
        """Create the sums of a pass."""

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Groups of layers that are finished together, since they have the same input, with the prefixes of their sums' names."""

    def finish(self, number: int, group: str, sums: Mapping[str, np.ndarray], examples: int) -> Arrays:
        """Compute the arrays of a group of layers after a pass, from their sums.

        Raises:
            NumericalError: a statistic is not finite or missing; names the layer.
        """

    def complete(self, number: int, arrays: Mapping[str, np.ndarray]) -> Arrays:
        """Compute the arrays of a component that need those of all its layers, after a pass."""

    def with_sample(self, examples: int) -> Component:
        """Return the component with its curvature selected for the actual number of examples."""


@dataclass(frozen=True)
class Fit:
    """Steps that fit an encoder's arrays."""

    settings: EncoderSettings

    @property
    def steps(self) -> list[list[tuple[Component, int]]]:
        """The components of each step, each with the number of its pass."""
        steps: dict[tuple[int, int, int | None, str], list[tuple[Component, int]]] = {}
        for component in sorted(self.settings.components, key=lambda c: component_fit(c).any_labels):
            fit = component_fit(component)
            for number in range(fit.passes):
                labels = component.curvature.labels
                by_label: str = labels if labels in ("expected", "margin") else ""
                order = (number, component.model, fit.label_seed, by_label)
                if fit.any_labels:
                    order = next((other for other in steps if other[:2] == order[:2] and not other[3]), order)
                steps.setdefault(order, []).append((component, number))
        return [steps[o] for o in sorted(steps, key=lambda o: (o[0], o[1], o[2] is not None, o[3]))]

    def sum_statistics(self, encoder: Encoder, step: int, examples: Sequence[Example], progress: Progress = ignore_progress) -> Arrays:
        """Sum a step's statistics over some examples.

        Args:
            encoder: of this settings, with the arrays of the steps before.

        Returns:
            `<component>/<layer or input group>/<statistic>` -> array, and the numbers `examples` and `tokens`.
        """
        members = self.steps[step]
        meters = {component.name: component_fit(component).meter(number, encoder) for component, number in members}
        first = members[0][0]
        model = encoder.models[first.model]
        classes = encoder.task.classes(model) if first.curvature.labels == "expected" else None
        objectives = [Objective(label_seed=component_fit(first).label_seed, margin=first.curvature.labels == "margin")]
        if classes is not None:
            objectives = [Objective(label=label) for label in range(classes)]
        counts = {"examples": 0, "tokens": 0}
        for positions, batch in encoder.task.batches((model,), examples, self.settings.batch_tokens):
            finite = torch.ones(len(positions), dtype=torch.bool)
            for objective in objectives:
                values = backward(encoder.task, model, batch, list(meters.values()), objective, skip_nonfinite=True)
                finite &= torch.isfinite(values.cpu())
                for meter in meters.values():
                    meter.end()
            counts["examples"] += int(finite.sum())
            counts["tokens"] += int(batch.valid[finite.to(batch.valid.device)].sum())
            progress(len(positions), int(batch.valid.sum()))
        arrays = {f"{name}/{key}": value.cpu().numpy() for name, meter in meters.items() for key, value in meter.sums.items()}
        return arrays | {name: np.array(float(count)) for name, count in counts.items()}

    def finish(self, step: int, arrays: Arrays, totals: Arrays) -> Arrays:
        """Compute the encoder's arrays after a step, from those before it and its merged sums.

        Raises:
            NumericalError: a statistic is not finite (names the layer), or no example has a finite loss and gradient.
        """
        return self.combine(step, arrays, [self.decompose(*task) for task in self.decompositions(step, totals)])

    def decompositions(self, step: int, totals: Arrays) -> list[tuple[str, int, str, Arrays, int]]:
        """Divide a step's merged sums into tasks of `decompose`: for each component, those of layers that share an input.

        Raises:
            NumericalError: no example has a finite loss and gradient.
        """
        examples = int(totals["examples"])
        if examples == 0:
            raise NumericalError("no example's loss and gradient are finite under this model; try float32, or look for broken weights")
        tasks = []
        for component, number in self.steps[step]:
            for group, owners in component_fit(component).groups.items():
                prefixes = tuple(f"{component.name}/{owner}" for owner in owners)
                sums = {key.partition("/")[2]: value for key, value in totals.items() if key.startswith(prefixes)}
                tasks.append((component.name, number, group, sums, examples))
        return tasks

    def decompose(self, name: str, number: int, group: str, sums: Arrays, examples: int) -> Arrays:
        """Compute a component's arrays of a group of layers after a pass, from their sums: mostly eigendecompositions.

        Raises:
            NumericalError: a statistic is not finite; names the layer.
        """
        (component,) = (c for c in self.settings.components if c.name == name)
        whole = {key: value.astype(np.float64, copy=False) for key, value in sums.items()}
        results = component_fit(component).finish(number, group, whole, examples)
        return {f"{name}/{key}": array for key, array in results.items()}

    def combine(self, step: int, arrays: Arrays, results: Iterable[Arrays]) -> Arrays:
        """Combine the encoder's arrays before a step with what its decompositions gave."""
        arrays = dict(arrays)
        for result in results:
            arrays |= result
        for component, number in self.steps[step]:
            prefix = f"{component.name}/"
            own = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
            arrays |= {f"{prefix}{name}": array for name, array in component_fit(component).complete(number, own).items()}
        return arrays


@dataclass(frozen=True)
class SparseFit:
    """Fit of a sparse component in a single pass; see `ComponentFit`."""

    component: SparseComponent
    passes = 1

    @property
    def label_seed(self) -> int | None:
        """See `ComponentFit`."""
        return self.component.seed if self.component.curvature.labels == "sampled" and not self.any_labels else None

    @property
    def any_labels(self) -> bool:
        """See `ComponentFit`."""
        return self.component.closed_form

    def meter(self, number: int, encoder: Encoder) -> StatisticsMeter:
        """See `ComponentFit`."""
        return sparse.SparseMeter(self.component)

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """See `ComponentFit`."""
        return {"": ("",)}

    def complete(self, number: int, arrays: Mapping[str, np.ndarray]) -> Arrays:
        """See `ComponentFit`."""
        return {}

    def finish(self, number: int, group: str, sums: Mapping[str, np.ndarray], examples: int) -> Arrays:
        """See `ComponentFit`."""
        return sparse.finish({name: _finite(sums.get(name), name, self.component.layer) for name in sparse.STATISTICS}, examples)

    def with_sample(self, examples: int) -> SparseComponent:
        """See `ComponentFit`."""
        return self.component


@dataclass(frozen=True)
class DenseFit:
    """Fit of a dense component: PCA if configured, then the passes that its layers' curvature declares; see `ComponentFit`."""

    component: DenseComponent
    any_labels = False

    @property
    def passes(self) -> int:
        """See `ComponentFit`."""
        return max(len(_layer_passes(self.component, layer)) for layer in self.component.layers)

    @property
    def label_seed(self) -> int | None:
        """See `ComponentFit`."""
        return self.component.seed if self.component.curvature.labels == "sampled" else None

    def meter(self, number: int, encoder: Encoder) -> StatisticsMeter:
        """See `ComponentFit`."""
        return DenseMeter(self.component, number, encoder.component_encoders[self.component.name].maps)  # type: ignore[union-attr]

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """See `ComponentFit`."""
        groups: dict[str, tuple[str, ...]] = {}
        for layer in self.component.layers:
            groups[layer.input_group] = (*groups.get(layer.input_group, (f"{layer.input_group}/",)), f"{layer.name}/")
        return groups

    def finish(self, number: int, group: str, sums: Mapping[str, np.ndarray], examples: int) -> Arrays:
        """See `ComponentFit`."""
        layers = [layer for layer in self.component.layers if layer.input_group == group]
        return _finish_dense(self.component, layers, number, sums, examples)

    def complete(self, number: int, arrays: Mapping[str, np.ndarray]) -> Arrays:
        """See `ComponentFit`."""
        return _coordinates(self.component, arrays) if self.component.reduced and number == self.passes - 1 else {}

    def with_sample(self, examples: int) -> DenseComponent:
        """See `ComponentFit`."""
        layers = []
        for layer in self.component.layers:
            kind = choose_curvature(self.component.curvature.kind, layer.size, examples)
            layers.append(layer.model_copy(update={"curvature": kind}))
        return self.component.model_copy(update={"layers": tuple(layers)})


FITS: dict[str, type[DenseFit] | type[SparseFit]] = {"dense": DenseFit, "sparse": SparseFit}
"""By kind of component."""


def component_fit(component: Component) -> ComponentFit:
    """Return the fit of a component, by its kind."""
    return FITS[component.kind](component)  # type: ignore[arg-type, return-value]


class DenseMeter:
    """Sums of a dense component's statistics; the first layer of an input group sums those of the shared input."""

    sums_examples = True

    def __init__(self, component: DenseComponent, number: int, maps: Mapping[str, tuple[Map, Map]]) -> None:
        self._computed: dict[str, set[str]] = {layer.name: set() for layer in component.layers}
        for layer in component.layers:
            for statistic in _statistics(component, number, layer):
                self._computed[_owner(layer, statistic)].add(statistic)
        self.layers: Sequence[Layer] = tuple(layer for layer in component.layers if self._computed[layer.name])
        self._component = component
        self._unprojected = number < _pca(component)
        self._sketch_matrices: dict[tuple[str, str], Tensor | None] = {}
        self.maps: Mapping[str, tuple[Map, Map]] = {n.name: (None, None) if self._unprojected else maps[n.name] for n in self.layers}
        self.sums: dict[str, Tensor] = {}
        self._gradients = GradientSum()

    def __call__(self, layer: Layer, x: Float[Tensor, "batch tokens in_rank"], d: OutputGradient, chunk: Batch) -> None:
        """See `StatisticsVisitor`."""
        for statistic in self._computed[layer.name]:
            valid = chunk.valid.to(x)
            if statistic in MOMENTS:
                vectors = MOMENTS[statistic](x, d.values, valid)
                self._add(layer, statistic, second_moment(vectors, self._sketch_matrix(layer, statistic, vectors)))
            elif statistic in COUNTS:
                self._add(layer, statistic, COUNTS[statistic](x, valid))
        if any(s in GRADIENT_STATISTICS for s in self._computed[layer.name]):
            self._gradients(layer, x, d, chunk)

    def end(self) -> None:
        """See `StatisticsVisitor`."""
        for layer in self.layers:
            for statistic in self._computed[layer.name]:
                if statistic in GRADIENT_STATISTICS and layer.name in self._gradients.by_layer:
                    self._add(layer, statistic, GRADIENT_STATISTICS[statistic](self._gradients.by_layer[layer.name]))
        self._gradients = GradientSum()

    def _sketch_matrix(self, layer: Layer, statistic: str, vectors: Tensor) -> Tensor | None:
        if not self._unprojected:
            return None
        key = layer.name, statistic
        if key not in self._sketch_matrices:
            matrix = _side_sketch_matrix(self._component, layer, statistic.removesuffix("_covariance"))
            self._sketch_matrices[key] = None if matrix is None else torch.from_numpy(matrix).to(vectors)
        return self._sketch_matrices[key]

    def _add(self, layer: Layer, statistic: str, value: Tensor) -> None:
        name = f"{layer.name}/{statistic}"
        self.sums[name] = value if name not in self.sums else self.sums[name].add_(value)


def _finish_dense(
    component: DenseComponent, layers: Sequence[Layer], number: int, totals: Mapping[str, np.ndarray], examples: int
) -> Arrays:
    """Compute the arrays of a dense component's layers with the same input after a pass.

    The moments of projected inputs and output gradients are projections of the unprojected moments, from which the principal components
    come: one pass serves both.
    """
    arrays: Arrays = {}
    projected: dict[str, tuple[np.ndarray | None, np.ndarray]] = {}
    for layer in layers:
        passes = _layer_passes(component, layer)
        names = _statistics(component, number, layer)
        statistics = {s: _finite(totals.get(f"{_owner(layer, s)}/{s}"), s, layer.name) for s in names}
        results: Arrays = {}
        if number < _pca(component):
            for side in ("input", "output"):
                covariance = f"{side}_covariance"
                owner = f"{_owner(layer, covariance)}/{side}"
                if owner not in projected:
                    projected[owner] = _project(component, layer, side, statistics[covariance])
                projection, statistics[covariance] = projected[owner]
                if projection is not None:
                    results[f"{side}_projection"] = projection
        finished = number - (len(passes) - len(STRATEGIES[layer.curvature].passes))
        if names and finished >= 0:
            results |= STRATEGIES[layer.curvature].finish[finished](statistics, examples)
        arrays |= {f"{_owner(layer, name)}/{name}": array for name, array in results.items()}
    return arrays


def _project(
    component: DenseComponent, layer: Layer, side: str, covariance: Float64[np.ndarray, "size _"]
) -> tuple[Float32[np.ndarray, "rank size"] | None, Float64[np.ndarray, "rank rank"]]:
    """Compute a side's principal projection, and the second moments after it, from those before it or their sketch.

    Projections are most of an encoder's bytes, so they are float32.
    """
    rank = layer.input_rank if side == "input" else layer.output_rank
    matrix = _side_sketch_matrix(component, layer, side)
    if matrix is not None:
        eigenvalues, components = principal_components(covariance, matrix, rank)
        return components.astype(np.float32), np.diag(eigenvalues)
    exact_projection = principal_projection(covariance, rank)
    if exact_projection is None:
        return None, covariance
    projection = exact_projection.astype(np.float32)
    return projection, projection @ covariance @ projection.T


def _side_sketch_matrix(component: DenseComponent, layer: Layer, side: str) -> Float32[np.ndarray, "sketched size"] | None:
    """The test matrix of the sketch of a side's second moments; None where they are summed whole."""
    rank, size = (layer.input_rank, layer.inputs) if side == "input" else (layer.output_rank, layer.outputs)
    return sketch_matrix(_owner(layer, f"{side}_"), side, rank, size, component.projection.seed)


def _coordinates(component: DenseComponent, arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Select the coordinates of a reduced component: those of most energy, as many as give the best estimate of all scores.

    A coordinate of eigenvalue l has the energy e = l / (l + a). If coordinates are independent, the scores between rows have the variance
    sum e^2, and those of the selected ones, from m random projections (or their signs: c = pi / 2, without them c = 1), the variance
    sum e^2 + c (sum e)^2 / m about zero. The selection maximizes the correlation of the two: all coordinates where energy is spread out,
    fewer than could be stored where it falls off steeply.
    """
    spectra = [arrays.get(f"{layer.name}/eigenvalues") for layer in component.layers]
    if any(values is None for values in spectra):
        return {}
    whitened = [values * whitening_scale(values, component.curvature.damping) ** 2 for values in spectra if values is not None]
    energy = np.concatenate(whitened)
    order = np.argsort(-energy, kind="stable")
    signal = np.cumsum(energy[order] ** 2)
    total = np.cumsum(energy[order])
    count = np.arange(1, len(energy) + 1)
    one_bit = component.one_bit
    loss = np.where(count > component.stored, np.pi / 2 if one_bit else 1.0, np.pi / 2 if one_bit else 0.0)
    fidelity = signal**2 / np.maximum(signal + loss * total**2 / component.stored, np.finfo(np.float64).tiny)
    best = max(int(np.argmax(fidelity)) + 1, 1 if one_bit else component.stored)
    return {} if best == len(energy) else {"kept": np.sort(order[:best])}


def _finite(value: np.ndarray | None, statistic: str, layer: str) -> np.ndarray:
    if value is None or not np.isfinite(value).all():
        raise NumericalError(
            f"the {statistic} of layer {layer} is {'missing: no gradient reaches it' if value is None else 'not finite'}; "
            "leave the layer out of layers, try dtype float32, or look for broken weights"
        )
    return value


def _statistics(component: DenseComponent, number: int, layer: Layer) -> tuple[str, ...]:
    passes = _layer_passes(component, layer)
    return passes[number] if number < len(passes) else ()


def _layer_passes(component: DenseComponent, layer: Layer) -> tuple[tuple[str, ...], ...]:
    """The statistics of a layer's passes: those of the principal components, then the curvature's, whose first may be among them."""
    passes = STRATEGIES[layer.curvature].passes
    if not _pca(component):
        return passes
    return passes if passes and set(passes[0]) >= set(_PCA) else (_PCA, *passes)


def _pca(component: DenseComponent) -> int:
    return 1 if component.projection.kind == "pca" else 0


def _owner(layer: Layer, name: str) -> str:
    """Owner of a statistic or an array: the input group for inputs, else the layer."""
    return layer.input_group if name.startswith("input_") else layer.name


def with_known_sample(settings: EncoderSettings, examples: int) -> EncoderSettings:
    """Return the settings with each component's curvature selected for the actual number of examples."""
    return replace(settings, components=tuple(component_fit(component).with_sample(examples) for component in settings.components))
