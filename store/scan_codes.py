"""One-bit codes of dense rows, beside these: all scores are estimated in one light pass, each with its standard deviation.

    codes    [rows, words]  uint64: signs of the rotated unit direction (see bits.py), 8 a byte, most significant first
    factors  [rows]         float32: |v| |u|^2 / A, with u the stored direction and A the sum of its |coordinates| after the rotation
    noises   [rows]         float32: |v| |u| sqrt((b |u|^2 / A^2 - 1) / (w - 1)) for b bits of w coordinates
    norms    [rows]         float32: |v|
    checks   [rows]         uint32: CRC-32C of the row's stored codes, by which single rows can be read and trusted

With s the signs, u the rotated direction (of length 1, but for the rounding of its codes, which int8 can make felt) and q a rotated
query, s = (A / |u|^2) u + r, and r, which is orthogonal to u, has |r|^2 = b - A^2 / |u|^2 and no preferred direction:
factor * <s, q> = |v| <u, q> + e with e of mean 0 and standard deviation at most noise * |q| (RaBitQ, Gao and Long, arXiv 2405.12497, here
with each row's own A). The query is rounded to four bits a coordinate, so that an estimate is four exclusive ors
and bit counts; what rounding leaves over, of length p, adds the standard deviation factor * p.

FAISS has RaBitQ too, but returns the best of a list alone: neither all estimates, which filters, opponents and other components need, nor
their deviations, from which it follows which rows must be read (benchmarks/dense_search.py has its speed beside this one's).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import google_crc32c
import numpy as np
from jaxtyping import Float32, Float64, UInt8, UInt32, UInt64

from .arrays import ArrayFile, ArrayGroup
from .bits import padded_width, rotate
from .compiled import Compiled
from .dense import DenseRows
from .errors import IntegrityError
from .manifest import DenseComponent

PLANES = 4
_LEVELS = (1 << PLANES) - 1
_MOST_BITS = 8192
_CLIPS = np.arange(1.8, 4.1, 0.2)
_count_differences = Compiled("count_differences", after=1 << 22)


@dataclass(frozen=True)
class ScanCodes:
    """The codes of a dense component's rows in a group of shards; see above."""

    computed_when_missing: ClassVar[bool] = False

    codes: UInt64[np.ndarray, "rows words"]
    factors: Float32[np.ndarray, " rows"]
    noises: Float32[np.ndarray, " rows"]
    norms: Float32[np.ndarray, " rows"]
    checks: UInt32[np.ndarray, " rows"]

    @classmethod
    def of(cls, shards: Sequence[DenseRows], component: DenseComponent) -> "ScanCodes":
        """Codes of shards' rows, one shard after the other."""
        seed = component.projection.seed
        width = padded_width(shards[0].coordinates, 1)
        bits = scan_bits(shards[0].coordinates)
        codes, sums, squares, checks = [], [], [], []
        for rows in shards:
            factors = rows.factors()
            for first, block in rows.blocks():
                directions = rows.values(block) * factors[first : first + len(block), None]
                rotated = rotate(directions, bits, seed)
                codes.append(words(np.packbits(rotated > 0, axis=1)))
                sums.append(np.abs(rotated).sum(axis=1, dtype=np.float64))
                squares.append(np.einsum("rd,rd->r", directions, directions, dtype=np.float64))
                checks.append(np.array([google_crc32c.value(row.tobytes()) for row in block], np.uint32))
        norms, a, uu = np.concatenate([rows.norms for rows in shards]), np.concatenate(sums), np.concatenate(squares)
        over = np.divide(uu, a, out=np.zeros_like(a), where=a > 0)
        noises = norms * np.sqrt(np.maximum(bits * over**2 - uu, 0) / max(1, width - 1))
        factors = (norms * over).astype(np.float32)
        return cls(np.concatenate(codes), factors, noises.astype(np.float32), norms, np.concatenate(checks))

    def arrays(self) -> ArrayGroup:
        """The arrays that are kept in a search cache."""
        return ArrayGroup({f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def read(cls, file: ArrayFile, component: DenseComponent, rows: int) -> "ScanCodes | None":
        """The codes of so many rows in a search cache; None where they are missing, or cannot be codes of these."""
        words_of_row = -(-scan_bits(component.stored) // 64)
        try:
            codes = file.array(f"{component.name}/codes", (rows, words_of_row), "uint64")
            factors, noises, norms = (file.array(f"{component.name}/{name}", (rows,), "float32") for name in ("factors", "noises", "norms"))
            checks = file.array(f"{component.name}/checks", (rows,), "uint32")
        except IntegrityError:
            return None
        lengths = factors, noises, norms
        whole = all(np.isfinite(values).all() and (values >= 0).all() for values in lengths)
        return cls(codes, factors, noises, norms, checks) if whole else None


def scan_bits(coordinates: int) -> int:
    """Bits of a code: as many as coordinates after the rotation, at most 8,192."""
    return min(padded_width(coordinates, 1), _MOST_BITS)


@dataclass(frozen=True)
class Rounded:
    """Rotated queries in four bits a coordinate.

    Attributes:
        planes: [queries, 4, words]: the coordinates' first to fourth bits.
        steps: half of what two neighbouring levels differ by.
        rests: lengths of what rounding left over.
        bits: coordinates.
    """

    planes: UInt64[np.ndarray, "queries planes words"]
    steps: Float64[np.ndarray, " queries"]
    rests: Float64[np.ndarray, " queries"]
    bits: int

    @classmethod
    def of(cls, rotated: Float32[np.ndarray, "queries bits"]) -> "Rounded":
        """Round each query to evenly spaced levels, cut off where that costs it least."""
        bits = rotated.shape[1]
        planes = np.zeros((len(rotated), PLANES, -(-bits // 64)), np.uint64)
        steps, rests = np.zeros(len(rotated)), np.zeros(len(rotated))
        for i, query in enumerate(rotated.astype(np.float64)):
            spread, best = np.sqrt(np.mean(query**2)), np.inf
            if spread == 0:
                continue
            for step in _CLIPS * spread / _LEVELS:
                levels = np.clip(np.rint((query / step + _LEVELS) / 2), 0, _LEVELS)
                rest = float(np.linalg.norm(query - step * (2 * levels - _LEVELS)))
                if rest < best:
                    best, steps[i], chosen = rest, step, levels.astype(np.uint8)
            rests[i] = best
            planes[i] = [words(np.packbits((chosen >> p) & 1)[None])[0] for p in range(PLANES)]
        return cls(planes, steps, rests, bits)

    def products(self, codes: UInt64[np.ndarray, "rows words"]) -> Float32[np.ndarray, "queries rows"]:
        """Inner products of the rounded queries with the signs of some codes."""
        totals = np.zeros((len(self.planes), len(codes)), np.uint32)
        compiled = _count_differences.after(codes.size * len(self.planes))
        if compiled is not None:
            compiled(codes, self.planes, totals)
        else:
            for query, planes in enumerate(self.planes):
                for p, plane in enumerate(planes):
                    totals[query] += np.bitwise_count(codes ^ plane).sum(axis=1, dtype=np.uint32) << np.uint32(p)
        return (self.steps[:, None].astype(np.float32)) * (np.float32(_LEVELS * self.bits) - 2 * totals.astype(np.float32))


def words(codes: UInt8[np.ndarray, "rows bytes"]) -> UInt64[np.ndarray, "rows words"]:
    """Codes as 64-bit words, zeros behind the last byte."""
    padded = np.zeros((len(codes), -(-codes.shape[1] // 8) * 8), np.uint8)
    padded[:, : codes.shape[1]] = codes
    return padded.view("<u8")
