"""The encoder: frozen models with what each component of a row needs, from examples to whitened rows, in one pass of each model.

A component's part (dense.py, sparse.py) says which layers it tracks and through which maps, and gets a collector for every batch, which is
visited with their inputs and output gradients and then gives the batch's rows. An encoder's state is a flat dictionary of arrays (`Arrays`)
under `<component>/...`, which a fit (fit.py) fills pass by pass and which safetensors and Ray carry as they are.

When only the output head is tracked, autograd's graph starts at the head's output: there is no backward pass through the model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..store.documents import Example
from ..store.errors import IntegrityError, NumericalError
from ..store.manifest import DenseComponent, Layer, SparseComponent
from ..store.sparse import SparseVectors, concatenate
from .capture import Map, capture
from .dense import DensePart
from .hidden import HiddenMeans
from .models import layer_device, layer_sizes
from .sparse import SparsePart, vocabulary_layer
from .tasks import Batch, Task

Progress = Callable[[int, int], None]
"""Called after each batch with the examples and the tokens that it held."""
Objective = Callable[[nn.Module, Batch], Float[Tensor, "batch"]]
"""A task's loss or measurement."""
BatchRows = Mapping[str, np.ndarray | SparseVectors]
"""A batch's rows, by component; under "losses" its examples' losses (or measurements) under the last model, and under "hidden" their mean
hidden states, where these are kept."""


def ignore_progress(examples: int, tokens: int) -> None:
    """A Progress for callers that need none."""


class Visitor(Protocol):
    """What is visited in a pass: rows being made, or statistics being summed."""

    layers: Sequence[Layer]
    maps: Mapping[str, tuple[Map, Map]]

    def __call__(self, layer: Layer, x: Float[Tensor, "batch tokens in_rank"], d: Float[Tensor, "batch tokens out_rank"]) -> None:
        """One call of one layer."""


@dataclass(frozen=True)
class EncoderPlan:
    """All that an encoder is besides the model and its arrays.

    Attributes:
        components: of a row, as in the manifest.
        batch_tokens: padded tokens in a batch, at most (but one example may exceed it alone).
        hidden: whether the last model's mean hidden states are kept too.
    """

    components: tuple[DenseComponent | SparseComponent, ...]
    batch_tokens: int
    hidden: bool = False


@dataclass(frozen=True)
class Encoder:
    """Whitened rows of examples under one model, or under several (checkpoints, an ensemble), each with components of its own.

    Attributes:
        task: what the models are asked.
        models: frozen, on their device.
        plan: which components, and how each is projected, whitened and sparse.
        arrays: the state; rows need every pass of the fit in it.
    """

    task: Task
    models: tuple[nn.Module, ...]
    plan: EncoderPlan
    arrays: Mapping[str, np.ndarray]

    @property
    def model(self) -> nn.Module:
        """The last of the models, which of several checkpoints is the final one."""
        return self.models[-1]

    @cached_property
    def parts(self) -> dict[str, DensePart | SparsePart]:
        """What makes each component's rows."""
        found: dict[str, DensePart | SparsePart] = {}
        for component in self.plan.components:
            model = self.models[component.model]
            _check_layers(component, model)
            dtype = next(model.parameters()).dtype
            own = {at.removeprefix(f"{component.name}/"): a for at, a in self.arrays.items() if at.startswith(f"{component.name}/")}
            if isinstance(component, SparseComponent):
                found[component.name] = SparsePart(component, own, layer_device(model, component.layer), dtype)
            else:
                devices = {layer.name: layer_device(model, layer.name) for layer in component.layers}
                found[component.name] = DensePart(component, own, devices, dtype)
        return found

    def batches(
        self, examples: Sequence[Example], progress: Progress = ignore_progress, queries: bool = False, tolerant: bool = False
    ) -> Iterator[tuple[list[int], BatchRows]]:
        """Whitened rows, batch by batch, with the positions of their examples; float32 (dense rows of a float64 model: float64).

        The same examples always share the same batches, so the rows are the same bits on the same machine and thread count.

        Args:
            queries: whether these are of the task's measurement, to be compared with rows of its loss.
            tolerant: whether an example whose loss or gradient is not finite gets rows of zeros, and NaN as its loss.

        Raises:
            NumericalError: a loss or a row is not finite and that is not tolerated; names the example.
        """
        objective = self.task.measurement if queries else self.task.loss
        for chosen, batch in batches(self.task, self.models, examples, self.plan.batch_tokens):
            broken = torch.zeros(len(chosen), dtype=torch.bool)
            collectors = {name: part.collector(batch) for name, part in self.parts.items()}
            with HiddenMeans(self.task, self.model) if self.plan.hidden else nullcontext() as means:
                for number, model in enumerate(self.models):
                    own = [collectors[s.name] for s in self.plan.components if s.model == number]
                    if own:
                        losses = backward(model, batch, own, objective, tolerant)
                        broken |= ~torch.isfinite(losses.cpu())
            rows = {name: collector.rows() for name, collector in collectors.items()}
            beside = {"hidden": means.of(batch)} if means else {}
            for block in rows.values():
                squares = torch.from_numpy(block if isinstance(block, np.ndarray) else block.squared_norms[:, None])
                if not tolerant:
                    check_finite(squares, batch, "gradient")
                broken |= ~torch.isfinite(squares).all(dim=1)
            if broken.any():
                losses = losses.masked_fill(broken.to(losses.device), torch.nan)
                for block in (*rows.values(), *beside.values()):
                    _clear(block, broken.numpy())
            yield chosen, {**rows, **beside, "losses": losses.float().cpu().numpy()}
            progress(len(chosen), int(batch.valid.sum()))

    def rows(
        self, examples: Sequence[Example], queries: bool = False, progress: Progress = ignore_progress, tolerant: bool = False
    ) -> dict[str, Any]:
        """All rows at once, by component, in the examples' order: an array [rows, dim], or `SparseVectors`; see `batches`."""
        made = list(self.batches(examples, progress, queries, tolerant))
        result: dict[str, Any] = {}
        for component in self.plan.components:
            blocks = [(chosen, rows[component.name]) for chosen, rows in made]
            if isinstance(component, SparseComponent):
                result[component.name] = concatenate(blocks, component.width)  # type: ignore[arg-type]
            else:
                dtype = blocks[0][1].dtype if blocks else np.float32  # type: ignore[union-attr]
                result[component.name] = np.zeros((len(examples), component.dim), dtype)
                for chosen, block in blocks:
                    result[component.name][chosen] = block
        return result


def _check_layers(component: DenseComponent | SparseComponent, model: nn.Module) -> None:
    """Refuse a component that describes other layers than the model has: a manifest may have come from anybody.

    Raises:
        IntegrityError: names the layer.
    """
    modules = dict(model.named_modules())
    for layer in [vocabulary_layer(component)] if isinstance(component, SparseComponent) else component.layers:
        module = modules.get(layer.name)
        if isinstance(module, nn.Embedding):
            sizes = (module.embedding_dim, module.num_embeddings) if isinstance(component, SparseComponent) else None
            fits = sizes == (layer.outputs, layer.inputs) and getattr(component, "role", "") == "embeddings"
        else:
            fits = (
                module is not None and layer_sizes(module) == (layer.outputs, layer.inputs) and getattr(component, "role", "head") == "head"
            )
        if not fits:
            raise IntegrityError(
                f"the index describes the layer {layer.name} as {layer.inputs} inputs and {layer.outputs} outputs ({component.name}), "
                "which the model does not have; restore the index's manifest"
            )


def _clear(rows: np.ndarray | SparseVectors, broken: np.ndarray) -> None:
    """Set some of a batch's rows to zero."""
    if isinstance(rows, SparseVectors):
        rows.vectors[np.repeat(broken, np.diff(rows.indptr))] = 0.0
        if rows.whole is not None:
            rows.whole[broken] = 0.0
    else:
        rows[broken] = 0.0


def batches(task: Task, models: Sequence[nn.Module], examples: Sequence[Example], token_budget: int) -> Iterator[tuple[list[int], Batch]]:
    """Length-bucketed batches with the positions of their examples, on the last model's device."""
    device = next(models[-1].parameters()).device
    for chosen in task.group(models, [e.tokens for e in examples], token_budget):
        yield chosen, task.collate([examples[i] for i in chosen], device)


def backward(
    model: nn.Module, batch: Batch, visitors: Sequence[Visitor], objective: Objective, tolerant: bool = False
) -> Float[Tensor, " batch"]:
    """One forward and backward pass of a task's loss or measurement with the capture open; returns its values (nats).

    Args:
        tolerant: whether what is not finite of an example is visited as zeros; its value is NaN then, and none of its tokens is
            valid in the batch any more.

    Raises:
        NumericalError: a loss is not finite and that is not tolerated; names the example.
    """
    broken = torch.zeros(len(batch.ids), dtype=torch.bool)
    owners = {layer.name: visitor for visitor in visitors for layer in visitor.layers}
    layers = [layer for visitor in visitors for layer in visitor.layers]
    maps = {name: pair for visitor in visitors for name, pair in visitor.maps.items()}
    tokens_in = {layer.name for layer in layers if isinstance(model.get_submodule(layer.name), nn.Embedding)}

    def drop(bad: Tensor) -> None:
        """Take examples out of the batch, so that whoever counts its tokens does not count theirs."""
        if bad.any():
            broken.logical_or_(bad.cpu())
            batch.valid[bad.to(batch.valid.device)] = False

    def visit(layer: Layer, x: Tensor, d: Tensor) -> None:
        if tolerant and not torch.isfinite(x.sum() + d.sum()):  # one of them is not, or their sum is too large
            bad = ~(torch.isfinite(x).flatten(1).all(1) & torch.isfinite(d).flatten(1).all(1))
            drop(bad)
            d = d.masked_fill(bad[:, None, None], 0)
            x = x if layer.name in tokens_in else x.masked_fill(bad[:, None, None], 0)
        owners[layer.name](layer, x, d)

    with capture(model, layers, maps, (batch.valid.shape[0], batch.valid.shape[1]), visit):
        losses = objective(model, batch)
        if tolerant:
            drop(~torch.isfinite(losses.detach()))
        else:
            check_finite(losses.detach()[:, None], batch, "loss")
        losses.sum().backward()
    losses = losses.detach()
    return losses.masked_fill(broken.to(losses.device), torch.nan) if broken.any() else losses


def check_finite(values: Float[Tensor, "batch n"], batch: Batch, what: str) -> None:
    """Raise a NumericalError that names the first example with a value that is not finite."""
    finite = torch.isfinite(values).all(dim=1)
    if not bool(finite.all()):
        id = batch.ids[int(finite.to(torch.int8).argmin())]
        raise NumericalError(
            f"the {what} of example {id!r} is not finite under this model; try --dtype float32, or look for broken weights with a "
            "plain evaluation of that text"
        )
