"""Exact search: one blocked pass over all rows, best and worst scores together, for any number of queries.

    influence   <z_q, z_i>
    cosine      <z_q, z_i> / (|z_q| |z_i|)

Another damping a' than the build's a is exact and changes only the query: coordinates are whitened with (l + a)^(-1/2), so

    g_q^T (H + a' I)^(-1) g_i = sum_j  z_qj (l_j + a_j) / (l_j + a'_j) z_ij

and under cosine the norms are taken in the same metric, in the same pass. Without curvature the factor is (l_j + a_j). A scan is bound
by memory bandwidth; for float32 rows it multiplies straight from the memory map.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32, Float64, Int64

from ..store.errors import UsageError
from ..store.index import Index
from ..store.manifest import Segment, Shard, check_damping

Mode = Literal["influence", "cosine"]
_QUERIES_A_PASS = 256


@dataclass(frozen=True)
class Metric:
    """How rows are compared.

    Attributes:
        mode: "influence" or "cosine".
        damping: relative to each layer's mean eigenvalue; None keeps the build's.
        curvature: False undoes the whitening: plain products of projected gradients, and their cosine.
    """

    mode: Mode = "influence"
    damping: float | None = None
    curvature: bool = True

    def __post_init__(self) -> None:
        if self.mode not in ("influence", "cosine"):
            raise UsageError(f"the mode is {self.mode!r}; it can be influence or cosine")
        if self.damping is not None:
            check_damping(self.damping)
            if not self.curvature:
                raise UsageError("a damping means nothing without curvature; give one or the other")


@dataclass(frozen=True)
class Hits:
    """One query's best and worst rows.

    Attributes:
        proponents, proponent_scores: rows of positive score, highest first (ties: lower row first).
        opponents, opponent_scores: rows of negative score, lowest first.
        seconds: wall time of the pass that answered it.
    """

    proponents: Int64[np.ndarray, " p"]
    proponent_scores: Float32[np.ndarray, " p"]
    opponents: Int64[np.ndarray, " o"]
    opponent_scores: Float32[np.ndarray, " o"]
    seconds: float


QueryRows = Mapping[str, Float32[np.ndarray, "queries dim"]]


def search(index: Index, queries: QueryRows, k: int, metric: Metric = Metric()) -> list[Hits]:
    """The k rows of highest and of lowest score for each query, by an exact scan.

    Args:
        queries: segment name -> whitened query rows.
        k: from 1 to the number of rows.

    Raises:
        UsageError: k is out of range, or a damping is asked of an index without curvature.
    """
    if not 1 <= k <= len(index):
        raise UsageError(f"k is {k}; it must be between 1 and the index's {len(index)} rows")
    count = len(next(iter(queries.values())))
    hits: list[Hits] = []
    for first in range(0, count, _QUERIES_A_PASS):
        part = {name: rows[first : first + _QUERIES_A_PASS] for name, rows in queries.items()}
        started = time.perf_counter()
        found = _scan(index, part, k, metric)
        seconds = time.perf_counter() - started
        hits.extend(Hits(best[0], best[1], worst[0], worst[1], seconds) for best, worst in found)
    return hits


def all_scores(index: Index, queries: QueryRows, metric: Metric = Metric()) -> Iterator[tuple[int, Float32[np.ndarray, "queries rows"]]]:
    """Every score, as (first row, scores of a shard's rows), in row order."""
    prepared = [_Prepared.make(index, segment, queries[segment.name], metric) for segment in index.manifest.segments]
    query_norms = np.sqrt(sum((p.weight * p.squared_norms for p in prepared), np.zeros(len(prepared[0].queries))))
    for shard in index.manifest.shards:
        yield shard.first, _shard_scores(index, shard, prepared, query_norms, metric.mode)


@dataclass(frozen=True)
class _Prepared:
    """A segment's queries with the change of damping in them."""

    segment: Segment
    weight: float
    queries: Float32[np.ndarray, "queries dim"]
    squared_norms: Float64[np.ndarray, " queries"]
    change: Float32[np.ndarray, " dim"] | None

    @classmethod
    def make(cls, index: Index, segment: Segment, rows: Float32[np.ndarray, "queries dim"], metric: Metric) -> "_Prepared":
        change = None
        scaled = rows.astype(np.float64)
        if metric.damping is not None:
            eigenvalues, means = index.spectrum(segment)
            built = eigenvalues + segment.curvature.damping * means
            wanted = eigenvalues + metric.damping * means
            change = np.divide(built, wanted, out=np.zeros_like(built), where=wanted > 0)
        elif not metric.curvature and any(layer.curvature != "identity" for layer in segment.layers):
            eigenvalues, means = index.spectrum(segment)
            change = eigenvalues + segment.curvature.damping * means
        if change is not None:
            scaled = scaled * change
        squared = np.einsum("qd,qd->q", scaled, rows, dtype=np.float64)
        return cls(segment, segment.weight, scaled.astype(np.float32), squared, None if change is None else change.astype(np.float32))


def _shard_scores(
    index: Index, shard: Shard, prepared: Sequence[_Prepared], query_norms: Float64[np.ndarray, " queries"], mode: Mode
) -> Float32[np.ndarray, "queries rows"]:
    scores = np.zeros((len(query_norms), shard.rows), np.float32)
    squared = np.zeros(shard.rows)
    for p in prepared:
        rows = index.dense(shard, p.segment)
        lengths = rows.norms * rows.factors() * np.float32(p.weight)
        for first, codes in rows.blocks():
            values = codes if codes.dtype == np.float32 else codes.astype(np.float32)
            part = slice(first, first + len(codes))
            scores[:, part] += (p.queries @ values.T) * lengths[part]
            if mode == "cosine":
                # Codes are unit directions, up to rounding; under another damping their length is measured anew.
                change = p.change if p.change is not None else np.float32(1)
                squared[part] += ((values * values * change).sum(axis=1) * rows.factors()[part] ** 2) * rows.norms[part] ** 2 * p.weight
    if mode == "cosine":
        norms = query_norms[:, None] * np.sqrt(squared)[None]
        scores = np.divide(scores, norms, out=np.zeros(scores.shape), where=norms > 0).astype(np.float32)
    return scores


def _scan(index: Index, queries: QueryRows, k: int, metric: Metric) -> list[tuple[tuple, tuple]]:
    count = len(next(iter(queries.values())))
    empty = (np.zeros(0, np.int64), np.zeros(0, np.float32))
    best, worst = [empty] * count, [empty] * count
    for first, scores in all_scores(index, queries, metric):
        rows = np.arange(first, first + scores.shape[1])
        for q in range(count):
            best[q] = _merge(best[q], rows, scores[q], k, 1)
            worst[q] = _merge(worst[q], rows, scores[q], k, -1)
    return list(zip(best, worst, strict=True))


def _merge(known: tuple[np.ndarray, np.ndarray], rows: np.ndarray, scores: np.ndarray, k: int, sign: int) -> tuple[np.ndarray, np.ndarray]:
    """The k entries of largest positive sign * score among the known and the new; equal scores in row order."""
    signed = sign * scores
    threshold = sign * known[1][-1] if len(known[0]) == k else 0.0
    chosen = signed > threshold
    if not chosen.any():
        return known
    rows = np.concatenate([known[0], rows[chosen]])
    scores = np.concatenate([known[1], scores[chosen]])
    order = np.lexsort((rows, -sign * scores))[:k]
    return rows[order], scores[order]
