"""Splits of a score by component, layer, block and shared token, from the stored rows.

A score is a sum over components. That of a dense component is a sum over layers, and that of a sparse one is a sum over the tokens that the
query and the row share. It cannot be split by layers if the coordinates are random mixtures (of fewer coordinates, or of one bit each).
"""

import re
from collections.abc import Sequence

from .answers import ScorePart
from .scoring import Scorer


def split_score(scorer: Scorer, query: int, row: int) -> tuple[tuple[ScorePart, ...], tuple[ScorePart, ...], tuple[ScorePart, ...]]:
    """Split a score by component, by layer, and by shared token (named by its id), from the stored rows."""
    scale = scorer.scale(query, row)
    shard, offset = scorer.index.locate(row)
    components: list[ScorePart] = []
    layers: list[ScorePart] = []
    tokens: list[ScorePart] = []
    for operand in scorer.operands:
        name = operand.component.name
        split = operand.split(scorer.index, shard, offset, query)
        components.append(ScorePart(name, split.total * scale))
        layers += [ScorePart(layer, score * scale, name) for layer, score in split.layers.items()]
        tokens += [ScorePart(str(token), score * scale, name, token) for token, score in split.tokens.items()]
    return _sorted(components), _sorted(layers), _sorted(tokens)


def by_block(layers: Sequence[ScorePart]) -> tuple[ScorePart, ...]:
    """Sum the parts of the layers of each transformer block, such as `transformer.h.3`; other layers have sums of their own."""
    sums: dict[tuple[str, str | None], float] = {}
    for part in layers:
        block = re.match(r"(.*?\.\d+)\.", part.name)
        key = (block[1] if block else part.name, part.component)
        sums[key] = sums.get(key, 0.0) + part.score
    return _sorted([ScorePart(name, score, component) for (name, component), score in sums.items()])


def _sorted(parts: Sequence[ScorePart]) -> tuple[ScorePart, ...]:
    return tuple(sorted(parts, key=lambda part: -abs(part.score)))
