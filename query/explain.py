"""Why a row has its score: exact splits by segment, by layer and by shared token, read from the rows; and, with the model, by token.

A score is a sum over segments, of a dense segment over layers, of a keyed one over the tokens that question and row share. Layers cannot be
told apart where coordinates were mixed (folded, or rotated for one bit each).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .scoring import DenseQueries, Scorer


@dataclass(frozen=True)
class Part:
    """A part of a score.

    Attributes:
        name: of a segment, a layer, or (as text, where a tokenizer is at hand) a token.
        score: what it adds; parts of one kind add up to the score of what they split.
        segment: which segment a layer or token belongs to.
        token: a token's id.
    """

    name: str
    score: float
    segment: str | None = None
    token: int | None = None


@dataclass(frozen=True)
class TokenShares:
    """What each token of a text adds to the score. Rows are made anew for it, so that the sum is the score of whole rows, not of codes."""

    tokens: tuple[str, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Explanation:
    """The score of one training example, taken apart.

    Attributes:
        row, id, text, score: which example, and its score, as a query gives it.
        segments, layers, vocabulary: see above; each strongest first.
        recomputed: the score of the rows made anew, before they were coded; None where no model was asked.
        example, question: shares of the training example's tokens, and of the question's; each adds up to `recomputed`.
    """

    row: int
    id: str
    text: str
    score: float
    segments: tuple[Part, ...]
    layers: tuple[Part, ...]
    vocabulary: tuple[Part, ...]
    recomputed: float | None = None
    example: TokenShares | None = None
    question: TokenShares | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, keys as in `whence explain --json`."""
        return asdict(self)


def split_score(scorer: Scorer, query: int, row: int) -> tuple[tuple[Part, ...], tuple[Part, ...], tuple[Part, ...]]:
    """A score's parts by segment, by layer, and by shared token (named by its id), as they are stored."""
    scale = scorer.scale(query, row)
    shard, offset = scorer.index.locate(row)
    segments, layers, tokens = [], [], []
    for p in scorer.parts:
        if isinstance(p, DenseQueries):
            total, by_layer = p.split(scorer.index, shard, offset, query)
            layers += [Part(name, score * scale, p.segment.name) for name, score in by_layer.items()]
        else:
            found = p.split(scorer.index, shard, offset, query)
            total = sum(found.values())
            layers.append(Part(p.segment.layer, total * scale, p.segment.name))
            tokens += [Part(str(token), score * scale, p.segment.name, token) for token, score in found.items()]
        segments.append(Part(p.segment.name, total * scale))
    return _sorted(segments), _sorted(layers), _sorted(tokens)


def _sorted(parts: Sequence[Part]) -> tuple[Part, ...]:
    return tuple(sorted(parts, key=lambda part: -abs(part.score)))
