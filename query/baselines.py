"""Baselines: scores from words, from the model's hidden states, and from the length of the gradient.

    bm25     the search engine's classic over words (Robertson and Zaragoza, 2009)
    hidden   cosine of the mean last hidden states, where the build kept them (--hidden)
    norm     the row's length alone, the same for every query

The score of a contrast of two completions is the difference of their scores. Where a baseline finds the same rows as influence, the cheaper
baseline would have sufficed.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Float32

from ..store.extras import require
from ..store.index import Index
from .answers import Baseline

Scores = Float[np.ndarray, "examples queries"]
BaselineScores = Mapping[str, Scores]
"""Scores of all rows for each query, by baseline."""


class Words:
    """BM25 over an index's texts, made once.

    Raises:
        UsageError: bm25s is not installed.
    """

    def __init__(self, documents: Sequence[str]) -> None:
        bm25s = require("bm25s", "evaluation")
        self._tokenize = lambda texts: bm25s.tokenize(list(texts), stopwords=None, show_progress=False, return_ids=False)
        self._engine, self._count = bm25s.BM25(), len(documents)
        self._engine.index(self._tokenize(documents), show_progress=False)

    def scores(self, asked: Sequence[str]) -> Scores:
        """Of all texts, for some queries."""
        nothing = np.zeros(self._count)  # of a query without a word
        return np.stack([self._engine.get_scores(tokens) if tokens else nothing for tokens in self._tokenize(asked)], axis=1)


def row_norms(index: Index) -> Float[np.ndarray, " examples"]:
    """The rows' lengths over all components, with their weights: the square root of self-influence."""
    return np.sqrt(sum((s.weight * index.norms(s).astype(np.float64) ** 2 for s in index.manifest.components), np.zeros(len(index))))


def cosines(a: Float[np.ndarray, "examples size"], b: Float[np.ndarray, "queries size"]) -> Scores:
    """Cosines of all pairs; 0 with vectors of zeros."""
    a, b = (v.astype(np.float64) / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-30) for v in (a, b))
    return a @ b.T


def compare(
    index: Index,
    baselines: Mapping[str, Float[np.ndarray, " rows"]],
    scores: Float32[np.ndarray, " searched"],
    searched: Bool[np.ndarray, " rows"],
    proponents: Sequence[int],
    k: int,
) -> tuple[Baseline, ...]:
    """Compare a query's scores with those of baselines.

    Args:
        baselines: by name, scores of all rows.
        scores: of the searched rows.
        searched: mask of the rows.
        proponents: rows.
        k: rows that each baseline returns.
    """
    rows = np.flatnonzero(searched)
    ranks = _ranks(scores)
    compared = []
    for name, all_scores in baselines.items():
        baseline_scores = all_scores[searched]
        best = np.argsort(-baseline_scores, kind="stable")[:k]
        best_rows = rows[best].tolist()
        compared.append(
            Baseline(
                name=name,
                rows=tuple(best_rows),
                ids=tuple(index.example(row).id for row in best_rows),
                scores=tuple(baseline_scores[best].tolist()),
                correlation=_correlation(ranks, _ranks(baseline_scores)),
                shared=len(set(best_rows) & set(proponents)),
            )
        )
    return tuple(compared)


def _ranks(scores: Float[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
    return require("scipy.stats", "evaluation").rankdata(scores)


def _correlation(a: Float[np.ndarray, " rows"], b: Float[np.ndarray, " rows"]) -> float | None:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])
