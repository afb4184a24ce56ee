"""Sparse rows: for each example a short list of vocabulary tokens, each with a vector in one bit a coordinate.

A sparse component of a shard is a group of arrays (see arrays.py) in the form of a sparse matrix whose entries are coded vectors:

    indptr   [rows + 1]        uint32: row i's entries are indptr[i] to indptr[i + 1]
    keys     [entries]         uint16 or uint32: tokens, ascending within a row
    codes    [entries, bytes]  uint8: signs of the rotated vector, 8 a byte, most significant bit first; 1 is positive
    factors  [entries]         float16, times the group's attribute `factor_scale`
    norms    [rows]            float32: the row's length, over all its entries

and the attribute `energy`: the sum of the rows' squared lengths as they are stored, and before tokens were left out. Keys, codes and
factors are read page by page.

bits.py explains the codes and the estimates of inner products. If there are fewer bits than coordinates, the first coordinates of the
rotated vector are coded, which is a random projection; its estimates are unbiased, too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .arrays import ArrayFile, ArrayGroup
from .bits import padded_width, rotate, signs_of, unrotate
from .errors import IntegrityError, NumericalError
from .manifest import SparseComponent
from .shapes import Float, Float32, Int64, UInt8, UInt32
from .vectors import SparseVectors

_ROW_BYTES = 8  # a row's start and norm
_FACTOR_BYTES = 2
_FACTOR_TOP = 32768.0  # the largest stored factor of a shard, near the maximum of float16, so that small factors keep their digits


@dataclass(frozen=True)
class Coded:
    """Coded rows in memory, before they are written. `squared_lengths` are those of the rows before entries were left out."""

    counts: Int64[np.ndarray, " rows"]
    keys: UInt32[np.ndarray, " entries"]
    codes: UInt8[np.ndarray, "entries bytes"]
    factors: Float32[np.ndarray, " entries"]
    norms: Float32[np.ndarray, " rows"]
    squared_lengths: Float[np.ndarray, " rows"]


def code(rows: SparseVectors, bits: int, seed: int) -> Coded:
    """Code rows with `bits` bits an entry; those with `energies` are rotated already.

    Raises:
        NumericalError: a vector is not finite.
    """
    squares = rows.squared_lengths
    if not np.isfinite(squares).all():
        raise NumericalError("a sparse row is not finite; check its document and the model's precision")
    rotated = rotate(rows.vectors, bits, seed) if rows.energies is None else rows.vectors
    sums = np.abs(rotated).sum(axis=1, dtype=np.float64)
    factors = np.divide(squares, sums, out=np.zeros_like(squares), where=sums > 0)
    lengths = rows.sums_by_row(squares)
    return Coded(
        np.diff(rows.indptr),
        rows.keys.astype(np.uint32),
        np.packbits(rotated > 0, axis=1),
        factors.astype(np.float32),
        np.sqrt(lengths).astype(np.float32),
        lengths if rows.whole is None else rows.whole,
    )


def concatenate(parts: Sequence[tuple[Sequence[int], Coded]]) -> Coded:
    """Concatenate batches of coded rows, each with the positions of its rows, in the order of the positions."""
    counts, norms, squares = (np.concatenate([getattr(c, name) for _, c in parts]) for name in ("counts", "norms", "squared_lengths"))
    order = np.argsort(np.concatenate([np.asarray(positions) for positions, _ in parts]))
    starts = np.concatenate([[0], np.cumsum(counts)])[:-1]
    entries = np.concatenate([np.arange(starts[i], starts[i] + counts[i]) for i in order])
    keys, codes, factors = (np.concatenate([getattr(c, name) for _, c in parts])[entries] for name in ("keys", "codes", "factors"))
    return Coded(counts[order], keys, codes, factors, norms[order], squares[order])


def encode_sparse(rows: Coded, vocabulary: int, bits: int) -> ArrayGroup:
    """Return the arrays of a sparse component, from coded rows."""
    scale = float(rows.factors.max(initial=0.0)) / _FACTOR_TOP or 1.0
    arrays = {
        "indptr": np.concatenate([[0], np.cumsum(rows.counts)]).astype(np.uint32),
        "keys": rows.keys.astype(unsigned_dtype(vocabulary)),
        "codes": rows.codes,
        "factors": (rows.factors / scale).astype(np.float16),
        "norms": rows.norms,
    }
    return _group(arrays, bits, scale, (float(np.square(rows.norms, dtype=np.float64).sum()), float(rows.squared_lengths.sum())))


def _group(arrays: dict[str, np.ndarray], bits: int, scale: float, energy: tuple[float, float]) -> ArrayGroup:
    attributes = {"kind": "sparse", "bits": bits, "factor_scale": scale, "energy": list(energy)}
    return ArrayGroup(arrays, attributes, frozenset({"keys", "codes", "factors"}))


def entry_bytes(component: SparseComponent, bits: int) -> int:
    """Return the bytes of one token of a row: key, factor and code."""
    return np.dtype(unsigned_dtype(component.vocabulary)).itemsize + _FACTOR_BYTES + -(-bits // 8)


def unsigned_dtype(count: int) -> str:
    """Return the type of numbers below `count`."""
    return "uint16" if count <= 1 << 16 else "uint32"


class SparseWriter:
    """Coder of a shard's rows of a sparse component, which come batch by batch; they are coded at once, to save memory.

    It needs neither the encoder's arrays nor the number of rows.
    """

    def __init__(self, component: SparseComponent, arrays: Mapping[str, np.ndarray], rows: int) -> None:
        self._component = component
        self._blocks: list[tuple[Sequence[int], Coded]] = []

    def add(self, positions: Sequence[int], vectors: SparseVectors) -> None:
        """Add a batch of rows at their positions."""
        self._blocks.append((positions, code(vectors, self._component.bits, self._component.seed)))

    def arrays(self) -> ArrayGroup:
        """Return the arrays of all rows."""
        return encode_sparse(concatenate(self._blocks), self._component.vocabulary, self._component.bits)


class SparseRows:
    """The rows of a sparse component in one shard.

    Raises:
        IntegrityError: an array is missing, truncated or of another shape, or fails its checksum (keys, codes and factors: when they are
            first read); or the arrays contradict one another.
    """

    def __init__(self, file: ArrayFile, component: SparseComponent, rows: int) -> None:
        self.name = component.name
        self.rows = rows
        self.bits = component.bits
        self._where = f"{file.path}: {self.name}"
        self._component = component
        self.indptr = file.array(f"{self.name}/indptr", (rows + 1,), "uint32").astype(np.int64)
        entries = int(self.indptr[-1])
        self._keys = file.paged(f"{self.name}/keys", (entries,), unsigned_dtype(component.vocabulary))
        self._codes = file.paged(f"{self.name}/codes", (entries, -(-self.bits // 8)), "uint8")
        self._factors = file.paged(f"{self.name}/factors", (entries,), "float16")
        self.norms = file.array(f"{self.name}/norms", (rows,), "float32")
        attributes = file.attributes(self.name)
        try:
            self.factor_scale = float(attributes["factor_scale"])
            stored, total = attributes["energy"]
            self.energy = float(stored), float(total)
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{self._where} has no factor_scale and energy; restore the file or build the index again") from error
        finite = np.isfinite([self.factor_scale, *self.energy]).all() and np.isfinite(self.norms).all()
        if self.indptr[0] != 0 or (np.diff(self.indptr) < 0).any() or not finite:
            raise self._contradiction()

    def __len__(self) -> int:
        return self.rows

    def check(self) -> None:
        """Compare all entries with their checksums.

        Raises:
            IntegrityError: a page is damaged, or an entry has an invalid token or factor.
        """
        self.entries(0, self.rows)

    def entries(self, first: int, last: int) -> tuple[np.ndarray, UInt8[np.ndarray, "entries bytes"], Float32[np.ndarray, " entries"]]:
        """Read keys, codes and factors of the entries of rows `first` to `last` (not included)."""
        begin = int(self.indptr[first])
        end = int(self.indptr[last])
        keys = self._keys.rows(begin, end)
        factors = self._factors.rows(begin, end).astype(np.float32) * np.float32(self.factor_scale)
        if (len(keys) and int(keys.max()) >= self._component.vocabulary) or not np.isfinite(factors).all():
            raise self._contradiction()
        return keys, self._codes.rows(begin, end), factors

    def select(self, rows: Int64[np.ndarray, " selected"]) -> ArrayGroup:
        """Return the arrays of some rows, unchanged."""
        entries = np.concatenate([np.arange(*self.indptr[row : row + 2]) for row in rows])
        stored = float(np.square(self.norms[rows], dtype=np.float64).sum())
        total = stored * self.energy[1] / self.energy[0] if self.energy[0] > 0 else stored
        arrays = {
            "indptr": np.concatenate([[0], np.cumsum(np.diff(self.indptr)[rows])]).astype(np.uint32),
            "keys": self._keys.whole()[entries],
            "codes": self._codes.whole()[entries],
            "factors": self._factors.whole()[entries],
            "norms": self.norms[rows],
        }
        return _group(arrays, self.bits, self.factor_scale, (stored, total))

    def vectors(self, row: int, arrays: Mapping[str, np.ndarray]) -> SparseVectors:
        """Return one row with vectors estimated from their codes.

        A vector is parallel to its signs, with a length that makes the row's estimated score with itself its squared norm. Its scores with
        other rows are too small by the factor 2 / pi, all alike.

        Args:
            arrays: those of the encoder, which are not used.
        """
        keys, codes, factors = self.entries(row, row + 1)
        width = self._component.width
        share = self.bits / padded_width(width, self.bits)
        signs = signs_of(codes, self.bits) * (factors[:, None] * np.float32(2 / np.pi * share))
        vectors = unrotate(signs, width, self._component.seed)
        return SparseVectors(np.array([0, len(keys)]), keys.astype(np.int64), vectors)

    @staticmethod
    def row_cost(component: SparseComponent, tokens: Int64[np.ndarray, " examples"] | None) -> float:
        """Return the bytes of a stored row, with its start and norm, on average over examples with so many tokens."""
        stored = np.zeros(1) if tokens is None else np.minimum(tokens, component.max_tokens or np.iinfo(np.int64).max)
        return _ROW_BYTES + float(stored.mean()) * entry_bytes(component, component.bits)

    def _contradiction(self) -> IntegrityError:
        return IntegrityError(f"{self._where}: its arrays contradict one another; restore the file or build the index again")
