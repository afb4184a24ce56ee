"""Scores of rows for any number of queries: exact scores, and estimates of them from one-bit codes.

    influence        <z_q, z_i>
    cosine           <z_q, z_i> / (|z_q| |z_i|)
    loss-normalized  <z_q, z_i> / L_i, with the loss L_i of the example, so that long and surprising texts do not rank first

A damping a' that differs from the build's damping a is exact and changes only the query. Coordinates are whitened with (l + a)^(-1/2), so

    g_q^T (H + a' I)^(-1) g_i = sum_j  z_qj (l_j + a_j) / (l_j + a'_j) z_ij

Cosines take the norms in the same metric, in the same pass. Without curvature the factor is (l_j + a_j); for layers that are left out it is
0. Scores are linear in the query, so contrasts and means of queries are queries too (`combine`). A scan is bound by memory bandwidth;
float32 rows are multiplied directly from the memory map.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np

from ..store.compiled import Compiled
from ..store.errors import NumericalError, UsageError
from ..store.index import Index, ShardGroup
from ..store.shapes import Float32, Float64, Int64
from ..store.vectors import Rows, count
from .metric import Metric, matched
from .mixing import Mixing
from .operands import OPERANDS, Estimates, Operand
from .options import Mode
from .units import Unit

_PIECES = 4  # of a thread's groups in a search
_scale_by_lengths = Compiled("scale_by_lengths", least_work=1 << 24)
_SHORTEST = 1e-37  # smallest length whose inverse is a float32


@dataclass(frozen=True)
class EstimatedScores:
    """Estimated scores of the rows of a group of shards: (exact + estimate) * scale.

    Attributes:
        exact: sum over sparse components, from their posting lists.
        estimate: sum over dense components, from scan codes.
        deviations: standard deviations of the estimates; those of the scores are `deviations * scale`.
        scale: for cosines the inverse of the lengths, for loss-normalized scores of the losses; 0 where these are 0.
    """

    exact: Float32[np.ndarray, "queries rows"]
    estimate: Float32[np.ndarray, "queries rows"]
    deviations: Float32[np.ndarray, "queries rows"]
    scale: Float32[np.ndarray, "queries rows"]


@dataclass(frozen=True)
class Scorer:
    """Queries prepared for scores with the rows of an index.

    Attributes:
        operands: the queries of each component with a weight other than 0.
        norms: the queries' lengths under the metric.
        unit: of the scores.
    """

    index: Index
    operands: Sequence[Operand]
    norms: Float64[np.ndarray, " queries"]
    mode: Mode
    unit: Unit

    @classmethod
    def of(cls, index: Index, queries: Rows, metric: Metric, mixings: Mapping[str, Mixing] | None = None) -> "Scorer":
        """Prepare queries.

        Args:
            mixings: see `mixed_components`; by default, of these queries.

        Raises:
            UsageError: no component remains, a named component does not exist, or the metric is not possible with the index.
        """
        _check_preset(index, metric)
        operands: list[Operand] = []
        weights = _weights(index, metric)
        unit = Unit.of(index, metric)
        mixings = mixed_components(index, queries, metric) if mixings is None else mixings
        for component in index.manifest.components:
            weight = weights[component.name]
            if weight:
                mixing = mixings.get(component.name)
                rows: Any = queries[component.name]
                operands.append(OPERANDS[component.kind].of(index, component, rows, metric, weight * unit.factor, mixing))  # type: ignore[arg-type]
        norms = np.sqrt(sum((operand.weight * operand.squared_norms for operand in operands), np.zeros(count(queries))))
        return cls(index, operands, norms, metric.mode, unit)

    def __len__(self) -> int:
        """Return the number of queries."""
        return len(self.norms)

    def scores(self, group: ShardGroup) -> Float32[np.ndarray, "queries rows"]:
        """Compute the scores of a group's rows."""
        return self.scores_by_mode(group, (self.mode,))[self.mode]

    def scores_by_mode(self, group: ShardGroup, modes: Sequence[Mode]) -> dict[Mode, Float32[np.ndarray, "queries rows"]]:
        """Compute the scores of a group's rows in several modes, from one computation of their products."""
        products = np.zeros((len(self), group.rows), np.float32)
        squared = np.zeros(group.rows) if "cosine" in modes else None
        for operand in self.operands:
            operand.add(self.index, group, products, squared)
        _check_finite(products)
        scores = {mode: products if mode == "influence" else self._scaled(products, group, squared, mode) for mode in modes}
        _check_finite(*scores.values())
        return scores

    def estimates(self, group: ShardGroup) -> EstimatedScores:
        """Estimate the scores of a group's rows; possible if `refusal` returns None."""
        shape = len(self), group.rows
        squared = np.zeros(group.rows) if self.mode == "cosine" else None
        sums = Estimates(np.zeros(shape, np.float32), np.zeros(shape, np.float32), np.zeros(shape), squared)
        for operand in self.operands:
            operand.estimate(self.index, group, sums)
        _check_finite(sums.exact, sums.estimate, sums.variances)
        deviations = np.sqrt(sums.variances).astype(np.float32)
        return EstimatedScores(sums.exact, sums.estimate, deviations, self._scale(group, sums.squared, self.mode))

    def refusal(self, groups: Sequence[ShardGroup]) -> str | None:
        """Return the reason why a quantized scan of groups of shards is not possible or not useful; None if it is both."""
        if all(operand.exact_scan for operand in self.operands):
            return "all components are sparse, and the posting lists of a query's tokens are short"
        reasons = (operand.refusal(self.index, groups, self.mode) for operand in self.operands)
        return next((reason for reason in reasons if reason is not None), None)

    def read(self, query: int, rows: Int64[np.ndarray, " rows"]) -> Float32[np.ndarray, " rows"]:
        """Return the sums over dense components for a query and rows, from the rows themselves; see `EstimatedScores.estimate`."""
        return np.stack([operand.read(self.index, rows, query) for operand in self.operands]).sum(axis=0, dtype=np.float32)

    def standard_errors(self, query: int, rows: Int64[np.ndarray, " rows"]) -> Float64[np.ndarray, " rows"]:
        """Compute the standard errors that one-bit codes give to a query's scores with some rows; 0 for other codes.

        With D coordinates rotated, of which b are kept, the estimate of <v, q> from one bit each has the variance
        (|v|^2 |q|^2 - <v, q>^2) (pi/2 D/b - 1) / D (RaBitQ, arXiv 2405.12497, for b = D). <v, q> is taken as 0 here, so the errors are
        rather too large. The error from tokens and coordinates that are not stored is not included.
        """
        return np.sqrt([self._variance(query, row) for row in rows.tolist()])

    def _variance(self, query: int, row: int) -> float:
        shard, offset = self.index.locate(row)
        variance = sum(operand.variance(self.index, shard, offset, query) for operand in self.operands)
        return variance * self.scale(query, row) ** 2

    def scale(self, query: int, row: int) -> float:
        """Return the factor that turns the sum of a query's products with a row into its score."""
        shard, offset = self.index.locate(row)
        if self.mode == "influence":
            return 1.0
        if self.mode == "loss-normalized":
            length = float(self.index.losses(shard)[offset])
        else:
            squared = sum(operand.weight * operand.squared_length(self.index, shard, offset) for operand in self.operands)
            length = float(np.sqrt(squared) * self.norms[query])
        return 1.0 / length if length > 0 else 0.0

    def squared_length(self, rows: Rows, stored: bool) -> float:
        """Compute the squared length, under the metric, of one row in memory before coding.

        Args:
            stored: leave out coordinates that are not stored.
        """
        total = 0.0
        for operand in self.operands:
            row = rows[operand.component.name]
            total += float(operand.scaled(self.index, row, stored).inner_products(row).sum(dtype=np.float64))
        return total

    def _scaled(
        self, products: Float32[np.ndarray, "queries rows"], group: ShardGroup, squared: Float64[np.ndarray, " rows"] | None, mode: Mode
    ) -> Float32[np.ndarray, "queries rows"]:
        """Turn sums of products into scores."""
        scale_by_lengths = _scale_by_lengths.if_worth(products.size)
        if scale_by_lengths is None:
            return products * self._scale(group, squared, mode)
        scores = np.empty_like(products)
        for q in range(len(self)):
            if mode == "cosine":
                scale_by_lengths(products[q], squared, self.norms[q], True, _SHORTEST, scores[q])
            else:
                scale_by_lengths(products[q], self.index.group_losses(group), 1.0, False, _SHORTEST, scores[q])
        return scores

    def _scale(self, group: ShardGroup, squared: Float64[np.ndarray, " rows"] | None, mode: Mode) -> Float32[np.ndarray, "queries rows"]:
        """Return the factors that turn sums of products into scores."""
        if mode == "cosine" and squared is not None:
            lengths = self.norms[:, None] * np.sqrt(squared)[None]
        elif mode == "loss-normalized":
            lengths = np.tile(self.index.group_losses(group), (len(self), 1)).astype(np.float64)
        else:
            return np.broadcast_to(np.float32(1), (len(self), group.rows))
        return np.divide(1.0, lengths, out=np.zeros(lengths.shape), where=lengths > _SHORTEST).astype(np.float32)


def mixed_components(index: Index, queries: Rows, metric: Metric) -> dict[str, Mixing]:
    """Mix the second moments of queries that are asked together into the curvature of each dense component, if a metric does.

    Raises:
        UsageError: see `Mixing.of`.
    """
    mixings = {}
    for component in index.manifest.components:
        if metric.mix is not None and component.has_wide_rows:
            rows: Any = queries[component.name]
            layers = matched(component.layer_names, metric.layers).astype(np.float64)
            values = rows.values.astype(np.float64)
            mixings[component.name] = Mixing.of(index, component, values, metric.mix, layers)  # type: ignore[arg-type]
    return mixings


def _check_preset(index: Index, metric: Metric) -> None:
    """Refuse a preset that the index was not built with."""
    built = index.manifest.build.inputs.options.preset
    if metric.preset is not None and metric.preset != built:
        with_what = "without a preset" if built is None else f"with the preset {built}"
        raise UsageError(f"this index was built {with_what}, not with {metric.preset}; build it so, or leave `preset` out")


def _check_finite(*arrays: np.ndarray) -> None:
    """Refuse scores that are not finite."""
    if not all(np.isfinite(array).all() for array in arrays):
        raise NumericalError("a score is not finite: the query's weights, or its gradient, are too large; use smaller weights")


Result = TypeVar("Result")


def by_group(
    groups: Sequence[ShardGroup], function: Callable[[ShardGroup], Result], threads: int | None = None, small: bool = False
) -> Iterator[tuple[ShardGroup, Result]]:
    """Call a function for each group of shards, in several threads; yield the results in the order of groups.

    Args:
        threads: their number; one for each available core by default.
        small: results are small, so that many may be in memory; a thread then works on several groups before it hands over.
    """
    threads = min(threads or len(os.sched_getaffinity(0)), len(groups))
    if threads < 2:
        for group in groups:
            yield group, function(group)
        return
    size = -(-len(groups) // (_PIECES * threads)) if small else 1
    pieces = [groups[first : first + size] for first in range(0, len(groups), size)]
    pool = _pool(threads)
    submitted: deque[tuple[Sequence[ShardGroup], Future[list[Result]]]] = deque()
    try:
        for piece in pieces:
            submitted.append((piece, pool.submit(lambda part: list(map(function, part)), piece)))
            if len(submitted) > 2 * threads:  # bounds the results in memory
                first, future = submitted.popleft()
                yield from zip(first, future.result(), strict=True)
        while submitted:
            first, future = submitted.popleft()
            yield from zip(first, future.result(), strict=True)
    finally:
        for _, future in submitted:  # of a caller that wants no more, or after an error
            future.cancel()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return the threads of all searches of a process; to start some for each search takes longer than a fast search."""
    return ThreadPoolExecutor(threads, thread_name_prefix="wherefrom-search")


def all_scores(
    index: Index, queries: Rows, metric: Metric = Metric(), mixings: Mapping[str, Mixing] | None = None
) -> Iterator[tuple[int, Float32[np.ndarray, "queries rows"]]]:
    """Yield the first row and the scores of each group of shards, in row order; deleted rows are scored too.

    Args:
        mixings: see `Scorer.of`.
    """
    for group, scores in by_group(index.groups, Scorer.of(index, queries, metric, mixings).scores):
        yield group.first, scores


def score_matrix(index: Index, queries: Rows, metric: Metric = Metric()) -> Float32[np.ndarray, "queries rows"]:
    """Compute all scores; deleted rows are scored too."""
    return np.concatenate([scores for _, scores in all_scores(index, queries, metric)], axis=1)


def _weights(index: Index, metric: Metric) -> dict[str, float]:
    """Return the weight of each component under a metric; refuse a metric that leaves none, or names one that does not exist."""
    components = index.manifest.components
    names = ", ".join(component.name for component in components)
    unknown = sorted(metric.weights.keys() - {name for component in components for name in (component.name, component.role)})
    if unknown:
        raise UsageError(f"there is no component {unknown[0]!r} in this index; choose among {names}")
    weights = {}
    last = {component.role: component.weight for component in components}
    for component in components:
        factors = [metric.weights[name] for name in {component.name, component.role} & metric.weights.keys()]
        factor = component.weight if metric.training is None else last[component.role]  # segments of a training add up as they are
        weights[component.name] = factor * float(np.prod(factors))
    if not any(weights.values()):
        raise UsageError("every component has the weight 0; give at least one another weight")
    for component in components:
        if not matched(component.layer_names, metric.layers).any():
            weights[component.name] = 0.0
    if not any(weights.values()):
        layers = [name for component in components for name in component.layer_names]
        shown = ", ".join(layers[:6]) + " ..." * (len(layers) > 6)
        raise UsageError(f"no layer of this index matches {', '.join(metric.layers)}; choose among {shown}")
    return weights
