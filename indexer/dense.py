"""Dense components: projected, whitened gradients of linear layers.

    row = diag(l + a)^(-1/2) U^T vec(sum_t (R_o^T P_o d_t) (R_i^T P_i x_t)^T),    influence(q, j) = <row_q, row_j>

For each layer, at token t, x_t is its input and d_t the gradient of the loss in its output. P_o and P_i are projections (LoGra, Choe et
al., arXiv 2405.13954), R_o and R_i rotations into the eigenbasis of the Kronecker factors, U and l eigenvectors and eigenvalues of the
curvature, and a is the damping times the mean of l. vec puts one row of the matrix (one output) after the other.

The arrays are `output_projection`, `output_rotation`, `basis` (the dense Fisher's eigenvectors, columns) and `eigenvalues` under a layer's
name, `input_projection` and `input_rotation` under the name of the group of layers that share the input, which is that of the group's first
layer. Random projections are not among them.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from ..store.manifest import DenseComponent, Layer
from ..store.shapes import Float
from ..store.vectors import DenseVectors
from .batches import Batch
from .capture import GradientSum, Map, accumulation_dtype
from .curvature import whitening_scale
from .models import layer_device, layer_sizes
from .projection import random_projection


class DenseEncoder:
    """Computation of a dense component's rows.

    Args:
        component: the layers, projection and curvature (`damping` is relative to each layer's mean eigenvalue).
        arrays: `<layer or input group>/<array>`, as far as the fit has computed them. A layer without `eigenvalues` is not whitened. What
            is derived from them is cached, so that each pass of the fit has its own encoder.
        model: contains the layers.
    """

    def __init__(self, component: DenseComponent, arrays: Mapping[str, np.ndarray], model: nn.Module) -> None:
        self.component = component
        self.layers = component.layers
        self.arrays = arrays
        self._devices = {name: layer_device(model, name) for name in component.layer_names}
        self._dtype = next(model.parameters()).dtype

    undivided = False
    """Whether rows need the gradients of all logits at once."""

    def matches(self, layer: Layer, module: nn.Module) -> bool:
        """Return True if a module is linear and has the layer's sizes."""
        return layer_sizes(module) == (layer.outputs, layer.inputs)

    def collector(self, batch: Batch) -> "DenseCollector":
        """Return the callback of `capture` that sums one batch's gradients."""
        return DenseCollector(self, len(batch.ids))

    @cached_property
    def maps(self) -> dict[str, tuple[Map, Map]]:
        """Layer name -> (input map, output map) in the model's dtype: the projection, then the rotation into the Kronecker eigenbasis.

        Layers with the same input and map share one object, so that the capture projects that input once.
        """
        shared: dict[tuple[str, bool], Map] = {}
        maps = {}
        for layer in self.layers:
            rotated = f"{layer.name}/output_rotation" in self.arrays
            group = (layer.input_group, rotated)
            if group not in shared:
                shared[group] = self._map(layer.input_group, "input", layer.input_rank, layer.inputs, rotated)
            maps[layer.name] = shared[group], self._map(layer.name, "output", layer.output_rank, layer.outputs, rotated)
        return maps

    def _map(self, name: str, side: str, rank: int, size: int, rotated: bool) -> Map:
        if self.component.projection.kind == "pca":
            projection = self.arrays.get(f"{name}/{side}_projection")
        else:
            projection = random_projection(name, side, rank, size, self.component.projection.seed)
        if rotated:
            rotation = self.arrays[f"{name}/{side}_rotation"].T
            projection = rotation if projection is None else rotation @ projection
        if projection is None:
            return None
        return torch.from_numpy(np.ascontiguousarray(projection)).to(self._devices[name], self._dtype)

    def _whiten(self, layer: Layer, gradient: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        whitener = self._whiteners[layer.name]
        if whitener is None:
            return gradient
        return gradient * whitener if whitener.dim() == 1 else gradient @ whitener

    def adjoint(self, layer: Layer, vector: Float[np.ndarray, " n"]) -> Float[Tensor, "out_rank in_rank"]:
        """Return the matrix whose product with a layer's gradient is the product of the layer's coordinates of a row with a vector.

        The gradient is sum_t d_t x_t^T after `maps`. The matrix is on the layer's device, in float32, or float64 for a float64 model.
        """
        whitener = self._whiteners[layer.name]
        values = torch.from_numpy(vector).to(self._devices[layer.name], accumulation_dtype(self._dtype))
        if whitener is not None:
            values = values * whitener if whitener.dim() == 1 else whitener @ values
        return values.reshape(layer.output_rank, layer.input_rank)

    @cached_property
    def _whiteners(self) -> dict[str, Tensor | None]:
        """By layer: scales [n] for a diagonal curvature in its basis, a matrix [n, n] for the dense Fisher, None for the identity."""
        whiteners: dict[str, Tensor | None] = {}
        for layer in self.layers:
            eigenvalues = self.arrays.get(f"{layer.name}/eigenvalues")
            if eigenvalues is None:
                whiteners[layer.name] = None
                continue
            scale = whitening_scale(eigenvalues, self.component.curvature.damping)
            basis = self.arrays.get(f"{layer.name}/basis")
            whitener = scale if basis is None else basis * scale
            whiteners[layer.name] = torch.from_numpy(whitener).to(self._devices[layer.name], accumulation_dtype(self._dtype))
        return whiteners


class DenseCollector(GradientSum):
    """Callback of `capture` that sums a batch's gradients, from which `rows` computes the rows."""

    sums_examples = False

    def __init__(self, encoder: DenseEncoder, examples: int) -> None:
        super().__init__()
        self._encoder = encoder
        self._examples = examples
        self.layers: Sequence[Layer] = encoder.layers
        self.maps: Mapping[str, tuple[Map, Map]] = encoder.maps

    def rows(self) -> DenseVectors:
        """Return the batch's whitened rows [examples, dim], once. A layer that was not called contributes zeros."""
        encoder = self._encoder
        values = torch.zeros((self._examples, encoder.component.dim), dtype=accumulation_dtype(encoder._dtype))
        for layer in encoder.layers:
            gradient = self.by_layer.pop(layer.name, None)  # all are as large as the rows
            if gradient is not None:
                values[:, layer.offset : layer.offset + layer.size] = encoder._whiten(layer, gradient).to("cpu")
        return DenseVectors(values.numpy())
