"""Dense components: projected, whitened gradients of linear layers.

    row = diag(l + a)^(-1/2) U^T vec(sum_t (R_o^T P_o d_t) (R_i^T P_i x_t)^T),    influence(q, j) = <row_q, row_j>

For each layer, at token t, x_t is its input and d_t the gradient of the loss in its output. P_o and P_i are projections (LoGra, Choe et
al., arXiv 2405.13954), R_o and R_i rotations into the eigenbasis of the Kronecker factors, U and l eigenvectors and eigenvalues of the
curvature, and a is the damping times the mean of l. vec puts one row of the matrix (one output) after the other.

The arrays are `output_projection`, `output_rotation`, `basis` (the dense Fisher's eigenvectors, columns) and `eigenvalues` under a layer's
name, `input_projection` and `input_rotation` under the name of the group of layers that share the input, which is that of the group's first
layer. Random projections are not among them. Where gradients are scaled by the optimizer's moments (moments.py), these are among them, the
scales of second moments are part of the projections, and every layer is its own group.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..store.errors import UsageError
from ..store.manifest import DenseComponent, Layer
from ..store.shapes import Float, Float64, Int
from ..store.vectors import DenseVectors
from .batches import IGNORED, Batch
from .capture import GradientSum, Map, accumulation_dtype
from .curvature import lost_share, whitening_scale
from .models import layer_device, layer_sizes
from .moments import adam_step
from .projection import random_projection
from .transfer import start_copy


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
    """True if all logits' gradients are needed at once."""

    def matches(self, layer: Layer, module: nn.Module) -> bool:
        """Return True if a module is linear and has the layer's sizes."""
        return layer_sizes(module) == (layer.outputs, layer.inputs)

    def collector(self, batch: Batch, query: bool) -> "DenseCollector":
        """Return the callback of `capture` that sums one batch's gradients.

        Args:
            query: they are of queries, which are never Adam's steps.
        """
        return DenseCollector(self, batch, as_adam_step=self.component.optimizer == "adam-step" and not query)

    @cached_property
    def maps(self) -> dict[str, tuple[Map, Map]]:
        """Layer name -> (input map, output map) in the model's dtype: the projection, then the rotation into the Kronecker eigenbasis.

        Layers with the same input and map share one object, so that the capture projects that input once.
        """
        shared: dict[tuple[str, bool], Map] = {}
        maps = {}
        for layer in self.layers:
            rotated = f"{layer.name}/output_rotation" in self.arrays
            group = (layer.input_group, rotated)  # with scales, each layer is its own
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
        if self.component.scales_sides:
            scale = self.arrays[f"{name}/{side}_scale"]
            projection = np.diag(scale) if projection is None else projection * scale
        if projection is None:
            return None
        return torch.from_numpy(np.ascontiguousarray(projection)).to(self._devices[name], self._dtype)

    def whiten(self, layer: Layer, gradient: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        """Whiten gradients of a layer after `maps`."""
        whitener = self._whiteners[layer.name]
        if whitener is None:
            return gradient
        gradient = gradient.to(whitener.device, whitener.dtype)
        return gradient * whitener if whitener.dim() == 1 else gradient @ whitener

    def adam_step(
        self, layer: Layer, gradient: Float[Tensor, "batch weights"], predicted: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch size"]:
        """Return the coordinates of Adam's step for each example alone, before `whiten`.

        Args:
            gradient: of the sum of the losses of an example's predicted tokens, whose number is `predicted`.
        """
        first, second = (
            torch.from_numpy(self.arrays[f"{layer.name}/{name}"]).to(gradient).flatten() for name in ("first_moment", "second_moment")
        )
        mean = gradient / predicted.to(gradient).clamp(min=1)[:, None]
        step = adam_step(mean, first, second, self.arrays["adam"].tolist()).unflatten(1, (layer.outputs, layer.inputs))
        input_map, output_map = self.maps[layer.name]
        step = step if input_map is None else step @ input_map.T.to(step)
        step = step if output_map is None else output_map.to(step) @ step
        return step.flatten(1)

    def adjoint(self, layer: Layer, vector: Float[np.ndarray, " n"]) -> Float[Tensor, "out_rank in_rank"]:
        """Return the matrix whose product with a layer's gradient is the product of the layer's coordinates of a row with a vector.

        The gradient is sum_t d_t x_t^T after `maps`. The matrix is on the layer's device, in float32, or float64 for a float64 model.
        """
        whitener = self._whiteners[layer.name]
        values = torch.from_numpy(vector).to(self._devices[layer.name], accumulation_dtype(self._dtype))
        if whitener is not None:
            values = values * whitener if whitener.dim() == 1 else whitener @ values
        return values.reshape(layer.output_rank, layer.input_rank)

    def plain_component(self) -> tuple[DenseComponent, Mapping[str, np.ndarray]]:
        """Return a component of the same layers' plain gradients, and its arrays, for an encoder of this model alone.

        Raises:
            UsageError: the component's rows are not of plain gradients.
        """
        if self.component.optimizer not in (None, "preconditioner") or self.component.unit_length:
            raise UsageError(
                f"the rows of {self.component.name} are scaled gradients (`optimizer` or `unit_length` of the build); segments of training "
                "and refined queries need plain ones"
            )
        layers = []
        offset = 0
        for layer in self.layers:
            sizes = {"input_rank": layer.inputs, "output_rank": layer.outputs, "curvature": "identity", "offset": offset}
            layers.append(layer.model_copy(update=sizes))
            offset += layers[-1].size
        rank = max(max(layer.inputs, layer.outputs) for layer in layers)
        projection = self.component.projection.model_copy(update={"kind": "random", "rank": rank})
        update = {"model": 0, "layers": tuple(layers), "projection": projection, "coordinates": None, "optimizer": None}
        return self.component.model_copy(update=update), {}

    def plain_gradients(self, rows: DenseVectors) -> DenseVectors:
        """Return the gradients that rows of `plain_component` are, in float64."""
        return DenseVectors(rows.values.astype(np.float64))

    def whitened(self, gradients: DenseVectors) -> DenseVectors:
        """Compute the rows of plain gradients."""
        rows = np.zeros((len(gradients), self.component.dim), np.float32)
        for layer, _, projected in self._projected(gradients):
            rows[:, layer.offset : layer.offset + layer.size] = self.whiten(layer, projected.flatten(1)).float().cpu().numpy()
        return DenseVectors(rows)

    def decayed(self, gradients: DenseVectors, times: Float64[np.ndarray, " layers"]) -> DenseVectors:
        """Multiply plain gradients with exp(-t H), for the curvature H of each layer and its learning time t.

        Raises:
            UsageError: the component is a random projection.
        """
        factors = [-lost_share(eigenvalues, time) for eigenvalues, time in zip(self._eigenvalues(), times, strict=True)]
        return self._changed(gradients, factors)

    def solved(self, gradients: DenseVectors, damping: Float64[np.ndarray, " layers"]) -> DenseVectors:
        """Multiply plain gradients with (H + a)^-1, for the curvature H of each layer and its damping a.

        Raises:
            UsageError: the component is a random projection, or has no curvature.
        """
        factors = [a / (eigenvalues + a) - 1 for eigenvalues, a in zip(self._eigenvalues(), damping, strict=True)]
        changed = self._changed(gradients, factors)
        return DenseVectors(changed.values / self.by_coordinate(damping).numpy())

    def equation_layers(self) -> tuple[Layer, ...]:
        """Return the layers of the equation that refined queries solve, without projection."""
        return self.plain_component()[0].layers

    def whole_component(self) -> tuple[DenseComponent, Mapping[str, np.ndarray]]:
        """Return a component whose rows hold the whole gradients of the equation's layers; see `plain_component`.

        Raises:
            UsageError: the curvature is of scaled weights.
        """
        if self.component.optimizer:
            raise UsageError(
                f"the curvature of {self.component.name} is of scaled weights (`optimizer`), and refined queries need plain ones"
            )
        return self.plain_component()

    def whole_gradients(self, rows: DenseVectors) -> DenseVectors:
        """Return the gradients that rows of `whole_component` hold, in float64."""
        return self.plain_gradients(rows)

    def mean_eigenvalues(self) -> Float64[np.ndarray, " layers"]:
        """Return the mean eigenvalue of each layer over all of its weights: those that a projection leaves out count as 0."""
        shares = [layer.size / (layer.outputs * layer.inputs) for layer in self.layers]
        return np.array([values.mean() * share for values, share in zip(self._eigenvalues(), shares, strict=True)])

    def by_coordinate(self, values: Float64[np.ndarray, " layers"]) -> Float64[Tensor, " parameters"]:
        """Repeat a value of each layer for each of its weights."""
        return torch.from_numpy(np.repeat(values, [layer.outputs * layer.inputs for layer in self.layers]))

    def rows_of_solved(self, gradients: DenseVectors, changed: Callable[[Any], Any]) -> DenseVectors:
        """Compute rows whose products with whitened rows are those of solved gradients with plain ones.

        Args:
            changed: function that multiplies rows with the factors that the products will have.
        """
        damped = [eigenvalues + self.component.curvature.damping * eigenvalues.mean() for eigenvalues in self._eigenvalues()]
        factors = np.concatenate(damped)
        change = changed(DenseVectors(np.ones((1, len(factors))))).values[0]
        factors = np.divide(factors, change, out=np.zeros_like(factors), where=change > 0)
        return DenseVectors((self.whitened(gradients).values * factors).astype(np.float32))

    def _eigenvalues(self) -> list[Float64[np.ndarray, " n"]]:
        """The eigenvalues of each layer."""
        try:
            return [self.arrays[f"{layer.name}/eigenvalues"].astype(np.float64) for layer in self.layers]
        except KeyError as error:
            raise UsageError(f"the rows of {self.component.name} have no curvature (`curvature` identity)") from error

    def _changed(self, gradients: DenseVectors, factors: Sequence[Float64[np.ndarray, " _n"]]) -> DenseVectors:
        """Compute g + U (f U^T g) for plain gradients g, with the eigenvectors U of the curvature of each layer and a factor for each."""
        changed = gradients.values.copy()
        for factor, (layer, part, projected) in zip(factors, self._projected(gradients), strict=True):
            narrowed = layer.input_rank < layer.inputs or layer.output_rank < layer.outputs
            if narrowed and self.component.projection.kind == "random":
                raise UsageError(
                    f"the rows of {self.component.name} are a random projection, which has no inverse; this needs principal components "
                    "(`projection=pca`) or whole layers"
                )
            scale = torch.from_numpy(factor)
            basis = self.arrays.get(f"{layer.name}/basis")
            vectors = None if basis is None else torch.from_numpy(basis.astype(np.float64))
            flat = projected.flatten(1)
            change = flat * scale if vectors is None else ((flat @ vectors) * scale) @ vectors.T
            input_map, output_map = self._double_maps(layer)
            change = change.reshape(projected.shape)
            if self.component.scales_sides:  # back from scaled weights: the maps are orthogonal times the scales
                input_map, output_map = (self._unscaled(layer, side, of) for side, of in (("input", input_map), ("output", output_map)))
            change = change if output_map is None else output_map.T @ change
            change = change if input_map is None else change @ input_map
            changed[:, part] += change.flatten(1).numpy()
        return DenseVectors(changed)

    def _projected(self, gradients: DenseVectors) -> Iterator[tuple[Layer, slice, Float64[Tensor, "rows out_rank in_rank"]]]:
        """Yield each layer, its part of plain gradients, and these after `maps`."""
        first = 0
        for layer in self.layers:
            part = slice(first, first + layer.outputs * layer.inputs)
            first = part.stop
            values = torch.from_numpy(gradients.values[:, part].reshape(len(gradients), layer.outputs, layer.inputs))
            input_map, output_map = self._double_maps(layer)
            values = values if input_map is None else values @ input_map.T
            yield layer, part, values if output_map is None else output_map @ values

    def _unscaled(self, layer: Layer, side: str, map_: Map) -> Map:
        """Divide a map with a scale by the scale's squares, so that its transpose is its inverse; 0 where the scale is 0."""
        scale = torch.from_numpy(self.arrays[f"{layer.name}/{side}_scale"].astype(np.float64))
        return None if map_ is None else map_ * torch.where(scale > 0, scale, torch.inf) ** -2

    def _double_maps(self, layer: Layer) -> tuple[Map, Map]:
        input_map, output_map = (None if side is None else side.double().cpu() for side in self.maps[layer.name])
        return input_map, output_map

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

    def __init__(self, encoder: DenseEncoder, batch: Batch, as_adam_step: bool) -> None:
        super().__init__()
        self._encoder = encoder
        self._examples = len(batch.ids)
        self._predicted = (batch.targets != IGNORED).sum(1) if as_adam_step else None
        self.layers: Sequence[Layer] = encoder.layers
        unprojected: dict[str, tuple[Map, Map]] = {layer.name: (None, None) for layer in encoder.layers}
        self.maps: Mapping[str, tuple[Map, Map]] = unprojected if as_adam_step else encoder.maps

    def rows(self, coded: bool = False) -> Callable[[], DenseVectors]:
        """Start to copy the batch's whitened rows [examples, dim] to the host, once; the returned function waits for them.

        A layer that was not called contributes zeros. Dense rows are coded on the host, also if they are `coded`.
        """
        encoder = self._encoder
        copies: list[tuple[Layer, Callable[[], Tensor]]] = []
        for layer in encoder.layers:
            gradient = self.by_layer.pop(layer.name, None)  # all are as large as the rows
            if gradient is not None:
                if self._predicted is not None:
                    gradient = encoder.adam_step(layer, gradient, self._predicted)
                copies.append((layer, start_copy(encoder.whiten(layer, gradient))))

        def finish() -> DenseVectors:
            values = torch.zeros((self._examples, encoder.component.dim), dtype=accumulation_dtype(encoder._dtype))
            while copies:
                layer, copied = copies.pop()
                values[:, layer.offset : layer.offset + layer.size] = copied()
            if encoder.component.unit_length:
                lengths = torch.linalg.vector_norm(values, dim=1, keepdim=True)
                values /= torch.where(lengths > 0, lengths, 1.0)
            return DenseVectors(values.numpy())

        return finish
