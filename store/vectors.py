"""Whitened rows in memory, of examples before they are coded or of queries: a matrix for a dense component, a vector for each token for a
sparse one. Both kinds have the same methods.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from .errors import IntegrityError
from .files import write_tensors
from .objects import fetched
from .shapes import Bool, Float, Float32, Float64, Int64


@runtime_checkable
class Vectors(Protocol):
    """Rows of one component."""

    def __len__(self) -> int: ...

    @classmethod
    def concatenate(cls, blocks: Sequence[tuple[Sequence[int], Any]], width: int) -> "Vectors":
        """Concatenate blocks, each with the positions of its rows, in the order of the positions."""

    @property
    def width(self) -> int:
        """Coordinates of a row, or of a token's vector."""

    def slice(self, first: int, last: int) -> "Vectors":
        """Copy rows `first` to `last`, not included."""

    def select(self, rows: Sequence[int]) -> "Vectors":
        """Copy some rows."""

    def combine(self, matrix: Float64[np.ndarray, "combinations rows"]) -> "Vectors":
        """Compute linear combinations of the rows, as float32."""

    def shared_with(self, other: Any) -> "Vectors":
        """Select the coordinates of a single row at which another single row can have products other than 0."""

    def inner_products(self, other: Any) -> Float[np.ndarray, "rows others"]:
        """Compute exact inner products with other rows."""

    def projected(self, seed: int, count: int) -> Float64[np.ndarray, "rows count"]:
        """Project rows to random directions, which are the same for all rows and a seed; products are kept on average."""

    def as_float32(self) -> "Vectors":
        """Convert to float32."""

    def clear(self, mask: Bool[np.ndarray, " rows"]) -> None:
        """Set rows to zero."""

    @property
    def squared_norms(self) -> Float[np.ndarray, " rows"]:
        """Each row's squared length; not finite where a coordinate is not."""


Rows = Mapping[str, Vectors]
"""Rows of all components, by name."""


@dataclass(frozen=True)
class DenseVectors:
    """Rows of a dense component."""

    values: Float[np.ndarray, "rows dim"]

    def __len__(self) -> int:
        return len(self.values)

    @classmethod
    def concatenate(cls, blocks: Sequence[tuple[Sequence[int], "DenseVectors"]], width: int) -> "DenseVectors":
        """See `Vectors`."""
        dtype = blocks[0][1].values.dtype if blocks else np.dtype(np.float32)
        values = np.zeros((sum(len(block) for _, block in blocks), width), dtype)
        for positions, block in blocks:
            values[np.asarray(positions, np.int64)] = block.values
        return cls(values)

    @property
    def width(self) -> int:
        """See `Vectors`."""
        return self.values.shape[1]

    def slice(self, first: int, last: int) -> "DenseVectors":
        """See `Vectors`."""
        return DenseVectors(self.values[first:last].copy())

    def select(self, rows: Sequence[int]) -> "DenseVectors":
        """See `Vectors`."""
        return DenseVectors(self.values[np.asarray(rows, np.int64)])

    def combine(self, matrix: Float64[np.ndarray, "combinations rows"]) -> "DenseVectors":
        """See `Vectors`."""
        return DenseVectors((matrix @ self.values).astype(np.float32))

    def shared_with(self, other: "DenseVectors") -> "DenseVectors":
        """See `Vectors`."""
        return self

    def inner_products(self, other: "DenseVectors") -> Float[np.ndarray, "rows others"]:
        """See `Vectors`."""
        return self.values @ other.values.T

    def projected(self, seed: int, count: int) -> Float64[np.ndarray, "rows count"]:
        """See `Vectors`."""
        return self.values.astype(np.float64) @ _directions(seed, self.width, count)

    def as_float32(self) -> "DenseVectors":
        """See `Vectors`."""
        return DenseVectors(self.values.astype(np.float32, copy=False))

    def clear(self, mask: Bool[np.ndarray, " rows"]) -> None:
        """See `Vectors`."""
        self.values[mask] = 0.0

    @property
    def squared_norms(self) -> Float64[np.ndarray, " rows"]:
        """See `Vectors`."""
        return np.einsum("rd,rd->r", self.values, self.values, dtype=np.float64)


@dataclass(frozen=True)
class SparseVectors:
    """Rows of a sparse component: a vector in eigen-coordinates for each of a row's tokens.

    Attributes:
        indptr: the entries of row i are indptr[i] to indptr[i + 1].
        keys: tokens, ascending within a row.
        vectors: one for each entry.
        whole: each row's squared length before entries were left out; None where none was.
        energies: each entry's squared length, where `vectors` are only some coordinates of the rotated vectors (see bits.py); else None.
    """

    indptr: Int64[np.ndarray, " rows_and_one"]
    keys: Int64[np.ndarray, " entries"]
    vectors: Float[np.ndarray, "entries width"]
    whole: Float64[np.ndarray, " rows"] | None = None
    energies: Float64[np.ndarray, " entries"] | None = None

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @classmethod
    def concatenate(cls, blocks: Sequence[tuple[Sequence[int], "SparseVectors"]], width: int) -> "SparseVectors":
        """See `Vectors`."""
        rows = {position: (block, i) for positions, block in blocks for i, position in enumerate(positions)}
        keys = [np.zeros(0, np.int64)]
        vectors = [np.zeros((0, width), np.float32)]
        for position in sorted(rows):
            block, i = rows[position]
            entries = slice(int(block.indptr[i]), int(block.indptr[i + 1]))
            keys.append(block.keys[entries])
            vectors.append(block.vectors[entries])
        indptr = np.cumsum([len(row_keys) for row_keys in keys]).astype(np.int64)
        return cls(indptr, np.concatenate(keys), np.concatenate(vectors))

    @property
    def owners(self) -> Int64[np.ndarray, " entries"]:
        """The row of each entry."""
        return np.repeat(np.arange(len(self)), np.diff(self.indptr))

    @property
    def width(self) -> int:
        """See `Vectors`."""
        return self.vectors.shape[1]

    def slice(self, first: int, last: int) -> "SparseVectors":
        """See `Vectors`."""
        indptr = self.indptr[first : min(last, len(self)) + 1]
        entries = slice(int(indptr[0]), int(indptr[-1]))
        whole = None if self.whole is None else self.whole[first:last]
        return SparseVectors(indptr - indptr[0], self.keys[entries], self.vectors[entries].copy(), whole)

    def select(self, rows: Sequence[int]) -> "SparseVectors":
        """See `Vectors`."""
        parts = [np.arange(self.indptr[row], self.indptr[row + 1]) for row in rows]
        entries = np.concatenate([np.zeros(0, np.int64), *parts])
        indptr = np.cumsum([0, *map(len, parts)]).astype(np.int64)
        whole = None if self.whole is None else self.whole[np.asarray(rows, np.int64)]
        return SparseVectors(indptr, self.keys[entries], self.vectors[entries], whole)

    def combine(self, matrix: Float64[np.ndarray, "combinations rows"]) -> "SparseVectors":
        """See `Vectors`."""
        keys = [np.zeros(0, np.int64)]
        vectors = [np.zeros((0, self.vectors.shape[1]), np.float32)]
        for combination in matrix:
            weights = combination[self.owners]
            entries = np.flatnonzero(weights)
            tokens, inverse = np.unique(self.keys[entries], return_inverse=True)
            sums = np.zeros((len(tokens), self.vectors.shape[1]))
            np.add.at(sums, inverse, self.vectors[entries] * weights[entries, None])
            keys.append(tokens)
            vectors.append(sums.astype(np.float32))
        indptr = np.cumsum([len(tokens) for tokens in keys]).astype(np.int64)
        return SparseVectors(indptr, np.concatenate(keys), np.concatenate(vectors))

    def shared_with(self, other: "SparseVectors") -> "SparseVectors":
        """See `Vectors`."""
        entries = np.flatnonzero(np.isin(self.keys, other.keys))
        return SparseVectors(np.array([0, len(entries)]), self.keys[entries], self.vectors[entries])

    def inner_products(self, other: "SparseVectors") -> Float32[np.ndarray, "rows others"]:
        """See `Vectors`."""
        scores = np.zeros((len(self), len(other)), np.float32)
        order = np.argsort(self.keys, kind="stable")
        other_order = np.argsort(other.keys, kind="stable")
        for key in np.intersect1d(self.keys, other.keys):
            entries = order[slice(*np.searchsorted(self.keys, [key, key + 1], sorter=order))]
            other_entries = other_order[slice(*np.searchsorted(other.keys, [key, key + 1], sorter=other_order))]
            scores[np.ix_(self.owners[entries], other.owners[other_entries])] += self.vectors[entries] @ other.vectors[other_entries].T
        return scores

    def projected(self, seed: int, count: int) -> Float64[np.ndarray, "rows count"]:
        """See `Vectors`. A token's vector is projected, and the result has random signs of the token."""
        projected = np.zeros((len(self), count))
        if len(self.keys):
            signs = _signs(seed, 1 << int(self.keys.max()).bit_length(), count)
            np.add.at(projected, self.owners, (self.vectors @ _directions(seed, self.width, count)) * signs[self.keys])
        return projected

    @property
    def squared_lengths(self) -> Float64[np.ndarray, " entries"]:
        """Each entry's squared length."""
        return np.einsum("ed,ed->e", self.vectors, self.vectors, dtype=np.float64) if self.energies is None else self.energies

    def largest(self, limit: int | None) -> "SparseVectors":
        """Select the entries of largest norm, at most so many of each row; `whole` are then the lengths of these rows."""
        energies = self.squared_lengths
        squared_lengths = self.sums_by_row(energies)
        counts = np.diff(self.indptr)
        if limit is None or not (counts > limit).any():
            return SparseVectors(self.indptr, self.keys, self.vectors, squared_lengths, self.energies)
        order = np.lexsort((-energies, self.owners))  # rows one after another, each from its largest entry to its smallest
        entries = np.sort(order[np.arange(len(order)) - np.repeat(self.indptr[:-1], counts) < limit])
        indptr = np.concatenate([[0], np.cumsum(np.minimum(counts, limit))]).astype(np.int64)
        selected = None if self.energies is None else self.energies[entries]
        return SparseVectors(indptr, self.keys[entries], self.vectors[entries], squared_lengths, selected)

    def as_float32(self) -> "SparseVectors":
        """See `Vectors`."""
        return self

    def clear(self, mask: Bool[np.ndarray, " rows"]) -> None:
        """See `Vectors`."""
        self.vectors[mask[self.owners]] = 0.0
        if self.energies is not None:
            self.energies[mask[self.owners]] = 0.0
        if self.whole is not None:
            self.whole[mask] = 0.0

    @property
    def squared_norms(self) -> Float64[np.ndarray, " rows"]:
        """See `Vectors`."""
        return self.sums_by_row(self.squared_lengths)

    def sums_by_row(self, values: Float64[np.ndarray, " entries"]) -> Float64[np.ndarray, " rows"]:
        """Sum a value of each entry, row by row."""
        return np.bincount(self.owners, values, len(self)).astype(np.float64, copy=False)  # without entries, integers


@lru_cache(maxsize=8)
def _directions(seed: int, width: int, count: int) -> Float64[np.ndarray, "width count"]:
    """Return random directions, as columns."""
    return np.random.default_rng([seed, width]).normal(size=(width, count))


@lru_cache(maxsize=8)
def _signs(seed: int, tokens: int, count: int) -> Int64[np.ndarray, "tokens count"]:
    """Return random signs of tokens, -1 or 1; those of a token do not depend on the number of tokens."""
    return 2 * np.random.default_rng([seed]).integers(0, 2, (tokens, count)) - 1


def to_bytes(rows: Rows) -> bytes:
    """Return rows as the bytes of a safetensors file: `<component>/values`, or `<component>/indptr`, `keys` and `vectors`."""
    from safetensors.numpy import save

    return save(_arrays(rows))


def write_rows(rows: Rows, path: Path) -> None:
    """Write rows as a file such as `to_bytes` returns, with fewer copies in memory.

    Raises:
        StorageError: the file cannot be written.
    """
    write_tensors(path, _arrays(rows))


def read_rows(path: Path) -> Rows:
    """Read the file that `write_rows` wrote.

    Raises:
        IntegrityError: it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return _rows(load_file(fetched(path)))
    except (OSError, SafetensorError, TypeError) as error:
        raise IntegrityError(f"{path} is damaged ({error}); remove the unfinished index and build again") from error


def _arrays(rows: Rows) -> dict[str, np.ndarray]:
    arrays = {}
    for name, vectors in rows.items():
        for field in fields(vectors):  # type: ignore[arg-type]
            array = getattr(vectors, field.name)
            if array is not None:
                arrays[f"{name}/{field.name}"] = np.ascontiguousarray(array)
    return arrays


def from_bytes(content: bytes) -> Rows:
    """Read rows that `to_bytes` wrote.

    Raises:
        ValueError: the content is not such a file.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(content)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    try:
        return _rows(arrays)
    except TypeError as error:
        raise ValueError("the arrays are not those of rows") from error


def _rows(arrays: Mapping[str, np.ndarray]) -> Rows:
    by_component: dict[str, dict[str, np.ndarray]] = {}
    for key, array in arrays.items():
        component, _, name = key.partition("/")
        by_component.setdefault(component, {})[name] = array
    return {name: (DenseVectors if "values" in members else SparseVectors)(**members) for name, members in by_component.items()}


def count(rows: Rows) -> int:
    """Number of rows."""
    return len(next(iter(rows.values())))


def slice_rows(rows: Rows, first: int, last: int) -> Rows:
    """Copy rows `first` to `last`, not included."""
    return {name: vectors.slice(first, last) for name, vectors in rows.items()}


def concatenate(rows: Sequence[Rows]) -> Rows:
    """Concatenate sets of rows, in their order."""
    result = {}
    for name, first in rows[0].items():
        ends = np.cumsum([len(part[name]) for part in rows]).tolist()
        blocks = [(range(end - len(part[name]), end), part[name]) for end, part in zip(ends, rows, strict=True)]
        result[name] = type(first).concatenate(blocks, first.width)
    return result


def combine(rows: Rows, matrix: Float64[np.ndarray, "combinations rows"]) -> Rows:
    """Compute linear combinations of rows, whose scores are the same combinations of the rows' scores."""
    return {name: vectors.combine(matrix) for name, vectors in rows.items()}
