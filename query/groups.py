"""Scores by group, such as by source, author or license, with bootstrap intervals over examples.

The influence of a group is the sum of its examples' scores (scores are additive to first order). Intervals come from the Poisson
bootstrap: in each of 200 draws, every example is repeated a random number of times, from a Poisson distribution of mean 1 (Chamandy et al.,
Estimating uncertainty for massive data streams, 2012). A table maps random bytes to these numbers, with probabilities rounded to 1/256.
"""

import numpy as np

from ..store.index import Index
from ..store.shapes import Bool, Float32
from .answers import Group

_DRAWS = 200
_LEVEL = 0.95
_MOST_GROUPS = 10_000


def _poisson_table() -> np.ndarray:
    """Return the number of repeats for each value of a byte, scaled to mean 1."""
    probabilities = np.exp(-1) / np.cumprod([1, *range(1, 6)])
    counts = np.floor(probabilities * 256 + 0.5).astype(int)
    counts[0] += 256 - counts.sum()
    table = np.repeat(np.arange(6), counts)
    return (table / table.mean()).astype(np.float32)


_POISSON = _poisson_table()


class Grouping:
    """Groups of the searched rows by the values of a column.

    Raises:
        UsageError: there is no such column, or it has too many values (see `Index.distinct`).
    """

    def __init__(self, index: Index, column: str, searched: Bool[np.ndarray, " rows"]) -> None:
        codes, self._values = index.distinct(column, _MOST_GROUPS)
        self._codes = codes[searched]

    def groups(self, scores: Float32[np.ndarray, " searched"], seed: int = 0) -> tuple[Group, ...]:
        """Sum scores by group; the highest total is first.

        Args:
            scores: of the searched rows.
            seed: of the bootstrap.
        """
        codes = self._codes
        count = len(self._values)
        generator = np.random.default_rng(seed)
        draws = np.empty((_DRAWS, count))
        for draw in range(_DRAWS):
            repeats = _POISSON[np.frombuffer(generator.bytes(len(scores)), np.uint8)]
            draws[draw] = np.bincount(codes, scores * repeats, count)
        low, high = np.quantile(draws, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], axis=0)
        rows = np.bincount(codes, minlength=count)
        total = np.bincount(codes, scores, count)
        counts = [np.bincount(codes, sign * scores > 0, count) for sign in (1, -1)]
        sums = [np.bincount(codes, np.maximum(sign * scores, 0), count) for sign in (1, -1)]
        shares = [part / part.sum() if part.sum() > 0 else part for part in sums]
        return tuple(
            Group(
                value=self._values[i],
                rows=int(rows[i]),
                positive=int(counts[0][i]),
                negative=int(counts[1][i]),
                total=float(total[i]),
                low=float(low[i]),
                high=float(high[i]),
                positive_share=float(shares[0][i]),
                negative_share=float(shares[1][i]),
            )
            for i in np.argsort(-total, kind="stable")
            if rows[i]
        )
