"""Whitened rows of queries under a metric: of the index's models alone, carried back through segments of training, or refined.

**Segments.** With S_l = exp(-t_l H_l), what segment l of a training adds is scored with S_{l+1} ... S_L times the query's gradient under
the last model (SOURCE: Bae et al., arXiv 2405.12186, equation 14). H_l is the curvature of the component of checkpoint l, in its own
eigenbasis. Dense components are carried by whole gradients, sparse ones token by token.

**Refinement.** Influence needs the solution v of (G + a) v = g for the query's gradient g. The stored curvature gives an approximate one,
from which preconditioned conjugate gradients go on with exact products of the Gauss-Newton matrix G over the whole corpus. G covers the
weights of all components, with all terms between them; a weight that is head and embeddings is one. Stored rows stay as they are. The
components' products with v add up as they are, so each counts once, whatever its weight in other scores. Components that training did not
change are not in the equation; beside these, refined rows are scaled so that the query's score with itself stays what it was, since the
components' weights rest on such scores (indexer/calibrate.py).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .indexer.encoder import Encoder, EncoderSettings
from .indexer.gauss_newton import GaussNewton
from .query.answers import RefineReport
from .query.metric import Metric
from .query.operands import changed_rows
from .query.source import learning_times
from .store.documents import Example
from .store.errors import NumericalError, UsageError
from .store.index import Index
from .store.manifest import Component, Layer
from .store.shapes import Float, Float64
from .store.vectors import DenseVectors, concatenate, slice_rows

_GRADIENT_BYTES = 1 << 30  # of whole gradients in memory at once; but one at least
_DAMPING = {"blocks": 10.0, "head": 1.0, "embeddings": 1.0}  # of refined queries, relative to the mean eigenvalue of a layer's weights
_DAMPING_CLASSES = {"blocks": 30.0}  # of models with one label an example
_COPIES = 8  # of the gradients, that conjugate gradients hold


class QueryRows(NamedTuple):
    """Rows of queries.

    Attributes:
        rows: by component, with all tokens.
        refinement: how they were refined; None where they were not.
    """

    rows: dict[str, Any]
    refinement: RefineReport | None = None


def query_rows(index: Index, encoder: Encoder, metric: Metric, examples: Sequence[Example], queries: bool = True) -> QueryRows:
    """Compute the rows of queries.

    Args:
        index: whose components the encoder has.
        queries: they are queries, and not rows of the index.

    Raises:
        UsageError: the index's components or models do not allow what the metric asks for.
    """
    if metric.refine:
        return _refined(index, encoder, metric, examples, queries)
    if metric.training is not None and len(encoder.models) > 1:
        return QueryRows(_carried(index, encoder, metric.training, examples, queries))
    return QueryRows(encoder.rows(examples, queries=queries, exact=True))


def _carried(index: Index, encoder: Encoder, training: str, examples: Sequence[Example], queries: bool) -> dict[str, Any]:
    components = encoder.settings.components
    last = [component for component in components if component.model == len(encoder.models) - 1]
    chains = {component.name: [other for other in components if other.role == component.role] for component in last}
    for component in last:
        chain = chains[component.name]
        if len(chain) != len(encoder.models) or any(other.layer_names != component.layer_names for other in chain):
            raise UsageError("the checkpoints of this index track different layers; SOURCE needs the same of each")
    final = _encoder_of(encoder, {c.name: encoder.component_encoders[c.name].plain_component() for c in last})
    size = _at_once(final.settings.components, len(examples))
    parts = []
    for first in range(0, len(examples), size):
        encoded = final.rows(examples[first : first + size], queries=queries, exact=True)
        part = {}
        for component in last:
            carried: Any = encoder.component_encoders[component.name].plain_gradients(encoded[component.name])
            for other in reversed(chains[component.name]):
                segment = encoder.component_encoders[other.name]
                part[other.name] = segment.whitened(carried)
                carried = segment.decayed(carried, learning_times(index, other, training))
        parts.append(part)
    return dict(concatenate(parts))


class _Equation:
    """(G + a) v = g in the weights of some components of one model, with all terms between them.

    Args:
        components: of the index's only model.
        relative: damping by component, relative to the mean eigenvalue of each layer's weights.
        corpus: the examples that G is the mean over.
    """

    def __init__(
        self,
        index: Index,
        encoder: Encoder,
        components: Sequence[Component],
        metric: Metric,
        relative: Mapping[str, float],
        corpus: Sequence[Example],
    ) -> None:
        self.parts: dict[str, Any] = {component.name: encoder.component_encoders[component.name] for component in components}
        self.whole_encoder = _encoder_of(encoder, {name: part.whole_component() for name, part in self.parts.items()})
        self.slices: dict[str, slice] = {}
        self._solvers: dict[str, Float64[np.ndarray, " layers"]] = {}  # of equal weights, one
        layers: list[Layer] = []
        weights: dict[int, slice] = {}
        self.size = 0
        for component in components:
            layers_of_component = self.parts[component.name].equation_layers()
            weight = id(encoder.model.get_submodule(layers_of_component[0].name).weight)
            part = slice(self.size, self.size + sum(layer.outputs * layer.inputs for layer in layers_of_component))
            if weight not in weights:
                weights[weight] = part
                self._solvers[component.name] = _damping(index, component, self.parts[component.name], metric, relative[component.name])
                self.size = part.stop
            self.slices[component.name] = weights[weight]
            offset = weights[weight].start
            for layer in layers_of_component:
                layers.append(layer.model_copy(update={"offset": offset}))
                offset += layer.outputs * layer.inputs
        self._matrix = GaussNewton(encoder.task, encoder.model, layers, corpus)
        self._damping = torch.zeros(self.size, dtype=torch.float64)
        for name, damping in self._solvers.items():
            self._damping[self.slices[name]] = self.parts[name].by_coordinate(damping)

    def gradients(self, examples: Sequence[Example], queries: bool) -> Float64[Tensor, "queries parameters"]:
        """The whole gradients of queries; those of a weight that is head and embeddings are added."""
        rows = self.whole_encoder.rows(examples, queries=queries, exact=True)
        gradients = torch.zeros((len(examples), self.size), dtype=torch.float64)
        for name, part in self.parts.items():
            gradients[:, self.slices[name]] += torch.from_numpy(part.whole_gradients(rows[name]).values)
        return gradients

    def preconditioned(self, vectors: Float64[Tensor, "queries parameters"]) -> Float64[Tensor, "queries parameters"]:
        """Multiply vectors with the inverse of the stored curvature, plus damping."""
        result = torch.empty_like(vectors)
        for name, damping in self._solvers.items():
            part_vectors = DenseVectors(vectors[:, self.slices[name]].numpy())
            result[:, self.slices[name]] = torch.from_numpy(self.parts[name].solved(part_vectors, damping).values)
        return result

    def product(self, vectors: Float64[Tensor, "queries parameters"]) -> Float64[Tensor, "queries parameters"]:
        """Multiply vectors with G + a."""
        return self._matrix.product(vectors) + self._damping * vectors


def _refined(index: Index, encoder: Encoder, metric: Metric, examples: Sequence[Example], queries: bool) -> QueryRows:
    start = time.perf_counter()
    if len(encoder.models) > 1:
        raise UsageError("refined queries need one model, and this index has several; leave `refine` out")
    counted = [c for c in encoder.settings.components if all(metric.weights.get(name, 1.0) for name in (c.name, c.role))]
    trained = index.manifest.models[0].trained
    components = [c for c in counted if trained is None or set(c.layer_names) & set(trained)]
    if not components:
        raise UsageError("training changed no layer of this index's components, so there is no equation to solve; leave `refine` out")
    rows = dict(encoder.rows(examples, queries=queries, exact=True))
    corpus = [index.example(row) for row in np.flatnonzero(index.alive).tolist()]
    defaults = _DAMPING if encoder.task.classes(encoder.model) is None else _DAMPING_CLASSES
    relative = {c.name: defaults[c.role] if metric.damping is None else metric.damping for c in components}
    equation = _Equation(index, encoder, components, metric, relative, corpus)
    size = max(1, _GRADIENT_BYTES // (8 * _COPIES * equation.size))
    residuals = []
    blocks: dict[str, list[Any]] = {component.name: [] for component in components}
    for first in range(0, len(examples), size):
        solution, residual = _solve(equation, equation.gradients(examples[first : first + size], queries), metric.refine)
        residuals += residual.tolist()
        for component in components:
            part = equation.parts[component.name]
            changed = partial(changed_rows, index, component, metric)
            part_rows = part.rows_of_solved(DenseVectors(solution[:, equation.slices[component.name]].numpy()), changed)
            blocks[component.name].append((range(first, first + len(solution)), part_rows))
    for component in components:
        refined = type(blocks[component.name][0][1]).concatenate(blocks[component.name], component.dim)
        factors = np.full(len(refined), 1 / (component.weight or 1.0))
        if len(components) < len(counted):
            factors = _self_score_factors(refined, rows[component.name], partial(changed_rows, index, component, metric))
        rows[component.name] = refined.combine(np.diag(factors)).as_float32()
    report = RefineReport(
        iterations=metric.refine,
        residual=float(np.mean(residuals)),
        damping=relative if metric.training is None else None,
        products=(1 + metric.refine) * len(corpus),
        seconds=time.perf_counter() - start,
    )
    return QueryRows(rows, report)


def _solve(
    equation: _Equation, g: Float64[Tensor, "queries parameters"], iterations: int
) -> tuple[Float64[Tensor, "queries parameters"], Float64[np.ndarray, " queries"]]:
    """Preconditioned conjugate gradients, for all queries side by side.

    Returns:
        v; and the length of g - (G + a) v, relative to that of g.
    """

    def inner(a: Float[Tensor, "queries parameters"], b: Float[Tensor, "queries parameters"]) -> Float[Tensor, "queries one"]:
        return (a * b).sum(1, keepdim=True)

    v = equation.preconditioned(g)
    residual = g - equation.product(v)
    z = equation.preconditioned(residual)
    direction = z
    size = inner(residual, z)
    for _ in range(iterations):
        image = equation.product(direction)
        curvature = inner(direction, image)
        step = torch.where(curvature > 0, size / curvature, 0.0)
        v = v + step * direction
        residual = residual - step * image
        z = equation.preconditioned(residual)
        before = size
        size = inner(residual, z)
        direction = z + torch.where(before > 0, size / before, 0.0) * direction
    if not torch.isfinite(v).all():
        raise NumericalError("the refined query is not finite; ask with a larger damping, or leave `refine` out")
    lengths = torch.linalg.vector_norm(g, dim=1)
    relative = torch.linalg.vector_norm(residual, dim=1) / torch.where(lengths > 0, lengths, 1.0)
    return v, relative.numpy()


def _self_score_factors(refined: Any, plain: Any, changed: Callable[[Any], Any]) -> Float64[np.ndarray, " queries"]:
    """Return the factors after which products of refined rows with the plain ones are the squared lengths of these."""
    pairs = [(slice_rows({"": refined}, i, i + 1)[""], slice_rows({"": plain}, i, i + 1)[""]) for i in range(len(plain))]
    after = np.array([float(changed(row).inner_products(other)[0, 0]) for row, other in pairs])
    return np.divide(plain.squared_norms, after, out=np.ones(len(after)), where=after > 0)


def _damping(index: Index, component: Component, part: Any, metric: Metric, relative: float) -> Float64[np.ndarray, " layers"]:
    """The damping of each layer: one over its learning time, where the metric has a training, else relative to its mean eigenvalue."""
    if metric.training is not None:
        times = learning_times(index, component, metric.training)
        if not times.all():
            raise UsageError(
                f"the training did not move all layers of {component.name}, so their damping is not known; give `damping` instead, or "
                f"leave the component out ({component.name}=0 in `weights`)"
            )
        return 1 / times
    mean_eigenvalues: Float64[np.ndarray, " layers"] = part.mean_eigenvalues()
    return relative * mean_eigenvalues


def _encoder_of(encoder: Encoder, components: Mapping[str, tuple[Component, Mapping[str, np.ndarray]]]) -> Encoder:
    """An encoder of the last model alone with some components and their arrays."""
    arrays = {f"{name}/{key}": array for name, (_, its_arrays) in components.items() for key, array in its_arrays.items()}
    settings = EncoderSettings(tuple(component for component, _ in components.values()), encoder.settings.batch_tokens)
    return replace(encoder, models=encoder.models[-1:], settings=settings, arrays=arrays)


def _at_once(components: Sequence[Component], examples: int) -> int:
    """Return the number of whole gradients that fit in memory."""
    widths = [component.dim for component in components if component.has_wide_rows]
    return max(1, _GRADIENT_BYTES // (8 * max(widths))) if widths else max(1, examples)
