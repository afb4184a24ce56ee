"""Why a row has its score: exact splits by component, by layer, block and shared token, read from the rows; and, with the model, by token.

A score is a sum over components, of a dense component over layers, of a sparse one over the tokens that query and row share. Layers cannot
be told apart where coordinates were mixed (folded, or rotated for one bit each).
"""

import re
from collections.abc import Sequence

from .answers import Part
from .parts import DenseQueries
from .scoring import Scorer


def split_score(scorer: Scorer, query: int, row: int) -> tuple[tuple[Part, ...], tuple[Part, ...], tuple[Part, ...]]:
    """A score's parts by component, by layer, and by shared token (named by its id), as they are stored."""
    scale = scorer.scale(query, row)
    shard, offset = scorer.index.locate(row)
    components, layers, tokens = [], [], []
    for p in scorer.parts:
        if isinstance(p, DenseQueries):
            total, by_layer = p.split(scorer.index, shard, offset, query)
            layers += [Part(name, score * scale, p.component.name) for name, score in by_layer.items()]
        else:
            found = p.split(scorer.index, shard, offset, query)
            total = sum(found.values())
            layers.append(Part(p.component.layer, total * scale, p.component.name))
            tokens += [Part(str(token), score * scale, p.component.name, token) for token, score in found.items()]
        components.append(Part(p.component.name, total * scale))
    return _sorted(components), _sorted(layers), _sorted(tokens)


def by_block(layers: Sequence[Part]) -> tuple[Part, ...]:
    """The sums of each block's layers, `transformer.h.3` of `transformer.h.3.mlp.c_fc`; a layer outside stands for itself."""
    sums: dict[tuple[str, str | None], float] = {}
    for part in layers:
        block = re.match(r"(.*?\.\d+)\.", part.name)
        at = (block[1] if block else part.name, part.component)
        sums[at] = sums.get(at, 0.0) + part.score
    return _sorted([Part(name, score, component) for (name, component), score in sums.items()])


def _sorted(parts: Sequence[Part]) -> tuple[Part, ...]:
    return tuple(sorted(parts, key=lambda part: -abs(part.score)))
