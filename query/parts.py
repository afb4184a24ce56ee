"""Queries of one component, ready to be compared with its rows: their weight and the change of damping are in them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float32, Float64, Int64

from ..store.bits import padded_width, rotate
from ..store.compiled import Compiled
from ..store.dense import DenseRows, row_bytes
from ..store.errors import NumericalError, UsageError
from ..store.index import Group, Index
from ..store.manifest import DenseComponent, SparseComponent
from ..store.postings import byte_tables
from ..store.scan_codes import Rounded, scan_bits, words
from ..store.shard import Shard
from ..store.sparse import SparseVectors
from .metric import Metric, matched

_FEW_QUERIES = 4
_multiply_int8 = Compiled("multiply_int8", after=1 << 24)


@dataclass(frozen=True)
class DenseQueries:
    """A dense component's queries with its weight and the change of damping in them."""

    component: DenseComponent
    weight: float
    queries: Float32[np.ndarray, "queries stored"]
    squared_norms: Float64[np.ndarray, " queries"]
    one_bit_variance: float
    change: Float32[np.ndarray, " stored"] | None
    factors: Float64[np.ndarray, " dim"]

    @classmethod
    def make(
        cls, index: Index, component: DenseComponent, rows: Float32[np.ndarray, "queries dim"], metric: Metric, weight: float
    ) -> "DenseQueries":
        """A dense component's queries under a metric, times a weight."""
        change = None
        scaled = rows.astype(np.float64)
        if metric.damping is not None:
            eigenvalues, means = index.spectrum(component)
            built = eigenvalues + component.curvature.damping * means
            wanted = eigenvalues + metric.damping * means
            change = np.divide(built, wanted, out=np.zeros_like(built), where=wanted > 0)
        elif not metric.curvature and any(layer.curvature != "identity" for layer in component.layers):
            eigenvalues, means = index.spectrum(component)
            change = eigenvalues + component.curvature.damping * means
        if metric.layers and not (chosen := matched(component, metric.layers)).all():
            change = np.repeat(chosen, [layer.size for layer in component.layers]) * (1.0 if change is None else change)
        reduction = index.reduction(component)
        factors = np.full(component.dim, weight) * (1.0 if change is None else change)
        if change is not None:
            if metric.mode == "cosine" and reduction.mixes:
                raise UsageError(
                    f"the rows of {component.name} are a random projection, whose lengths are known under the build's damping and over all "
                    "layers alone; ask for influence, or without a change of these"
                )
            scaled = scaled * change
            change = (change if reduction.kept is None else change[reduction.kept]).astype(np.float32)
        squared = np.einsum("qd,qd->q", scaled, rows, dtype=np.float64)
        asked = (scaled * weight).astype(np.float32)
        if not np.isfinite(asked).all():
            raise NumericalError("the query's gradient, times its weights, is not finite; ask with smaller weights")
        kept = component.dim if reduction.kept is None else len(reduction.kept)
        variance = 0.0
        if component.dtype == "1bit":
            variance = _one_bit_variance(max(kept, padded_width(kept, component.stored)), component.stored)
        return cls(component, weight, reduction.apply(asked), squared, variance, change, factors)

    def variance(self, index: Index, shard: Shard, offset: int, query: int) -> float:
        """Of a score with one row."""
        asked = self.queries[query].astype(np.float64)
        return self.one_bit_variance * float(asked @ asked) * self.squared_length(index, shard, offset)

    def squared_length(self, index: Index, shard: Shard, offset: int) -> float:
        """A row's squared length under the metric."""
        rows = index.rows(shard, self.component)
        measured = 1.0
        if self.change is not None:
            measured = float((rows.values(rows.code(offset)[None])[0] ** 2 * self.change).sum() * rows.factors()[offset] ** 2)
        return measured * float(rows.norms[offset]) ** 2

    def split(self, index: Index, shard: Shard, offset: int, query: int) -> tuple[float, dict[str, float]]:
        """The product of one query with one row; and its parts by layer, none where coordinates are mixed."""
        rows, reduction = index.rows(shard, self.component), index.reduction(self.component)
        length = float(rows.norms[offset]) * float(rows.factors()[offset])
        products = self.queries[query].astype(np.float64) * rows.values(rows.code(offset)[None])[0] * length
        if reduction.mixes:
            return float(products.sum()), {}
        coordinates = np.arange(self.component.dim) if reduction.kept is None else reduction.kept
        owners = np.searchsorted([layer.offset for layer in self.component.layers], coordinates, side="right") - 1
        sums = np.bincount(owners, products, len(self.component.layers))
        return float(products.sum()), {layer.name: float(s) for layer, s in zip(self.component.layers, sums, strict=True)}

    def weighed(self, index: Index, row: Float32[np.ndarray, " dim"]) -> Float32[np.ndarray, " dim"]:
        """A whitened row as its product with a plain one is this component's score: times weight and change, without what is not stored."""
        scaled = row.astype(np.float64) * self.factors
        kept = index.reduction(self.component).kept
        if kept is not None:
            scaled[np.setdiff1d(np.arange(len(scaled)), kept)] = 0.0
        return scaled.astype(np.float32)

    def add(
        self, index: Index, group: Group, scores: Float32[np.ndarray, "queries rows"], squared: Float64[np.ndarray, " rows"] | None
    ) -> None:
        """Add weighted inner products with a group's rows and, for cosines, the rows' weighted squared norms in the same metric."""
        for shard in group.shards:
            rows, at = index.rows(shard, self.component), shard.first - group.first
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
        """Which rows, and their codes, factors, noises and norms: see scan_codes.py. Codes of one bit are their own, without noise."""
        if self.component.dtype != "1bit":
            scan_codes = index.scan_codes(group, self.component)
            assert scan_codes is not None  # Scorer.refusal
            yield slice(0, group.rows), scan_codes.codes, scan_codes.factors, scan_codes.noises, scan_codes.norms
            return
        for shard in group.shards:
            rows, at = index.rows(shard, self.component), shard.first - group.first
            factors = rows.norms * rows.factors()
            for first, codes in rows.blocks():
                own, part = slice(first, first + len(codes)), slice(at + first, at + first + len(codes))
                yield part, words(codes), factors[own], np.zeros(len(codes), np.float32), rows.norms[own]

    @cached_property
    def _rounded(self) -> Rounded:
        if self.component.dtype == "1bit":
            return Rounded.of(self.queries)
        return Rounded.of(rotate(self.queries, scan_bits(self.component.stored), self.component.projection.seed))

    def read(self, index: Index, rows: Int64[np.ndarray, " chosen"], query: int) -> Float32[np.ndarray, " chosen"]:
        """Weighted inner products of one query with some rows."""
        scores, lengths, at = np.empty(len(rows), np.float32), np.empty(len(rows), np.float32), 0
        order, own, raw = (
            np.empty(len(rows), np.int64),
            None,
            np.empty((len(rows), row_bytes(self.component.stored, self.component.dtype)), np.uint8),
        )
        for group, shard, chosen, offsets in index.by_shard(rows):
            own, part = index.rows(shard, self.component), slice(at, at + len(chosen))
            if own.one_bit:
                raw[part] = [own.code(offset) for offset in offsets.tolist()]
            else:
                scan_codes = index.scan_codes(group, self.component)
                assert scan_codes is not None
                own.take(offsets, scan_codes.checks[offsets + (shard.first - group.first)], raw[part])
            lengths[part] = own.norms[offsets] if own.scales is None else own.norms[offsets] * own.scales[offsets]
            order[part], at = chosen, part.stop
        if own is not None:
            scores[order] = _products(self.queries[query : query + 1], own, raw.view(own.dtype))[0] * lengths
        return scores


@dataclass(frozen=True)
class SparseQueries:
    """A sparse component's queries: their entries, rotated as the rows were, with its weight and the change of damping in them."""

    component: SparseComponent
    weight: float
    damping: tuple[float | None, bool]
    keys: Int64[np.ndarray, " entries"]
    owners: Int64[np.ndarray, " entries"]
    tables: Float32[np.ndarray, "entries bytes 256"]
    squares: Float64[np.ndarray, " entries"]
    squared_norms: Float64[np.ndarray, " queries"]

    @classmethod
    def make(cls, index: Index, component: SparseComponent, rows: SparseVectors, metric: Metric, weight: float) -> "SparseQueries":
        """A sparse component's queries under a metric, times a weight."""
        damping = metric.damping, metric.curvature
        if damping != (None, True) and metric.mode == "cosine":
            raise UsageError("the head's rows hold their lengths under the build's damping alone; ask for influence, or without a damping")
        vectors = _damped(index, component, rows.keys, rows.vectors, *damping)
        owners = np.repeat(np.arange(len(rows)), np.diff(rows.indptr))
        squared = np.bincount(owners, np.einsum("ed,ed->e", vectors, rows.vectors, dtype=np.float64), len(rows))
        rotated = rotate((vectors * weight).astype(np.float32), component.bits, component.seed)
        squares = np.square(vectors * weight).sum(axis=1)
        return cls(component, weight, damping, rows.keys, owners, byte_tables(rotated), squares, squared)

    def variance(self, index: Index, shard: Shard, offset: int, query: int) -> float:
        """Of a score with one row: the sum over shared tokens."""
        width = padded_width(self.component.width, self.component.bits)
        keys, _, factors = index.rows(shard, self.component).entries(offset, offset + 1)
        own = self.owners == query
        _, positions, shared = np.intersect1d(keys, self.keys[own], return_indices=True)
        # A factor is |v|^2 over the sum of |coordinates|, which in expectation is |v| times bits sqrt(2 / (pi width)).
        lengths = factors[positions].astype(np.float64) * self.component.bits * np.sqrt(2 / (np.pi * width))
        return float(_one_bit_variance(width, self.component.bits) * (np.square(lengths) * self.squares[own][shared]).sum())

    def split(self, index: Index, shard: Shard, offset: int, query: int) -> dict[int, float]:
        """The product of one query with one row, by the tokens that they share."""
        keys, codes, factors = index.rows(shard, self.component).entries(offset, offset + 1)
        own = np.flatnonzero(self.owners == query)
        tokens, positions, shared = np.intersect1d(keys, self.keys[own], return_indices=True)
        values = self.tables[own[shared][:, None], np.arange(codes.shape[1]), codes[positions]].sum(axis=1, dtype=np.float64)
        return dict(zip(tokens.tolist(), (values * factors[positions]).tolist(), strict=True))

    def weighed(self, index: Index, row: SparseVectors) -> SparseVectors:
        """A whitened row as its product with a plain one is this component's score: times weight and change of damping."""
        vectors = _damped(index, self.component, row.keys, row.vectors, *self.damping) * self.weight
        return SparseVectors(row.indptr, row.keys, vectors.astype(np.float32))

    def squared_length(self, index: Index, shard: Shard, offset: int) -> float:
        """A row's squared length."""
        return float(index.rows(shard, self.component).norms[offset]) ** 2

    def add(
        self, index: Index, group: Group, scores: Float32[np.ndarray, "queries rows"], squared: Float64[np.ndarray, " rows"] | None
    ) -> None:
        """See `DenseQueries`; the products are unbiased estimates."""
        index.postings(group, self.component).add_scores(self.keys, self.owners, self.tables, scores)
        if squared is not None:
            norms = np.concatenate([index.rows(shard, self.component).norms for shard in group.shards])
            squared += self.weight * np.square(norms, dtype=np.float64)


def _one_bit_variance(coordinates: int, bits: int) -> float:
    """Of the estimate of an inner product of orthogonal unit vectors."""
    return (np.pi / 2 * coordinates / bits - 1) / coordinates


def _damped(
    index: Index, component: SparseComponent, keys: np.ndarray, vectors: np.ndarray, damping: float | None, curvature: bool
) -> Float64[np.ndarray, "entries width"]:
    """Vectors of a sparse component whose product with whitened ones is that under another damping, or without curvature."""
    vectors = vectors.astype(np.float64)
    if damping is None and curvature:
        return vectors
    vocabulary, inputs = index.sparse_spectrum(component)
    eigenvalues, mean = vocabulary[keys][:, None] * inputs, vocabulary.mean() * inputs.mean()
    vectors = vectors * (eigenvalues + component.curvature.damping * mean)
    return vectors if damping is None else vectors / (eigenvalues + damping * mean)


def _products(queries: Float32[np.ndarray, "queries dim"], rows: DenseRows, codes: np.ndarray) -> Float32[np.ndarray, "queries rows"]:
    """Inner products of queries with codes, by a matrix product; of a few queries with many int8 codes, where they lie."""
    compiled = _multiply_int8.after(codes.size) if rows.dtype == np.int8 and len(queries) <= _FEW_QUERIES else None
    if compiled is not None:
        products = np.empty((len(queries), len(codes)), np.float32)
        compiled(np.asarray(codes).view(np.ndarray), queries, products)
        return products
    return queries @ rows.values(codes).T
