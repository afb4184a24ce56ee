"""Scores by group: what a source, an author or a license has contributed to an answer, with bootstrap intervals over examples.

The influence of a group is the sum of its examples' scores (scores are additive to first order). Intervals come from the Poisson
bootstrap: in each of 200 draws every example counts a number of times drawn from a Poisson distribution of mean 1 (Chamandy et al.,
Estimating uncertainty for massive data streams, 2012), from bytes, whose 256 values carry its probabilities to 1/256.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32

from ..store.index import Index
from .answers import Group
from .metric import Metric, QueryRows
from .scoring import all_scores

_DRAWS, _LEVEL, _MOST_GROUPS = 200, 0.95, 10_000


def _poisson_table() -> np.ndarray:
    probabilities = np.exp(-1) / np.cumprod([1, *range(1, 6)])
    counts = np.floor(probabilities * 256 + 0.5).astype(int)
    counts[0] += 256 - counts.sum()
    table = np.repeat(np.arange(6), counts)
    return (table / table.mean()).astype(np.float32)


_POISSON = _poisson_table()


def group_scores(
    index: Index,
    queries: QueryRows,
    column: str,
    metric: Metric = Metric(),
    allowed: Bool[np.ndarray, " rows"] | None = None,
    seed: int = 0,
) -> list[list[Group]]:
    """For each query the groups of a column, highest total first.

    Args:
        allowed: which rows count; None counts all that are not deleted.

    Raises:
        UsageError: there is no such column, or none to group by (see `Index.distinct`).
    """
    codes, values = index.distinct(column, _MOST_GROUPS)
    kept = index.alive if allowed is None else index.alive & allowed
    scores = np.concatenate([block for _, block in all_scores(index, queries, metric)], axis=1)[:, kept]
    return [_groups(codes[kept], values, own, seed) for own in scores]


def _groups(codes: np.ndarray, values: list[Any], scores: Float32[np.ndarray, " rows"], seed: int) -> list[Group]:
    count, generator = len(values), np.random.default_rng(seed)
    draws = np.stack(
        [np.bincount(codes, scores * _POISSON[np.frombuffer(generator.bytes(len(scores)), np.uint8)], count) for _ in range(_DRAWS)]
    )
    low, high = np.quantile(draws, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], axis=0)
    rows, total = np.bincount(codes, minlength=count), np.bincount(codes, scores, count)
    parts: Mapping[int, np.ndarray] = {sign: np.bincount(codes, np.maximum(sign * scores, 0), count) for sign in (1, -1)}
    counts = {sign: np.bincount(codes, sign * scores > 0, count) for sign in (1, -1)}
    shares = {sign: part / part.sum() if part.sum() > 0 else part for sign, part in parts.items()}
    found = [
        Group(
            values[i],
            int(rows[i]),
            int(counts[1][i]),
            int(counts[-1][i]),
            float(total[i]),
            float(low[i]),
            float(high[i]),
            float(shares[1][i]),
            float(shares[-1][i]),
        )
        for i in np.argsort(-total, kind="stable")
        if rows[i]
    ]
    return found
