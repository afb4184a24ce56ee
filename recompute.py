"""Scores of training examples from rows that are computed again with the model: no codes, all tokens and all coordinates.

The rows have the components of the index, or those that `wherefrom fit` wrote into it: then the blocks are EK-FAC of all layers without
projection (Grosse et al., arXiv 2308.03296), while head and embeddings stay those of the index.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

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
from .store.shapes import Float32, Float64, Int8, Int64
from .store.vectors import DenseVectors, Rows, combine, concatenate, slice_rows

if TYPE_CHECKING:
    from .indexer.encoder import EncodedBatch, Encoder

_ROW_BYTES = 1 << 30  # of the rows of queries, and of those of examples, that are in memory at once; but a row of each at least
_CODED_PER_FLOAT = 4  # parts of 8 bits that take as many bytes as one of float32
_CODED_BLOCK = 256
_LARGEST_CODE = 127


@dataclass(frozen=True)
class CodedVectors:
    """Dense vectors in 8 bits a coordinate, with a scale for each of their blocks, as memory for many long ones (arXiv 2308.03296 keeps
    queries at low rank).

    Attributes:
        codes: rounded coordinates over their block's scale.
        scales: of blocks of `_CODED_BLOCK` coordinates; the largest coordinate of a block is 127 times its scale.
    """

    codes: Int8[np.ndarray, "rows dim"]
    scales: Float32[np.ndarray, "rows blocks"]

    @classmethod
    def of(cls, vectors: DenseVectors) -> "CodedVectors":
        """Round vectors."""
        codes = np.empty_like(vectors.values, dtype=np.int8)
        blocks = _coded_blocks(codes.shape[1])
        scales = np.empty((len(codes), len(blocks)), np.float32)
        for number, block in enumerate(blocks):
            values = vectors.values[:, block]
            scales[:, number] = np.abs(values).max(axis=1) / _LARGEST_CODE
            divisors = np.where(scales[:, number] > 0, scales[:, number], 1.0)
            codes[:, block] = np.rint(values / divisors[:, None]).clip(-_LARGEST_CODE, _LARGEST_CODE)
        return cls(codes, scales)

    def inner_products(self, other: DenseVectors) -> Float32[np.ndarray, "rows others"]:
        """Compute inner products with float32 rows."""
        products = np.zeros((len(self.codes), len(other)), np.float32)
        for number, block in enumerate(_coded_blocks(self.codes.shape[1])):
            products += (self.codes[:, block].astype(np.float32) * self.scales[:, number, None]) @ other.values[:, block].T
        return products


def _coded_blocks(dim: int) -> list[slice]:
    return [slice(first, first + _CODED_BLOCK) for first in range(0, dim, _CODED_BLOCK)]


class _Prepared(NamedTuple):
    """Queries of some answers.

    Attributes:
        scaled: by component, vectors whose products with rows are scores.
        lengths: squared, for cosines.
    """

    scorer: Scorer
    scaled: dict[str, Any]
    lengths: Float64[np.ndarray, " answers"]


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
        """Return the number of rows that fit in memory."""
        widths = [component.dim for component in self.view.manifest.components if component.has_wide_rows]
        return max(1, _ROW_BYTES // (4 * max(widths))) if widths else _ROW_BYTES

    def scores(
        self,
        queries: Sequence[Query],
        weights: Float64[np.ndarray, "answers queries"],
        metric: Metric,
        rows: Int64[np.ndarray, " rows"],
        answers: range | None = None,
    ) -> Float64[np.ndarray, "computed rows"]:
        """Compute the scores of training examples.

        Args:
            weights: of the queries in each answer.
            rows: of the examples.
            answers: those to compute; by default all.

        Raises:
            UsageError: the metric mixes the queries' second moments in.
        """
        if metric.mix is not None:
            raise UsageError("rows are not computed again under a curvature that queries are mixed into; leave `mix` out")
        answers = answers or range(len(weights))
        examples = [self._index.example(row) for row in rows.tolist()]
        size = self._most_rows
        parts = [answers[first : first + size] for first in range(0, len(answers), size)]
        coded = self.query_bits(len(answers)) == 8
        at_once = _CODED_PER_FLOAT if coded else 1
        scores = [np.zeros((0, len(rows)))]
        for first in range(0, len(parts), at_once):
            prepared = [self._prepared(queries, weights[part], metric, coded) for part in parts[first : first + at_once]]
            scores += self._products(prepared, metric, rows, examples)
        return np.concatenate(scores)

    def query_bits(self, answers: int) -> int:
        """Return the bits of a coordinate of the queries' vectors for so many answers."""
        return 8 if answers > self._most_rows else 32

    def _prepared(
        self, queries: Sequence[Query], weights: Float64[np.ndarray, "answers queries"], metric: Metric, coded: bool
    ) -> "_Prepared":
        query_rows = self._combined_rows(queries, weights, metric)
        scorer = Scorer.of(self.view, query_rows, metric)
        scaled: dict[str, Any] = {}
        for operand in scorer.operands:
            component = operand.component
            vectors: Any = operand.scaled(self.view, query_rows[component.name], stored=False)
            scaled[component.name] = CodedVectors.of(vectors) if coded and component.has_wide_rows else vectors
        lengths = np.zeros(len(weights))
        if metric.mode == "cosine":
            lengths = np.array([scorer.squared_length(slice_rows(query_rows, i, i + 1), stored=False) for i in range(len(weights))])
        return _Prepared(scorer, scaled, lengths)

    def _products(
        self, prepared: Sequence["_Prepared"], metric: Metric, rows: Int64[np.ndarray, " rows"], examples: Sequence[Example]
    ) -> list[Float64[np.ndarray, "answers rows"]]:
        """Compute the scores of examples for all of the prepared answers, in one pass."""
        scores = [np.zeros((len(part.lengths), len(rows))) for part in prepared]
        for batch in self._batches(examples):
            exact = {name: vectors.as_float32() for name, vectors in batch.exact.items()}
            for part, part_scores in zip(prepared, scores, strict=True):
                products = sum(vectors.inner_products(exact[name]).astype(np.float64) for name, vectors in part.scaled.items())
                for number, position in enumerate(batch.positions):
                    scale = np.ones(len(part_scores))
                    if metric.mode == "cosine":
                        lengths = part.lengths * part.scorer.squared_length(slice_rows(exact, number, number + 1), stored=False)
                        scale = np.divide(1.0, np.sqrt(lengths), out=np.zeros(len(part_scores)), where=lengths > 0)
                    elif metric.mode == "loss-normalized":
                        scale *= part.scorer.scale(0, int(rows[position]))
                    part_scores[:, position] = np.asarray(products)[:, number] * scale
        return scores

    def _batches(self, examples: Sequence[Example]) -> Iterator["EncodedBatch"]:
        """Encode examples, few at a time; positions are those in all of them."""
        for first in range(0, len(examples), self._most_rows):
            for batch in self._encoder.batches(examples[first : first + self._most_rows], skip_nonfinite=True):
                yield replace(batch, positions=[first + position for position in batch.positions])

    def _combined_rows(self, queries: Sequence[Query], weights: Float64[np.ndarray, "answers queries"], metric: Metric) -> Rows:
        """Rows of answers: weighted sums of their queries' rows, which are computed few at a time."""
        used = np.flatnonzero(weights.any(axis=0)).tolist()
        total: Rows | None = None
        for first in range(0, max(1, len(used)), self._most_rows):
            part = used[first : first + self._most_rows]
            rows = combine(self._query_rows([queries[i] for i in part], metric), weights[:, part])
            total = rows if total is None else combine(concatenate([total, rows]), np.hstack([np.eye(len(weights)), np.eye(len(weights))]))
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
                examples_of_kind = [examples[i] for i in order if by_row[i] is of_row]
                rows, self.refinement = query_rows(self.view, self._encoder, metric, examples_of_kind, not of_row)
                parts.append(rows)
        matrix: Float64[np.ndarray, "queries plain"] = contrasts[:, order]
        return combine(concatenate([{name: vectors.as_float32() for name, vectors in part.items()} for part in parts]), matrix)
