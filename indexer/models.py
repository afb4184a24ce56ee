"""Models from a directory or a hub: loading, identity, sizes.

Only safetensors weights are loaded (a pickle can run code), and no code that comes with a model unless its user asks for it by name.
"""

import ctypes
import hashlib
import importlib.util
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..store.errors import IncompatibleError, NotFoundError, UsageError

SPREAD = "map"  # a device: all GPUs of the machine
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SAME = {torch.bfloat16: 1e-2}  # relative difference up to which two computations of one number are the same; else 1e-5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class ModelSource:
    """Which model, and how it is held in memory.

    Attributes:
        device: "auto", "cpu", "cuda", "cuda:1" ..., or "map" for a language model whose layers are spread over all GPUs.
    """

    id: str
    revision: str | None = None
    dtype: str = "float32"
    device: str = "auto"
    trust_remote_code: bool = False


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks instead of giving them back and faulting them in again at every batch; elsewhere, nothing."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc admits
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
    except (OSError, AttributeError):
        pass


def resolve_device(device: str) -> torch.device:
    """The device that "auto" means here: the first GPU, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        if resolved.type == "meta":
            raise RuntimeError("holds no numbers")
        return resolved
    except RuntimeError as error:
        raise UsageError(f"{device!r} is not a device here; use auto, cpu, cuda or cuda:N") from error


def layer_device(model: nn.Module, layer: str) -> torch.device:
    """Where a layer computes; layers of a model that is spread over several devices differ in it."""
    return next(model.get_submodule(layer).parameters()).device


def load_tokenizer(source: ModelSource) -> Any:
    """The model's fast tokenizer.

    Raises:
        NotFoundError, IncompatibleError: it cannot be had, or gives no character offsets.
    """
    from transformers import AutoTokenizer

    base = adapter_base(source)
    if base is not None:
        own = (Path(source.id) / "tokenizer.json").is_file()
        return load_tokenizer(base) if not own else _fast(_load(AutoTokenizer, source, "tokenizer", whole=False), source)
    return _fast(_load(AutoTokenizer, source, "tokenizer"), source)


def _fast(tokenizer: Any, source: ModelSource) -> Any:
    if tokenizer.vocab_size < 2:
        raise NotFoundError(f"there is no tokenizer at {source.id} (no tokenizer.json); save it beside the model")
    if not tokenizer.is_fast:
        raise IncompatibleError(f"the tokenizer of {source.id} gives no character offsets; convert it to a fast tokenizer (tokenizer.json)")
    return tokenizer


def load_mlp(source: ModelSource) -> nn.Module:
    """A perceptron: the Linear layers `0`, `2`, `4` ... of a safetensors file, with ReLU between them.

    Raises:
        NotFoundError: there is no such file.
        IncompatibleError: it holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    device = resolve_device(source.device)
    path = Path(source.id)
    if source.revision:
        raise UsageError(f"--revision {source.revision} is for models of a hub; {source.id} is a file")
    if not path.is_file():
        raise NotFoundError(
            f"there is no file {source.id}; the model of this task is a safetensors file of a Sequential of Linear and ReLU"
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise IncompatibleError(f"{path} is not a safetensors file: {error}") from error
    numbers = range(0, len(tensors), 2)
    if sorted(tensors) != sorted(f"{i}.{part}" for i in numbers for part in ("weight", "bias")):
        some = ", ".join(sorted(tensors)[:4])
        raise IncompatibleError(f"{path} holds {some} ..., not the layers 0, 2, 4 ... of a Sequential with ReLU between")
    sizes = [tensors[f"{i}.weight"].shape for i in numbers]
    biased = all(tensors[f"{i}.bias"].shape == size[:1] for i, size in zip(numbers, sizes, strict=True))
    if any(not t.is_floating_point() for t in tensors.values()):
        raise IncompatibleError(f"{path} holds weights that are not floating-point numbers (quantised?); save them as float32")
    if any(len(size) != 2 for size in sizes) or any(a[0] != b[1] for a, b in pairwise(sizes)) or not biased:
        raise IncompatibleError(f"{path}: the layers' sizes {[tuple(size) for size in sizes]} do not follow one another")
    layers: list[nn.Module] = []
    for outputs, inputs in sizes:
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    model.load_state_dict(tensors)
    return onto_device(model.to(DTYPES[source.dtype]), device)


def load_causal_lm(source: ModelSource) -> nn.Module:
    """A causal language model in evaluation mode, in its dtype and on its device; an adapter (LoRA and the like) merged into its base.

    On the device "map" the layers are spread over all GPUs by Accelerate (`device_map="auto"`), which also carries activations from one
    to the next; without GPUs that is the CPU.

    Raises:
        NotFoundError: there is no such model.
        IncompatibleError: not a causal language model, or its weights are not safetensors.
        UsageError: it does not go onto the device.
    """
    from transformers import AutoModelForCausalLM

    device = None if source.device == SPREAD else resolve_device(source.device)
    base = adapter_base(source)
    if base is not None:
        return onto_device(_merged(load_causal_lm(base), source), device)
    options: dict[str, Any] = {"dtype": DTYPES[source.dtype], "use_safetensors": True, "output_loading_info": True}
    if device is None:
        if importlib.util.find_spec("accelerate") is None:
            raise UsageError("--device map needs accelerate: pip install accelerate")
        options["device_map"] = "auto"
    model, loading = _load(AutoModelForCausalLM, source, "model", **options)
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if loading.get(problem):
            name = str(sorted(map(str, loading[problem]))[0])
            raise IncompatibleError(
                f"the weights of {source.id} and its config.json do not fit: {problem.replace('_keys', '')} {name}; restore the checkpoint"
            )
    if getattr(model.config, "is_encoder_decoder", False):
        raise IncompatibleError(f"{source.id} is an encoder-decoder model; give a causal language model")
    refuse_offloaded(model, source.id)
    return onto_device(model, device)


def refuse_offloaded(model: nn.Module, id: str) -> None:
    """Refuse a spread model some of whose layers found no room.

    Their weights come and go with every pass, but a backward pass holds all that have come until it ends: the GPU that could not hold the
    model would have to.

    Raises:
        UsageError: names one of the layers.
    """
    places = {layer: str(place) for layer, place in getattr(model, "hf_device_map", {}).items()}
    left = [(place, layer) for layer, place in places.items() if place in ("cpu", "disk")]
    if left and (torch.cuda.is_available() or len(set(places.values())) > 1):
        place, layer = max(left)
        raise UsageError(
            f"{id} does not fit on this machine's GPUs: {layer} is left to the {place}; use more or larger GPUs, --dtype bfloat16, or "
            "--device cpu"
        )


def adapter_base(source: ModelSource) -> ModelSource | None:
    """What an adapter's directory (PEFT's layout) says it belongs to; None where it is no adapter.

    Raises:
        IncompatibleError: it does not say.
    """
    path = Path(source.id) / "adapter_config.json"
    if not path.is_file() or (Path(source.id) / "config.json").is_file():
        return None
    try:
        config = json.loads(path.read_bytes())
        base = config["base_model_name_or_path"]
        if not isinstance(base, str) or not base:
            raise ValueError("it names no base model")
    except (ValueError, KeyError, TypeError) as error:
        raise IncompatibleError(f"{path} does not say which model the adapter belongs to ({error}); restore it") from error
    return replace(source, id=base, revision=config.get("revision"))


def _merged(model: nn.Module, source: ModelSource) -> nn.Module:
    """A model with an adapter's change of its weights added to them."""
    if not (Path(source.id) / "adapter_model.safetensors").is_file():
        raise IncompatibleError(f"there is no adapter_model.safetensors at {source.id}; save the adapter with safe_serialization=True")
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UsageError(f"{source.id} is an adapter, which needs peft: pip install peft") from error
    try:
        return PeftModel.from_pretrained(model, source.id).merge_and_unload(safe_merge=True)
    except Exception as error:  # peft, too, raises what it likes
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise IncompatibleError(f"the adapter at {source.id} cannot be merged into its base: {reason}") from error


def onto_device(model: nn.Module, device: torch.device | None) -> nn.Module:
    """The model on its device (None: where it is already), frozen and in evaluation mode.

    Raises:
        UsageError: the device does not take it.
    """
    try:
        model = model if device is None else model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"the model does not go onto {device}: {str(error).splitlines()[0]}") from error
    return model.requires_grad_(False).eval()


def _load(factory: Any, source: ModelSource, what: str, whole: bool = True, **options: Any) -> Any:
    path = Path(source.id)
    local = path.exists() or source.id.startswith((".", "/", "~"))
    if local and source.revision:
        raise UsageError(f"--revision {source.revision} is for models of a hub; {source.id} is a directory")
    if local and whole and not (path / "config.json").is_file():
        raise NotFoundError(f"there is no model at {source.id} (no config.json in it); give a model's directory or hub id")
    try:
        with _without_bars():
            return factory.from_pretrained(
                source.id, revision=source.revision, trust_remote_code=source.trust_remote_code, local_files_only=local, **options
            )
    except Exception as error:  # the hub, safetensors and configuration code raise what they like; say which model, and why
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        known = IncompatibleError if local else NotFoundError
        raise known(f"the {what} of {source.id} cannot be loaded: {reason}") from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers from drawing a bar for every model that is loaded."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 over every parameter's and float buffer's name, dtype, shape and bytes; shared weights count once."""
    digest = hashlib.sha256()
    persistent = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    for name in sorted(persistent):
        tensor = persistent[name]
        if id(tensor) in seen or not tensor.is_floating_point():
            continue
        seen.add(id(tensor))
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over everything that decides how text becomes tokens, the chat template included."""
    parts = [tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template or ""), str(tokenizer.eos_token_id)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def context_length(model: Any) -> int | None:
    """The longest input, in tokens, that the configuration admits; None where it sets no bound."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def vocabulary_size(model: Any) -> int:
    """How many tokens the model embeds."""
    return int(model.get_input_embeddings().weight.shape[0])


def layer_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(outputs, inputs) of a layer that can be tracked, else None.

    nn.Linear, the transposed Conv1D of GPT-2, and nn.Conv2d without groups, whose inputs are the values under its kernel.
    """
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return module.out_channels, module.in_channels * math.prod(module.kernel_size)
    if isinstance(module, nn.Linear) and module.weight.is_floating_point():
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    return None


def differ(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Whether two computations of the same numbers differ by more than the round-off of a model of that dtype."""
    return bool((a - b).abs().max() > _SAME.get(dtype, 1e-5) * a.abs().max())
