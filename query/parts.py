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
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from ..store.compiled import Compiled
from ..store.index import ColumnType, Index, ShardGroup, merge_column_types
from ..store.shapes import Bool, Float32, Float64, Int64
from ..store.vectors import Rows
from .groups import MOST_VALUES, Sums, SumTree
from .metric import Metric
from .mixing import Mixing
from .options import Mode
from .scoring import Scorer, by_group

_CACHED_SEARCHES = 4  # prepared searches, and masks
_MOST_INSERTED = 128  # best rows that the compiled loop keeps in order
_MOST_ADDED = 1 << 16  # candidates that are kept before the best of them are chosen
_best_of = Compiled("best_of", least_work=1 << 24)
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
        signed: of each group of shards and query, sums of the scores above 0 and of those below, and how many are not 0.
        best_otherwise: for each query, the best rows in other modes, by mode.
        sums: by group, if a column was named.
        mask, scores: the mask of the searched rows, and their scores, if these were asked for.
    """

    best: list[Ranked]
    worst: list[Ranked]
    searched: int
    signed: Float64[np.ndarray, "groups queries 3"]
    best_otherwise: dict[Mode, list[Ranked]]
    sums: SumTree | None
    mask: Bool[np.ndarray, " rows"] | None
    scores: Float32[np.ndarray, "queries searched"] | None


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

    def select(self, positions: np.ndarray) -> "Candidates":
        """Select candidates by position or mask."""
        return Candidates(self.rows[positions], self.bounds[positions], self.exact[positions], self.scale[positions])

    def split(self, count: int) -> tuple["Candidates", "Candidates"]:
        """Split into the candidates with the `count` highest bounds, and the others."""
        is_high = np.ones(len(self), bool)
        if len(self) > count:
            is_high[np.argpartition(-self.bounds, count - 1)[count:]] = False
        return self.select(is_high), self.select(~is_high)

    @classmethod
    def concatenate(cls, parts: Sequence["Candidates"]) -> "Candidates":
        """Concatenate candidates of several groups of shards."""
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))


NO_CANDIDATES = Candidates(*(np.zeros(0, dtype) for dtype in (np.int64, np.float32, np.float32, np.float32)))
Pair = tuple[Candidates, Candidates]
"""Candidates for the best and for the worst rows."""


class Best:
    """The best (sign 1) or worst (sign -1) k rows of a query among those that were added, in any order.

    Args:
        ranked: rows to begin with.
    """

    def __init__(self, k: int, sign: int, ranked: Ranked = NOTHING) -> None:
        self._k = k
        self._sign = sign
        self._threshold = np.float32(0)  # sign * score of k rows that were added; a row below it is not among the best
        self._rows: list[Int64[np.ndarray, " _added"]] = []
        self._scores: list[Float32[np.ndarray, " _added"]] = []
        self._count = 0
        self.add(*ranked)

    @property
    def threshold(self) -> float:
        """Value of sign * score that a row must reach to be among the k rows; 0 if there are fewer."""
        rows, scores = self.ranked()
        return float(self._sign * scores[-1]) if len(rows) == self._k else 0.0

    def candidates(self, first: int, offsets: np.ndarray | None, scores: Float32[np.ndarray, " searched"]) -> Ranked:
        """Return the rows of a group of shards that may be among the best, with their scores: the group's best k, or these and others.

        Args:
            first: the group's first row.
            offsets: of the searched rows in the group; None for all.
        """
        threshold = np.nextafter(self._threshold, np.float32(0))  # of equal scores, a lower row counts
        best_of = _best_of.if_worth(len(scores)) if self._k <= _MOST_INSERTED else None
        if best_of is not None:
            positions = np.empty(self._k, np.int64)
            positions = positions[: best_of(scores, np.float32(self._sign), threshold, positions, np.empty(self._k, np.float32))]
        else:
            positions = np.flatnonzero(scores > threshold if self._sign > 0 else scores < -threshold)
            if len(positions) > 4 * self._k:  # sort only the k best and those equal to the k-th
                costs = -self._sign * scores[positions]
                positions = positions[costs <= np.partition(costs, self._k - 1)[self._k - 1]]
        return first + (positions if offsets is None else offsets[positions]), scores[positions]

    def add(self, rows: Int64[np.ndarray, " added"], scores: Float32[np.ndarray, " added"]) -> None:
        """Add rows; those without a positive sign * score are left out."""
        positive = self._sign * scores > 0
        if not positive.all():
            rows = rows[positive]
            scores = scores[positive]
        if not len(rows):
            return
        self._rows.append(rows)
        self._scores.append(scores)
        self._count += len(rows)
        if len(rows) == self._k:
            self._threshold = max(self._threshold, np.float32((self._sign * scores).min()))
        if self._count > max(4 * self._k, _MOST_ADDED):
            self.ranked()

    def ranked(self) -> Ranked:
        """Return the best rows of all that were added."""
        if not self._rows:
            return NOTHING
        rows = np.concatenate(self._rows)
        scores = np.concatenate(self._scores)
        order = np.lexsort((rows, -self._sign * scores))[: self._k]
        rows = rows[order]
        scores = scores[order]
        self._rows = [rows]
        self._scores = [scores]
        self._count = len(rows)
        if len(rows) == self._k:
            self._threshold = np.float32(self._sign * scores[-1])
        return rows, scores


@dataclass(frozen=True)
class Mask:
    """The searched rows of a group of shards.

    Attributes:
        rows: a mask.
        count: number of the searched rows.
    """

    rows: Bool[np.ndarray, " rows"]
    count: int

    @property
    def is_complete(self) -> bool:
        """True if all rows are searched."""
        return self.count == len(self.rows)


class _GroupScan(NamedTuple):
    """The result of an exact scan of one group of shards.

    Attributes:
        candidates: for each query and side.
        signed: see `Scan`.
    """

    candidates: list[list[Ranked]]
    signed: Float64[np.ndarray, "queries 3"]
    sums: Sums | None
    scores: Float32[np.ndarray, "queries searched"] | None


def _signed_sums(scores: Float32[np.ndarray, "queries searched"]) -> Float64[np.ndarray, "queries 3"]:
    """Return the sums of the scores above 0 and of those below, and how many are not 0."""
    total = scores.sum(axis=1, dtype=np.float64)
    sizes = np.array([np.abs(row).sum(dtype=np.float64) for row in scores])
    return np.stack([(sizes + total) / 2, (total - sizes) / 2, np.count_nonzero(scores, axis=1)], axis=1)


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
        self._threads = threads or index.threads
        self._lock = threading.Lock()
        self._scorers: OrderedDict[str, Scorer] = OrderedDict()
        self._masks: OrderedDict[str, list[Mask]] = OrderedDict()

    def column_types(self) -> dict[str, ColumnType]:
        """Return the columns of its shards."""
        return self.index.column_types(self.groups)

    def refusal(self, search: Search) -> str | None:
        """Return the reason why a quantized scan is not possible or not useful; None if it is both."""
        return self.scorer(search).refusal(self.groups)

    def searched(self, search: Search) -> Bool[np.ndarray, " rows"]:
        """Return a mask of the rows that are searched."""
        return np.concatenate([mask.rows for mask in self._mask(search)])

    def count(self, search: Search) -> int:
        """Return the number of the rows that are searched."""
        return sum(mask.count for mask in self._mask(search))

    def scan(self, search: Search, k: int, column: str | None = None, with_scores: bool = False, others: Sequence[Mode] = ()) -> Scan:
        """Score all searched rows.

        Args:
            column: also sum the scores by the values of this column.
            with_scores: also return all scores.
            others: modes in which to find the best rows, too.
        """
        scorer = self.scorer(search)
        masks = self._mask_by_group(search)
        numbers = {group.first: number for number, group in zip(self._numbers, self.groups, strict=True)}
        ranked = [(Best(k, 1), Best(k, -1), *(Best(k, 1) for _ in others)) for _ in range(len(scorer))]
        sums = None if column is None else SumTree(column)
        blocks = []
        signed = []

        def score(group: ShardGroup) -> _GroupScan:
            mask = masks[group.first]
            scores_by_mode = scorer.scores_by_mode(group, (scorer.mode, *others))
            scores = scores_by_mode[scorer.mode]
            group_sums = None
            if column is not None:
                codes, values = self.index.distinct(column, MOST_VALUES, [group], search.types)
                group_sums = Sums.of(codes, values, scores, mask.rows, group.first)
            if not mask.is_complete:
                scores_by_mode = {mode: block[:, mask.rows] for mode, block in scores_by_mode.items()}
            offsets = None if mask.is_complete else np.flatnonzero(mask.rows)
            blocks_of_sides = [scores_by_mode[mode] for mode in (scorer.mode, scorer.mode, *others)]
            candidates = [
                [side.candidates(group.first, offsets, block[q]) for side, block in zip(sides, blocks_of_sides, strict=True)]
                for q, sides in enumerate(ranked)
            ]
            scores = scores_by_mode[scorer.mode]
            return _GroupScan(candidates, _signed_sums(scores), group_sums, scores if with_scores else None)

        for group, scan in by_group(self.groups, score, self._threads, small=not with_scores):
            for sides, query_candidates in zip(ranked, scan.candidates, strict=True):
                for side, candidates in zip(sides, query_candidates, strict=True):
                    side.add(*candidates)
            signed.append(scan.signed)
            if sums is not None and scan.sums is not None:
                sums.add(0, numbers[group.first], scan.sums)
            if scan.scores is not None:
                blocks.append(scan.scores)
        sides_of_queries = [[side.ranked() for side in sides] for sides in ranked]
        best, worst, *best_otherwise = ([sides[side] for sides in sides_of_queries] for side in range(2 + len(others)))
        return Scan(
            best,
            worst,
            self.count(search),
            np.stack(signed),
            dict(zip(others, best_otherwise, strict=True)),
            sums,
            self.searched(search) if with_scores else None,
            np.concatenate(blocks, axis=1) if with_scores else None,
        )

    def scores(self, search: Search, skipped: int = 0) -> Iterator[Float32[np.ndarray, "queries rows"]]:
        """Yield the scores of each group of shards, in row order; NaN for rows that are not searched.

        Args:
            skipped: number of groups to leave out at the beginning.
        """
        scorer = self.scorer(search)
        masks = self._mask(search)[skipped:]
        for mask, (_, scores) in zip(masks, by_group(self.groups[skipped:], scorer.scores, self._threads), strict=True):
            yield scores if mask.is_complete else np.where(mask.rows, scores, np.float32(np.nan))

    def extremes(self, search: Search) -> tuple[float, float, int]:
        """Return the lowest and highest score of the searched rows, over all queries, and the number of these rows."""
        low = np.inf
        high = -np.inf
        count = 0
        for block in self.scores(search):
            scores = block[np.isfinite(block)]
            if len(scores):
                low = min(low, float(scores.min()))
                high = max(high, float(scores.max()))
                count += len(scores)
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
        scorer = self.scorer(search)
        pairs = self._pairs(scorer, self.groups[0], self._mask(search)[0], z, [(0.0, 0.0)] * len(scorer))
        results = []
        for q, pair in enumerate(pairs):
            sides = Best(k, 1), Best(k, -1)
            splits = [candidates.split(size) for candidates in pair]
            read = [high for high, _ in splits]
            rows = np.concatenate([high.rows for high in read])
            products = np.split(scorer.read(q, rows), [len(read[0])])
            for side, high, dense in zip(sides, read, products, strict=True):
                side.add(high.rows, (high.exact + dense) * high.scale)
            best, worst = (low.select(low.bounds >= side.threshold) for side, (_, low) in zip(sides, splits, strict=True))
            results.append(((sides[0].ranked(), sides[1].ranked()), (best, worst), rows))
        return results

    def candidates(self, search: Search, z: float, thresholds: Sequence[tuple[float, float]], most: int, skipped: int) -> list[Pair]:
        """Find the candidates in its groups: at most `most` for each query and side.

        Args:
            thresholds: for each query, of the best and of the worst rows.
            skipped: number of groups to leave out at the beginning.
        """
        scorer = self.scorer(search)
        masks = self._mask_by_group(search)
        by_query: list[tuple[list[Candidates], list[Candidates]]] = [([NO_CANDIDATES], [NO_CANDIDATES]) for _ in thresholds]
        groups = self.groups[skipped:]
        for _, pairs in by_group(groups, lambda group: self._pairs(scorer, group, masks[group.first], z, thresholds), self._threads):
            for lists, pair in zip(by_query, pairs, strict=True):
                for its_list, candidates in zip(lists, pair, strict=True):
                    its_list.append(candidates)
        highest = [tuple(Candidates.concatenate(its_list).split(most)[0] for its_list in lists) for lists in by_query]
        return [(best, worst) for best, worst in highest]

    def read(self, search: Search, rows: Sequence[Int64[np.ndarray, " _rows"]]) -> list[Float32[np.ndarray, " _rows"]]:
        """Return, for each query, the sums over dense components of some rows, from the rows themselves."""
        scorer = self.scorer(search)
        return [scorer.read(q, query_rows) for q, query_rows in enumerate(rows)]

    def _pairs(self, scorer: Scorer, group: ShardGroup, mask: Mask, z: float, thresholds: Sequence[tuple[float, float]]) -> list[Pair]:
        """Find the candidates of a group of shards, for each query and side."""
        estimates = scorer.estimates(group)
        excluded = np.flatnonzero(~mask.rows)
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

    def scorer(self, search: Search) -> Scorer:
        """Return the prepared queries of a search."""

        def prepare() -> Scorer:
            return Scorer.of(self.index, search.queries, search.metric, search.mixings)

        return self._cached(self._scorers, search.id, prepare)

    def _mask(self, search: Search) -> list[Mask]:
        """Return the masks of the searched rows of each group."""

        def compute() -> list[Mask]:
            mask = self.index.alive_rows(self.groups)
            if search.where is not None:
                mask &= self.index.matching(search.where, self.groups, search.types)
            by_group = np.split(mask, np.cumsum([group.rows for group in self.groups])[:-1])
            return [Mask(rows, int(rows.sum())) for rows in by_group]

        return self._cached(self._masks, search.where or "", compute)

    def _mask_by_group(self, search: Search) -> dict[int, Mask]:
        """Return the masks of the searched rows, by the first row of the group."""
        return {group.first: mask for group, mask in zip(self.groups, self._mask(search), strict=True)}

    def _cached(self, cache: "OrderedDict[str, Any]", key: str, compute: Callable[[], Any]) -> Any:
        """Return a cached value, or compute it."""
        with self._lock:
            if key in cache:
                cache.move_to_end(key)
                return cache[key]
        value = compute()
        with self._lock:
            cache[key] = value
            while len(cache) > _CACHED_SEARCHES:
                cache.popitem(last=False)
        return value


@runtime_checkable
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

    def scorer(self, search: Search) -> Scorer:
        """Return the prepared queries of a search.

        Raises:
            UsageError: the search is not possible with the index.
        """

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
        return {number: getattr(self._part, method)(*shared, *part_arguments) for number, part_arguments in arguments.items()}

    def stream(self, search: Search) -> Iterator[Float32[np.ndarray, "queries rows"]]:
        """See `Parts`."""
        return self._part.scores(search)

    def scorer(self, search: Search) -> Scorer:
        """See `Parts`."""
        return self._part.scorer(search)

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
