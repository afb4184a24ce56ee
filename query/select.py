"""Selection of training examples for targets, within a budget: by the sum or the maximum over targets, or so that all are covered.

    sum     the mean score over targets, times their weights
    max     the highest score for any target (Xia et al., LESS, arXiv 2402.04333, section 3.3)
    cover   facility location: the sum over targets of the highest score of a chosen example, chosen greedily (Nemhauser et al., 1978); when
            no example adds to it, a new round begins with those that are left

Scores are read block by block. Only a pool of the best rows for each target and for all of them stays in memory, and `cover` is greedy in
that pool. Where limits leave too few of it, a larger one is taken.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal, get_args

import numpy as np

from ..store.errors import UsageError
from ..store.index import Index
from ..store.shapes import Float32, Float64, Int64
from ..store.vectors import Rows, concatenate, count

Method = Literal["sum", "max", "cover"]
Blocks = Iterator[tuple[int, Float32[np.ndarray, "targets rows"]]]
_POOL = 20  # times the budget, of candidates by the mean over targets; fewer for each target
_LARGER = 16  # times as many, where limits left too few of them
_MOST_POOL = 200_000


@dataclass(frozen=True)
class Limits:
    """Conditions on what is chosen together.

    Attributes:
        column, most: at most so many examples of each value of the column; None for no limit.
        distinct: no two chosen rows have a cosine above it; None allows any.
    """

    column: str | None = None
    most: int | None = None
    distinct: float | None = None

    def __post_init__(self) -> None:
        if (self.column is None) != (self.most is None):
            raise UsageError("a limit for each value of a column needs the column and a number; give both")
        if self.most is not None and self.most < 1:
            raise UsageError(f"at most {self.most} of each value leaves nothing; it must be at least 1")
        if self.distinct is not None and not 0 < self.distinct <= 1:
            raise UsageError(f"`distinct` is {self.distinct}; it is a cosine, above 0 and at most 1")


@dataclass(frozen=True)
class Selected:
    """One chosen example.

    Attributes:
        rank: from 1, in the order of choice.
        value: what it was chosen by: its mean or highest score, or what it added to the cover.
        target: the target that it has the highest score for, by id or number.
    """

    rank: int
    row: int
    id: str
    document: str
    source: str
    value: float
    target: str
    text: str
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class Selection:
    """Chosen examples, and what the choice passed over.

    Attributes:
        by: what examples were compared by: the mode of the scores, or a baseline.
        rows: number of the rows that were compared.
        left_out: numbers of better rows that were left out, by reason: "limit", "alike". Only rows with a positive score are chosen.
        covered: share of the targets for which a chosen example is among their ten best.
    """

    examples: tuple[Selected, ...]
    method: Method
    by: str
    rows: int
    left_out: Mapping[str, int]
    covered: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, as `wherefrom select --json` prints it."""
        return {**asdict(self), "examples": [asdict(example) for example in self.examples]}


@dataclass
class _Pool:
    """Rows that may be chosen, with their scores for each target."""

    rows: Int64[np.ndarray, " pool"]
    scores: Float32[np.ndarray, "targets pool"]
    compared: int
    best: list[set[int]]

    @classmethod
    def of(cls, blocks: Blocks, weights: Float64[np.ndarray, " targets"], for_all: int, method: Method) -> "_Pool":
        """Keep the best `for_all` rows for the targets together (for `cover`, by what they add alone), and the best for each target."""
        for_each = max(10, -(-2 * for_all // max(1, len(weights))))
        rows: Int64[np.ndarray, " kept"] = np.zeros(0, np.int64)
        kept: Float32[np.ndarray, "targets kept"] = np.zeros((len(weights), 0), np.float32)
        compared = 0
        for first, block in blocks:
            is_searched = np.isfinite(block[0])
            compared += int(is_searched.sum())
            rows = np.concatenate([rows, first + np.flatnonzero(is_searched)])
            kept = np.concatenate([kept, block[:, is_searched]], axis=1)
            wanted = np.zeros(len(rows), bool)
            together = np.maximum(weights[:, None] * kept, 0).sum(axis=0) if method == "cover" else weights @ kept
            wanted[_highest(together, for_all)] = True
            for scores in kept:
                wanted[_highest(scores, for_each)] = True
            rows = rows[wanted]
            kept = kept[:, wanted]
        best = [set(rows[_highest(scores, 10)].tolist()) for scores in kept]
        return cls(rows, kept, compared, best)


def select(
    index: Index,
    blocks: Callable[[], Blocks],
    targets: Sequence[str],
    weights: Float64[np.ndarray, " targets"],
    budget: int,
    *,
    method: Method = "cover",
    by: str = "cosine",
    limits: Limits = Limits(),
) -> Selection:
    """Choose training examples for targets.

    Args:
        blocks: gives the scores of all rows for the targets, NaN for those that cannot be chosen (see `Client.score_blocks`).
        targets: their names.
        weights: of the targets.
        budget: number of examples to choose, at most.
        by: name of what the scores are.

    Raises:
        UsageError: there is nothing to choose from or for, or an option is out of range.
    """
    if method not in get_args(Method):
        raise UsageError(f"`method` is {method!r}; it can be {', '.join(get_args(Method))}")
    if budget < 1 or not len(targets):
        raise UsageError(f"the budget is {budget} for {len(targets)} targets; both must be at least 1")
    size = min(_POOL * budget, _MOST_POOL)
    while True:
        pool = _Pool.of(blocks(), weights / len(weights), size, method)
        if not len(pool.rows):
            raise UsageError("no row can be chosen; change `where`")
        allowed = _Allowed(index, pool.rows, limits)
        order = _covering if method == "cover" else _by_value
        chosen = list(islice(order(pool, weights, method, allowed), budget))
        if len(chosen) == budget or len(pool.rows) == pool.compared or size == _MOST_POOL:
            break
        size = min(_LARGER * size, _MOST_POOL)
    examples = []
    for rank, (position, value) in enumerate(chosen, 1):
        row = int(pool.rows[position])
        e = index.example(row)
        target = targets[int(np.argmax(pool.scores[:, position]))]
        examples.append(Selected(rank, row, e.id, e.document, e.source, value, target, e.text, e.metadata))
    rows = {example.row for example in examples}
    covered = float(np.mean([bool(best & rows) for best in pool.best]))
    return Selection(tuple(examples), method, by, pool.compared, dict(allowed.left_out), covered)


def _highest(values: np.ndarray, count: int) -> Int64[np.ndarray, " highest"]:
    """Return the positions of the highest values, the highest first; of equal ones, the lower position."""
    if count < len(values):
        threshold = np.partition(values, -count)[-count]
        candidates = np.flatnonzero(values >= threshold)
    else:
        candidates = np.arange(len(values))
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]


def _by_value(pool: _Pool, weights: Float64[np.ndarray, " targets"], method: Method, allowed: "_Allowed") -> Iterator[tuple[int, float]]:
    """Yield positions by their mean or highest score, as far as it is positive."""
    values = (weights / len(weights)) @ pool.scores if method == "sum" else (weights[:, None] * pool.scores).max(axis=0)
    for position in np.argsort(-values, kind="stable").tolist():
        if values[position] <= 0:
            return
        if allowed.take(position):
            yield position, float(values[position])


def _covering(pool: _Pool, weights: Float64[np.ndarray, " targets"], method: Method, allowed: "_Allowed") -> Iterator[tuple[int, float]]:
    """Yield positions by what they add to the sum over targets of the highest chosen score, in rounds."""
    scores = np.maximum(weights[:, None] * pool.scores, 0)
    left = np.ones(scores.shape[1], bool)
    while True:
        best = np.zeros(len(scores))
        added = False
        while left.any():
            gains = np.maximum(scores - best[:, None], 0).sum(axis=0)
            gains[~left] = -1
            position = int(np.argmax(gains))
            if gains[position] <= 0:
                break
            left[position] = False
            if allowed.take(position):
                best = np.maximum(best, scores[:, position])
                added = True
                yield position, float(gains[position])
        if not added:
            return


class _Allowed:
    """Check of the limits, for one example after the other."""

    def __init__(self, index: Index, rows: Int64[np.ndarray, " pool"], limits: Limits) -> None:
        self._index = index
        self._rows = rows
        self._limits = limits
        self._counts: Counter[Any] = Counter()
        self._chosen: list[int] = []
        self.left_out: Counter[str] = Counter()
        self._codes: np.ndarray | None = None
        if limits.column is not None:
            codes, _ = index.distinct(limits.column, 1 << 20)
            self._codes = codes[rows]
        self._similar: Callable[[int], bool] | None = None if limits.distinct is None else _alike(index, limits.distinct)

    def take(self, position: int) -> bool:
        """Return True, and count the example as chosen, if the limits allow it."""
        code = None if self._codes is None else int(self._codes[position])
        if code is not None and self._limits.most is not None and self._counts[code] >= self._limits.most:
            self.left_out["limit"] += 1
            return False
        if self._similar is not None and self._similar(int(self._rows[position])):
            self.left_out["alike"] += 1
            return False
        self._counts[code] += 1
        return True


def _alike(index: Index, most: float) -> Callable[[int], bool]:
    """Return a function that says whether a row's cosine with one for which it returned False before is above a limit."""
    chosen: list[Rows] = []

    def is_alike(row: int) -> bool:
        rows = {component.name: index.vectors(row, component).as_float32() for component in index.manifest.components}
        if chosen and float(row_cosines(index, rows, concatenate(chosen)).max()) > most:
            return True
        chosen.append(rows)
        return False

    return is_alike


def row_cosines(index: Index, one: Rows, others: Rows) -> Float64[np.ndarray, "rows others"]:
    """Compute the cosines of rows in memory, over all components with their weights."""
    products: Float64[np.ndarray, "rows others"] = np.zeros((count(one), count(others)))
    for component in index.manifest.components:
        vectors: Any = one[component.name]
        products += component.weight * vectors.inner_products(others[component.name]).astype(np.float64)
    squares = [sum(c.weight * rows[c.name].squared_norms for c in index.manifest.components) for rows in (one, others)]
    lengths = np.sqrt(np.multiply.outer(*squares))
    return np.divide(products, lengths, out=np.zeros(products.shape), where=lengths > 0)
