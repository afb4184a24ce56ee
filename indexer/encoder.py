"""Encoder: frozen models and the arrays of each component, from examples to whitened rows in one pass of each model.

A component's encoder (dense.py, sparse.py) declares the layers that it tracks and their maps. It creates a collector for every batch, which
is called with the layers' inputs and output gradients and returns the batch's rows. An encoder's state is a flat dictionary of arrays
(`Arrays`) under `<component>/...`, which a fit (fit.py) fills pass by pass and which safetensors and Ray carry unchanged.

When only the output head is tracked, autograd's graph starts at the head's output: there is no backward pass through the model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from ..store.documents import Example
from ..store.errors import IntegrityError, NumericalError
from ..store.kinds import KINDS
from ..store.manifest import Component, Layer
from ..store.shapes import Float, Float32, Float64
from ..store.vectors import Rows
from .batches import Batch
from .capture import Inputs, Map, OutputGradient, capture, product_precision
from .dense import DenseEncoder
from .hidden import hidden_means
from .sparse import SparseEncoder
from .tasks import LOSS, Objective, Task
from .tensor_parallel import shared_pass
from .transfer import start_copy

Progress = Callable[[int, int], None]
"""Callback after each batch, with its numbers of examples and tokens."""
COMPONENT_ENCODERS: dict[str, type[DenseEncoder] | type[SparseEncoder]] = {"dense": DenseEncoder, "sparse": SparseEncoder}
"""By kind of component, the class that computes its rows."""


@dataclass(frozen=True)
class EncodedBatch:
    """Rows of a batch.

    Attributes:
        positions: of its examples.
        rows: by component, cut to the tokens an index stores, uncoded.
        exact: by component, before that cut.
        losses: of the examples, or measurements, under the last model (nats); NaN where they are not finite.
        hidden: mean last hidden states under the last model; None if the settings leave them out.
    """

    positions: list[int]
    rows: Rows
    exact: Rows
    losses: Float[np.ndarray, " batch"]
    hidden: Float[np.ndarray, "batch width"] | None


class AskedExamples(NamedTuple):
    """Examples that were encoded as queries.

    Attributes:
        rows: by component, cut to the tokens an index stores, float32.
        losses: nats for each token that the loss is on; NaN where they are not finite.
        hidden: mean last hidden states; None if the settings leave them out.
    """

    rows: dict[str, Any]
    losses: Float64[np.ndarray, " examples"]
    hidden: Float32[np.ndarray, "examples width"] | None


def ignore_progress(examples: int, tokens: int) -> None:
    """Progress that does nothing."""


@runtime_checkable
class Visitor(Protocol):
    """Callback of a pass, which collects rows or sums statistics.

    Attributes:
        sums_examples: it sums over examples; non-finite ones are zeroed first.
    """

    sums_examples: bool
    layers: Sequence[Layer]
    maps: Mapping[str, tuple[Map, Map]]

    def __call__(self, layer: Layer, x: Inputs, d: OutputGradient, chunk: Batch) -> None:
        """Process one call of one layer."""


@runtime_checkable
class StatisticsVisitor(Visitor, Protocol):
    """Visitor that sums statistics over the examples of many batches."""

    def end(self) -> None:
        """End a batch."""


@dataclass(frozen=True)
class EncoderSettings:
    """Settings of an encoder.

    Attributes:
        components: of a row, as in the manifest.
        batch_tokens: padded tokens in a batch, at most (but one example may exceed it alone).
        hidden: whether to return the last model's mean hidden states too.
    """

    components: tuple[Component, ...]
    batch_tokens: int
    hidden: bool = False


@dataclass(frozen=True)
class Encoder:
    """Whitened rows of examples under one model, or under several (checkpoints, an ensemble), each with its own components.

    Attributes:
        task: the loss and the measurement.
        models: frozen, on their device.
        settings: the components, with projection and curvature.
        arrays: the state; rows need every pass of the fit in it.
    """

    task: Task
    models: tuple[nn.Module, ...]
    settings: EncoderSettings
    arrays: Mapping[str, np.ndarray]

    @property
    def model(self) -> nn.Module:
        """The last model: the final one of several checkpoints."""
        return self.models[-1]

    @cached_property
    def component_encoders(self) -> dict[str, DenseEncoder | SparseEncoder]:
        """The encoder of each component, by name.

        Raises:
            IntegrityError: a component has other layers than the model, since a manifest may come from an untrusted source.
        """
        encoders: dict[str, DenseEncoder | SparseEncoder] = {}
        for component in self.settings.components:
            model = self.models[component.model]
            prefix = f"{component.name}/"
            arrays = {key.removeprefix(prefix): array for key, array in self.arrays.items() if key.startswith(prefix)}
            modules = dict(model.named_modules())
            missing = [name for name in component.layer_names if name not in modules]
            mismatched: list[str] = []
            if not missing:
                encoder = COMPONENT_ENCODERS[component.kind](component, arrays, model)  # type: ignore[arg-type]
                encoders[component.name] = encoder
                mismatched = [layer.name for layer in encoder.layers if not encoder.matches(layer, modules[layer.name])]
            if missing or mismatched:
                raise IntegrityError(
                    f"the index describes the layer {(missing or mismatched)[0]} ({component.name}) with sizes that the model does not "
                    "have; restore the index's manifest"
                )
        return encoders

    def batches(
        self,
        examples: Sequence[Example],
        progress: Progress = ignore_progress,
        queries: bool = False,
        skip_nonfinite: bool = False,
        meters: Sequence[StatisticsVisitor] = (),
        coded: bool = False,
    ) -> Iterator[EncodedBatch]:
        """Yield whitened rows, batch by batch; float32 (dense rows of a float64 model: float64).

        The same examples always share the same batches, so the rows are the same bits on the same machine and thread count. With a model on
        an accelerator, a batch is yielded when the next one is already being computed.

        Args:
            queries: use the task's measurement instead of its loss.
            skip_nonfinite: give an example whose loss or gradient is not finite rows of zeros, and NaN as its loss.
            meters: also visit the last model's layers.
            coded: sparse rows hold only the coordinates that an index codes (see `SparseVectors.energies`), for `SparseWriter`.

        Raises:
            NumericalError: a loss or a row is not finite and not skipped; names the example.
        """
        undivided = any(encoder.undivided for encoder in self.component_encoders.values())
        objective = Objective(query=queries, undivided=undivided)
        current: Callable[[], EncodedBatch] | None = None
        for positions, batch in self.task.batches(self.models, examples, self.settings.batch_tokens):
            following = self._start(positions, batch, objective, progress, skip_nonfinite, meters, coded)
            if current is not None:
                yield current()
            current = following if self.copies_asynchronously else None
            if current is None:
                yield following()
            del following  # free the rows before the next batch
        if current is not None:
            yield current()

    @cached_property
    def copies_asynchronously(self) -> bool:
        """True if rows are copied to the host while the next batch runs."""
        return any(parameter.device.type != "cpu" for model in self.models for parameter in model.parameters())

    def _start(
        self,
        positions: list[int],
        batch: Batch,
        objective: Objective,
        progress: Progress,
        skip_nonfinite: bool,
        meters: Sequence[StatisticsVisitor],
        coded: bool,
    ) -> Callable[[], EncodedBatch]:
        """Run the models over a batch and start to copy its rows to the host; the returned function waits for the copy; call it once."""
        losses = []
        collectors = {name: encoder.collector(batch, objective.query) for name, encoder in self.component_encoders.items()}
        with hidden_means(self.task, self.model) if self.settings.hidden else nullcontext() as means:
            for number, model in enumerate(self.models):
                visitors: list[Visitor] = [collectors[c.name] for c in self.settings.components if c.model == number]
                if visitors:
                    visitors += meters if model is self.model else ()
                    losses.append(start_copy(backward(self.task, model, batch, visitors, objective, skip_nonfinite)))
            hidden_copy = means(batch) if means else None
        for meter in meters:
            meter.end()
        copies = {name: collector.rows(coded) for name, collector in collectors.items()}
        tokens = start_copy(batch.valid.sum())
        del collectors

        def finish() -> EncodedBatch:
            values = torch.stack([copied().double() for copied in losses])
            exact = {name: copies.pop(name)() for name in list(copies)}
            hidden = hidden_copy() if hidden_copy else None
            broken = ~torch.isfinite(values).all(dim=0)
            for vectors in exact.values():
                squares = torch.from_numpy(vectors.squared_norms[:, None])
                if not skip_nonfinite:
                    check_finite(squares, batch, "gradient")
                broken |= ~torch.isfinite(squares).all(dim=1)
            last = values[-1]
            if broken.any():
                last = last.masked_fill(broken, torch.nan)
                for vectors in exact.values():
                    vectors.clear(broken.numpy())
                if hidden is not None:
                    hidden[broken.numpy()] = 0.0
            rows = {c.name: KINDS[c.kind].stored(exact[c.name], c) for c in self.settings.components}
            progress(len(positions), int(tokens()))
            return EncodedBatch(positions, rows, exact, last.float().numpy(), hidden)

        return finish

    def rows(
        self,
        examples: Sequence[Example],
        queries: bool = False,
        progress: Progress = ignore_progress,
        skip_nonfinite: bool = False,
        exact: bool = False,
    ) -> dict[str, Any]:
        """Compute all rows at once, by component, in the examples' order; see `batches`.

        Args:
            exact: before rows are cut to the tokens an index stores.
        """
        return self.joined(list(self.batches(examples, progress, queries, skip_nonfinite)), exact)

    def ask(
        self, examples: Sequence[Example], queries: bool = True, progress: Progress = ignore_progress, skip_nonfinite: bool = False
    ) -> AskedExamples:
        """Compute the rows of queries, with their losses and hidden states; see `batches`."""
        encoded = list(self.batches(examples, progress, queries, skip_nonfinite))
        losses = np.zeros(len(examples))
        hidden: np.ndarray | None = None
        for batch in encoded:
            losses[batch.positions] = [loss / examples[i].loss_tokens for i, loss in zip(batch.positions, batch.losses, strict=True)]
            if batch.hidden is not None:
                hidden = np.zeros((len(examples), batch.hidden.shape[1]), np.float32) if hidden is None else hidden
                hidden[batch.positions] = batch.hidden
        return AskedExamples({name: vectors.as_float32() for name, vectors in self.joined(encoded).items()}, losses, hidden)

    def joined(self, encoded: Sequence[EncodedBatch], exact: bool = False) -> dict[str, Any]:
        """Join the rows of all batches of some examples, by component, in the examples' order; see `rows`."""
        rows = {}
        for component in self.settings.components:
            blocks = [(batch.positions, (batch.exact if exact else batch.rows)[component.name]) for batch in encoded]
            rows[component.name] = KINDS[component.kind].vectors.concatenate(blocks, component.dim)
        return rows


def backward(
    task: Task, model: nn.Module, batch: Batch, visitors: Sequence[Visitor], objective: Objective = LOSS, skip_nonfinite: bool = False
) -> Float[Tensor, " batch"]:
    """Run one forward and backward pass of a task's loss or measurement with the capture open; returns its values (nats).

    On a GPU, a float32 model's own products are in TF32; those that make rows of its gradients are in full float32.

    Args:
        skip_nonfinite: visitors that sum examples see one that is not finite as zeros; its value is NaN then, and its tokens become invalid
            in the batch.

    Raises:
        NumericalError: a loss is not finite and not skipped; names the example.
    """
    broken = torch.zeros(len(batch.ids), dtype=torch.bool)
    owners: dict[str, list[Visitor]] = {}
    for visitor in visitors:
        for layer in visitor.layers:
            owners.setdefault(layer.name, []).append(visitor)
    layers = list({layer.name: layer for visitor in visitors for layer in visitor.layers}.values())
    maps = {name: pair for visitor in visitors for name, pair in visitor.maps.items()}
    embeddings = {layer.name for layer in layers if isinstance(model.get_submodule(layer.name), nn.Embedding)}

    def drop(invalid: Tensor) -> None:
        """Mark examples as broken and their tokens as invalid, so that they are not counted."""
        if invalid.any():
            broken.logical_or_(invalid.cpu())
            batch.valid[invalid.to(batch.valid.device)] = False

    def accept(values: Tensor) -> None:
        """Drop the examples that have values which are not finite, or refuse the first."""
        if skip_nonfinite:
            drop(~torch.isfinite(values).all(dim=1))
        else:
            check_finite(values, batch, "loss")

    def visit(layer: Layer, x: Tensor, d: OutputGradient, chunk: Batch) -> None:
        summed = skip_nonfinite and any(visitor.sums_examples for visitor in owners[layer.name])
        if summed and not torch.isfinite(x.sum() + d.values.sum()):  # one of them is not finite, or their sum overflows
            invalid = ~(torch.isfinite(x).flatten(1).all(1) & torch.isfinite(d.values).flatten(1).all(1))
            drop(invalid)
            d = OutputGradient(d.values.masked_fill(invalid[:, None, None], 0))
            x = x if layer.name in embeddings else x.masked_fill(invalid[:, None, None], 0)
        with product_precision(x.device, "highest"):
            for visitor in owners[layer.name]:
                visitor(layer, x, d, chunk)

    task.prepare(model)
    device = next(model.parameters()).device
    names = [layer.name for layer in layers]
    with shared_pass(model, names), product_precision(device, "high"), capture(model, layers, maps, batch, visit) as window:
        losses = task.differentiate(model, objective, window, accept)
    return losses.masked_fill(broken.to(losses.device), torch.nan) if broken.any() else losses


def check_finite(values: Float[Tensor, "batch n"], batch: Batch, quantity: str) -> None:
    """Raise a NumericalError that names the first example with a value that is not finite."""
    finite = torch.isfinite(values).all(dim=1)
    if not bool(finite.all()):
        id = batch.ids[int(finite.to(torch.int8).argmin())]
        raise NumericalError(
            f"the {quantity} of example {id!r} is not finite under this model; try dtype float32, or look for broken weights with a "
            "plain evaluation of that text"
        )
