"""Sparse rows: for each example a short list of vocabulary tokens with one bit a coordinate of a vector each.

A sparse component of a shard is a Zarr group in the form of a sparse matrix whose entries are coded vectors:

    indptr   [rows + 1]        uint32: row i's entries are indptr[i] to indptr[i + 1]
    keys     [entries]         uint16 or uint32: tokens, ascending within a row
    codes    [entries, bytes]  uint8: signs of the rotated vector, 8 a byte, most significant bit first; 1 is positive
    factors  [entries]         float16, times the group's attribute `factor_scale`
    norms    [rows]            float32: the row's length, over all its entries

and the attribute `energy`: the sum of the rows' squared lengths, and what it was before tokens were left out.

How a vector becomes bits, and an inner product an estimate, is told in bits.py. Fewer bits than coordinates take the first ones of the
rotated vector: a random projection, unbiased likewise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt8, UInt32

from .bits import padded_width, rotate, signs_of, unrotate
from .errors import IntegrityError, NumericalError
from .files import read_bytes
from .rows import NO_CHECKS, Checks, map_array, write_array

_FACTOR_TOP = 32768.0  # the largest factor of a shard in float16, so that the smallest keep their digits


@dataclass(frozen=True)
class SparseVectors:
    """Rows (or queries) of a sparse component before they are coded: vectors in eigen-coordinates.

    Attributes:
        indptr: row i's entries are indptr[i] to indptr[i + 1].
        keys: tokens, ascending within a row.
        vectors: one for each entry.
        whole: each row's squared length before entries were left out; None where none was.
    """

    indptr: Int64[np.ndarray, " rows_and_one"]
    keys: Int64[np.ndarray, " entries"]
    vectors: Float32[np.ndarray, "entries width"]
    whole: Float64[np.ndarray, " rows"] | None = None

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def part(self, first: int, last: int) -> "SparseVectors":
        """Rows `first` to `last`, not included."""
        indptr = self.indptr[first : min(last, len(self)) + 1]
        entries = slice(int(indptr[0]), int(indptr[-1]))
        whole = None if self.whole is None else self.whole[first:last]
        return SparseVectors(indptr - indptr[0], self.keys[entries], self.vectors[entries], whole)

    def only(self, keys: Int64[np.ndarray, " some"]) -> "SparseVectors":
        """Of a single row, the entries of some tokens."""
        at = np.flatnonzero(np.isin(self.keys, keys))
        return SparseVectors(np.array([0, len(at)]), self.keys[at], self.vectors[at])

    def combined(self, matrix: Float64[np.ndarray, "combinations rows"]) -> "SparseVectors":
        """Linear combinations of the rows."""
        made = []
        for row in matrix:
            weights = np.repeat(row, np.diff(self.indptr))
            at = np.flatnonzero(weights)
            keys, inverse = np.unique(self.keys[at], return_inverse=True)
            vectors = np.zeros((len(keys), self.vectors.shape[1]))
            np.add.at(vectors, inverse, self.vectors[at] * weights[at, None])
            made.append((keys, vectors.astype(np.float32)))
        indptr = np.concatenate([[0], np.cumsum([len(keys) for keys, _ in made])]).astype(np.int64)
        return SparseVectors(indptr, np.concatenate([keys for keys, _ in made]), np.concatenate([v for _, v in made]))

    @property
    def squared_norms(self) -> Float32[np.ndarray, " rows"]:
        """Each row's squared length."""
        return _by_row(self.indptr, np.einsum("ed,ed->e", self.vectors, self.vectors, dtype=np.float64))


def _by_row(indptr: np.ndarray, values: Float64[np.ndarray, " entries"]) -> Float64[np.ndarray, " rows"]:
    """Sums of the entries' values, row by row."""
    rows = len(indptr) - 1
    return np.bincount(np.repeat(np.arange(rows), np.diff(indptr)), values, rows)


def concatenate(blocks: Sequence[tuple[Sequence[int], SparseVectors]], width: int) -> SparseVectors:
    """Batches of rows, each with the positions of its rows, as one in the order of the positions."""
    rows = {at: (block, i) for chosen, block in blocks for i, at in enumerate(chosen)}
    parts = [(block.keys[s], block.vectors[s]) for at in sorted(rows) for block, i in [rows[at]] for s in [slice(*block.indptr[i : i + 2])]]
    counts = [len(keys) for keys, _ in parts]
    keys = np.concatenate([k for k, _ in parts]) if parts else np.zeros(0, np.int64)
    vectors = np.concatenate([v for _, v in parts]) if parts else np.zeros((0, width), np.float32)
    return SparseVectors(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), keys, vectors)


def inner_products(a: SparseVectors, b: SparseVectors) -> Float32[np.ndarray, "rows_of_a rows_of_b"]:
    """Exact scores between two lists of rows: sums over the tokens that both hold."""
    scores = np.zeros((len(a), len(b)), np.float32)
    owners = [np.repeat(np.arange(len(rows)), np.diff(rows.indptr)) for rows in (a, b)]
    orders = [np.argsort(rows.keys, kind="stable") for rows in (a, b)]
    for key in np.intersect1d(a.keys, b.keys):
        at, other = (o[slice(*np.searchsorted(rows.keys, [key, key + 1], sorter=o))] for rows, o in zip((a, b), orders, strict=True))
        scores[np.ix_(owners[0][at], owners[1][other])] += a.vectors[at] @ b.vectors[other].T
    return scores


@dataclass(frozen=True)
class Coded:
    """Coded rows in memory, as they are written."""

    counts: Int64[np.ndarray, " rows"]
    keys: UInt32[np.ndarray, " entries"]
    codes: UInt8[np.ndarray, "entries bytes"]
    factors: Float32[np.ndarray, " entries"]
    norms: Float32[np.ndarray, " rows"]
    whole: Float64[np.ndarray, " rows"]


def code(rows: SparseVectors, bits: int, seed: int) -> Coded:
    """Code rows with `bits` bits an entry.

    Raises:
        NumericalError: a vector is not finite.
    """
    squares = np.einsum("ed,ed->e", rows.vectors, rows.vectors, dtype=np.float64)
    if not np.isfinite(squares).all():
        raise NumericalError("a sparse row is not finite; look at its document and at the model's precision")
    rotated = rotate(rows.vectors, bits, seed)
    sums = np.abs(rotated).sum(axis=1, dtype=np.float64)
    factors = np.divide(squares, sums, out=np.zeros_like(squares), where=sums > 0)
    lengths = _by_row(rows.indptr, squares)
    return Coded(
        np.diff(rows.indptr),
        rows.keys.astype(np.uint32),
        np.packbits(rotated > 0, axis=1),
        factors.astype(np.float32),
        np.sqrt(lengths).astype(np.float32),
        lengths if rows.whole is None else rows.whole,
    )


def join(parts: Sequence[tuple[Sequence[int], Coded]]) -> Coded:
    """Batches of coded rows, each with the positions of its rows, as one in the order of the positions."""
    counts, norms, whole = (np.concatenate([getattr(c, name) for _, c in parts]) for name in ("counts", "norms", "whole"))
    order = np.argsort(np.concatenate([np.asarray(at) for at, _ in parts]))
    starts = np.concatenate([[0], np.cumsum(counts)])[:-1]
    entries = np.concatenate([np.arange(starts[i], starts[i] + counts[i]) for i in order])
    keys, codes, factors = (np.concatenate([getattr(c, name) for _, c in parts])[entries] for name in ("keys", "codes", "factors"))
    return Coded(counts[order], keys, codes, factors, norms[order], whole[order])


def write_sparse(group: Any, rows: Coded, vocabulary: int, bits: int) -> None:
    """Write coded rows into an empty Zarr group."""
    scale = float(rows.factors.max(initial=0.0)) / _FACTOR_TOP or 1.0
    energy = [float(np.square(rows.norms, dtype=np.float64).sum()), float(rows.whole.sum())]
    group.attrs.update({"kind": "sparse", "bits": bits, "factor_scale": scale, "energy": energy})
    write_array(group, "indptr", np.concatenate([[0], np.cumsum(rows.counts)]).astype(np.uint32))
    write_array(group, "keys", rows.keys.astype(np.uint16 if vocabulary <= 1 << 16 else np.uint32))
    write_array(group, "codes", rows.codes)
    write_array(group, "factors", (rows.factors / scale).astype(np.float16))
    write_array(group, "norms", rows.norms)


def copy_sparse(group: Any, rows: "SparseRows", kept: Int64[np.ndarray, " kept"]) -> None:
    """Write some rows of a shard into an empty Zarr group, to the bit as they are."""
    entries = np.concatenate([np.arange(*rows.indptr[i : i + 2]) for i in kept])
    held = float(np.square(rows.norms[kept], dtype=np.float64).sum())
    energy = [held, held * rows.energy[1] / rows.energy[0] if rows.energy[0] > 0 else held]
    group.attrs.update({"kind": "sparse", "bits": rows.bits, "factor_scale": rows.factor_scale, "energy": energy})
    write_array(group, "indptr", np.concatenate([[0], np.cumsum(np.diff(rows.indptr)[kept])]).astype(np.uint32))
    write_array(group, "keys", rows.keys[entries])
    write_array(group, "codes", rows.codes[entries])
    write_array(group, "factors", (rows.factors[entries] / np.float32(rows.factor_scale)).astype(np.float16))
    write_array(group, "norms", rows.norms[kept])


class SparseRows:
    """A sparse component of one shard, read through memory maps; every array's checksum is compared when it is opened.

    Args:
        directory: the component's group, `rows/<uuid>.zarr/<component>`.
        rows, vocabulary, bits: what the manifest says lies there.
        checks: see `rows.Checks`.

    Raises:
        IntegrityError, IncompatibleError: see `map_array`; or the arrays contradict one another.
    """

    def __init__(self, directory: Path, rows: int, vocabulary: int, bits: int, checks: Checks = NO_CHECKS) -> None:
        import json

        def read(name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
            return map_array(directory, name, shape, dtype, checks)

        self.directory, self.rows, self.bits = directory, rows, bits
        self.indptr = read("indptr", (rows + 1,), "uint32").astype(np.int64)
        entries = int(self.indptr[-1])
        self.keys = read("keys", (entries,), "uint16" if vocabulary <= 1 << 16 else "uint32")
        self.codes = read("codes", (entries, -(-bits // 8)), "uint8")
        self.norms = np.array(read("norms", (rows,), "float32"))
        try:
            attributes = json.loads(read_bytes(directory / "zarr.json"))["attributes"]
            self.factor_scale = scale = float(attributes["factor_scale"])
            self.energy = tuple(map(float, attributes["energy"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise IntegrityError(
                f"{directory}/zarr.json does not tell its factor_scale and energy; restore the file or build the index again"
            ) from error
        self.factors = np.array(read("factors", (entries,), "float16")).astype(np.float32) * np.float32(scale)
        whole = (
            len(self.energy) == 2
            and np.isfinite(self.energy).all()
            and np.isfinite(self.factors).all()
            and np.isfinite(self.norms).all()
            and np.isfinite(scale)
        )
        if self.indptr[0] != 0 or (np.diff(self.indptr) < 0).any() or (entries and int(self.keys.max()) >= vocabulary) or not whole:
            raise IntegrityError(f"{directory}: its arrays contradict one another; restore them or build the index again")

    def __len__(self) -> int:
        return self.rows

    def vectors(self, row: int, width: int, seed: int) -> tuple[np.ndarray, Float32[np.ndarray, "entries width"]]:
        """One row's keys and an estimate of its vectors, along their signs and so long that the row's estimated score with itself is its
        squared norm; scores with other rows come out by 2 / pi too small, all alike.
        """
        part = slice(self.indptr[row], self.indptr[row + 1])
        share = self.bits / padded_width(width, self.bits)
        signs = signs_of(self.codes[part], self.bits) * (self.factors[part, None] * np.float32(2 / np.pi * share))
        return self.keys[part].astype(np.int64), unrotate(signs, width, seed)
