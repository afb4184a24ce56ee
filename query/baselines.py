"""Baselines: scores from words, from the model's hidden states, and from the length of the gradient.

    bm25     BM25, a ranking function over words (Robertson and Zaragoza, 2009)
    hidden   cosine of the mean last hidden states, if the index has them (`hidden`)
    norm     length of the row, the same for every query

The score of a contrast of two completions is the difference of their scores. If a baseline finds the same rows as influence, the baseline
suffices, and it is cheaper.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ..store.extras import require
from ..store.index import Index
from ..store.shapes import Bool, Float, Float32
from .answers import Baseline

Scores = Float[np.ndarray, "examples queries"]
BaselineScores = Mapping[str, Scores]
"""Scores of all rows for each query, by name of the baseline."""


class Words:
    """BM25 over the texts of an index.

    Raises:
        UsageError: bm25s is not installed.
    """

    def __init__(self, documents: Sequence[str]) -> None:
        bm25s = require("bm25s", "evaluation")
        self._tokenize = lambda texts: bm25s.tokenize(list(texts), stopwords=None, show_progress=False, return_ids=False)
        self._count = len(documents)
        self._engine = bm25s.BM25()
        self._engine.index(self._tokenize(documents), show_progress=False)

    def scores(self, queries: Sequence[str]) -> Scores:
        """Compute the scores of all texts for each query; 0 for a query without words."""
        zeros = np.zeros(self._count)
        return np.stack([self._engine.get_scores(words) if words else zeros for words in self._tokenize(queries)], axis=1)


def row_norms(index: Index) -> Float[np.ndarray, " examples"]:
    """Compute the lengths of the rows over all weighted components: the square roots of self-influence."""
    return np.sqrt(sum((s.weight * index.norms(s).astype(np.float64) ** 2 for s in index.manifest.components), np.zeros(len(index))))


def cosines(a: Float[np.ndarray, "examples size"], b: Float[np.ndarray, "queries size"]) -> Scores:
    """Compute the cosines of all pairs; 0 for vectors of zeros."""
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
        proponents: the query's best rows.
        k: number of rows of each baseline.
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
    """Return the correlation of two vectors; None if all values of one are equal."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])
