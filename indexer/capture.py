"""Per-example gradients of linear layers, in projected form, from one forward and one backward pass.

For y = W x the gradient of one example is G = sum_t d_t x_t^T. A hook projects the layer's input x_t on the way forward and its output's
gradient d_t on the way back, and the products of the few projected coordinates are summed over tokens (LoGra, arXiv 2405.13954
eq. 5). Weights are frozen, so autograd forms no weight gradient and keeps no layer inputs; the graph starts at the outputs of the
first tracked layers, so no gradient flows into the embeddings. That is 4 of the 6 floating-point operations of a training step.

Rejected: torch.func per-example gradients (form out x in for every example), full backward hooks (three times the overhead of tensor
hooks), reading weight gradients of batches of one (no batching).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from ..store.errors import UsageError
from ..store.manifest import Layer
from ..store.shapes import Float, Int
from .batches import Batch
from .experts import RoutedLinear

Map = Float[Tensor, "_ _"] | None  # [rank, size]; each layer has its own
Geometry = tuple[object, ...] | None
Inputs = Float[Tensor, "batch tokens in_rank"] | Int[Tensor, "batch tokens"]  # of embeddings, token ids


class OutputGradient:
    """The gradient of a loss in a layer's (projected) outputs."""

    def __init__(self, values: Float[Tensor, "batch tokens out_rank"]) -> None:
        self._values = values

    @property
    def values(self) -> Float[Tensor, "batch tokens out_rank"]:
        """The whole gradient."""
        return self._values

    def columns(self, outputs: Int[Tensor, "batch columns"]) -> Float[Tensor, "batch tokens columns"]:
        """Return the gradient in some outputs, in others for each example."""
        return torch.gather(self.values, 2, outputs[:, None].expand(-1, self.values.shape[1], -1))


Visit = Callable[[Layer, Inputs, OutputGradient, Batch], None]


class Window:
    """The tokens of a batch that its model computes now: all of them, or some columns, while its output head is computed piece by piece.

    Args:
        batch: all of them.
        visit: visits a layer by its name, if it is tracked. It must not refer to the window, or the visitors' sums outlive the capture.
    """

    def __init__(self, batch: Batch, visit: Callable[[str, Tensor, OutputGradient, Batch], None]) -> None:
        self.batch = batch
        self.chunk = batch
        self._visit = visit

    def visit(self, name: str, x: Tensor, gradient: OutputGradient) -> None:
        """Visit a layer that computes its outputs without being called: an output head, which is never projected."""
        self._visit(name, x, gradient, self.chunk)

    @contextmanager
    def columns(self, first: int, last: int) -> Iterator[Batch]:
        """Compute only the columns from `first` to `last`, the last not included."""
        self.chunk = self.batch.columns(first, last)
        try:
            yield self.chunk
        finally:
            self.chunk = self.batch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which products are summed: float32, for a float64 model float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def product_precision(device: torch.device, precision: Literal["high", "highest"]) -> Iterator[None]:
    """Set the precision of float32 matrix products on a GPU while open: "high" is TF32, whose factors have 10 bits of mantissa.

    TF32 runs on the tensor cores, several times as fast, with an eighth of bfloat16's rounding error. On a CPU, nothing is set.
    """
    if device.type != "cuda":
        yield
        return
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)


@contextmanager
def capture(model: nn.Module, layers: Sequence[Layer], maps: Mapping[str, tuple[Map, Map]], batch: Batch, visit: Visit) -> Iterator[Window]:
    """Call `visit(layer, x, d, chunk)` for every call of a tracked layer in every forward and backward pass of `model` while open.

    Args:
        model: with frozen weights.
        layers: the tracked layers; a layer that runs several times in a pass (shared weights) is visited each time.
        maps: layer name -> (input map, output map), on the layer's device; None is the identity. Layers that share an input and hold
            the same map object project it once.
        batch: its layers may see other tokens than those of the batch, if the examples follow each other (see `arrange`).
        visit: gets projected inputs [batch, tokens, in_rank] and output gradients in float32 (float64 for a float64 model), both on the
            layer's device; padding tokens have zero output gradients. Embeddings have token ids as inputs. `chunk` is the part of the
            batch whose tokens these are; its mask is that of the layer's tokens.

    Yields:
        The window of the tokens that the model computes.

    Raises:
        UsageError: a tracked layer sees something that is not vectors of one example after the other.
    """
    modules = dict(model.named_modules())
    recent: list[tuple[Tensor, int, Map, Geometry, Tensor]] = []
    tracked = {layer.name: layer for layer in layers}

    def project(x: Tensor, map_: Map) -> Tensor:
        x = x.detach()
        return x if map_ is None else x.to(map_.device) @ map_.T

    def widened(x: Tensor, device: torch.device) -> Tensor:
        return x.to(device, accumulation_dtype(x.dtype)) if x.is_floating_point() else x.to(device)

    def project_input(module: nn.Module, x: Tensor, map_: Map) -> Tensor:
        kernel = geometry(module)
        if recent and recent[0][0] is x and recent[0][1] == x._version and recent[0][2] is map_ and recent[0][3] == kernel:
            return recent[0][4]
        projected = project(_under_kernel(module, x) if isinstance(module, nn.Conv2d) else x, map_)
        recent[:] = [(x, x._version, map_, kernel, projected.clone() if map_ is None else projected)]  # the model may write into x
        return recent[0][4]

    def by_example(value: Tensor, layer: Layer, tokens: Tensor | None) -> Tensor:
        arranged = arrange(value, window.chunk, tokens)
        if arranged is None:
            shape = window.chunk.valid.shape
            raise UsageError(
                f"layer {layer.name} sees a tensor of shape {tuple(value.shape)} for {shape[0]} examples of {shape[1]} tokens, not vectors "
                "of one example after the other; leave it out of layers"
            )
        return arranged

    def hook(layer: Layer, input_map: Map, output_map: Map) -> Callable[..., Tensor]:
        device = next(modules[layer.name].parameters()).device

        def forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            tokens = routed_tokens(module)
            x = (
                args[0].reshape(len(batch.ids), -1)
                if isinstance(module, nn.Embedding)
                else by_example(project_input(module, args[0], input_map), layer, tokens)
            )
            output = with_gradient(output)

            def backward(d: Tensor) -> None:
                d = d.flatten(2).transpose(1, 2) if isinstance(module, nn.Conv2d) else d
                gradient = OutputGradient(widened(by_example(project(d, output_map), layer, tokens), device))
                visit(layer, widened(x, device), gradient, _part_of(window.chunk, x.shape[1], tokens))

            output.register_hook(backward)
            return output

        return forward

    def visit_uncalled(name: str, x: Tensor, gradient: OutputGradient, chunk: Batch) -> None:
        if name in tracked:
            visit(tracked[name], widened(x.detach(), x.device), gradient, chunk)

    window = Window(batch, visit_uncalled)
    handles = [modules[layer.name].register_forward_hook(hook(layer, *maps[layer.name])) for layer in layers]
    try:
        yield window
    finally:
        for handle in handles:
            handle.remove()


def with_gradient(output: Tensor) -> Tensor:
    """Return a layer's output as one that has a gradient: itself, or a copy, since models may write into it."""
    return output if output.requires_grad else output.detach().requires_grad_(True).clone()


def routed_tokens(module: nn.Module) -> Int[Tensor, " routed"] | None:
    """Return the positions, among all tokens of the batch, of those that a layer sees; None if it sees all."""
    return module.tokens if isinstance(module, RoutedLinear) else None


def arrange(value: Float[Tensor, "*leading size"], batch: Batch, tokens: Int[Tensor, " routed"] | None) -> Tensor | None:
    """Return what a layer sees or computes as [examples, tokens of an example, size]; None if its shape is not that of whole examples.

    The first dimension is that of the examples, or counts equal parts of them, one example after the other: sequences, windows of an image,
    or tokens. Dimensions of size one are left out.

    Args:
        tokens: of a routed layer, the positions of the rows; the other tokens become zeros.
    """
    examples, count = batch.valid.shape
    if tokens is not None:
        return value.new_zeros(examples * count, value.shape[-1]).index_copy(0, tokens, value).unflatten(0, (examples, count))
    leading = [size for size in value.shape[:-1] if size != 1]
    if leading == [size for size in (examples, count) if size != 1] or leading == [examples * count]:
        return value.reshape(examples, count, value.shape[-1])
    if value.dim() > 1 and value.shape[0] and value.shape[0] % examples == 0:
        return value.reshape(examples, -1, value.shape[-1])
    return None


def _part_of(chunk: Batch, count: int, tokens: Int[Tensor, " routed"] | None) -> Batch:
    """Return a part of a batch with the mask of the tokens that a layer sees: so many of each example, or those that are routed to it."""
    if tokens is not None:
        routed = torch.zeros_like(chunk.valid).flatten().index_fill(0, tokens.to(chunk.valid.device), True).view_as(chunk.valid)
        return replace(chunk, valid=chunk.valid & routed)
    return chunk if count == chunk.valid.shape[1] else replace(chunk, valid=chunk.valid_of(count))


def geometry(module: nn.Module) -> Geometry:
    """Parameters that select a layer's inputs from a tensor: those of a convolution's kernel, else None."""
    return (module.kernel_size, module.dilation, module.padding, module.stride) if isinstance(module, nn.Conv2d) else None


def _under_kernel(module: nn.Conv2d, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch places size"]:
    """Values under a convolution's kernel: it is a linear layer over these, with its places as tokens."""
    patches = nn.functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]
    return patches.transpose(1, 2)


class GradientSum:
    """Sums of d_t x_t^T over tokens, layer by layer, as [batch, out_rank * in_rank]."""

    def __init__(self) -> None:
        self.by_layer: dict[str, Float[Tensor, "batch n"]] = {}

    def __call__(self, layer: Layer, x: Float[Tensor, "b t i"], d: OutputGradient, chunk: Batch) -> None:
        """Add one call of a layer; a `Visit`."""
        gradient = torch.einsum("bto,bti->boi", d.values, x).flatten(1)
        total = self.by_layer.get(layer.name)
        self.by_layer[layer.name] = gradient if total is None else total + gradient
