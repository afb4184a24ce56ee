"""Making ground truth: the user's own training function, run on random subsets, and what it does to the losses of some queries.

A training function is `train(examples, model, seed) -> nn.Module`: it gets the examples that it may train on (token ids, loss mask, text;
in the corpus' order), the directory or hub id given with --model, and a seed for whatever it draws. It is named as `module:function` and
imported in every worker.

`whence pack` retrains on many subsets, as a job of many short tasks: each (subset, seed) publishes its losses as one file that is never
computed again, so a job that was killed goes on where it was. What the whole pack is goes into ground_truth.npz last; until then it is
no pack.
"""

import io
import json
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32
from torch import nn

from ..indexer.encoder import Progress, ignore_progress
from ..indexer.models import ModelSource, load_tokenizer, resolve_device
from ..indexer.tasks import CausalLM, Task, import_object, plan_batches
from ..ray_jobs.executor import Resources, open_executor
from ..ray_jobs.progress import Reporter, Silent
from ..ray_jobs.worker import absolute, keep_freed_memory
from ..store.corpus import Document, Fields, read_corpus
from ..store.documents import Example
from ..store.errors import DataError, NumericalError, UsageError
from ..store.files import exclusive, publish, read_json, storage_errors, write_whole
from .packs import write_documents_file

Train = Callable[[Sequence[Example], str, int], nn.Module]
_MEASURE_TOKENS = 4096


@dataclass(frozen=True)
class PackConfig:
    """What a pack is made of.

    Attributes:
        train: the training function, `module:function`.
        model: directory or hub id whose tokenizer encodes the documents (and which the function may start from).
        data, queries: files of documents, as for a build.
        out: the directory to make.
        subsets: how many random subsets; `fraction` of the examples are in each.
        seeds: trainings on each subset.
        max_tokens: longest example; what follows is cut off.
        append_eos: whether the tokenizer's end-of-text token ends a document.
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
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}")
        if not 0 < self.fraction < 1:
            raise UsageError(f"--fraction is {self.fraction}; it must be between 0 and 1")

    def what(self) -> dict[str, Any]:
        """The options that decide what the pack holds."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if k not in _HOW}


_HOW = ("out", "workers", "threads", "address", "device")


def make_pack(config: PackConfig, reporter: Reporter | None = None) -> Path:
    """Make a pack, or go on with one that was interrupted; returns its directory.

    Raises:
        UsageError: options that cannot be meant, or `out` holds something else.
        NotFoundError: the training function, the model or a file is not there.
        DataError, NumericalError: a document cannot be used; a training ends in losses that are not finite.
    """
    reporter, out = reporter or Silent(), Path(config.out)
    import_object(config.train, "training function")
    if out.exists() and any(out.iterdir()) and not (out / "pack.json").is_file():
        raise UsageError(f"--out {out} holds other things; choose a directory that does not exist yet")
    train, queries = (_documents(sources) for sources in (config.data, (config.queries,)))
    what = {**config.what(), "documents": sha256(repr((train, queries)).encode()).hexdigest()}
    with exclusive(out):
        known = read_json(out / "pack.json") if (out / "pack.json").is_file() else what
        different = [k for k in what if known.get(k) != what[k]]
        if different:
            raise UsageError(f"--out {out} holds a pack that differs from this one ({', '.join(different)}); choose another --out")
        write_whole(out / "pack.json", json.dumps(what).encode())
        for name, documents in (("train.jsonl", train), ("query.jsonl", queries)):
            if not (out / name).is_file():
                staged = out / f".{name}"
                write_documents_file(documents, staged)
                publish(staged, out / name)
        masks = draw_masks(len(train), config.subsets, config.fraction, config.seed)
        pieces = [(subset, seed) for subset in range(config.subsets) for seed in range(config.seeds)]
        resources = Resources(config.workers, config.threads, config.address, config.device, own_code=True)
        worker = partial(
            Retrainer, config.train, absolute(config.model), str(out.resolve()), config.max_tokens, config.append_eos, config.device
        )
        with open_executor(partial(_with_threads, worker, config.threads), resources) as executor:
            reporter.stage("training on everything", len(train))
            (whole,) = executor.map("whole", (), [()], reporter)
            reporter.stage("retraining on subsets", int(masks.sum()) * config.seeds)
            tasks = [(f"{subset:05d}-{seed}", np.flatnonzero(masks[subset]), 1 + subset * config.seeds + seed) for subset, seed in pieces]
            losses = np.stack(list(executor.map("piece", (), tasks, reporter)))
        _publish(out, config, masks, losses.reshape(config.subsets, config.seeds, -1), whole)
    return out


def draw_masks(examples: int, subsets: int, fraction: float, seed: int) -> Bool[np.ndarray, "subsets examples"]:
    """Random subsets of a fixed size, each drawn without replacement.

    Raises:
        UsageError: the fraction leaves none or all of the examples.
    """
    size = round(fraction * examples)
    if not 0 < size < examples:
        raise UsageError(f"--fraction {fraction} of {examples} examples is {size}; a subset must hold some and leave some")
    masks = np.zeros((subsets, examples), bool)
    for i, mask in enumerate(masks):
        mask[np.random.Generator(np.random.Philox(key=[seed, i])).choice(examples, size, replace=False)] = True
    return masks


class Retrainer:
    """A worker that trains on subsets of a pack's examples and measures the queries.

    Args:
        train: the training function, `module:function`.
        model: whose tokenizer encodes the documents.
        directory: the pack that is being made.
    """

    def __init__(self, train: str, model: str, directory: str, max_tokens: int, append_eos: bool, device: str) -> None:
        self._train: Train = import_object(train, "training function")
        self._task: Task = CausalLM()
        self._source = ModelSource(model, device=device)
        self._directory, self._max_tokens, self._append_eos = Path(directory), max_tokens, append_eos

    def whole(self, progress: Progress = ignore_progress) -> Float32[np.ndarray, " queries"]:
        """Train on all examples (seed 0) and publish the model; returns the queries' losses."""
        final, losses = self._directory / "model-epoch1", self._directory / "pieces" / "whole.npy"
        if not losses.is_file():
            model = self._trained(range(len(self._examples)), 0)
            measured = self._losses(model)
            staged = self._directory / f".model-{uuid.uuid4().hex}"
            with storage_errors(staged):
                model.save_pretrained(staged)  # type: ignore[operator]
                self._encoder.tokenizer.save_pretrained(staged)
            shutil.rmtree(final, ignore_errors=True)
            publish(staged, final)
            _save(losses, measured)
        progress(len(self._examples), 0)
        return np.load(losses, allow_pickle=False)

    def piece(self, name: str, chosen: Sequence[int], seed: int, progress: Progress = ignore_progress) -> Float32[np.ndarray, " queries"]:
        """The queries' losses (nats) after training on some examples; computed once, then read."""
        path = self._directory / "pieces" / f"{name}.npy"
        if not path.is_file():
            _save(path, self._losses(self._trained(chosen, seed)))
        progress(len(chosen), 0)
        return np.load(path, allow_pickle=False)

    def _trained(self, chosen: Sequence[int], seed: int) -> nn.Module:
        model = self._train([self._examples[i] for i in chosen], self._source.id, seed)
        if not isinstance(model, nn.Module):
            raise UsageError(f"the training function returned {type(model).__name__}, not a torch module")
        return model.requires_grad_(False).eval().to(resolve_device(self._source.device))

    def _losses(self, model: nn.Module) -> Float32[np.ndarray, " queries"]:
        return measure_losses(self._task, model, self._queries)

    @cached_property
    def _encoder(self) -> Any:
        return self._task.encoder(self._source, self._max_tokens, "truncate", self._append_eos)

    @cached_property
    def _examples(self) -> list[Example]:
        return self._encoded("train.jsonl")

    @cached_property
    def _queries(self) -> list[Example]:
        return self._encoded("query.jsonl")

    def _encoded(self, name: str) -> list[Example]:
        examples = []
        for example in self._encoder.documents(read_corpus([str(self._directory / name)], Fields())):
            if isinstance(example, DataError):
                raise example
            examples.append(example)
        return examples


@torch.no_grad()
def measure_losses(task: Task, model: nn.Module, examples: Sequence[Example]) -> Float32[np.ndarray, " examples"]:
    """The task's measurement (nats) of each example.

    Raises:
        NumericalError: one is not finite; names the example.
    """
    losses = np.zeros(len(examples), np.float32)
    for chosen in plan_batches([e.tokens for e in examples], _MEASURE_TOKENS):
        batch = task.collate([examples[i] for i in chosen], next(model.parameters()).device)
        losses[chosen] = task.measurement(model, batch).float().cpu().numpy()
    if not np.isfinite(losses).all():
        raise NumericalError(
            f"the loss of {examples[int(np.argmin(np.isfinite(losses)))].id!r} is not finite after training; does the training diverge?"
        )
    return losses


def _with_threads(worker: Callable[[], Retrainer], threads: int) -> Retrainer:
    keep_freed_memory()
    torch.set_num_threads(threads)
    return worker()


def _save(path: Path, losses: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, losses.astype(np.float32), allow_pickle=False)
    write_whole(path, buffer.getvalue())


def _documents(sources: Sequence[str]) -> tuple[Document, ...]:
    documents = []
    for document in read_corpus(sources, Fields()):
        if isinstance(document, DataError):
            raise document
        documents.append(document)
    return tuple(documents)


def _publish(out: Path, config: PackConfig, masks: np.ndarray, losses: np.ndarray, whole: np.ndarray) -> None:
    end = load_tokenizer(ModelSource(config.model)).eos_token_id if config.append_eos else None
    meta = {
        "pack": out.resolve().name,
        "train": masks.shape[1],
        "queries": losses.shape[2],
        "subsets": len(masks),
        "seeds": losses.shape[1],
        "subset_fraction": config.fraction,
        "recipe": {"train": config.train, "model": config.model},
        "encoding": {"text": "the document's text", "append_token": end, "max_tokens": config.max_tokens},
        "loss": "sum of nats over a query's loss tokens",
    }
    write_whole(out / "meta.json", json.dumps(meta, indent=1).encode())
    buffer = io.BytesIO()
    np.savez(buffer, masks=np.packbits(masks, axis=1), losses=losses, full_losses=whole)
    write_whole(out / "ground_truth.npz", buffer.getvalue())
