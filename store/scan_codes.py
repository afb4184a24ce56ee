"""Scan codes: one-bit codes of dense rows, from which all scores are estimated, each with a bound on its standard deviation.

Of a row, v is the whitened row, u its direction as stored (of length 1, except for rounding, which int8 makes noticeable), padded with
zeros to w coordinates and rotated (see bits.py), b = min(w, 8192) the number of leading coordinates that are coded, s their signs (0 for
the other coordinates), and A the sum of their absolute values.

    codes    [rows, words]  uint64: s, 8 signs a byte, most significant first
    factors  [rows]         float32: |v| |u|^2 / A
    noises   [rows]         float32: |v| |u| sqrt((b |u|^2 / A^2 - 1) / (w - 1))
    norms    [rows]         float32: |v|
    checks   [rows]         uint32: CRC-32C of the row's bytes in the file of rows, to check rows that are read one by one

Let q be a rotated query. Then s = (A / |u|^2) u + r, where r is orthogonal to u, |r|^2 = b - A^2 / |u|^2, and all directions of r are
equally likely. Therefore factor * <s, q> = |v| <u, q> + e, where e has mean 0 and a standard deviation of at most noise * |q| (RaBitQ, Gao
and Long, arXiv 2405.12497; unlike there, A is each row's own and not its expectation). The query is rounded to four bits a coordinate, so
that an estimate takes four exclusive ors and bit counts a word; a rounding error of length p adds the standard deviation factor * p.

FAISS has RaBitQ, too, but returns only the best rows of a list. Filters, opponents and other components need all estimates, and the choice
of the rows to read needs their deviations. benchmarks/dense_search.py compares the speeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import google_crc32c
import numpy as np

from .arrays import ArrayFile, ArrayGroup
from .bits import padded_width, rotate, to_words
from .compiled import Compiled
from .dense import DenseRows
from .errors import IntegrityError
from .manifest import DenseComponent
from .shapes import Float32, Float64, UInt32, UInt64

_PLANES = 4
_TOP_LEVEL = (1 << _PLANES) - 1
_MOST_BITS = 8192
_CLIPS = np.arange(1.8, 4.1, 0.2)  # in root mean squares of a query's coordinates
_count_differences = Compiled("count_differences", least_work=1 << 22)


@dataclass(frozen=True)
class ScanCodes:
    """The scan codes of a dense component in a group of shards. The module's docstring describes the arrays.

    Without them, a search reads all rows. They are written with a search cache.
    """

    computed_when_missing: ClassVar[bool] = False

    codes: UInt64[np.ndarray, "rows words"]
    factors: Float32[np.ndarray, " rows"]
    noises: Float32[np.ndarray, " rows"]
    norms: Float32[np.ndarray, " rows"]
    checks: UInt32[np.ndarray, " rows"]

    @classmethod
    def of(cls, shards: Sequence[DenseRows], component: DenseComponent) -> "ScanCodes":
        """Compute the codes of the rows of shards, at least one, one shard after the other."""
        width = padded_width(component.stored, 1)
        bits = scan_bits(component.stored)
        codes = []
        sums = []
        squares = []
        checks = []
        for rows in shards:
            to_directions = rows.factors()
            for first, block in rows.blocks():
                directions = rows.values(block) * to_directions[first : first + len(block), None]
                rotated = rotate(directions, bits, component.seed)
                codes.append(to_words(np.packbits(rotated > 0, axis=1), "<u8"))
                sums.append(np.abs(rotated).sum(axis=1, dtype=np.float64))
                squares.append(np.einsum("rd,rd->r", directions, directions, dtype=np.float64))
                checks.append(np.array([google_crc32c.value(row.tobytes()) for row in block], np.uint32))
        norms = np.concatenate([rows.norms for rows in shards])
        a = np.concatenate(sums)
        uu = np.concatenate(squares)
        ratios = np.divide(uu, a, out=np.zeros_like(a), where=a > 0)
        noises = norms * np.sqrt(np.maximum(bits * ratios**2 - uu, 0) / max(1, width - 1))
        factors = (norms * ratios).astype(np.float32)
        return cls(np.concatenate(codes), factors, noises.astype(np.float32), norms, np.concatenate(checks))

    def arrays(self) -> ArrayGroup:
        """Return the arrays for the component's group in a search cache."""
        return ArrayGroup({f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def read(cls, file: ArrayFile, component: DenseComponent, rows: int) -> "ScanCodes | None":
        """Read the codes from a search cache; None if they are missing or damaged."""
        words_of_row = -(-scan_bits(component.stored) // 64)
        try:
            codes = file.array(f"{component.name}/codes", (rows, words_of_row), "uint64")
            factors, noises, norms = (file.array(f"{component.name}/{name}", (rows,), "float32") for name in ("factors", "noises", "norms"))
            checks = file.array(f"{component.name}/checks", (rows,), "uint32")
        except IntegrityError:
            return None
        is_valid = all(np.isfinite(values).all() and (values >= 0).all() for values in (factors, noises, norms))
        return cls(codes, factors, noises, norms, checks) if is_valid else None


def scan_bits(coordinates: int) -> int:
    """Return the number of coordinates that are coded, one bit each, of a row with so many stored coordinates."""
    return min(padded_width(coordinates, 1), _MOST_BITS)


@dataclass(frozen=True)
class RoundedQueries:
    """Rotated queries, each coordinate rounded to one of 16 levels: level l stands for half_step * (2 l - 15).

    Attributes:
        planes: the coordinates' levels, one bit of each coordinate in each of four planes, least significant first.
        half_steps: half of the distance between neighbouring levels.
        error_lengths: the lengths of the rounding errors.
        width: the number of coordinates.
    """

    planes: UInt64[np.ndarray, "queries planes words"]
    half_steps: Float64[np.ndarray, " queries"]
    error_lengths: Float64[np.ndarray, " queries"]
    width: int

    @classmethod
    def of(cls, rotated: Float32[np.ndarray, "queries width"]) -> "RoundedQueries":
        """Round each query to evenly spaced levels, with the clipping that minimizes the rounding error."""
        width = rotated.shape[1]
        planes = np.zeros((len(rotated), _PLANES, -(-width // 64)), np.uint64)
        half_steps = np.zeros(len(rotated))
        error_lengths = np.zeros(len(rotated))
        for i, query in enumerate(rotated.astype(np.float64)):
            spread = np.sqrt(np.mean(query**2))
            if spread == 0:
                continue
            candidates = []
            for half_step in _CLIPS * spread / _TOP_LEVEL:
                levels = np.clip(np.rint((query / half_step + _TOP_LEVEL) / 2), 0, _TOP_LEVEL)
                error = query - half_step * (2 * levels - _TOP_LEVEL)
                candidates.append((float(np.linalg.norm(error)), half_step, levels.astype(np.uint8)))
            error_lengths[i], half_steps[i], levels = min(candidates, key=lambda candidate: candidate[0])
            planes[i] = [to_words(np.packbits((levels >> p) & 1)[None], "<u8")[0] for p in range(_PLANES)]
        return cls(planes, half_steps, error_lengths, width)

    def products(self, codes: UInt64[np.ndarray, "rows words"]) -> Float32[np.ndarray, "queries rows"]:
        """Compute the inner products of the rounded queries with the signs of some codes."""
        totals = np.zeros((len(self.planes), len(codes)), np.uint32)
        compiled = _count_differences.if_worth(codes.size * len(self.planes))
        if compiled is not None:
            compiled(codes, self.planes, totals)
        else:
            for query, planes in enumerate(self.planes):
                for p, plane in enumerate(planes):
                    totals[query] += np.bitwise_count(codes ^ plane).sum(axis=1, dtype=np.uint32) << np.uint32(p)
        # sign * (2 l - 15) = 15 - 2 d, where the bits of d are those of l, each exclusive-or'd with the sign's bit.
        return (self.half_steps[:, None].astype(np.float32)) * (np.float32(_TOP_LEVEL * self.width) - 2 * totals.astype(np.float32))
