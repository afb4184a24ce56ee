"""Scores split by token: the share of each token of one example in its inner product with another's row.

A row is linear in sum_t d_t x_t^T, so its product with a fixed vector s is a sum over positions: with M the adjoint of projection and
whitening applied to s, position t adds d_t^T M x_t. For the head, M has a vector for each token v that both rows have, and position t
adds sum_v d_t(v) <M_v, h_t>; for the embeddings it adds <d_t, M_(x_t)>. The head's shares belong to the predicted token, all others to the
input token. The sums over tokens are the score, up to rounding.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..store.documents import Example
from ..store.manifest import Layer
from ..store.shapes import Float, Float64
from ..store.vectors import DenseVectors, Rows, SparseVectors
from .batches import Batch
from .capture import Inputs, Map, OutputGradient
from .dense import DenseEncoder
from .encoder import Encoder, backward
from .sparse import SparseEncoder
from .tasks import LOSS, MEASUREMENT


class DenseShares:
    """Visitor that splits the products of a dense row with others, of one row each, by position, for the inputs of a batch of one."""

    sums_examples = False

    predicted = False  # shares belong to the tokens that are read

    def __init__(self, encoder: DenseEncoder, other_rows: Sequence[DenseVectors], inputs: Tensor) -> None:
        vectors = [other.values[0] for other in other_rows]
        self.layers: Sequence[Layer] = encoder.component.layers
        self.maps: Mapping[str, tuple[Map, Map]] = encoder.maps
        self._adjoints = {
            layer.name: torch.stack([encoder.adjoint(layer, vector[layer.offset : layer.offset + layer.size]) for vector in vectors])
            for layer in self.layers
        }
        self.shares = torch.zeros((len(other_rows), inputs.shape[1]), dtype=torch.float64)

    def __call__(self, layer: Layer, x: Float[Tensor, "batch tokens inputs"], d: OutputGradient, chunk: Batch) -> None:
        """Add the layer's call."""
        shares = ((d.values[0] @ self._adjoints[layer.name]) * x[0]).sum(2).double().cpu()
        self.shares[:, chunk.first : chunk.first + shares.shape[1]] += shares


class SparseShares:
    """Visitor that splits the products of a sparse row with others, of one row each, by position, for the inputs of a batch of one."""

    sums_examples = False

    def __init__(self, encoder: SparseEncoder, other_rows: Sequence[SparseVectors], inputs: Tensor) -> None:
        self.predicted = encoder.component.role == "head"
        self._encoder = encoder
        self.layers: Sequence[Layer] = (encoder.layer,)
        self.maps: Mapping[str, tuple[Map, Map]] = {encoder.layer.name: (None, None)}
        self._adjoints: list[tuple[Tensor, Tensor]] = []
        for row in other_rows:
            keys = torch.from_numpy(row.keys.astype(np.int64)).to(encoder.device)
            self._adjoints.append((keys, encoder.adjoint(keys, torch.from_numpy(row.vectors).to(encoder.device))))
        self.shares = torch.zeros((len(other_rows), inputs.shape[1]), dtype=torch.float64)

    def __call__(self, layer: Layer, x: Inputs, d: OutputGradient, chunk: Batch) -> None:
        """Add the layer's call."""
        shares = torch.stack([self._product(keys, adjoint, x[0], d) for keys, adjoint in self._adjoints])
        self.shares[:, chunk.first : chunk.first + shares.shape[1]] += shares.cpu()

    def _product(self, keys: Tensor, adjoint: Tensor, x: Tensor, d: OutputGradient) -> Tensor:
        if not len(keys):
            return torch.zeros(len(x), dtype=torch.float64, device=x.device)
        if self._encoder.component.role == "head":
            return (d.columns(keys[None])[0] * (x @ adjoint.T)).sum(1).double()
        positions = torch.searchsorted(keys, x).clamp(max=len(keys) - 1)
        return torch.where(keys[positions] == x, (d.values[0] * adjoint[positions]).sum(1), 0.0).double()


SHARES: dict[str, type[DenseShares] | type[SparseShares]] = {"dense": DenseShares, "sparse": SparseShares}
"""By kind of component."""


def token_shares(
    encoder: Encoder, example: Example, other_rows: Sequence[Rows], query: bool = False
) -> Float64[np.ndarray, "others tokens"]:
    """Split the sums of an example's products with other rows by the example's tokens, in one pass of the model.

    Args:
        other_rows: of one row each, with the same components, in the encoder's whitened coordinates; sparse rows have ascending tokens.
            Absent components add nothing.
        query: use the task's measurement instead of its loss.
    """
    task = encoder.task
    batch = task.collate([example], next(encoder.model.parameters()).device)
    shares = np.zeros((len(other_rows), batch.inputs.shape[1] + 1))
    visitors: dict[str, DenseShares | SparseShares] = {}
    for name in other_rows[0]:
        component_encoder = encoder.component_encoders[name]
        vectors = [other[name] for other in other_rows]
        visitors[name] = SHARES[component_encoder.component.kind](component_encoder, vectors, batch.inputs)  # type: ignore[arg-type]
    for number, model in enumerate(encoder.models):
        active = [visitors[c.name] for c in encoder.settings.components if c.model == number and c.name in visitors]
        if active:
            backward(task, model, batch, active, MEASUREMENT if query else LOSS)
    for visitor in visitors.values():
        first = int(visitor.predicted)
        shares[:, first : shares.shape[1] - 1 + first] += visitor.shares.numpy()
    return shares
