"""Rerank: the best and worst rows by stored rows are computed again with the model, without codes, and ranked by the new scores.

Stored rows are estimates: one-bit codes, selected coordinates, a bounded number of tokens. The first stage finds candidates by them, with
its own certificate; candidates of baselines (BM25, hidden states) join where an answer has these. Rows that are not candidates keep an
unknown exact score. Their best stored score, and how far stored and recomputed scores differ for the candidates nearest to them, say how
much could be missed.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ..store.shapes import Bool, Float, Float32, Float64, Int64
from .answers import RefineReport, RerankReport
from .parts import NOTHING
from .search import Hits


class Recomputation(NamedTuple):
    """The computation of candidates' scores.

    Attributes:
        candidates: number of them, of the best and of the worst rows.
        scores: function from rows and the numbers of consecutive queries to the scores of these rows for these queries.
        unprojected_layers: number of layers whose gradients are not projected; 0 for rows as those of the index.
        query_bits: function from a number of queries to the bits of a coordinate of their vectors.
        refinement: function that returns how the queries of the last computation were refined; None where they were not.
    """

    candidates: int
    scores: Callable[[Int64[np.ndarray, " rows"], range], Float64[np.ndarray, "queries rows"]]
    unprojected_layers: int
    query_bits: Callable[[int], int]
    refinement: Callable[[], RefineReport | None]


class Place(NamedTuple):
    """A row's rank (from 1, among proponents or opponents) and score by stored rows; None where it was not found by these."""

    rank: int | None
    score: float | None


class Sizes(NamedTuple):
    """Numbers of rows of an answer and its candidates.

    Attributes:
        answer: proponents, and opponents, at most.
        candidates: of either by stored rows, at most.
        with_opponents: whether opponents are asked for.
    """

    answer: int
    candidates: int
    with_opponents: bool


@dataclass(frozen=True)
class Reranked:
    """A query's candidates, ranked by recomputed scores.

    Attributes:
        hits: the best and worst k.
        stored: the places of the candidates that were found by stored rows.
        report: for the answer.
    """

    hits: Hits
    stored: Mapping[int, Place]
    report: RerankReport


def baseline_candidates(
    baselines: Mapping[str, Float[np.ndarray, "rows queries"]], searched: Bool[np.ndarray, " rows"] | None, query: int, count: int
) -> Int64[np.ndarray, " candidates"]:
    """Return the searched rows that are among the best of a baseline for a query; the norm, which is the same for all, is none."""
    rows = NOTHING[0] if searched is None else np.flatnonzero(searched)
    best = [rows[np.argsort(-scores[rows, query], kind="stable")[:count]] for name, scores in baselines.items() if name != "norm"]
    return np.unique(np.concatenate([np.zeros(0, np.int64), *best]))


def rerank(
    numbers: range,
    stored_hits: Sequence[Hits],
    further_candidates: Sequence[Int64[np.ndarray, " _others"]],
    sizes: Sizes,
    recomputation: Recomputation,
) -> list[Reranked]:
    """Rank the candidates of several queries by recomputed scores.

    Args:
        numbers: of the queries.
        stored_hits: the best and worst rows of each query by stored rows; the worst are left out where none are asked for.
        further_candidates: of each query, such as those of baselines.
    """
    started = time.perf_counter()
    candidates = [np.unique(np.concatenate([h.proponents, h.opponents, o])) for h, o in zip(stored_hits, further_candidates, strict=True)]
    rows = np.unique(np.concatenate([np.zeros(0, np.int64), *candidates]))
    scores = recomputation.scores(rows, numbers)
    seconds = time.perf_counter() - started
    results = []
    for number, (hits, candidate_rows) in enumerate(zip(stored_hits, candidates, strict=True)):
        candidate_scores = scores[number, np.searchsorted(rows, candidate_rows)]
        stored = _places(hits.proponents, hits.proponent_scores) | _places(hits.opponents, hits.opponent_scores)
        differences = np.concatenate(
            [
                candidate_scores[np.searchsorted(candidate_rows, rows_of_side[len(rows_of_side) // 2 :])]
                - stored_scores[len(rows_of_side) // 2 :]
                for rows_of_side, stored_scores in ((hits.proponents, hits.proponent_scores), (hits.opponents, hits.opponent_scores))
            ]
        )
        best = _ranked(candidate_rows, candidate_scores, 1, sizes.answer)
        worst = _ranked(candidate_rows, candidate_scores, -1, sizes.answer if sizes.with_opponents else 0)
        lowest = float(hits.opponent_scores[-1]) if len(hits.opponents) == sizes.candidates else 0.0
        report = RerankReport(
            candidates=len(candidate_rows),
            highest=float(hits.proponent_scores[-1]) if len(hits.proponents) == sizes.candidates else 0.0,
            lowest=lowest if sizes.with_opponents else None,
            difference=float(np.sqrt(np.mean(differences**2))) if len(differences) else None,
            seconds=seconds,
            unprojected_layers=recomputation.unprojected_layers,
            query_bits=recomputation.query_bits(len(numbers)),
        )
        reranked = replace(hits, proponents=best[0], proponent_scores=best[1], opponents=worst[0], opponent_scores=worst[1])
        results.append(Reranked(reranked, stored, report))
    return results


def _ranked(
    rows: Int64[np.ndarray, " rows"], scores: Float64[np.ndarray, " rows"], sign: int, k: int
) -> tuple[Int64[np.ndarray, " ranked"], Float32[np.ndarray, " ranked"]]:
    """Return the k rows of largest positive sign * score, of equal scores the lower row first, and their scores."""
    order = np.lexsort((rows, -sign * scores))
    order = order[sign * scores[order] > 0][:k]
    return rows[order], scores[order].astype(np.float32)


def _places(rows: Int64[np.ndarray, " rows"], scores: Float32[np.ndarray, " rows"]) -> dict[int, Place]:
    return {row: Place(rank, score) for rank, (row, score) in enumerate(zip(rows.tolist(), scores.tolist(), strict=True), 1)}
