"""Search for the rows with the highest and lowest scores: by an exact scan, or by quantized scan and rescore with a certificate.

The exact scan scores all rows, in one pass over the groups of shards. Posting lists are always scanned exactly. The parts of an index (see
parts.py) work at the same time; this module puts their results together.

Quantized scan and rescore is for dense rows. One-bit codes estimate all scores (store/scan_codes.py). Then the stored rows that could be
among the best k are read, and their scores replace the estimates.

The certificate. Let s be the k-th best score among the rows that were read; it is at most the true k-th best score. A row is not read if
its estimate plus z times the estimate's standard deviation does not exceed s. A row of the true k best scores at least s, so it is missed
only if its estimate is too low by z standard deviations, which has the probability 1 - Phi(z). For recall r, z is chosen so that this is
(1 - r) / k. By the union bound, none of the k best rows is missing with a probability of at least r, over the random rotation of the codes,
and likewise none of the k worst. That holds for any rows and any query; only the number of rows to read depends on them. If it is too
large, an exact scan is made instead, since it is faster.
"""

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from ..store.errors import UsageError
from ..store.shapes import Bool, Float32, Int64
from .answers import FaissReport
from .groups import SumTree
from .options import Mode
from .parts import NO_CANDIDATES, NOTHING, Best, Candidates, Pair, Parts, Ranked, Scan, Search, call_all

_EXACT_PASS = 64  # queries in one exact scan
_GROUPS_PASS = 8  # queries in one exact scan with sums by group
_SCAN_PASS = 8  # queries in one quantized scan
_READ_FIRST = 256
_MOST_READ = 16  # at most one row in 16 is read; an exact scan is faster than to read more
_MOST_READ_OF_FEW = 1024
_HOPELESS = 4  # where one row in 4 of the first group is a candidate, reading some does not bring that below one in 16


@dataclass(frozen=True)
class Hits:
    """The best and worst rows of a query.

    Attributes:
        proponents, proponent_scores: rows with positive scores, highest first (of equal scores, the lower row first).
        opponents, opponent_scores: rows with negative scores, lowest first.
        seconds: wall time of the query's pass.
        candidates: number of rows that were read; for an exact scan, of all searched rows.
        recall: probability that none of the best k is missing, at least; likewise of the worst. 1 after an exact scan; None by FAISS.
        note: reason for an exact scan where a recall below 1 was requested.
        positive, negative: sums of the scores of all searched rows above 0, and below; None where not all rows were scored.
        nonzero: number of searched rows whose score is not 0; None where not all were scored.
        best_otherwise: the best rows in other modes with their scores, by mode, where these were asked for.
    """

    proponents: Int64[np.ndarray, " p"]
    proponent_scores: Float32[np.ndarray, " p"]
    opponents: Int64[np.ndarray, " o"]
    opponent_scores: Float32[np.ndarray, " o"]
    seconds: float
    candidates: int
    recall: float | None = 1.0
    note: str | None = None
    positive: float | None = None
    negative: float | None = None
    nonzero: int | None = None
    best_otherwise: Mapping[Mode, Ranked] = field(default_factory=dict)

    def completed(self, bound: float, seconds: float, recall: float, note: str | None) -> "Hits":
        """Return the hits with what is known after a search, and scores clipped to plus and minus a bound."""
        scores = {name: getattr(self, name).clip(-bound, bound) for name in ("proponent_scores", "opponent_scores")}
        return replace(self, **scores, seconds=seconds, recall=recall, note=note)

    def without_opponents(self) -> "Hits":
        """Leave the opponents out."""
        return replace(self, opponents=self.opponents[:0], opponent_scores=self.opponent_scores[:0])


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        hits: of each query.
        searched: number of the rows that were searched.
        missing: number of rows whose part was not there; the rows of a filter among them are unknown.
        sums: by group, if a column was named.
        mask, scores: the mask of the searched rows, and their scores, if these were asked for.
        faiss: the FAISS index that found the candidates.
    """

    hits: list[Hits]
    searched: int
    missing: int
    sums: SumTree | None = None
    mask: Bool[np.ndarray, " rows"] | None = None
    scores: Float32[np.ndarray, "queries searched"] | None = None
    faiss: FaissReport | None = None


def pass_size(recall: float, with_groups: bool = False) -> int:
    """Return the number of queries in one pass over the rows."""
    return _GROUPS_PASS if with_groups else _EXACT_PASS if recall == 1 else _SCAN_PASS


def find(
    parts: Parts,
    search: Search,
    count: int,
    k: int,
    recall: float,
    column: str | None = None,
    with_scores: bool = False,
    partial: bool = False,
    others: Sequence[Mode] = (),
) -> Found:
    """Find the best and the worst rows for queries, in one pass.

    Args:
        count: number of the queries.
        k: at least 1; an index with fewer rows returns them all.
        recall: 1 scans all rows. Below 1, the search is by quantized scan and rescore (see above), or by posting lists, which are exact, if
            only sparse components count.
        column: also sum the scores by the values of this column, which needs an exact scan.
        with_scores: also return the scores of all searched rows, which needs one, too.
        partial: leave out parts of the index that are not there at present, instead of waiting for them.
        others: modes in which an exact scan finds the best rows, too.
    """
    k = min(k, len(parts.index))
    started = time.perf_counter()
    note = None
    hits: list[Hits] | None = None
    result = Found([], 0, 0)
    if recall < 1 and (with_scores or column is not None):
        note = "groups and baselines need the scores of all rows"
    elif recall < 1:
        reasons = call_all(parts, "refusal", search, partial=partial)
        note = next((reason for reason in reasons.values() if reason is not None), None)
        if note is None:
            rescored = _scan_and_rescore(parts, search, count, k, -NormalDist().inv_cdf((1 - recall) / k), partial)
            if rescored is None:
                note = "more rows could be among the best than an exact scan takes time for"
            else:
                hits, result = rescored
    if hits is None:
        recall = 1.0
        hits, result = _scan(parts, search, count, k, column, with_scores, partial, others)
    seconds = time.perf_counter() - started
    # Cosines from one-bit codes may exceed 1; they are ranked before they are clipped.
    bound = 1.0 if search.metric.mode == "cosine" else np.inf
    return replace(result, hits=[its_hits.completed(bound, seconds, recall, note) for its_hits in hits])


def find_by_faiss(parts: Parts, search: Search, k: int, partial: bool = False) -> Found:
    """Find rows by the FAISS index of the one component that counts, and rank them by scores from the stored rows.

    Raises:
        UsageError: the scores are not inner products with the rows of one dense component.
        NotFoundError, IncompatibleError, IntegrityError: there is no FAISS index, it is of other rows, or it is damaged.
    """
    from .faiss_index import find_candidates

    started = time.perf_counter()
    scorer = parts.scorer(search)
    operand: Any = scorer.operands[0]
    if len(scorer.operands) > 1 or not operand.component.has_wide_rows:
        counted = ", ".join(operand.component.name for operand in scorer.operands)
        raise UsageError(f"FAISS searches the rows of one dense component, and {counted} count here; give the others the weight 0, or scan")
    if search.metric.mode != "influence":
        raise UsageError(f"FAISS compares inner products, which rank influence and not {search.metric.mode}; ask for influence, or scan")
    masks = call_all(parts, "searched", search, partial=partial)
    mask = np.zeros(len(parts.index), bool)
    for number, part_mask in masks.items():
        mask[parts.firsts[number] : parts.firsts[number] + len(part_mask)] = part_mask
    queries = (operand.queries / scorer.unit.factor).astype(np.float32)  # as long as rows: an index may shift queries before a product
    rows, record = find_candidates(parts.index, operand.component, queries, k, mask)
    hits = []
    for rows_of_query, scores in zip(rows, _read(parts, search, rows, partial), strict=True):
        is_read = np.isfinite(scores)
        sides = Best(k, 1), Best(k, -1)
        for side in sides:
            side.add(rows_of_query[is_read], scores[is_read])
        seconds = time.perf_counter() - started
        hits.append(Hits(*sides[0].ranked(), *sides[1].ranked(), seconds, len(rows_of_query), None))
    report = FaissReport(record.factory, record.parameters, record.queries, record.k, record.proponents, record.opponents)
    return Found(hits, int(mask.sum()), _missing(parts, masks), faiss=report)


def _scan(
    parts: Parts, search: Search, count: int, k: int, column: str | None, with_scores: bool, partial: bool, others: Sequence[Mode]
) -> tuple[list[Hits], Found]:
    """Score all searched rows, and put the parts' results together."""
    scans: dict[int, Scan] = call_all(parts, "scan", search, k, column, with_scores, others, partial=partial)
    sides = [(Best(k, 1), Best(k, -1)) for _ in range(count)]
    otherwise = {mode: [Best(k, 1) for _ in range(count)] for mode in others}
    searched = sum(scan.searched for scan in scans.values())
    sums = None if column is None else SumTree(column)
    for scan in scans.values():
        for (best, worst), own_best, own_worst in zip(sides, scan.best, scan.worst, strict=True):
            best.add(*own_best)
            worst.add(*own_worst)
        for mode, bests in otherwise.items():
            for best, own_best in zip(bests, scan.best_otherwise[mode], strict=True):
                best.add(*own_best)
        if sums is not None and scan.sums is not None:
            sums.update(scan.sums)
    signed = np.concatenate([np.zeros((0, count, 3)), *(scan.signed for scan in scans.values())])
    hits = []
    for q, (best, worst) in enumerate(sides):
        positive, negative = (math.fsum(signed[:, q, side]) for side in range(2))  # the same bits, however the rows are in parts
        nonzero = int(signed[:, q, 2].sum())
        best_otherwise = {mode: bests[q].ranked() for mode, bests in otherwise.items()}
        ranked = *best.ranked(), *worst.ranked()
        scanned = Hits(*ranked, 0.0, searched, positive=positive, negative=negative, nonzero=nonzero, best_otherwise=best_otherwise)
        hits.append(scanned)
    result = Found([], searched, _missing(parts, scans.keys()), sums)
    if not with_scores:
        return hits, result
    mask = np.zeros(len(parts.index), bool)
    for number, scan in scans.items():
        if scan.mask is not None:
            mask[parts.firsts[number] : parts.firsts[number] + len(scan.mask)] = scan.mask
    scores = np.concatenate([scan.scores for scan in scans.values() if scan.scores is not None], axis=1)
    return hits, replace(result, mask=mask, scores=scores)


def _missing(parts: Parts, answered: Collection[int]) -> int:
    """Return the number of rows of the parts that did not answer."""
    ends = [*parts.firsts[1:], len(parts.index)]
    return sum(end - first for number, (first, end) in enumerate(zip(parts.firsts, ends, strict=True)) if number not in answered)


class _Queue:
    """Candidates of several parts whose bounds reach a threshold, highest bound first."""

    def __init__(self, candidates: Sequence[Candidates], threshold: float) -> None:
        candidates_of_all = Candidates.concatenate(candidates)
        positions = np.flatnonzero(candidates_of_all.bounds >= threshold)
        positions = positions[np.lexsort((candidates_of_all.rows[positions], -candidates_of_all.bounds[positions]))]
        self._candidates = candidates_of_all.select(positions)
        self._first = 0

    def next(self, size: int, threshold: float) -> Candidates:
        """Remove and return at most `size` candidates whose bounds reach the threshold."""
        reached = int(np.searchsorted(-self._candidates.bounds, -threshold, side="right"))
        last = max(self._first, min(self._first + size, reached))
        candidates = self._candidates.select(np.arange(self._first, last))
        self._first = last
        return candidates


def _scan_and_rescore(parts: Parts, search: Search, count: int, k: int, z: float, partial: bool) -> tuple[list[Hits], Found] | None:
    """Search by quantized scan and rescore (see above); return None if too many rows would have to be read."""
    size = max(k, _READ_FIRST)
    counts: dict[int, int] = call_all(parts, "count", search, partial=partial)
    if not counts:
        return [Hits(*NOTHING, *NOTHING, 0.0, 0)] * count, Found([], 0, _missing(parts, ()))
    most = max(_MOST_READ_OF_FEW, sum(counts.values()) // _MOST_READ)
    start = min(counts)
    first = parts.call("first_candidates", search, {start: (k, z, size)}, partial).get(start)
    if first is None:
        first = [((NOTHING, NOTHING), (NO_CANDIDATES, NO_CANDIDATES), NOTHING[0])] * count
    of_first = parts.index.groups[0].rows  # in one process and in parts alike
    if any(len(best) + len(worst) > max(_MOST_READ_OF_FEW, of_first // _HOPELESS) for _, (best, worst), _ in first):
        return None  # the other groups will have as many
    sides = [(Best(k, 1, best), Best(k, -1, worst)) for (best, worst), _, _ in first]
    # Thresholds from the first group alone do not depend on the order in which the others are searched.
    thresholds = [(best.threshold, worst.threshold) for best, worst in sides]
    candidates_of_parts = parts.call(
        "candidates", search, {number: (z, thresholds, most, int(number == start)) for number in counts}, partial
    )
    unread: list[list[Pair]] = [[pair for _, pair, _ in first], *candidates_of_parts.values()]
    queues = [tuple(_Queue([pairs[q][side] for pairs in unread], thresholds[q][side]) for side in range(2)) for q in range(count)]
    rows_read = [[rows] for _, _, rows in first]
    pending = list(range(count))
    limit = size
    while pending:
        batches = {q: [queue.next(limit, side.threshold) for queue, side in zip(queues[q], sides[q], strict=True)] for q in pending}
        rows = [np.concatenate([batch.rows for batch in batches[q]]) if q in batches else NOTHING[0] for q in range(count)]
        for q in pending:
            rows_read[q].append(rows[q])
            if sum(map(len, rows_read[q])) > most:
                return None
        pending = [q for q in pending if len(rows[q])]
        for q, products in enumerate(_read(parts, search, rows, partial)):
            offset = 0
            for side, batch in zip(sides[q], batches.get(q, ()), strict=False):
                batch_products = products[offset : offset + len(batch)]
                is_read = np.isfinite(batch_products)
                side.add(batch.rows[is_read], ((batch.exact + batch_products) * batch.scale)[is_read])
                offset += len(batch)
        limit = most
    hits = [
        Hits(*best.ranked(), *worst.ranked(), 0.0, len(np.unique(np.concatenate(rows_of_query))))
        for (best, worst), rows_of_query in zip(sides, rows_read, strict=True)
    ]
    answered = candidates_of_parts.keys() & counts.keys()
    return hits, Found([], sum(counts[number] for number in answered), _missing(parts, answered))


def _read(parts: Parts, search: Search, rows: Sequence[Int64[np.ndarray, " _rows"]], partial: bool) -> list[Float32[np.ndarray, " _rows"]]:
    """Read rows for each query, in one call of each part that has some; NaN for those of parts that are not there."""
    owners = [np.searchsorted(parts.firsts, rows_of_query, side="right") - 1 for rows_of_query in rows]
    numbers = np.unique(np.concatenate(owners)).tolist()
    calls = {number: ([rows_of_query[owner == number] for rows_of_query, owner in zip(rows, owners, strict=True)],) for number in numbers}
    products = [np.full(len(rows_of_query), np.nan, np.float32) for rows_of_query in rows]
    for number, result in parts.call("read", search, calls, partial).items():
        for products_of_query, owner, values in zip(products, owners, result, strict=True):
            products_of_query[owner == number] = values
    return products
