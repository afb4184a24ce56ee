"""Scores of training examples from rows that are computed again with the model: no codes, all tokens and all coordinates.

The rows have the components of the index, or those that `wherefrom fit` wrote into it: then the blocks are EK-FAC of all layers without
projection (Grosse et al., arXiv 2308.03296), while head and embeddings stay those of the index.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from .query.answers import RefineReport
from .query.metric import Metric
from .query.options import Query
from .query.plain import without_contrasts
from .query.scoring import Scorer
from .store.documents import Example
from .store.errors import UsageError
from .store.index import Index
from .store.rerank import rerank_view
from .store.shapes import Float64, Int64
from .store.vectors import Rows, combine, cut, join

if TYPE_CHECKING:
    from .indexer.encoder import EncodedBatch, Encoder

_ROW_BYTES = 1 << 30  # of the rows of queries, and of those of examples, that are in memory at once; but a row of each at least


class Recomputer:
    """Computation of scores with the model.

    Args:
        index: of the training examples.
        encoder: of the index.
        query_examples: converts queries to examples.

    Attributes:
        view: the index with the components that recomputed rows have.
        refinement: how the queries that were encoded last were refined; None where they were not.
    """

    def __init__(self, index: Index, encoder: "Encoder", query_examples: Callable[[Sequence[Query]], list[Example]]) -> None:
        self._index = index
        self._query_examples = query_examples
        fitted = rerank_view(index)
        self.view = fitted or index
        self.refinement: RefineReport | None = None
        self._encoder = encoder
        if fitted is not None:
            settings = replace(encoder.settings, components=fitted.manifest.components)
            self._encoder = replace(encoder, settings=settings, arrays=fitted.arrays)

    @property
    def unprojected_layers(self) -> int:
        """Number of layers whose gradients are not projected; 0 if rows are those of the index before coding."""
        return 0 if self.view is self._index else sum(len(c.layer_names) for c in self.view.manifest.components if c.role == "blocks")

    @cached_property
    def _most_rows(self) -> int:
        """How many rows may be in memory at once."""
        widths = [component.dim for component in self.view.manifest.components if component.has_wide_rows]
        return max(1, _ROW_BYTES // (4 * max(widths))) if widths else _ROW_BYTES

    def scores(
        self,
        queries: Sequence[Query],
        mean: Float64[np.ndarray, "answers queries"],
        metric: Metric,
        rows: Int64[np.ndarray, " rows"],
        answers: range | None = None,
    ) -> Float64[np.ndarray, "answers rows"]:
        """Compute the scores of training examples.

        Args:
            mean: the weights of the queries in each answer.
            rows: of the examples.
            answers: those to compute; by default all.

        Raises:
            UsageError: the metric mixes the queries' second moments in.
        """
        if metric.mix is not None:
            raise UsageError("rows are not computed again under a curvature that queries are mixed into; leave `mix` out")
        answers = answers or range(len(mean))
        examples = [self._index.example(row) for row in rows.tolist()]
        size = self._most_rows
        blocks = [self._block(queries, mean[answers[i : i + size]], metric, rows, examples) for i in range(0, len(answers), size)]
        return np.concatenate([np.zeros((0, len(rows))), *blocks])

    def _block(
        self,
        queries: Sequence[Query],
        mean: Float64[np.ndarray, "answers queries"],
        metric: Metric,
        rows: Int64[np.ndarray, " rows"],
        examples: Sequence[Example],
    ) -> Float64[np.ndarray, "answers rows"]:
        query_rows = self._combined_rows(queries, mean, metric)
        scorer = Scorer.of(self.view, query_rows, metric)
        scaled = {o.component.name: o.scaled(self.view, query_rows[o.component.name], stored=False) for o in scorer.operands}
        lengths = [0.0] * len(mean)
        if metric.mode == "cosine":
            lengths = [scorer.squared_length(cut(query_rows, i, i + 1), stored=False) for i in range(len(mean))]
        scores = np.zeros((len(mean), len(rows)))
        for batch in self._batches(examples):
            exact = {name: vectors.as_float32() for name, vectors in batch.exact.items()}
            products = sum(vectors.inner_products(exact[name]).astype(np.float64) for name, vectors in scaled.items())
            for number, position in enumerate(batch.positions):
                scale = np.ones(len(mean))
                if metric.mode == "cosine":
                    squared = scorer.squared_length(cut(exact, number, number + 1), stored=False)
                    scale = np.array([(squared * length) ** -0.5 if squared * length > 0 else 0.0 for length in lengths])
                elif metric.mode == "loss-normalized":
                    scale *= scorer.scale(0, int(rows[position]))
                scores[:, position] = np.asarray(products)[:, number] * scale
        return scores

    def _batches(self, examples: Sequence[Example]) -> Iterator["EncodedBatch"]:
        """Encode examples, few at a time; positions are those in all of them."""
        for first in range(0, len(examples), self._most_rows):
            for batch in self._encoder.batches(examples[first : first + self._most_rows], tolerant=True):
                yield replace(batch, positions=[first + position for position in batch.positions])

    def _combined_rows(self, queries: Sequence[Query], mean: Float64[np.ndarray, "answers queries"], metric: Metric) -> Rows:
        """Rows of answers: weighted sums of their queries' rows, which are computed few at a time."""
        used = np.flatnonzero(mean.any(axis=0)).tolist()
        total: Rows | None = None
        for first in range(0, max(1, len(used)), self._most_rows):
            part = used[first : first + self._most_rows]
            rows = combine(self._query_rows([queries[i] for i in part], metric), mean[:, part])
            total = rows if total is None else combine(join([total, rows]), np.hstack([np.eye(len(mean)), np.eye(len(mean))]))
        assert total is not None
        return total

    def _query_rows(self, queries: Sequence[Query], metric: Metric) -> Rows:
        """Rows of queries, also of queries by row and of contrasts."""
        from .query_rows import query_rows

        plain, contrasts = without_contrasts(queries)
        examples = self._query_examples(plain)
        by_row = [query.row is not None for query in plain]
        order = np.argsort(by_row, kind="stable")
        parts = []
        for of_row in (False, True):
            if of_row in by_row:
                own = [examples[i] for i in order if by_row[i] is of_row]
                rows, self.refinement = query_rows(self.view, self._encoder, metric, own, not of_row)
                parts.append(rows)
        matrix: Float64[np.ndarray, "queries plain"] = contrasts[:, order]
        return combine(join([{name: vectors.as_float32() for name, vectors in part.items()} for part in parts]), matrix)
