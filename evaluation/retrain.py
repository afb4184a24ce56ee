"""Creation of ground truth: a user's training function, run on random subsets, and the losses of some queries afterwards.

A training function is `train(examples, model, seed) -> nn.Module`: its arguments are the training examples (token ids, loss mask, text; in
the corpus' order), the directory or hub id of the model, and a random seed. It is named as `module:function` and imported in every worker.

`wherefrom pack` retrains on many subsets, as a job of many short tasks: each (subset, seed) publishes its losses as one file, so a killed
job resumes. ground_truth.npz is written last; without it the directory is not a pack.
"""

import inspect
import io
import json
import shutil
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..indexer.encoder import Progress, ignore_progress
from ..indexer.models import ModelSource, configure_memory, load_tokenizer, resolve_device
from ..indexer.tasks import CausalLM, Task, import_object
from ..ray_jobs.executor import Resources, open_executor
from ..ray_jobs.progress import Reporter, Silent
from ..ray_jobs.worker import absolute
from ..store.corpus import Document, read_corpus, usable
from ..store.documents import Example
from ..store.errors import DataError, NumericalError, StorageError, UsageError, WorkerError
from ..store.fields import Fields
from ..store.files import exclusive, publish, read_json, storage_errors, write_whole
from ..store.files import sha256 as file_sha256
from ..store.shapes import Bool, Float32, Int64
from ..store.sources import describe_files
from .packs import write_documents_file

Train = Callable[[Sequence[Example], str, int], nn.Module]
_MEASURE_TOKENS = 4096


@dataclass(frozen=True)
class PackConfig:
    """Settings of a pack.

    Attributes:
        train: the training function, `module:function`.
        model: directory or hub id whose tokenizer encodes the documents (and which the function may start from).
        data, queries: files of documents, as for a build.
        out: the directory to create.
        subsets: number of random subsets; each has `fraction` of the examples.
        seeds: trainings on each subset.
        max_tokens: longest example; the rest of a document is cut off.
        append_eos: append the tokenizer's end-of-text token to a document.
        seed: draws the subsets.
        workers, threads, address, device: as for a build.
    """

    train: str
    model: str
    data: tuple[str, ...]
    queries: str
    out: str
    subsets: int = 60
    fraction: float = 0.5
    seeds: int = 1
    max_tokens: int = 128
    append_eos: bool = True
    seed: int = 0
    workers: int = 1
    threads: int = 1
    address: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, least in (("subsets", 2), ("seeds", 1), ("max_tokens", 2), ("workers", 1), ("threads", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 < self.fraction < 1:
            raise UsageError(f"fraction is {self.fraction}; it must be between 0 and 1")
        if max(self.subsets, self.seeds, self.seed) >= 1 << 31:
            raise UsageError("subsets, seeds or seed is too large; it must be below 2**31")
        if not all((self.model, self.queries, self.out, *self.data)) or "-" in (*self.data, self.queries):
            raise UsageError("model, data, queries or out is empty, or standard input, which cannot be read twice; name files")

    def content_options(self) -> dict[str, Any]:
        """Options that determine the pack's content."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if k not in _HOW}


_HOW = ("out", "workers", "threads", "address", "device")


def make_pack(config: PackConfig, reporter: Reporter = Silent()) -> Path:
    """Make a pack, or resume one that was interrupted; returns its directory.

    Raises:
        UsageError: invalid options, or `out` has other content.
        NotFoundError: the training function, the model or a file is missing.
        DataError, NumericalError: a document is unusable; a training ends in losses that are not finite.
    """
    out = Path(config.out)
    function = import_object(config.train, "training function")
    if not callable(function):
        raise UsageError(f"{config.train} is not a function")
    resolve_device(config.device)
    append_token = load_tokenizer(ModelSource(config.model)).eos_token_id if config.append_eos else None
    if out.exists() and (not out.is_dir() or ({p.name for p in out.iterdir()} - {".lock"} and not (out / "pack.json").is_file())):
        raise UsageError(f"{out} has other content; choose an out that does not exist yet")
    train, queries = (_documents(sources) for sources in (config.data, (config.queries,)))
    masks = draw_masks(len(train), config.subsets, config.fraction, config.seed)
    description = {
        **config.content_options(),
        "the documents": sha256(repr((train, queries)).encode()).hexdigest(),
        "the training function's module": _source_hash(function),
        "the model's files": json.loads(json.dumps(describe_files([Path(config.model)]))),
    }
    with exclusive(out):
        started = (out / "pack.json").is_file() and any((out / "pieces").glob("*.npy"))  # without any training it can be overwritten
        previous = read_json(out / "pack.json") if started else description
        different = [k for k in description if previous.get(k) != description[k]]
        if different:
            raise UsageError(f"{out} has a pack that differs from this one ({', '.join(different)}); choose another out")
        write_whole(out / "pack.json", json.dumps(description).encode())
        for name, documents in (("train.jsonl", train), ("query.jsonl", queries)):
            write_documents_file(documents, out / f".{name}")
            (out / f".{name}").replace(out / name)
        pieces = [(subset, seed) for subset in range(config.subsets) for seed in range(config.seeds)]
        resources = Resources(config.workers, config.threads, config.address, config.device, own_code=True)
        encoding = config.max_tokens, config.append_eos
        worker = partial(Retrainer, config.train, absolute(config.model), str(out.resolve()), *encoding, config.device, config.threads)
        with open_executor(worker, resources) as executor:
            reporter.stage("training on everything", len(train))
            (full_losses,) = executor.map("train_full", (), [()], reporter)
            reporter.stage("retraining on subsets", int(masks.sum()) * config.seeds)
            tasks = [(f"{subset:05d}-{seed}", np.flatnonzero(masks[subset]), 1 + subset * config.seeds + seed) for subset, seed in pieces]
            losses = np.stack(list(executor.map("train_subset", (), tasks, reporter)))
        _publish(out, config, masks, losses.reshape(config.subsets, config.seeds, -1), full_losses, append_token)
    return out


def draw_masks(examples: int, subsets: int, fraction: float, seed: int) -> Bool[np.ndarray, "subsets examples"]:
    """Random subsets of a fixed size, each drawn without replacement.

    Raises:
        UsageError: a subset would have none or all of the examples.
    """
    size = round(fraction * examples)
    if not 0 < size < examples:
        raise UsageError(f"fraction {fraction} of {examples} examples is {size}; a subset must have some and leave some out")
    masks = np.zeros((subsets, examples), bool)
    for i, mask in enumerate(masks):
        mask[np.random.Generator(np.random.Philox(key=[seed, i])).choice(examples, size, replace=False)] = True
    return masks


class Retrainer:
    """A worker that trains on subsets of a pack's examples, encoded by the model's tokenizer, and measures the queries."""

    def __init__(self, train: str, model: str, directory: str, max_tokens: int, append_eos: bool, device: str, threads: int) -> None:
        configure_memory()
        torch.set_num_threads(threads)
        self._train: Train = import_object(train, "training function")
        self._task: Task = CausalLM()
        self._source = ModelSource(model, device=device)
        self._directory = Path(directory)
        self._max_tokens = max_tokens
        self._append_eos = append_eos

    def train_full(self, progress: Progress = ignore_progress) -> Float32[np.ndarray, " queries"]:
        """Train on all examples (seed 0) and publish the model; returns the queries' losses."""
        final = self._directory / "model-epoch1"
        path = self._directory / "pieces" / "whole.npy"
        losses = self._load_losses(path)
        configured = any((final / name).is_file() for name in ("config.json", "adapter_config.json"))
        if losses is None or not configured or not list(final.glob("*.safetensors*")):
            model = self._model(np.arange(len(self._examples)), 0)
            context = self._task.context(model)
            if context is not None and context < self._max_tokens:
                raise UsageError(f"max_tokens is {self._max_tokens}, above the trained model's context of {context}; lower it")
            losses = compute_losses(self._task, model, self._queries)
            self._save_model(model, final)
            _save(path, losses)
        progress(len(self._examples), 0)
        return losses

    def train_subset(
        self, name: str, indices: Int64[np.ndarray, " examples"], seed: int, progress: Progress = ignore_progress
    ) -> Float32[np.ndarray, " queries"]:
        """The queries' losses (nats) after training on some examples; computed once, then read."""
        path = self._directory / "pieces" / f"{name}.npy"
        losses = self._load_losses(path)
        if losses is None:
            losses = compute_losses(self._task, self._model(indices, seed), self._queries)
            _save(path, losses)
        progress(len(indices), 0)
        return losses

    def _load_losses(self, path: Path) -> Float32[np.ndarray, " queries"] | None:
        """Load stored losses; None if missing or damaged."""
        try:
            losses = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return losses if losses.dtype == np.float32 and losses.shape == (len(self._queries),) and np.isfinite(losses).all() else None

    def _save_model(self, model: nn.Module, final: Path) -> None:
        from safetensors import SafetensorError

        save = getattr(model, "save_pretrained", None)
        if save is None:
            raise UsageError(
                f"the training function returned {type(model).__name__}, which has no save_pretrained; return a transformers model"
            )
        staged = self._directory / f".model-{uuid.uuid4().hex}"
        try:
            with storage_errors(staged):
                save(staged)
                self._encoder.tokenizer.save_pretrained(staged)
            shutil.rmtree(final, ignore_errors=True)
            publish(staged, final)
        except SafetensorError as error:
            raise StorageError(f"the model cannot be saved under {self._directory}: {error}") from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _model(self, indices: Int64[np.ndarray, " examples"], seed: int) -> nn.Module:
        return trained(self._train, [self._examples[i] for i in indices], self._source.id, seed, self._source.device)

    @cached_property
    def _encoder(self) -> Any:
        return self._task.converter(self._source, self._max_tokens, "truncate", self._append_eos)

    @cached_property
    def _examples(self) -> list[Example]:
        return self._encoded("train.jsonl")

    @cached_property
    def _queries(self) -> list[Example]:
        return self._encoded("query.jsonl")

    def _encoded(self, name: str) -> list[Example]:
        examples = list(usable(self._encoder.documents(read_corpus([str(self._directory / name)], Fields()))))
        for example in examples:
            example.token_ids.setflags(write=False)  # shared by all trainings
            example.loss_mask.setflags(write=False)
        return examples


def trained(train: Train, examples: Sequence[Example], model: str, seed: int, device: str) -> nn.Module:
    """Train with the user's function; returns the model on its device, frozen and in evaluation mode.

    Raises:
        WorkerError: the function raised, or tried to exit; names the line.
        UsageError: it did not return a module.
    """
    try:
        result = train(list(examples), model, seed)
        if isinstance(result, nn.Module):
            return result.requires_grad_(False).eval().to(resolve_device(device))
    except (Exception, SystemExit) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise WorkerError(
            f"the training function failed with {reason} (at {frame.filename}:{frame.lineno}); fix it and run the command again"
        ) from error
    raise UsageError(f"the training function returned {type(result).__name__}, not a torch module")


@torch.no_grad()
def compute_losses(task: Task, model: nn.Module, examples: Sequence[Example]) -> Float32[np.ndarray, " examples"]:
    """The task's measurement (nats) of each example.

    Raises:
        NumericalError: one is not finite; names the example.
    """
    losses = np.zeros(len(examples), np.float32)
    for positions, batch in task.batches((model,), examples, _MEASURE_TOKENS):
        losses[positions] = task.measurement(model, batch).float().cpu().numpy()
    if not np.isfinite(losses).all():
        raise NumericalError(
            f"the loss of {examples[int(np.argmin(np.isfinite(losses)))].id!r} is not finite after training; does the training diverge?"
        )
    return losses


def _source_hash(function: Any) -> str:
    try:
        return file_sha256(Path(inspect.getsourcefile(function) or ""))
    except (OSError, TypeError):
        return "unknown"


def _save(path: Path, losses: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, losses.astype(np.float32), allow_pickle=False)
    write_whole(path, buffer.getvalue())


def _documents(sources: Sequence[str]) -> tuple[Document, ...]:
    documents: dict[str, Document] = {}
    for document in usable(read_corpus(sources, Fields())):
        if document.id in documents:
            raise DataError(f"duplicate id {document.id!r} in {', '.join(sources)}; ids must be unique")
        documents[document.id] = document
    if not documents:
        raise DataError(f"no documents in {', '.join(sources)}")
    return tuple(documents.values())


def _publish(
    out: Path, config: PackConfig, masks: np.ndarray, losses: np.ndarray, full_losses: np.ndarray, append_token: int | None
) -> None:
    meta = {
        "pack": out.resolve().name,
        "train": masks.shape[1],
        "queries": losses.shape[2],
        "subsets": len(masks),
        "seeds": losses.shape[1],
        "subset_fraction": config.fraction,
        "recipe": {"train": config.train, "model": config.model},
        "encoding": {"text": "the document's text", "append_token": append_token, "max_tokens": config.max_tokens},
        "loss": "sum of nats over a query's loss tokens",
        "sha256": {name: file_sha256(out / name) for name in ("train.jsonl", "query.jsonl")},
    }
    write_whole(out / "meta.json", json.dumps(meta, indent=1).encode())
    buffer = io.BytesIO()
    np.savez(buffer, masks=np.packbits(masks, axis=1), losses=losses, full_losses=full_losses)
    write_whole(out / "ground_truth.npz", buffer.getvalue())
