"""Selection of the tracked layers of a model, and their sizes and shared inputs."""

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..store.errors import UsageError
from ..store.manifest import CurvatureKind, Layer
from .capture import geometry
from .curvature import choose_curvature
from .models import differ, layer_sizes, loaded
from .tasks import Task

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
        explicit: whether the user named the layers; one that does not run, or that does not see one vector for each token of each
            text (routers, some experts), is then an error, else it is left out.

    Raises:
        IncompatibleError: the model does not fit the task.
        UsageError: a named layer does not run.
    """
    task.check(model)
    probe = task.probe(model, next(model.parameters()).device)
    shape = (probe.valid.shape[0], probe.valid.shape[1])
    modules = dict(model.named_modules())
    inputs: dict[str, tuple[Tensor, int]] = {}  # with its version, since the model may write into it later

    def remember(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            if isinstance(output, Tensor) and (isinstance(module, nn.Conv2d) or _sees_each_token(args[0], shape)):
                inputs.setdefault(name, (args[0], args[0]._version))

        return hook

    handles = [modules[name].register_forward_hook(remember(name)) for name in names]
    try:
        with torch.no_grad():
            task.loss(model, probe)
    finally:
        for handle in handles:
            handle.remove()
    unused = [n for n in names if n not in inputs]
    if unused and (explicit or len(unused) == len(names)):
        raise UsageError(f"layer {unused[0]} does not see a vector for each token when the model reads text; leave it out of layers")
    groups: dict[tuple[object, ...], str] = {}
    layers: list[Layer] = []
    for name in names:
        if name in inputs:
            x, version = inputs[name]
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


def _sees_each_token(x: Tensor, shape: tuple[int, int]) -> bool:
    """Check that a layer's input is one vector for each token of each of the probe's two examples, example by example."""
    leading = [size for size in x.shape[:-1] if size != 1]
    if shape[1] > 1 and leading == [shape[0] * shape[1]]:  # all tokens but the last are equal in both
        by_example = x.reshape(*shape, x.shape[-1])
        return not differ(by_example[0, :-1], by_example[1, :-1], x.dtype)
    return leading == [size for size in shape if size != 1]
