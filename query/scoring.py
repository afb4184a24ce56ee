"""Scores of rows for any number of queries: exact ones, and estimates of them from one-bit codes.

    influence   <z_q, z_i>
    cosine      <z_q, z_i> / (|z_q| |z_i|)
    loss-normalized     <z_q, z_i> / L_i, with the example's own loss: what a nat of it is worth, so that long and surprising texts do not
    lead

Another damping a' than the build's a is exact and changes only the query: coordinates are whitened with (l + a)^(-1/2), so

    g_q^T (H + a' I)^(-1) g_i = sum_j  z_qj (l_j + a_j) / (l_j + a'_j) z_ij

and under cosine the norms are taken in the same metric, in the same pass. Without curvature the factor is (l_j + a_j); of layers that are
left out it is 0. Scores are linear in the query, so that contrasts and means of queries are queries too (`combine`). A scan is
bound by memory bandwidth; for float32 rows it multiplies straight from the memory map.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Float32, Float64, Int64

from ..store.errors import NumericalError, UsageError
from ..store.index import Group, Index
from ..store.manifest import SparseComponent
from ..store.shard import Shard
from ..store.sparse import SparseVectors
from .metric import Metric, Mode, QueryRows, matched
from .parts import DenseQueries, SparseQueries

_SHORTEST = 1e-37  # lengths whose inverse is a float32


@dataclass(frozen=True)
class Estimates:
    """What one-bit codes say of a group's rows, for some queries: a score is about `(sure + guess) * scale`.

    Attributes:
        sure: what is exact: sparse components' part.
        guess: what dense components' codes estimate.
        deviations: standard deviations of the guesses (times `scale`: of the scores).
        scale: under cosine one over the lengths, under loss-normalized over the losses; 0 where a row has none.
    """

    sure: Float32[np.ndarray, "queries rows"]
    guess: Float32[np.ndarray, "queries rows"]
    deviations: Float32[np.ndarray, "queries rows"]
    scale: Float32[np.ndarray, "queries rows"]


@dataclass(frozen=True)
class Scorer:
    """Some queries, ready to be compared with an index's rows."""

    index: Index
    parts: Sequence[DenseQueries | SparseQueries]
    norms: Float64[np.ndarray, " queries"]
    mode: Mode

    @classmethod
    def of(cls, index: Index, queries: QueryRows, metric: Metric) -> "Scorer":
        """Prepare queries.

        Raises:
            UsageError: no component is left, or none is called so; the metric does not go with the index.
        """
        parts = _prepare(index, queries, metric)
        norms = np.sqrt(sum((p.weight * p.squared_norms for p in parts), np.zeros(_count(queries))))
        return cls(index, parts, norms, metric.mode)

    def __len__(self) -> int:
        """Queries."""
        return len(self.norms)

    def scores(self, group: Group) -> Float32[np.ndarray, "queries rows"]:
        """Exact scores of a group's rows."""
        scores = np.zeros((len(self), group.rows), np.float32)
        squared = np.zeros(group.rows) if self.mode == "cosine" else None
        for p in self.parts:
            p.add(self.index, group, scores, squared)
        scores = scores if self.mode == "influence" else scores * self._scale(group, squared)
        if not np.isfinite(scores).all():
            raise NumericalError("a score is not finite: the query's weights, or its gradient, are too large; ask with smaller ones")
        return scores

    def estimates(self, group: Group) -> Estimates:
        """Estimated scores of a group's rows; `refusal` says when there are none."""
        shape = len(self), group.rows
        sure, guess, variances = np.zeros(shape, np.float32), np.zeros(shape, np.float32), np.zeros(shape)
        squared = np.zeros(group.rows) if self.mode == "cosine" else None
        for p in self.parts:
            if isinstance(p, SparseQueries):
                p.add(self.index, group, sure, squared)
            else:
                p.estimate(self.index, group, guess, variances, squared)
        if not (np.isfinite(sure).all() and np.isfinite(guess).all() and np.isfinite(variances).all()):
            raise NumericalError("a score is not finite: the query's weights, or its gradient, are too large; ask with smaller ones")
        return Estimates(sure, guess, np.sqrt(variances, out=variances).astype(np.float32), self._scale(group, squared))

    def refusal(self) -> str | None:
        """Why rows cannot be estimated from one-bit codes, if they cannot."""
        for p in self.parts:
            if isinstance(p, DenseQueries) and self.mode == "cosine" and p.change is not None:
                return "lengths under another damping, or of some layers, are known only of rows that are read"
            if (
                isinstance(p, DenseQueries)
                and p.component.dtype != "1bit"
                and any(self.index.scan_codes(group, p.component) is None for group in self.index.groups)
            ):
                return "one-bit codes do not lie beside the rows, or are of other rows: wherefrom reindex makes them"
        return None

    def read(self, query: int, rows: Int64[np.ndarray, " chosen"]) -> Float32[np.ndarray, " chosen"]:
        """Dense components' exact part of a query's scores with some rows, in the place of their guesses."""
        found = [p.read(self.index, rows, query) for p in self.parts if isinstance(p, DenseQueries)]
        return np.stack(found).sum(axis=0, dtype=np.float32)

    def variance(self, query: int, row: int) -> float:
        """Of a query's score with a row: see `standard_errors`."""
        shard, offset = self.index.locate(row)
        variance = sum(p.variance(self.index, shard, offset, query) for p in self.parts)
        return variance * self.scale(query, row) ** 2

    def scale(self, query: int, row: int) -> float:
        """What the products of a query's components with a row's are multiplied with to give its score."""
        shard, offset = self.index.locate(row)
        if self.mode == "influence":
            return 1.0
        if self.mode == "loss-normalized":
            length = float(self.index.losses(shard)[offset])
        else:
            length = float(np.sqrt(self._squared_length(shard, offset)) * self.norms[query])
        return 1.0 / length if length > 0 else 0.0

    def squared_length(self, rows: QueryRows, stored: bool) -> float:
        """The squared length of one row, at hand and not coded, under the metric.

        Args:
            stored: whether what is not stored of rows is left out.
        """
        total = 0.0
        for p in self.parts:
            row = rows[p.component.name]
            if isinstance(p, DenseQueries):
                assert isinstance(row, np.ndarray)
                whole = row[0].astype(np.float64)
                total += float((p.weighed(self.index, row[0]).astype(np.float64) if stored else whole * p.factors) @ whole)
            else:
                assert isinstance(row, SparseVectors)
                total += float((p.weighed(self.index, row).vectors.astype(np.float64) * row.vectors).sum())
        return total

    def _squared_length(self, shard: Shard, offset: int) -> float:
        return sum(p.weight * p.squared_length(self.index, shard, offset) for p in self.parts)

    def _scale(self, group: Group, squared: Float64[np.ndarray, " rows"] | None) -> Float32[np.ndarray, "queries rows"]:
        """What inner products are multiplied with."""
        if squared is not None:
            lengths = self.norms[:, None] * np.sqrt(squared)[None]
        elif self.mode == "loss-normalized":
            lengths = np.tile(np.concatenate([self.index.losses(shard) for shard in group.shards]), (len(self), 1)).astype(np.float64)
        else:
            return np.broadcast_to(np.float32(1), (len(self), group.rows))
        return np.divide(1.0, lengths, out=np.zeros(lengths.shape), where=lengths > _SHORTEST).astype(np.float32)


Result = TypeVar("Result")


def by_group(groups: Sequence[Group], function: Callable[[Group], Result]) -> Iterator[tuple[Group, Result]]:
    """A function of groups of rows, in their order, by as many threads as there are cores to run on."""
    threads = min(len(os.sched_getaffinity(0)), len(groups))
    if threads < 2:
        for group in groups:
            yield group, function(group)
        return
    with ThreadPoolExecutor(threads) as pool:
        begun: deque[tuple[Group, Future[Result]]] = deque()
        for group in groups:
            begun.append((group, pool.submit(function, group)))
            if len(begun) > 2 * threads:  # no more in memory than is being read
                group, made = begun.popleft()  # noqa: PLW2901
                yield group, made.result()
        for group, made in begun:
            yield group, made.result()


def all_scores(index: Index, queries: QueryRows, metric: Metric = Metric()) -> Iterator[tuple[int, Float32[np.ndarray, "queries rows"]]]:
    """Every score, as (first row, scores of a group's rows), in row order; those of deleted rows too."""
    for group, scores in by_group(index.groups, Scorer.of(index, queries, metric).scores):
        yield group.first, scores


def standard_errors(
    index: Index, queries: QueryRows, metric: Metric, rows: Sequence[Int64[np.ndarray, " found"]]
) -> list[Float64[np.ndarray, " found"]]:
    """Standard errors of each query's scores with some rows: what coding rows in one bit a coordinate adds to them; 0 for other codes.

    With D coordinates rotated, of which b are kept, the estimate of <v, q> from one bit each has the variance
    (|v|^2 |q|^2 - <v, q>^2) (pi/2 D/b - 1) / D (RaBitQ, arXiv 2405.12497, for b = D); <v, q> is taken as 0 here, which errs upwards. What
    was left out of the rows altogether, tokens or coordinates, is not in it.

    Args:
        rows: of each query.
    """
    scorer = Scorer.of(index, queries, metric)
    return [np.sqrt([scorer.variance(query, row) for row in own.tolist()]) for query, own in enumerate(rows)]


def _prepare(index: Index, queries: QueryRows, metric: Metric) -> list[DenseQueries | SparseQueries]:
    """The queries of every component that counts.

    Raises:
        UsageError: no component is left, or none is called so.
    """
    names = {s.name for s in index.manifest.components}
    unknown = sorted(metric.weights.keys() - names - {s.part for s in index.manifest.components})
    if unknown:
        raise UsageError(f"there is no component {unknown[0]!r}; this index has {', '.join(s.name for s in index.manifest.components)}")
    weights = {s.name: s.weight for s in index.manifest.components}
    for s in index.manifest.components:
        for name in {s.part, s.name} & metric.weights.keys():
            weights[s.name] *= metric.weights[name]
    if not any(weights.values()):
        raise UsageError("every component has the weight 0; leave at least one")
    if metric.layers:
        weights = {s.name: weights[s.name] if matched(s, metric.layers).any() else 0.0 for s in index.manifest.components}
        if not any(weights.values()):
            layers = [
                n for s in index.manifest.components for n in ([s.layer] if s.kind == "sparse" else [layer.name for layer in s.layers])
            ]
            raise UsageError(
                f"no layer of this index matches {', '.join(metric.layers)}; it has {', '.join(layers[:6])}{' ...' * (len(layers) > 6)}"
            )
    prepared: list[DenseQueries | SparseQueries] = []
    for component in (s for s in index.manifest.components if weights[s.name]):
        rows = queries[component.name]
        if isinstance(component, SparseComponent):
            assert isinstance(rows, SparseVectors)
            prepared.append(SparseQueries.make(index, component, rows, metric, weights[component.name]))
        else:
            assert isinstance(rows, np.ndarray)
            prepared.append(DenseQueries.make(index, component, rows, metric, weights[component.name]))
    return prepared


def _count(queries: QueryRows) -> int:
    return len(next(iter(queries.values())))
