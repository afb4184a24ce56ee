"""Record of a training run, from which `wherefrom replay` computes exact influence.

    from wherefrom import TrainingRecorder

    with TrainingRecorder("run", model, optimizer, tokenizer=tokenizer, clip_norm=1.0) as recorder:
        for input_ids, labels in loader:
            recorder.batch(input_ids, labels)
            model(input_ids=input_ids, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

Training with transformers' Trainer needs no such code: give it `WherefromCallback(record=True)`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .indexer.batches import IGNORED
from .store.documents import Example
from .store.errors import DataError, UsageError
from .store.files import storage_errors
from .store.shapes import Int
from .store.training import ParameterGroup, TrainingBatch, TrainingSettings, TrainingStep, content_key, write_training

_OPTIMIZERS: Mapping[type, str] = {torch.optim.AdamW: "adamw", torch.optim.Adam: "adam", torch.optim.SGD: "sgd"}
_SHORTEST = 2
_ADAPTERS = ["default"]
_WRAPPER = "base_model.model."


class TrainingRecorder:
    """Recorder of one training run; see the module. Leaving the context without an error writes the record.

    Args:
        directory: for the trained model and the record; it must not exist, or be empty.
        model: a transformers causal language model, or a LoRA adapter on one (PEFT), in one process, before its first step.
        optimizer: PyTorch's AdamW, Adam or SGD; its steps and learning rates are recorded by themselves.
        tokenizer: is saved beside the model, and decodes the examples' texts.
        clip_norm: the norm to which `clip_grad_norm_` clips all parameters' gradients; None without clipping.

    Raises:
        UsageError: the run cannot be repeated from a record.
    """

    def __init__(
        self,
        directory: str | Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        tokenizer: Any = None,
        clip_norm: float | None = None,
    ) -> None:
        self.directory = Path(directory)
        if self.directory.exists() and (not self.directory.is_dir() or any(self.directory.iterdir())):
            raise UsageError(f"{directory} exists and is not empty; choose another directory for the record")
        inner = getattr(optimizer, "optimizer", optimizer)  # unwrap Accelerate's
        kind = _OPTIMIZERS.get(type(inner))
        if kind is None:
            raise UsageError(f"{type(inner).__name__} cannot be replayed; train with PyTorch's AdamW, Adam or SGD")
        if inner.state:
            raise UsageError("the optimizer has made steps already; record a run from its first step")
        if not hasattr(model, "save_pretrained"):
            raise UsageError(f"{type(model).__name__} is not a transformers model, whose training can be recorded")
        if list(getattr(model, "peft_config", _ADAPTERS)) != _ADAPTERS:
            raise UsageError("the model has several adapters, or one that is not named 'default'; train one under that name")
        self._model = model
        self._tokenizer = tokenizer
        self._kind = kind
        self._groups = _groups(model, inner)
        self._clip_norm = clip_norm
        parameters = _parameters(model)
        names = [name for group in self._groups for name in group.names]
        self._initial = {n: _stored(parameters[n]).copy() for n in names}
        self._dropout = _has_dropout(model)
        if self._dropout and parameters[names[0]].device.type != "cpu":
            raise UsageError("dropout on a GPU cannot be replayed; set the model's dropout to 0, or train on the CPU")
        self._autocast: str | None = None
        self._examples: list[Example] = []
        self._numbers: dict[bytes, int] = {}
        self._batches: list[TrainingBatch] = []
        self._steps: list[TrainingStep] = []
        self._hook = inner.register_step_pre_hook(lambda optimizer, *call: self._step(optimizer))

    def __enter__(self) -> "TrainingRecorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        else:
            self.stop()

    def batch(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        labels: Int[Tensor, "batch tokens"],
        attention_mask: Int[Tensor, "batch tokens"] | None = None,
        *,
        denominator: float | None = None,
        ids: Sequence[str] | None = None,
    ) -> None:
        """Record a batch, just before the model's forward pass.

        Args:
            input_ids: tokens of the examples, padded.
            labels: the tokens themselves where they are in the loss, -100 elsewhere, as transformers' models take them (not shifted).
            attention_mask: 0 on padding; without it, rows are not padded.
            denominator: what the sum of the batch's token losses is divided by; by default its number of tokens in the loss.
            ids: names of the examples; by default examples with the same tokens and labels are one, and are numbered.

        Raises:
            DataError: the batch's arrays do not fit, or an example is not a causal language model's.
        """
        tokens, targets = np.asarray(input_ids.cpu(), np.int64), np.asarray(labels.cpu(), np.int64)
        mask = np.ones_like(tokens) if attention_mask is None else np.asarray(attention_mask.cpu(), np.int64)
        if tokens.ndim != 2 or tokens.shape != targets.shape or tokens.shape != mask.shape:
            raise DataError(f"a batch has token ids {tokens.shape}, labels {targets.shape} and a mask {mask.shape}; they must fit")
        device = input_ids.device.type
        autocast = str(torch.get_autocast_dtype(device)).removeprefix("torch.") if torch.is_autocast_enabled(device) else None
        if autocast not in (None, "bfloat16") or (self._steps and autocast != self._autocast):
            raise DataError(f"mixed precision in {autocast} cannot be replayed; train in bfloat16 or without it, all the way")
        self._autocast = autocast
        left_padded = bool((mask[:, -1] == 1).all() and (mask[:, 0] == 0).any())
        numbers = []
        firsts = set[bool]()
        for i, (row, target, valid) in enumerate(zip(tokens, targets, mask == 1, strict=True)):
            length = int(valid.sum())
            if not valid[-length if left_padded else 0 : None if left_padded else length].all() or length < _SHORTEST:
                raise DataError(f"example {i} of a batch is too short, or padded in other places than its end or its start")
            if (target[~valid] != IGNORED).any() or ((target != IGNORED) & (target != row)).any():
                raise DataError(f"example {i} of a batch has labels on padding, or labels that are not its own tokens")
            if length < tokens.shape[1] and left_padded:
                firsts.add(bool(target[valid][0] != IGNORED))
            numbers.append(self._number(row[valid], target[valid] != IGNORED, None if ids is None else ids[i]))
        if len(firsts) > 1:
            raise DataError("a batch has the first token of some texts in the loss, where it is predicted from padding, and of others not")
        count = float((targets[:, 1:] != IGNORED).sum()) if denominator is None else float(denominator)
        if not count > 0:
            raise DataError("a batch has no token in the loss")
        generator = torch.get_rng_state().numpy().copy() if self._dropout else None
        self._batches.append(TrainingBatch(tuple(numbers), tokens.shape[1], left_padded, firsts == {True}, count, generator))

    def finish(self) -> Path:
        """Write the trained model and the record; returns the directory.

        Raises:
            UsageError: no step was recorded.
            StorageError: a file cannot be written.
        """
        self.stop()
        if not self._steps:
            raise UsageError("no step of the optimizer was recorded; call `batch` before each forward pass")
        batches = sum(len(step.batches) for step in self._steps)
        settings = TrainingSettings(
            optimizer=self._kind,  # type: ignore[arg-type]
            groups=self._groups,
            clip_norm=self._clip_norm,
            autocast=self._autocast,  # type: ignore[arg-type]
            steps=len(self._steps),
            batches=batches,
            examples=len(self._examples),
        )
        with storage_errors(self.directory):
            self._model.save_pretrained(self.directory)  # type: ignore[operator]
            if self._tokenizer is not None:
                self._tokenizer.save_pretrained(self.directory)
        write_training(self.directory, settings, self._steps, self._examples, self._initial)
        return self.directory

    def stop(self) -> None:
        """Stop recording; nothing is written."""
        self._hook.remove()

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self._batches:
            raise UsageError("the optimizer made a step without a recorded batch; call `batch` before each forward pass")
        groups = [group for group in optimizer.param_groups if any(p.requires_grad for p in group["params"])]
        self._steps.append(TrainingStep(tuple(self._batches), tuple(float(group["lr"]) for group in groups)))
        self._batches = []

    def _number(self, tokens: np.ndarray, in_loss: np.ndarray, id: str | None) -> int:
        """The number of an example, which is new or was seen before."""
        in_loss = np.array(in_loss, bool)
        in_loss[0] = False
        name = str(len(self._examples)) if id is None else id
        example = Example(name, "", "training", tokens.astype(np.int32), in_loss)
        key = content_key(example) + (b"" if id is None else id.encode())
        if key not in self._numbers:
            self._numbers[key] = len(self._examples)
            text = "" if self._tokenizer is None else self._tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
            self._examples.append(Example(name, text, "training", example.token_ids, in_loss))
        return self._numbers[key]


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by their names in the saved model; PEFT wraps the model while it is trained."""
    return {name.removeprefix(_WRAPPER): parameter for name, parameter in model.named_parameters()}


def _groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[ParameterGroup, ...]:
    names = {id(parameter): name for name, parameter in _parameters(model).items()}
    groups = []
    for group in optimizer.param_groups:
        own = [p for p in group["params"] if p.requires_grad]
        if any(id(p) not in names for p in own):
            raise UsageError("the optimizer has parameters that are not the model's; give it the model's parameters")
        if group.get("amsgrad") or group.get("maximize"):
            raise UsageError("amsgrad and maximize cannot be replayed; train without them")
        settings: dict[str, Any] = {n: group[n] for n in ("weight_decay", "eps", "momentum", "dampening", "nesterov") if n in group}
        if "betas" in group:
            settings["beta1"], settings["beta2"] = group["betas"]
        if own:
            groups.append(ParameterGroup(names=tuple(names[id(p)] for p in own), **settings))
    trained = [name for group in groups for name in group.names]
    if hasattr(model, "peft_config") and not all(".lora_" in name for name in trained):
        raise UsageError("the adapter trains other parameters than matrices of LoRA (modules_to_save?), which cannot be replayed")
    if not groups:
        raise UsageError("the optimizer trains no parameter of the model")
    return tuple(groups)


def _stored(parameter: Tensor) -> np.ndarray:
    """A parameter as an array of float32 or float64."""
    value = parameter.detach().cpu()
    return value.numpy() if value.dtype == torch.float64 else value.float().numpy()


def _has_dropout(model: nn.Module) -> bool:
    """True if the model's forward pass in training may draw random numbers."""
    settings = model.config.to_dict().items()  # type: ignore[union-attr, operator]
    configured = any("drop" in name and isinstance(value, int | float) and value > 0 for name, value in settings)
    return configured or any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
