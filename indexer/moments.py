"""The optimizer's moments of a model's gradients, and gradients scaled by them.

They are stored next to a checkpoint's weights, in a safetensors file, by layer name, without those that an adapter's wrapper adds:

    <layer>/first_moment, <layer>/second_moment    [outputs, inputs] of Adam and AdamW: exp_avg and exp_avg_sq
    <layer>/row_moments [outputs], <layer>/column_moments [inputs]    of Adafactor: means of the second moments

with Adam's beta1, beta2 and eps as metadata.

**Second moments** (TrackStar, arXiv 2410.17413, section 3): gradients are divided by the square roots of the second moments in Adafactor's
factored form (arXiv 1804.04235), V[o, i] = r[o] c[i] / mean(r), for r and c the means of V over inputs and over outputs. So the two sides
of a layer's gradient are scaled before they are projected, and no gradient is formed.

**Preconditioner** (SOURCE, arXiv 2405.12186, appendix C): Adam moves along P g with P = V^(-1/2), which is gradient descent in weights that
are scaled by P^(-1/2). There gradients are P^(1/2) g, in the same factored form, and the filter of a training's length is exact.

**Adam's step** (LESS, arXiv 2402.04333, equation 3): with the gradient g of the mean loss over an example's predicted tokens, its row is

    (beta1 m + (1 - beta1) g) / sqrt(beta2 v + (1 - beta2) g^2 + eps)

projected. It is not linear in g, so whole gradients are formed. A query's gradient stays as it is.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..store.errors import IncompatibleError, NotFoundError, UsageError
from ..store.files import regular_size
from ..store.manifest import DenseComponent
from ..store.shapes import Float, Float32
from .curvature import Arrays
from .models import is_transposed, layer_sizes

MOMENTS_FILE = "wherefrom-moments.safetensors"
_WRAPPER = "base_model.model."
_OTHER_STEPS = ("NAdam", "RAdam")  # which keep such moments, and step otherwise


def save_moments(model: Any, optimizer: Any, folder: str | Path) -> Path:
    """Write the optimizer's moments of a model's layers into a folder, such as that of a checkpoint, for `optimizer` of a build.

    Args:
        model: whose weights the optimizer trains; it may be wrapped (an adapter, DistributedDataParallel, torch.compile).
        optimizer: Adam, AdamW or Adafactor, after at least one step.

    Returns:
        The file.

    Raises:
        UsageError: the optimizer has no second moments, or other constants for some layers.
        NotFoundError: the folder does not exist.
    """
    from safetensors.torch import save_file

    optimizer = getattr(optimizer, "optimizer", optimizer)  # of Accelerate
    tensors: dict[str, Tensor] = {}
    constants: dict[str, str] = {}
    kind = type(optimizer).__name__
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    if not Path(folder).is_dir():
        raise NotFoundError(f"there is no folder {folder} for the optimizer's moments; save the model there first")
    for name, module in trained_layers(model):
        if layer_sizes(module) is None:
            continue  # embeddings, norms
        weight: Any = module.weight
        state = optimizer.state.get(weight, {})
        inputs_first = is_transposed(module)
        rows = next((state[name] for name in ("exp_avg_sq_row", "row_var") if name in state), None)  # transformers, torch
        if rows is not None and weight.dim() == 2:
            columns = next(state[name] for name in ("exp_avg_sq_col", "col_var") if name in state)
            sides = rows.flatten(), columns.flatten()
            tensors[f"{name}/row_moments"], tensors[f"{name}/column_moments"] = sides[::-1] if inputs_first else sides
        elif "exp_avg_sq" in state and weight.dim() > 1 and kind not in _OTHER_STEPS:
            first, second = (state[kind].flatten(1) for kind in ("exp_avg", "exp_avg_sq"))
            tensors[f"{name}/first_moment"] = first.T if inputs_first else first
            tensors[f"{name}/second_moment"] = second.T if inputs_first else second
            beta1, beta2 = groups[id(weight)]["betas"]
            group_constants = {"beta1": repr(float(beta1)), "beta2": repr(float(beta2)), "eps": repr(float(groups[id(weight)]["eps"]))}
            if constants and group_constants != constants:
                raise UsageError("the optimizer's groups have different betas or eps, which the moments of one model must share")
            constants = group_constants
    if not tensors:
        raise UsageError(
            f"{type(optimizer).__name__} holds no second moments of the model's layers; Adam, AdamW and Adafactor do after a step"
        )
    path = Path(folder) / MOMENTS_FILE
    save_file({name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata=constants)
    return path


def trained_layers(model: Any) -> list[tuple[str, torch.nn.Module]]:
    """Return a model's layers whose `weight` is trained, by their names without those of wrappers."""
    model = getattr(getattr(model, "module", model), "_orig_mod", model)  # of DistributedDataParallel, or of torch.compile
    layers = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.nn.Parameter) and weight.requires_grad:
            layers.append((name.removeprefix(_WRAPPER), module))
    return layers


def moment_arrays(component: DenseComponent, folder: Path) -> Arrays:
    """Read what a component's encoder needs of the moments of its model.

    Returns:
        `<layer>/input_scale` and `<layer>/output_scale`, or `<layer>/first_moment`, `<layer>/second_moment` and `adam`.

    Raises:
        NotFoundError: the file is missing.
        IncompatibleError: it is of another model, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / MOMENTS_FILE
    if not path.is_file() or regular_size(path) is None:
        raise NotFoundError(
            f"{folder} holds no {MOMENTS_FILE} with the optimizer's moments; write it with wherefrom.save_moments, or by the callback's "
            "`moments`"
        )
    arrays: Arrays = {}
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            read = partial(_read, file)
            if component.optimizer == "adam-step":
                constants = file.metadata() or {}
                arrays["adam"] = np.array([float(constants[name]) for name in ("beta1", "beta2", "eps")])
                beta1, beta2, eps = arrays["adam"]
                if not (0 <= beta1 < 1 and 0 <= beta2 < 1 and 0 <= eps < math.inf):
                    raise ValueError("its betas or eps are not Adam's")
            for layer in component.layers:
                shape = layer.outputs, layer.inputs
                if component.optimizer == "adam-step":
                    arrays[f"{layer.name}/first_moment"] = read(f"{layer.name}/first_moment", shape, signed=True)
                    arrays[f"{layer.name}/second_moment"] = read(f"{layer.name}/second_moment", shape)
                    continue
                if f"{layer.name}/row_moments" in names:
                    rows, columns = read(f"{layer.name}/row_moments", shape[:1]), read(f"{layer.name}/column_moments", shape[1:])
                else:
                    second = read(f"{layer.name}/second_moment", shape)
                    rows, columns = second.mean(axis=1, dtype=np.float64), second.mean(axis=0, dtype=np.float64)
                scales = factored_scales(rows, columns, -0.5 if component.optimizer == "second-moments" else -0.25)
                arrays |= {f"{layer.name}/{side}": scale for side, scale in scales.items()}
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise IncompatibleError(
            f"{path} does not hold the moments of the model's layers ({error}); write it with the optimizer that trained this model"
        ) from error
    return arrays


def _read(file: Any, name: str, shape: tuple[int, ...], signed: bool = False) -> Float32[np.ndarray, "..."]:
    """Read a moment, whose shape is checked before anything is read."""
    stored_shape = tuple(file.get_slice(name).get_shape())
    if stored_shape != shape:
        raise ValueError(f"{name} is {'x'.join(map(str, stored_shape))}, the layer {'x'.join(map(str, shape))}")
    tensor = file.get_tensor(name)
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is not of floating-point numbers")
    array: np.ndarray = tensor.float().numpy()
    if not np.isfinite(array).all() or not (signed or (array.min() >= 0 and array.max() > 0)):
        raise ValueError(f"{name} is not finite, or no mean of squares")
    return array


def factored_scales(rows: Float[np.ndarray, " outputs"], columns: Float[np.ndarray, " inputs"], power: float) -> Arrays:
    """Return the scales of a layer's sides, whose outer product is a negative power of V in Adafactor's form; 0 where V is 0."""
    return {"output_scale": _power(rows / rows.mean(), power), "input_scale": _power(columns, power)}


def _power(values: Float[np.ndarray, " n"], power: float) -> Float[np.ndarray, " n"]:
    return np.where(values > 0, np.where(values > 0, values, 1.0) ** power, 0.0).astype(np.float32)


def adam_step(
    gradient: Float[Tensor, "batch weights"],
    first: Float[Tensor, " weights"],
    second: Float[Tensor, " weights"],
    constants: Sequence[float],
) -> Float[Tensor, "batch weights"]:
    """Return the direction in which Adam would go for each gradient alone; see the module.

    Args:
        constants: beta1, beta2 and eps.
    """
    beta1, beta2, eps = constants
    moved = beta1 * first + (1 - beta1) * gradient
    return moved / torch.sqrt(beta2 * second + (1 - beta2) * gradient * gradient + eps)
