"""Baselines beside an answer: what words, the model's own embedding, and the size of the gradient alone would have said.

    bm25     the search engine's classic over words (Robertson and Zaragoza, 2009)
    hidden   cosine of the mean last hidden states, where the build kept them (--hidden)
    norm     the row's length alone, the same for every query

Of a contrast of two completions, words and states say the difference of what they say of each.

Where a baseline finds the same rows, influence has told nothing that it does not.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Float32

from ..store.extras import require
from ..store.index import Index
from .answers import Baseline
from .metric import Metric, QueryRows
from .scoring import all_scores

Scores = Float[np.ndarray, "examples queries"]


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
    queries: QueryRows,
    baselines: Mapping[str, Scores],
    metric: Metric,
    allowed: Bool[np.ndarray, " rows"],
    found: Sequence[Sequence[int]],
    k: int,
) -> list[tuple[Baseline, ...]]:
    """For each query, what each baseline says.

    Args:
        baselines: name -> scores of all rows, by query.
        allowed: which rows were searched.
        found: each query's proponents.
    """
    ours = np.concatenate([block for _, block in all_scores(index, queries, metric)], axis=1)[:, allowed]
    rows, ranks = np.flatnonzero(allowed), [_ranks(own) for own in ours]
    answers = []
    for query, proponents in enumerate(found):
        beside = []
        for name, scores in baselines.items():
            own = scores[allowed, query]
            best = np.argsort(-own, kind="stable")[:k]
            chosen = rows[best].tolist()
            ids = tuple(index.example(row).id for row in chosen)
            shared = len(set(chosen) & set(proponents))
            beside.append(Baseline(name, tuple(chosen), ids, tuple(own[best].tolist()), _correlation(ranks[query], _ranks(own)), shared))
        answers.append(tuple(beside))
    return answers


def _ranks(scores: Float32[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
    return require("scipy.stats", "evaluation").rankdata(scores)


def _correlation(a: Float[np.ndarray, " rows"], b: Float[np.ndarray, " rows"]) -> float | None:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])
