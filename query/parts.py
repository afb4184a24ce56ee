"""The parts of an index, which are searched apart: what leaves a part is small, and adds up to the answer.

A part has consecutive groups of shards. Usually an index is one part, in the process that asks (`WholeIndex`). A server may keep many parts
in processes on several machines (ray_jobs/fleet.py). The scores of a group of shards do not depend on the part that it belongs to, and
neither does the way in which results are put together, so that answers are the same bits.
"""

import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import numpy as np

from ..store.index import ColumnType, Index, ShardGroup, merge_column_types
from ..store.shapes import Bool, Float32, Int64
from ..store.vectors import Rows
from .groups import MOST_VALUES, Sums, SumTree
from .metric import Metric
from .mixing import Mixing
from .scoring import Scorer, by_group

_KEPT = 4  # prepared searches, and masks
Ranked = tuple[Int64[np.ndarray, " _ranked"], Float32[np.ndarray, " _ranked"]]
"""Rows and their scores, the best or the worst first; of equal scores, the lower row first."""

NOTHING: Ranked = (np.zeros(0, np.int64), np.zeros(0, np.float32))


@dataclass(frozen=True, eq=False)
class Search:
    """Encoded queries, and which rows are searched for them.

    Attributes:
        queries: whitened rows of the queries, by component.
        mixings: see `Scorer.of`.
        where: filter of the rows; None for all that are not deleted.
        types: the columns of all parts, which filters and groups need; None where there are neither.
        id: a part prepares a search once.
    """

    queries: Rows
    metric: Metric
    mixings: Mapping[str, Mixing]
    where: str | None = None
    types: Mapping[str, ColumnType] | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class Scan:
    """The result of an exact scan of some rows.

    Attributes:
        best, worst: for each query.
        searched: number of the rows that were searched.
        sums: by group, if a column was named.
        mask, scores: the mask of the searched rows, and their scores, if these were asked for.
    """

    best: list[Ranked]
    worst: list[Ranked]
    searched: int
    sums: SumTree | None
    mask: Bool[np.ndarray, " rows"] | None
    scores: Float32[np.ndarray, "queries searched"] | None


@dataclass
class Side:
    """The best (sign 1) or worst (sign -1) k rows of a query among those that were read so far."""

    k: int
    sign: int
    ranked: Ranked = NOTHING

    @property
    def threshold(self) -> float:
        """Value of sign * score that a row must reach to be among the k rows."""
        rows, scores = self.ranked
        return float(self.sign * scores[-1]) if len(rows) == self.k else 0.0

    def add(self, rows: np.ndarray, scores: np.ndarray) -> None:
        """Add rows in any order."""
        rows = np.concatenate([self.ranked[0], rows])
        scores = np.concatenate([self.ranked[1], scores])
        positive = self.sign * scores > 0
        order = np.lexsort((rows[positive], -self.sign * scores[positive]))[: self.k]
        self.ranked = rows[positive][order], scores[positive][order]


@dataclass
class Candidates:
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

    def take(self, positions: np.ndarray) -> "Candidates":
        """Select candidates by position or mask."""
        return Candidates(self.rows[positions], self.bounds[positions], self.exact[positions], self.scale[positions])

    def split(self, count: int) -> tuple["Candidates", "Candidates"]:
        """Split into the candidates with the `count` highest bounds, and the others."""
        is_high = np.ones(len(self), bool)
        if len(self) > count:
            is_high[np.argpartition(-self.bounds, count - 1)[count:]] = False
        return self.take(is_high), self.take(~is_high)

    @classmethod
    def join(cls, parts: Sequence["Candidates"]) -> "Candidates":
        """Join candidates of several groups of shards."""
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))


Pair = tuple[Candidates, Candidates]
"""Candidates for the best and for the worst rows."""


def merge(ranked: Ranked, rows: np.ndarray, scores: np.ndarray, k: int, sign: int) -> Ranked:
    """Return the k entries with the largest positive sign * score among ranked and new rows, which are higher than the ranked ones."""
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


class Part:
    """Consecutive groups of shards of an index, and what is computed of them for a search.

    Args:
        groups: numbers of the groups; all by default.
        threads: that work on a search; one for each available core by default.
    """

    def __init__(self, index: Index, groups: range | None = None, threads: int | None = None) -> None:
        self.index = index
        self._numbers = range(len(index.groups)) if groups is None else groups
        self.groups = index.groups[self._numbers.start : self._numbers.stop]
        self._threads = threads
        self._lock = threading.Lock()
        self._scorers: OrderedDict[str, Scorer] = OrderedDict()
        self._masks: OrderedDict[str, list[Bool[np.ndarray, " rows"]]] = OrderedDict()

    def column_types(self) -> dict[str, ColumnType]:
        """Return the columns of its shards."""
        return self.index.column_types(self.groups)

    def refusal(self, search: Search) -> str | None:
        """Return the reason why a quantized scan is not possible or not useful; None if it is both."""
        return self._scorer(search).refusal(self.groups)

    def searched(self, search: Search) -> Bool[np.ndarray, " rows"]:
        """Return a mask of the rows that are searched."""
        return np.concatenate(self._mask(search))

    def count(self, search: Search) -> int:
        """Return the number of the rows that are searched."""
        return sum(int(mask.sum()) for mask in self._mask(search))

    def scan(self, search: Search, k: int, column: str | None = None, with_scores: bool = False) -> Scan:
        """Score all searched rows.

        Args:
            column: also sum the scores by the values of this column.
            with_scores: also return all scores.
        """
        scorer = self._scorer(search)
        masks = self._mask_by_group(search)
        numbers = {group.first: number for number, group in zip(self._numbers, self.groups, strict=True)}
        best = [NOTHING] * len(scorer)
        worst = [NOTHING] * len(scorer)
        sums = None if column is None else SumTree(column)
        blocks = []

        def score(group: ShardGroup) -> tuple[Float32[np.ndarray, "queries rows"], Sums | None]:
            scores = scorer.scores(group)
            if column is None:
                return scores, None
            codes, values = self.index.distinct(column, MOST_VALUES, [group], search.types)
            return scores, Sums.of(codes, values, scores, masks[group.first], group.first)

        for group, (group_scores, group_sums) in by_group(self.groups, score, self._threads):
            mask = masks[group.first]
            whole = bool(mask.all())
            rows = np.arange(group.first, group.first + group.rows)
            rows = rows if whole else rows[mask]
            scores = group_scores if whole else group_scores[:, mask]
            for q in range(len(scorer)):
                best[q] = merge(best[q], rows, scores[q], k, 1)
                worst[q] = merge(worst[q], rows, scores[q], k, -1)
            if sums is not None and group_sums is not None:
                sums.add(0, numbers[group.first], group_sums)
            if with_scores:
                blocks.append(scores)
        searched = self.searched(search)
        return Scan(
            best,
            worst,
            int(searched.sum()),
            sums,
            searched if with_scores else None,
            np.concatenate(blocks, axis=1) if with_scores else None,
        )

    def scores(self, search: Search, skipped: int = 0) -> Iterator[Float32[np.ndarray, "queries rows"]]:
        """Yield the scores of each group of shards, in row order; NaN for rows that are not searched.

        Args:
            skipped: number of groups to leave out at the beginning.
        """
        scorer = self._scorer(search)
        masks = self._mask(search)[skipped:]
        for mask, (_, scores) in zip(masks, by_group(self.groups[skipped:], scorer.scores, self._threads), strict=True):
            yield scores if mask.all() else np.where(mask, scores, np.float32(np.nan))

    def extremes(self, search: Search) -> tuple[float, float, int]:
        """Return the lowest and highest score of the searched rows, over all queries, and the number of these rows."""
        low, high, count = np.inf, -np.inf, 0
        for block in self.scores(search):
            scores = block[np.isfinite(block)]
            if len(scores):
                low, high, count = min(low, float(scores.min())), max(high, float(scores.max())), count + len(scores)
        return low, high, count

    def histogram(self, search: Search, bins: int, low: float, high: float) -> Int64[np.ndarray, " bins"]:
        """Count the scores of searched rows in bins of equal width."""
        counts = np.zeros(bins, np.int64)
        for block in self.scores(search):
            counts += np.histogram(block[np.isfinite(block)].astype(np.float64), bins, (low, high))[0]
        return counts

    def first_candidates(self, search: Search, k: int, z: float, size: int) -> list[tuple[tuple[Ranked, Ranked], Pair, np.ndarray]]:
        """Read the rows of its first group with the highest bounds, for each query and side (see search.py).

        Returns:
            For each query: the best and worst rows that were read; the other candidates, as far as they can still be among these; and the
            rows that were read.
        """
        scorer = self._scorer(search)
        pairs = self._candidates(scorer, self.groups[0], self._mask(search)[0], z, [(0.0, 0.0)] * len(scorer))
        results = []
        for q, pair in enumerate(pairs):
            sides = Side(k, 1), Side(k, -1)
            splits = [candidates.split(size) for candidates in pair]
            read = [high for high, _ in splits]
            rows = np.concatenate([high.rows for high in read])
            products = np.split(scorer.read(q, rows), [len(read[0])])
            for side, high, dense in zip(sides, read, products, strict=True):
                side.add(high.rows, (high.exact + dense) * high.scale)
            best, worst = (low.take(low.bounds >= side.threshold) for side, (_, low) in zip(sides, splits, strict=True))
            results.append(((sides[0].ranked, sides[1].ranked), (best, worst), rows))
        return results

    def candidates(self, search: Search, z: float, thresholds: Sequence[tuple[float, float]], most: int, skipped: int) -> list[Pair]:
        """Find the candidates in its groups: at most `most` for each query and side.

        Args:
            thresholds: for each query, of the best and of the worst rows.
            skipped: number of groups to leave out at the beginning.
        """
        scorer = self._scorer(search)
        masks = self._mask_by_group(search)
        by_query: list[tuple[list[Candidates], list[Candidates]]] = [([_NO_CANDIDATES], [_NO_CANDIDATES]) for _ in thresholds]
        groups = self.groups[skipped:]
        for _, pairs in by_group(groups, lambda group: self._candidates(scorer, group, masks[group.first], z, thresholds), self._threads):
            for lists, pair in zip(by_query, pairs, strict=True):
                for its_list, candidates in zip(lists, pair, strict=True):
                    its_list.append(candidates)
        joined = [tuple(Candidates.join(its_list).split(most)[0] for its_list in lists) for lists in by_query]
        return [(best, worst) for best, worst in joined]

    def read(self, search: Search, rows: Sequence[Int64[np.ndarray, " rows"]]) -> list[Float32[np.ndarray, " rows"]]:
        """Return, for each query, the sums over dense components of some rows, from the rows themselves."""
        scorer = self._scorer(search)
        return [scorer.read(q, own) for q, own in enumerate(rows)]

    def _candidates(
        self, scorer: Scorer, group: ShardGroup, mask: Bool[np.ndarray, " rows"], z: float, thresholds: Sequence[tuple[float, float]]
    ) -> list[Pair]:
        """Find the candidates of a group of shards, for each query and side."""
        estimates = scorer.estimates(group)
        excluded = np.flatnonzero(~mask)
        result = []
        for q, pair in enumerate(thresholds):
            scores = (estimates.exact[q] + estimates.estimate[q]) * estimates.scale[q]
            margin = z * estimates.deviations[q] * estimates.scale[q]
            sides = []
            for sign, threshold in zip((1, -1), pair, strict=True):
                bounds = sign * scores + margin
                bounds[excluded] = -np.inf
                offsets = np.flatnonzero(bounds >= threshold) if threshold > 0 else np.flatnonzero(bounds > 0)
                rows = group.first + offsets
                sides.append(Candidates(rows, bounds[offsets], estimates.exact[q, offsets], estimates.scale[q, offsets]))
            result.append((sides[0], sides[1]))
        return result

    def _scorer(self, search: Search) -> Scorer:
        def prepare() -> Scorer:
            return Scorer.of(self.index, search.queries, search.metric, search.mixings)

        return self._kept(self._scorers, search.id, prepare)

    def _mask(self, search: Search) -> list[Bool[np.ndarray, " rows"]]:
        """Return the masks of the searched rows of each group."""

        def compute() -> list[Bool[np.ndarray, " rows"]]:
            mask = self.index.alive_rows(self.groups)
            if search.where is not None:
                mask &= self.index.matching(search.where, self.groups, search.types)
            return np.split(mask, np.cumsum([group.rows for group in self.groups])[:-1])

        return self._kept(self._masks, search.where or "", compute)

    def _mask_by_group(self, search: Search) -> dict[int, Bool[np.ndarray, " rows"]]:
        """Return the masks of the searched rows, by the first row of the group."""
        return {group.first: mask for group, mask in zip(self.groups, self._mask(search), strict=True)}

    def _kept(self, kept: "OrderedDict[str, Any]", key: str, compute: Callable[[], Any]) -> Any:
        """Return one of the values that are kept, or compute it."""
        with self._lock:
            if key in kept:
                kept.move_to_end(key)
                return kept[key]
        value = compute()
        with self._lock:
            kept[key] = value
            while len(kept) > _KEPT:
                kept.popitem(last=False)
        return value


_NO_CANDIDATES = Candidates(*(np.zeros(0, dtype) for dtype in (np.int64, np.float32, np.float32, np.float32)))


class Parts(Protocol):
    """All parts of an index.

    Attributes:
        firsts: the first row of each part.
    """

    index: Index
    firsts: Sequence[int]

    def call(self, method: str, search: Search | None, arguments: Mapping[int, tuple[Any, ...]], partial: bool = False) -> dict[int, Any]:
        """Call a method of some parts, with the search and further arguments for each; return the results by part, in their order.

        Args:
            partial: leave out parts that are not there at present, instead of waiting for them.
        """

    def stream(self, search: Search) -> Iterator[Float32[np.ndarray, "queries rows"]]:
        """Yield the scores of each group of shards, in row order; see `Part.scores`."""

    def up(self) -> list[int]:
        """Return for each part the number of processes that can search it at present."""

    def moved_to(self, index: Index) -> "Parts":
        """Return the parts of another state of the index."""


class WholeIndex:
    """An index as one part, in this process."""

    firsts: Sequence[int] = (0,)

    def __init__(self, index: Index) -> None:
        self.index = index
        self._part = Part(index)

    def call(self, method: str, search: Search | None, arguments: Mapping[int, tuple[Any, ...]], partial: bool = False) -> dict[int, Any]:
        """See `Parts`."""
        shared = () if search is None else (search,)
        return {number: getattr(self._part, method)(*shared, *own) for number, own in arguments.items()}

    def stream(self, search: Search) -> Iterator[Float32[np.ndarray, "queries rows"]]:
        """See `Parts`."""
        return self._part.scores(search)

    def up(self) -> list[int]:
        """See `Parts`."""
        return [1]

    def moved_to(self, index: Index) -> "WholeIndex":
        """See `Parts`."""
        return WholeIndex(index)


def call_all(parts: Parts, method: str, search: Search | None, *arguments: Any, partial: bool = False) -> dict[int, Any]:
    """Call a method of all parts with the same arguments."""
    return parts.call(method, search, dict.fromkeys(range(len(parts.firsts)), arguments), partial)


def column_types(parts: Parts) -> dict[str, ColumnType]:
    """Return the columns of all parts."""
    return merge_column_types(call_all(parts, "column_types", None).values())
