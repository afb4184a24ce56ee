"""Training examples to look at: of largest self-influence, with labels that others contradict, and near-duplicates; all from the rows.

self-influence     the score of an example with itself (Koh and Liang, arXiv 1703.04730, section 5.4)
label contrast     among the examples nearest to one by the cosine of their rows, of either sign: the part of the cosines that oppose it.
                   Others that share its inputs and not its label have gradients that oppose its own. Cosines count them alike; by
                   influence, a few other examples with wrong labels, whose gradients are large, would lead.
near-duplicates    groups of examples whose rows have cosines above a limit. Pairs are found by signs of random projections of the rows
                   (SimHash; Charikar, 2002), in bands, and checked by their cosines.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..store.errors import UsageError
from ..store.index import Index
from ..store.shapes import Bool, Float32, Float64, Int64
from ..store.vectors import Rows, concatenate
from .baselines import row_norms
from .metric import Metric
from .results import Reporter
from .scoring import all_scores
from .select import row_cosines
from .units import Unit

_SIGNS = 256
_BAND = 16
_MOST_IN_BAND = 200  # rows with the same signs of a band; more of them are compared with the first alone
_ASKED = 64  # rows in one pass
_NEAREST = 20  # examples whose cosines count in a label contrast
_MOST_ASKED = 20_000
_TEXT = 400


@dataclass(frozen=True)
class Outlier:
    """A training example to look at.

    Attributes:
        value: its self-influence in the index's unit, or its label contrast from 0 to 1.
        percentile: percentage of the examples with a lower value.
    """

    row: int
    id: str
    document: str
    source: str
    value: float
    percentile: float
    text: str
    label: int | None
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class Outliers:
    """Report of an index's outliers.

    Attributes:
        unit: of self-influence.
        self_influence: the largest, first.
        label_contrast: the largest; None where examples have no labels.
        duplicates: groups of ids of near-duplicates, the largest group first; the first id of a group is the one to keep.
        similar: the cosine above which rows are near-duplicates.
        asked: number of examples whose label contrast was computed.
    """

    unit: str | None
    rows: int
    self_influence: tuple[Outlier, ...]
    label_contrast: tuple[Outlier, ...] | None
    duplicates: tuple[tuple[str, ...], ...]
    similar: float
    asked: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, as `wherefrom outliers --json` prints it."""
        return asdict(self)


def find_outliers(index: Index, reporter: Reporter, *, k: int = 20, similar: float = 0.95, where: str | None = None) -> Outliers:
    """Find the outliers of an index.

    Args:
        k: examples of each kind.
        similar: cosine above which rows are near-duplicates.
        where: a filter of the rows.

    Raises:
        UsageError: an option is out of range, or no row matches.
    """
    if not 0 < similar <= 1:
        raise UsageError(f"`similar` is {similar}; it is a cosine, above 0 and at most 1")
    mask = index.alive if where is None else index.alive & index.matching(where)
    rows = np.flatnonzero(mask)
    if not len(rows):
        raise UsageError("no row matches; change `where`")
    unit = Unit.of(index, Metric())
    has_lengths = not any("unit-length" in component.features for component in index.manifest.components)
    strongest: tuple[Outlier, ...] = ()
    if has_lengths:
        strongest = _largest(index, rows, row_norms(index)[rows] ** 2 * unit.factor, k)
    labels = "labels" in index.manifest.features or "vectors" in index.manifest.features or "images" in index.manifest.features
    contrast = None
    asked = rows[:_MOST_ASKED] if labels else rows[:0]
    if labels:
        reporter.stage("comparing labels", len(asked))
        contrast = _largest(index, asked, label_contrast(index, asked, reporter), k)
    duplicates = near_duplicates(index, rows, similar, reporter)
    ids = tuple(tuple(index.example(row).id for row in group) for group in duplicates)
    return Outliers(unit.name, len(rows), strongest, contrast, ids, similar, len(asked))


def _largest(index: Index, rows: Int64[np.ndarray, " rows"], values: Float64[np.ndarray, " rows"], k: int) -> tuple[Outlier, ...]:
    order = np.argsort(-values, kind="stable")[:k]
    ascending = np.sort(values)
    outliers = []
    for position in order.tolist():
        e = index.example(int(rows[position]))
        below = 100 * float(np.searchsorted(ascending, values[position])) / len(values)
        fields = (e.id, e.document, e.source, float(values[position]), below, e.text[:_TEXT], e.label, e.metadata)
        outliers.append(Outlier(int(rows[position]), *fields))
    return tuple(outliers)


def label_contrast(index: Index, rows: Int64[np.ndarray, " rows"], reporter: Reporter) -> Float64[np.ndarray, " rows"]:
    """Compute the label contrast of some rows: the negative part of the largest cosines with other rows, from 0 to 1."""
    contrast = np.zeros(len(rows))
    for first in range(0, len(rows), _ASKED):
        part = rows[first : first + _ASKED]
        nearest: Float32[np.ndarray, "asked kept"] = np.zeros((len(part), 0), np.float32)
        for start, scores in all_scores(index, stored_rows(index, part), Metric("cosine")):
            own = np.flatnonzero((part >= start) & (part < start + scores.shape[1]))
            scores[own, part[own] - start] = 0.0
            scores[:, ~index.alive_between(start, start + scores.shape[1])] = 0.0
            together = np.concatenate([nearest, scores], axis=1)
            size = min(_NEAREST, together.shape[1])
            order = np.argpartition(-np.abs(together), size - 1, axis=1)[:, :size]
            nearest = np.take_along_axis(together, order, axis=1)
        against = -np.minimum(nearest, 0).sum(axis=1, dtype=np.float64)
        total = np.abs(nearest).sum(axis=1, dtype=np.float64)
        contrast[first : first + len(part)] = np.divide(against, total, out=np.zeros(len(part)), where=total > 0)
        reporter.update(len(part), 0)
    return contrast


def stored_rows(index: Index, rows: Int64[np.ndarray, " rows"]) -> Rows:
    """Return rows as far as the stored codes give them, by component."""
    return concatenate([{c.name: index.vectors(int(row), c).as_float32() for c in index.manifest.components} for row in rows])


def near_duplicates(index: Index, rows: Int64[np.ndarray, " rows"], similar: float, reporter: Reporter) -> list[list[int]]:
    """Find groups of rows whose cosines are above a limit: connected by pairs, the largest group first, rows ascending."""
    reporter.stage("comparing rows", len(rows))
    signs: Bool[np.ndarray, "rows signs"] = np.zeros((len(rows), _SIGNS), bool)
    for first in range(0, len(rows), _ASKED):
        part = rows[first : first + _ASKED]
        signs[first : first + len(part)] = _projected(index, stored_rows(index, part)) > 0
        reporter.update(len(part), 0)
    parents = list(range(len(rows)))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    checked: set[tuple[int, int]] = set()
    for band in range(0, _SIGNS, _BAND):
        keys = np.packbits(signs[:, band : band + _BAND], axis=1)
        by_key: dict[bytes, list[int]] = defaultdict(list)
        for position, key in enumerate(keys):
            by_key[key.tobytes()].append(position)
        for one, others in _pairs(by_key.values()):
            candidates = [other for other in others if (one, other) not in checked and root(one) != root(other)]
            distance = (signs[candidates] != signs[one]).mean(axis=1)
            # Signs differ with the probability angle / pi; three standard deviations of the estimate are allowed for.
            limit = np.arccos(similar) / np.pi
            near = [c for c, d in zip(candidates, distance, strict=True) if d <= limit + 3 * np.sqrt(0.25 / _SIGNS)]
            checked.update((one, other) for other in candidates)
            if near:
                values = row_cosines(index, stored_rows(index, rows[[one]]), stored_rows(index, rows[near]))[0]
                for other, value in zip(near, values, strict=True):
                    if value > similar:
                        low, high = sorted((root(one), root(other)))
                        parents[high] = low
    groups: dict[int, list[int]] = defaultdict(list)
    for position in range(len(rows)):
        groups[root(position)].append(int(rows[position]))
    return sorted((group for group in groups.values() if len(group) > 1), key=lambda group: (-len(group), group))


def _pairs(buckets: Iterator[list[int]] | Any) -> Iterator[tuple[int, list[int]]]:
    """Yield each position of a bucket with those after it; in a large bucket, the first with all others alone."""
    for bucket in buckets:
        if len(bucket) > _MOST_IN_BAND:
            yield bucket[0], bucket[1:]
            continue
        for number, position in enumerate(bucket[:-1]):
            yield position, bucket[number + 1 :]


def _projected(index: Index, rows: Rows) -> Float64[np.ndarray, "rows signs"]:
    """Project rows to `_SIGNS` random directions, the same for all rows."""
    components = index.manifest.components
    projected = [np.sqrt(c.weight) * rows[c.name].projected(c.seed, _SIGNS) for c in components]
    return np.stack(projected).sum(axis=0)


def reasons(outliers: Outliers) -> dict[str, str]:
    """Return ids to look at, each with the first reason; of near-duplicates, all but the first of a group."""
    found: dict[str, str] = {}
    for outlier in outliers.label_contrast or ():
        found[outlier.id] = f"label contrast {outlier.value:.3g}"
    for group in outliers.duplicates:
        for id in group[1:]:
            found.setdefault(id, f"near-duplicate of {group[0]}")
    return found
