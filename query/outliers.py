"""Training examples to look at: of largest self-influence, with labels that others contradict, and near-duplicates; all from the rows.

self-influence     the score of an example with itself (Koh and Liang, arXiv 1703.04730, section 5.4)
label contrast     among the examples nearest to one by the cosine of their rows, of either sign: the part of the cosines that oppose it.
                   Others that share its inputs and not its label have gradients that oppose its own. Cosines count them alike; by
                   influence, a few other examples with wrong labels, whose gradients are large, would lead.
near-duplicates    groups of examples whose rows have cosines above a limit with the first. Pairs are found by signs of random projections
                   of the rows (SimHash; Charikar, 2002), in bands, and checked by their cosines.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..store.errors import UsageError
from ..store.index import Index
from ..store.shapes import Float32, Float64, Int64, UInt8
from ..store.vectors import Rows, concatenate
from .baselines import row_norms
from .metric import Metric
from .results import Reporter
from .scoring import all_scores
from .select import row_cosines
from .units import Unit

_SIGNS = 1024
_FOUND = 0.99  # of the pairs whose cosine is the limit
_MOST_IN_BUCKET = 5_000  # first rows of groups with the same signs of a band
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
    """Find the outliers of an index; `Client.outliers` describes the arguments and errors."""
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
    """Find groups of rows of which each has a cosine above a limit with the first: the largest group first, rows ascending.

    A row joins the first row that it is near to, or else is the first of a group itself. Rows that share the signs of a band are
    compared, so that a pair just above the limit is found with a probability of at least `_FOUND`.
    """
    reporter.stage("comparing rows", len(rows))
    bits = _band_bits(similar)
    # Signs differ with the probability angle / pi; three standard deviations of the estimate are allowed for.
    most = np.arccos(similar) / np.pi + 3 * np.sqrt(0.25 / _SIGNS)
    packed: UInt8[np.ndarray, "rows bytes"] = np.zeros((len(rows), _SIGNS // 8), np.uint8)
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)  # of the first rows of groups
    groups: dict[int, list[int]] = {}
    for start in range(0, len(rows), _ASKED):
        part = rows[start : start + _ASKED]
        stored = stored_rows(index, part)
        signs = _projected(index, stored) > 0
        packed[start : start + len(part)] = np.packbits(signs, axis=1)
        for offset in range(len(part)):
            position = start + offset
            keys = [(band, signs[offset, band : band + bits].tobytes()) for band in range(0, _SIGNS - bits + 1, bits)]
            near = np.array(sorted({first for key in keys for first in buckets.get(key, ())}), np.int64)
            distances = np.unpackbits(packed[near] ^ packed[position], axis=1).mean(axis=1) if len(near) else np.zeros(0)
            near = near[distances <= most]
            if len(near):
                cosines = row_cosines(index, stored_rows(index, part[[offset]]), stored_rows(index, rows[near]))[0]
                near = near[cosines > similar]
            if len(near):
                groups[int(near[0])].append(position)
                continue
            groups[position] = [position]
            for key in keys:
                if len(buckets[key]) < _MOST_IN_BUCKET:
                    buckets[key].append(position)
        reporter.update(len(part), 0)
    found = [[int(rows[position]) for position in group] for group in groups.values() if len(group) > 1]
    return sorted(found, key=lambda group: (-len(group), group))


def _band_bits(similar: float) -> int:
    """Return the largest number of signs in a band with which a pair of this cosine shares a band with a probability of `_FOUND`."""
    same = 1 - np.arccos(similar) / np.pi
    return next((bits for bits in range(16, 4, -1) if 1 - (1 - same**bits) ** (_SIGNS // bits) >= _FOUND), 4)


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
