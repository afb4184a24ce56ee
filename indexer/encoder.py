"""The encoder: a frozen model with its projections and curvature, from examples to whitened rows.

    row = diag(l + a)^(-1/2) U^T vec(sum_t (R_o^T P_o d_t) (R_i^T P_i x_t)^T),    influence(q, i) = <row_q, row_i>

Its state is a flat dictionary of arrays (`Arrays`), which a fit (fit.py) fills pass by pass and which safetensors and Ray carry as
they are: `output_projection`, `output_rotation`, `basis` (the dense Fisher's eigenvectors, columns) and `eigenvalues` under a layer's name,
`input_projection` and `input_rotation` under the name of the group of layers that share the input. Random projections are not in it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..store.documents import Example
from ..store.errors import NumericalError
from ..store.manifest import Curvature, Layer, Projection
from .capture import GradientSum, Map, Visit, accumulation_dtype, capture
from .curvature import whitening_scale
from .projection import random_projection
from .tasks import Batch, Task, plan_batches

Progress = Callable[[int, int], None]
"""Called after each batch with the examples and the tokens that it held."""
Objective = Callable[[nn.Module, Batch], Float[Tensor, "batch"]]
"""A task's loss or measurement."""


def ignore_progress(examples: int, tokens: int) -> None:
    """A Progress for callers that need none."""


def key(name: str, array: str) -> str:
    """Where a layer's (or input group's) array lies in the state; `blocks` is the segment."""
    return f"blocks/{name}/{array}"


@dataclass(frozen=True)
class EncoderPlan:
    """All that an encoder is besides the model and its arrays.

    Attributes:
        layers: the tracked layers, in row order.
        projection, curvature: as in the manifest; `curvature.damping` is relative to each layer's mean eigenvalue.
        batch_tokens: padded tokens in a batch, at most (but one example may exceed it alone).
    """

    layers: tuple[Layer, ...]
    projection: Projection
    curvature: Curvature
    batch_tokens: int

    @property
    def dim(self) -> int:
        """Coordinates of a row."""
        return self.layers[-1].offset + self.layers[-1].size


@dataclass(frozen=True)
class Encoder:
    """Whitened rows of examples under one model.

    Attributes:
        task: what the model is asked.
        model: frozen, on its device.
        plan: which layers, how projected and whitened.
        arrays: the state; rows need every pass of the fit in it.
    """

    task: Task
    model: nn.Module
    plan: EncoderPlan
    arrays: Mapping[str, np.ndarray]

    def rows(
        self, examples: Sequence[Example], progress: Progress = ignore_progress, questions: bool = False
    ) -> Float[np.ndarray, "rows dim"]:
        """Whitened rows, in the examples' order; float32 (float64 for a float64 model).

        Args:
            questions: whether these are of the task's measurement, to be compared with rows of its loss.

        The same examples always share the same batches, so the rows are the same bits on the same machine and thread count.

        Raises:
            NumericalError: a loss or a row is not finite; names the example.
        """
        rows = torch.zeros((len(examples), self.plan.dim), dtype=self._accumulate)
        objective = self.task.measurement if questions else self.task.loss
        for chosen, batch in batches(self.task, examples, self.plan.batch_tokens, self._device):
            gradients = GradientSum()
            backward(self.model, batch, self.plan.layers, self.maps, gradients, objective)
            block = torch.zeros((len(chosen), self.plan.dim), dtype=self._accumulate)
            for layer in self.plan.layers:
                if layer.name in gradients.by_layer:
                    whitened = self._whiten(layer, gradients.by_layer[layer.name])
                    block[:, layer.offset : layer.offset + layer.size] = whitened.to("cpu")
            check_finite(block, batch, "gradient")
            rows[chosen] = block
            progress(len(chosen), int(batch.valid.sum()))
        return rows.numpy()

    @cached_property
    def maps(self) -> dict[str, tuple[Map, Map]]:
        """Layer name -> (input map, output map) in the model's dtype: the projection, then the rotation into the Kronecker eigenbasis.

        Layers with the same input and map hold the same object, by which the capture projects that input once.
        """
        shared: dict[tuple[str, bool], Map] = {}
        maps = {}
        for layer in self.plan.layers:
            rotated = key(layer.name, "output_rotation") in self.arrays
            at = (layer.input_group, rotated)
            if at not in shared:
                shared[at] = self._map(layer.input_group, "input", layer.input_rank, layer.inputs, rotated)
            maps[layer.name] = shared[at], self._map(layer.name, "output", layer.output_rank, layer.outputs, rotated)
        return maps

    def _map(self, name: str, side: str, rank: int, size: int, rotated: bool) -> Map:
        if self.plan.projection.kind == "pca":
            projection = self.arrays.get(key(name, f"{side}_projection"))
        else:
            projection = random_projection(name, side, rank, size, self.plan.projection.seed)
        if rotated:
            rotation = self.arrays[key(name, f"{side}_rotation")].T
            projection = rotation if projection is None else rotation @ projection
        if projection is None:
            return None
        return torch.from_numpy(np.ascontiguousarray(projection)).to(self._device, next(self.model.parameters()).dtype)

    def _whiten(self, layer: Layer, gradient: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        whitener = self._whiteners[layer.name]
        if whitener is None:
            return gradient
        return gradient * whitener if whitener.dim() == 1 else gradient @ whitener

    @cached_property
    def _whiteners(self) -> dict[str, Tensor | None]:
        whiteners: dict[str, Tensor | None] = {}
        for layer in self.plan.layers:
            eigenvalues = self.arrays.get(key(layer.name, "eigenvalues"))
            if eigenvalues is None:
                whiteners[layer.name] = None
                continue
            scale = whitening_scale(eigenvalues, self.plan.curvature.damping)
            basis = self.arrays.get(key(layer.name, "basis"))
            matrix = scale if basis is None else basis * scale
            whiteners[layer.name] = torch.from_numpy(matrix).to(self._device, self._accumulate)
        return whiteners

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def _accumulate(self) -> torch.dtype:
        return accumulation_dtype(next(self.model.parameters()).dtype)


def batches(task: Task, examples: Sequence[Example], token_budget: int, device: torch.device) -> Iterator[tuple[list[int], Batch]]:
    """Length-bucketed batches with the positions of their examples."""
    for chosen in plan_batches([e.tokens for e in examples], token_budget):
        yield chosen, task.collate([examples[i] for i in chosen], device)


def backward(
    model: nn.Module,
    batch: Batch,
    layers: Sequence[Layer],
    maps: Mapping[str, tuple[Map, Map]],
    visit: Visit,
    objective: Objective,
) -> Float[Tensor, " batch"]:
    """One forward and backward pass of a task's loss or measurement with the capture open; returns its values (nats).

    Raises:
        NumericalError: a loss is not finite; names the example.
    """
    with capture(model, layers, maps, (batch.valid.shape[0], batch.valid.shape[1]), visit):
        losses = objective(model, batch)
        check_finite(losses.detach()[:, None], batch, "loss")
        losses.sum().backward()
    return losses.detach()


def check_finite(values: Float[Tensor, "batch n"], batch: Batch, what: str) -> None:
    """Raise a NumericalError that names the first example with a value that is not finite."""
    finite = torch.isfinite(values).all(dim=1)
    if not bool(finite.all()):
        id = batch.ids[int(finite.to(torch.int8).argmin())]
        raise NumericalError(
            f"the {what} of example {id!r} is not finite under this model; try --dtype float32, or look for broken weights with a "
            "plain evaluation of that text"
        )
