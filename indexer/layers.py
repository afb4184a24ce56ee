"""Selection of the tracked layers of a model, and their sizes and shared inputs."""

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..store.errors import UsageError
from ..store.manifest import CurvatureKind, Layer
from .batches import Batch
from .capture import arrange, geometry, routed_tokens, with_gradient
from .curvature import choose_curvature
from .models import differ, layer_sizes, loaded
from .tasks import Task
from .tensor_parallel import shared_pass

NARROWING = "@narrowing"
_ADAPTED = "base_layer"  # a part of the names of layers that have an adapter's layers beside them


def find_layers(model: nn.Module, patterns: Sequence[str] = (), within_blocks: bool = True) -> list[str]:
    """Names of the layers to track, in the model's order.

    Without patterns, every layer that can be tracked; with `within_blocks` only those inside the transformer blocks (the outermost
    ModuleLists), so without the output head and the embeddings. A pattern is a shell glob (`*.mlp.*`, `h.[0-3].*`) over the full name or
    its end; "@narrowing" selects the default layers with more inputs than outputs, such as the second half of an MLP (all of them if there
    are none). Of a model with an adapter, only the layers that it trained are selected, unless a pattern names a `base_layer`.

    Raises:
        UsageError: a pattern, or the default, matches no layer.
    """
    candidates = {name: module for name, module in model.named_modules() if layer_sizes(module)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    candidates = {name: module for name, module in candidates.items() if module is not head}
    trained = loaded(model).trained
    if trained is not None and trained & candidates.keys() and not any(_ADAPTED in pattern for pattern in patterns):
        candidates = {name: module for name, module in candidates.items() if name in trained}
    if NARROWING in patterns:
        if len(patterns) > 1:
            raise UsageError(f"layers: {NARROWING} cannot be combined with other patterns")
        names = find_layers(model, (), within_blocks)
        narrowing = [name for name in names if (sizes := layer_sizes(candidates[name])) and sizes[1] > sizes[0]]
        return narrowing or names
    if not patterns and not within_blocks:
        patterns = ("*",)
    if not patterns:
        lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        outermost = [n for n in lists if not any(n.startswith(other + ".") for other in lists)]
        selected = [name for name in candidates if any(name.startswith(o + ".") for o in outermost)]
        if not selected:
            raise UsageError("the model has no Linear or Conv1D layers inside blocks; name the layers to track in layers")
        return selected
    matched: set[str] = set()
    for pattern in patterns:
        matches = {n for n in candidates if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n, "*." + pattern)}
        if not matches:
            sample = ", ".join(list(candidates)[:4])
            raise UsageError(f"no layer matches {pattern!r}; this model has {len(candidates)} linear layers, such as {sample}")
        matched |= matches
    return [name for name in candidates if name in matched]


def describe_layers(
    task: Task, model: nn.Module, names: Sequence[str], rank: int, curvature: CurvatureKind, examples: int, explicit: bool
) -> tuple[Layer, ...]:
    """Sizes, ranks, shared inputs and offsets of the tracked layers, from a run of two small examples through the model.

    Args:
        task: provides the two examples.
        names: from `find_layers`.
        rank: coordinates of inputs and outputs each, capped by the layer's sizes.
        curvature: a strategy's name, or "auto" to select by size and by the number of `examples` of the fit.
        explicit: whether the user named the layers; one that does not run, or whose inputs are not those of one example after the other,
            is then an error, else it is left out.

    Raises:
        IncompatibleError: the model does not fit the task.
        UsageError: a named layer does not run.
    """
    task.check(model)
    probe = task.probe(model, next(model.parameters()).device)
    modules = dict(model.named_modules())
    inputs = _inputs(task, model, names, probe)
    swapped = _inputs(task, model, list(inputs), probe.swapped())
    for name in [name for name in inputs if not _belongs_to_examples(modules[name], inputs[name], swapped[name], probe)]:
        del inputs[name]
    unused = [n for n in names if n not in inputs]
    if unused and (explicit or len(unused) == len(names)):
        raise UsageError(f"layer {unused[0]} does not run, or does not see one example after the other; leave it out of layers")
    with_gradients = _with_gradients(task, model, list(inputs), probe)
    silent = [name for name in inputs if name not in with_gradients]
    if silent and (explicit or len(silent) == len(inputs)):
        raise UsageError(f"no gradient of the loss reaches the layer {silent[0]}; leave it out of layers")
    for name in silent:
        del inputs[name]
    groups: dict[tuple[object, ...], str] = {}
    layers: list[Layer] = []
    for name in names:
        if name in inputs:
            x, version, _ = inputs[name]
            outputs, width = layer_sizes(modules[name]) or (0, 0)
            output_rank = min(rank, outputs)
            input_rank = min(rank, width)
            layers.append(
                Layer(
                    name=name,
                    outputs=outputs,
                    inputs=width,
                    output_rank=output_rank,
                    input_rank=input_rank,
                    input_group=groups.setdefault((id(x), version, geometry(modules[name])), name),
                    offset=layers[-1].offset + layers[-1].size if layers else 0,
                    curvature=choose_curvature(curvature, output_rank * input_rank, examples),
                )
            )
    return tuple(layers)


_Seen = tuple[Tensor, int, Tensor | None]  # a layer's input, its version (the model may write into it later), and the tokens routed to it


def _inputs(task: Task, model: nn.Module, names: Sequence[str], batch: Batch) -> dict[str, _Seen]:
    """Run a batch through a model, and return what its layers see first, by name; layers that do not run are missing."""
    modules = dict(model.named_modules())
    inputs: dict[str, _Seen] = {}

    def remember(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                inputs.setdefault(name, (args[0], args[0]._version, routed_tokens(module)))

        return hook

    handles = [modules[name].register_forward_hook(remember(name)) for name in names]
    try:
        with torch.no_grad():
            task.loss(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _with_gradients(task: Task, model: nn.Module, names: Sequence[str], batch: Batch) -> set[str]:
    """Return the layers whose outputs have gradients when the loss of a batch is differentiated."""
    reached: set[str] = set()

    def start(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            output = with_gradient(output)
            output.register_hook(lambda gradient: reached.add(name))
            return output

        return hook

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(start(name)) for name in names]
    try:
        with torch.enable_grad(), shared_pass(model, names):
            loss = task.loss(model, batch).sum()
            if loss.requires_grad:
                loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return reached


def _belongs_to_examples(module: nn.Module, seen: _Seen, seen_swapped: _Seen, probe: Batch) -> bool:
    """Check that a layer's input can be told apart by example: with two examples swapped, so are its parts."""
    if isinstance(module, nn.Conv2d):
        return True
    first, second = (arrange(x, probe, tokens) for x, _, tokens in (seen, seen_swapped))
    return first is not None and second is not None and first.shape == second.shape and not differ(first.flip(0), second, first.dtype)
