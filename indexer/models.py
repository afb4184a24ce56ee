"""Models from a directory or a hub: loading, fingerprints, sizes.

Only safetensors weights are loaded (a pickle can run code), and a model's own code runs only with trust_remote_code.
"""

import copy
import ctypes
import hashlib
import inspect
import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..store.errors import IncompatibleError, NotFoundError, UsageError
from ..store.extras import require
from . import tensor_parallel
from .devices import SPREAD, TENSOR_PARALLEL

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KERNEL_CACHES = "LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"  # of PyTorch's wrapper of oneDNN, and of oneDNN
_KEPT_KERNELS = "32"
_SAME = {torch.bfloat16: 1e-2}  # relative tolerance between two computations of one number; else 1e-5
_MERGED = {torch.bfloat16: 5e-2, torch.float64: 1e-9}  # relative tolerance of a merged model's predictions; else 1e-4
_PROBED = 32
_DEEPEST = 10_000
_ZERO = 1e-20
_FILES = {
    "configuration": "config.json",
    "tokenizer": "tokenizer.json or tokenizer_config.json",
    "model": "config.json",
    "image processor": "preprocessor_config.json",
}
_SENTENCE = 240
_LFS_POINTER = b"version https://git-lfs"
_LARGEST_POINTER = 64
_LARGEST_HEADER = 100 << 20
_WEIGHT_FILES = ("model*.safetensors", "pytorch_model*.bin", "*.gguf", "tf_model.h5", "flax_model.msgpack", "consolidated*.pth")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "*.tiktoken",
    "tekken.json",
)
_ADAPTER_LAYERS = (".lora_A", ".lora_B", ".base_layer.", ".lora_embedding", "modules_to_save.", ".lora_magnitude")
_OTHER_KINDS = {
    "ForSequenceClassification": "a classifier or reward model",
    "ForTokenClassification": "a classifier of tokens",
    "ForQuestionAnswering": "a model that marks answers",
    "ForMaskedLM": "a masked language model",
    "ForImageClassification": "a classifier of images",
}
TASK_NAMES = (
    "causal-lm",
    "classification",
    "reward",
    "dpo",
    "masked-lm",
    "seq2seq",
    "embedding",
    "image-classification",
    "diffusion",
    "vectors",
    "mlp",
)
IN_MEMORY = "in-memory"  # the id of a model that was loaded from nowhere
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, with the tokenizer of its texts (None for a model of vectors)."""

    model: nn.Module
    tokenizer: Any = None

    @property
    def id(self) -> str:
        """The directory or hub id that it was loaded from, if it has one; the index then finds the model again there."""
        return str(getattr(getattr(self.model, "config", None), "_name_or_path", "")) or IN_MEMORY


@dataclass(frozen=True)
class ModelSource:
    """A model's location, and its form in memory.

    Attributes:
        device: "auto", "cpu", "cuda", "cuda:1" ...; for a language model also "map", which spreads its layers over all GPUs, and "tp" or
            "tp:N", which splits each of them over all or N GPUs.
        base: the location of an adapter's base model; None to read it from the adapter.
        loaded: the model itself, where it is in memory.
    """

    @classmethod
    def of(cls, model: str | LoadedModel, dtype: str, device: str, trust_remote_code: bool) -> "ModelSource":
        """Source of a directory or hub id, or of a model in memory."""
        if isinstance(model, LoadedModel):
            return cls(model.id, None, dtype, device, trust_remote_code, loaded=model)
        return cls(model, None, dtype, device, trust_remote_code)

    id: str
    revision: str | None = None
    dtype: str = "float32"
    device: str = "auto"
    trust_remote_code: bool = False
    base: str | None = None
    loaded: LoadedModel | None = None


@dataclass(frozen=True)
class Loaded:
    """Facts about a loaded model.

    Attributes:
        base: directory or hub id of the model that an adapter adapts.
        trained: the layers that training changed: an adapter's own, those that it was merged into, or those that `find_trained` found; None
            where this is not known, and the whole model counts as trained.
        notes: sentences to show with answers.
    """

    base: str | None = None
    trained: frozenset[str] | None = None
    notes: tuple[str, ...] = ()


_LOADED: "WeakKeyDictionary[nn.Module, Loaded]" = WeakKeyDictionary()


def loaded(model: nn.Module) -> Loaded:
    """Facts recorded when a model was loaded; empty for one loaded elsewhere."""
    return _LOADED.get(model, Loaded())


def set_trained(model: nn.Module, layers: frozenset[str]) -> None:
    """Set which layers of a model training changed."""
    _LOADED[model] = replace(loaded(model), trained=layers)


def configure_memory() -> None:
    """Set the process up for passes over batches of many shapes; call it before the first product of a model.

    oneDNN compiles a kernel for each shape of a product, half a megabyte each. PyTorch and oneDNN each keep 1,024 of them, a gigabyte where
    documents have many lengths. Here they keep 32 each, unless the environment says otherwise. Large freed blocks stay in glibc's heap,
    instead of being mapped again at every batch; without glibc, nothing is done about them.
    """
    for variable in _KERNEL_CACHES:
        os.environ.setdefault(variable, _KEPT_KERNELS)
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest value that glibc accepts
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def return_freed_memory() -> None:
    """Return the heap's free blocks to the system, after a stage that needed more than the next; without glibc, do nothing."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resolve_device(device: str) -> torch.device:
    """Resolve a device; "auto" is the first GPU, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        if resolved.type == "meta":
            raise RuntimeError("the meta device has no data")
        return resolved
    except RuntimeError as error:
        raise UsageError(
            f"{device!r} is not a device of this machine; use auto, cpu, cuda or cuda:N (map and tp are for passes of a language model, "
            "not for training)"
        ) from error


def layer_device(model: nn.Module, layer: str) -> torch.device:
    """Device of a layer; the layers of a spread model have several."""
    return next(model.get_submodule(layer).parameters()).device


def load_tokenizer(source: ModelSource) -> Any:
    """Load the model's fast tokenizer.

    Raises:
        NotFoundError, IncompatibleError: it cannot be loaded, or has no character offsets.
    """
    from transformers import AutoConfig, AutoTokenizer

    if source.loaded is not None:
        if source.loaded.tokenizer is None:
            raise UsageError("a language model in memory needs its tokenizer; give `tokenizer`, too")
        return _fast(source.loaded.tokenizer, source)
    adapter = find_adapter(source)
    if adapter is not None and not (adapter.folder / "tokenizer.json").is_file():
        return load_tokenizer(adapter.base)
    if (Path(source.id) / "config.json").is_file() and not any(any(Path(source.id).glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise NotFoundError(f"there is no tokenizer at {source.id} (no tokenizer.json); save it with the model")
    if adapter is None:
        _load(AutoConfig, source, "configuration")  # it determines the tokenizer's class
    return _fast(_load(AutoTokenizer, source, "tokenizer", model=adapter is None), source)


def _fast(tokenizer: Any, source: ModelSource) -> Any:
    if tokenizer.vocab_size < 2:
        raise NotFoundError(f"there is no tokenizer at {source.id} (no tokenizer.json); save it with the model")
    if not tokenizer.is_fast:
        raise IncompatibleError(f"the tokenizer of {source.id} has no character offsets; convert it to a fast tokenizer (tokenizer.json)")
    return tokenizer


def frozen_copy(source: ModelSource, loaded: LoadedModel) -> nn.Module:
    """Copy the structure of a model in memory: frozen, in evaluation mode, with the same weights in the same memory.

    The original keeps its mode, hooks and `requires_grad`.

    Raises:
        UsageError: it has adapters that are not merged.
        IncompatibleError: its weights have a dtype that is not supported.
    """
    model = getattr(loaded.model, "_orig_mod", loaded.model)  # of torch.compile
    if hasattr(model, "peft_config"):
        raise UsageError("the model in memory has adapters; merge them (merge_and_unload), or name the adapter's folder")
    unsupported = {p.dtype for p in model.parameters()} - {DTYPES[source.dtype]}
    if unsupported:
        dtypes = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in unsupported))
        raise IncompatibleError(f"the model in memory has weights in {dtypes}, not in {source.dtype}; convert it with model.to(...)")
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    shared |= {id(buffer): buffer for buffer in model.buffers()}
    copied: Any = copy.deepcopy(model, shared).eval()
    if hasattr(copied, "config"):
        copied.config.return_dict = True
        copied.config.output_hidden_states = False
        copied.config.output_attentions = False
    return copied if source.device == "auto" else onto_device(copied, resolve_device(source.device))


def load_mlp(source: ModelSource) -> nn.Module:
    """Load a perceptron: the Linear layers `0`, `2`, `4` ... of a safetensors file, with ReLU between them.

    Raises:
        NotFoundError: there is no such file.
        IncompatibleError: it has other tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    device = resolve_device(source.device)
    path = Path(source.id)
    if source.revision:
        raise UsageError(f"revision {source.revision} applies to hub models only; {source.id} is a file")
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
        names = ", ".join(sorted(tensors)[:4])
        raise IncompatibleError(f"{path} contains {names} ..., not the layers 0, 2, 4 ... of a Sequential with ReLU between")
    sizes = [tensors[f"{i}.weight"].shape for i in numbers]
    biases_match = all(tensors[f"{i}.bias"].shape == size[:1] for i, size in zip(numbers, sizes, strict=True))
    if any(not t.is_floating_point() for t in tensors.values()):
        raise IncompatibleError(f"{path} has weights that are not floating-point numbers (quantized?); save them as float32")
    if any(len(size) != 2 for size in sizes) or any(a[0] != b[1] for a, b in pairwise(sizes)) or not biases_match:
        raise IncompatibleError(f"{path}: the layers' sizes {[tuple(size) for size in sizes]} do not match")
    layers: list[nn.Module] = []
    for outputs, inputs in sizes:
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    model.load_state_dict(tensors)
    return onto_device(model.to(DTYPES[source.dtype]), device)


def load_causal_lm(source: ModelSource) -> nn.Module:
    """Load a causal language model; see `load_pretrained`."""
    return load_pretrained(source, "AutoModelForCausalLM")


def load_pretrained(source: ModelSource, auto_class: str, merged: bool = False) -> nn.Module:
    """Load a model in evaluation mode, in its dtype and on its device; an adapter (such as LoRA) of a language model with its base.

    On the device "map" the layers are spread over all GPUs by Accelerate (`device_map="auto"`), which also carries activations from one
    to the next; without GPUs that is the CPU. On the device "tp" every layer is split over all GPUs (see tensor_parallel.py).

    Args:
        auto_class: the class of transformers that loads it, such as "AutoModelForCausalLM".
        merged: merge all of an adapter into its base.

    Raises:
        NotFoundError: there is no such model.
        IncompatibleError: it is a model of another kind, or its weights are not safetensors.
        UsageError: it does not fit on the device.
    """
    size = tensor_parallel.process_count(source.device)
    is_whole = source.device.partition(":")[0] != TENSOR_PARALLEL
    device = None if source.device == SPREAD or size > 1 else resolve_device(source.device if is_whole else "auto")
    adapter = find_adapter(source)
    if adapter is not None and size > 1:
        raise UsageError(f"an adapter is not split over processes; merge {source.id} (merge_and_unload) and save it, or use another device")
    if size > 1:
        plan = tensor_parallel.split_plan(_model_class(auto_class), _configuration(source, auto_class), source.trust_remote_code)
        slices = {"source": {f.name: getattr(source, f.name) for f in fields(source)}, "auto_class": auto_class, "size": size, "plan": plan}
        return tensor_parallel.load_split(size, slices, lambda: load_slices(source, auto_class, size, plan))
    if adapter is None:
        if device is None:
            require("accelerate", "training")
        return onto_device(_load_base(source, auto_class, **({"device_map": "auto"} if device is None else {})), device)
    if auto_class != "AutoModelForCausalLM":
        raise UsageError(f"{source.id} is an adapter of a model that is no causal language model; merge it (merge_and_unload) and save it")
    return onto_device(_adapt(load_pretrained(adapter.base, auto_class, merged=True), adapter, merged), device)


def _model_class(auto_class: str) -> Any:
    import transformers

    return getattr(transformers, auto_class)


def load_slices(source: ModelSource, auto_class: str, size: int, plan: Mapping[str, str]) -> nn.Module:
    """Load this process's slices of a model, among so many processes that compute it; see `load_pretrained` and `split_plan`."""
    from transformers.distributed import DistributedConfig

    return onto_device(_load_base(source, auto_class, distributed_config=DistributedConfig(tp_size=size, tp_plan=dict(plan))), None)


def _configuration(source: ModelSource, auto_class: str) -> Any:
    """Load a model's configuration; see `load_pretrained` for errors."""
    import transformers

    config = _load(transformers.AutoConfig, source, "configuration")
    if auto_class == "AutoModelForCausalLM":
        _check_suitable(config, source)
    _check_weights(source)
    config.return_dict = True
    config.output_hidden_states = False
    config.output_attentions = False
    return config


def _load_base(source: ModelSource, auto_class: str, **placement: Any) -> nn.Module:
    """Load a model; `placement` are arguments of `from_pretrained`."""

    config = _configuration(source, auto_class)
    options: dict[str, Any] = {"config": config, "dtype": DTYPES[source.dtype], "use_safetensors": True, "output_loading_info": True}
    options |= placement
    options["ignore_mismatched_sizes"] = True  # reported below, by name
    options["adapter_kwargs"] = {"subfolder": "no-adapter"}  # adapter files next to a merged model would be applied a second time
    model, loading = _load(_model_class(auto_class), source, "model", **options)
    missing, mismatched, unexpected = (
        sorted(str(key[0] if isinstance(key, tuple) else key) for key in loading.get(kind) or ())
        for kind in ("missing_keys", "mismatched_keys", "unexpected_keys")
    )
    unmerged = [name for name in unexpected if any(part in name for part in _ADAPTER_LAYERS)]
    if unmerged:
        raise IncompatibleError(
            f"the weights of {source.id} contain adapter layers that are not merged ({unmerged[0]}); merge them (PEFT's "
            "merge_and_unload), or give the adapter's folder"
        )
    if missing or mismatched:
        problem = f"{missing[0]} is missing" if missing else f"{mismatched[0]} has another shape"
        if any(name.startswith("_orig_mod.") for name in unexpected):
            problem = "the weights are those of a compiled model (_orig_mod.); save the model before torch.compile, or its _orig_mod"
        raise IncompatibleError(f"the weights of {source.id} and its config.json do not fit: {problem}; restore the checkpoint")
    refuse_offloaded(model, source.id)
    notes = []
    if unexpected:
        names = ", ".join(unexpected[:3]) + (" ..." if len(unexpected) > 3 else "")
        notes.append(f"the checkpoint {source.id} has {len(unexpected)} tensors that the model does not use: {names}")
    _LOADED[model] = Loaded(notes=tuple(notes))
    return model


def _check_suitable(config: Any, source: ModelSource) -> None:
    """Refuse a model that is not a causal language model by its configuration; the error names its kind."""
    depth = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(depth, int) and depth > _DEEPEST:
        raise IncompatibleError(f"the configuration of {source.id} has {depth:,} layers, more than any model; restore config.json")
    architectures = [str(name) for name in getattr(config, "architectures", None) or ()]
    kind = other_kind(config, architectures)
    if kind is not None:
        raise IncompatibleError(
            f"{source.id} is {kind} ({', '.join(architectures) or config.model_type}), not a causal language model; give one, or "
            f"the task of this kind ({', '.join(TASK_NAMES)}; see docs/tasks.md)"
        )


def other_kind(config: Any, architectures: Sequence[str]) -> str | None:
    """Kind of a model that is not a causal language model, by its configuration and the names of its classes; None if it may be one."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kinds = {} if getattr(config, "is_decoder", False) else _OTHER_KINDS
    kind = next((kind for suffix, kind in kinds.items() for name in architectures if name.endswith(suffix)), None)
    custom = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if kind is not None or custom:
        return kind
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder model"
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "of a kind that has no causal language model"
    return "a model without its output head" if len(architectures) == 1 and re.search(r"(?<!LMHead)Model$", architectures[0]) else None


def _check_weights(source: ModelSource) -> None:
    """Check that the weight files exist, are complete and are safetensors, before a library reads them."""
    folder = Path(source.id)
    if not folder.is_dir():
        return
    index = folder / "model.safetensors.index.json"
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values()) if index.is_file() else set()
        if not all(isinstance(name, str) for name in names):
            raise TypeError("a name of a file is not text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IncompatibleError(f"{index} is not the list of the weights' files that it should be; restore the checkpoint") from error
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise IncompatibleError(f"the weight file {folder / missing[0]} is missing; restore the checkpoint")
    files = sorted(folder / name for name in names) if names else sorted(folder.glob("model*.safetensors"))
    if not files and has_weights(folder):
        raise IncompatibleError(
            f"the weights at {folder} are not safetensors (a pickle can run code); load the model and save it again with "
            "save_pretrained(safe_serialization=True)"
        )
    if not files:
        raise NotFoundError(f"there are no weights at {folder} (no model.safetensors); give a model's directory or hub id")
    for path in files:
        problem = safetensors_problem(path)
        if problem:
            raise IncompatibleError(f"{path} {problem}; restore the checkpoint")


def safetensors_problem(path: Path) -> str | None:
    """Problem of a safetensors file, by its header and size; None if it is sound."""
    if not path.is_file():
        return "is not a regular file"
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(_LARGEST_POINTER)
        if start.startswith(_LFS_POINTER):
            return "is a pointer of Git LFS, not the file: run git lfs pull in its repository"
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            return "is not a complete safetensors file (cut off?)"
        file.seek(8)
        try:
            header = json.loads(file.read(length))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            return "is not a safetensors file: its header cannot be read"
    integers = [n for n, e in header.items() if n.endswith("weight") and str(e.get("dtype")).startswith(("I", "U", "BOOL"))]
    if integers:
        return f"has integers in {integers[0]} (quantized?), and gradients need floating-point weights"
    return None if end == size - 8 - length else f"has {size:,} bytes, not the {8 + length + end:,} of its header (cut off?)"


def refuse_offloaded(model: nn.Module, id: str) -> None:
    """Check that all layers of a spread model are on GPUs.

    Offloaded weights are loaded in every pass, but a backward pass keeps all of them until it ends, on the GPU that has no room for them.

    Raises:
        UsageError: some are not; names one.
    """
    devices = {layer: str(device) for layer, device in getattr(model, "hf_device_map", {}).items()}
    offloaded = [(device, layer) for layer, device in devices.items() if device in ("cpu", "disk")]
    if offloaded and (torch.cuda.is_available() or len(set(devices.values())) > 1):
        device, layer = max(offloaded)
        raise UsageError(
            f"{id} does not fit on this machine's GPUs: {layer} is offloaded to the {device}; use more or larger GPUs, dtype bfloat16, or "
            "device cpu"
        )


def cost_of_placement(model: nn.Module) -> str | None:
    """A sentence about the time that a model's placement takes; None for one on a single device."""
    gpus = len(set(getattr(model, "hf_device_map", {}).values()) - {"cpu", "disk"})
    if gpus < 2:
        return None
    cost = f"the model's layers are on {gpus} GPUs and run one after the other, no faster than on one GPU"
    return f"{cost}; use `device` tp, with which all compute at once" if getattr(model, "tp_plan", None) else cost


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder (PEFT's layout) and its base model."""

    folder: Path
    base: ModelSource


def has_weights(folder: Path) -> bool:
    """True if a folder contains model weights, in any format."""
    return any(any(folder.glob(pattern)) for pattern in _WEIGHT_FILES)


def find_adapter(source: ModelSource) -> Adapter | None:
    """Read an adapter, a folder with adapter_config.json and without model weights; None if the source is not one.

    Raises:
        IncompatibleError: it does not name its base model.
    """
    folder = Path(source.id)
    path = folder / "adapter_config.json"
    if not path.is_file() or has_weights(folder):
        return None
    try:
        config = json.loads(path.read_bytes())
        base = config["base_model_name_or_path"]
        revision = config.get("revision")
        if not isinstance(base, str) or not base or not isinstance(revision, str | None):
            raise ValueError("no base model")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IncompatibleError(f"{path} does not name the adapter's base model; restore it, or set base_model_name_or_path") from error
    if source.base is not None:
        base = source.base
    elif not Path(base).is_dir() and (folder / base).is_dir():
        base = str(folder / base)
    base = str(Path(base).resolve()) if Path(base).is_dir() else base
    if base == str(folder.resolve()):
        raise IncompatibleError(f"{path} names the adapter's folder as its base model; name the model that was adapted")
    return Adapter(folder, replace(source, id=base, revision=None if Path(base).is_dir() else revision, base=None))


def _adapt(model: nn.Module, adapter: Adapter, merged: bool) -> nn.Module:
    """Put an adapter into a model: plain LoRA of linear layers as layers of its own, whose matrices are then tracked; the rest merged.

    Args:
        merged: merge all of it.

    Raises:
        IncompatibleError: it does not fit, or the merged model's predictions are not those of the adapted one.
    """
    folder = adapter.folder
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise IncompatibleError(f"there is no adapter_model.safetensors at {folder}; save the adapter with safe_serialization=True")
    problem = safetensors_problem(file)
    if problem:
        raise IncompatibleError(f"{file} {problem}; restore it")
    require("peft", "adapters")
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    facts = loaded(model)
    _check_kind(folder)
    _resize(model, file)
    try:
        with _quiet(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapted = PeftModel.from_pretrained(model, str(folder)).eval()
    except Exception as error:  # peft raises many kinds of error
        problem = reason(error, "adapter_config.json")
        raise IncompatibleError(f"the adapter at {folder} does not fit its base {adapter.base.id}: {problem}") from error
    _check_tensors(adapted, file, caught)
    plain = {} if merged else _plain_layers(adapted)
    changed = {n for n, m in adapted.base_model.model.named_modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))}
    if changed - plain.keys():
        _untie(adapted)
    with torch.no_grad(), _quiet():
        probe = _spread_tokens(model)
        before = logits_of(adapted, probe).float()
        with adapted.disable_adapter():
            unchanged = torch.equal(before, logits_of(adapted, probe).float())
        notes = [f"the adapter at {folder} does not change its base's predictions (untrained, or lora_alpha is 0)"] if unchanged else []
        try:
            merged_model = _merge_but(adapted, plain).to(next(model.parameters()).dtype)
        except Exception as error:
            raise IncompatibleError(f"the adapter at {folder} cannot be merged into its base: {first_sentence(error)}") from error
        after = logits_of(merged_model, probe).float()
    tolerance = _MERGED.get(next(merged_model.parameters()).dtype, 1e-4)
    if not bool((before - after).abs().max() <= tolerance * before.abs().max()):
        raise IncompatibleError(
            f"the adapter at {folder} cannot be merged into {adapter.base.id}: the merged model's predictions are not those of the adapted "
            "one; merge it yourself, save the merged model, and index that"
        )
    modules = {name for name, _ in merged_model.named_modules()}
    trained = frozenset(name for name in (_innermost(n, modules) for n in changed - plain.keys()) if name).union(*plain.values())
    _LOADED[merged_model] = replace(facts, base=adapter.base.id, trained=trained, notes=(*facts.notes, *notes))
    return merged_model


def _check_tensors(adapted: Any, file: Path, caught: Sequence[Any]) -> None:
    """Check that an adapter's file has the tensors that its configuration describes, and no others of its kind.

    Args:
        caught: the warnings of loading it.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    if any("missing adapter keys" in str(warning.message) for warning in caught):
        raise IncompatibleError(f"{file} lacks weights that its adapter_config.json describes; restore the adapter")
    with safe_open(file, "pt") as tensors:
        names = {name for name in tensors.keys() if "lora_" in name}  # noqa: SIM118
    unexpected = sorted(names - set(get_peft_model_state_dict(adapted)))
    if unexpected:
        raise IncompatibleError(f"{file} has weights that its adapter_config.json does not describe ({unexpected[0]}); restore the adapter")


def _plain_layers(adapted: Any) -> dict[str, frozenset[str]]:
    """By name, the linear layers inside the model that an adapter changes by plain LoRA, with the names of their matrices A and B.

    A layer then computes W x + s B (A x), and the gradients of A and B are those of two small linear layers.
    """
    from peft.tuners.lora import Linear as LoraLinear

    model = adapted.base_model.model
    head = model.get_output_embeddings()
    owners = Counter(id(parameter) for module in adapted.modules() for parameter in module._parameters.values() if parameter is not None)
    plain = {}
    for name, module in model.named_modules():
        if type(module) is not LoraLinear or module is head or module.lora_magnitude_vector or any(module.lora_bias.values()):
            continue
        base = module.get_base_layer()
        if layer_sizes(base) is not None and owners[id(base.weight)] == 1:
            plain[name] = frozenset(f"{name}.{side}.{adapter}" for side in ("lora_A", "lora_B") for adapter in getattr(module, side))
    return plain


def _merge_but(adapted: Any, adapted_layers: Collection[str]) -> nn.Module:
    """Merge an adapter into its base model, but for `adapted_layers`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not adapted_layers:
        return adapted.merge_and_unload(safe_merge=True)
    model: nn.Module = adapted.base_model.model
    done: list[str] = []
    for name, module in list(model.named_modules()):
        if any(name.startswith(f"{outer}.") for outer in done):
            continue
        if hasattr(module, "unload_and_optionally_merge_module"):  # a layer that was trained as a whole, or some of its tokens
            merged = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        elif isinstance(module, BaseTunerLayer) and name not in adapted_layers:
            module.merge(safe_merge=True)
            merged = module.get_base_layer()
        else:
            continue
        model.set_submodule(name, merged)
        done.append(name)
    return model


def _check_kind(folder: Path) -> None:
    """Check by adapter_config.json that PEFT supports the kind of an adapter, and that it changes weights."""
    from peft import PeftConfig, PeftType, PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = json.loads((folder / "adapter_config.json").read_bytes()).get("peft_type")
    classes: dict[str, type[PeftConfig]] = {PeftType(k).value: v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    cls = classes.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise IncompatibleError(f"the adapter at {folder} is of a kind that PEFT does not know ({kind!r:.80}); restore adapter_config.json")
    if issubclass(cls, PromptLearningConfig):
        raise IncompatibleError(
            f"the adapter at {folder} is a {kind}, which does not change the model's weights, so its training has no gradients; "
            "index its base model, or one with a LoRA"
        )


def _innermost(name: str, modules: set[str]) -> str:
    """Name of the merged model's module that contains a module of the adapted one."""
    while name not in modules:
        name = name.rpartition(".")[0]
    return name


def _resize(model: Any, adapter: Path) -> None:
    """Resize a model's vocabulary to that of the adapter's embeddings; refuse an adapter that has only one of the two layers."""
    from safetensors import safe_open

    names = {id(m): n for n, m in model.named_modules()}
    layers = {names[id(m)]: m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    tied = len({id(m.weight) for m in layers.values()}) == 1
    with safe_open(adapter, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    rows = {
        n: shapes[k][0] for n in layers for k in (f"base_model.model.{n}.weight", f"base_model.model.{n}.base_layer.weight") if k in shapes
    }
    sizes = {size for size in rows.values() if size != vocabulary_size(model)}
    if not sizes:
        return
    if len(sizes) > 1 or (len(rows) < len(layers) and not tied):
        raise IncompatibleError(f"{adapter} has a vocabulary of another size without all of its rows; save the merged model and index that")
    with _quiet():
        model.resize_token_embeddings(sizes.pop(), mean_resizing=False)


def _untie(adapted: nn.Module) -> None:
    """Copy the tied weights of adapted layers, since merging into them would change the other layer too."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    owners: dict[int, int] = {}
    for module in adapted.modules():
        for _, parameter in module.named_parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for module in adapted.modules():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else None
        weight = getattr(base, "weight", None)
        if base is not None and isinstance(weight, nn.Parameter) and owners[id(weight)] > 1:
            owners[id(weight)] -= 1
            base.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
            config: Any = getattr(adapted, "config", None)
            config.tie_word_embeddings = False


def _spread_tokens(model: nn.Module) -> Tensor:
    """A short text of tokens spread over the vocabulary."""
    length = min(_PROBED, context_length(model) or _PROBED)
    return torch.linspace(0, vocabulary_size(model) - 1, length).long()[None].to(next(model.parameters()).device)


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """A causal language model's logits, without its cache."""
    return model(input_ids=tokens, **without_cache(model)).logits


def without_cache(model: nn.Module) -> dict[str, bool]:
    """The argument that turns a model's cache off, if it has one."""
    parameters = inspect.signature(model.forward).parameters
    accepted = "use_cache" in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return {"use_cache": False} if accepted else {}


def onto_device(model: nn.Module, device: torch.device | None) -> nn.Module:
    """Move a model to a device (None: leave it), frozen and in evaluation mode.

    Raises:
        UsageError: the device does not accept it.
    """
    try:
        model = model if device is None else model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"the model cannot be moved to {device}: {str(error).splitlines()[0]}") from error
    return model.requires_grad_(False).eval()


def _load(factory: Any, source: ModelSource, kind: str, model: bool = True, **options: Any) -> Any:
    path = Path(source.id)
    local = path.exists() or source.id.startswith((".", "/", "~"))
    if local and source.revision:
        raise UsageError(f"revision {source.revision} applies to hub models only; {source.id} is a directory")
    if local and model and not (path / "config.json").is_file():
        raise NotFoundError(f"there is no model at {source.id} (no config.json in it); give a model's directory or hub id")
    try:
        with _quiet():
            return factory.from_pretrained(
                source.id, revision=source.revision, trust_remote_code=source.trust_remote_code, local_files_only=local, **options
            )
    except Exception as error:  # the hub, safetensors and configuration code raise many kinds of error
        cls = IncompatibleError if local else NotFoundError
        if "trust_remote_code" in str(error):
            raise cls(f"the {kind} of {source.id} has custom code, which runs only with trust_remote_code") from error
        quantized = _quantized(path / "config.json") if local else None
        if quantized:
            raise cls(
                f"the weights of {source.id} are quantized ({quantized}), and gradients need floating-point ones; give the model before "
                "quantization"
            ) from error
        raise cls(f"the {kind} of {source.id} cannot be loaded: {reason(error, _FILES[kind])}") from error


def _quantized(config: Path) -> str | None:
    try:
        return str(json.loads(config.read_bytes())["quantization_config"]["quant_method"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def reason(error: BaseException, file: str) -> str:
    """Reason of another library's loading error: its first sentence, or a plainer one about the file."""
    text = first_sentence(error)
    if isinstance(error, MemoryError) or "alloc" in text:
        return f"it takes more memory than there is, by the sizes in {file}"
    if "size mismatch" in text:
        return f"its weights do not have the shapes in {file}"
    if isinstance(error, json.JSONDecodeError):
        return f"{file} is not JSON"
    if isinstance(error, KeyError) and len(error.args) == 1:
        return f"{error.args[0]!r:.80} is not known, or missing in {file}"
    if isinstance(error, (TypeError, AttributeError, ArithmeticError, LookupError, AssertionError)):
        return f"a value in {file} is missing or invalid ({text})"
    return text


def first_sentence(error: BaseException) -> str:
    """The first sentence of another library's error on one line; a long one is cut at a word, with dots."""
    text = re.split(r"(?<=[.!?])\s", " ".join(str(error).split()), maxsplit=1)[0].rstrip(".")
    if not text:
        return type(error).__name__
    return text if len(text) <= _SENTENCE else text[:_SENTENCE].rpartition(" ")[0] + " ..."


@contextmanager
def _quiet() -> Iterator[None]:
    """Disable the progress bars and reports of transformers; errors are still raised."""
    from transformers.utils import logging

    progress_bar = logging.is_progress_bar_enabled()
    level = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if progress_bar:
            logging.enable_progress_bar()


def refuse_zero_weights(model: nn.Module, id: str) -> None:
    """Check that not all matrices are zero, or too small for products in float32: all gradients would be zero.

    Raises:
        IncompatibleError: they are.
    """
    matrices = [tensor_parallel.own_slice(p) for p in model.parameters() if p.dim() > 1]
    if matrices and all(float(p.detach().abs().max()) < _ZERO for p in matrices):
        raise IncompatibleError(f"the weights of {id} are all zero (or below {_ZERO:g}); give a trained model")


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 over every parameter's and float buffer's name, dtype, shape and bytes; shared weights count once."""
    digest = hashlib.sha256()
    persistent = model.state_dict(keep_vars=True)
    ids: set[int] = set()
    for name in sorted(persistent):
        tensor = persistent[name]
        if id(tensor) in ids or not tensor.is_floating_point():
            continue
        ids.add(id(tensor))
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        content: Any = tensor_parallel.whole(model, name, tensor).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(content)
    return digest.hexdigest()


def load_processor(source: ModelSource) -> Any:
    """Load a model's image processor, which computes by Pillow and numpy on every machine.

    Raises:
        NotFoundError, IncompatibleError: it cannot be loaded.
    """
    require("PIL", "images")
    from transformers import AutoImageProcessor

    if source.loaded is not None and source.loaded.tokenizer is not None:
        return source.loaded.tokenizer
    if source.loaded is not None:
        raise UsageError("an image model in memory needs its image processor; give it as `tokenizer`")
    return _load(AutoImageProcessor, source, "image processor", backend="pil")


def class_names(source: ModelSource) -> dict[int, str]:
    """Return the names of a classifier's classes by their numbers, where its configuration has names; {} without."""
    from transformers import AutoConfig

    config = getattr(source.loaded.model, "config", None) if source.loaded is not None else _load(AutoConfig, source, "configuration")
    names = {int(number): str(name) for number, name in (getattr(config, "id2label", None) or {}).items()}
    return {number: name for number, name in names.items() if name != f"LABEL_{number}"}


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over all that determines the tokens of a text, including the chat template."""
    parts = [tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template or ""), str(tokenizer.eos_token_id)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def context_length(model: Any) -> int | None:
    """The longest input, in tokens, by the configuration; None if unbounded."""
    if getattr(model, "config", None) is None:
        return None
    config = model.config.get_text_config()
    for name, module in model.named_modules():  # RoBERTa's positions start after the padding position
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def rotary_switches(model: Any) -> list[int]:
    """Lengths (tokens) beyond which the configuration encodes a batch's positions differently (LongRoPE, NTK)."""
    if getattr(model, "config", None) is None:
        return []
    config = model.config.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    ropes = [ropes, *(value for value in ropes.values() if isinstance(value, dict))]
    dynamic = [rope for rope in ropes if rope.get("rope_type", rope.get("type")) in ("longrope", "su", "yarn_dynamic", "dynamic")]
    lengths = [
        rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None) for rope in dynamic
    ]
    return sorted({int(length) for length in lengths if length})


def vocabulary_size(model: Any) -> int:
    """Number of tokens that the model embeds."""
    return int(model.get_input_embeddings().weight.shape[0])


def layer_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(outputs, inputs) of a layer that can be tracked, else None.

    These are nn.Linear, the transposed Conv1D of GPT-2, and nn.Conv2d without groups, whose inputs are the values under its kernel.
    """
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return module.out_channels, module.in_channels * math.prod(module.kernel_size)
    if isinstance(module, nn.Linear) and module.weight.is_floating_point():
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    return None


def is_transposed(module: nn.Module) -> bool:
    """Return True if a layer's weight is [inputs, outputs] (GPT-2's Conv1D)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def differ(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """True if two computations of the same numbers differ by more than the round-off of a model of that dtype."""
    return bool((a - b).abs().max() > _SAME.get(dtype, 1e-5) * a.abs().max())
