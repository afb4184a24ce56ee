"""A callback for transformers' Trainer: keeps of a training run what an index of it needs, and builds one at the end.

    from wherefrom.callback import WherefromCallback

    trainer = Trainer(..., callbacks=[WherefromCallback(data=("train.jsonl",), out="run.wherefrom")])

What is kept, in `wherefrom.json` beside the checkpoints: each checkpoint's step and the fingerprint of its weights, the data's own
fingerprint, what decides its order (seeds, batch sizes, epochs), and the learning rates. The order itself is in
`wherefrom-order-<epoch>.npy`: positions in the training set as they were drawn by all processes. Loaders draw ahead: where training stopped
within an epoch, the last of them were not trained on (the checkpoints' steps say how many were).
"""

import io
import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .indexer.models import model_fingerprint, other_kind
from .ray_jobs.build import refuse_occupied
from .ray_jobs.config import BuildConfig
from .store.corpus import read_corpus
from .store.errors import UsageError
from .store.files import write_whole
from .store.manifest import latest_manifest

_OF_ORDER = ("seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps")


class _Recorded:
    """A sampler that remembers what it drew since it was last begun."""

    def __init__(self, sampler: Iterable[int]) -> None:
        self._sampler, self.drawn = sampler, list[int]()

    def __iter__(self) -> Iterator[int]:
        self.drawn = []
        for position in self._sampler:
            self.drawn.append(position)
            yield position

    def __len__(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._sampler, name)  # the seed of an epoch, the generator


class WherefromCallback(TrainerCallback):  # type: ignore[misc]
    """See above.

    Args:
        data: the training documents, as for `wherefrom build`; one source or several.
        out: the index to build when training ends; None keeps the record alone.
        checkpoints: how many of the saved checkpoints the index has, the last among them, spread over the run; 1 takes the last alone.
        options: of the build, as in `BuildConfig` (bytes_per_example, max_tokens, ...).

    Raises:
        UsageError: fewer than one checkpoint is asked for, an index without data, or what is not an option of a build.
    """

    def __init__(self, *, data: str | Sequence[str] = (), out: str | None = None, checkpoints: int = 1, **options: Any) -> None:
        if checkpoints < 1:
            raise UsageError(f"checkpoints is {checkpoints}; it must be at least 1")
        if out is not None and not data:
            raise UsageError("an index needs the training documents; give data")
        self._out, self._wanted = out, checkpoints
        unknown = options.keys() - ({option.name for option in fields(BuildConfig)} - {"model"})
        if unknown:
            raise UsageError(f"a build at the end of training has no such option: {min(unknown)!r}")
        sources = (data,) if isinstance(data, str) else tuple(data)
        self._build = None if out is None else BuildConfig(model="-", data=sources, out=out, **options)
        self._record: dict[str, Any] = {}
        self._order: _Recorded | None = None
        self._epoch = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note what decides the order of the data, and listen to what is drawn of it.

        Raises:
            UsageError, NotFoundError: the index at the end could not be built, as is known already.
        """
        if self._build is not None and state.is_world_process_zero:
            _check(self._build, args, kwargs.get("processing_class"), kwargs.get("model"))
        path = Path(args.output_dir) / "wherefrom.json"
        known = json.loads(path.read_text()) if state.global_step and path.is_file() else {}
        loader: Any = kwargs.get("train_dataloader")
        dataset: Any = getattr(loader, "dataset", None)
        order = {name: getattr(args, name) for name in _OF_ORDER}
        data = {"examples": len(dataset) if hasattr(dataset, "__len__") else None, "fingerprint": getattr(dataset, "_fingerprint", None)}
        batches: Any = getattr(loader, "batch_sampler", None)
        while hasattr(batches, "batch_sampler"):  # Accelerate's, of several processes or of a run that goes on
            batches = batches.batch_sampler
        self._order = None
        if hasattr(dataset, "__len__") and getattr(batches, "sampler", None) is not None:  # a stream has no positions
            self._order = batches.sampler = _Recorded(batches.sampler)
        if not state.global_step and state.is_world_process_zero:
            for stale in Path(args.output_dir).glob("wherefrom-order-*.npy"):
                stale.unlink()
        self._record = {"order": order, "data": data, "checkpoints": known.get("checkpoints", []), "rates": known.get("rates", [])}

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note which epoch it is, of a run that goes on in its middle, too."""
        self._epoch = int((state.epoch or 0) + 1e-6)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the epoch's order."""
        if state.is_world_process_zero and self._order is not None and self._order.drawn:
            file = io.BytesIO()
            np.save(file, np.array(self._order.drawn, np.int64), allow_pickle=False)
            write_whole(Path(args.output_dir) / f"wherefrom-order-{self._epoch}.npy", file.getvalue())

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the learning rate."""
        rate = (kwargs.get("logs") or {}).get("learning_rate")
        if rate is not None:
            self._record["rates"].append([state.global_step, rate])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note a checkpoint that was saved."""
        if state.is_world_process_zero:
            place = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            entry = {"step": state.global_step, "path": place.name, "fingerprint": model_fingerprint(kwargs["model"])}
            self._record["checkpoints"] = [c for c in self._record["checkpoints"] if c["step"] != state.global_step] + [entry]
            self._write(args)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Build the index, of checkpoints that are still there. What goes wrong is said as a warning: the training has ended well."""
        if not state.is_world_process_zero:
            return
        try:
            self._write(args)
            if self._build is not None:
                self._index(self._build, args)
        except Exception as error:  # nothing of an index is worth losing what the Trainer does next
            warnings.warn(f"the index was not built: {error}; build it from the checkpoints with wherefrom build", stacklevel=2)

    def _index(self, config: BuildConfig, args: TrainingArguments) -> None:
        from .ray_jobs.build import build
        from .ray_jobs.progress import Console

        places = [Path(args.output_dir) / c["path"] for c in self._record["checkpoints"]]
        saved = [str(place) for place in places if place.is_dir()]
        if not saved:
            raise UsageError(f"no checkpoint was saved in {args.output_dir}; set save_strategy, or build the index from the model you save")
        count = min(self._wanted, len(saved))
        chosen = [saved[-1 - round(i * (len(saved) - 1) / max(1, count - 1)) if count > 1 else -1] for i in range(count)][::-1]
        with Console() as reporter:
            build(replace(config, model=tuple(dict.fromkeys(chosen))), reporter)

    def _write(self, args: TrainingArguments) -> None:
        write_whole(Path(args.output_dir) / "wherefrom.json", (json.dumps(self._record, indent=1) + "\n").encode())


def _check(config: BuildConfig, args: TrainingArguments, tokenizer: Any, model: Any) -> None:
    """Refuse before training what the build would refuse after it."""
    out = Path(config.out)
    refuse_occupied(out)
    if latest_manifest(out) is not None:
        raise UsageError(f"{out} is an index already, of another run; choose another place, or remove it")
    inner = getattr(model, "module", model)  # of a model that several processes train
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    kind = other_kind(inner.config, [type(inner).__name__]) if config.task == "causal-lm" and hasattr(inner, "config") else None
    if kind is not None:
        raise UsageError(f"the model is {kind} ({type(inner).__name__}), where an index needs a causal language model, or a task for it")
    if args.save_strategy == "no":
        raise UsageError("no checkpoint will be saved that could be indexed; set save_strategy")
    if config.task == "causal-lm" and tokenizer is None:
        raise UsageError("checkpoints will be saved without a tokenizer; give it to the Trainer as processing_class")
    next(iter(read_corpus(config.data, config.fields)), None)
