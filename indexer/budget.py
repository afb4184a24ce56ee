"""The components and sizes that a number of bytes an example affords.

The rule was chosen on ground-truth packs (docs/components.md has the figures). It depends on the model's sizes, and on how many distinct
tokens its examples have:

- The vocabulary layers come first: up to 1,200 bytes they get all, above it the blocks get two fifths, in one-bit coordinates.
- Of the rest the head gets three fifths and the embeddings two, where both can be had; under 600 bytes the head gets all. Where only an
  adapter inside the blocks was trained, the head gets two fifths and the embeddings three.
- A model of 50 million parameters or more has no embeddings in its rows: from 600 bytes on, head and blocks get a half each. Under 600
  bytes the head gets all, but where only an adapter was trained the blocks do.
- A vocabulary layer keeps its tokens of largest norm, at the largest power of two of bits under which nearly half of the tokens fit.
- Bytes that a layer does not need, since all its tokens fit at full width, go to the blocks.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, cast

import numpy as np

from ..store.bits import padded_width
from ..store.documents import Example
from ..store.errors import UsageError
from ..store.kinds import KINDS
from ..store.manifest import Component, SparseComponent
from ..store.shapes import Int64
from ..store.sparse import entry_bytes

Training = Literal["adapter", "frozen head", "trained head", "unknown"]
"""Layers that training changed: only an adapter, and neither head nor embeddings; other layers than the head; the head; or not known."""

TokenCounts = Mapping[str, Int64[np.ndarray, " examples"]]
"""By role, the distinct tokens of each example of a sample."""

LARGE = 50_000_000  # parameters; the packs' models have up to 6 million, or 135 million
_BLOCKS_FROM = 1200
_BLOCKS_SHARE = 0.4
_BLOCKS_FROM_LARGE = 600
_BLOCKS_SHARE_LARGE = 0.5
_EMBEDDINGS_FROM = 600
_HEAD_SHARE = 0.6
_HEAD_SHARE_ADAPTED = 0.4
_LEAST_BITS = 16
_LEAST_TOKENS = 0.45
_ROW_BYTES = 8


def row_cost(component: Component, counts: TokenCounts) -> float:
    """Return the bytes of a row in a component, on average over the sample."""
    return KINDS[component.kind].rows.row_cost(component, counts.get(component.role))


def allocate(
    budget: int, candidates: Sequence[Component], counts: TokenCounts, parameters: int, training: Training = "unknown"
) -> tuple[Component, ...]:
    """Return the components that `budget` bytes an example afford, with sizes that cost at most that.

    Args:
        candidates: "head", "embeddings" and "blocks", of one model or of several, which get equal shares.
        parameters: of the largest model.
        training: what it changed.

    Raises:
        UsageError: the budget does not pay for anything.
    """
    models = sorted({component.model for component in candidates})
    if len(models) > 1:
        by_model = [[component for component in candidates if component.model == model] for model in models]
        return tuple(component for group in by_model for component in allocate(budget // len(models), group, counts, parameters, training))
    by_role = {component.role: component for component in candidates}
    large = parameters >= LARGE and by_role.keys() >= {"head", "blocks"}
    blocks_from, blocks_share = (_BLOCKS_FROM_LARGE, _BLOCKS_SHARE_LARGE) if large else (_BLOCKS_FROM, _BLOCKS_SHARE)
    roles: tuple[str, ...] = ("head",) if large else ("head", "embeddings")
    if large and training == "adapter" and budget < blocks_from:
        roles = ()
    vocabulary = [cast("SparseComponent", by_role[role]) for role in roles if role in by_role]
    rest = float(budget)
    blocks_bytes = 0.0
    if "blocks" in by_role and not vocabulary:
        blocks_bytes = rest
    elif "blocks" in by_role and rest >= blocks_from:
        blocks_bytes = blocks_share * rest
    rest -= blocks_bytes
    if len(vocabulary) == 2 and rest < _EMBEDDINGS_FROM:
        vocabulary = vocabulary[:1]
    head_share = _HEAD_SHARE_ADAPTED if training == "adapter" else _HEAD_SHARE
    shares = [head_share * rest, (1 - head_share) * rest] if len(vocabulary) == 2 else [rest] * len(vocabulary)
    components: list[Component] = []
    spare = 0.0
    for component, share in zip(vocabulary, shares, strict=True):
        sized = _with_size(component, share + (0.0 if blocks_bytes else spare), counts)
        if sized is None:
            raise UsageError(f"`bytes_per_example` {budget} does not pay for one token of the {component.name}; give some hundreds")
        components.append(sized)
        spare += share - row_cost(sized, counts)
    if blocks_bytes:
        bits = int(blocks_bytes + max(0.0, spare) - _ROW_BYTES) * 8
        if bits < 1:
            raise UsageError(f"`bytes_per_example` {budget} does not pay for one coordinate; give some hundreds")
        components.append(by_role["blocks"].model_copy(update={"coordinates": bits, "dtype": "1bit"}))
    return tuple(components)


def _with_size(component: SparseComponent, budget: float, counts: TokenCounts) -> SparseComponent | None:
    """Return a sparse component with the bits and tokens that fit into a budget; None if not one token fits."""
    tokens = counts[component.role]
    bits = padded_width(component.width, 1)
    while True:
        limit = _token_limit((budget - _ROW_BYTES) / entry_bytes(component, bits), tokens)
        if limit is None or limit >= _LEAST_TOKENS * tokens.mean() or bits <= _LEAST_BITS:
            return None if limit == 0 else component.model_copy(update={"bits": bits, "max_tokens": limit})
        bits //= 2


def _token_limit(entries: float, tokens: Int64[np.ndarray, " examples"]) -> int | None:
    """Return the largest limit of an example's tokens under which they are at most `entries` on average; None if none is needed."""
    if tokens.mean() <= entries:
        return None
    limits = np.arange(1, tokens.max() + 1)
    means = np.minimum(tokens[None], limits[:, None]).mean(axis=1)
    return int(np.searchsorted(means, entries, side="right"))


def count_tokens(examples: Sequence[Example]) -> dict[str, Int64[np.ndarray, " examples"]]:
    """Count, for texts, the distinct tokens that each predicts (head) and reads (embeddings); the last token is only predicted."""
    texts = [example for example in examples if example.features is None]
    predicted = [len(np.unique(example.token_ids[1:][example.loss_mask[1:]])) for example in texts]
    read = [len(np.unique(example.token_ids[:-1])) for example in texts]
    return {"head": np.array(predicted, np.int64), "embeddings": np.array(read, np.int64)}
