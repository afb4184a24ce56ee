"""A recorded training run, repeated: exact influence, as a job over queries, and ground truth.

    replay       the derivative of each query's loss with respect to the weight of every training example (indexer/replay.py)
    retrain      a training function for `wherefrom pack`: the recorded run again, without the examples that a subset leaves out

A job's work directory, next to its result, holds a file for each finished group of queries, and for the group in progress its adjoints, at
least once a minute. The same command continues from there, with the same bits.
"""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..indexer.encoder import Progress, ignore_progress
from ..indexer.models import ModelSource, load_tokenizer, resolve_device
from ..indexer.replay import LARGEST_DIFFERENCE, Replay, State
from ..indexer.tasks import CausalLM
from ..query.matrix import check_output, write_matrix
from ..query.options import Query
from ..query.plain import query_document, without_contrasts
from ..query.tables import data_frame, html_table
from ..ray_jobs.executor import Resources, open_executor
from ..ray_jobs.progress import Reporter, Silent, reporting
from ..store.documents import Example
from ..store.errors import DataError, IncompatibleError, UsageError
from ..store.files import exclusive, publish, read_json, write_tensors, write_whole
from ..store.shapes import Float32, Float64
from ..store.sources import describe_files
from ..store.training import TrainingRun, content_rows, read_training

if TYPE_CHECKING:
    import pandas as pd

_SAVE_SECONDS = 60.0
_LARGEST_PASS = 64
_SHOWN = 5  # best examples of a query in a notebook
_SHOWN_TEXT = 400
_STATE_BYTES = 2 << 30  # of the adjoints of a group of queries
_ADJOINT_BYTES = 28  # a parameter: three parts of the adjoint before and after a step, and that of the gradient, in float32


@dataclass(frozen=True)
class Replayed:
    """Exact influence of all training examples of a recorded run on some queries.

    Attributes:
        scores: minus the derivative of a query's loss (nats) with respect to the weight of an example; positive for a proponent.
        examples: the run's distinct examples; one that training saw as several equal documents stands for all of them.
        queries: their ids.
        losses: of the queries (nats) at the end of the repeated run; of a contrast the difference.
        steps: of the run.
        difference: distance of the repeated run's end to the recorded one, relative to the length of the way there.
    """

    scores: Float32[np.ndarray, "queries examples"]
    examples: tuple[Example, ...]
    queries: tuple[str, ...]
    losses: Float64[np.ndarray, " queries"]
    steps: int
    difference: float

    def to_dict(self, k: int = 5) -> dict[str, Any]:
        """JSON-ready form, with the `k` best proponents and opponents of each query."""
        return {
            "examples": len(self.examples),
            "steps": self.steps,
            "difference": self.difference,
            "queries": [
                {"id": id, "loss": loss, "proponents": self.best(i, k), "opponents": self.best(i, k, opponents=True)}
                for i, (id, loss) in enumerate(zip(self.queries, self.losses.tolist(), strict=True))
            ],
        }

    def to_pandas(self) -> "pd.DataFrame":
        """The scores of all examples, one a line, with a column for each query.

        Raises:
            UsageError: pandas is not installed.
        """
        names = [query or str(number) for number, query in enumerate(self.queries)]
        records = (
            {"id": e.id, **dict(zip(names, column, strict=True))} for e, column in zip(self.examples, self.scores.T.tolist(), strict=True)
        )
        return data_frame(records, ["id", *names])

    def _repr_html_(self) -> str:
        """Tables of the best proponents and opponents of each query, for notebooks."""
        tables = []
        for number, query in enumerate(self.queries):
            best = [*self.best(number, _SHOWN), *self.best(number, _SHOWN, opponents=True)]
            title = f"query {query or number}: {self.losses[number]:.4g} nats"
            tables.append(html_table(title, ("id", "score", "text"), [(e["id"], e["score"], e["text"][:_SHOWN_TEXT]) for e in best]))
        return "".join(tables)

    def best(self, query: int, k: int, opponents: bool = False) -> list[dict[str, Any]]:
        """The examples of the highest scores of a query, or of the lowest, with their ids, scores and texts."""
        scores = self.scores[query]
        order = np.argsort(scores if opponents else -scores, kind="stable")[:k]
        return [
            {"example": int(i), "id": self.examples[i].id, "score": float(scores[i]), "text": self.examples[i].text}
            for i in order
            if (scores[i] < 0 if opponents else scores[i] > 0)
        ]


def replay(
    run: str | Path,
    queries: Sequence[Query],
    out: str | Path | None = None,
    *,
    device: str = "auto",
    workers: int = 1,
    threads: int = 1,
    address: str | None = None,
    reporter: Reporter | None = None,
) -> Replayed:
    """Differentiate each query's loss through a recorded training run, with respect to the weight of every training example.

    The cost of a group of queries is that of a few trainings, and two more for each query.

    Args:
        run: directory of the record.
        queries: their texts end with the end-of-text token if most training examples do.
        out: file for the scores, as `wherefrom scores` writes them (`.zarr` or `.parquet`), with unfinished work in a directory next to it;
            None writes nothing.
        device, workers, threads, address: as for a build.
        reporter: of progress, instead of the default one.

    Raises:
        NotFoundError, IncompatibleError, IntegrityError: see `read_training`; the repeated run does not end where the recorded one did.
        UsageError: a query cannot be asked; `out` exists.
        NumericalError: training is unstable, so that derivatives are not finite.
    """
    directory = Path(run).resolve()
    queries = tuple(queries)
    if not queries:
        raise UsageError("there are no queries; add at least one")
    if any(query.row is not None for query in queries):
        raise UsageError("a replay asks with texts, not with rows of an index")
    target = None if out is None else Path(out)
    work = None
    if target is not None:
        check_output(target)
        work = target.with_name(f"{target.name}.work").resolve()
    plain, contrasts = without_contrasts(queries)
    recorded = read_training(directory)
    examples = tuple(_query_examples(directory, recorded.examples, plain))
    names = tuple(query.id or str(i) for i, query in enumerate(queries))
    with reporting(reporter) as current:
        pieces = _replay_examples(directory, examples, work, Resources(workers, threads, address, device), current)
    scores = (contrasts @ np.concatenate([piece["scores"] for piece in pieces])).astype(np.float32)
    losses = contrasts @ np.concatenate([piece["losses"] for piece in pieces]).astype(np.float64)
    difference = max(piece["difference"].item() for piece in pieces)
    replayed = Replayed(scores, recorded.examples, names, losses, recorded.settings.steps, difference)
    if target is not None:
        about = {"method": "replay", "run": directory.name, "steps": replayed.steps, "difference": difference}
        write_matrix(target, scores, [example.id for example in recorded.examples], names, about)
    if work is not None:
        shutil.rmtree(work, ignore_errors=True)
    return replayed


def replay_examples(run: str | Path, examples: Sequence[Example], reporter: Reporter = Silent(), **resources: Any) -> Replayed:
    """Replay as `replay` does, for queries that are examples already; see there. Nothing is written, so it cannot be resumed."""
    directory = Path(run).resolve()
    recorded = read_training(directory)
    pieces = _replay_examples(directory, tuple(examples), None, Resources(**resources), reporter)
    scores, losses = (np.concatenate([piece[name] for piece in pieces]) for name in ("scores", "losses"))
    difference = max(piece["difference"].item() for piece in pieces)
    ids = tuple(example.id for example in examples)
    return Replayed(scores, recorded.examples, ids, losses.astype(np.float64), recorded.settings.steps, difference)


def _query_examples(directory: Path, trained: Sequence[Example], queries: Sequence[Query]) -> Iterator[Example]:
    source = ModelSource(str(directory))
    eos = load_tokenizer(source).eos_token_id
    ended = sum(bool(example.token_ids[-1] == eos) for example in trained)
    converter = CausalLM().converter(source, append_eos=2 * ended > len(trained))
    for query in queries:
        yield converter.query(query_document(query), query.span)


def _replay_examples(
    directory: Path, examples: tuple[Example, ...], work: Path | None, resources: Resources, reporter: Reporter
) -> list[dict[str, np.ndarray]]:
    """Replay groups of queries; the arrays `scores`, `losses` and `difference` of each group, in order."""
    resolve_device(resources.device)
    factory = partial(Replayer, str(directory), examples, None if work is None else str(work), resources.device, resources.threads)
    with nullcontext() if work is None else exclusive(work), open_executor(factory, resources) as executor:
        context = executor.call("context")
        for number, example in enumerate(examples):
            if context is not None and example.tokens > context:
                raise UsageError(f"query {number} is {len(example.token_ids)} tokens long, the model's context is {context}; shorten it")
        if work is not None:
            _claim(work, directory, examples)
        size = min(executor.call("queries_per_pass"), -(-len(examples) // resources.workers))
        groups = [tuple(range(first, min(first + size, len(examples)))) for first in range(0, len(examples), size)]
        steps = read_training(directory).steps
        reporter.stage("replaying training", len(groups) * sum(len(batch.examples) for step in steps for batch in step.batches))
        return list(executor.map("replay", (), [(group,) for group in groups], reporter))


def _claim(work: Path, directory: Path, examples: tuple[Example, ...]) -> None:
    """Begin or continue a job in its work directory.

    Raises:
        UsageError: it is of other queries or another run, or has other content.
    """
    file = work / "replay.json"
    content = [(e.token_ids.tolist(), e.loss_mask.tolist()) for e in examples]
    files = json.dumps(describe_files([directory]))
    description = {name: sha256(text.encode()).hexdigest() for name, text in (("run", files), ("queries", json.dumps(content)))}
    if not file.is_file() and any(path.name != ".lock" for path in work.iterdir()):
        raise UsageError(f"{work} has other content than an unfinished replay; remove it or choose another `out`")
    if file.is_file() and read_json(file) != description:
        raise UsageError(f"{work} holds the unfinished replay of other queries or another run; remove it or choose another `out`")
    write_whole(file, json.dumps(description).encode())


class Replayer:
    """A worker that replays groups of queries.

    Args:
        directory: of the recorded run.
        queries: all queries.
        work: directory of finished groups and of adjoints in progress; None keeps nothing.
    """

    def __init__(self, directory: str, queries: tuple[Example, ...], work: str | None, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._run = read_training(Path(directory))
        self._device = device
        self._queries = queries
        self._work = None if work is None else Path(work)

    @cached_property
    def _replay(self) -> Replay:
        return Replay(self._run, self._device)

    def context(self) -> int | None:
        """The model's longest input, in tokens; None if unbounded."""
        return CausalLM().context(self._replay.model)

    def queries_per_pass(self) -> int:
        """Return the number of queries per pass that fit in memory."""
        return max(1, min(_LARGEST_PASS, _STATE_BYTES // (_ADJOINT_BYTES * self._replay.size)))

    def replay(self, query_batch: tuple[int, ...], progress: Progress = ignore_progress) -> dict[str, np.ndarray]:
        """Replay some queries, or continue where an interrupted process was, or read the finished result.

        Raises:
            IncompatibleError: the repeated run does not end where the recorded one did.
        """
        name = f"{query_batch[0]:06d}-{len(query_batch)}"
        finished = None if self._work is None else self._work / f"{name}.safetensors"
        counts = [sum(len(batch.examples) for batch in step.batches) for step in self._run.steps]
        if finished is not None and (arrays := _read_arrays(finished)) is not None:
            progress(sum(counts), 0)
            return arrays
        partial_path = None if self._work is None else self._work / f"{name}.partial.safetensors"
        arrays = None if partial_path is None else _read_arrays(partial_path)
        replay = self._replay
        adjoint: State | None = None
        of_weights = torch.zeros(len(query_batch), len(replay.weights), dtype=replay.weights.dtype, device=replay.weights.device)
        losses = np.zeros(len(query_batch), np.float32)
        difference = 0.0
        stop = len(counts)
        if arrays is not None:
            adjoint = State(*(torch.from_numpy(arrays[f"adjoint/{part}"]).to(of_weights.device) for part in State._fields))
            of_weights.copy_(torch.from_numpy(arrays["of_weights"]))
            losses = arrays["losses"]
            difference = arrays["difference"].item()
            stop = arrays["stop"].item()
            progress(sum(counts[stop:]), 0)
        saved = time.monotonic()
        for number, state in replay.states(stop):
            if adjoint is None:
                end = replay.step(state, number, replay.weights)
                difference = self._check(replay.difference(end))
                adjoint, losses = replay.query_adjoint(end, [self._queries[i] for i in query_batch])
            adjoint, more = replay.adjoint(state, number, adjoint)
            of_weights += more
            progress(counts[number], 0)
            if partial_path is not None and time.monotonic() - saved > _SAVE_SECONDS:
                parts = {f"adjoint/{part}": value.cpu().numpy() for part, value in adjoint._asdict().items()}
                _save(
                    partial_path, {**parts, "of_weights": of_weights.cpu().numpy(), **_ends(losses, difference), "stop": np.array(number)}
                )
                saved = time.monotonic()
        result = {"scores": -of_weights.cpu().numpy().astype(np.float32), **_ends(losses, difference)}
        if finished is not None and partial_path is not None:
            _save(finished, result)
            partial_path.unlink(missing_ok=True)
        return result

    def _check(self, difference: float) -> float:
        if not difference <= LARGEST_DIFFERENCE:
            raise IncompatibleError(unlike(self._run, difference))
        return difference


def _ends(losses: np.ndarray, difference: float) -> dict[str, np.ndarray]:
    return {"losses": losses, "difference": np.array(difference)}


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    staged = path.with_name(f".{path.name}")
    write_tensors(staged, arrays)
    publish(staged, path)


def _read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """Arrays of a file of unfinished work; None if it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path) if path.is_file() else None
    except (SafetensorError, OSError, ValueError):
        return None


def match_rows(rows: Sequence[Example], trained: Sequence[Example]) -> list[tuple[int, int]]:
    """Pairs of a row and the example of a run with the same tokens and loss mask; of several such, the one with its id, else in order."""
    numbers = content_rows(trained)
    pairs = []
    for key, equal_rows in content_rows(rows).items():
        candidates = numbers.get(key, [])
        by_id = {trained[number].id: number for number in candidates}
        free_numbers = [number for number in candidates if trained[number].id not in {rows[row].id for row in equal_rows}] or candidates
        unnamed = [row for row in equal_rows if rows[row].id not in by_id]
        pairs += [(row, by_id[rows[row].id]) for row in equal_rows if rows[row].id in by_id]
        pairs += [(row, free_numbers[i % len(free_numbers)]) for i, row in enumerate(unnamed) if free_numbers]
    return sorted(pairs)


def retrain(examples: Sequence[Example], model: str, seed: int) -> nn.Module:
    """Training function for `wherefrom pack`: repeat the recorded run in the directory `model` with the given examples only.

    Order, learning rates and denominators stay those of the record; the other examples have a weight of 0. The seed is not used.

    Raises:
        DataError: an example is not in the record.
    """
    run = read_training(Path(model))
    pairs = match_rows(examples, run.examples)
    matched_rows = {row for row, _ in pairs}
    missing = [example.id for row, example in enumerate(examples) if row not in matched_rows]
    if missing:
        suffix = f" and {len(missing) - 1} others are" if len(missing) > 1 else " is"
        raise DataError(f"example {missing[0]!r}{suffix} not in the recorded run {model}; give its training documents")
    repeated = Replay(run)
    given = np.bincount([number for _, number in pairs], minlength=len(run.examples))
    weights = torch.from_numpy(np.minimum(1.0, given / _copies(run))).to(repeated.weights)
    end = repeated.train(weights)
    if (weights == 1).all() and not (difference := repeated.difference(end)) <= LARGEST_DIFFERENCE:
        raise IncompatibleError(unlike(run, difference))
    return repeated.load(end)


def _copies(run: TrainingRun) -> Float64[np.ndarray, " examples"]:
    """Return the number of duplicates of each example.

    With ids, one. Without, how often it was in a batch, over how often the rarest was, where that divides all: in whole epochs.
    """
    counts = np.zeros(len(run.examples))
    for step in run.steps:
        for batch in step.batches:
            np.add.at(counts, list(batch.examples), 1)
    is_numbered = all(example.id == str(i) for i, example in enumerate(run.examples))
    least = counts.min()
    return counts / least if is_numbered and least > 0 and (counts % least == 0).all() else np.ones(len(counts))


def unlike(run: TrainingRun, difference: float) -> str:
    """Return the error message for a replay that ends elsewhere than the run."""
    return (
        f"{run.directory}: the repeated run ends {difference:.1%} of its way from where the recorded run ended, more than "
        f"{LARGEST_DIFFERENCE:.0%}; something in training is not in the record (another loss, noise, changed weights), or it is too "
        "unstable to repeat"
    )
