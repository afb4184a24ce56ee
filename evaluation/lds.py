"""Linear datamodeling score (LDS): rank correlation of summed scores with the losses after retraining on subsets.

For a query q and subsets A_1..A_S of the training examples:

    LDS(q) = Spearman over s of ( -sum_{i in A_s} score(i, q),  mean over seeds of loss_q(model trained on A_s) )

(Park et al., TRAK, arXiv 2303.14186, eq. 5), averaged over queries. 1 is a perfect ranking, 0 is chance. Retraining is noisy, so a figure
has an interval, by bootstrap over subsets and queries together (conservative: it counts the noise of single queries twice), and a
ceiling, the highest LDS that the noise between seeds allows.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ..store.errors import UsageError
from ..store.extras import require
from ..store.shapes import Bool, Float, Float64

_rankdata = require("scipy.stats", "evaluation").rankdata
_RESAMPLES = 400
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval (`low` to `high`)."""

    value: float
    low: float
    high: float


def lds(
    scores: Float[np.ndarray, "_examples _queries"],
    masks: Bool[np.ndarray, "subsets examples"],
    losses: Float[np.ndarray, "subsets seeds queries"],
) -> Float64[np.ndarray, " queries"]:
    """Each query's LDS; NaN if its losses are the same on every subset, 0 if the scores are.

    Args:
        scores: positive for an example that lowers the query's loss.
        masks: True for the examples in each subset.
        losses: of the queries (nats) under the models trained on the subsets.

    Raises:
        UsageError: the shapes do not fit, or a score is not finite.
    """
    examples = masks.shape[1]
    if scores.shape != (examples, losses.shape[2]):
        raise UsageError(f"the scores have shape {scores.shape}; this pack needs {(examples, losses.shape[2])} (examples, queries)")
    if not np.isfinite(scores).all():
        row, query = np.argwhere(~np.isfinite(scores))[0]
        raise UsageError(f"the score of example {row} for query {query} is not a finite number")
    return columns_correlation(_predicted(scores, masks), losses.mean(axis=1, dtype=np.float64))


def _predicted(scores: np.ndarray, masks: np.ndarray) -> Float64[np.ndarray, "subsets queries"]:
    """Negative sums over subsets, rounded so that round-off does not break ties."""
    sums = -(masks.astype(np.float64) @ scores.astype(np.float64))
    size = np.abs(sums).max(axis=0)
    return np.round(sums / np.where(size > 0, size, 1.0), 10)


def estimate(
    scores: Float[np.ndarray, "examples queries"],
    masks: Bool[np.ndarray, "subsets examples"],
    losses: Float[np.ndarray, "subsets seeds queries"],
    seed: int = 0,
    reference: Float[np.ndarray, "examples queries"] | None = None,
) -> Estimate:
    """The mean LDS over queries, with its interval by bootstrap over subsets and queries; with `reference`, less the mean LDS of it."""
    matrices = [scores] if reference is None else [scores, reference]
    value = _lead(lds(matrix, masks, losses) for matrix in matrices)
    predicted = [_predicted(matrix, masks) for matrix in matrices]
    actual = losses.mean(axis=1, dtype=np.float64)

    def statistic(subsets: np.ndarray, queries: np.ndarray) -> float:
        cells = np.ix_(subsets, queries)
        return _lead(columns_correlation(sums[cells], actual[cells]) for sums in predicted)

    return Estimate(value, *interval(statistic, actual.shape, seed))


def _lead(correlations: Iterable[Float64[np.ndarray, " queries"]]) -> float:
    """Mean of the first correlations less the means of the rest."""
    first, *rest = map(_mean, correlations)
    return first - sum(rest)


def split_half(losses: Float[np.ndarray, "subsets seeds queries"]) -> float | None:
    """Rank correlation of one half of the seeds with the other, averaged over all splits; None with one seed."""
    seeds = losses.shape[1]
    return _agreement(losses, list(combinations(range(seeds), seeds // 2)), rest=True) if seeds > 1 else None


def ceiling(losses: Float[np.ndarray, "subsets seeds queries"]) -> float | None:
    """The LDS of each subset's expected loss against the mean of the seeds; None with one seed.

    With r the agreement of two single seeds, the mean of k seeds has reliability k r / (1 + (k - 1) r) (Spearman, Brown), and its
    correlation with noise-free values is the square root of that.
    """
    seeds = losses.shape[1]
    single = _agreement(losses, list(combinations(range(seeds), 2)), rest=False) if seeds > 1 else None
    if single is None:
        return None
    single = max(0.0, single)  # below 0, the formula means nothing
    return float(np.sqrt(seeds * single / (1 + (seeds - 1) * single)))


def _agreement(losses: np.ndarray, groups: Sequence[tuple[int, ...]], rest: bool) -> float | None:
    """Mean rank correlation of each group of seeds with the rest, or of the two seeds of each pair."""
    correlations = []
    for group in groups:
        first = list(group) if rest else [group[0]]
        second = [s for s in range(losses.shape[1]) if s not in group] if rest else list(group[1:])
        correlations.append(_mean(columns_correlation(*(losses[:, seeds].mean(axis=1, dtype=np.float64) for seeds in (first, second)))))
    finite = [value for value in correlations if not np.isnan(value)]
    return float(np.mean(finite)) if finite else None


def interval(statistic: Callable[[np.ndarray, np.ndarray], float], shape: tuple[int, int], seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of `statistic(rows, columns)` over rows and columns of a table drawn with replacement."""
    generator = np.random.default_rng(seed)
    draws = [statistic(*(generator.integers(n, size=n) for n in shape)) for _ in range(_RESAMPLES)]
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.nanquantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def _mean(values: Float64[np.ndarray, " n"]) -> float:
    finite = values[~np.isnan(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def columns_correlation(
    a: Float[np.ndarray, "subsets queries"], b: Float[np.ndarray, "subsets queries"]
) -> Float64[np.ndarray, " queries"]:
    """Spearman's correlation of each column (ties at their mean rank); NaN where b is constant, 0 where only a is."""
    a, b = (_rankdata(v, axis=0) - (len(v) + 1) / 2 for v in (a, b))
    spread = np.sqrt((a * a).sum(axis=0) * (b * b).sum(axis=0))
    correlations = np.divide((a * b).sum(axis=0), spread, out=np.zeros(a.shape[1]), where=spread > 0)
    return np.where((b * b).sum(axis=0) > 0, correlations, np.nan)


def difference(
    scores: Float[np.ndarray, "examples queries"],
    reference: Float[np.ndarray, "examples queries"],
    masks: Bool[np.ndarray, "subsets examples"],
    losses: Float[np.ndarray, "subsets seeds queries"],
) -> Estimate:
    """Difference of the LDS of `scores` and `reference`, with its interval from the same drawn subsets."""
    return estimate(scores, masks, losses, reference=reference)
