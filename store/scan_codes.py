"""Scan codes: one-bit codes of dense rows, from which all scores are estimated, each with its standard deviation.

    codes    [rows, words]  uint64: signs of the rotated unit direction (see bits.py), 8 a byte, most significant first
    factors  [rows]         float32: |v| |u|^2 / A, with u the stored direction and A the sum of its |coordinates| after the rotation
    noises   [rows]         float32: |v| |u| sqrt((b |u|^2 / A^2 - 1) / (w - 1)) for b bits of w coordinates
    norms    [rows]         float32: |v|
    checks   [rows]         uint32: CRC-32C of the row's stored codes, to check rows that are read one by one

Let s be the signs, u the rotated direction (of length 1, except for rounding, which int8 makes noticeable) and q a rotated query. Then
s = (A / |u|^2) u + r, where r is orthogonal to u, |r|^2 = b - A^2 / |u|^2, and all directions of r are equally likely. Therefore
factor * <s, q> = |v| <u, q> + e, where e has mean 0 and a standard deviation of at most noise * |q| (RaBitQ, Gao and Long, arXiv
2405.12497, here with A of each row). The query is rounded to four bits a coordinate, so that an estimate takes four exclusive ors and bit
counts; a rounding error of length p adds the standard deviation factor * p.

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
from .shapes import Float32, Float64, UInt8, UInt32, UInt64

PLANES = 4
_LEVELS = (1 << PLANES) - 1
_MOST_BITS = 8192
_CLIPS = np.arange(1.8, 4.1, 0.2)
_count_differences = Compiled("count_differences", after=1 << 22)


@dataclass(frozen=True)
class ScanCodes:
    """The scan codes of a dense component in a group of shards. The module's docstring describes the arrays."""

    computed_when_missing: ClassVar[bool] = False

    codes: UInt64[np.ndarray, "rows words"]
    factors: Float32[np.ndarray, " rows"]
    noises: Float32[np.ndarray, " rows"]
    norms: Float32[np.ndarray, " rows"]
    checks: UInt32[np.ndarray, " rows"]

    @classmethod
    def of(cls, shards: Sequence[DenseRows], component: DenseComponent) -> "ScanCodes":
        """Compute the codes of the rows of shards, one shard after the other."""
        seed = component.projection.seed
        width = padded_width(shards[0].coordinates, 1)
        bits = scan_bits(shards[0].coordinates)
        codes = []
        sums = []
        squares = []
        checks = []
        for rows in shards:
            factors = rows.factors()
            for first, block in rows.blocks():
                directions = rows.values(block) * factors[first : first + len(block), None]
                rotated = rotate(directions, bits, seed)
                codes.append(words(np.packbits(rotated > 0, axis=1)))
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
        """Return the arrays for a search cache."""
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
    """Return the bits of a code: the number of coordinates after the rotation, but at most 8,192."""
    return min(padded_width(coordinates, 1), _MOST_BITS)


@dataclass(frozen=True)
class Rounded:
    """Rotated queries, rounded to four bits a coordinate.

    Attributes:
        planes: [queries, 4, words]: the coordinates' first to fourth bits.
        steps: half of the distance between neighbouring levels.
        rests: the lengths of the rounding errors.
        bits: the number of coordinates.
    """

    planes: UInt64[np.ndarray, "queries planes words"]
    steps: Float64[np.ndarray, " queries"]
    rests: Float64[np.ndarray, " queries"]
    bits: int

    @classmethod
    def of(cls, rotated: Float32[np.ndarray, "queries bits"]) -> "Rounded":
        """Round each query to evenly spaced levels, with the clipping that minimizes the rounding error."""
        bits = rotated.shape[1]
        planes = np.zeros((len(rotated), PLANES, -(-bits // 64)), np.uint64)
        steps = np.zeros(len(rotated))
        rests = np.zeros(len(rotated))
        for i, query in enumerate(rotated.astype(np.float64)):
            spread = np.sqrt(np.mean(query**2))
            if spread == 0:
                continue
            candidates = []
            for step in _CLIPS * spread / _LEVELS:
                levels = np.clip(np.rint((query / step + _LEVELS) / 2), 0, _LEVELS)
                candidates.append((float(np.linalg.norm(query - step * (2 * levels - _LEVELS))), step, levels.astype(np.uint8)))
            rests[i], steps[i], levels = min(candidates, key=lambda candidate: candidate[0])
            planes[i] = [words(np.packbits((levels >> p) & 1)[None])[0] for p in range(PLANES)]
        return cls(planes, steps, rests, bits)

    def products(self, codes: UInt64[np.ndarray, "rows words"]) -> Float32[np.ndarray, "queries rows"]:
        """Compute the inner products of the rounded queries with the signs of some codes."""
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
    """Pack the bytes of codes into 64-bit words, padded with zeros."""
    return to_words(codes, "<u8")
