"""Logits of language models, computed in pieces: memory holds the logits of some tokens only, as in fused linear cross-entropies.

The body of a model runs whole. Its last hidden states are then taken a few columns at a time: their logits, the cross-entropies, and the
gradient p - onehot(y) in the logits. Of that gradient the head's rows need some columns only; all of it is computed where it flows on, into
the body, or where a statistic needs it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..store.bits import philox
from ..store.shapes import Float, Float64, Int
from . import models
from .batches import IGNORED, Batch
from .capture import OutputGradient, Window, accumulation_dtype

Accept = Callable[[Float[Tensor, "batch n"]], None]
"""A check of values by example: it raises an error, or drops the examples that have values which are not finite."""

LogitsOf = Callable[[Tensor, Tensor], Tensor]
"""A function from token ids and last hidden states to logits."""
Piece = tuple[Tensor, Tensor | None]
"""The losses of some columns, by example, and the gradient in their hidden states, if it flows on into the body."""

_PIECE = 7 << 20  # logits; as float32 less than the 32 MiB from which glibc maps new memory each time
_LEAST_TOKENS = 16  # of a piece, since the head's weight is read for each
_LEAST_TOKENS_GPU = 128
_RUN = 256  # tokens
_HEADS: "WeakKeyDictionary[nn.Module, Head | None]" = WeakKeyDictionary()


@dataclass(frozen=True)
class Head:
    """Output head: the map from last hidden states to logits.

    Attributes:
        linear: the name of the linear layer whose outputs they are; None where something follows the layer (a soft-cap, a scale).
    """

    linear: str | None

    @classmethod
    def of(cls, model: nn.Module, probe: Callable[[nn.Module, torch.device], Batch]) -> "Head | None":
        """Find out on a probe, once for a model; None for a model of another structure, whose logits are computed whole."""
        if model not in _HEADS:
            _HEADS[model] = cls._found(model, probe(model, next(model.parameters()).device).inputs)
        return _HEADS[model]

    @classmethod
    @torch.no_grad()
    def _found(cls, model: Any, inputs: Int[Tensor, "batch tokens"]) -> "Head | None":
        body = getattr(model, "base_model", model)
        if body is model or not isinstance(body, nn.Module):
            return None
        logits = models.logits_of(model, inputs)

        def linear(layer: nn.Linear, states: Tensor) -> Tensor:
            return layer(states.flatten(0, 1)).unflatten(0, states.shape[:2])  # see `_linear_piece`

        def equal(first: Tensor, second: Tensor) -> bool:
            both = torch.cat([first, second], dim=1)
            return both.shape == logits.shape and not models.differ(both.float(), logits.float(), next(model.parameters()).dtype)

        try:
            output = body(input_ids=inputs, **models.without_cache(body))
            states = output[0]
            layer = model.get_output_embeddings()
            names = [name for name, module in model.named_modules() if module is layer]
            if names and type(layer) is nn.Linear and equal(linear(layer, states[:, :1]), linear(layer, states[:, 1:])):
                return cls(names[0])
            with _with_body(model, output) as logits_of:
                if equal(logits_of(inputs[:, :1], states[:, :1]), logits_of(inputs[:, 1:], states[:, 1:])):
                    return cls(None)
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError):  # a model of another structure
            pass
        return None

    def differentiate(self, model: Any, window: Window, label_seed: int | None, accept: Accept) -> Float[Tensor, " batch"]:
        """Run a batch's cross-entropies forward and backward, under an open capture; returns their sums (nats).

        Args:
            label_seed: draw labels from the model instead of the data's.
            accept: is called with the hidden states, before they are differentiated.
        """
        batch = window.batch
        body = model.base_model
        output = body(input_ids=batch.inputs, **models.without_cache(body))
        states = output[0]
        accept(states.detach().flatten(1))
        uniform = None if label_seed is None else draw_uniform(batch, label_seed)
        values = torch.zeros(len(batch.ids), dtype=accumulation_dtype(states.dtype), device=batch.targets.device)
        examples, tokens = batch.valid.shape
        least = _LEAST_TOKENS if states.device.type == "cpu" else _LEAST_TOKENS_GPU
        columns = max(1, max(least, _PIECE // models.vocabulary_size(model)) // examples)
        gradients: list[Tensor] = []
        with _with_body(model, output) as logits_of:
            if self.linear is None:
                piece = partial(self._general_piece, logits_of)
            else:
                piece = partial(self._linear_piece, model.get_output_embeddings(), self.linear)
            for first in range(0, tokens, columns):
                last = first + columns
                with window.columns(first, last):
                    drawn = None if uniform is None else uniform[:, first:last]
                    losses, gradient = piece(window, states[:, first:last].detach(), drawn, states.requires_grad)
                    values += losses
                    if gradient is not None:
                        gradients.append(gradient)
        if gradients:
            states.backward(torch.cat(gradients, dim=1))
        return values

    @torch.no_grad()
    def _linear_piece(self, layer: Any, name: str, window: Window, states: Tensor, uniform: Tensor | None, onward: bool) -> Piece:
        inputs = states.contiguous().to(layer.weight.device)
        # Of inputs with three dimensions, the weight can be copied for each example.
        logits = F.linear(inputs.flatten(0, 1), layer.weight, layer.bias)
        gradient = LogitGradient(logits.unflatten(0, inputs.shape[:2]), window.chunk, uniform)
        losses = gradient.losses.to(window.chunk.targets.device)
        window.visit(name, inputs, gradient)
        return losses, (gradient.values.to(logits.dtype) @ layer.weight).to(states.device) if onward else None

    def _general_piece(self, logits_of: LogitsOf, window: Window, states: Tensor, uniform: Tensor | None, onward: bool) -> Piece:
        states.requires_grad_(onward)
        losses = cross_entropies(logits_of(window.chunk.inputs, states), window.chunk, uniform)
        if losses.requires_grad:
            losses.sum().backward()
        return losses.detach(), states.grad


class LogitGradient(OutputGradient):
    """The gradient of cross-entropies in logits, of which single columns can be computed without the others.

    Args:
        logits: [batch, tokens, vocabulary]; overwritten.
        chunk: the batch or some of its columns, with the targets.
        uniform: numbers that draw other targets (see `sample_targets`).
    """

    def __init__(self, logits: Tensor, chunk: Batch, uniform: Tensor | None = None) -> None:
        self._log_p = torch.log_softmax(logits.to(accumulation_dtype(logits.dtype)), dim=-1)
        targets = chunk.targets.to(logits.device)
        if uniform is not None:
            targets = sample_targets(self._log_p, targets, uniform.to(logits.device))
        self._counted = (targets != IGNORED)[..., None]
        self._targets = targets.clamp(min=0)[..., None]
        self._is_whole = False

    @property
    def losses(self) -> Float[Tensor, " batch"]:
        """Each example's sum of cross-entropies (nats); before `values` is used."""
        return -self._log_p.gather(-1, self._targets).masked_fill(~self._counted, 0).sum((1, 2))

    @property
    def values(self) -> Float[Tensor, "batch tokens vocabulary"]:
        """See `OutputGradient`."""
        if not self._is_whole:
            self._values = self._log_p.exp_()
            self._values.scatter_add_(-1, self._targets, torch.full_like(self._targets, -1, dtype=self._values.dtype))
            self._values.mul_(self._counted)
            self._is_whole = True
        return self._values

    def columns(self, outputs: Int[Tensor, "batch columns"]) -> Float[Tensor, "batch tokens columns"]:
        """See `OutputGradient`."""
        if self._is_whole:
            return super().columns(outputs)
        p = torch.gather(self._log_p, 2, outputs[:, None].expand(-1, self._log_p.shape[1], -1)).exp_()
        return (p - (outputs[:, None] == self._targets).to(p.dtype)) * self._counted


@contextmanager
def _with_body(model: Any, output: Any) -> Iterator[LogitsOf]:
    """Give a function from some columns' token ids and last hidden states to their logits, for a model whose body returned `output`.

    The model runs with a body that returns these states, so that all that it does to them and to the logits is done.
    """
    body = model.base_model
    replaced = body.__dict__.get("forward")

    def logits_of(inputs: Tensor, states: Tensor) -> Tensor:
        changed = copy(output)
        changed[next(iter(changed))] = states
        body.__dict__["forward"] = lambda *args, **kwargs: changed
        return models.logits_of(model, inputs)

    try:
        yield logits_of
    finally:
        if replaced is None:
            body.__dict__.pop("forward", None)
        else:
            body.__dict__["forward"] = replaced


def cross_entropies(
    logits: Float[Tensor, "batch tokens classes"], batch: Batch, uniform: Float64[Tensor, "batch tokens"] | None = None
) -> Float[Tensor, " batch"]:
    """Each example's sum of cross-entropies (nats) over its targets, or over targets drawn from the model; in float32 at least.

    Args:
        uniform: numbers in [0, 1) that draw the targets (see `sample_targets`).
    """
    log_p = torch.log_softmax(logits.to(accumulation_dtype(logits.dtype)), dim=-1)
    targets = batch.targets if uniform is None else sample_targets(log_p, batch.targets, uniform)
    losses = F.nll_loss(log_p.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED)
    return losses.view(targets.shape).sum(1)


def draw_uniform(batch: Batch, seed: int) -> Float64[Tensor, "batch tokens"]:
    """Draw a number in [0, 1) for every target; it depends on the seed and the example's id, not on the batch."""
    targets = batch.targets.cpu().numpy()
    uniform = np.zeros(targets.shape)
    for row, positions, id in zip(uniform, targets != IGNORED, batch.ids, strict=True):
        row[positions] = np.random.Generator(philox(f"wherefrom labels {seed} {id}")).random(int(positions.sum()))
    return torch.from_numpy(uniform).to(batch.targets.device)


@torch.no_grad()
def sample_targets(
    log_p: Float[Tensor, "batch tokens vocabulary"], targets: Int[Tensor, "batch tokens"], uniform: Float64[Tensor, "batch tokens"]
) -> Int[Tensor, "batch tokens"]:
    """Draw targets from a distribution by inverting its cumulative sum; those that are ignored stay so.

    The sum is taken over runs of tokens, then within the run that a number falls into, in float64.
    """
    p = log_p.exp()
    vocabulary = p.shape[-1]
    tokens_in_runs = vocabulary // _RUN * _RUN
    runs = p[..., :tokens_in_runs].unflatten(-1, (vocabulary // _RUN, _RUN)).sum(-1)
    rest = p[..., tokens_in_runs:].sum(-1, keepdim=True)  # 0 where there is none
    ends = torch.cat([runs, rest], dim=-1).double().cumsum(-1)
    goal = uniform[..., None] * ends[..., -1:]
    run = torch.searchsorted(ends, goal).clamp(max=ends.shape[-1] - 1)
    start = torch.where(run > 0, torch.gather(ends, -1, (run - 1).clamp(min=0)), 0.0)
    tokens = run * _RUN + torch.arange(_RUN, device=p.device)
    within = torch.where(tokens < vocabulary, torch.gather(p, -1, tokens.clamp(max=vocabulary - 1)), 0.0).double().cumsum(-1)
    drawn = run * _RUN + torch.searchsorted(within, goal - start).clamp(max=_RUN - 1)
    return torch.where(targets == IGNORED, IGNORED, drawn[..., 0].clamp(max=vocabulary - 1))
