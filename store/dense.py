"""Dense rows of a shard: unit directions and norms.

A dense component of a shard is a group of arrays (see arrays.py):

    codes   [rows, dim]  float32, float16 or int8: the row's unit direction (int8: multiples of its largest coordinate / 127);
                         1bit, as uint8 [rows, bytes]: signs of the direction, folded and rotated (see bits.py)
    scales  [rows]       float32, only with int8 and 1bit: the factor of the codes
    norms   [rows]       float32: the row's length; the row is norm * scale * code

Codes are read page by page. They are not compressed, since whitened gradients are nearly incompressible.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .arrays import ArrayFile, ArrayGroup, crc32c
from .bits import fold, rotate, signs_of, unfold, unrotate
from .errors import IntegrityError, NumericalError
from .files import read_ahead
from .manifest import DenseComponent
from .objects import StorePath
from .shapes import Float, Float32, Int64, UInt32
from .vectors import DenseVectors

DTYPES: dict[str, np.dtype] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "int8": np.dtype("i1"), "1bit": np.dtype("u1")}
_FLOATS = ("float32", "float16")
_BLOCK_BYTES = 1 << 20


def block_rows(dim: int, dtype: str) -> int:
    """Return the number of rows in a block of a scan: the largest power of two with at most a mebibyte of codes, from 16 to 4,096."""
    rows = _BLOCK_BYTES // row_bytes(dim, dtype)
    return min(4096, max(16, 1 << max(0, rows.bit_length() - 1)))


def row_bytes(dim: int, dtype: str) -> int:
    """Return the number of bytes of a row's codes."""
    return -(-dim // 8) if dtype == "1bit" else dim * DTYPES[dtype].itemsize


def quantize(rows: Float[np.ndarray, "rows dim"], dtype: str) -> dict[str, np.ndarray]:
    """Split rows into the arrays of a dense component.

    Args:
        rows: whitened rows, finite; for 1bit folded and rotated.
        dtype: "float32", "float16", "int8" or "1bit".

    Returns:
        `codes` [rows, dim] (1bit: [rows, ceil(dim / 8)]), `norms` [rows] (float32) and, except for floats, `scales` [rows] (float32). A row
        of zeros has zero codes and a zero norm.

    Raises:
        NumericalError: a row is not finite, or its norm overflows float32.
    """
    norms = np.sqrt(np.einsum("rd,rd->r", rows, rows, dtype=np.float64))
    is_broken = ~(norms <= np.finfo(np.float32).max)  # also True for NaN
    if is_broken.any():
        row = int(np.argmax(is_broken))
        raise NumericalError(f"row {row} of this shard is not finite; check its document and the model's precision")
    directions = (rows / np.where(norms > 0, norms, 1.0)[:, None]).astype(np.float32)
    arrays = {"norms": norms.astype(np.float32)}
    if dtype == "int8":
        scales = np.abs(directions).max(axis=1, initial=0.0) / 127.0
        arrays["codes"] = np.rint(directions / np.where(scales > 0, scales, 1.0)[:, None]).astype(np.int8)
    elif dtype == "1bit":
        sums = np.abs(directions).sum(axis=1, dtype=np.float64)
        scales = np.divide(1.0, sums, out=np.zeros_like(sums), where=sums > 0)
        arrays["codes"] = np.packbits(directions > 0, axis=1)
    else:
        arrays["codes"] = directions.astype(DTYPES[dtype])
    if dtype not in _FLOATS:
        arrays["scales"] = scales.astype(np.float32)
    return arrays


@dataclass(frozen=True)
class Reduction:
    """The map from a whitened row to its stored coordinates: selection, folding to fewer coordinates and, for 1bit, rotation.

    Attributes:
        width: the number of coordinates of a whitened row.
        selection: the selected coordinates; None for all.
        coordinates: the number of stored coordinates; if it is below the number of selected ones, these are folded (see `bits.fold`).
        rotated: True if the last step is a rotation.
        seed: the seed of folding and rotation.
    """

    width: int
    selection: Int64[np.ndarray, " selected"] | None
    coordinates: int
    rotated: bool
    seed: int

    @classmethod
    def of(cls, component: DenseComponent, arrays: Mapping[str, np.ndarray]) -> "Reduction":
        """Return a component's reduction; `arrays` are those of the encoder."""
        selection = arrays.get(f"{component.name}/kept")
        return cls(component.dim, selection, component.stored, component.one_bit, component.seed)

    @property
    def _selected(self) -> int:
        """The number of selected coordinates."""
        return self.width if self.selection is None else len(self.selection)

    @property
    def mixes(self) -> bool:
        """True if stored coordinates are mixtures of the encoder's coordinates."""
        return self.rotated or self.coordinates < self._selected

    def apply(self, rows: Float[np.ndarray, "rows width"]) -> Float[np.ndarray, "rows coordinates"]:
        """Reduce rows. Inner products of reduced rows are unbiased estimates of those of the selected coordinates."""
        rows = rows if self.selection is None else rows[:, self.selection]
        if self.coordinates < rows.shape[1]:
            rows = fold(rows.astype(np.float32), self.coordinates, self.seed)
        return rotate(rows.astype(np.float32), self.coordinates, self.seed) if self.rotated else rows

    def undo(self, stored: Float32[np.ndarray, "rows coordinates"]) -> Float32[np.ndarray, "rows width"]:
        """Return rows in the encoder's coordinates that `apply` reduces to the stored ones (except for the padding of a rotation)."""
        rows = unrotate(stored, min(self._selected, self.coordinates), self.seed) if self.rotated else stored
        if self.coordinates < self._selected:
            rows = unfold(rows, self._selected, self.seed)
        if self.selection is None:
            return rows
        padded = np.zeros((len(stored), self.width), np.float32)
        padded[:, self.selection] = rows
        return padded


def encode_dense(rows: Float[np.ndarray, "rows dim"], dtype: str) -> ArrayGroup:
    """Return the arrays of a dense component, from whitened and reduced rows."""
    return ArrayGroup(quantize(rows, dtype), {"kind": "dense", "dtype": dtype}, frozenset({"codes"}))


class DenseWriter:
    """Coder of a shard's rows of a dense component, which come batch by batch; they are reduced at once, to save memory."""

    def __init__(self, component: DenseComponent, arrays: Mapping[str, np.ndarray], rows: int) -> None:
        self._dtype = component.dtype
        self._reduction = Reduction.of(component, arrays)
        self._values: np.ndarray = np.zeros((rows, component.stored), np.float32)

    def add(self, positions: Sequence[int], vectors: DenseVectors) -> None:
        """Add a batch of rows at their positions."""
        reduced = self._reduction.apply(vectors.values)
        self._values = self._values.astype(reduced.dtype, copy=False)
        self._values[np.asarray(positions, np.int64)] = reduced

    def arrays(self) -> ArrayGroup:
        """Return the arrays of all rows."""
        return encode_dense(self._values, self._dtype)


class DenseRows:
    """The rows of a dense component in one shard.

    Raises:
        IntegrityError: an array is missing, truncated or of another shape, or fails its checksum (codes: when they are first read).
    """

    def __init__(self, file: ArrayFile, component: DenseComponent, rows: int) -> None:
        self.name = component.name
        self.rows = rows
        self._component = component
        self.coordinates = component.stored
        self.one_bit = component.one_bit
        self.dtype = DTYPES[component.dtype]
        self.dim = row_bytes(self.coordinates, component.dtype) // self.dtype.itemsize
        self.block_rows = block_rows(self.coordinates, component.dtype)
        self._path = file.path
        self._codes = file.paged(f"{self.name}/codes", (rows, self.dim), self.dtype)
        self._kind = component.dtype
        self.norms = _finite(file, f"{self.name}/norms", rows)
        self.scales = None if component.dtype in _FLOATS else _finite(file, f"{self.name}/scales", rows)

    def __len__(self) -> int:
        return self.rows

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, codes [r, dim] in the stored dtype, without a copy), in order."""
        for first in range(0, self.rows, self.block_rows):
            yield first, self._codes.rows(first, min(first + self.block_rows, self.rows))

    def check(self) -> None:
        """Compare all codes with their checksums.

        Raises:
            IntegrityError: a page is damaged.
        """
        self._codes.whole()

    @property
    def energy(self) -> tuple[float, float]:
        """The sum of the rows' squared lengths, twice, since `Index.energy_held` computes the share of left-out coordinates."""
        total = float(np.square(self.norms, dtype=np.float64).sum())
        return total, total

    def select(self, rows: Int64[np.ndarray, " selected"]) -> ArrayGroup:
        """Return the arrays of some rows, unchanged."""
        arrays = {"codes": self._codes.whole()[rows], "norms": self.norms[rows]}
        if self.scales is not None:
            arrays["scales"] = self.scales[rows]
        return ArrayGroup(arrays, {"kind": "dense", "dtype": self._kind}, frozenset({"codes"}))

    def factors(self) -> Float32[np.ndarray, " rows"]:
        """Return the factors that turn codes into unit directions (1 if codes are floats)."""
        return self.scales if self.scales is not None else np.ones(self.rows, np.float32)

    def code(self, row: int) -> np.ndarray:
        """Return the stored codes of one row."""
        return self._codes.rows(row, row + 1)[0]

    def row(self, row: int) -> Float32[np.ndarray, " dim"]:
        """Return one row: norm * scale * code; for 1bit, the vector of its signs with the length of the row."""
        values = self.values(self.code(row)[None])[0]
        if self.one_bit:
            return values * (self.norms[row] / np.float32(math.sqrt(self.coordinates)))
        return values * (self.norms[row] * (self.scales[row] if self.scales is not None else np.float32(1)))

    def vectors(self, row: int, arrays: Mapping[str, np.ndarray]) -> DenseVectors:
        """Return one row in the encoder's coordinates; those that are not stored are 0.

        Args:
            arrays: those of the encoder.
        """
        return DenseVectors(Reduction.of(self._component, arrays).undo(self.row(row)[None]))

    @staticmethod
    def row_cost(component: DenseComponent, tokens: Int64[np.ndarray, " examples"] | None) -> float:
        """Return the bytes of a stored row, with its norm and scale."""
        fixed = 4 if component.dtype in _FLOATS else 8
        return float(row_bytes(component.stored, component.dtype) + fixed)

    def take(self, rows: Int64[np.ndarray, " selected"], checks: UInt32[np.ndarray, " selected"], out: np.ndarray) -> None:
        """Read the codes of some rows one by one from the file, since reading the memory map would fill memory with its pages.

        Args:
            checks: the CRC-32C of each row's codes.
            out: the codes, uint8 [selected, bytes of a row], written.

        Raises:
            IntegrityError: a row is damaged.
        """
        offsets = (self._codes.offset + rows * out.shape[1]).tolist()
        read_ahead(self._path, [(offset, out.shape[1]) for offset in offsets])
        file = os.open(self._path.map() if isinstance(self._path, StorePath) else self._path, os.O_RDONLY)
        try:
            for row, offset, check in zip(out, offsets, checks.tolist(), strict=True):
                os.preadv(file, (row,), offset)
                if crc32c(row) != check:
                    raise IntegrityError(f"{self._path}: a row fails its checksum; restore the file or build the index again")
        finally:
            os.close(file)

    def values(self, codes: np.ndarray) -> Float32[np.ndarray, "rows coordinates"]:
        """Convert stored codes to float32, without a copy if they are float32."""
        return signs_of(codes, self.coordinates) if self.one_bit else codes.astype(np.float32, copy=False)


def _finite(file: ArrayFile, name: str, rows: int) -> Float32[np.ndarray, " rows"]:
    values = file.array(name, (rows,), "float32")
    if not np.isfinite(values).all():
        raise IntegrityError(f"{file.path}: {name} holds numbers that are not finite; restore the file or build the index again")
    return values
