"""Exact search: one blocked pass over all rows, best and worst scores together, for any number of queries.

    influence   <z_q, z_i>
    cosine      <z_q, z_i> / (|z_q| |z_i|)
    per-nat     <z_q, z_i> / L_i, with the example's own loss: what a nat of it is worth, so that long and surprising texts do not lead

Another damping a' than the build's a is exact and changes only the query: coordinates are whitened with (l + a)^(-1/2), so

    g_q^T (H + a' I)^(-1) g_i = sum_j  z_qj (l_j + a_j) / (l_j + a'_j) z_ij

and under cosine the norms are taken in the same metric, in the same pass. Without curvature the factor is (l_j + a_j); of layers that are
left out it is 0. Scores are linear in the question, so that contrasts and means of questions are questions too (`combine`). A scan is
bound by memory bandwidth; for float32 rows it multiplies straight from the memory map.
"""

import fnmatch
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from ..store.bits import padded_width, rotate
from ..store.errors import UsageError
from ..store.index import Group, Index
from ..store.keyed import KeyedVectors
from ..store.manifest import DenseSegment, KeyedSegment, Shard, check_damping
from ..store.postings import byte_tables

Mode = Literal["influence", "cosine", "per-nat"]
_QUERIES_A_PASS = 64


@dataclass(frozen=True)
class Metric:
    """How rows are compared.

    Attributes:
        mode: "influence", "cosine" or "per-nat".
        damping: relative to each layer's mean eigenvalue; None keeps the build's.
        curvature: False undoes the whitening: plain products of projected gradients, and their cosine.
        weights: by segment ("head-2") or part ("head": that of every model), times the index's own, which make the segments' spreads
            comparable; 0 leaves a segment out.
        layers: globs over layer names (the head's and the embeddings' too) or their ends; the others count nothing. All by default.
    """

    mode: Mode = "influence"
    damping: float | None = None
    curvature: bool = True
    weights: Mapping[str, float] = field(default_factory=dict)
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise UsageError(f"the mode is {self.mode!r}; it can be {', '.join(get_args(Mode))}")
        if self.damping is not None:
            check_damping(self.damping)
            if not self.curvature:
                raise UsageError("a damping means nothing without curvature; give one or the other")
        wrong = [name for name, weight in self.weights.items() if not 0 <= weight < np.inf]
        if wrong:
            raise UsageError(f"the weight of {wrong[0]} is {self.weights[wrong[0]]}; it must be a number of at least 0")


@dataclass(frozen=True)
class Hits:
    """One query's best and worst rows.

    Attributes:
        proponents, proponent_scores: rows of positive score, highest first (ties: lower row first).
        opponents, opponent_scores: rows of negative score, lowest first.
        seconds: wall time of the pass that answered it.
    """

    proponents: Int64[np.ndarray, " p"]
    proponent_scores: Float32[np.ndarray, " p"]
    opponents: Int64[np.ndarray, " o"]
    opponent_scores: Float32[np.ndarray, " o"]
    seconds: float


QueryRows = Mapping[str, Float32[np.ndarray, "queries dim"] | KeyedVectors]


def combine(queries: QueryRows, matrix: Float64[np.ndarray, "combinations queries"]) -> QueryRows:
    """Linear combinations of queries, which score what the same combinations of their scores would."""
    return {
        name: rows.combined(matrix) if isinstance(rows, KeyedVectors) else (matrix @ rows).astype(np.float32)
        for name, rows in queries.items()
    }


def search(
    index: Index, queries: QueryRows, k: int, metric: Metric = Metric(), allowed: Bool[np.ndarray, " rows"] | None = None
) -> list[Hits]:
    """The k rows of highest and of lowest score for each query, by an exact scan of the rows that are not deleted.

    Args:
        queries: segment name -> whitened query rows.
        k: from 1 to the number of rows.
        allowed: which rows may be found; None allows all.

    Raises:
        UsageError: k is out of range, or a damping is asked of an index without curvature.
    """
    if not 1 <= k <= len(index):
        raise UsageError(f"k is {k}; it must be between 1 and the index's {len(index)} rows")
    count = _count(queries)
    hits: list[Hits] = []
    for first in range(0, count, _QUERIES_A_PASS):
        part = _part(queries, first, first + _QUERIES_A_PASS)
        started = time.perf_counter()
        found = _scan(index, part, k, metric, index.alive if allowed is None else index.alive & allowed)
        seconds = time.perf_counter() - started
        bound = 1.0 if metric.mode == "cosine" else np.inf  # estimates from one-bit codes may lie beyond; they rank as they are
        hits.extend(Hits(p[0], p[1].clip(-bound, bound), o[0], o[1].clip(-bound, bound), seconds) for p, o in found)
    return hits


def all_scores(index: Index, queries: QueryRows, metric: Metric = Metric()) -> Iterator[tuple[int, Float32[np.ndarray, "queries rows"]]]:
    """Every score, as (first row, scores of a group's rows), in row order; those of deleted rows too.

    Groups are scored by as many threads as there are cores to run on.
    """
    prepared, query_norms = _prepare(index, queries, metric)

    def scored(group: Group) -> Float32[np.ndarray, "queries rows"]:
        return _group_scores(index, group, prepared, query_norms, metric.mode)

    threads = min(len(os.sched_getaffinity(0)), len(index.groups))
    if threads == 1:
        for group in index.groups:
            yield group.first, scored(group)
        return
    with ThreadPoolExecutor(threads) as pool:
        begun: deque[tuple[Group, Future]] = deque()
        for group in index.groups:
            begun.append((group, pool.submit(scored, group)))
            if len(begun) > 2 * threads:  # no more in memory than is being read
                group, made = begun.popleft()  # noqa: PLW2901
                yield group.first, made.result()
        for group, made in begun:
            yield group.first, made.result()


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
    prepared, query_norms = _prepare(index, queries, metric)
    found = []
    for query, own in enumerate(rows):
        variances = np.zeros(len(own))
        for i, row in enumerate(own.tolist()):
            shard, offset = index.locate(row)
            variances[i] = sum(p.variance(index, shard, offset, query) for p in prepared)
            if metric.mode == "cosine":
                squared = sum(p.weight * p.squared_length(index, shard, offset) for p in prepared) * query_norms[query] ** 2
                variances[i] = variances[i] / squared if squared > 0 else 0.0
            elif metric.mode == "per-nat":
                loss = float(index.losses(shard)[offset])
                variances[i] = variances[i] / loss**2 if loss > 0 else 0.0
        found.append(np.sqrt(variances))
    return found


def _one_bit_variance(coordinates: int, bits: int) -> float:
    """Of the estimate of an inner product of orthogonal unit vectors."""
    return (np.pi / 2 * coordinates / bits - 1) / coordinates


def _prepare(index: Index, queries: QueryRows, metric: Metric) -> tuple[list["_Dense | _Keyed"], Float64[np.ndarray, " queries"]]:
    """The queries of every segment that counts, and their lengths.

    Raises:
        UsageError: no segment is left, or none is called so.
    """
    names = {s.name for s in index.manifest.segments}
    unknown = sorted(metric.weights.keys() - names - {s.part for s in index.manifest.segments})
    if unknown:
        raise UsageError(f"there is no segment {unknown[0]!r}; this index has {', '.join(s.name for s in index.manifest.segments)}")
    weights = {s.name: s.weight for s in index.manifest.segments}
    for s in index.manifest.segments:
        for name in {s.part, s.name} & metric.weights.keys():
            weights[s.name] *= metric.weights[name]
    if not any(weights.values()):
        raise UsageError("every segment has the weight 0; leave at least one")
    if metric.layers:
        weights = {s.name: weights[s.name] if _matched(s, metric.layers).any() else 0.0 for s in index.manifest.segments}
        if not any(weights.values()):
            layers = [n for s in index.manifest.segments for n in ([s.layer] if s.kind == "keyed" else [layer.name for layer in s.layers])]
            raise UsageError(
                f"no layer of this index matches {', '.join(metric.layers)}; it has {', '.join(layers[:6])}{' ...' * (len(layers) > 6)}"
            )
    prepared: list[_Dense | _Keyed] = []
    for segment in (s for s in index.manifest.segments if weights[s.name]):
        rows = queries[segment.name]
        if isinstance(segment, KeyedSegment):
            assert isinstance(rows, KeyedVectors)
            prepared.append(_Keyed.make(index, segment, rows, metric, weights[segment.name]))
        else:
            assert isinstance(rows, np.ndarray)
            prepared.append(_Dense.make(index, segment, rows, metric, weights[segment.name]))
    query_norms = np.sqrt(sum((p.weight * p.squared_norms for p in prepared), np.zeros(_count(queries))))
    return prepared, query_norms


def _matched(segment: DenseSegment | KeyedSegment, patterns: Sequence[str]) -> Bool[np.ndarray, " layers"]:
    """Which of a segment's layers match a pattern, as in `--layers` of a build."""
    names = [segment.layer] if isinstance(segment, KeyedSegment) else [layer.name for layer in segment.layers]
    return np.array([any(fnmatch.fnmatchcase(n, p) or fnmatch.fnmatchcase(n, f"*.{p}") for p in patterns) for n in names])


def _count(queries: QueryRows) -> int:
    return len(next(iter(queries.values())))


def _part(queries: QueryRows, first: int, last: int) -> QueryRows:
    return {name: rows.part(first, last) if isinstance(rows, KeyedVectors) else rows[first:last] for name, rows in queries.items()}


@dataclass(frozen=True)
class _Dense:
    """A dense segment's queries with its weight and the change of damping in them."""

    segment: DenseSegment
    weight: float
    queries: Float32[np.ndarray, "queries stored"]
    squared_norms: Float64[np.ndarray, " queries"]
    one_bit_variance: float
    change: Float32[np.ndarray, " stored"] | None

    @classmethod
    def make(cls, index: Index, segment: DenseSegment, rows: Float32[np.ndarray, "queries dim"], metric: Metric, weight: float) -> "_Dense":
        change = None
        scaled = rows.astype(np.float64)
        if metric.damping is not None:
            eigenvalues, means = index.spectrum(segment)
            built = eigenvalues + segment.curvature.damping * means
            wanted = eigenvalues + metric.damping * means
            change = np.divide(built, wanted, out=np.zeros_like(built), where=wanted > 0)
        elif not metric.curvature and any(layer.curvature != "identity" for layer in segment.layers):
            eigenvalues, means = index.spectrum(segment)
            change = eigenvalues + segment.curvature.damping * means
        if metric.layers and not (matched := _matched(segment, metric.layers)).all():
            change = np.repeat(matched, [layer.size for layer in segment.layers]) * (1.0 if change is None else change)
        reduction = index.reduction(segment)
        if change is not None:
            if metric.mode == "cosine" and reduction.mixes:
                raise UsageError(
                    f"the rows of {segment.name} are a random projection, whose lengths are known under the build's damping and over all "
                    "layers alone; ask for influence, or without a change of these"
                )
            scaled = scaled * change
            change = (change if reduction.kept is None else change[reduction.kept]).astype(np.float32)
        squared = np.einsum("qd,qd->q", scaled, rows, dtype=np.float64)
        asked = (scaled * weight).astype(np.float32)
        kept = segment.dim if reduction.kept is None else len(reduction.kept)
        variance = 0.0
        if segment.dtype == "1bit":
            variance = _one_bit_variance(max(kept, padded_width(kept, segment.stored)), segment.stored)
        return cls(segment, weight, reduction.apply(asked), squared, variance, change)

    def variance(self, index: Index, shard: Shard, offset: int, query: int) -> float:
        """Of a score with one row."""
        asked = self.queries[query].astype(np.float64)
        return self.one_bit_variance * float(asked @ asked) * self.squared_length(index, shard, offset)

    def squared_length(self, index: Index, shard: Shard, offset: int) -> float:
        """A row's squared length."""
        return float(index.dense(shard, self.segment).norms[offset]) ** 2

    def add(
        self, index: Index, group: Group, scores: Float32[np.ndarray, "queries rows"], squared: Float64[np.ndarray, " rows"] | None
    ) -> None:
        """Add weighted inner products with a group's rows and, for cosines, the rows' weighted squared norms in the same metric."""
        for shard in group.shards:
            rows, at = index.dense(shard, self.segment), shard.first - group.first
            factors = rows.factors()
            for first, codes in rows.blocks():
                values = rows.values(codes)
                own, part = slice(first, first + len(codes)), slice(at + first, at + first + len(codes))
                scores[:, part] += (self.queries @ values.T) * (rows.norms[own] * factors[own])
                if squared is not None:
                    # Codes are unit directions, up to rounding; under another damping their length is measured anew.
                    change = self.change if self.change is not None else np.float32(1)
                    lengths = ((values * values * change).sum(axis=1) * factors[own] ** 2) * rows.norms[own] ** 2
                    squared[part] += self.weight * lengths


@dataclass(frozen=True)
class _Keyed:
    """A keyed segment's queries: their entries, rotated as the rows were, with its weight and the change of damping in them."""

    segment: KeyedSegment
    weight: float
    keys: Int64[np.ndarray, " entries"]
    owners: Int64[np.ndarray, " entries"]
    tables: Float32[np.ndarray, "entries bytes 256"]
    squares: Float64[np.ndarray, " entries"]
    squared_norms: Float64[np.ndarray, " queries"]

    @classmethod
    def make(cls, index: Index, segment: KeyedSegment, rows: KeyedVectors, metric: Metric, weight: float) -> "_Keyed":
        vectors = rows.vectors.astype(np.float64)
        if metric.damping is not None or not metric.curvature:
            if metric.mode == "cosine":
                raise UsageError(
                    "the head's rows hold their lengths under the build's damping alone; ask for influence, or without a damping"
                )
            vocabulary, inputs = index.keyed_spectrum(segment)
            eigenvalues, mean = vocabulary[rows.keys][:, None] * inputs, vocabulary.mean() * inputs.mean()
            vectors = vectors * (eigenvalues + segment.curvature.damping * mean)
            if metric.damping is not None:
                vectors = vectors / (eigenvalues + metric.damping * mean)
        owners = np.repeat(np.arange(len(rows)), np.diff(rows.indptr))
        squared = np.bincount(owners, np.einsum("ed,ed->e", vectors, rows.vectors, dtype=np.float64), len(rows))
        rotated = rotate((vectors * weight).astype(np.float32), segment.bits, segment.seed)
        squares = np.square(vectors * weight).sum(axis=1)
        return cls(segment, weight, rows.keys, owners, byte_tables(rotated), squares, squared)

    def variance(self, index: Index, shard: Shard, offset: int, query: int) -> float:
        """Of a score with one row: the sum over shared tokens."""
        rows, width = index.keyed(shard, self.segment), padded_width(self.segment.width, self.segment.bits)
        part = slice(*rows.indptr[offset : offset + 2])
        own = self.owners == query
        _, at, asked = np.intersect1d(rows.keys[part], self.keys[own], return_indices=True)
        # A factor is |v|^2 over the sum of |coordinates|, which in expectation is |v| times bits sqrt(2 / (pi width)).
        lengths = rows.factors[part][at].astype(np.float64) * self.segment.bits * np.sqrt(2 / (np.pi * width))
        return float(_one_bit_variance(width, self.segment.bits) * (np.square(lengths) * self.squares[own][asked]).sum())

    def squared_length(self, index: Index, shard: Shard, offset: int) -> float:
        """A row's squared length."""
        return float(index.keyed(shard, self.segment).norms[offset]) ** 2

    def add(
        self, index: Index, group: Group, scores: Float32[np.ndarray, "queries rows"], squared: Float64[np.ndarray, " rows"] | None
    ) -> None:
        """See `_Dense`; the products are unbiased estimates."""
        index.postings(group, self.segment).add_scores(self.keys, self.owners, self.tables, scores)
        if squared is not None:
            norms = np.concatenate([index.keyed(shard, self.segment).norms for shard in group.shards])
            squared += self.weight * np.square(norms, dtype=np.float64)


def _group_scores(
    index: Index,
    group: Group,
    prepared: Sequence[_Dense | _Keyed],
    query_norms: Float64[np.ndarray, " queries"],
    mode: Mode,
) -> Float32[np.ndarray, "queries rows"]:
    scores = np.zeros((len(query_norms), group.rows), np.float32)
    squared = np.zeros(group.rows) if mode == "cosine" else None
    for p in prepared:
        p.add(index, group, scores, squared)
    if mode == "per-nat":
        losses = np.concatenate([index.losses(shard) for shard in group.shards])[None]
        scores = np.divide(scores, losses, out=np.zeros_like(scores), where=losses > 0)
    if squared is not None:
        norms = query_norms[:, None] * np.sqrt(squared)[None]
        scores = np.divide(scores, norms, out=np.zeros(scores.shape), where=norms > 0).astype(np.float32)
    return scores


def _scan(index: Index, queries: QueryRows, k: int, metric: Metric, allowed: Bool[np.ndarray, " rows"]) -> list[tuple[tuple, tuple]]:
    count = _count(queries)
    empty = (np.zeros(0, np.int64), np.zeros(0, np.float32))
    best, worst = [empty] * count, [empty] * count
    for first, scores in all_scores(index, queries, metric):
        rows = np.arange(first, first + scores.shape[1])
        if not (own := allowed[first : first + len(rows)]).all():
            rows, scores = rows[own], scores[:, own]  # noqa: PLW2901
        for q in range(count):
            best[q] = _merge(best[q], rows, scores[q], k, 1)
            worst[q] = _merge(worst[q], rows, scores[q], k, -1)
    return list(zip(best, worst, strict=True))


def _merge(known: tuple[np.ndarray, np.ndarray], rows: np.ndarray, scores: np.ndarray, k: int, sign: int) -> tuple[np.ndarray, np.ndarray]:
    """The k entries of largest positive sign * score among the known and the new; equal scores in row order."""
    threshold = known[1][-1] if len(known[0]) == k else np.float32(0)
    chosen = np.flatnonzero(scores > threshold if sign > 0 else scores < threshold)
    if not len(chosen):
        return known
    if len(chosen) > 4 * k:  # sort those alone that may stay, equal ones among them
        costs = -sign * scores[chosen]
        chosen = chosen[costs <= np.partition(costs, k - 1)[k - 1]]
    rows = np.concatenate([known[0], rows[chosen]])
    scores = np.concatenate([known[1], scores[chosen]])
    order = np.lexsort((rows, -sign * scores))[:k]
    return rows[order], scores[order]
