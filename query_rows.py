"""Whitened rows of queries under a metric: of the index's models alone, carried back through segments of training, or refined.

**Segments.** With S_l = exp(-t_l H_l), what segment l of a training adds is scored with S_{l+1} ... S_L times the query's gradient under
the last model (SOURCE: Bae et al., arXiv 2405.12186, equation 14). H_l is the curvature of the component of checkpoint l, in its own
eigenbasis. Dense components are carried by whole gradients, sparse ones token by token.

**Refinement.** Influence needs the solution v of (G + a) v = g for the query's gradient g. EK-FAC gives an approximate one, from which
preconditioned conjugate gradients go on with exact products of the Gauss-Newton matrix G over the whole corpus. G covers the layers of one
dense component, with all terms between them. Stored rows stay as they are. Beside other components, a refined row is scaled so that the
query's score with itself stays what it was, since the components' weights rest on such scores (indexer/calibrate.py).
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .indexer.encoder import Encoder, EncoderSettings
from .indexer.gauss_newton import GaussNewton
from .query.answers import RefineReport
from .query.metric import Metric
from .query.operands import change_of_curvature
from .query.source import learning_times
from .store.documents import Example
from .store.errors import NumericalError, UsageError
from .store.index import Index
from .store.manifest import Component
from .store.shapes import Float, Float64
from .store.vectors import join

_GRADIENT_BYTES = 1 << 30  # of whole gradients in memory at once; but one at least
_DAMPING = 10.0  # of refined queries, relative to the mean eigenvalue of a layer's weights
_DAMPING_CLASSES = 30.0  # of models with one label an example
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
    final = _plain_encoder(encoder, last)
    size = _at_once(final.settings.components, 1, len(examples))
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
    return dict(join(parts))


def _refined(index: Index, encoder: Encoder, metric: Metric, examples: Sequence[Example], queries: bool) -> QueryRows:
    start = time.perf_counter()
    components = encoder.settings.components
    wide: list[Any] = [component for component in components if component.has_wide_rows]
    if len(encoder.models) > 1 or not wide:
        problem = "several models" if len(encoder.models) > 1 else "no dense component"
        raise UsageError(
            f"refined queries need the layers inside the blocks of one model, and this index has {problem}; leave `refine` out"
        )
    rows = dict(encoder.rows(examples, queries=queries, exact=True))
    corpus = [index.example(row) for row in np.flatnonzero(index.alive).tolist()]
    residuals = []
    default = _DAMPING if encoder.task.classes(encoder.model) is None else _DAMPING_CLASSES
    relative = default if metric.damping is None else metric.damping
    for component in wide:
        part: Any = encoder.component_encoders[component.name]
        final = _plain_encoder(encoder, [component])
        (plain,) = final.settings.components
        matrix = GaussNewton(encoder.task, encoder.model, plain.layers, corpus)  # type: ignore[union-attr]
        damping = _damping(index, component, metric, relative)
        change = change_of_curvature(index, component, metric)
        size = _at_once([plain], _COPIES, len(examples))
        blocks = []
        for first in range(0, len(examples), size):
            gradients = part.plain_gradients(final.rows(examples[first : first + size], queries=queries, exact=True)[component.name])
            solution, residual = _solve(matrix, part, gradients, damping, metric.refine)
            residuals += residual.tolist()
            blocks.append((range(first, first + len(gradients)), part.rows_of_solved(solution, change)))
        refined = type(blocks[0][1]).concatenate(blocks, component.dim)
        if len(components) > 1:
            refined = _with_self_score(refined, rows[component.name], 1.0 if change is None else change)
        rows[component.name] = refined
    report = RefineReport(
        iterations=metric.refine,
        residual=float(np.mean(residuals)),
        damping=relative if metric.training is None else None,
        products=(1 + metric.refine) * len(corpus) * len(wide),
        seconds=time.perf_counter() - start,
    )
    return QueryRows(rows, report)


def _solve(
    matrix: GaussNewton, part: Any, gradients: Any, damping: Float64[np.ndarray, " layers"], iterations: int
) -> tuple[Any, Float64[np.ndarray, " queries"]]:
    """Preconditioned conjugate gradients for (G + a) v = g, for all queries side by side.

    Returns:
        v, as plain gradients; and the length of g - (G + a) v, relative to that of g.
    """
    kind = type(gradients)

    def preconditioned(vectors: Float[Tensor, "queries parameters"]) -> Float[Tensor, "queries parameters"]:
        return torch.from_numpy(part.solved(kind(vectors.numpy()), damping).values)

    def product(vectors: Float[Tensor, "queries parameters"]) -> Float[Tensor, "queries parameters"]:
        return matrix.product(vectors) + part.by_coordinate(damping) * vectors

    def inner(a: Float[Tensor, "queries parameters"], b: Float[Tensor, "queries parameters"]) -> Float[Tensor, "queries one"]:
        return (a * b).sum(1, keepdim=True)

    g = torch.from_numpy(gradients.values)
    v = preconditioned(g)
    residual = g - product(v)
    z = preconditioned(residual)
    direction = z
    size = inner(residual, z)
    for _ in range(iterations):
        image = product(direction)
        curvature = inner(direction, image)
        step = torch.where(curvature > 0, size / curvature, 0.0)
        v = v + step * direction
        residual = residual - step * image
        z = preconditioned(residual)
        before = size
        size = inner(residual, z)
        direction = z + torch.where(before > 0, size / before, 0.0) * direction
    if not torch.isfinite(v).all():
        raise NumericalError("the refined query is not finite; ask with a larger damping, or leave `refine` out")
    lengths = torch.linalg.vector_norm(g, dim=1)
    relative = torch.linalg.vector_norm(residual, dim=1) / torch.where(lengths > 0, lengths, 1.0)
    return kind(v.numpy()), relative.numpy()


def _with_self_score(refined: Any, plain: Any, change: Float64[np.ndarray, " dim"] | float) -> Any:
    """Scale refined rows so that their products with the plain ones are the squared lengths of these."""
    after = np.einsum("qd,qd->q", refined.values * change, plain.values, dtype=np.float64)
    factors = np.divide(plain.squared_norms, after, out=np.ones_like(after), where=after > 0)
    return type(refined)((refined.values * factors[:, None]).astype(np.float32))


def _damping(index: Index, component: Any, metric: Metric, relative: float) -> Float64[np.ndarray, " layers"]:
    """The damping of each layer: one over its learning time, where the metric has a training, else relative to its mean eigenvalue.

    The mean is over all of its weights: eigenvalues of directions that a projection leaves out count as 0.
    """
    if metric.training is not None:
        times = learning_times(index, component, metric.training)
        if not times.all():
            raise UsageError("the training did not move all layers of this index, so their damping is not known; give `damping` instead")
        return 1 / times
    shares = np.array([layer.size / (layer.outputs * layer.inputs) for layer in component.layers])
    return relative * index.mean_eigenvalues(component) * shares


def _plain_encoder(encoder: Encoder, components: Sequence[Component]) -> Encoder:
    """An encoder of the last model alone, whose rows are the components' gradients before projection, or can be turned into them."""
    plain = [encoder.component_encoders[component.name].plain_component() for component in components]
    arrays = {f"{component.name}/{name}": array for component, own in plain for name, array in own.items()}
    settings = EncoderSettings(tuple(component for component, _ in plain), encoder.settings.batch_tokens)
    return replace(encoder, models=encoder.models[-1:], settings=settings, arrays=arrays)


def _at_once(components: Sequence[Component], copies: int, examples: int) -> int:
    """How many whole gradients may be in memory."""
    widths = [component.dim for component in components if component.has_wide_rows]
    return max(1, _GRADIENT_BYTES // (8 * copies * max(widths))) if widths else max(1, examples)
