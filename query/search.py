"""Search for the rows with the highest and lowest scores: by an exact scan, or by quantized scan and rescore with a certificate.

The exact scan scores all rows, in one pass over the groups of shards. Posting lists are always scanned exactly.

Quantized scan and rescore is for dense rows. One-bit codes estimate all scores (store/scan_codes.py). Then the stored rows that could be
among the best k are read, and their scores replace the estimates.

The certificate. Let s be the k-th best score among the rows that were read; it is at most the true k-th best score. A row is not read if
its estimate plus z times the estimate's standard deviation does not exceed s. A row of the true k best scores at least s, so it is missed
only if its estimate is too low by z standard deviations, which has the probability 1 - Phi(z). For recall r, z is chosen so that this is
(1 - r) / k. By the union bound, none of the k best rows is missing with a probability of at least r, over the random rotation of the codes,
and likewise none of the k worst. That holds for any rows and any query; only the number of rows to read depends on them. If it is too
large, an exact scan is made instead, since it is faster.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from statistics import NormalDist

import numpy as np

from ..store.index import ShardGroup
from ..store.shapes import Bool, Float32, Int64
from .scoring import Scorer, by_group

_EXACT_PASS = 64  # queries in one exact scan
_SCAN_PASS = 8  # queries in one quantized scan
_READ_FIRST = 256
_MOST_READ = 16  # at most one row in 16 is read; an exact scan is faster than to read more
_MOST_READ_OF_FEW = 1024


@dataclass(frozen=True)
class Hits:
    """The best and worst rows of a query.

    Attributes:
        proponents, proponent_scores: rows with positive scores, highest first (of equal scores, the lower row first).
        opponents, opponent_scores: rows with negative scores, lowest first.
        seconds: wall time of the query's pass.
        candidates: number of rows that were read; for an exact scan, of all searched rows.
        recall: probability that none of the best k is missing, at least; likewise of the worst. 1 after an exact scan.
        note: reason for an exact scan where a recall below 1 was requested.
    """

    proponents: Int64[np.ndarray, " p"]
    proponent_scores: Float32[np.ndarray, " p"]
    opponents: Int64[np.ndarray, " o"]
    opponent_scores: Float32[np.ndarray, " o"]
    seconds: float
    candidates: int
    recall: float = 1.0
    note: str | None = None

    def without_opponents(self) -> "Hits":
        """Leave the opponents out."""
        return replace(self, opponents=self.opponents[:0], opponent_scores=self.opponent_scores[:0])


def pass_size(recall: float) -> int:
    """Return the number of queries in one pass over the rows."""
    return _EXACT_PASS if recall == 1 else _SCAN_PASS


def find(
    scorer: Scorer, k: int, searched: Bool[np.ndarray, " rows"], recall: float, with_scores: bool = False
) -> tuple[list[Hits], Float32[np.ndarray, "queries searched"] | None]:
    """Find the best and the worst rows for the queries of a scorer, in one pass.

    Args:
        k: at least 1; an index with fewer rows returns them all.
        searched: mask of the rows to search.
        recall: 1 scans all rows. Below 1, the search is by quantized scan and rescore (see above), or by posting lists, which are exact, if
            only sparse components count.
        with_scores: also return the scores of all searched rows, which needs an exact scan.
    """
    k = min(k, len(scorer.index))
    started = time.perf_counter()
    note = None
    results: list[_Result] | None = None
    matrix: np.ndarray | None = None
    if recall < 1 and with_scores:
        note = "groups and baselines need the scores of all rows"
    elif recall < 1:
        note = scorer.refusal()
        if note is None:
            results = _scan_and_rescore(scorer, k, searched, -NormalDist().inv_cdf((1 - recall) / k))
            if results is None:
                note = "more rows could be among the best than an exact scan takes time for"
    if results is None:
        recall = 1.0
        results, matrix = _scan(scorer, k, searched, with_scores)
    seconds = time.perf_counter() - started
    bound = 1.0 if scorer.mode == "cosine" else np.inf  # cosines from one-bit codes may exceed 1; they are ranked before they are clipped
    hits = []
    for (best, best_scores), (worst, worst_scores), candidates in results:
        best_scores = best_scores.clip(-bound, bound)  # noqa: PLW2901
        worst_scores = worst_scores.clip(-bound, bound)  # noqa: PLW2901
        hits.append(Hits(best, best_scores, worst, worst_scores, seconds, candidates, recall, note))
    return hits, matrix


_Ranked = tuple[Int64[np.ndarray, " _ranked"], Float32[np.ndarray, " _ranked"]]
_Result = tuple[_Ranked, _Ranked, int]
_NOTHING: _Ranked = (np.zeros(0, np.int64), np.zeros(0, np.float32))


def _scan(
    scorer: Scorer, k: int, searched: Bool[np.ndarray, " rows"], with_scores: bool
) -> tuple[list[_Result], Float32[np.ndarray, "queries searched"] | None]:
    """Score all searched rows; return each query's best and worst rows, and with `with_scores` all scores."""
    best = [_NOTHING] * len(scorer)
    worst = [_NOTHING] * len(scorer)
    blocks = []
    for group, group_scores in by_group(scorer.index.groups, scorer.scores):
        rows = np.arange(group.first, group.first + group.rows)
        mask = searched[rows]
        rows = rows[mask]
        scores = group_scores if mask.all() else group_scores[:, mask]
        for q in range(len(scorer)):
            best[q] = _merge(best[q], rows, scores[q], k, 1)
            worst[q] = _merge(worst[q], rows, scores[q], k, -1)
        if with_scores:
            blocks.append(scores)
    matrix = np.concatenate(blocks, axis=1) if with_scores else None
    candidates = int(searched.sum())
    return [(top, bottom, candidates) for top, bottom in zip(best, worst, strict=True)], matrix


def _merge(ranked: _Ranked, rows: np.ndarray, scores: np.ndarray, k: int, sign: int) -> _Ranked:
    """Return the k entries with the largest positive sign * score among ranked and new rows; equal scores in row order."""
    best_rows, best_scores = ranked
    threshold = best_scores[-1] if len(best_rows) == k else np.float32(0)
    candidates = np.flatnonzero(scores > threshold if sign > 0 else scores < threshold)
    if not len(candidates):
        return ranked
    if len(candidates) > 4 * k:  # sort only the k best and those equal to the k-th
        costs = -sign * scores[candidates]
        candidates = candidates[costs <= np.partition(costs, k - 1)[k - 1]]
    all_rows = np.concatenate([best_rows, rows[candidates]])
    all_scores = np.concatenate([best_scores, scores[candidates]])
    order = np.lexsort((all_rows, -sign * all_scores))[:k]
    return all_rows[order], all_scores[order]


class _TooManyError(Exception):
    """So many rows would have to be read that an exact scan is faster."""


@dataclass
class _Side:
    """The best (sign 1) or worst (sign -1) k rows of a query among those that were read so far."""

    k: int
    sign: int
    ranked: _Ranked = _NOTHING

    @property
    def threshold(self) -> float:
        """Value of sign * score that a row must reach to be among the k rows."""
        rows, scores = self.ranked
        return float(self.sign * scores[-1]) if len(rows) == self.k else 0.0

    def add(self, rows: np.ndarray, scores: np.ndarray) -> None:
        """Add rows in any order; of equal scores, the lower row is first."""
        rows = np.concatenate([self.ranked[0], rows])
        scores = np.concatenate([self.ranked[1], scores])
        positive = self.sign * scores > 0
        order = np.lexsort((rows[positive], -self.sign * scores[positive]))[: self.k]
        self.ranked = rows[positive][order], scores[positive][order]


@dataclass
class _Candidates:
    """Rows that may be among the best and were not read yet.

    Attributes:
        bounds: upper bounds of sign * score.
        exact, scale: see `EstimatedScores`.
    """

    rows: Int64[np.ndarray, " candidates"]
    bounds: Float32[np.ndarray, " candidates"]
    exact: Float32[np.ndarray, " candidates"]
    scale: Float32[np.ndarray, " candidates"]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, positions: np.ndarray) -> "_Candidates":
        """Select candidates by position or mask."""
        return _Candidates(self.rows[positions], self.bounds[positions], self.exact[positions], self.scale[positions])

    def split(self, count: int) -> tuple["_Candidates", "_Candidates"]:
        """Split into the candidates with the `count` highest bounds, and the others."""
        is_high = np.ones(len(self), bool)
        if len(self) > count:
            is_high[np.argpartition(-self.bounds, count - 1)[count:]] = False
        return self.take(is_high), self.take(~is_high)


class _Queue:
    """Candidates of several groups of shards whose bounds reach a threshold, highest bound first."""

    def __init__(self, parts: Sequence[_Candidates], threshold: float) -> None:
        candidates = _Candidates(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(_Candidates)))
        positions = np.flatnonzero(candidates.bounds >= threshold)
        positions = positions[np.argsort(-candidates.bounds[positions], kind="stable")]  # equal bounds stay in the order of rows
        self._candidates = candidates.take(positions)
        self._first = 0

    def next(self, size: int, threshold: float) -> _Candidates:
        """Remove and return at most `size` candidates whose bounds reach the threshold."""
        reached = int(np.searchsorted(-self._candidates.bounds, -threshold, side="right"))
        last = max(self._first, min(self._first + size, reached))
        candidates = self._candidates.take(np.arange(self._first, last))
        self._first = last
        return candidates


def _scan_and_rescore(scorer: Scorer, k: int, searched: Bool[np.ndarray, " rows"], z: float) -> list[_Result] | None:
    """Search by quantized scan and rescore (see above); return None if too many rows would have to be read."""
    queries = range(len(scorer))
    sides = [(_Side(k, 1), _Side(k, -1)) for _ in queries]
    rows_read: list[list[np.ndarray]] = [[] for _ in queries]
    most = max(_MOST_READ_OF_FEW, int(searched.sum()) // _MOST_READ)
    size = max(k, _READ_FIRST)

    def candidates_of(group: ShardGroup) -> list[list[_Candidates]]:
        """Find the candidates of a group of shards, for each query and side."""
        estimates = scorer.estimates(group)
        excluded = np.flatnonzero(~searched[group.first : group.first + group.rows])
        result = []
        for q in queries:
            scores = (estimates.exact[q] + estimates.estimate[q]) * estimates.scale[q]
            margin = z * estimates.deviations[q] * estimates.scale[q]
            by_side = []
            for side, threshold in zip(sides[q], thresholds[q], strict=True):
                bounds = side.sign * scores + margin
                bounds[excluded] = -np.inf
                offsets = np.flatnonzero(bounds >= threshold) if threshold > 0 else np.flatnonzero(bounds > 0)
                by_side.append(
                    _Candidates(group.first + offsets, bounds[offsets], estimates.exact[q, offsets], estimates.scale[q, offsets])
                )
            result.append(by_side)
        return result

    def read(q: int, queues: Sequence[_Queue], count: int) -> bool:
        """Read at most `count` candidates with the highest bounds for each side of a query; return False if there are none."""
        batches = [queue.next(count, side.threshold) for queue, side in zip(queues, sides[q], strict=True)]
        rows = np.concatenate([batch.rows for batch in batches])
        rows_read[q].append(rows)
        if sum(map(len, rows_read[q])) > most:
            raise _TooManyError
        products = np.split(scorer.read(q, rows), [len(batches[0])])
        for side, batch, dense in zip(sides[q], batches, products, strict=True):
            side.add(batch.rows, (batch.exact + dense) * batch.scale)
        return len(rows) > 0

    first, *others = scorer.index.groups
    thresholds = [(0.0, 0.0)] * len(scorer)
    first_candidates = [[candidates.split(size) for candidates in by_side] for by_side in candidates_of(first)]
    try:
        for q in queries:  # thresholds from the first group alone do not depend on the order of the other groups' threads
            read(q, [_Queue([high], 0.0) for high, _ in first_candidates[q]], size)
        thresholds = [(best.threshold, worst.threshold) for best, worst in sides]
        unread = [[[low for _, low in by_side] for by_side in first_candidates]]
        unread += [candidates for _, candidates in by_group(others, candidates_of)]
        for q in queries:
            queues = [_Queue([group[q][n] for group in unread], thresholds[q][n]) for n in range(2)]
            while read(q, queues, size) and read(q, queues, most):
                pass
    except _TooManyError:
        return None
    return [(best.ranked, worst.ranked, len(np.unique(np.concatenate(rows)))) for (best, worst), rows in zip(sides, rows_read, strict=True)]
