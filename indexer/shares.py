"""Scores split by token: what each token of one example adds to its inner product with another's row.

A row is linear in sum_t d_t x_t^T, so that its product with a fixed vector s is a sum over positions: with M the adjoint of projection and
whitening applied to s, position t adds d_t^T M x_t. Of the head, M holds a vector for each token v that both rows have, and position t
adds sum_v d_t(v) <M_v, h_t>; of the embeddings it adds <d_t, M_(x_t)>. What the head adds belongs to the token that is predicted, all else
to the token that is read. The sums over tokens are the score, up to rounding.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ..store.documents import Example
from ..store.keyed import KeyedVectors
from ..store.manifest import Layer
from .capture import Map
from .dense import DensePart
from .encoder import Encoder, backward
from .keyed import KeyedPart


class DenseShares:
    """What each position adds to the product of a dense row with a vector (a `Visitor` of a batch of one)."""

    def __init__(self, part: DensePart, vector: Float[np.ndarray, " dim"]) -> None:
        self.layers: Sequence[Layer] = part.segment.layers
        self.maps: Mapping[str, tuple[Map, Map]] = part.maps
        self._adjoint = {layer.name: part.adjoint(layer, vector[layer.offset : layer.offset + layer.size]) for layer in self.layers}
        self.shares: Tensor | None = None

    def __call__(self, layer: Layer, x: Float[Tensor, "batch tokens inputs"], d: Float[Tensor, "batch tokens outputs"]) -> None:
        """Add the layer's call."""
        found = ((d[0] @ self._adjoint[layer.name]) * x[0]).sum(1).double().cpu()
        self.shares = found if self.shares is None else self.shares + found


class KeyedShares:
    """What each position adds to the product of a keyed row with vectors of some tokens (a `Visitor` of a batch of one)."""

    def __init__(self, part: KeyedPart, vectors: KeyedVectors, inputs: Tensor) -> None:
        self._part, self._inputs = part, inputs.to(part.device)
        self.layers: Sequence[Layer] = (part.layer,)
        self.maps: Mapping[str, tuple[Map, Map]] = {part.layer.name: (None, None)}
        self._keys = torch.from_numpy(vectors.keys.astype(np.int64)).to(part.device)
        self._adjoint = part.adjoint(self._keys, torch.from_numpy(vectors.vectors).to(part.device))
        self.shares: Tensor | None = None

    def __call__(self, layer: Layer, x: Float[Tensor, "batch tokens inputs"], d: Float[Tensor, "batch tokens outputs"]) -> None:
        """Add the layer's call."""
        if not len(self._keys):
            found = torch.zeros(self._inputs.shape[1], dtype=torch.float64, device=d.device)
        elif self._part.segment.role == "head":
            found = (d[0][:, self._keys] * (x[0] @ self._adjoint.T)).sum(1).double()
        else:
            at = torch.searchsorted(self._keys, self._inputs[0]).clamp(max=len(self._keys) - 1)
            known = self._keys[at] == self._inputs[0]
            found = torch.where(known, (d[0] * self._adjoint[at]).sum(1), 0.0).double()
        self.shares = found if self.shares is None else self.shares + found


def token_shares(
    encoder: Encoder, example: Example, vectors: Mapping[str, np.ndarray | KeyedVectors], question: bool = False
) -> Float64[np.ndarray, " tokens"]:
    """What each token of an example adds to the sum of its segments' products with some vectors.

    Args:
        vectors: by segment, in the encoder's whitened coordinates: [dim], or the vectors of some tokens (ascending). Segments that are not
            there add nothing.
        question: whether the example is a question, whose measurement and not its loss is asked about.
    """
    task = encoder.task
    batch = task.collate([example], next(encoder.model.parameters()).device)
    shares = np.zeros(batch.inputs.shape[1] + 1)
    visitors: dict[str, DenseShares | KeyedShares] = {}
    for name, vector in vectors.items():
        part = encoder.parts[name]
        if isinstance(part, KeyedPart):
            assert isinstance(vector, KeyedVectors)
            visitors[name] = KeyedShares(part, vector, batch.inputs)
        else:
            assert isinstance(vector, np.ndarray)
            visitors[name] = DenseShares(part, vector)
    for number, model in enumerate(encoder.models):
        own = [visitors[s.name] for s in encoder.plan.segments if s.model == number and s.name in visitors]
        if own:
            backward(model, batch, own, task.measurement if question else task.loss)
    for name, visitor in visitors.items():
        assert visitor.shares is not None
        part = encoder.parts[name]
        predicted = isinstance(part, KeyedPart) and part.segment.role == "head"
        shares[predicted : len(shares) - 1 + predicted] += visitor.shares.cpu().numpy()
    return shares
