"""Conversion of queries: to documents, which a converter tokenizes, and of contrasts to differences of plain queries."""

import base64
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..store.corpus import Document
from ..store.errors import UsageError
from ..store.shapes import Float64
from .options import Query


def without_contrasts(queries: Sequence[Query]) -> tuple[list[Query], Float64[np.ndarray, "queries plain"]]:
    """Return queries without `against`, and the matrix whose products with their scores are those of the given queries."""
    contrasts = [i for i, query in enumerate(queries) if query.against is not None]
    alternatives = [replace(queries[i], completion=queries[i].against, against=None) for i in contrasts]
    matrix = np.eye(len(queries), len(queries) + len(alternatives))
    matrix[contrasts, np.arange(len(queries), matrix.shape[1])] = -1.0
    return [*(replace(query, against=None) for query in queries), *alternatives], matrix


def query_document(query: Query) -> Document:
    """Return a query as a document, for a converter.

    Raises:
        UsageError: the image is not base64.
    """
    document = Document(
        id="query",
        source="query",
        where=f"query {query.id}" if query.id else "the query",
        template={"tools": query.tools} if query.tools else {},
        features=None if query.features is None else np.array(query.features, np.float32),
        texts=tuple(query.texts or ()),
        **{name: getattr(query, name) for name in ("text", "prompt", "completion", "messages", "label")},
    )
    if query.image is not None:
        try:
            return replace(document, image=base64.b64decode(query.image, validate=True))
        except ValueError as error:
            raise UsageError("the image is not the bytes of a file as base64; give its path, or encode it") from error
    if query.chosen is not None:
        return replace(document, completion=query.chosen, rejected=replace(document, completion=query.rejected))
    return document
