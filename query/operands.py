"""Queries of one component, prepared for products with its rows: they include the component's weight and the change of damping."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from ..store.bits import padded_width, rotate, to_words
from ..store.compiled import Compiled
from ..store.dense import DenseRows, row_bytes
from ..store.errors import NumericalError, UsageError
from ..store.index import Index, ShardGroup
from ..store.manifest import Component, DenseComponent, SparseComponent
from ..store.postings import byte_tables
from ..store.scan_codes import RoundedQueries, scan_bits
from ..store.shapes import Float, Float32, Float64, Int64
from ..store.shard import Shard
from ..store.vectors import DenseVectors, SparseVectors, Vectors
from .metric import Metric, matched
from .mixing import Mixing
from .source import added, filter_times

_FEW_QUERIES = 4
_SEPARATE_ROWS = 1024
_CODE_BYTES = 16  # of a row's scan code besides its bits: factor, noise, norm and checksum
_LEAST_RATIO = 6  # of a row's bytes to those of its scan code, below which estimates take longer than the exact scan
_MANY = 1 << 16  # rows; fewer are searched in no time by either
_multiply_int8 = Compiled("multiply_int8", least_work=1 << 24)
_add_squares = Compiled("add_squares", least_work=1 << 24)


class Split(NamedTuple):
    """A product of a query with a row, in total and by layer and shared token; layers are absent where their coordinates are mixed."""

    total: float
    layers: Mapping[str, float]
    tokens: Mapping[int, float]


class Estimates(NamedTuple):
    """Arrays to which operands add their part of the scores of a group's rows.

    Attributes:
        exact: exact products.
        estimate: estimated products.
        variances: of the estimates.
        squared: squared lengths of the rows; None where the mode does not need them.
    """

    exact: Float32[np.ndarray, "queries rows"]
    estimate: Float32[np.ndarray, "queries rows"]
    variances: Float64[np.ndarray, "queries rows"]
    squared: Float64[np.ndarray, " rows"] | None


@runtime_checkable
class Operand(Protocol):
    """Prepared queries of one component."""

    component: Component
    weight: float
    squared_norms: Float64[np.ndarray, " queries"]
    exact_scan: bool

    @classmethod
    def of(cls, index: Index, component: Component, queries: Any, metric: Metric, weight: float, mixing: Mixing | None) -> "Operand":
        """Prepare a component's queries under a metric, times a weight.

        Args:
            mixing: of all queries that are asked together, where the metric mixes their second moments in.
        """

    def add(
        self, index: Index, group: ShardGroup, scores: Float32[np.ndarray, "queries rows"], squared: Float64[np.ndarray, " rows"] | None
    ) -> None:
        """Add weighted products with a group's rows and, for cosines, the rows' weighted squared lengths in the same metric."""

    def estimate(self, index: Index, group: ShardGroup, estimates: Estimates) -> None:
        """Add exact products where they are cheap, else estimates from scan codes with their variances."""

    def refusal(self, index: Index, groups: Sequence[ShardGroup], mode: str) -> str | None:
        """Return the reason why the products with rows of these groups cannot be estimated, if there is one."""

    def read(self, index: Index, rows: Int64[np.ndarray, " rows"], query: int) -> Float32[np.ndarray, " rows"]:
        """Return the exact products of one query with some rows, in place of their estimates (0 where `estimate` was exact)."""

    def variance(self, index: Index, shard: Shard, offset: int, query: int) -> float:
        """Return the variance that coding gives to the product with one row."""

    def squared_length(self, index: Index, shard: Shard, offset: int) -> float:
        """Return a stored row's squared length under the metric."""

    def split(self, index: Index, shard: Shard, offset: int, query: int) -> Split:
        """Split the product of one query with one row."""

    def exported(self) -> dict[str, np.ndarray]:
        """Return the arrays of the prepared queries, for other search engines (see export.py)."""

    def scaled(self, index: Index, row: Any, stored: bool = True) -> Vectors:
        """Scale a whitened row so that its plain product with another is this component's score.

        Args:
            stored: leave out coordinates that are not stored.
        """


@dataclass(frozen=True)
class DenseOperand:
    """Prepared queries of a dense component.

    Attributes:
        queries: reduced as the rows are.
        one_bit_variance: of a product of unit vectors, where rows are one-bit codes.
        change: by selected coordinate, the factor of the change of damping and layers; None for none.
        factors: by coordinate of a whitened row, weight times change.
        mixing: of the queries' second moments into the curvature, in place of a change; None for none.
    """

    exact_scan = False

    component: DenseComponent
    weight: float
    queries: Float32[np.ndarray, "queries stored"]
    squared_norms: Float64[np.ndarray, " queries"]
    one_bit_variance: float
    change: Float32[np.ndarray, " selected"] | None
    factors: Float64[np.ndarray, " dim"]
    mixing: Mixing | None = None

    @classmethod
    def of(
        cls, index: Index, component: DenseComponent, queries: DenseVectors, metric: Metric, weight: float, mixing: Mixing | None = None
    ) -> "DenseOperand":
        """See `Operand`."""
        values = queries.values.astype(np.float64)
        if component.unit_length and (metric.changes_curvature or metric.mix is not None):
            raise UsageError(f"the rows of {component.name} have unit length under the build's curvature alone; ask without another one")
        change = None if mixing else change_of_curvature(index, component, metric)
        reduction = index.reduction(component)
        if change is not None and metric.mode == "cosine" and reduction.mixes:
            raise UsageError(
                f"the rows of {component.name} are a random projection, whose lengths are known under the build's damping and over all "
                "layers alone; ask for influence, or without a change of these"
            )
        factors = np.full(component.dim, weight) if change is None else weight * change
        mixed = values if mixing is None else mixing.apply(values)
        scaled = (mixed * factors).astype(np.float32)
        if not np.isfinite(scaled).all():
            raise NumericalError("the query's gradient, times its weights, is not finite; ask with smaller weights")
        squared_norms = np.einsum("qd,qd->q", mixed if change is None else values * change, values, dtype=np.float64)
        stored_change = change if change is None or reduction.selection is None else change[reduction.selection]
        selected = component.dim if reduction.selection is None else len(reduction.selection)
        variance = 0.0
        if component.one_bit:
            variance = _one_bit_variance(max(selected, padded_width(selected, component.stored)), component.stored)
        return cls(
            component,
            weight,
            reduction.apply(scaled),
            squared_norms,
            variance,
            None if stored_change is None else stored_change.astype(np.float32),
            factors,
            mixing,
        )

    @classmethod
    def changed(cls, index: Index, component: Any, metric: Metric, rows: DenseVectors) -> DenseVectors:
        """See `changed_rows`."""
        change = change_of_curvature(index, component, metric)
        return rows if change is None else DenseVectors(rows.values * change)

    def add(
        self, index: Index, group: ShardGroup, scores: Float32[np.ndarray, "queries rows"], squared: Float64[np.ndarray, " rows"] | None
    ) -> None:
        """See `Operand`."""
        for rows, offsets, positions, codes in self._blocks(index, group):
            factors = rows.factors()[offsets]
            norms = rows.norms[offsets]
            scores[:, positions] += _products(self.queries, rows, codes) * (norms * factors)
            if squared is not None:
                # Codes are unit directions, up to rounding; under another damping their lengths are computed here.
                lengths = 1.0
                if self.mixing is not None or self.change is not None:
                    lengths = self._changed_lengths(rows.values(codes)) * factors**2
                squared[positions] += self.weight * lengths * norms.astype(np.float64) ** 2

    def estimate(self, index: Index, group: ShardGroup, estimates: Estimates) -> None:
        """See `Operand`."""
        rounded = self._rounded
        lengths = np.square(self.queries, dtype=np.float64).sum(axis=1)
        squared_errors = rounded.error_lengths**2
        for positions, codes, factors, noises, norms in self._codes(index, group):
            estimates.estimate[:, positions] += rounded.products(codes) * factors
            estimates.variances[:, positions] += np.outer(lengths, np.square(noises, dtype=np.float64))
            estimates.variances[:, positions] += np.outer(squared_errors, np.square(factors, dtype=np.float64))
            if estimates.squared is not None:
                estimates.squared[positions] += self.weight * norms.astype(np.float64) ** 2

    def refusal(self, index: Index, groups: Sequence[ShardGroup], mode: str) -> str | None:
        """See `Operand`."""
        if mode == "cosine" and (self.change is not None or self.mixing is not None):
            return "lengths under another damping, or of some layers, are known only of rows that are read"
        if self.component.has_search_arrays and any(index.search_arrays(group, self.component) is None for group in groups):
            return "one-bit codes are not stored next to the rows, or are of other rows: run wherefrom reindex"
        length = row_bytes(self.component.stored, self.component.dtype)
        codes = scan_bits(self.component.stored) // 8 + _CODE_BYTES
        if self.component.has_search_arrays and length < _LEAST_RATIO * codes and len(index) >= _MANY:
            return f"rows of {length:,} bytes are scanned faster than estimated from codes of {codes:,}"
        return None

    def read(self, index: Index, rows: Int64[np.ndarray, " rows"], query: int) -> Float32[np.ndarray, " rows"]:
        """See `Operand`."""
        scores = np.zeros(len(rows), np.float32)
        codes = np.empty((len(rows), row_bytes(self.component.stored, self.component.dtype)), np.uint8)
        lengths = np.empty(len(rows), np.float32)
        order = np.empty(len(rows), np.int64)
        reader: DenseRows | None = None
        first = 0
        for group, shard, positions, offsets in index.by_shard(rows):
            reader = index.rows(shard, self.component)
            part = slice(first, first + len(positions))
            arrays = index.search_arrays(group, self.component)
            if arrays is None:  # of one-bit rows, or of a search cache that is missing
                codes[part] = [reader.code(offset).view(np.uint8) for offset in offsets.tolist()]
            else:
                reader.take(offsets, arrays.checks[offsets + (shard.first - group.first)], codes[part])
            lengths[part] = reader.norms[offsets] * reader.factors()[offsets]
            order[part] = positions
            first = part.stop
        if reader is not None:
            scores[order] = _separate_products(self.queries[query], reader, codes.view(reader.dtype)) * lengths
        return scores

    def variance(self, index: Index, shard: Shard, offset: int, query: int) -> float:
        """See `Operand`."""
        vector = self.queries[query].astype(np.float64)  # under the metric, so the row is taken as it is stored
        length = float(index.rows(shard, self.component).norms[offset])
        return self.one_bit_variance * float(vector @ vector) * length**2

    def squared_length(self, index: Index, shard: Shard, offset: int) -> float:
        """See `Operand`."""
        rows = index.rows(shard, self.component)
        length = 1.0
        if self.mixing is not None or self.change is not None:
            length = float(self._changed_lengths(rows.values(rows.code(offset)[None]))[0] * rows.factors()[offset] ** 2)
        return length * float(rows.norms[offset]) ** 2

    def split(self, index: Index, shard: Shard, offset: int, query: int) -> Split:
        """See `Operand`."""
        rows = index.rows(shard, self.component)
        reduction = index.reduction(self.component)
        length = float(rows.norms[offset]) * float(rows.factors()[offset])
        products = self.queries[query].astype(np.float64) * rows.values(rows.code(offset)[None])[0] * length
        if reduction.mixes:
            return Split(float(products.sum()), {}, {})
        coordinates = np.arange(self.component.dim) if reduction.selection is None else reduction.selection
        layers = np.searchsorted([layer.offset for layer in self.component.layers], coordinates, side="right") - 1
        sums = np.bincount(layers, products, len(self.component.layers))
        return Split(float(products.sum()), dict(zip(self.component.layer_names, sums.tolist(), strict=True)), {})

    def exported(self) -> dict[str, np.ndarray]:
        """See `Operand`."""
        return {"vectors": self.queries}

    def scaled(self, index: Index, row: DenseVectors, stored: bool = True) -> DenseVectors:
        """See `Operand`."""
        factors = self.factors
        selection = index.reduction(self.component).selection
        if stored and selection is not None:
            factors = np.zeros_like(self.factors)
            factors[selection] = self.factors[selection]
        values = row.values if self.mixing is None else self.mixing.apply(row.values)
        return DenseVectors((values.astype(np.float64) * factors).astype(np.float32))

    def _changed_lengths(self, values: Float32[np.ndarray, "rows stored"]) -> Float[np.ndarray, " rows"]:
        """Compute the squared lengths of decoded rows under the changed curvature."""
        if self.mixing is not None:
            return self.mixing.squared_lengths(values)
        squares: np.ndarray = (values * values * self.change).sum(axis=1)
        return squares

    def _blocks(self, index: Index, group: ShardGroup) -> Iterator[tuple[DenseRows, slice, slice, np.ndarray]]:
        """Yield blocks of a group's rows: the reader, their offsets in the shard, their positions in the group, and their codes."""
        for shard in group.shards:
            rows = index.rows(shard, self.component)
            start = shard.first - group.first
            for first, codes in rows.blocks():
                last = first + len(codes)
                yield rows, slice(first, last), slice(start + first, start + last), codes

    def _codes(self, index: Index, group: ShardGroup) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """Yield positions in the group with codes, factors, noises and norms (see scan_codes.py); one-bit rows have no noise."""
        if not self.component.one_bit:
            scan_codes = index.search_arrays(group, self.component)
            yield slice(0, group.rows), scan_codes.codes, scan_codes.factors, scan_codes.noises, scan_codes.norms
            return
        for rows, offsets, positions, codes in self._blocks(index, group):
            norms = rows.norms[offsets]
            yield positions, to_words(codes, "<u8"), norms * rows.factors()[offsets], np.zeros(len(codes), np.float32), norms

    @cached_property
    def _rounded(self) -> RoundedQueries:
        if self.component.one_bit:
            return RoundedQueries.of(self.queries)
        return RoundedQueries.of(rotate(self.queries, scan_bits(self.component.stored), self.component.seed))


@dataclass(frozen=True)
class SparseOperand:
    """Prepared queries of a sparse component: their entries, rotated as the rows were.

    Attributes:
        metric: of the query.
        keys, owners: token and query of each entry.
        tables: of each entry (see `postings.byte_tables`).
        squares: squared length of each entry's vector.
    """

    exact_scan = True

    component: SparseComponent
    weight: float
    metric: Metric
    keys: Int64[np.ndarray, " entries"]
    owners: Int64[np.ndarray, " entries"]
    tables: Float32[np.ndarray, "entries bytes 256"]
    squares: Float64[np.ndarray, " entries"]
    squared_norms: Float64[np.ndarray, " queries"]

    @classmethod
    def of(
        cls, index: Index, component: SparseComponent, queries: SparseVectors, metric: Metric, weight: float, mixing: Mixing | None = None
    ) -> "SparseOperand":
        """See `Operand`."""
        if metric.mix is not None:
            raise UsageError(f"second moments of queries are mixed into those of dense rows alone; leave {component.name} out, or `mix`")
        if metric.changes_curvature and metric.mode == "cosine":
            raise UsageError("the head's rows hold their lengths under the build's damping alone; ask for influence, or without a damping")
        vectors = _damped(index, component, queries, metric)
        squared_norms = queries.sums_by_row(np.einsum("ed,ed->e", vectors, queries.vectors, dtype=np.float64))
        scaled = (vectors * weight).astype(np.float32)
        tables = byte_tables(rotate(scaled, component.bits, component.seed))
        squares = np.square(vectors * weight).sum(axis=1)
        return cls(component, weight, metric, queries.keys, queries.owners, tables, squares, squared_norms)

    @classmethod
    def changed(cls, index: Index, component: Any, metric: Metric, rows: SparseVectors) -> SparseVectors:
        """See `changed_rows`."""
        return SparseVectors(rows.indptr, rows.keys, _damped(index, component, rows, metric))

    def add(
        self, index: Index, group: ShardGroup, scores: Float32[np.ndarray, "queries rows"], squared: Float64[np.ndarray, " rows"] | None
    ) -> None:
        """See `Operand`; the products are unbiased estimates from one-bit codes."""
        index.search_arrays(group, self.component).add_scores(self.keys, self.owners, self.tables, scores)
        if squared is not None:
            norms = index.group_norms(group, self.component)
            add_squares = _add_squares.if_worth(len(norms))
            if add_squares is None:
                squared += self.weight * np.square(norms, dtype=np.float64)
            else:
                add_squares(self.weight, norms, squared)

    def estimate(self, index: Index, group: ShardGroup, estimates: Estimates) -> None:
        """See `Operand`: posting lists give all that a scan of the rows gives."""
        self.add(index, group, estimates.exact, estimates.squared)

    def refusal(self, index: Index, groups: Sequence[ShardGroup], mode: str) -> None:
        """Return None: there is no need of estimates."""

    def read(self, index: Index, rows: Int64[np.ndarray, " rows"], query: int) -> Float32[np.ndarray, " rows"]:
        """See `Operand`."""
        return np.zeros(len(rows), np.float32)

    def variance(self, index: Index, shard: Shard, offset: int, query: int) -> float:
        """See `Operand`; the sum over shared tokens."""
        width = padded_width(self.component.width, self.component.bits)
        entries, positions, _, factors = self._shared(index, shard, offset, query)
        # A factor is |v|^2 over the sum of |coordinates|, which in expectation is |v| times bits sqrt(2 / (pi width)).
        lengths = factors[positions].astype(np.float64) * self.component.bits * np.sqrt(2 / (np.pi * width))
        return float(_one_bit_variance(width, self.component.bits) * (np.square(lengths) * self.squares[entries]).sum())

    def squared_length(self, index: Index, shard: Shard, offset: int) -> float:
        """See `Operand`."""
        return float(index.rows(shard, self.component).norms[offset]) ** 2

    def split(self, index: Index, shard: Shard, offset: int, query: int) -> Split:
        """See `Operand`."""
        entries, positions, codes, factors = self._shared(index, shard, offset, query)
        values = self.tables[entries[:, None], np.arange(codes.shape[1]), codes[positions]].sum(axis=1, dtype=np.float64)
        tokens = dict(zip(self.keys[entries].tolist(), (values * factors[positions]).tolist(), strict=True))
        total = sum(tokens.values())
        return Split(total, {self.component.layer: total}, tokens)

    def exported(self) -> dict[str, np.ndarray]:
        """See `Operand`."""
        single_bits = 1 << np.arange(7, -1, -1)  # a byte's table has the products with all of its signs: a coordinate is half a difference
        vectors = (self.tables[:, :, single_bits] - self.tables[:, :, :1]) / 2
        return {"queries": self.owners, "tokens": self.keys, "vectors": vectors.reshape(len(self.keys), -1)[:, : self.component.bits]}

    def scaled(self, index: Index, row: SparseVectors, stored: bool = True) -> SparseVectors:
        """See `Operand`."""
        vectors = _damped(index, self.component, row, self.metric) * self.weight
        return SparseVectors(row.indptr, row.keys, vectors.astype(np.float32))

    def _shared(self, index: Index, shard: Shard, offset: int, query: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return the query's entries of tokens that a row has too, their positions among the row's, and the row's codes and factors."""
        keys, codes, factors = index.rows(shard, self.component).entries(offset, offset + 1)
        entries = np.flatnonzero(self.owners == query)
        _, positions, shared = np.intersect1d(keys, self.keys[entries], return_indices=True)
        return entries[shared], positions, codes, factors


def changed_rows(index: Index, component: Component, metric: Metric, rows: Any) -> Any:
    """Multiply whitened rows with the factors by which a metric's damping, filter or layers change products with them."""
    return OPERANDS[component.kind].changed(index, component, metric, rows)


OPERANDS: dict[str, type[DenseOperand] | type[SparseOperand]] = {"dense": DenseOperand, "sparse": SparseOperand}
"""By kind of component."""


def change_of_curvature(index: Index, component: DenseComponent, metric: Metric) -> Float64[np.ndarray, " dim"] | None:
    """Return, by coordinate, the factor of the change from the build's damping and layers to the metric's; None for no change."""
    change: np.ndarray | None = None
    sizes = [layer.size for layer in component.layers]
    has_curvature = any(layer.curvature != "identity" for layer in component.layers)
    if metric.training is not None and (component.optimizer == "second-moments" or component.curvature.labels == "margin"):
        raise UsageError(f"the curvature of {component.name} is not that of the loss (a preset's), which `training` needs; leave it out")
    if metric.changes_curvature and (metric.curvature or has_curvature):
        eigenvalues, means = index.spectrum(component)
        change = eigenvalues + component.curvature.damping * means
        if metric.training is not None:
            change *= added(eigenvalues, np.repeat(filter_times(index, component, metric.training), sizes))
        elif metric.damping is not None:
            after = eigenvalues + metric.damping * means
            change = np.divide(change, after, out=np.zeros_like(change), where=after > 0)
    mask = matched(component.layer_names, metric.layers)
    if not mask.all():
        selected = np.repeat(mask, sizes)
        change = selected.astype(np.float64) if change is None else selected * change
    return change


def _one_bit_variance(coordinates: int, bits: int) -> float:
    """Return the variance of the estimated inner product of orthogonal unit vectors."""
    return (np.pi / 2 * coordinates / bits - 1) / coordinates


def _damped(index: Index, component: SparseComponent, rows: SparseVectors, metric: Metric) -> Float64[np.ndarray, "entries width"]:
    """Return vectors whose products with whitened ones are those under a metric's damping or filter, or without curvature."""
    vectors = rows.vectors.astype(np.float64)
    if not metric.changes_curvature:
        return vectors
    vocabulary, inputs = index.sparse_spectrum(component)
    eigenvalues = vocabulary[rows.keys][:, None] * inputs
    mean = vocabulary.mean() * inputs.mean()
    vectors = vectors * (eigenvalues + component.curvature.damping * mean)
    if metric.training is not None:
        (time,) = filter_times(index, component, metric.training)
        return vectors * added(eigenvalues, time)
    return vectors if metric.damping is None else vectors / (eigenvalues + metric.damping * mean)


def _products(queries: Float32[np.ndarray, "queries dim"], rows: DenseRows, codes: np.ndarray) -> Float32[np.ndarray, "queries rows"]:
    """Compute inner products of queries with codes: by a matrix product, or in a compiled loop for a few queries and many int8 codes."""
    compiled = _multiply_int8.if_worth(codes.size) if rows.dtype == np.int8 and len(queries) <= _FEW_QUERIES else None
    if compiled is not None:
        products = np.empty((len(queries), len(codes)), np.float32)
        compiled(np.asarray(codes).view(np.ndarray), queries, products)
        return products
    return queries @ rows.values(codes).T


def _separate_products(query: Float32[np.ndarray, " dim"], rows: DenseRows, codes: np.ndarray) -> Float32[np.ndarray, " rows"]:
    """Compute inner products of a query with codes. Each is the same bits with whatever other rows it is computed, unlike `_products`."""
    products = np.empty(len(codes), np.float32)
    for first in range(0, len(codes), _SEPARATE_ROWS):
        block = slice(first, first + _SEPARATE_ROWS)
        np.einsum("rd,d->r", rows.values(codes[block]), query, out=products[block])
    return products
