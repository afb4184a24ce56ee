"""Callback for transformers' Trainer: records what an index of the training run needs, and builds one at the end.

    from wherefrom.callback import WherefromCallback

    trainer = Trainer(..., callbacks=[WherefromCallback(data=("train.jsonl",), out="run.wherefrom")])

The record is `wherefrom.json` next to the checkpoints: each checkpoint's step and the fingerprint of its weights, the layers that were
trained where others were frozen, and how far the steps of SGD, Adam or AdamW went by then (a build reads these), the data's
fingerprint, the settings that determine its order (seeds, batch sizes, epochs), and the learning rates. The order is in
`wherefrom-order-<epoch>.npy`: positions in the training set as drawn by all processes. Loaders prefetch: if training stopped within an
epoch, the last positions were not trained on (the checkpoints' steps give the number).

With `record=True` the whole run is recorded in the directory `wherefrom-run` there, from which `wherefrom replay` computes exact influence.
"""

import io
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .indexer.batches import IGNORED
from .indexer.models import LoadedModel, ModelSource, model_fingerprint, other_kind
from .indexer.moments import save_moments, trained_layers
from .indexer.tasks import find_task
from .indexer.trained import RECORD, layers_with_gradients
from .ray_jobs.build import refuse_occupied
from .ray_jobs.config import BuildConfig
from .ray_jobs.schema import candidate_components
from .ray_jobs.worker import document_converter
from .recording import TrainingRecorder
from .store.corpus import read_corpus, usable
from .store.errors import DataError, UsageError
from .store.files import write_whole
from .store.manifest import latest_manifest

_ORDER_SETTINGS = ("seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps")
_RUN = "wherefrom-run"
_MODEL = "wherefrom-model"  # saved at the end of a training that left no checkpoint
_CALL = {"input_ids", "attention_mask", "labels", "num_items_in_batch"}


class _RecordingSampler:
    """A sampler that records the positions of its current iteration."""

    def __init__(self, sampler: Iterable[int]) -> None:
        self._sampler = sampler
        self.positions: list[int] = []

    def __iter__(self) -> Iterator[int]:
        self.positions = []
        for position in self._sampler:
            self.positions.append(position)
            yield position

    def __len__(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # while it is copied
            raise AttributeError(name)
        return getattr(self._sampler, name)  # such as set_epoch and generator


class _LearningTimes:
    """Sums, by layer, of the steps' learning rates: over 1 - momentum for SGD, times the mean preconditioner for Adam.

    Adam's preconditioner is taken as 1 / (sqrt(mean second moment) + eps) of each layer's weight (arXiv 2405.12186, appendix C, has the
    whole diagonal).

    Attributes:
        sums: None where the optimizer is another.
    """

    def __init__(self, model: Any, start: Mapping[str, float]) -> None:
        self.sums: dict[str, float] | None = dict(start)
        self._layers: dict[int, list[str]] = {}
        for name, module in trained_layers(model):
            self._layers.setdefault(id(module.weight), []).append(name)

    @torch.no_grad()
    def add(self, optimizer: Any) -> None:
        """Add a step that was just taken."""
        if self.sums is None:
            return
        optimizer = getattr(optimizer, "optimizer", optimizer)  # of Accelerate
        if not isinstance(optimizer, torch.optim.SGD | torch.optim.Adam | torch.optim.AdamW):
            self.sums = None
            return
        for group in optimizer.param_groups:
            stepped = [p for p in group["params"] if id(p) in self._layers and (p.grad is not None or optimizer.state.get(p))]
            if not stepped:
                continue
            rate = float(group["lr"])
            if isinstance(optimizer, torch.optim.SGD):
                lengths = [rate / (1 - group["momentum"])] * len(stepped)
            else:
                states = [optimizer.state[p] for p in stepped]
                means = [s["exp_avg_sq"].mean() / (1 - group["betas"][1] ** s["step"].to(s["exp_avg_sq"].device)) for s in states]
                moments = torch.stack([mean.to(means[0].device) for mean in means])
                lengths = (rate / (moments.sqrt() + group["eps"])).tolist()  # one wait for the device
            for parameter, length in zip(stepped, lengths, strict=True):
                for name in self._layers[id(parameter)]:
                    self.sums[name] = self.sums.get(name, 0.0) + length


class WherefromCallback(TrainerCallback):  # type: ignore[misc]
    """Recorder of a training run; see the module.

    Args:
        data: the training documents, as for `wherefrom build`; one source or several.
        out: the index to build when training ends; None only writes the record.
        checkpoints: number of saved checkpoints in the index, spread over the run and including the last; 1 uses only the last.
        record: record the run for a replay; it must be in one process, from its first step.
        moments: write the optimizer's moments next to each checkpoint, for `optimizer` of a build (TrackStar, LESS); as many bytes as the
            trained weights take in float32, twice.
        options: of the build, as in `BuildConfig` (bytes_per_example, max_tokens, ...).

    Raises:
        UsageError: fewer than one checkpoint, an index without data, or an unknown option.
    """

    def __init__(
        self,
        *,
        data: str | Sequence[str] = (),
        out: str | None = None,
        checkpoints: int = 1,
        record: bool = False,
        moments: bool = False,
        **options: Any,
    ) -> None:
        if checkpoints < 1:
            raise UsageError(f"checkpoints is {checkpoints}; it must be at least 1")
        if out is not None and not data:
            raise UsageError("an index needs the training documents; give data")
        self._checkpoints = checkpoints
        unknown = options.keys() - (BuildConfig.model_fields.keys() - {"model"})
        if unknown:
            raise UsageError(f"a build at the end of training has no option {min(unknown)!r}")
        sources = (data,) if isinstance(data, str) else tuple(data)
        self._build = None if out is None else BuildConfig(model="-", data=sources, out=out, **options)
        self._record: dict[str, Any] = {}
        self._order: _RecordingSampler | None = None
        self._epoch = 0
        self._records_run = record
        self._keeps_moments = moments
        self._recorder: TrainingRecorder | None = None
        self._forward_hook: Any = None
        self._times: _LearningTimes | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record the settings of the data's order, and start recording its positions.

        Raises:
            UsageError, NotFoundError: the index could not be built at the end, or the run cannot be recorded.
        """
        if self._records_run:
            self._record_run(args, state, kwargs)
        if self._build is not None and state.is_world_process_zero:
            _check(self._build, args, kwargs.get("processing_class"), kwargs.get("model"))
        path = Path(args.output_dir) / RECORD
        previous = json.loads(path.read_text()) if state.global_step and path.is_file() else {}
        loader: Any = kwargs.get("train_dataloader")
        dataset: Any = getattr(loader, "dataset", None)
        order = {name: getattr(args, name) for name in _ORDER_SETTINGS}
        data = {"examples": len(dataset) if hasattr(dataset, "__len__") else None, "fingerprint": getattr(dataset, "_fingerprint", None)}
        batches: Any = getattr(loader, "batch_sampler", None)
        while hasattr(batches, "batch_sampler"):  # Accelerate's wrappers, for several processes or a resumed run
            batches = batches.batch_sampler
        self._order = None
        if hasattr(dataset, "__len__") and getattr(batches, "sampler", None) is not None:  # a stream has no positions
            self._order = batches.sampler = _RecordingSampler(batches.sampler)
        if not state.global_step and state.is_world_process_zero:
            for stale in Path(args.output_dir).glob("wherefrom-order-*.npy"):
                stale.unlink()
        trained = layers_with_gradients(kwargs["model"]) if "model" in kwargs else None
        self._record = {
            "order": order,
            "data": data,
            "trained": trained and sorted(trained),
            "checkpoints": previous.get("checkpoints", []),
            "rates": previous.get("rates", []),
        }
        sums: dict[str, float] | None = {}
        if state.global_step:
            sums = next((c.get("learning_times") for c in self._record["checkpoints"] if c["step"] == state.global_step), None)
        self._times = None if sums is None or "model" not in kwargs else _LearningTimes(kwargs["model"], sums)

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record the number of the epoch, also of a run resumed within it."""
        self._epoch = int((state.epoch or 0) + 1e-6)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the epoch's order."""
        if state.is_world_process_zero and self._order is not None and self._order.positions:
            file = io.BytesIO()
            np.save(file, np.array(self._order.positions, np.int64), allow_pickle=False)
            write_whole(Path(args.output_dir) / f"wherefrom-order-{self._epoch}.npy", file.getvalue())

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record the learning rate."""
        rate = (kwargs.get("logs") or {}).get("learning_rate")
        if rate is not None:
            self._record["rates"].append([state.global_step, rate])

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add up how far the steps went."""
        if self._times is not None:
            self._times.add(kwargs["optimizer"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record a saved checkpoint."""
        if state.is_world_process_zero:
            name = f"checkpoint-{state.global_step}"
            entry = {"step": state.global_step, "path": name, "fingerprint": model_fingerprint(kwargs["model"])}
            if self._times is not None and self._times.sums:
                entry["learning_times"] = dict(self._times.sums)
            self._record["checkpoints"] = [c for c in self._record["checkpoints"] if c["step"] != state.global_step] + [entry]
            self._write(args)
            if self._keeps_moments:
                try:
                    save_moments(kwargs["model"], kwargs["optimizer"], Path(args.output_dir) / name)
                except Exception as error:  # must not prevent the Trainer's next steps
                    self._keeps_moments = False
                    warnings.warn(f"the optimizer's moments were not saved: {error}", stacklevel=2)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Build the index from the checkpoints that still exist; an error becomes a warning, since the training succeeded.

        Where no checkpoint is left, the model is saved in the output directory, and the index built from it.
        """
        if not state.is_world_process_zero:
            return
        if self._recorder is not None:
            self._forward_hook.remove()
            try:
                self._recorder.finish()
            except Exception as error:  # must not prevent the Trainer's next steps
                warnings.warn(f"the run was not recorded for a replay: {error}", stacklevel=2)
        if self._times is not None and self._times.sums:
            self._record["learning_times"] = self._times.sums
        try:
            self._write(args)
        except Exception as error:  # must not prevent the Trainer's next steps
            warnings.warn(f"the record of the run was not written: {error}", stacklevel=2)
        if self._build is None:
            return
        models: list[str] = []
        try:
            models = self._saved_models(args, kwargs)
            self._index(self._build.replace(model=tuple(models)))
        except Exception as error:  # must not prevent the Trainer's next steps
            flags = " ".join(f"--model {model}" for model in models) or "--model DIR"
            data = " ".join(f"--data {source}" for source in self._build.sources)
            command = f"wherefrom build {flags} {data} --out {self._build.out}"
            warnings.warn(f"the index was not built: {error}; build it with: {command}", stacklevel=2)

    def _record_run(self, args: TrainingArguments, state: TrainerState, given: Mapping[str, Any]) -> None:
        """Record the batches of the model's forward passes, and the optimizer's steps."""
        problems = {
            "it runs in several processes or on several GPUs": args.world_size > 1 or args.n_gpu > 1,
            "it resumes an earlier run": state.global_step > 0,
            "it trains in float16": args.fp16,
            "label_smoothing_factor is set": args.label_smoothing_factor > 0,
            "load_best_model_at_end replaces the trained weights": args.load_best_model_at_end,
            "neftune_noise_alpha is set": bool(args.neftune_noise_alpha),
        }
        for problem, applies in problems.items():
            if applies:
                raise UsageError(f"this training cannot be recorded for a replay, since {problem}; change that, or leave `record` out")
        model = given["model"]
        optimizer = given["optimizer"]
        self._recorder = recorder = TrainingRecorder(
            Path(args.output_dir) / _RUN,
            model,
            optimizer,
            tokenizer=given.get("processing_class"),
            clip_norm=args.max_grad_norm if args.max_grad_norm and args.max_grad_norm > 0 else None,
        )

        def record(module: Any, positional: Any, named: Mapping[str, Any]) -> None:
            if not module.training or not torch.is_grad_enabled():
                return  # an evaluation
            unknown = {name for name, value in named.items() if value is not None} - _CALL
            if positional or unknown or named.get("labels") is None:
                arguments = ", ".join(sorted(unknown)) or "no labels, or unnamed arguments"
                recorder.fail(f"the model is called with {arguments}; give it input_ids, attention_mask and labels alone")
                return
            items = named.get("num_items_in_batch")
            count = (named["labels"][:, 1:] != IGNORED).sum() * args.gradient_accumulation_steps if items is None else items
            try:
                recorder.batch(named["input_ids"], named["labels"], named.get("attention_mask"), denominator=float(count))
            except DataError as error:
                recorder.fail(str(error))

        self._forward_hook = model.register_forward_pre_hook(record, with_kwargs=True)

    def _saved_models(self, args: TrainingArguments, given: Mapping[str, Any]) -> list[str]:
        """Return the checkpoints of the index, in order; the model as it is, saved now, where none is left."""
        paths = [Path(args.output_dir) / c["path"] for c in self._record["checkpoints"]]
        saved = [str(path) for path in paths if path.is_dir()]
        if not saved:
            path = Path(args.output_dir) / _MODEL
            for part in (given["model"], given.get("processing_class")):
                if part is not None:
                    part.save_pretrained(path)
            return [str(path)]
        count = min(self._checkpoints, len(saved))
        models = [saved[-1 - round(i * (len(saved) - 1) / max(1, count - 1)) if count > 1 else -1] for i in range(count)][::-1]
        return list(dict.fromkeys(models))

    def _index(self, config: BuildConfig) -> None:
        from .ray_jobs.build import build
        from .ray_jobs.progress import Console

        with Console() as reporter:
            build(config, reporter)

    def _write(self, args: TrainingArguments) -> None:
        write_whole(Path(args.output_dir) / RECORD, (json.dumps(self._record, indent=1) + "\n").encode())


def _check(config: BuildConfig, args: TrainingArguments, tokenizer: Any, model: Any) -> None:
    """Check before training that the build can start after it."""
    out = Path(config.out)
    refuse_occupied(out)
    if latest_manifest(out) is not None:
        raise UsageError(f"{out} is already an index, of another run; choose another out, or remove it")
    inner = getattr(model, "module", model)  # unwrap DistributedDataParallel
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    kind = other_kind(inner.config, [type(inner).__name__]) if config.task == "causal-lm" and hasattr(inner, "config") else None
    if kind is not None:
        raise UsageError(f"the model is {kind} ({type(inner).__name__}), but an index needs a causal language model, or a task for it")
    if config.task == "causal-lm" and tokenizer is None:
        raise UsageError("checkpoints will be saved without a tokenizer; give it to the Trainer as processing_class")
    if not hasattr(inner, "save_pretrained") and args.save_strategy == "no":
        raise UsageError(f"no checkpoint will be saved to build an index from, and {type(inner).__name__} cannot be; set save_strategy")
    if inner is not None and not hasattr(model, "peft_config"):  # an adapter's layers have their names once it is merged
        candidate_components(config, find_task(config.task), inner, 0)
    records = read_corpus(config.sources, config.fields)
    if tokenizer is None or ":" in config.task:
        next(iter(records), None)
        return
    source = ModelSource.of(LoadedModel(inner, tokenizer), config.dtype, config.device, config.trust_remote_code)
    if next(iter(usable(document_converter(config, (source,)).documents(records))), None) is None:
        raise UsageError(f"no document of {', '.join(config.sources)} can be used; give the training documents as `data`")
