"""Mixtures of experts as linear layers: experts that are fused into one parameter, and routers.

`transformers` keeps the weights of all experts of a layer in two parameters of three dimensions. Here each expert's matrix becomes an
nn.Linear that shares their memory, named as `<experts>.linears.<number>.gate_up_proj`, and the layer calls each with the tokens that are
routed to it. A router multiplies with a matrix of its own; that product goes through an nn.Linear, too. So capture, projection and
curvature see linear layers, and the gradients are exact.

Experts of another form stay as they are, and are not tracked.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..store.shapes import Float, Int

_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
_MATRIX = 2
_FUSED = 3


class RoutedLinear(nn.Linear):
    """A linear layer that sees some tokens of a batch.

    Attributes:
        tokens: the positions of its inputs among all tokens of the batch, example after example, since it was last called.
    """

    tokens: Int[Tensor, " routed"]

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))


def unfuse(model: nn.Module) -> Callable[[], None]:
    """Turn the fused experts and the routers of a frozen model into linear layers, in place, sharing the memory of their weights.

    Returns:
        A function that turns them back.
    """
    before: list[tuple[Any, dict[str, Any]]] = []
    for module in list(model.modules()):
        change = _unfuse_experts if _is_fused(module) else _unfuse_router if _is_router(module) else None
        if change is not None:
            before.append((module, {**module.__dict__, "_parameters": dict(module._parameters), "_modules": dict(module._modules)}))
            change(module)

    def restore() -> None:
        for module, state in before:
            module.__dict__.clear()
            module.__dict__.update(state)

    return restore


def with_unfused(model: nn.Module, names: frozenset[str]) -> frozenset[str]:
    """Return names of modules, and for experts and routers among them the names of the linear layers that `unfuse` made of them."""
    modules = dict(model.named_modules())
    unfused = [name for name in names if name in modules and {"linear", "linears"} & modules[name]._modules.keys()]
    return names | {name for name in modules if any(name.startswith(f"{owner}.linear") for owner in unfused)}


def is_fused(model: nn.Module) -> bool:
    """Return True if a model has experts or routers that `unfuse` changes."""
    return any(_is_fused(module) or _is_router(module) for module in model.modules())


def _is_fused(module: nn.Module) -> bool:
    """Return True for the experts of transformers' common interface (see its integrations/moe.py)."""
    parameters = [getattr(module, name, None) for name in ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj")]
    has_interface = (
        hasattr(module, "_apply_gate") and hasattr(module, "is_transposed") and not getattr(module, "has_post_expert_norm", False)
    )
    return has_interface and all(isinstance(p, nn.Parameter) and p.dim() == _FUSED and p.is_floating_point() for p in parameters)


def _is_router(module: nn.Module) -> bool:
    """Return True for a module named as a router that owns one matrix, and that `unfuse` has not changed."""
    weight = None if "linear" in module._modules else module._parameters.get("weight")
    named = "router" in type(module).__name__.lower() or "gate" in type(module).__name__.lower()
    return named and not isinstance(module, nn.Linear) and weight is not None and weight.dim() == _MATRIX and weight.is_floating_point()


def _unfuse_experts(module: Any) -> None:
    linears = nn.ModuleList()
    names = [name for name in _PARAMETERS if name in module._parameters]
    fused = {name: (module._parameters.pop(name), module._parameters.pop(f"{name}_bias", None)) for name in names}
    for number in range(len(fused["down_proj"][0])):
        expert = nn.ModuleDict()
        for name, (weight, bias) in fused.items():
            matrix = weight.detach()[number]
            expert[name] = RoutedLinear(matrix.T if module.is_transposed else matrix, None if bias is None else bias.detach()[number])
        linears.append(expert)
    module.linears = linears
    module.forward = MethodType(_experts_forward, module)


def _experts_forward(
    self: Any, hidden_states: Float[Tensor, "tokens width"], top_k_index: Int[Tensor, "tokens k"], top_k_weights: Float[Tensor, "tokens k"]
) -> Float[Tensor, "tokens width"]:
    """Compute the weighted sum of the experts of each token, as the experts' own forward pass does.

    Every expert is called, also without tokens, so that its statistics exist.
    """
    total = torch.zeros_like(hidden_states)
    for number, expert in enumerate(self.linears):
        tokens, position = torch.where(top_k_index == number)
        for linear in expert.values():
            linear.tokens = tokens
        if self.has_gate:
            inner = self._apply_gate(expert["gate_up_proj"](hidden_states[tokens]))
        else:
            inner = self.act_fn(expert["up_proj"](hidden_states[tokens]))
        output = expert["down_proj"](inner) * top_k_weights[tokens, position, None]
        total = total.index_add(0, tokens, output.to(total.dtype))
    return total


class _RouterProduct(nn.Linear):
    """The product of a router with its matrix, in the dtype of the inputs, as routers compute it."""

    def __init__(self, weight: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", None)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), bias)


class _Redirect(TorchFunctionMode):
    """Calls a module in place of products with matrices of its weight's shape."""

    def __init__(self, product: _RouterProduct) -> None:
        super().__init__()
        self._product = product

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and len(args) > 1 and args[1].shape == self._product.weight.shape:
            return self._product(args[0], *args[2:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _unfuse_router(module: Any) -> None:
    module.linear = _RouterProduct(module.weight)
    module.forward = MethodType(_router_forward, module)


def _router_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    with _Redirect(self.linear):
        return type(self).forward(self, *args, **kwargs)
