"""Exact derivatives of a query's loss with respect to the weights of training examples, through a whole recorded training run.

Each training example i has a weight w_i in the losses of its batches; training had w = 1. The state s_t of a run holds the parameters and
the optimizer's moments, and step t maps it on: s_{t+1} = f_t(s_t, w). The derivative of a query's loss L(s_T) follows by reverse mode:

    a_T = dL/ds_T,     a_t = (df_t/ds_t)^T a_{t+1},     dL/dw = sum over t of (df_t/dw)^T a_{t+1}

(REPLAY: Engstrom et al., MAGIC, arXiv 2503.13751). A step's gradient is differentiated by a second backward pass. Clipping and the
optimizers are differentiated by hand, with the derivative of a square root at 0 taken as 0. States are needed in reverse order: a range
of steps is divided into b parts whose first states are kept, and each part in turn, so that a run of T steps keeps (b - 1) log_b(T) states
and computes each step again log_b(T) times. b is 8, and less where these states would take too much memory, but at least 2.

The loss of a step is the sum of its batches' token losses, each divided by the recorded denominator, which does not depend on w.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..store.documents import Example
from ..store.errors import IncompatibleError, NumericalError, first_line
from ..store.shapes import Float, Float32
from ..store.training import ParameterGroup, TrainingBatch, TrainingRun, TrainingStep
from .batches import IGNORED
from .models import DTYPES, ModelSource, configure_memory, load_causal_lm, without_cache
from .tasks import CausalLM
from .tensor_parallel import refuse_split

_MOST_PARTS = 8
_KEPT_BYTES = 4 << 30
_CLIP_EPS = 1e-6  # of torch.nn.utils.clip_grad_norm_
LARGEST_DIFFERENCE = 0.05


class State(NamedTuple):
    """The parameters and moments of the optimizer, or their adjoints with a leading dimension of queries.

    Attributes:
        parameters: all trained parameters in one vector, by groups of the optimizer.
        first: first moments (Adam), or the momentum buffer (SGD).
        second: second moments (Adam); empty for SGD.
    """

    parameters: Float[Tensor, "*queries parameters"]
    first: Float[Tensor, "*queries parameters"]
    second: Float[Tensor, "*queries parameters_or_0"]


@dataclass(frozen=True)
class _Range:
    """A group of parameters, as a range of the vector of all."""

    group: ParameterGroup
    start: int
    stop: int

    def of(self, vector: Tensor) -> Tensor:
        return vector[..., self.start : self.stop]


def adam_step(state: State, gradient: Tensor, ranges: Sequence[_Range], rates: Sequence[float], number: int, decoupled: bool) -> State:
    """One step of AdamW (`decoupled`) or Adam, as PyTorch does it (arXiv 1412.6980, algorithm 1; arXiv 1711.05101, algorithm 2).

    Args:
        gradient: of the step, clipped.
        number: of the step, from 0.
    """
    new = State(*(torch.empty_like(part) for part in state))
    for r, rate in zip(ranges, rates, strict=True):
        group = r.group
        parameters = r.of(state.parameters)
        g = r.of(gradient)
        g = g if decoupled else g + group.weight_decay * parameters
        first = group.beta1 * r.of(state.first) + (1 - group.beta1) * g
        second = group.beta2 * r.of(state.second) + (1 - group.beta2) * g * g
        decayed = parameters * (1 - rate * group.weight_decay) if decoupled else parameters
        correction1, correction2 = _corrections(group, number)
        r.of(new.parameters)[...] = decayed - rate / correction1 * first / (second.sqrt() / correction2**0.5 + group.eps)
        r.of(new.first)[...] = first
        r.of(new.second)[...] = second
    return new


def adam_adjoint(
    state: State, gradient: Tensor, adjoint: State, ranges: Sequence[_Range], rates: Sequence[float], number: int, decoupled: bool
) -> tuple[State, Float[Tensor, "queries parameters"]]:
    """Adjoints of the state before a step of `adam_step`, and of its gradient, from those of the state after it."""
    before = State(*(torch.empty_like(part) for part in adjoint))
    of_gradient = torch.empty_like(adjoint.parameters)
    for r, rate in zip(ranges, rates, strict=True):
        group = r.group
        g = r.of(gradient) if decoupled else r.of(gradient) + group.weight_decay * r.of(state.parameters)
        first = group.beta1 * r.of(state.first) + (1 - group.beta1) * g
        root = (group.beta2 * r.of(state.second) + (1 - group.beta2) * g * g).sqrt()
        correction1, correction2 = _corrections(group, number)
        divisor = root / correction2**0.5 + group.eps
        of_step = r.of(adjoint.parameters) * (-rate / correction1)
        of_first = r.of(adjoint.first) + of_step / divisor
        slope = torch.where(root > 0, -first / (2 * divisor * divisor * root * correction2**0.5), 0.0)
        of_second = r.of(adjoint.second) + of_step * slope
        of_g = (1 - group.beta1) * of_first + 2 * (1 - group.beta2) * g * of_second
        r.of(of_gradient)[...] = of_g
        direct = r.of(adjoint.parameters)
        r.of(before.parameters)[...] = direct * (1 - rate * group.weight_decay) if decoupled else direct + group.weight_decay * of_g
        r.of(before.first)[...] = group.beta1 * of_first
        r.of(before.second)[...] = group.beta2 * of_second
    return before, of_gradient


def _corrections(group: ParameterGroup, number: int) -> tuple[float, float]:
    return 1 - group.beta1 ** (number + 1), 1 - group.beta2 ** (number + 1)


def sgd_step(state: State, gradient: Tensor, ranges: Sequence[_Range], rates: Sequence[float], number: int) -> State:
    """One step of stochastic gradient descent with momentum, as PyTorch does it; arguments as `adam_step`."""
    new = State(torch.empty_like(state.parameters), torch.empty_like(state.first), state.second)
    for r, rate in zip(ranges, rates, strict=True):
        g = r.of(gradient) + r.group.weight_decay * r.of(state.parameters)
        buffer = r.group.momentum * r.of(state.first) + (1 - _dampening(r.group, number)) * g
        direction = g + r.group.momentum * buffer if r.group.nesterov else buffer
        r.of(new.parameters)[...] = r.of(state.parameters) - rate * direction
        r.of(new.first)[...] = buffer
    return new


def sgd_adjoint(
    state: State, gradient: Tensor, adjoint: State, ranges: Sequence[_Range], rates: Sequence[float], number: int
) -> tuple[State, Float[Tensor, "queries parameters"]]:
    """Adjoints of the state before a step of `sgd_step`, and of its gradient, from those of the state after it."""
    before = State(torch.empty_like(adjoint.parameters), torch.empty_like(adjoint.first), adjoint.second)
    of_gradient = torch.empty_like(adjoint.parameters)
    for r, rate in zip(ranges, rates, strict=True):
        of_direction = -rate * r.of(adjoint.parameters)
        of_buffer = r.of(adjoint.first) + of_direction * (r.group.momentum if r.group.nesterov else 1.0)
        of_g = (1 - _dampening(r.group, number)) * of_buffer + (of_direction if r.group.nesterov else 0.0)
        r.of(of_gradient)[...] = of_g
        r.of(before.parameters)[...] = r.of(adjoint.parameters) + r.group.weight_decay * of_g
        r.of(before.first)[...] = r.group.momentum * of_buffer
    return before, of_gradient


def _dampening(group: ParameterGroup, number: int) -> float:
    """The first step fills PyTorch's buffer with the whole gradient; without momentum there is none."""
    return group.dampening if number and group.momentum else 0.0


class Replay:
    """A recorded training run in memory, which can be repeated with other weights of the examples, and differentiated.

    Args:
        run: the record.
        device: of the model.
        dtype: of parameters and moments.

    Attributes:
        model: the architecture; its parameters are those of the recorded end.
        weights: one for each example: 1.

    Raises:
        IncompatibleError: the model does not have the recorded parameters.
    """

    def __init__(self, run: TrainingRun, device: str = "auto", dtype: str = "float32") -> None:
        configure_memory()
        self.run = run
        self.model = load_causal_lm(ModelSource(str(run.directory), dtype=dtype, device=device)).requires_grad_(False)
        refuse_split(self.model, "the replay of a training run")
        self._task = CausalLM()
        embeddings = self.model.get_input_embeddings()  # type: ignore[operator]
        if isinstance(embeddings, nn.Embedding):
            embeddings.padding_idx = run.settings.padding_idx  # a reloaded model may have another
        parameters = dict(self.model.named_parameters())
        for name, array in run.initial.items():
            if name not in parameters or tuple(parameters[name].shape) != array.shape:
                raise IncompatibleError(
                    f"{run.directory}: its model has no parameter {name!r} of shape {array.shape}; record the run again"
                )
        self._names = [name for group in run.settings.groups for name in group.names]
        self._shapes = [parameters[name].shape for name in self._names]
        self._sizes = [parameters[name].numel() for name in self._names]
        self._device = parameters[self._names[0]].device
        self._dtype = DTYPES[dtype]
        self._final = torch.cat([parameters[name].detach().flatten() for name in self._names])
        self._ranges: list[_Range] = []
        start = 0
        for group in run.settings.groups:
            stop = start + sum(parameters[name].numel() for name in group.names)
            self._ranges.append(_Range(group, start, stop))
            start = stop
        self.weights = torch.ones(run.settings.examples, dtype=self._dtype, device=self._device)

    @property
    def size(self) -> int:
        """Number of trained parameters."""
        return self._final.numel()

    def initial(self) -> State:
        """The state before the first step."""
        vectors = [torch.from_numpy(self.run.initial[name]).flatten() for name in self._names]
        parameters = torch.cat(vectors).to(self._device, self._dtype)
        has_second = self.run.settings.optimizer != "sgd"
        return State(parameters, torch.zeros_like(parameters), torch.zeros_like(parameters if has_second else parameters[:0]))

    def step(self, state: State, number: int, weights: Float[Tensor, " examples"]) -> State:
        """The state after a step.

        Args:
            number: of the step, from 0.
            weights: of the examples.
        """
        step = self.run.steps[number]
        gradient = torch.zeros_like(state.parameters)
        for batch in step.batches:
            gradient = gradient + self._gradient(state.parameters, batch, weights, graph=False)[0]
        gradient = gradient * self._clip_factor(gradient)
        return self._optimizer_step(state, gradient, step, number)

    def train(self, weights: Float[Tensor, " examples"]) -> State:
        """The state at the end of training with other weights; a weight of 0 leaves an example out, and changes no denominator."""
        state = self.initial()
        for number in range(len(self.run.steps)):
            state = self.step(state, number, weights)
        return state

    def states(self, stop: int) -> Iterator[tuple[int, State]]:
        """Numbers of the steps before `stop`, the last first, each with the state before that step."""

        parts = self._parts(stop)

        def backwards(state: State, start: int, stop: int) -> Iterator[tuple[int, State]]:
            if stop - start == 1:
                yield start, state
                return
            bounds = np.unique(np.linspace(start, stop, parts + 1).astype(int)).tolist()
            states = [state]
            for first, last in pairwise(bounds[:-1]):
                state = states[-1]
                for number in range(first, last):
                    state = self.step(state, number, self.weights)
                states.append(state)
            for first, last in zip(bounds[-2::-1], bounds[:0:-1], strict=True):
                yield from backwards(states.pop(), first, last)

        if stop > 0:
            yield from backwards(self.initial(), 0, stop)

    def _parts(self, steps: int) -> int:
        """Return the number of parts of a range of steps: at least 2, and as many as `_KEPT_BYTES` of states allow."""
        state_bytes = sum(part.numel() * part.element_size() for part in self.initial())
        for parts in range(_MOST_PARTS, 2, -1):
            if (parts - 1) * math.ceil(math.log(max(steps, 2), parts)) * state_bytes <= _KEPT_BYTES:
                return parts
        return 2

    def difference(self, state: State) -> float:
        """Distance of the repeated run's end to the recorded end, relative to the way from the start to the recorded end."""
        way = (self._final - self.initial().parameters).norm().item()
        distance = (state.parameters - self._final).norm().item()
        return distance / way if way else distance

    def query_adjoint(self, state: State, queries: Sequence[Example]) -> tuple[State, Float32[np.ndarray, " queries"]]:
        """Adjoints of the end of training for the losses of queries, and these losses (nats, the sum over tokens).

        Args:
            state: at the end.
        """
        adjoints = []
        losses = np.zeros(len(queries), np.float32)
        self.model.eval()
        for i, query in enumerate(queries):
            parameters = state.parameters.detach().requires_grad_(True)
            batch = self._task.collate([query], self._device)
            with self._computing(None):
                logits = self._call(parameters, batch.inputs, None)
                loss = _token_losses(logits, batch.targets).sum()
            adjoints.append(torch.autograd.grad(loss, parameters)[0])
            losses[i] = loss.item()
        gradients = torch.stack(adjoints)
        second = state.second.expand(len(queries), -1)
        return State(gradients, torch.zeros_like(gradients), torch.zeros_like(second)), losses

    def adjoint(self, state: State, number: int, adjoint: State) -> tuple[State, Float[Tensor, "queries examples"]]:
        """Adjoints of the state before a step, and the step's part of the derivative with respect to the examples' weights.

        Args:
            state: before the step.
            adjoint: of the state after it.

        Raises:
            NumericalError: a derivative is not finite.
        """
        step = self.run.steps[number]
        single = len(step.batches) == 1
        pieces = [self._gradient(state.parameters, batch, self.weights, graph=single) for batch in step.batches]
        raw = torch.stack([piece[0].detach() for piece in pieces]).sum(0) if len(pieces) > 1 else pieces[0][0].detach()
        factor = self._clip_factor(raw)
        before, of_gradient = self._optimizer_adjoint(state, raw * factor, adjoint, step, number)
        norm = raw.norm()
        of_weights = torch.zeros(len(of_gradient), len(self.weights), dtype=self._dtype, device=self._device)
        for batch, piece in zip(step.batches, pieces, strict=True):
            gradient, parameters, weights = piece if single else self._gradient(state.parameters, batch, self.weights, graph=True)
            numbers = torch.tensor(batch.examples, device=self._device)
            for query, of_clipped in enumerate(of_gradient):  # one by one, which is faster on a CPU than all at once
                along = factor / (norm + _CLIP_EPS) / norm * torch.dot(of_clipped, raw) if factor < 1 else 0.0
                more, more_weights = _twice(gradient, (parameters, weights), factor * of_clipped - along * raw)
                before.parameters[query] += more
                of_weights[query].index_add_(0, numbers, more_weights)
        if not torch.isfinite(of_weights).all() or not torch.isfinite(before.parameters).all():
            raise NumericalError(
                f"the derivative through step {number} is not finite: training is unstable there, and no derivative describes it; use "
                "a lower learning rate, larger batches or a larger eps of the optimizer"
            )
        return before, of_weights

    def load(self, state: State) -> nn.Module:
        """The model with a state's parameters, in evaluation mode."""
        model_parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in self._by_name(state.parameters).items():
                model_parameters[name].copy_(value)
        return self.model.eval()

    def _gradient(
        self, vector: Tensor, batch: TrainingBatch, weights: Float[Tensor, " examples"], graph: bool
    ) -> tuple[Float[Tensor, " parameters"], Float[Tensor, " parameters"], Float[Tensor, " batch"]]:
        """A batch's gradient, with the parameters and the weights of its examples that it is a function of."""
        parameters = vector.detach().requires_grad_(True)
        own_weights = weights[list(batch.examples)].detach().requires_grad_(graph)
        inputs, mask, targets = self._tensors(batch)
        self.model.train(self.run.settings.training)
        with self._computing(batch.generator):
            logits = self._call(parameters, inputs, mask)
            loss = (own_weights * _token_losses(logits[:, :-1], targets).sum(1)).sum() / batch.denominator
            (gradient,) = torch.autograd.grad(loss, parameters, create_graph=graph)
        return gradient, parameters, own_weights

    def _call(
        self, parameters: Float[Tensor, " parameters"], inputs: Tensor, mask: Tensor | None
    ) -> Float[Tensor, "batch tokens vocabulary"]:
        arguments = {"input_ids": inputs, "attention_mask": mask, **without_cache(self.model)}
        return functional_call(self.model, self._by_name(parameters), kwargs=arguments).logits

    def _by_name(self, vector: Float[Tensor, " parameters"]) -> dict[str, Tensor]:
        return {n: part.view(s) for n, s, part in zip(self._names, self._shapes, vector.split(self._sizes), strict=True)}

    def _tensors(self, batch: TrainingBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids and attention mask [batch, width], and the targets [batch, width - 1] of a batch as it was padded in training."""
        shape = len(batch.examples), batch.width
        inputs = np.full(shape, batch.padding, np.int64)
        mask = np.zeros(shape, np.int64)
        targets = np.full(shape, IGNORED, np.int64)
        for i, number in enumerate(batch.examples):
            example = self.run.examples[number]
            length = len(example.token_ids)
            if length > batch.width:
                raise IncompatibleError(f"{self.run.directory}: example {number} is longer than its batch; record the run again")
            where = slice(batch.width - length, None) if batch.left_padded else slice(0, length)
            inputs[i, where] = example.token_ids
            mask[i, where] = 1
            in_loss = example.loss_mask.copy()
            in_loss[0] = batch.predicts_first
            targets[i, where] = np.where(in_loss, example.token_ids, IGNORED)
        return tuple(torch.from_numpy(a).to(self._device) for a in (inputs, mask, targets[:, 1:]))  # type: ignore[return-value]

    @contextmanager
    def _computing(self, generator: np.ndarray | None) -> Iterator[None]:
        """Attention that can be differentiated twice, the run's precision, and its dropout where it had one."""
        with ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if self.run.settings.autocast is not None:
                stack.enter_context(torch.autocast(self._device.type, DTYPES[self.run.settings.autocast]))
            if generator is not None:
                if len(generator) != len(torch.get_rng_state()):
                    raise IncompatibleError(
                        f"{self.run.directory}: its generator's states are of another version of PyTorch; replay it with that"
                    )
                stack.enter_context(torch.random.fork_rng(devices=[]))
                torch.set_rng_state(torch.from_numpy(generator.copy()))
            yield

    def _clip_factor(self, gradient: Float[Tensor, " parameters"]) -> float:
        largest = self.run.settings.clip_norm
        return 1.0 if largest is None else min(1.0, largest / (gradient.norm().item() + _CLIP_EPS))

    def _optimizer_step(self, state: State, gradient: Tensor, step: TrainingStep, number: int) -> State:
        optimizer = self.run.settings.optimizer
        if optimizer == "sgd":
            return sgd_step(state, gradient, self._ranges, step.rates, number)
        return adam_step(state, gradient, self._ranges, step.rates, number, optimizer == "adamw")

    def _optimizer_adjoint(
        self, state: State, gradient: Tensor, adjoint: State, step: TrainingStep, number: int
    ) -> tuple[State, Float[Tensor, "queries parameters"]]:
        optimizer = self.run.settings.optimizer
        if optimizer == "sgd":
            return sgd_adjoint(state, gradient, adjoint, self._ranges, step.rates, number)
        return adam_adjoint(state, gradient, adjoint, self._ranges, step.rates, number, optimizer == "adamw")


def _twice(gradient: Tensor, inputs: tuple[Tensor, Tensor], direction: Tensor) -> tuple[Tensor, ...]:
    """Differentiate the product of a gradient and a direction.

    Raises:
        IncompatibleError: an operation of the model has no second derivative.
    """
    try:
        return torch.autograd.grad(gradient, inputs, direction, retain_graph=True)
    except RuntimeError as error:
        if "not implemented" not in str(error) and "double" not in str(error):
            raise
        reason = first_line(error)
        raise IncompatibleError(
            f"a step of this model cannot be differentiated twice ({reason}); replay a model of another kind"
        ) from error


def _token_losses(logits: Float[Tensor, "batch tokens vocabulary"], targets: Tensor) -> Float[Tensor, "batch tokens"]:
    """Cross-entropy (nats) of each target, 0 where it is not in the loss."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none").view(targets.shape)
