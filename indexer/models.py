"""Models from a directory or a hub: loading, identity, sizes.

Only safetensors weights are loaded (a pickle can run code), and no code that comes with a model unless its user asks for it by name.
"""

import ctypes
import hashlib
import importlib.util
import inspect
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..store.errors import IncompatibleError, NotFoundError, UsageError

SPREAD = "map"  # a device: all GPUs of the machine
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SAME = {torch.bfloat16: 1e-2}  # relative difference up to which two computations of one number are the same; else 1e-5
_MERGED = {torch.bfloat16: 5e-2, torch.float64: 1e-9}  # by which predictions of a merged model may differ, relatively; else 1e-4
_PROBED = 32
_DEEPEST = 10_000
_ZERO = 1e-20
_SETTINGS = {"configuration": "config.json", "tokenizer": "tokenizer.json or tokenizer_config.json", "model": "config.json"}
_SENTENCE = 240
_LFS_POINTER, _LARGEST_POINTER, _LARGEST_HEADER = b"version https://git-lfs", 64, 100 << 20
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
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class ModelSource:
    """Which model, and how it is held in memory.

    Attributes:
        device: "auto", "cpu", "cuda", "cuda:1" ..., or "map" for a language model whose layers are spread over all GPUs.
        base: of an adapter, where the model lies that it is merged into; None where it says itself.
    """

    id: str
    revision: str | None = None
    dtype: str = "float32"
    device: str = "auto"
    trust_remote_code: bool = False
    base: str | None = None


@dataclass(frozen=True)
class Loaded:
    """What is to be said of a model as it was loaded.

    Attributes:
        base: of an adapter, the directory or hub id of the model that it was merged into.
        trained: of an adapter, the modules that it changed; None where the whole model is taken as trained.
        notes: sentences for whoever reads the answers.
    """

    base: str | None = None
    trained: frozenset[str] | None = None
    notes: tuple[str, ...] = ()


_LOADED: "WeakKeyDictionary[nn.Module, Loaded]" = WeakKeyDictionary()


def loaded(model: nn.Module) -> Loaded:
    """What was noted when a model was loaded; nothing of one that somebody else loaded."""
    return _LOADED.get(model, Loaded())


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
    from transformers import AutoConfig, AutoTokenizer

    adapter = find_adapter(source)
    if adapter is not None and not (adapter.folder / "tokenizer.json").is_file():
        return load_tokenizer(adapter.base)
    if (Path(source.id) / "config.json").is_file() and not any(any(Path(source.id).glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise NotFoundError(f"there is no tokenizer at {source.id} (no tokenizer.json); save it beside the model")
    if adapter is None:
        _load(AutoConfig, source, "configuration")  # which the tokenizer's class is found by
    return _fast(_load(AutoTokenizer, source, "tokenizer", whole=adapter is None), source)


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
        raise IncompatibleError(f"{path} holds weights that are not floating-point numbers (quantized?); save them as float32")
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
    device = None if source.device == SPREAD else resolve_device(source.device)
    adapter = find_adapter(source)
    if adapter is not None:
        return onto_device(_merged(load_causal_lm(adapter.base), adapter), device)
    return onto_device(_load_whole(source, device), device)


def _load_whole(source: ModelSource, device: torch.device | None) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = _load(AutoConfig, source, "configuration")
    _check_suitable(config, source)
    _check_weights(source)
    # An adapter's files beside a merged model are looked for where there are none, since they would be applied once more.
    config.return_dict, config.output_hidden_states, config.output_attentions = True, False, False
    options: dict[str, Any] = {"config": config, "dtype": DTYPES[source.dtype], "use_safetensors": True, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # they are refused below, by name
    options["adapter_kwargs"] = {"subfolder": "no-adapter"}
    if device is None:
        if importlib.util.find_spec("accelerate") is None:
            raise UsageError("--device map needs accelerate: pip install accelerate")
        options["device_map"] = "auto"
    model, loading = _load(AutoModelForCausalLM, source, "model", **options)
    missing, mismatched, unexpected = (
        sorted(str(key[0] if isinstance(key, tuple) else key) for key in loading.get(kind) or ())
        for kind in ("missing_keys", "mismatched_keys", "unexpected_keys")
    )
    inside = [name for name in unexpected if any(part in name for part in _ADAPTER_LAYERS)]
    if inside:
        raise IncompatibleError(
            f"the weights of {source.id} hold adapter layers that are not merged ({inside[0]}); merge them (PEFT's merge_and_unload), "
            "or give the adapter's own folder"
        )
    if missing or mismatched:
        problem = f"{missing[0]} is missing" if missing else f"{mismatched[0]} has another shape"
        if any(name.startswith("_orig_mod.") for name in unexpected):
            problem = "they are those of a compiled model (_orig_mod.); save the model before torch.compile, or its _orig_mod"
        raise IncompatibleError(f"the weights of {source.id} and its config.json do not fit: {problem}; restore the checkpoint")
    refuse_offloaded(model, source.id)
    notes = []
    if unexpected:
        some = ", ".join(unexpected[:3]) + (" ..." if len(unexpected) > 3 else "")
        notes.append(f"the checkpoint {source.id} holds {len(unexpected)} tensors that the model does not use: {some}")
    _LOADED[model] = Loaded(notes=tuple(notes))
    return model


def _check_suitable(config: Any, source: ModelSource) -> None:
    """Refuse, by its configuration, a model that is not a causal language model.

    Raises:
        IncompatibleError: says what it is instead.
    """
    depth = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(depth, int) and depth > _DEEPEST:
        raise IncompatibleError(f"the configuration of {source.id} names {depth:,} layers, which no model has; restore config.json")
    named = [str(name) for name in getattr(config, "architectures", None) or ()]
    kind = other_kind(config, named)
    if kind is not None:
        raise IncompatibleError(
            f"{source.id} is {kind} ({', '.join(named) or config.model_type}), where a causal language model is needed; give one, or a "
            "task of your own for it (docs/evaluation.md)"
        )


def other_kind(config: Any, named: Sequence[str]) -> str | None:
    """What a model is that is not a causal language model, by its configuration and the names of its classes; None where it may be one."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kinds = {} if getattr(config, "is_decoder", False) else _OTHER_KINDS
    kind = next((what for suffix, what in kinds.items() for name in named if name.endswith(suffix)), None)
    own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if kind is not None or own:
        return kind
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder model"
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "of a kind that has no causal language model"
    return "a model without its output head" if len(named) == 1 and re.search(r"(?<!LMHead)Model$", named[0]) else None


def _check_weights(source: ModelSource) -> None:
    """Refuse weight files that are not there, not whole, or not safetensors, before any library reads them.

    Raises:
        IncompatibleError: names the file.
    """
    folder = Path(source.id)
    if not folder.is_dir():
        return
    index = folder / "model.safetensors.index.json"
    try:
        named = set(json.loads(index.read_bytes())["weight_map"].values()) if index.is_file() else set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IncompatibleError(f"{index} is not the list of the weights' files that it should be; restore the checkpoint") from error
    if not all(isinstance(name, str) for name in named):
        raise IncompatibleError(f"{index} is not the list of the weights' files that it should be; restore the checkpoint")
    gone = sorted(name for name in named if not (folder / str(name)).is_file())
    if gone:
        raise IncompatibleError(f"{folder / gone[0]} is missing, which holds a part of the weights; restore the checkpoint")
    files = sorted(folder / name for name in named) if named else sorted(folder.glob("model*.safetensors"))
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
    """What is wrong with a safetensors file as a whole, by its header and size; None where nothing is."""
    if not path.is_file():
        return "is not a regular file"
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(_LARGEST_POINTER)
        if start.startswith(_LFS_POINTER):
            return "is a pointer of Git LFS and not the file itself: run git lfs pull where it came from"
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            return "is not a whole safetensors file (cut off?)"
        file.seek(8)
        try:
            header = json.loads(file.read(length))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            return "is not a safetensors file: its header cannot be read"
    whole = [n for n, e in header.items() if n.endswith("weight") and str(e.get("dtype")).startswith(("I", "U", "BOOL"))]
    if whole:
        return f"holds whole numbers in {whole[0]} (quantized?), and gradients need floating-point weights"
    return None if end == size - 8 - length else f"has {size:,} bytes where its header says {8 + length + end:,} (cut off?)"


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


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder (PEFT's layout) and the model that it belongs to."""

    folder: Path
    base: ModelSource


def has_weights(folder: Path) -> bool:
    """Whether a model's own weights lie in a folder, of whatever format."""
    return any(any(folder.glob(pattern)) for pattern in _WEIGHT_FILES)


def find_adapter(source: ModelSource) -> Adapter | None:
    """The adapter that a source is: a folder with adapter_config.json and without weights of a model; None where it is none.

    Raises:
        IncompatibleError: it does not say which model it belongs to.
    """
    folder = Path(source.id)
    path = folder / "adapter_config.json"
    if not path.is_file() or has_weights(folder):
        return None
    try:
        config = json.loads(path.read_bytes())
        base, revision = config["base_model_name_or_path"], config.get("revision")
        if not isinstance(base, str) or not base or not isinstance(revision, str | None):
            raise ValueError("it names no base model")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IncompatibleError(
            f"{path} does not say which model the adapter belongs to; restore it, or name base_model_name_or_path"
        ) from error
    if source.base is not None:
        base = source.base
    elif not Path(base).is_dir() and (folder / base).is_dir():
        base = str(folder / base)
    base = str(Path(base).resolve()) if Path(base).is_dir() else base
    if base == str(folder.resolve()):
        raise IncompatibleError(f"{path} names the adapter's own folder as its base model; name the model that was adapted")
    return Adapter(folder, replace(source, id=base, revision=None if Path(base).is_dir() else revision, base=None))


def _merged(model: nn.Module, adapter: Adapter) -> nn.Module:
    """A model with an adapter's change of its weights added to them.

    Raises:
        IncompatibleError: the adapter does not fit the model, or the merged model does not compute what the adapted one does.
    """
    folder, file = adapter.folder, adapter.folder / "adapter_model.safetensors"
    if not file.is_file():
        raise IncompatibleError(f"there is no adapter_model.safetensors at {folder}; save the adapter with safe_serialization=True")
    problem = safetensors_problem(file)
    if problem:
        raise IncompatibleError(f"{file} {problem}; restore it")
    if importlib.util.find_spec("peft") is None:
        raise UsageError(f"{folder} is an adapter, which needs peft: pip install peft")
    from peft import PeftModel, get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper
    from safetensors import safe_open

    known = loaded(model)
    _check_kind(folder)
    _resize(model, file)
    try:
        with _quiet(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapted = PeftModel.from_pretrained(model, str(folder)).eval()
    except Exception as error:  # peft, too, raises what it likes
        why = reason(error, "adapter_config.json")
        raise IncompatibleError(f"the adapter at {folder} does not fit its base {adapter.base.id}: {why}") from error
    lost = next((str(w.message) for w in caught if "missing adapter keys" in str(w.message)), None)
    if lost is not None:
        raise IncompatibleError(f"{file} lacks weights of the adapter that its adapter_config.json describes; restore the adapter")
    with safe_open(file, "pt") as opened:
        held = {name for name in opened.keys() if "lora_" in name}  # noqa: SIM118
    foreign = sorted(held - set(get_peft_model_state_dict(adapted)))
    if foreign:
        raise IncompatibleError(f"{file} holds weights that its adapter_config.json does not name ({foreign[0]}); restore the adapter")
    _untie(adapted)
    changed = {n for n, m in adapted.named_modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))}
    with torch.no_grad(), _quiet():
        probe = _spread_tokens(model)
        before = logits_of(adapted, probe).float()
        with adapted.disable_adapter():
            unchanged = torch.equal(before, logits_of(adapted, probe).float())
        try:
            merged: nn.Module = adapted.merge_and_unload(safe_merge=True)
        except Exception as error:
            raise IncompatibleError(f"the adapter at {folder} cannot be merged into its base: {first_sentence(error)}") from error
        after = logits_of(merged, probe).float()
    tolerance = _MERGED.get(next(merged.parameters()).dtype, 1e-4)
    if not bool((before - after).abs().max() <= tolerance * before.abs().max()):
        raise IncompatibleError(
            f"the adapter at {folder} cannot be merged into {adapter.base.id}: the merged model's predictions are not those of the adapted "
            "one; merge it yourself, save the whole model, and index that"
        )
    modules = {name for name, _ in merged.named_modules()}
    trained = frozenset(name for name in (_innermost(c.removeprefix("base_model.model."), modules) for c in changed) if name)
    notes = [f"the adapter at {folder} changes nothing of its base's predictions (untrained, or lora_alpha is 0)"] if unchanged else []
    _LOADED[merged] = replace(known, base=adapter.base.id, trained=trained, notes=(*known.notes, *notes))
    return merged


def _check_kind(folder: Path) -> None:
    """Refuse, by adapter_config.json, an adapter of a kind that PEFT does not know or that changes no weights.

    Raises:
        IncompatibleError: says which kind it is.
    """
    from peft import PeftConfig, PeftType, PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = json.loads((folder / "adapter_config.json").read_bytes()).get("peft_type")
    classes: dict[str, type[PeftConfig]] = {PeftType(k).value: v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    known = classes.get(kind) if isinstance(kind, str) else None
    if known is None:
        raise IncompatibleError(f"the adapter at {folder} is of a kind that PEFT does not know ({kind!r:.80}); restore adapter_config.json")
    if issubclass(known, PromptLearningConfig):
        raise IncompatibleError(
            f"the adapter at {folder} is a {kind}, which changes none of the model's weights, so that its training has no rows; "
            "index the model that it belongs to, or one with a LoRA"
        )


def _innermost(name: str, modules: set[str]) -> str:
    """The module of the merged model that a module of the adapted one is, or is a part of."""
    while name not in modules:
        name = name.rpartition(".")[0]
    return name


def _resize(model: Any, adapter: Path) -> None:
    """Give a model the vocabulary of an adapter that brings embeddings of another size.

    Raises:
        IncompatibleError: the adapter brings the rows of one of the two layers alone.
    """
    from safetensors import safe_open

    names = {id(m): n for n, m in model.named_modules()}
    layers = {names[id(m)]: m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    tied = len({id(m.weight) for m in layers.values()}) == 1
    with safe_open(adapter, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    brought = {
        n: shapes[k][0] for n in layers for k in (f"base_model.model.{n}.weight", f"base_model.model.{n}.base_layer.weight") if k in shapes
    }
    sizes = {size for size in brought.values() if size != vocabulary_size(model)}
    if not sizes:
        return
    if len(sizes) > 1 or (len(brought) < len(layers) and not tied):
        raise IncompatibleError(
            f"{adapter} brings a vocabulary of another size without all of its rows; save the whole model and index that"
        )
    with _quiet():
        model.resize_token_embeddings(sizes.pop(), mean_resizing=False)


def _untie(adapted: nn.Module) -> None:
    """Give every adapted layer a weight of its own, which merging may change: a tied one would change the other layer, too."""
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
    """A short text of tokens from all over the vocabulary."""
    length = min(_PROBED, context_length(model) or _PROBED)
    return torch.linspace(0, vocabulary_size(model) - 1, length).long()[None].to(next(model.parameters()).device)


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """A causal language model's logits; no cache is asked for, where its forward knows of one."""
    return model(input_ids=tokens, **_without_cache(model)).logits


def _without_cache(model: nn.Module) -> dict[str, bool]:
    parameters = inspect.signature(model.forward).parameters
    known = "use_cache" in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return {"use_cache": False} if known else {}


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
        with _quiet():
            return factory.from_pretrained(
                source.id, revision=source.revision, trust_remote_code=source.trust_remote_code, local_files_only=local, **options
            )
    except Exception as error:  # the hub, safetensors and configuration code raise what they like; say which model, and why
        known = IncompatibleError if local else NotFoundError
        if "trust_remote_code" in str(error):
            raise known(
                f"the {what} of {source.id} comes with code of its own, which runs only when it is asked for (--trust-remote-code)"
            ) from error
        quantized = _quantized(path / "config.json") if local else None
        if quantized:
            raise known(
                f"the weights of {source.id} are quantized ({quantized}), and gradients need floating-point ones; give the model as it was "
                "before that"
            ) from error
        raise known(f"the {what} of {source.id} cannot be loaded: {reason(error, _SETTINGS[what])}") from error


def _quantized(config: Path) -> str | None:
    try:
        return str(json.loads(config.read_bytes())["quantization_config"]["quant_method"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def reason(error: BaseException, file: str) -> str:
    """Why another library could not load something: its sentence where it wrote one, else ours about the file that was being read."""
    text = first_sentence(error)
    if isinstance(error, MemoryError) or "alloc" in text:
        return f"it takes more memory than there is, by the sizes that {file} gives"
    if "size mismatch" in text:
        return f"its weights have other shapes than {file} says"
    if isinstance(error, json.JSONDecodeError):
        return f"{file} is not JSON"
    if isinstance(error, KeyError) and len(error.args) == 1:
        return f"{error.args[0]!r:.80} is not known, or missing in {file}"
    if isinstance(error, (TypeError, AttributeError, ArithmeticError, LookupError, AssertionError)):
        return f"a value in {file} is missing, or none that it can be ({text})"
    return text


def first_sentence(error: BaseException) -> str:
    """The first sentence of another library's error on one line, whole: what is too long ends at a word, with dots."""
    text = re.split(r"(?<=[.!?])\s", " ".join(str(error).split()), maxsplit=1)[0].rstrip(".")
    if not text:
        return type(error).__name__
    return text if len(text) <= _SENTENCE else text[:_SENTENCE].rpartition(" ")[0] + " ..."


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from drawing bars and printing reports while it loads; its errors are raised."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def refuse_zero_weights(model: nn.Module, id: str) -> None:
    """Refuse a model whose every matrix is zero, or too small for products in float32: all of its gradients would be zero.

    Raises:
        IncompatibleError: it is.
    """
    matrices = [p for p in model.parameters() if p.dim() > 1]
    if matrices and all(float(p.detach().abs().max()) < _ZERO for p in matrices):
        raise IncompatibleError(f"the weights of {id} are all zero (or below {_ZERO:g}); give a trained model")


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
    if getattr(model, "config", None) is None:
        return None
    config = model.config.get_text_config()
    for name, module in model.named_modules():  # RoBERTa's positions begin behind that of padding
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def rotary_switches(model: Any) -> list[int]:
    """Lengths (tokens) beyond which the configuration says that a batch's positions are encoded another way (LongRoPE, NTK)."""
    if getattr(model, "config", None) is None:
        return []
    config = model.config.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    ropes = [ropes, *(value for value in ropes.values() if isinstance(value, dict))]
    named = [rope for rope in ropes if rope.get("rope_type", rope.get("type")) in ("longrope", "su", "yarn_dynamic", "dynamic")]
    lengths = [rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None) for rope in named]
    return sorted({int(length) for length in lengths if length})


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
