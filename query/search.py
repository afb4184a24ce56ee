"""The best and the worst rows: by an exact scan of all, or by quantized scan and rescore with a certificate.

Exact, in one blocked pass, is what everything else is held against, and what posting lists do anyway. By quantized scan and rescore, where
rows are dense: one-bit codes estimate all scores (store/scan_codes.py), and rows are read, from the finest that is stored, that could be
among the best k.

The certificate. Let s be the k-th best score among the rows that were read; it can only be below the true k-th best. A row is left unread
when its estimate, plus z times the estimate's standard deviation, does not exceed s. A row that belongs to the true k best scores s or
more, so that to be left out its estimate must have erred by z standard deviations, which happens with the probability 1 - Phi(z). For
recall r, z is chosen so that this is (1 - r) / k: with a probability of at least r, over the codes' random rotation, not one of the k best
is missing (union bound), and likewise of the worst. That holds for any rows and any query; what depends on them is how many rows are
read. If these are too many, the exact scan is cheaper, and is what is done.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float32, Int64

from ..store.errors import UsageError
from ..store.index import Group, Index
from ..store.manifest import DenseComponent
from .metric import Metric, QueryRows, cut
from .scoring import Scorer, by_group

_EXACT_PASS, _SCAN_PASS = 64, 8
_READ_FIRST = 256
_MOST_READ = 16  # one row in so many, at most; more are scanned faster
_MOST_READ_OF_FEW = 1024


@dataclass(frozen=True)
class Hits:
    """One query's best and worst rows.

    Attributes:
        proponents, proponent_scores: rows of positive score, highest first (ties: lower row first).
        opponents, opponent_scores: rows of negative score, lowest first.
        seconds: wall time of the pass that answered it.
        candidates: rows that were read (of an exact scan, all that were searched).
        recall: with at least this probability none of the best k is missing, and likewise none of the worst; 1 after an exact scan.
        note: why it was an exact scan although less was asked for.
    """

    proponents: Int64[np.ndarray, " p"]
    proponent_scores: Float32[np.ndarray, " p"]
    opponents: Int64[np.ndarray, " o"]
    opponent_scores: Float32[np.ndarray, " o"]
    seconds: float
    candidates: int
    recall: float = 1.0
    note: str | None = None


def search(
    index: Index,
    queries: QueryRows,
    k: int,
    metric: Metric = Metric(),
    allowed: Bool[np.ndarray, " rows"] | None = None,
    recall: float = 1.0,
) -> list[Hits]:
    """The k rows of highest and of lowest score for each query, among those that are not deleted.

    Args:
        queries: component name -> whitened query rows.
        k: at least 1; of more than there are rows, all are given.
        allowed: which rows may be found; None allows all.
        recall: 1 scans all rows; below 1, rows are searched by quantized scan and rescore (see above), except where sparse components alone
            count: their posting lists are exact.

    Raises:
        UsageError: k or recall is out of range, or the metric does not go with the index.
    """
    if k < 1:
        raise UsageError(f"k is {k}; it must be at least 1")
    if not 0.5 <= recall <= 1:
        raise UsageError(f"the recall is {recall}; it must be between 0.5 and 1 (1 scans all rows)")
    k = min(k, len(index))
    searched = index.alive if allowed is None else index.alive & allowed
    count = len(next(iter(queries.values())))
    size = _EXACT_PASS if recall == 1 else _SCAN_PASS
    return [hit for first in range(0, count, size) for hit in _pass(index, cut(queries, first, first + size), k, metric, searched, recall)]


def _pass(index: Index, queries: QueryRows, k: int, metric: Metric, allowed: Bool[np.ndarray, " rows"], recall: float) -> list[Hits]:
    started, note = time.perf_counter(), None
    scorer = Scorer.of(index, queries, metric)
    found: list[_Found] | None = None
    if recall < 1 and not any(isinstance(p.component, DenseComponent) for p in scorer.parts):
        note = "these are all keyed by token, and the lists of a query's tokens are short"
    elif recall < 1:
        note = scorer.refusal()
        if note is None:
            found = _scan_and_rescore(scorer, k, allowed, -NormalDist().inv_cdf((1 - recall) / k))
            if found is None:
                note = "more rows could be among the best than an exact scan takes time for"
    if found is None:
        recall, found = 1.0, _scan(scorer, k, allowed)
    seconds = time.perf_counter() - started
    bound = 1.0 if metric.mode == "cosine" else np.inf  # estimates from one-bit codes may lie beyond; they rank as they are
    hits = []
    for best, worst, read in found:
        scores = best[1].clip(-bound, bound), worst[1].clip(-bound, bound)
        hits.append(Hits(best[0], scores[0], worst[0], scores[1], seconds, read, recall, note))
    return hits


_Ranked = tuple[Int64[np.ndarray, " found"], Float32[np.ndarray, " found"]]
_Found = tuple[_Ranked, _Ranked, int]
_NOTHING: _Ranked = (np.zeros(0, np.int64), np.zeros(0, np.float32))


def _scan(scorer: Scorer, k: int, allowed: Bool[np.ndarray, " rows"]) -> list[_Found]:
    best, worst = [_NOTHING] * len(scorer), [_NOTHING] * len(scorer)
    for group, scores in by_group(scorer.index.groups, scorer.scores):
        rows = np.arange(group.first, group.first + group.rows)
        if not (own := allowed[group.first : group.first + group.rows]).all():
            rows, scores = rows[own], scores[:, own]  # noqa: PLW2901
        for q in range(len(scorer)):
            best[q] = _merge(best[q], rows, scores[q], k, 1)
            worst[q] = _merge(worst[q], rows, scores[q], k, -1)
    return [(*both, int(allowed.sum())) for both in zip(best, worst, strict=True)]


def _merge(known: _Ranked, rows: np.ndarray, scores: np.ndarray, k: int, sign: int) -> _Ranked:
    """The k entries of largest positive sign * score among the known and the new; equal scores in row order."""
    threshold = known[1][-1] if len(known[0]) == k else np.float32(0)
    chosen = np.flatnonzero(scores > threshold if sign > 0 else scores < threshold)
    if not len(chosen):
        return known
    if len(chosen) > 4 * k:  # sort those alone that may stay, equal ones among them
        costs = -sign * scores[chosen]
        chosen = chosen[costs <= np.partition(costs, k - 1)[k - 1]]
    rows = np.concatenate([known[0], rows[chosen]])
    scores = np.concatenate([known[1], scores[chosen]])
    order = np.lexsort((rows, -sign * scores))[:k]
    return rows[order], scores[order]


class _TooManyError(Exception):
    """More rows would have to be read than is worth it."""


@dataclass
class _Side:
    """A query's best rows (sign 1) or worst (sign -1) while it is searched: the best k of those that were read."""

    k: int
    sign: int
    found: _Ranked = _NOTHING

    @property
    def threshold(self) -> float:
        """What sign * score must reach to matter."""
        return float(self.sign * self.found[1][-1]) if len(self.found[0]) == self.k else 0.0


@dataclass
class _Queue:
    """Rows that were not read, and may be among the best, highest upper bound of sign * score first; with their exact parts and scales."""

    rows: Int64[np.ndarray, " waiting"]
    bounds: Float32[np.ndarray, " waiting"]
    sure: Float32[np.ndarray, " waiting"]
    scale: Float32[np.ndarray, " waiting"]
    at: int = 0

    @classmethod
    def of(cls, parts: Sequence[tuple[np.ndarray, ...]], threshold: float) -> "_Queue":
        """Those of some groups' rows whose bounds reach a threshold."""
        rows, bounds, sure, scale = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        order = np.flatnonzero(bounds >= threshold)
        order = order[np.argsort(-bounds[order], kind="stable")]  # parts come in the rows' order
        return cls(rows[order], bounds[order], sure[order], scale[order])

    def next(self, size: int, threshold: float) -> Int64[np.ndarray, " next"]:
        """At most so many further rows, of those whose bounds reach the threshold."""
        first, last = self.at, min(self.at + size, int(np.searchsorted(-self.bounds, -threshold, side="right")))
        self.at = max(first, last)
        return np.arange(first, self.at)


def _split(part: tuple[np.ndarray, ...], count: int) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Rows that wait, in two: so many of the highest bounds, and the others."""
    if len(part[0]) <= count:
        return part, tuple(array[:0] for array in part)
    head = np.zeros(len(part[0]), bool)
    head[np.argpartition(-part[1], count - 1)[:count]] = True
    return tuple(array[head] for array in part), tuple(array[~head] for array in part)


def _merge_all(known: _Ranked, rows: np.ndarray, scores: np.ndarray, k: int, sign: int) -> _Ranked:
    """`_merge` of rows that come in any order: an equal score of a lower row goes first."""
    rows, scores = np.concatenate([known[0], rows]), np.concatenate([known[1], scores])
    chosen = sign * scores > 0
    rows, scores = rows[chosen], scores[chosen]
    order = np.lexsort((rows, -sign * scores))[:k]
    return rows[order], scores[order]


def _scan_and_rescore(scorer: Scorer, k: int, allowed: Bool[np.ndarray, " rows"], z: float) -> list[_Found] | None:
    """See above; None where more rows would have to be read than is worth it."""
    sides = [(_Side(k, 1), _Side(k, -1)) for _ in range(len(scorer))]
    read: list[list[np.ndarray]] = [[] for _ in range(len(scorer))]
    most = max(_MOST_READ_OF_FEW, int(allowed.sum()) // _MOST_READ)

    def look(group: Group) -> list[tuple[np.ndarray, ...]]:
        """The rows of a group that wait, for each query and sign."""
        made: list[tuple[np.ndarray, ...]] = []
        e = scorer.estimates(group)
        barred = np.flatnonzero(~allowed[group.first : group.first + group.rows])
        for q in range(len(scorer)):
            scores, reach = (e.sure[q] + e.guess[q]) * e.scale[q], z * e.deviations[q] * e.scale[q]
            for side, threshold in zip(sides[q], thresholds[q], strict=True):
                bounds = side.sign * scores + reach
                bounds[barred] = -np.inf
                chosen = np.flatnonzero(bounds >= threshold) if threshold > 0 else np.flatnonzero(bounds > 0)
                made.append((group.first + chosen, bounds[chosen], e.sure[q, chosen], e.scale[q, chosen]))
        return made

    def read_on(q: int, size: int) -> bool:
        """Read so many of the rows that wait on each of a query's sides, those of highest bounds; whether there were any."""
        parts = [queue.next(size, side.threshold) for queue, side in zip(queues[q], sides[q], strict=True)]
        rows = np.concatenate([queue.rows[part] for queue, part in zip(queues[q], parts, strict=True)])
        read[q].append(rows)
        if sum(map(len, read[q])) > most:
            raise _TooManyError
        products = np.split(scorer.read(q, rows), [len(parts[0])])
        for side, queue, part, own in zip(sides[q], queues[q], parts, products, strict=True):
            scores = (queue.sure[part] + own) * queue.scale[part]
            side.found = _merge_all(side.found, queue.rows[part], scores, k, side.sign)
        return len(rows) > 0

    first, *others = scorer.index.groups
    thresholds, count = [(0.0, 0.0)] * len(scorer), max(k, _READ_FIRST)
    begun = [_split(part, count) for part in look(first)]
    queues = [[_Queue.of([head], 0.0) for head, _ in begun[2 * q : 2 * q + 2]] for q in range(len(scorer))]
    try:
        for q in range(len(scorer)):  # what the first group gives is a threshold for the others, whatever their threads' order
            read_on(q, count)
        thresholds = [(best.threshold, worst.threshold) for best, worst in sides]
        waiting = [[tail for _, tail in begun], *(made for _, made in by_group(others, look))]
        for q in range(len(scorer)):
            queues[q] = [_Queue.of([made[2 * q + n] for made in waiting], thresholds[q][n]) for n in range(2)]
            while read_on(q, count) and read_on(q, most):
                pass
    except _TooManyError:
        return None
    return [(best.found, worst.found, len(np.unique(np.concatenate(rows)))) for (best, worst), rows in zip(sides, read, strict=True)]
