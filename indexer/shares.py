"""Scores split by token: what each token of one example adds to its inner product with another's row.

A row is linear in sum_t d_t x_t^T, so that its product with a fixed vector s is a sum over positions: with M the adjoint of projection and
whitening applied to s, position t adds d_t^T M x_t. Of the head, M holds a vector for each token v that both rows have, and position t
adds sum_v d_t(v) <M_v, h_t>; of the embeddings it adds <d_t, M_(x_t)>. What the head adds belongs to the token that is predicted, all else
to the token that is read. The sums over tokens are the score, up to rounding.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ..store.documents import Example
from ..store.manifest import Layer
from ..store.sparse import SparseVectors
from .capture import Map
from .dense import DensePart
from .encoder import Encoder, backward
from .sparse import SparsePart


class DenseShares:
    """What each position adds to the products of a dense row with some vectors (a `Visitor` of a batch of one)."""

    def __init__(self, part: DensePart, vectors: Sequence[Float[np.ndarray, " dim"]]) -> None:
        self.layers: Sequence[Layer] = part.component.layers
        self.maps: Mapping[str, tuple[Map, Map]] = part.maps
        self._adjoints = {
            layer.name: torch.stack([part.adjoint(layer, vector[layer.offset : layer.offset + layer.size]) for vector in vectors])
            for layer in self.layers
        }
        self.shares: Tensor | None = None

    def __call__(self, layer: Layer, x: Float[Tensor, "batch tokens inputs"], d: Float[Tensor, "batch tokens outputs"]) -> None:
        """Add the layer's call."""
        found = ((d[0] @ self._adjoints[layer.name]) * x[0]).sum(2).double().cpu()
        self.shares = found if self.shares is None else self.shares + found


class SparseShares:
    """What each position adds to the products of a sparse row with vectors of some tokens (a `Visitor` of a batch of one).

    Args:
        vectors: each holds one row.
        inputs: the batch's.
    """

    def __init__(self, part: SparsePart, vectors: Sequence[SparseVectors], inputs: Tensor) -> None:
        self._part, self._inputs = part, inputs[0].to(part.device)
        self.layers: Sequence[Layer] = (part.layer,)
        self.maps: Mapping[str, tuple[Map, Map]] = {part.layer.name: (None, None)}
        self._wanted: list[tuple[Tensor, Tensor]] = []
        for row in vectors:
            keys = torch.from_numpy(row.keys.astype(np.int64)).to(part.device)
            self._wanted.append((keys, part.adjoint(keys, torch.from_numpy(row.vectors).to(part.device))))
        self.shares: Tensor | None = None

    def __call__(self, layer: Layer, x: Float[Tensor, "batch tokens inputs"], d: Float[Tensor, "batch tokens outputs"]) -> None:
        """Add the layer's call."""
        found = torch.stack([self._of(keys, adjoint, x[0], d[0]) for keys, adjoint in self._wanted])
        self.shares = found if self.shares is None else self.shares + found

    def _of(self, keys: Tensor, adjoint: Tensor, x: Float[Tensor, "tokens inputs"], d: Float[Tensor, "tokens outputs"]) -> Tensor:
        if not len(keys):
            return torch.zeros(len(self._inputs), dtype=torch.float64, device=d.device)
        if self._part.component.role == "head":
            return (d[:, keys] * (x @ adjoint.T)).sum(1).double()
        at = torch.searchsorted(keys, self._inputs).clamp(max=len(keys) - 1)
        return torch.where(keys[at] == self._inputs, (d * adjoint[at]).sum(1), 0.0).double()


def token_shares(
    encoder: Encoder, example: Example, vectors: Sequence[Mapping[str, np.ndarray | SparseVectors]], query: bool = False
) -> Float64[np.ndarray, "vectors tokens"]:
    """What each token of an example adds to the sums of its components' products with some vectors, all in one pass of the model.

    Args:
        vectors: each by component (all by the same), in the encoder's whitened coordinates: [dim], or the vectors of some tokens
            (ascending). Components that are not there add nothing.
        query: whether the example is a query, whose measurement and not its loss is asked about.
    """
    task = encoder.task
    batch = task.collate([example], next(encoder.model.parameters()).device)
    shares = np.zeros((len(vectors), batch.inputs.shape[1] + 1))
    visitors: dict[str, DenseShares | SparseShares] = {}
    for name in vectors[0]:
        part, own = encoder.parts[name], [vector[name] for vector in vectors]
        if isinstance(part, SparsePart):
            visitors[name] = SparseShares(part, cast("list[SparseVectors]", own), batch.inputs)
        else:
            visitors[name] = DenseShares(part, cast("list[np.ndarray]", own))
    for number, model in enumerate(encoder.models):
        asked = [visitors[s.name] for s in encoder.plan.components if s.model == number and s.name in visitors]
        if asked:
            backward(model, batch, asked, task.measurement if query else task.loss)
    for name, visitor in visitors.items():
        assert visitor.shares is not None
        part = encoder.parts[name]
        predicted = isinstance(part, SparsePart) and part.component.role == "head"
        shares[:, predicted : shares.shape[1] - 1 + predicted] += visitor.shares.cpu().numpy()
    return shares
