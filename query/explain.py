"""Splits of a score by component, layer, block and shared token, from the stored rows.

A score is a sum over components, of a dense component over layers, of a sparse one over the tokens that query and row share. Layers cannot
be told apart where coordinates were mixed (folded, or rotated for one bit each).
"""

import re
from collections.abc import Sequence

from .answers import Part
from .scoring import Scorer


def split_score(scorer: Scorer, query: int, row: int) -> tuple[tuple[Part, ...], tuple[Part, ...], tuple[Part, ...]]:
    """Split a score by component, by layer, and by shared token (named by its id), from the stored rows."""
    scale = scorer.scale(query, row)
    shard, offset = scorer.index.locate(row)
    components: list[Part] = []
    layers: list[Part] = []
    tokens: list[Part] = []
    for operand in scorer.operands:
        name = operand.component.name
        split = operand.split(scorer.index, shard, offset, query)
        components.append(Part(name, split.total * scale))
        layers += [Part(layer, score * scale, name) for layer, score in split.layers.items()]
        tokens += [Part(str(token), score * scale, name, token) for token, score in split.tokens.items()]
    return _sorted(components), _sorted(layers), _sorted(tokens)


def by_block(layers: Sequence[Part]) -> tuple[Part, ...]:
    """Sum the parts of each block's layers, such as those of `transformer.h.3`; a layer outside of blocks is its own block."""
    sums: dict[tuple[str, str | None], float] = {}
    for part in layers:
        block = re.match(r"(.*?\.\d+)\.", part.name)
        key = (block[1] if block else part.name, part.component)
        sums[key] = sums.get(key, 0.0) + part.score
    return _sorted([Part(name, score, component) for (name, component), score in sums.items()])


def _sorted(parts: Sequence[Part]) -> tuple[Part, ...]:
    return tuple(sorted(parts, key=lambda part: -abs(part.score)))
