"""Rows of queries for SOURCE over several checkpoints: the last model's gradients, carried back through the segments of training.

With S_l = exp(-t_l H_l), what segment l adds is scored with S_{l+1} ... S_L times the query's gradient under the last model (Bae et al.,
arXiv 2405.12186, equation 14). H_l is the curvature of the component of checkpoint l, in its own eigenbasis. Dense components are carried
by whole gradients, sparse ones token by token.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .indexer.encoder import Encoder, EncoderSettings
from .query.source import learning_times
from .store.documents import Example
from .store.errors import UsageError
from .store.index import Index
from .store.vectors import join

_GRADIENT_BYTES = 1 << 30  # of whole gradients in memory at once; but one at least


def carried_rows(index: Index, encoder: Encoder, training: str, examples: Sequence[Example], queries: bool = True) -> dict[str, Any]:
    """Compute the whitened rows of some queries for each segment's component, with all tokens.

    Args:
        encoder: of the index.
        training: see `ScoreOptions`.
        queries: they are queries, and not rows of the index.

    Raises:
        UsageError: a component is a random projection, or checkpoints track other layers than the last.
    """
    components = encoder.settings.components
    last = [component for component in components if component.model == len(encoder.models) - 1]
    chains = {component.name: [other for other in components if other.role == component.role] for component in last}
    for component in last:
        chain = chains[component.name]
        if len(chain) != len(encoder.models) or any(other.layer_names != component.layer_names for other in chain):
            raise UsageError("the checkpoints of this index track different layers; SOURCE needs the same of each")
    plain = [encoder.component_encoders[component.name].plain_component() for component in last]
    settings = EncoderSettings(tuple(component for component, _ in plain), encoder.settings.batch_tokens)
    arrays = {f"{component.name}/{name}": array for component, own in plain for name, array in own.items()}
    final = replace(encoder, models=encoder.models[-1:], settings=settings, arrays=arrays)
    widths = [component.dim for component in settings.components if component.has_wide_rows]
    size = max(1, _GRADIENT_BYTES // (8 * max(widths))) if widths else max(1, len(examples))
    parts = []
    for first in range(0, len(examples), size):
        encoded = final.rows(examples[first : first + size], queries=queries, exact=True)
        part = {}
        for component in last:
            carried: Any = encoder.component_encoders[component.name].plain_gradients(encoded[component.name])
            for other in reversed(chains[component.name]):
                segment = encoder.component_encoders[other.name]
                part[other.name] = segment.whitened(carried)
                carried = segment.decayed(carried, learning_times(index, other, training))
        parts.append(part)
    return dict(join(parts))
