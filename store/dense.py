"""Dense rows of a shard: unit directions and norms.

A dense component of a shard is a group of arrays (see arrays.py):

    codes   [rows, dim]  float32, float16 or int8: the row's unit direction (int8: rounded to 127 / its largest coordinate);
                         1bit, as uint8 [rows, bytes]: signs of the direction, folded and rotated (see bits.py)
    scales  [rows]       float32, only with int8 and 1bit: the factor of the codes
    norms   [rows]       float32: the row's length; the row is norm * scale * code

Codes are read page by page. They are not compressed: whitened gradients are noise to a compressor.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int64, UInt32

from .arrays import ArrayFile, ArrayGroup, crc32c
from .bits import fold, rotate, signs_of, unfold, unrotate
from .errors import IntegrityError, NumericalError
from .manifest import DenseComponent
from .vectors import DenseVectors

DTYPES: dict[str, np.dtype] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "int8": np.dtype("i1"), "1bit": np.dtype("u1")}
_FLOATS = ("float32", "float16")
_BLOCK_BYTES = 1 << 20


def block_rows(dim: int, dtype: str) -> int:
    """Rows of a block of a scan: the power of two from 16 to 4,096 that comes nearest below a mebibyte of codes."""
    rows = _BLOCK_BYTES // row_bytes(dim, dtype)
    return min(4096, max(16, 1 << max(0, rows.bit_length() - 1)))


def row_bytes(dim: int, dtype: str) -> int:
    """Bytes of a row's codes."""
    return -(-dim // 8) if dtype == "1bit" else dim * DTYPES[dtype].itemsize


def quantize(rows: Float[np.ndarray, "rows dim"], dtype: str) -> dict[str, np.ndarray]:
    """Split rows into the arrays of a dense component.

    Args:
        rows: whitened rows, finite; for 1bit folded and rotated.
        dtype: "float32", "float16", "int8" or "1bit".

    Returns:
        `codes` [rows, dim] (1bit: [rows, ceil(dim / 8)]), `norms` [rows] (float32) and, but for floats, `scales` [rows] (float32). An
        all-zero row keeps zero codes and a zero norm.

    Raises:
        NumericalError: a row is not finite, or its norm overflows float32.
    """
    norms = np.sqrt(np.einsum("rd,rd->r", rows, rows, dtype=np.float64))
    bad = ~(norms <= np.finfo(np.float32).max)  # also True for NaN
    if bad.any():
        worst = int(np.argmax(bad))
        raise NumericalError(f"row {worst} of this shard is not finite; look at its document and at the model's precision")
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
    """How a whitened row becomes the coordinates that are stored: some are kept, folded to fewer and, for one bit each, rotated.

    Attributes:
        width: coordinates of a whitened row.
        kept: which of them are stored; None keeps all.
        coordinates: stored; fewer than are kept are folded (see `bits.fold`).
        rotated: whether the last step is a rotation.
        seed: of folding and rotation.
    """

    width: int
    kept: Int64[np.ndarray, " kept"] | None
    coordinates: int
    rotated: bool
    seed: int

    @classmethod
    def of(cls, component: DenseComponent, arrays: Mapping[str, np.ndarray]) -> "Reduction":
        """Return a component's reduction; `arrays` are those of the encoder."""
        selection = arrays.get(f"{component.name}/kept")
        return cls(component.dim, selection, component.stored, component.one_bit, component.seed)

    @property
    def mixes(self) -> bool:
        """Whether a stored coordinate is a mixture of the encoder's."""
        return self.rotated or self.coordinates < (self.width if self.kept is None else len(self.kept))

    def apply(self, rows: Float[np.ndarray, "rows width"]) -> Float[np.ndarray, "rows coordinates"]:
        """Inner products of what comes out are unbiased estimates of those of what goes in (its kept coordinates)."""
        kept = rows if self.kept is None else rows[:, self.kept]
        if self.coordinates < kept.shape[1]:
            kept = fold(kept.astype(np.float32), self.coordinates, self.seed)
        return rotate(kept.astype(np.float32), self.coordinates, self.seed) if self.rotated else kept

    def undo(self, stored: Float32[np.ndarray, "rows coordinates"]) -> Float32[np.ndarray, "rows width"]:
        """Rows in the encoder's coordinates; `apply` makes the same of them again (all but what a rotation's padding held)."""
        kept = self.width if self.kept is None else len(self.kept)
        rows = unrotate(stored, min(kept, self.coordinates), self.seed) if self.rotated else stored
        if self.coordinates < kept:
            rows = unfold(rows, kept, self.seed)
        if self.kept is None:
            return rows
        whole = np.zeros((len(stored), self.width), np.float32)
        whole[:, self.kept] = rows
        return whole


def encode_dense(rows: Float[np.ndarray, "rows dim"], dtype: str) -> ArrayGroup:
    """The arrays of a dense component, from whitened and reduced rows."""
    return ArrayGroup(quantize(rows, dtype), {"kind": "dense", "dtype": dtype}, frozenset({"codes"}))


class DenseWriter:
    """Coder of a shard's rows of a dense component, which come batch by batch; they are reduced at once, to save memory.

    Args:
        component: the manifest's entry.
        arrays: those of the encoder.
        rows: of the shard.
    """

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
    """A dense component of one shard.

    Args:
        file: the shard's arrays.
        component: the manifest's entry.
        rows: of the shard.

    Raises:
        IntegrityError: an array is missing, truncated, of another shape, or fails its checksum (codes: when they are first read).
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
            IntegrityError: a page is not the one that was written.
        """
        self._codes.whole()

    @property
    def energy(self) -> tuple[float, float]:
        """The sum of the rows' squared lengths, twice: what was left out is told by the curvature (see `Index.energy_held`)."""
        total = float(np.square(self.norms, dtype=np.float64).sum())
        return total, total

    def select(self, kept: Int64[np.ndarray, " kept"]) -> ArrayGroup:
        """Some of the rows, to the bit as they are."""
        arrays = {"codes": self._codes.whole()[kept], "norms": self.norms[kept]}
        if self.scales is not None:
            arrays["scales"] = self.scales[kept]
        return ArrayGroup(arrays, {"kind": "dense", "dtype": self._kind}, frozenset({"codes"}))

    def factors(self) -> Float32[np.ndarray, " rows"]:
        """Factor of each row's codes that gives the row's unit direction (1 where codes are floats)."""
        return self.scales if self.scales is not None else np.ones(self.rows, np.float32)

    def code(self, row: int) -> np.ndarray:
        """One row's codes as they are stored."""
        codes: np.ndarray = self._codes.rows(row, row + 1)[0]
        return codes

    def row(self, row: int) -> Float32[np.ndarray, " dim"]:
        """One whole row: norm * scale * code. Of one-bit codes, as long as the row is: along its signs."""
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
        return row_bytes(component.stored, component.dtype) + fixed

    def take(self, rows: Int64[np.ndarray, " chosen"], checks: UInt32[np.ndarray, " chosen"], out: np.ndarray) -> None:
        """Read the codes of some rows one by one from the file, and not from its map, whose pages would pile up in memory.

        Args:
            checks: CRC-32C of each.
            out: uint8 [chosen, bytes of a row].

        Raises:
            IntegrityError: a row is not the one that was written.
        """
        offsets = (self._codes.offset + rows * out.shape[1]).tolist()
        file = os.open(self._path, os.O_RDONLY)
        try:
            for row, offset, check in zip(out, offsets, checks.tolist(), strict=True):
                os.preadv(file, (row,), offset)
                if crc32c(row) != check:
                    raise IntegrityError(f"{self._path}: a row fails its checksum; restore the file or build the index again")
        finally:
            os.close(file)

    def values(self, codes: np.ndarray) -> Float32[np.ndarray, "rows coordinates"]:
        """Stored codes as numbers to multiply with; float32 ones are not copied."""
        return signs_of(codes, self.coordinates) if self.one_bit else codes.astype(np.float32, copy=False)


def _finite(file: ArrayFile, name: str, rows: int) -> Float32[np.ndarray, " rows"]:
    values = file.array(name, (rows,), "float32")
    if not np.isfinite(values).all():
        raise IntegrityError(f"{file.path}: {name} holds numbers that are not finite; restore the file or build the index again")
    return values
