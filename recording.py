"""Record of a training run, from which `wherefrom replay` computes exact influence.

    from wherefrom import TrainingRecorder

    with TrainingRecorder("run", model, optimizer, tokenizer=tokenizer, clip_norm=1.0) as recorder:
        for input_ids, attention_mask, labels in loader:
            recorder.batch(input_ids, labels, attention_mask)
            model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

Training with transformers' Trainer needs no such code: give it `WherefromCallback(record=True)`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .indexer.batches import IGNORED
from .store.documents import Example
from .store.errors import DataError, UsageError
from .store.files import storage_errors
from .store.shapes import Bool, Int, Int64
from .store.training import ParameterGroup, TrainingBatch, TrainingSettings, TrainingStep, content_key, write_training

_OPTIMIZERS: Mapping[type, Literal["adamw", "adam", "sgd"]] = {torch.optim.AdamW: "adamw", torch.optim.Adam: "adam", torch.optim.SGD: "sgd"}
_SHORTEST = 2
_ADAPTERS = ["default"]
_WRAPPER = "base_model.model."
_HEADS = ("summary_", "classifier_")  # settings of layers that a language model does not have


class TrainingRecorder:
    """Recorder of one training run; see the module. Leaving the context without an error writes the record.

    Args:
        directory: for the trained model and the record; it must not exist, or be empty.
        model: a transformers causal language model, or a LoRA adapter on one (PEFT), in one process, before its first step.
        optimizer: PyTorch's AdamW, Adam or SGD; its steps and learning rates are recorded by themselves.
        tokenizer: is saved next to the model, and decodes the examples' texts.
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
        if type(inner) not in _OPTIMIZERS:
            raise UsageError(f"{type(inner).__name__} cannot be replayed; train with PyTorch's AdamW, Adam or SGD")
        if inner.state:
            raise UsageError("the optimizer has made steps already; record a run from its first step")
        if not hasattr(model, "save_pretrained"):
            raise UsageError(f"{type(model).__name__} is not a transformers model, whose training can be recorded")
        if list(getattr(model, "peft_config", _ADAPTERS)) != _ADAPTERS:
            raise UsageError("the model has several adapters, or one that is not named 'default'; train one under that name")
        self._model = model
        self._tokenizer = tokenizer
        self._kind = _kind(inner)
        self._groups = _groups(model, inner)
        self._clip_norm = clip_norm
        self._parameters = _trained(model, self._groups)
        unoptimized_names = [
            name for name, parameter in _parameters(model).items() if parameter.requires_grad and name not in self._parameters
        ]
        if clip_norm is not None and unoptimized_names:
            raise UsageError(
                f"{unoptimized_names[0]} requires a gradient, which is clipped with the others, but is not in the optimizer; freeze it"
            )
        self._initial = {name: parameter.detach().cpu().numpy().copy() for name, parameter in self._parameters.items()}
        self._has_dropout = _has_dropout(model)
        self._is_training: bool | None = None
        self._autocasts: set[str | None] = set()
        self._problem: str | None = None
        self._examples: list[Example] = []
        self._numbers: dict[tuple[bytes, str | None], int] = {}
        self._batches: list[TrainingBatch] = []
        self._steps: list[TrainingStep] = []
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
        self._padding_idx = getattr(embeddings, "padding_idx", None)
        self._hooks = [
            inner.register_step_pre_hook(lambda optimizer, *call: self._step(optimizer)),
            embeddings.register_forward_pre_hook(lambda module, call: self._note_precision()),
        ]

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
        labels: Int[Tensor, "_ _"],
        attention_mask: Int[Tensor, "_ _"] | None = None,
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
        if self._problem is not None:
            return
        tokens = np.asarray(input_ids.cpu(), np.int64)
        targets = np.asarray(labels.cpu(), np.int64)
        mask = np.ones_like(tokens) if attention_mask is None else np.asarray(attention_mask.cpu(), np.int64)
        if tokens.ndim != 2 or 0 in tokens.shape or tokens.shape != targets.shape or tokens.shape != mask.shape:
            raise DataError(f"a batch has token ids {tokens.shape}, labels {targets.shape} and a mask {mask.shape}; they must fit")
        if ids is not None and (len(ids) != len(tokens) or not all(isinstance(id, str) for id in ids)):
            raise DataError(f"a batch of {len(tokens)} examples has {len(ids)} ids; give a text for each")
        if self._is_training not in (None, self._model.training):
            raise DataError("the model was in training mode for some batches and in evaluation mode for others; keep one of them")
        self._is_training = self._model.training
        left_padded = bool((mask[:, -1] == 1).all() and (mask[:, 0] == 0).any())
        numbers = []
        firsts = set[bool]()
        paddings = set[int]()
        for i, (row, target, valid) in enumerate(zip(tokens, targets, mask == 1, strict=True)):
            length = int(valid.sum())
            if length < 1 or not valid[-length if left_padded else 0 : None if left_padded else length].all():
                raise DataError(f"example {i} of a batch is empty, or padded in other places than its end or its start")
            if (target[~valid] != IGNORED).any() or ((target != IGNORED) & (target != row)).any():
                raise DataError(f"example {i} of a batch has labels on padding, or labels that are not its own tokens")
            paddings |= set(row[~valid].tolist())
            if length < tokens.shape[1] and left_padded:
                firsts.add(bool(target[valid][0] != IGNORED))
            if length >= _SHORTEST:
                numbers.append(self._number(row[valid], target[valid] != IGNORED, None if ids is None else ids[i]))
            elif firsts == {True} or self._draws():
                raise DataError(f"example {i} of a batch has a single token, which cannot be recorded beside others; leave it out")
        if len(firsts) > 1 or len(paddings) > 1:
            raise DataError("the examples of a batch are padded with several tokens, or the first token of only some is in the loss")
        count = float((targets[:, 1:] != IGNORED).sum()) if denominator is None else float(denominator)
        if not 0 < count < np.inf or not numbers:
            raise DataError("a batch has no token in the loss, or no denominator that is a positive number")
        generator = None
        if self._draws():
            if self._parameters and next(iter(self._parameters.values())).device.type != "cpu":
                raise DataError("dropout on a GPU cannot be replayed; set the model's dropout to 0, or train on the CPU")
            generator = torch.get_rng_state().numpy().copy()
        padding = paddings.pop() if paddings else 0
        predicts_first = firsts == {True}
        self._batches.append(TrainingBatch(tuple(numbers), tokens.shape[1], padding, left_padded, predicts_first, count, generator))

    def discard(self) -> None:
        """Forget the batches since the last step, whose gradients are thrown away instead of used."""
        self._batches = []

    def fail(self, problem: str) -> None:
        """Record nothing more, since the run cannot be repeated; `finish` raises the first problem."""
        self._problem = self._problem or problem
        self.stop()

    def _draws(self) -> bool:
        """True if the forward passes draw random numbers."""
        return self._has_dropout and bool(self._is_training)

    def _note_precision(self) -> None:
        device = next(iter(self._parameters.values())).device.type
        if torch.is_grad_enabled() and self._batches:
            is_mixed = torch.is_autocast_enabled(device)
            self._autocasts.add(str(torch.get_autocast_dtype(device)).removeprefix("torch.") if is_mixed else None)

    def finish(self) -> Path:
        """Write the trained model and the record; returns the directory.

        Raises:
            UsageError: no step was recorded, or the run cannot be repeated.
            StorageError: a file cannot be written.
        """
        self.stop()
        if self._problem is None and not self._autocasts <= {None} and not self._autocasts <= {"bfloat16"}:
            self._problem = "it computed in mixed precision other than bfloat16, or only partly; use bfloat16 or none, all the way"
        if self._problem is not None:
            raise UsageError(f"the training cannot be replayed, and was not recorded: {self._problem}")
        if not self._steps:
            raise UsageError("no step of the optimizer was recorded; call `batch` before each forward pass")
        settings = TrainingSettings(
            optimizer=self._kind,
            groups=self._groups,
            clip_norm=self._clip_norm,
            autocast="bfloat16" if self._autocasts == {"bfloat16"} else None,
            training=bool(self._is_training),
            padding_idx=self._padding_idx,
            steps=len(self._steps),
            batches=sum(len(step.batches) for step in self._steps),
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
        for hook in self._hooks:
            hook.remove()

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self._batches:
            self.fail("the optimizer made a step without a recorded batch; call `batch` before each forward pass")
        elif _groups(self._model, optimizer) != self._groups:
            self.fail("settings of the optimizer other than the learning rate changed, or parameters were frozen")
        elif any(parameter.grad is None for parameter in self._parameters.values()):
            unused = next(name for name, parameter in self._parameters.items() if parameter.grad is None)
            self.fail(f"{unused} had no gradient in a step; leave parameters that are not trained out of the optimizer")
        groups = [group for group in optimizer.param_groups if any(p.requires_grad for p in group["params"])]
        self._steps.append(TrainingStep(tuple(self._batches), tuple(float(group["lr"]) for group in groups)))
        self._batches = []

    def _number(self, tokens: Int64[np.ndarray, " tokens"], in_loss: Bool[np.ndarray, " tokens"], id: str | None) -> int:
        """The number of an example, which is new or was seen before."""
        in_loss = in_loss.copy()
        in_loss[0] = False
        name = str(len(self._examples)) if id is None else id
        example = Example(name, "", "training", tokens.astype(np.int32), in_loss)
        key = content_key(example), id
        if key not in self._numbers:
            self._numbers[key] = len(self._examples)
            text = "" if self._tokenizer is None else self._tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
            self._examples.append(replace(example, text=text))
        return self._numbers[key]


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by their names in the saved model; PEFT wraps the model while it is trained."""
    return {name.removeprefix(_WRAPPER): parameter for name, parameter in model.named_parameters()}


def _trained(model: nn.Module, groups: Sequence[ParameterGroup]) -> dict[str, nn.Parameter]:
    """The optimizer's parameters; refuse those that cannot be repeated exactly."""
    parameters = _parameters(model)
    trained = {name: parameters[name] for group in groups for name in group.names}
    for name, parameter in trained.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise UsageError(f"{name} is trained in {str(parameter.dtype).removeprefix('torch.')}; train weights in float32 to record them")
    if hasattr(model, "peft_config") and not all(".lora_" in name for name in trained):
        raise UsageError("the adapter trains other parameters than matrices of LoRA (modules_to_save?), which cannot be replayed")
    return trained


def _kind(optimizer: torch.optim.Optimizer) -> Literal["adamw", "adam", "sgd"]:
    is_decoupled = {bool(group.get("decoupled_weight_decay")) for group in optimizer.param_groups}
    kind = _OPTIMIZERS[type(optimizer)]
    return "adamw" if kind == "adam" and is_decoupled == {True} else kind


def _groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[ParameterGroup, ...]:
    names = {id(parameter): name for name, parameter in _parameters(model).items()}
    groups = []
    for group in optimizer.param_groups:
        trained_parameters = [p for p in group["params"] if p.requires_grad]
        if any(id(p) not in names for p in trained_parameters):
            raise UsageError("the optimizer has parameters that are not the model's; give it the model's parameters")
        if group.get("amsgrad") or group.get("maximize"):
            raise UsageError("amsgrad and maximize cannot be replayed; train without them")
        settings: dict[str, Any] = {n: group[n] for n in ("weight_decay", "eps", "momentum", "dampening", "nesterov") if n in group}
        if "betas" in group:
            settings["beta1"], settings["beta2"] = map(float, group["betas"])
        if trained_parameters:
            groups.append(ParameterGroup(names=tuple(names[id(p)] for p in trained_parameters), **settings))
    if not groups:
        raise UsageError("the optimizer trains no parameter of the model")
    return tuple(groups)


def _has_dropout(model: nn.Module) -> bool:
    """True if the model's forward pass in training may draw random numbers."""

    def configured(settings: Mapping[Any, Any]) -> bool:
        has_rate = any(
            ("drop" in str(name) or "jitter" in str(name))
            and not str(name).startswith(_HEADS)
            and isinstance(value, int | float)
            and value > 0
            for name, value in settings.items()
        )
        return has_rate or any(configured(value) for value in settings.values() if isinstance(value, dict))

    modules = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    return modules or configured(model.config.to_dict())  # type: ignore[union-attr, operator]
