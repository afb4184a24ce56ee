"""Scores by group, such as by source, author or license, with bootstrap intervals over examples.

The influence of a group is the sum of its examples' scores (scores are additive to first order). Intervals come from the Poisson
bootstrap: in each of 200 draws, every example is repeated a random number of times, from a Poisson distribution of mean 1 (Chamandy et al.,
Estimating uncertainty for massive data streams, 2012). A table maps random bytes to these numbers, with probabilities rounded to 1/256.

All of this is a sum over examples. The sums of a group of shards need nothing of the others, and are added up as a tree whose shape depends
on the number of the groups of shards alone. So the result is the same bits, whichever processes made the sums.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np

from ..store.index import too_many_values
from ..store.shapes import Bool, Float32, Float64, Int64
from .answers import Group

MOST_VALUES = 10_000
_DRAWS = 200
_LEVEL = 0.95
_BLOCK_ROWS = 1 << 16
_BLOCK = 4096  # rows whose repeats are in memory as numbers at a time


def _poisson_table() -> np.ndarray:
    """Return the number of repeats for each value of a byte, scaled to mean 1."""
    probabilities = np.exp(-1) / np.cumprod([1, *range(1, 6)])
    counts = np.floor(probabilities * 256 + 0.5).astype(int)
    counts[0] += 256 - counts.sum()
    table = np.repeat(np.arange(6), counts)
    return (table / table.mean()).astype(np.float32)


_POISSON = _poisson_table()


@dataclass(frozen=True)
class Sums:
    """Sums of scores over examples, by the value of a column.

    Attributes:
        values: of the column; None for examples that lack it.
        rows: number of examples.
        signs: numbers of examples that score above 0, and below.
        totals: sums of the scores, of those above 0, and of the negated ones below.
        draws: sums of the scores in each bootstrap draw.
    """

    values: tuple[Any, ...]
    rows: Int64[np.ndarray, " values"]
    signs: Int64[np.ndarray, "queries 2 values"]
    totals: Float64[np.ndarray, "queries 3 values"]
    draws: Float64[np.ndarray, "queries draws values"]

    @classmethod
    def of(
        cls,
        codes: Int64[np.ndarray, " rows"],
        values: Sequence[Any],
        scores: Float32[np.ndarray, "queries rows"],
        searched: Bool[np.ndarray, " rows"],
        first: int,
    ) -> "Sums":
        """Sum the scores of a group of shards, block by block, so that few random numbers are in memory.

        Args:
            codes: each row's value, as a number of `values`.
            searched: mask of the rows that count.
            first: the group's first row, from which the random numbers of the bootstrap follow.
        """
        blocks = range(0, len(codes), _BLOCK_ROWS)
        if len(blocks) > 1:
            parts = [slice(start, start + _BLOCK_ROWS) for start in blocks]
            return reduce(
                lambda one, other: one + other,
                [cls.of(codes[block], values, scores[:, block], searched[block], first + block.start) for block in parts],
            )
        order = np.argsort(codes, kind="stable")
        order = order[searched[order]]
        count = len(values)
        starts = np.searchsorted(codes[order], np.arange(count))
        rows = np.diff(starts, append=len(order))
        is_present = rows > 0
        starts = starts[is_present]
        sorted_scores = scores[:, order].astype(np.float64)
        sides = [np.maximum(sign * sorted_scores, 0) for sign in (1, -1)]
        present = tuple(value for value, its_rows in zip(values, rows, strict=True) if its_rows)
        return cls(
            present,
            rows[is_present],
            np.stack([_sums_of_runs(side > 0, starts, np.int64) for side in sides], axis=1),
            np.stack([_sums_of_runs(part, starts, np.float64) for part in (sorted_scores, *sides)], axis=1),
            _draw(sorted_scores, order, starts, len(codes), first),
        )

    def __add__(self, other: "Sums") -> "Sums":
        """Add the sums over other examples.

        Raises:
            UsageError: there are too many values.
        """
        numbers = {_key(value): number for number, value in enumerate(self.values)}
        places = np.array([numbers.setdefault(_key(value), len(numbers)) for value in other.values], np.int64)
        new = tuple(value for value, place in zip(other.values, places.tolist(), strict=True) if place >= len(self.values))

        def joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
            result = np.zeros((*first.shape[:-1], len(numbers)), first.dtype)
            result[..., : first.shape[-1]] = first
            result[..., places] += second
            return result

        names = ("rows", "signs", "totals", "draws")
        return Sums((*self.values, *new), *(joined(getattr(self, name), getattr(other, name)) for name in names))

    def groups(self, query: int) -> tuple[Group, ...]:
        """Return the groups of a query; the highest total is first."""
        low, high = np.quantile(self.draws[query], [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], axis=0)
        total, *sums = self.totals[query]
        shares = [part / part.sum() if part.sum() > 0 else part for part in sums]
        return tuple(
            Group(
                value=self.values[i],
                rows=int(self.rows[i]),
                positive=int(self.signs[query, 0, i]),
                negative=int(self.signs[query, 1, i]),
                total=float(total[i]),
                low=float(low[i]),
                high=float(high[i]),
                positive_share=float(shares[0][i]),
                negative_share=float(shares[1][i]),
            )
            for i in np.argsort(-total, kind="stable")
        )


def _key(value: Any) -> tuple[bool, Any]:
    """Return what tells values apart: 1 and True are two, 1 and 1.0 are one."""
    return isinstance(value, bool), value


def _sums_of_runs(values: np.ndarray, starts: Int64[np.ndarray, " segments"], dtype: type) -> np.ndarray:
    """Sum the last axis by segments, which are not empty."""
    if not len(starts):
        return np.zeros((*values.shape[:-1], 0), dtype)
    return np.add.reduceat(values, starts, axis=-1, dtype=dtype)


def _draw(
    scores: Float64[np.ndarray, "queries searched"], order: np.ndarray, starts: np.ndarray, rows: int, first: int
) -> Float64[np.ndarray, "queries draws segments"]:
    """Sum the scores by segments in each bootstrap draw.

    Args:
        scores: of the searched rows, in the order `order`.
        rows: number of all rows, searched or not: a row's repeats do not depend on what is searched.
    """
    random = np.random.default_rng([first]).integers(0, 256, (rows, _DRAWS), np.uint8)
    ends = np.append(starts, len(order))[1:]
    draws = np.zeros((len(scores), _DRAWS, len(starts)))
    for segment, (begin, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        for start in range(begin, end, _BLOCK):
            block = slice(start, min(start + _BLOCK, end))
            draws[:, :, segment] += scores[:, block] @ _POISSON[random[order[block]]]
    return draws


@dataclass
class SumTree:
    """Sums of consecutive groups of shards, added up as a binary tree.

    A node of level l covers the 2^l groups from a multiple of 2^l on. Two nodes that make up one of the next level are added at once, the
    lower first, so that few nodes are in memory.

    Attributes:
        nodes: by level and number.
        column: for messages.
    """

    column: str
    nodes: dict[tuple[int, int], Sums] = field(default_factory=dict)

    def add(self, level: int, number: int, sums: Sums) -> None:
        """Add a node.

        Raises:
            UsageError: there are too many values.
        """
        while (sibling := self.nodes.pop((level, number ^ 1), None)) is not None:
            sums = sums + sibling if number % 2 == 0 else sibling + sums
            level += 1
            number //= 2
        if len(sums.values) > MOST_VALUES:
            raise too_many_values(self.column, MOST_VALUES)
        self.nodes[level, number] = sums

    def update(self, other: "SumTree") -> None:
        """Add the nodes of other groups of shards."""
        for (level, number), sums in other.nodes.items():
            self.add(level, number, sums)

    def _ordered(self) -> Iterator[Sums]:
        """Yield the nodes in the order of the groups that they cover."""
        yield from (self.nodes[key] for key in sorted(self.nodes, key=lambda key: key[1] << key[0]))

    def total(self) -> Sums:
        """Add up all nodes.

        Raises:
            UsageError: there are too many values.
        """
        first, *rest = self._ordered()
        for sums in rest:
            first = first + sums
        if len(first.values) > MOST_VALUES:
            raise too_many_values(self.column, MOST_VALUES)
        return first
