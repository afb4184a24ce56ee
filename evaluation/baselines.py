"""Baselines without influence. A method that does not beat them finds only topics, words or long texts.

    random        independent normal numbers: the chance level
    norm          the row's norm, the same for every query
    dot, cosine   of the plain gradients of the same layers, in a wide projection: shows the effect of curvature
    tfidf, chars  cosine of TF-IDF vectors of words, and of character 3- to 5-grams
    bm25          the classic ranking function of search engines (Robertson and Zaragoza, 2009)
    hidden        cosine of the mean input of the output layer: the model's own embedding of a text or image
    pixels        cosine of the input vectors

Each is a matrix [examples, queries]. Texts are cut to the longest example, as for the model.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ..client import Client
from ..indexer.encoder import Encoder
from ..indexer.hidden import mean_hidden
from ..indexer.layers import describe_layers, find_layers
from ..indexer.tasks import Task
from ..query.baselines import Scores, Words, cosines, row_norms
from ..store.documents import Example
from ..store.extras import require
from ..store.manifest import Curvature, DenseComponent, Layer, Projection

_RANKS = (1 << 30, 512, 256, 128, 64, 32, 16)
_QUERY_BYTES = 1 << 30
_BLOCK = 32


def gradient_baselines(client: Client, train: Sequence[Example], queries: Sequence[Example]) -> dict[str, Scores]:
    """Norm, from the rows; dot and cosine, from plain gradients of the same layers.

    The projection is the widest in which the gradients of all queries fit into a gibibyte (none for a small model).
    """
    norms = row_norms(client.index)
    encoder = client.encoder
    blocks = [component for component in client.index.manifest.components if component.role == "blocks"]
    names = list(blocks[-1].layer_names) if blocks else find_layers(encoder.model, (), client.recorded.task.within_blocks)
    query_rows = np.zeros((0, 0), np.float32)
    for rank in _RANKS:
        layers = describe_layers(client.recorded.task, encoder.model, names, rank, "identity", 0, explicit=bool(blocks))
        component = _plain_component(layers, rank)
        plain = Encoder(client.recorded.task, (encoder.model,), replace(encoder.settings, components=(component,)), {})
        if len(queries) * component.dim * 4 <= _QUERY_BYTES or rank == _RANKS[-1]:
            query_rows = plain.rows(queries, queries=True)["plain"].values.astype(np.float32)
            break
    products = []
    row_lengths = []
    for first in range(0, len(train), _BLOCK):
        rows = plain.rows(train[first : first + _BLOCK])["plain"].values
        products.append(rows @ query_rows.T)
        row_lengths.append(np.linalg.norm(rows, axis=1))
    dot = np.concatenate(products).astype(np.float64)
    scale = np.concatenate(row_lengths)[:, None] * np.linalg.norm(query_rows, axis=1)
    cosine = np.divide(dot, scale, out=np.zeros_like(dot), where=scale > 0)
    return {"norm": np.repeat(norms[:, None], len(queries), axis=1), "dot": dot, "cosine": cosine}


def _plain_component(layers: tuple[Layer, ...], rank: int) -> DenseComponent:
    return DenseComponent(
        name="plain",
        kind="dense",
        model=0,
        coordinates=None,
        weight=1.0,
        dtype="float32",
        layers=layers,
        projection=Projection(kind="random", rank=rank, seed=0),
        curvature=Curvature(kind="identity", labels="data", examples=0, tokens=0, damping=1.0),
    )


def content_baselines(train: Sequence[Example], queries: Sequence[Example]) -> dict[str, Scores]:
    """Baselines from the examples' contents: random, and for texts tfidf, chars and bm25, for vectors pixels."""
    baselines = {"random": np.random.default_rng(0).standard_normal((len(train), len(queries)))}
    if train[0].features is not None:
        return baselines | {
            "pixels": cosines(*(np.stack([e.features for e in part if e.features is not None]) for part in (train, queries)))
        }
    documents, query_texts = ([e.text for e in part] for part in (train, queries))
    return baselines | {
        "tfidf": _tfidf(documents, query_texts),
        "chars": _tfidf(documents, query_texts, analyzer="char", ngram_range=(3, 5)),
        "bm25": Words(documents).scores(query_texts),
    }


def hidden_baseline(task: Task, model: torch.nn.Module, train: Sequence[Example], queries: Sequence[Example], batch_tokens: int) -> Scores:
    """Cosine of the output layer's mean input over an example's tokens."""
    return cosines(*(mean_hidden(task, model, part, batch_tokens) for part in (train, queries)))


def _tfidf(documents: Sequence[str], queries: Sequence[str], **options: object) -> Scores:
    vectorizer = require("sklearn.feature_extraction.text", "evaluation").TfidfVectorizer(**options)
    analyze = vectorizer.build_analyzer()
    if not any(analyze(text) for text in documents):
        return np.zeros((len(documents), len(queries)))  # no words
    return (vectorizer.fit_transform(documents) @ vectorizer.transform(queries).T).toarray()


def require_libraries() -> None:
    """Check that the libraries of the baselines are installed.

    Raises:
        UsageError: scikit-learn, scipy or bm25s is not installed.
    """
    for name in ("sklearn.feature_extraction.text", "scipy.stats", "bm25s"):
        require(name, "evaluation")
