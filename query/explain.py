"""Why a row has its score: exact splits by segment, by layer, block and shared token, read from the rows; and, with the model, by token.

A score is a sum over segments, of a dense segment over layers, of a keyed one over the tokens that question and row share. Layers cannot be
told apart where coordinates were mixed (folded, or rotated for one bit each).
"""

import re
from collections.abc import Sequence

from .answers import Part
from .parts import DenseQueries
from .scoring import Scorer


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


def by_block(layers: Sequence[Part]) -> tuple[Part, ...]:
    """The sums of each block's layers, `transformer.h.3` of `transformer.h.3.mlp.c_fc`; a layer outside stands for itself."""
    sums: dict[tuple[str, str | None], float] = {}
    for part in layers:
        block = re.match(r"(.*?\.\d+)\.", part.name)
        at = (block[1] if block else part.name, part.segment)
        sums[at] = sums.get(at, 0.0) + part.score
    return _sorted([Part(name, score, segment) for (name, segment), score in sums.items()])


def _sorted(parts: Sequence[Part]) -> tuple[Part, ...]:
    return tuple(sorted(parts, key=lambda part: -abs(part.score)))
