"""What a number of bytes an example buys: which components it affords, and with how many tokens, bits and coordinates.

The rule was chosen on ground-truth packs (docs/components.md has the figures) and knows nothing of a model but its sizes and how many
distinct tokens its examples have:

- The vocabulary layers come first: up to 1,200 bytes they get all, above it the blocks get two fifths, in one-bit coordinates.
- Of the rest the head gets three fifths and the embeddings two, where both can be had; under 600 bytes the head gets all.
- A vocabulary layer keeps its tokens of largest norm, at the largest power of two of bits under which nearly half of the tokens fit.
- What a layer cannot use, since all its tokens fit at full width, goes to the blocks.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int64

from ..store.bits import padded_width
from ..store.dense import row_bytes
from ..store.documents import Example
from ..store.errors import UsageError
from ..store.manifest import DenseComponent, SparseComponent

Component = DenseComponent | SparseComponent
Counts = Mapping[str, Int64[np.ndarray, " examples"]]
"""By part, how many distinct tokens each example of a sample has there."""

_FIXED = 8  # of a row: a sparse component's start and norm, a dense one's scale and norm
_FACTOR = 2
_BLOCKS_FROM, _BLOCKS_SHARE = 1200, 0.4
_EMBEDDINGS_FROM, _HEAD_SHARE = 600, 0.6
_LEAST_BITS, _LEAST_TOKENS = 16, 0.45


def row_cost(component: Component, counts: Counts) -> float:
    """Bytes of a row in a component, on average over the sample."""
    if isinstance(component, DenseComponent):
        return row_bytes(component.stored, component.dtype) + (_FIXED if component.dtype in ("1bit", "int8") else _FIXED // 2)
    kept = np.minimum(counts[component.part], component.keys or np.iinfo(np.int64).max)
    return _FIXED + float(kept.mean()) * _entry(component, component.bits)


def spend(budget: int, components: Sequence[Component], counts: Counts) -> tuple[Component, ...]:
    """The components with their sizes set to cost at most `budget` bytes an example; those that it does not afford are not among them.

    Args:
        components: what there is to choose from: "head", "embeddings" and "blocks", of one model or of several, which share alike.

    Raises:
        UsageError: the budget does not pay for anything.
    """
    numbers = sorted({component.model for component in components})
    if len(numbers) > 1:
        own = [[component for component in components if component.model == number] for number in numbers]
        return tuple(chosen for some in own for chosen in spend(budget // len(numbers), some, counts))
    named = {component.part: component for component in components}
    vocabulary = [named[name] for name in ("head", "embeddings") if name in named]
    blocks = named.get("blocks")
    left = float(budget)
    for_blocks = 0.0
    if isinstance(blocks, DenseComponent):
        for_blocks = left if not vocabulary else _BLOCKS_SHARE * left if left >= _BLOCKS_FROM else 0.0
    left -= for_blocks
    if len(vocabulary) == 2 and left < _EMBEDDINGS_FROM:
        vocabulary = vocabulary[:1]
    shares = [_HEAD_SHARE * left, (1 - _HEAD_SHARE) * left] if len(vocabulary) == 2 else [left] * len(vocabulary)
    chosen: list[Component] = []
    spare = 0.0
    for component, share in zip(vocabulary, shares, strict=True):
        assert isinstance(component, SparseComponent)
        sized = _sparse(component, share + (0.0 if for_blocks else spare), counts)
        if sized is None:
            raise UsageError(f"`bytes_per_example` {budget} does not pay for one token of the {component.name}; give some hundreds")
        chosen.append(sized)
        spare += share - row_cost(sized, counts)
    if isinstance(blocks, DenseComponent) and for_blocks:
        bits = int(for_blocks + max(0.0, spare) - _FIXED) * 8
        if bits < 1:
            raise UsageError(f"`bytes_per_example` {budget} does not pay for one coordinate; give some hundreds")
        chosen.append(blocks.model_copy(update={"coordinates": bits, "dtype": "1bit"}))
    return tuple(chosen)


def _sparse(component: SparseComponent, budget: float, counts: Counts) -> SparseComponent | None:
    tokens = counts[component.part]
    bits = padded_width(component.width, 1)
    while True:
        affordable = _affordable((budget - _FIXED) / _entry(component, bits), tokens)
        if affordable is None or affordable >= _LEAST_TOKENS * tokens.mean() or bits <= _LEAST_BITS:
            return None if affordable == 0 else component.model_copy(update={"bits": bits, "keys": affordable})
        bits //= 2


def _affordable(entries: float, tokens: Int64[np.ndarray, " examples"]) -> int | None:
    """The largest bound on an example's tokens under which they are at most `entries` on average; None where no bound is needed."""
    if tokens.mean() <= entries:
        return None
    bounds = np.arange(1, tokens.max() + 1)
    means = np.minimum(tokens[None], bounds[:, None]).mean(axis=1)
    return int(np.searchsorted(means, entries, side="right"))


def _entry(component: SparseComponent, bits: int) -> int:
    return (2 if component.vocabulary <= 1 << 16 else 4) + _FACTOR + -(-bits // 8)


def count_tokens(examples: Sequence[Example]) -> dict[str, Int64[np.ndarray, " examples"]]:
    """Of texts, the distinct tokens that each predicts (head) and reads (embeddings); the last token is only predicted."""
    texts = [e for e in examples if e.features is None]
    predicted = [len(np.unique(e.token_ids[1:][e.loss_mask[1:]])) for e in texts]
    read = [len(np.unique(e.token_ids[:-1])) for e in texts]
    return {"head": np.array(predicted, np.int64), "embeddings": np.array(read, np.int64)}
