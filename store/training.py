"""A recorded training run on disk: all that is needed to repeat it step by step.

A recorded run is a directory that holds the trained model as transformers saves it, so an index can be built from it, and next to that:

    training.json          the optimizer with its settings, how many steps and examples there are; written last
    training.arrow         the distinct training examples, as `store/documents.py` writes them
    training.safetensors   the batches in order, the learning rates, and under `initial/` the trained parameters before the first step
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .documents import Documents, Example, write_documents
from .errors import IncompatibleError, IntegrityError, NotFoundError
from .files import read_bytes, sha256, write_tensors, write_whole
from .shapes import UInt8

RUN_FILE = "training.json"
_EXAMPLES = "training.arrow"
_ARRAYS = "training.safetensors"
_INITIAL = "initial/"
_FORMAT = "wherefrom training 1"
_LARGEST_BATCH = 1 << 28  # tokens, padding included
_SHORTEST = 2


class _Strict(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ParameterGroup(_Strict):
    """Parameters that an optimizer updates with the same settings; those of another optimizer's kind are unused.

    Attributes:
        names: of the parameters, as the model names them.
        weight_decay: decoupled for AdamW; added to the gradient, as L2, for Adam and SGD.
        beta1, beta2, eps: of Adam and AdamW.
        momentum, dampening, nesterov: of SGD.
    """

    names: tuple[str, ...] = Field(min_length=1)
    weight_decay: float = Field(0.0, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, ge=0)
    momentum: float = Field(0.0, ge=0)
    dampening: float = 0.0
    nesterov: bool = False


class TrainingSettings(_Strict):
    """Settings that are constant during a run.

    Attributes:
        optimizer: its kind.
        groups: of its parameters.
        clip_norm: the largest norm of a step's gradient, over all parameters; None without clipping.
        autocast: dtype of PyTorch's automatic mixed precision; None without it.
        training: the model was in training mode, where dropout draws.
        padding_idx: token whose input embedding gets no gradient; None for none.
        steps, batches, examples: how many there are; a step has several batches if gradients were accumulated.
        checksums: SHA-256 of the other files of the record, by name.
    """

    format: Literal["wherefrom training 1"] = _FORMAT  # type: ignore[assignment]
    optimizer: Literal["adamw", "adam", "sgd"]
    groups: tuple[ParameterGroup, ...] = Field(min_length=1)
    clip_norm: float | None = Field(None, gt=0)
    autocast: Literal["bfloat16"] | None = None
    training: bool = True
    padding_idx: int | None = Field(None, ge=0)
    steps: int = Field(gt=0)
    batches: int = Field(gt=0)
    examples: int = Field(gt=0)
    checksums: dict[str, str] = {}


@dataclass(frozen=True)
class TrainingBatch:
    """A batch as the model saw it.

    Attributes:
        examples: positions among the run's distinct examples, in the batch's order.
        width: tokens of the padded batch.
        padding: the token of its padding.
        left_padded: padding stands before the texts.
        predicts_first: the loss holds the prediction of a text's first token from the padding before it.
        denominator: what the sum of the batch's token losses (nats) was divided by.
        generator: state of PyTorch's CPU generator before the batch, where dropout drew from it; None without dropout.
    """

    examples: tuple[int, ...]
    width: int
    padding: int
    left_padded: bool
    predicts_first: bool
    denominator: float
    generator: UInt8[np.ndarray, " bytes"] | None = None


@dataclass(frozen=True)
class TrainingStep:
    """A step of the optimizer: the batches of its gradient, and the learning rate of each group of parameters."""

    batches: tuple[TrainingBatch, ...]
    rates: tuple[float, ...]


@dataclass(frozen=True)
class TrainingRun:
    """A recorded training run.

    Attributes:
        directory: of the trained model and the record.
        initial: the trained parameters before the first step.
    """

    directory: Path
    settings: TrainingSettings
    steps: tuple[TrainingStep, ...]
    initial: Mapping[str, np.ndarray]

    @cached_property
    def examples(self) -> tuple[Example, ...]:
        """The distinct training examples.

        Raises:
            IntegrityError: their file is damaged.
        """
        documents = Documents(self.directory / _EXAMPLES, self.settings.examples)
        return tuple(documents[i] for i in range(len(documents)))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the record's arrays."""
        return self.settings.checksums[_ARRAYS]


def content_key(example: Example) -> bytes:
    """Identity of an example by what training saw of it: its tokens, and which of them are in the loss."""
    mask = np.array(example.loss_mask, bool)
    mask[0] = False  # the first token is not predicted
    return np.array(example.token_ids, np.int64).tobytes() + np.packbits(mask).tobytes()


def write_training(
    directory: Path, settings: TrainingSettings, steps: Sequence[TrainingStep], examples: Sequence[Example], initial: Mapping[str, Any]
) -> None:
    """Write the record of a run next to its model, which is saved already.

    Raises:
        StorageError: a file cannot be written.
        ValueError: only some batches have a generator's state.
    """
    batches = [batch for step in steps for batch in step.batches]
    arrays = {_INITIAL + name: value for name, value in initial.items()}
    arrays["batches_of_step"] = np.array([len(step.batches) for step in steps], np.int64)
    arrays["rates"] = np.array([step.rates for step in steps], np.float64)
    arrays["examples_of_batch"] = np.array([len(batch.examples) for batch in batches], np.int64)
    arrays["examples"] = np.array([i for batch in batches for i in batch.examples], np.int64)
    arrays["widths"] = np.array([batch.width for batch in batches], np.int64)
    arrays["paddings"] = np.array([batch.padding for batch in batches], np.int64)
    arrays["left_padded"] = np.array([batch.left_padded for batch in batches], np.uint8)
    arrays["predicts_first"] = np.array([batch.predicts_first for batch in batches], np.uint8)
    arrays["denominators"] = np.array([batch.denominator for batch in batches], np.float64)
    generators = [batch.generator for batch in batches if batch.generator is not None]
    if len(generators) not in (0, len(batches)):
        raise ValueError("some of the batches have a state of the generator and others have none")
    if generators:
        arrays["generators"] = np.stack(generators)
    write_documents(directory / _EXAMPLES, examples)
    write_tensors(directory / _ARRAYS, arrays)
    checksums = {name: sha256(directory / name) for name in (_EXAMPLES, _ARRAYS)}
    write_whole(directory / RUN_FILE, settings.model_copy(update={"checksums": checksums}).model_dump_json(indent=1).encode())


def read_training(directory: Path) -> TrainingRun:
    """Read the record of a run.

    Raises:
        NotFoundError: there is no record, or one of its files is missing.
        IncompatibleError: it is of another version.
        IntegrityError: it is damaged.
    """
    path = directory / RUN_FILE
    if not path.is_file():
        raise NotFoundError(
            f"{directory} is not a recorded training run: it has no {RUN_FILE}; record one with WherefromCallback(record=True) or "
            "TrainingRecorder"
        )
    try:
        content = read_bytes(path)
        settings = TrainingSettings.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"] == ("format",):
            raise IncompatibleError(f"{path} is not of this version ({_FORMAT}); record the run again with this one") from error
        where = ".".join(map(str, first["loc"]))
        raise IntegrityError(f"{path} is damaged ({where or 'JSON'}: {first['msg']}); record the run again") from error
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read ({error}); restore it") from error
    for name in (_EXAMPLES, _ARRAYS):
        if not (directory / name).is_file():
            raise NotFoundError(f"{directory / name} is missing from the recorded run; restore it")
        if settings.checksums.get(name) != sha256(directory / name):
            raise IntegrityError(f"{directory / name} is not the file that was recorded (SHA-256 differs); restore it")
    return TrainingRun(directory, settings, *_read_arrays(directory / _ARRAYS, settings))


def _read_arrays(path: Path, settings: TrainingSettings) -> tuple[tuple[TrainingStep, ...], Mapping[str, np.ndarray]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(path)
        _check_shapes(arrays, settings)
        per_step, per_batch, positions = (arrays[name].astype(np.int64) for name in ("batches_of_step", "examples_of_batch", "examples"))
        widths = arrays["widths"].astype(np.int64)
        if (per_step < 1).any() or (per_batch < 1).any() or per_step.sum() != settings.batches or per_batch.sum() != len(positions):
            raise ValueError("the counts of batches and examples do not add up")
        if (positions < 0).any() or (positions >= settings.examples).any() or (arrays["paddings"] < 0).any():
            raise ValueError("an example's position or a token is out of range")
        if widths.min() < _SHORTEST or (widths.astype(float) * per_batch).max() > _LARGEST_BATCH:
            raise ValueError("a batch has a width out of range")
        if not (np.isfinite(arrays["rates"]).all() and (arrays["denominators"] > 0).all() and np.isfinite(arrays["denominators"]).all()):
            raise ValueError("a learning rate is not finite, or a denominator is not a positive number")
        generators = arrays.get("generators")
        initial = {name.removeprefix(_INITIAL): array for name, array in arrays.items() if name.startswith(_INITIAL)}
        expected = [name for group in settings.groups for name in group.names]
        if sorted(expected) != sorted(initial) or any(array.dtype.kind != "f" for array in initial.values()):
            raise ValueError("the initial parameters are not those of the optimizer")
    except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
        raise IntegrityError(f"{path} is damaged ({error}); record the run again") from error
    starts = np.concatenate([[0], per_batch.cumsum()])
    batches = [
        TrainingBatch(
            tuple(positions[starts[i] : starts[i + 1]].tolist()),
            int(widths[i]),
            int(arrays["paddings"][i]),
            bool(arrays["left_padded"][i]),
            bool(arrays["predicts_first"][i]),
            float(arrays["denominators"][i]),
            None if generators is None else generators[i],
        )
        for i in range(settings.batches)
    ]
    firsts = np.concatenate([[0], per_step.cumsum()])
    steps = [TrainingStep(tuple(batches[firsts[i] : firsts[i + 1]]), tuple(arrays["rates"][i].tolist())) for i in range(settings.steps)]
    return tuple(steps), initial


def _check_shapes(arrays: Mapping[str, np.ndarray], settings: TrainingSettings) -> None:
    """Raise a ValueError if an array has another shape or kind of number than the record says."""
    one_a_batch = ("examples_of_batch", "widths", "paddings", "left_padded", "predicts_first", "denominators")
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(one_a_batch, (settings.batches,))
    shapes |= {
        "batches_of_step": (settings.steps,),
        "rates": (settings.steps, len(settings.groups)),
        "examples": arrays["examples"].shape[:1],
    }
    for name, shape in shapes.items():
        array = arrays[name]
        kinds = "f" if name in ("rates", "denominators") else "iu"
        if array.shape != shape or array.dtype.kind not in kinds or not shape:
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, not {list(shape)} numbers")
    generators = arrays.get("generators")
    if generators is not None and (generators.dtype != np.uint8 or generators.ndim != 2 or len(generators) != settings.batches):
        raise ValueError("the states of the generator do not fit the batches")


def content_rows(examples: Sequence[Example]) -> dict[bytes, list[int]]:
    """Positions of examples by their content; see `content_key`."""
    rows: dict[bytes, list[int]] = {}
    for i, example in enumerate(examples):
        rows.setdefault(content_key(example), []).append(i)
    return rows
