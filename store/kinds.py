"""The kinds of component: which classes hold, write and read the rows of each, and what a search cache has of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import ArrayFile
from .bits import rotate
from .dense import DenseRows, DenseWriter, Reduction
from .manifest import Component, DenseComponent, SparseComponent
from .postings import Postings, byte_tables
from .scan_codes import ScanCodes
from .shapes import Float32
from .sparse import SparseRows, SparseWriter
from .vectors import DenseVectors, SparseVectors

Rows = DenseRows | SparseRows
SearchArrays = ScanCodes | Postings


@dataclass(frozen=True)
class Kind:
    """Classes of a kind of component, with the same methods for each kind.

    Attributes:
        vectors: rows in memory (see vectors.py).
        writer: coder of a shard's rows.
        rows: reader of a shard's rows.
        search_arrays: arrays of a search cache.
        stored: cut whitened rows to what an index stores of them.
        products: compute the products of whitened rows with the stored rows of a shard; the arguments are the reader of these rows, the
            component, the whitened rows, and the encoder's arrays.
    """

    vectors: Any
    writer: Any
    rows: Any
    search_arrays: Any
    stored: Callable[[Any, Any], Any]
    products: Callable[[Any, Any, Any, Mapping[str, np.ndarray]], Float32[np.ndarray, "queries rows"]]


def _dense_products(
    rows: DenseRows, component: DenseComponent, queries: DenseVectors, arrays: Mapping[str, np.ndarray]
) -> Float32[np.ndarray, "queries rows"]:
    values = np.concatenate([rows.values(codes) for _, codes in rows.blocks()])
    reduced = Reduction.of(component, arrays).apply(queries.values.astype(np.float32))
    return (reduced @ values.T) * (rows.norms * rows.factors())


def _sparse_products(
    rows: SparseRows, component: SparseComponent, queries: SparseVectors, arrays: Mapping[str, np.ndarray]
) -> Float32[np.ndarray, "queries rows"]:
    scores = np.zeros((len(queries), len(rows)), np.float32)
    tables = byte_tables(rotate(queries.vectors, component.bits, component.seed))
    Postings.of([rows], component).add_scores(queries.keys, queries.owners, tables, scores)
    return scores


def _all_coordinates(vectors: DenseVectors, component: DenseComponent) -> DenseVectors:
    return vectors


def _largest_tokens(vectors: SparseVectors, component: SparseComponent) -> SparseVectors:
    return vectors.largest(component.max_tokens)


KINDS = {
    "dense": Kind(DenseVectors, DenseWriter, DenseRows, ScanCodes, _all_coordinates, _dense_products),
    "sparse": Kind(SparseVectors, SparseWriter, SparseRows, Postings, _largest_tokens, _sparse_products),
}


def open_rows(file: ArrayFile, component: Component, rows: int) -> Rows:
    """Open a component's rows in a shard's file."""
    return KINDS[component.kind].rows(file, component, rows)
