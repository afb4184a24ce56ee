"""Scores of rows for any number of queries: exact ones, and estimates of them from one-bit codes.

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
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from ..store.bits import padded_width, rotate
from ..store.coarse import Rounded, coarse_bits, words
from ..store.errors import NumericalError, UsageError
from ..store.index import Group, Index
from ..store.keyed import KeyedVectors, concatenate
from ..store.manifest import DenseSegment, KeyedSegment, Shard, check_damping
from ..store.postings import byte_tables
from ..store.rows import DenseRows, row_bytes

Mode = Literal["influence", "cosine", "per-nat"]
_FEW_QUERIES, _MANY_CODES, _LARGEST_WEIGHT = 4, 1 << 24, 1e6
_SHORTEST = 1e-37  # lengths whose inverse is a float32
_met = [0]


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
        wrong = [name for name, weight in self.weights.items() if not (weight == 0 or 1 / _LARGEST_WEIGHT <= weight <= _LARGEST_WEIGHT)]
        if wrong:
            raise UsageError(f"the weight of {wrong[0]} is {self.weights[wrong[0]]}; it must be 0, or between 1e-6 and 1e6")


QueryRows = Mapping[str, Float32[np.ndarray, "queries dim"] | KeyedVectors]


def combine(queries: QueryRows, matrix: Float64[np.ndarray, "combinations queries"]) -> QueryRows:
    """Linear combinations of queries, which score what the same combinations of their scores would."""
    return {
        name: rows.combined(matrix) if isinstance(rows, KeyedVectors) else (matrix @ rows).astype(np.float32)
        for name, rows in queries.items()
    }


def join(queries: Sequence[QueryRows]) -> QueryRows:
    """Several queries as one set, in their order."""
    joined: dict[str, np.ndarray | KeyedVectors] = {}
    for name, first in queries[0].items():
        parts: list[Any] = [rows[name] for rows in queries]
        if isinstance(first, KeyedVectors):
            ends = np.cumsum([0, *map(len, parts)]).tolist()
            blocks = [(range(a, b), part) for a, b, part in zip(ends[:-1], ends[1:], parts, strict=True)]
            joined[name] = concatenate(blocks, first.vectors.shape[1])
        else:
            joined[name] = np.concatenate(parts)
    return joined


@dataclass(frozen=True)
class Estimates:
    """What one-bit codes say of a group's rows, for some queries: a score is about `(sure + guess) * scale`.

    Attributes:
        sure: what is exact: keyed segments' part.
        guess: what dense segments' codes estimate.
        deviations: standard deviations of the guesses (times `scale`: of the scores).
        scale: under cosine one over the lengths, under per-nat over the losses; 0 where a row has none.
    """

    sure: Float32[np.ndarray, "queries rows"]
    guess: Float32[np.ndarray, "queries rows"]
    deviations: Float32[np.ndarray, "queries rows"]
    scale: Float32[np.ndarray, "queries rows"]


@dataclass(frozen=True)
class Scorer:
    """Some queries, ready to be compared with an index's rows."""

    index: Index
    parts: "Sequence[DenseQueries | KeyedQueries]"
    norms: Float64[np.ndarray, " queries"]
    mode: Mode

    @classmethod
    def of(cls, index: Index, queries: QueryRows, metric: Metric) -> "Scorer":
        """Prepare queries.

        Raises:
            UsageError: no segment is left, or none is called so; the metric does not go with the index.
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
            raise NumericalError("a score is not finite: the question's weights, or its gradient, are too large; ask with smaller ones")
        return scores

    def estimates(self, group: Group) -> Estimates:
        """Estimated scores of a group's rows; `refusal` says when there are none."""
        shape = len(self), group.rows
        sure, guess, variances = np.zeros(shape, np.float32), np.zeros(shape, np.float32), np.zeros(shape)
        squared = np.zeros(group.rows) if self.mode == "cosine" else None
        for p in self.parts:
            if isinstance(p, KeyedQueries):
                p.add(self.index, group, sure, squared)
            else:
                p.estimate(self.index, group, guess, variances, squared)
        if not (np.isfinite(sure).all() and np.isfinite(guess).all() and np.isfinite(variances).all()):
            raise NumericalError("a score is not finite: the question's weights, or its gradient, are too large; ask with smaller ones")
        return Estimates(sure, guess, np.sqrt(variances, out=variances).astype(np.float32), self._scale(group, squared))

    def refusal(self) -> str | None:
        """Why rows cannot be estimated from one-bit codes, if they cannot."""
        for p in self.parts:
            if isinstance(p, DenseQueries) and self.mode == "cosine" and p.change is not None:
                return "lengths under another damping, or of some layers, are known only of rows that are read"
            if (
                isinstance(p, DenseQueries)
                and p.segment.dtype != "1bit"
                and any(self.index.coarse(group, p.segment) is None for group in self.index.groups)
            ):
                return "one-bit codes do not lie beside the rows, or are of other rows: whence reindex makes them"
        return None

    def read(self, query: int, rows: Int64[np.ndarray, " chosen"]) -> Float32[np.ndarray, " chosen"]:
        """Dense segments' exact part of a query's scores with some rows, in the place of their guesses."""
        found = [p.read(self.index, rows, query) for p in self.parts if isinstance(p, DenseQueries)]
        return np.stack(found).sum(axis=0, dtype=np.float32)

    def variance(self, query: int, row: int) -> float:
        """Of a query's score with a row: see `standard_errors`."""
        shard, offset = self.index.locate(row)
        variance = sum(p.variance(self.index, shard, offset, query) for p in self.parts)
        return variance * self.scale(query, row) ** 2

    def scale(self, query: int, row: int) -> float:
        """What the products of a query's segments with a row's are multiplied with to give its score."""
        shard, offset = self.index.locate(row)
        if self.mode == "influence":
            return 1.0
        if self.mode == "per-nat":
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
            row = rows[p.segment.name]
            if isinstance(p, DenseQueries):
                assert isinstance(row, np.ndarray)
                whole = row[0].astype(np.float64)
                total += float((p.weighed(self.index, row[0]).astype(np.float64) if stored else whole * p.factors) @ whole)
            else:
                assert isinstance(row, KeyedVectors)
                total += float((p.weighed(self.index, row).vectors.astype(np.float64) * row.vectors).sum())
        return total

    def _squared_length(self, shard: Shard, offset: int) -> float:
        return sum(p.weight * p.squared_length(self.index, shard, offset) for p in self.parts)

    def _scale(self, group: Group, squared: Float64[np.ndarray, " rows"] | None) -> Float32[np.ndarray, "queries rows"]:
        """What inner products are multiplied with."""
        if squared is not None:
            lengths = self.norms[:, None] * np.sqrt(squared)[None]
        elif self.mode == "per-nat":
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


def _one_bit_variance(coordinates: int, bits: int) -> float:
    """Of the estimate of an inner product of orthogonal unit vectors."""
    return (np.pi / 2 * coordinates / bits - 1) / coordinates


def _prepare(index: Index, queries: QueryRows, metric: Metric) -> list["DenseQueries | KeyedQueries"]:
    """The queries of every segment that counts.

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
    prepared: list[DenseQueries | KeyedQueries] = []
    for segment in (s for s in index.manifest.segments if weights[s.name]):
        rows = queries[segment.name]
        if isinstance(segment, KeyedSegment):
            assert isinstance(rows, KeyedVectors)
            prepared.append(KeyedQueries.make(index, segment, rows, metric, weights[segment.name]))
        else:
            assert isinstance(rows, np.ndarray)
            prepared.append(DenseQueries.make(index, segment, rows, metric, weights[segment.name]))
    return prepared


def _matched(segment: DenseSegment | KeyedSegment, patterns: Sequence[str]) -> Bool[np.ndarray, " layers"]:
    """Which of a segment's layers match a pattern, as in `--layers` of a build."""
    names = [segment.layer] if isinstance(segment, KeyedSegment) else [layer.name for layer in segment.layers]
    return np.array([any(fnmatch.fnmatchcase(n, p) or fnmatch.fnmatchcase(n, f"*.{p}") for p in patterns) for n in names])


def _damped(
    index: Index, segment: KeyedSegment, keys: np.ndarray, vectors: np.ndarray, damping: float | None, curvature: bool
) -> Float64[np.ndarray, "entries width"]:
    """Vectors of a keyed segment whose product with whitened ones is that under another damping, or without curvature."""
    vectors = vectors.astype(np.float64)
    if damping is None and curvature:
        return vectors
    vocabulary, inputs = index.keyed_spectrum(segment)
    eigenvalues, mean = vocabulary[keys][:, None] * inputs, vocabulary.mean() * inputs.mean()
    vectors = vectors * (eigenvalues + segment.curvature.damping * mean)
    return vectors if damping is None else vectors / (eigenvalues + damping * mean)


def _count(queries: QueryRows) -> int:
    return len(next(iter(queries.values())))


def _products(queries: Float32[np.ndarray, "queries dim"], rows: DenseRows, codes: np.ndarray) -> Float32[np.ndarray, "queries rows"]:
    """Inner products of queries with codes, by a matrix product; of a few queries with many int8 codes, where they lie."""
    if rows.dtype == np.int8 and len(queries) <= _FEW_QUERIES:
        _met[0] += codes.size
        if _met[0] > _MANY_CODES:  # compiled code takes 0.4 s to load
            from ..store.kernels import multiply_int8

            products = np.empty((len(queries), len(codes)), np.float32)
            multiply_int8(np.asarray(codes).view(np.ndarray), queries, products)
            return products
    return queries @ rows.values(codes).T


@dataclass(frozen=True)
class DenseQueries:
    """A dense segment's queries with its weight and the change of damping in them."""

    segment: DenseSegment
    weight: float
    queries: Float32[np.ndarray, "queries stored"]
    squared_norms: Float64[np.ndarray, " queries"]
    one_bit_variance: float
    change: Float32[np.ndarray, " stored"] | None
    factors: Float64[np.ndarray, " dim"]

    @classmethod
    def make(
        cls, index: Index, segment: DenseSegment, rows: Float32[np.ndarray, "queries dim"], metric: Metric, weight: float
    ) -> "DenseQueries":
        """A dense segment's queries under a metric, times a weight."""
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
        factors = np.full(segment.dim, weight) * (1.0 if change is None else change)
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
        if not np.isfinite(asked).all():
            raise NumericalError("the question's gradient, times its weights, is not finite; ask with smaller weights")
        kept = segment.dim if reduction.kept is None else len(reduction.kept)
        variance = 0.0
        if segment.dtype == "1bit":
            variance = _one_bit_variance(max(kept, padded_width(kept, segment.stored)), segment.stored)
        return cls(segment, weight, reduction.apply(asked), squared, variance, change, factors)

    def variance(self, index: Index, shard: Shard, offset: int, query: int) -> float:
        """Of a score with one row."""
        asked = self.queries[query].astype(np.float64)
        return self.one_bit_variance * float(asked @ asked) * self.squared_length(index, shard, offset)

    def squared_length(self, index: Index, shard: Shard, offset: int) -> float:
        """A row's squared length under the metric."""
        rows = index.dense(shard, self.segment)
        measured = 1.0
        if self.change is not None:
            measured = float((rows.values(rows.code(offset)[None])[0] ** 2 * self.change).sum() * rows.factors()[offset] ** 2)
        return measured * float(rows.norms[offset]) ** 2

    def split(self, index: Index, shard: Shard, offset: int, query: int) -> tuple[float, dict[str, float]]:
        """The product of one query with one row; and its parts by layer, none where coordinates are mixed."""
        rows, reduction = index.dense(shard, self.segment), index.reduction(self.segment)
        length = float(rows.norms[offset]) * float(rows.factors()[offset])
        products = self.queries[query].astype(np.float64) * rows.values(rows.code(offset)[None])[0] * length
        if reduction.mixes:
            return float(products.sum()), {}
        coordinates = np.arange(self.segment.dim) if reduction.kept is None else reduction.kept
        owners = np.searchsorted([layer.offset for layer in self.segment.layers], coordinates, side="right") - 1
        sums = np.bincount(owners, products, len(self.segment.layers))
        return float(products.sum()), {layer.name: float(s) for layer, s in zip(self.segment.layers, sums, strict=True)}

    def weighed(self, index: Index, row: Float32[np.ndarray, " dim"]) -> Float32[np.ndarray, " dim"]:
        """A whitened row as its product with a plain one is this segment's score: times weight and change, without what is not stored."""
        scaled = row.astype(np.float64) * self.factors
        kept = index.reduction(self.segment).kept
        if kept is not None:
            scaled[np.setdiff1d(np.arange(len(scaled)), kept)] = 0.0
        return scaled.astype(np.float32)

    def add(
        self, index: Index, group: Group, scores: Float32[np.ndarray, "queries rows"], squared: Float64[np.ndarray, " rows"] | None
    ) -> None:
        """Add weighted inner products with a group's rows and, for cosines, the rows' weighted squared norms in the same metric."""
        for shard in group.shards:
            rows, at = index.dense(shard, self.segment), shard.first - group.first
            factors = rows.factors()
            for first, codes in rows.blocks():
                own, part = slice(first, first + len(codes)), slice(at + first, at + first + len(codes))
                scores[:, part] += _products(self.queries, rows, codes) * (rows.norms[own] * factors[own])
                if squared is not None:
                    # Codes are unit directions, up to rounding; under another damping their length is measured anew.
                    lengths = 1.0
                    if self.change is not None:
                        values = rows.values(codes)
                        lengths = (values * values * self.change).sum(axis=1) * factors[own] ** 2
                    squared[part] += self.weight * lengths * rows.norms[own].astype(np.float64) ** 2

    def estimate(
        self,
        index: Index,
        group: Group,
        guess: Float32[np.ndarray, "queries rows"],
        variances: Float64[np.ndarray, "queries rows"],
        squared: Float64[np.ndarray, " rows"] | None,
    ) -> None:
        """Add estimates of the weighted inner products, and their variances, from one-bit codes."""
        rounded = self._rounded
        lengths, rests = np.square(self.queries, dtype=np.float64).sum(axis=1), rounded.rests**2
        for part, codes, factors, noises, norms in self._codes(index, group):
            guess[:, part] += rounded.products(codes) * factors
            variances[:, part] += np.outer(lengths, np.square(noises, dtype=np.float64))
            variances[:, part] += np.outer(rests, np.square(factors, dtype=np.float64))
            if squared is not None:
                squared[part] += self.weight * norms.astype(np.float64) ** 2

    def _codes(self, index: Index, group: Group) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """Which rows, and their codes, factors, noises and norms: see coarse.py. Codes of one bit are their own, without noise."""
        if self.segment.dtype != "1bit":
            coarse = index.coarse(group, self.segment)
            assert coarse is not None  # Scorer.refusal
            yield slice(0, group.rows), coarse.codes, coarse.factors, coarse.noises, coarse.norms
            return
        for shard in group.shards:
            rows, at = index.dense(shard, self.segment), shard.first - group.first
            factors = rows.norms * rows.factors()
            for first, codes in rows.blocks():
                own, part = slice(first, first + len(codes)), slice(at + first, at + first + len(codes))
                yield part, words(codes), factors[own], np.zeros(len(codes), np.float32), rows.norms[own]

    @cached_property
    def _rounded(self) -> Rounded:
        if self.segment.dtype == "1bit":
            return Rounded.of(self.queries)
        return Rounded.of(rotate(self.queries, coarse_bits(self.segment.stored), self.segment.projection.seed))

    def read(self, index: Index, rows: Int64[np.ndarray, " chosen"], query: int) -> Float32[np.ndarray, " chosen"]:
        """Weighted inner products of one query with some rows."""
        scores, lengths, at = np.empty(len(rows), np.float32), np.empty(len(rows), np.float32), 0
        order, own, raw = (
            np.empty(len(rows), np.int64),
            None,
            np.empty((len(rows), row_bytes(self.segment.stored, self.segment.dtype)), np.uint8),
        )
        for group, shard, chosen, offsets in index.by_shard(rows):
            own, part = index.dense(shard, self.segment), slice(at, at + len(chosen))
            if own.one_bit:
                raw[part] = [own.code(offset) for offset in offsets.tolist()]
            else:
                coarse = index.coarse(group, self.segment)
                assert coarse is not None
                own.take(offsets, coarse.checks[offsets + (shard.first - group.first)], raw[part])
            lengths[part] = own.norms[offsets] if own.scales is None else own.norms[offsets] * own.scales[offsets]
            order[part], at = chosen, part.stop
        if own is not None:
            scores[order] = _products(self.queries[query : query + 1], own, raw.view(own.dtype))[0] * lengths
        return scores


@dataclass(frozen=True)
class KeyedQueries:
    """A keyed segment's queries: their entries, rotated as the rows were, with its weight and the change of damping in them."""

    segment: KeyedSegment
    weight: float
    damping: tuple[float | None, bool]
    keys: Int64[np.ndarray, " entries"]
    owners: Int64[np.ndarray, " entries"]
    tables: Float32[np.ndarray, "entries bytes 256"]
    squares: Float64[np.ndarray, " entries"]
    squared_norms: Float64[np.ndarray, " queries"]

    @classmethod
    def make(cls, index: Index, segment: KeyedSegment, rows: KeyedVectors, metric: Metric, weight: float) -> "KeyedQueries":
        """A keyed segment's queries under a metric, times a weight."""
        damping = metric.damping, metric.curvature
        if damping != (None, True) and metric.mode == "cosine":
            raise UsageError("the head's rows hold their lengths under the build's damping alone; ask for influence, or without a damping")
        vectors = _damped(index, segment, rows.keys, rows.vectors, *damping)
        owners = np.repeat(np.arange(len(rows)), np.diff(rows.indptr))
        squared = np.bincount(owners, np.einsum("ed,ed->e", vectors, rows.vectors, dtype=np.float64), len(rows))
        rotated = rotate((vectors * weight).astype(np.float32), segment.bits, segment.seed)
        squares = np.square(vectors * weight).sum(axis=1)
        return cls(segment, weight, damping, rows.keys, owners, byte_tables(rotated), squares, squared)

    def variance(self, index: Index, shard: Shard, offset: int, query: int) -> float:
        """Of a score with one row: the sum over shared tokens."""
        rows, width = index.keyed(shard, self.segment), padded_width(self.segment.width, self.segment.bits)
        part = slice(*rows.indptr[offset : offset + 2])
        own = self.owners == query
        _, at, asked = np.intersect1d(rows.keys[part], self.keys[own], return_indices=True)
        # A factor is |v|^2 over the sum of |coordinates|, which in expectation is |v| times bits sqrt(2 / (pi width)).
        lengths = rows.factors[part][at].astype(np.float64) * self.segment.bits * np.sqrt(2 / (np.pi * width))
        return float(_one_bit_variance(width, self.segment.bits) * (np.square(lengths) * self.squares[own][asked]).sum())

    def split(self, index: Index, shard: Shard, offset: int, query: int) -> dict[int, float]:
        """The product of one query with one row, by the tokens that they share."""
        rows = index.keyed(shard, self.segment)
        part, own = slice(*rows.indptr[offset : offset + 2].tolist()), np.flatnonzero(self.owners == query)
        shared, at, asked = np.intersect1d(rows.keys[part], self.keys[own], return_indices=True)
        codes = rows.codes[part][at]
        values = self.tables[own[asked][:, None], np.arange(codes.shape[1]), codes].sum(axis=1, dtype=np.float64)
        return dict(zip(shared.tolist(), (values * rows.factors[part][at]).tolist(), strict=True))

    def weighed(self, index: Index, row: KeyedVectors) -> KeyedVectors:
        """A whitened row as its product with a plain one is this segment's score: times weight and change of damping."""
        vectors = _damped(index, self.segment, row.keys, row.vectors, *self.damping) * self.weight
        return KeyedVectors(row.indptr, row.keys, vectors.astype(np.float32))

    def squared_length(self, index: Index, shard: Shard, offset: int) -> float:
        """A row's squared length."""
        return float(index.keyed(shard, self.segment).norms[offset]) ** 2

    def add(
        self, index: Index, group: Group, scores: Float32[np.ndarray, "queries rows"], squared: Float64[np.ndarray, " rows"] | None
    ) -> None:
        """See `DenseQueries`; the products are unbiased estimates."""
        index.postings(group, self.segment).add_scores(self.keys, self.owners, self.tables, scores)
        if squared is not None:
            norms = np.concatenate([index.keyed(shard, self.segment).norms for shard in group.shards])
            squared += self.weight * np.square(norms, dtype=np.float64)
