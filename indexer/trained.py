"""Record of training: changed layers (of an adapter, by a run's record, by what requires gradients, or compared with the base) and distance
of the steps."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..store.errors import IncompatibleError, UsageError
from .experts import with_unfused
from .models import ModelSource, loaded, set_trained
from .tasks import Task, load_model
from .tensor_parallel import whole

RECORD = "wherefrom.json"
_LARGEST_RECORD = 64 << 20


def find_trained(task: Task, model: nn.Module, source: ModelSource, base: str | None) -> None:
    """Find which layers of a model training changed, where this can be known; see `loaded`.

    Args:
        model: as `load_model` returns it; an adapter's layers are known then.
        base: directory or hub id of the model that training started from; None if it is not given.

    Raises:
        IncompatibleError: the base is another model, or equal to the model; the record is damaged.
        UsageError: the base of an adapter was given.
    """
    trained_layers = loaded(model).trained
    if base is not None and trained_layers is not None:
        raise UsageError(f"{source.id} is an adapter, which says what it trained; leave `base` out")
    if base is not None:
        trained_layers = _changed(task, model, source, base)
    elif trained_layers is None and source.loaded is not None:
        trained_layers = layers_with_gradients(source.loaded.model)
    elif trained_layers is None:
        trained_layers = _recorded(Path(source.id))
    if trained_layers is not None and trained_layers & {name for name, _ in model.named_modules()}:
        set_trained(model, with_unfused(model, trained_layers))


def layers_with_gradients(model: nn.Module) -> frozenset[str] | None:
    """The layers that have parameters that require gradients; None where all parameters do, or none does, which says nothing."""
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    required = {p.requires_grad for p in model.parameters()}
    if len(required) < 2:
        return None
    return _owners(model, {id(p) for p in model.parameters() if p.requires_grad})


def _owners(model: nn.Module, ids: set[int]) -> frozenset[str]:
    """The layers that own one of some parameters; a tied parameter has several."""
    return frozenset(name for name, module in model.named_modules() if any(id(p) in ids for p in module.parameters(recurse=False)))


def _changed(task: Task, model: nn.Module, source: ModelSource, base: str) -> frozenset[str]:
    """The layers whose weights are not those of the base."""
    start = dict(load_model(task, ModelSource(base, None, source.dtype, "cpu", source.trust_remote_code)).named_parameters())
    parameters = dict(model.named_parameters())
    if parameters.keys() != start.keys():
        name = min(parameters.keys() ^ start.keys())
        raise IncompatibleError(
            f"{base} is not the base of {source.id}: only one of them has {name}; name the model that training started from"
        )
    changed = {
        id(p)
        for name, p in parameters.items()
        if p.shape != start[name].shape or not torch.equal(whole(model, name, p).detach().cpu(), start[name])
    }
    if not changed:
        raise IncompatibleError(f"the weights of {source.id} and of its base {base} are equal: nothing was trained; give the trained model")
    return _owners(model, changed)


def recorded_times(folder: str) -> dict[str, float] | None:
    """Return the learning times of the layers of a model or checkpoint, as the record of its run has them (see `Model`); None without.

    Raises:
        IncompatibleError: the record is damaged.
    """
    path_and_record = _record(Path(folder))
    if path_and_record is None:
        return None
    path, record = path_and_record
    times = _checkpoint(record, Path(folder)).get("learning_times")
    if times is None and path.parent == Path(folder):
        times = record.get("learning_times")
    if times is not None and not (
        isinstance(times, dict) and all(isinstance(t, float | int) and 0 <= t < math.inf for t in times.values())
    ):
        raise IncompatibleError(f"{path} is not the record of a training run; restore it, or delete it")
    return times


def recorded_rate(folder: str) -> float | None:
    """Return the mean learning rate of the segment of training that ends with a checkpoint, as the record of its run has it; None without.

    Raises:
        IncompatibleError: the record is damaged.
    """
    path_and_record = _record(Path(folder))
    checkpoint = {} if path_and_record is None else _checkpoint(path_and_record[1], Path(folder))
    if path_and_record is None or not checkpoint:
        return None
    try:
        end = int(checkpoint["step"])
        start = max((int(other["step"]) for other in path_and_record[1]["checkpoints"] if other["step"] < end), default=0)
        rates = [float(rate) for step, rate in path_and_record[1].get("rates", []) if start < step <= end]
    except (KeyError, TypeError, ValueError) as error:
        raise IncompatibleError(f"{path_and_record[0]} is not the record of a training run; restore it, or delete it") from error
    return sum(rates) / len(rates) if rates and 0 < sum(rates) < math.inf else None


def _recorded(folder: Path) -> frozenset[str] | None:
    """The layers that a record of the run says were trained: in the folder of a model, or next to that of a checkpoint; else None."""
    path_and_record = _record(folder)
    names = None if path_and_record is None else path_and_record[1].get("trained")
    return None if names is None else frozenset(names)


def _record(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The record of the run of a model, in its folder or next to that of a checkpoint, that has an entry for it."""
    for path in (folder / RECORD, folder.parent / RECORD):
        if not path.is_file():
            continue
        try:
            if path.stat().st_size > _LARGEST_RECORD:
                raise ValueError("it is too large")
            record: Any = json.loads(path.read_bytes())
            has_entry = path.parent == folder or bool(_checkpoint(record, folder))
            names = record.get("trained")
            if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
                raise ValueError("`trained` is not a list of names")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise IncompatibleError(f"{path} is not the record of a training run; restore it, or delete it") from error
        if has_entry:
            return path, record
    return None


def _checkpoint(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a checkpoint's entry of a record, or {}."""
    return next((checkpoint for checkpoint in record.get("checkpoints", []) if checkpoint["path"] == folder.name), {})
