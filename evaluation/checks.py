"""Four checks of an index: by training steps, by retraining, by known labels, and against an uncompressed index.

    tailpatch     one optimizer step on a proponent: does the query's loss fall, and more than after a step on a random example?
                  (Chang et al., TrackStar, arXiv 2410.17413, section 5)
    brittleness   retrain without the top k: does the query's loss rise more than without k random examples?
                  (Ilyas et al., Datamodels, arXiv 2202.00622, section 4.2)
    labels        do examples with a wrong label have the largest self-influence? (Koh and Liang, arXiv 1703.04730, section 5.4)
    recall        scores of a compressed index against those of its float32 twin

Figures have 95 % intervals, by bootstrap over queries (labels: over examples), and are compared with a random selection.
"""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from ..client import Client
from ..indexer.encoder import Progress, ignore_progress
from ..indexer.models import configure_memory, loaded, resolve_device
from ..indexer.tasks import import_object
from ..indexer.tensor_parallel import refuse_split
from ..query.baselines import row_norms
from ..query.metric import Metric
from ..query.options import Mode, Query
from ..query.scoring import score_matrix
from ..query.tables import data_frame, html_table
from ..ray_jobs.executor import Resources, open_executor
from ..ray_jobs.progress import Reporter, reporting
from ..ray_jobs.worker import absolute
from ..store.documents import Example
from ..store.errors import DataError, NumericalError, UsageError
from ..store.extras import require
from ..store.index import Index
from ..store.shapes import Float32
from .lds import columns_correlation, interval
from .retrain import Train, compute_losses, trained

if TYPE_CHECKING:
    import pandas as pd

_REPORTED = ("name", "value", "low", "high")
Optimizer = Literal["sgd", "adam"]
_OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": partial(torch.optim.AdamW, weight_decay=0.0),
}


@dataclass(frozen=True)
class Figure:
    """A mean with its 95 % interval; None for a single value."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Report:
    """Named figures of one check, with its settings and an explanation."""

    check: str
    figures: Mapping[str, Figure]
    about: Mapping[str, Any]
    explained: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, as `wherefrom evaluate --json` prints it."""
        return {
            "check": self.check,
            **self.about,
            "figures": {name: asdict(figure) for name, figure in self.figures.items()},
            "explained": self.explained,
        }

    def to_pandas(self) -> "pd.DataFrame":
        """The figures, one a line.

        Raises:
            UsageError: pandas is not installed.
        """
        return data_frame([{"name": name, **asdict(figure)} for name, figure in self.figures.items()], _REPORTED)

    def _repr_html_(self) -> str:
        """The table of `to_pandas`, and the explanation, for notebooks."""
        lines = [(name, figure.value, figure.low, figure.high) for name, figure in self.figures.items()]
        return html_table(self.check, _REPORTED, lines) + f"<p>{escape(self.explained)}</p>"


def tailpatch(
    index: str | Path | Index | Client,
    queries: Sequence[Query],
    *,
    k: int = 10,
    mode: Mode = "influence",
    optimizer: Optimizer = "sgd",
    rate: float = 1e-2,
    reporter: Reporter | None = None,
) -> Report:
    """Take one step on each of a query's k best proponents, and on k random examples, from the same weights each time.

    Args:
        index: a directory, an open index, or a client of one.
        queries: to check.
        k: proponents of each query, and random examples.
        mode: of the scores.
        optimizer: of the step, "sgd" or "adam".
        rate: the step's learning rate. The step is on the mean of the example's loss over loss tokens, as in training; it updates every
            weight.
        reporter: of progress, instead of the default one.

    Raises:
        UsageError: an invalid optimizer, rate or k.
        NumericalError: a step ends in a loss that is not finite.
    """
    if optimizer not in _OPTIMIZERS:
        raise UsageError(f"optimizer is {optimizer!r}; it can be {', '.join(_OPTIMIZERS)}")
    if not 0 < rate < np.inf:
        raise UsageError(f"rate is {rate}; it must be a number above 0")
    client = index if isinstance(index, Client) else Client(index)
    refuse_contrasts(queries)
    generator = np.random.default_rng(0)
    examples = client.query_examples(queries)
    if not 1 <= k <= len(client.index):
        raise UsageError(f"k is {k}; it must be between 1 and the index's {len(client.index)} rows")
    scores = score_matrix(client.index, client.encode(queries), Metric(mode))
    trainer = _StepTrainer(client, optimizer, rate)
    before = compute_losses(client.recorded.task, trainer.model, examples)
    falls: dict[str, list[np.ndarray]] = {"proponents": [], "random": []}
    agreement = []
    with reporting(reporter) as current:
        current.stage("steps", len(queries) * 2 * k)
        for number, (query, score, loss) in enumerate(zip(examples, scores, before, strict=True)):
            selections = {"proponents": np.argsort(-score, kind="stable")[:k], "random": generator.choice(len(score), k, replace=False)}
            for kind, rows in selections.items():
                falls[kind].append(float(loss) - np.array([trainer.loss_after(int(row), query) for row in rows]))
            row_scores = np.concatenate([score[rows] for rows in selections.values()]).astype(float)
            agreement.append(float(columns_correlation(row_scores[:, None], np.concatenate([f[-1] for f in falls.values()])[:, None])[0]))
            current.update((number + 1) * 2 * k, 0)
    figures = {f"{kind}: loss falls by (nats)": mean_figure([f.mean() for f in values]) for kind, values in falls.items()}
    figures |= {
        f"{kind}: share of steps after which it fell": mean_figure([(f > 0).mean() for f in values]) for kind, values in falls.items()
    }
    figures["rank correlation of score and fall"] = mean_figure(agreement)
    about = {"queries": len(queries), "k": k, "mode": mode, "optimizer": optimizer, "rate": rate}
    return Report(
        "tailpatch", figures, about, f"One {optimizer} step of rate {rate:g} on each example, always from the index's own weights."
    )


class _StepTrainer:
    """The index's model, with its weights restored after every step."""

    def __init__(self, client: Client, optimizer: Optimizer, rate: float) -> None:
        self._client = client
        self._optimizer = optimizer
        self._rate = rate
        refuse_split(client.encoder.model, "a step of training")
        self.model: nn.Module = copy.deepcopy(client.encoder.model)
        if next(self.model.parameters()).dtype != torch.float64:
            self.model.float()  # bfloat16 would round small steps away
        trained = loaded(client.encoder.model).trained
        self._parameters = {n: p for n, p in self.model.named_parameters() if trained is None or n.rpartition(".")[0] in trained}
        self._weights = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    def loss_after(self, row: int, query: Example) -> float:
        task = self._client.recorded.task
        model = self.model
        batch = task.collate([self._client.index.example(row)], next(model.parameters()).device)
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)
        optimizer = _OPTIMIZERS[self._optimizer](self._parameters.values(), lr=self._rate)
        (task.loss(model, batch).sum() / (batch.targets >= 0).sum()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.requires_grad_(False)
        loss = float(compute_losses(task, model, [query])[0])
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self._weights[name])
        return loss


def brittleness(
    index: str | Path | Index,
    queries: Sequence[Query],
    train: str,
    base: str | Path,
    *,
    k: int = 50,
    draws: int = 5,
    mode: Mode = "influence",
    model: Sequence[str] = (),
    device: str = "auto",
    workers: int = 1,
    threads: int = 1,
    address: str | None = None,
    reporter: Reporter | None = None,
) -> Report:
    """Retrain without each query's k best proponents, and `draws` times without k random examples; compare with training on all.

    Args:
        index: a directory, or an open index.
        queries: to check.
        train: the user's training function, `module:function` (see retrain.py); every training has the same seed.
        base: the initial model, not trained on the examples (unlike the index's model).
        k: examples to leave out.
        mode: of the scores.
        model: the index's models, if they were moved.
        device, workers, threads, address: as for a build.
        reporter: of progress, instead of the default one.

    Raises:
        UsageError: an invalid k or draws.
    """
    import_object(train, "training function")
    resolve_device(device)  # training does not support "map"
    client = Client(index, model=model, device=device)
    rows = len(client.index)
    refuse_contrasts(queries)
    if not 1 <= k < rows:
        raise UsageError(f"k is {k}; it must leave some of the index's {rows} rows to train on")
    if draws < 1:
        raise UsageError(f"draws is {draws}; it must be at least 1")
    generator = np.random.default_rng(0)
    scores = score_matrix(client.index, client.encode(queries), Metric(mode))
    best = [np.argsort(-score, kind="stable")[:k].tolist() for score in scores]
    removed = [[], *best, *(generator.choice(rows, k, replace=False).tolist() for _ in range(draws))]
    directory = str(client.index.path.resolve())
    factory = partial(Remover, train, absolute(os.fspath(base)), directory, tuple(queries), tuple(map(absolute, model)), device, threads)
    resources = Resources(workers, threads, address, device, own_code=True)
    with reporting(reporter) as current, open_executor(factory, resources) as executor:
        current.stage("retraining", sum(rows - len(r) for r in removed))
        losses = np.stack(list(executor.map("losses_without", (), [(r,) for r in removed], current)))
    full = losses[0]
    by_top = np.diagonal(losses[1 : 1 + len(queries)]) - full
    by_chance = losses[1 + len(queries) :] - full
    figures = {
        "without the proponents, the loss rises by (nats)": mean_figure(by_top.tolist()),
        "without random examples, the loss rises by (nats)": mean_figure(by_chance.mean(axis=0).tolist()),
        "share of queries where the proponents' removal costs more than every random one": mean_figure(
            (by_top > by_chance.max(axis=0)).tolist()
        ),
    }
    about = {"queries": len(queries), "k": k, "draws": draws, "mode": mode, "rows": rows, "chance_of_the_share": round(1 / (draws + 1), 3)}
    return Report("brittleness", figures, about, f"Trained again by {train} without {k} of {rows:,} examples, always with the same seed.")


class Remover:
    """A worker that trains without some of an index's examples and measures the queries."""

    def __init__(
        self, train: str, base: str, index: str, queries: Sequence[Query], model: Sequence[str], device: str, threads: int
    ) -> None:
        configure_memory()
        torch.set_num_threads(threads)
        self._train: Train = import_object(train, "training function")
        self._client = Client(index, model=model, device=device)
        self._device = device
        self._base = base
        self._asked = queries
        self._queries = self._client.query_examples(queries)
        self._examples = [self._client.index.example(row) for row in range(len(self._client.index))]

    def losses_without(self, removed: Sequence[int], progress: Progress = ignore_progress) -> Float32[np.ndarray, " queries"]:
        """The queries' losses (nats) after training on all other examples."""
        remaining = set(range(len(self._examples))) - set(removed)
        model = trained(self._train, [self._examples[i] for i in sorted(remaining)], self._base, 0, self._device)
        losses = compute_losses(self._client.recorded.task, model, self._queries)
        progress(len(remaining), 0)
        return losses


def labels(index: str | Path | Index, column: str) -> Report:
    """AUC of self-influence (a row's squared norm) for examples whose metadata column `column` is true.

    Args:
        index: a directory, or an open index.
        column: true where an example's label is known to be wrong.

    Raises:
        UsageError: the column is missing, or the same for all examples; rows have unit length.
    """
    reader = index if isinstance(index, Index) else Index(index)
    if any("unit-length" in component.features for component in reader.manifest.components):
        raise UsageError("all rows of this index have the same length, which says nothing of labels; use an index without `unit_length`")
    values = [reader.example(row).metadata.get(column) for row in range(len(reader))]
    if all(value is None for value in values):
        raise UsageError(f"the index has no metadata column {column!r}")
    labeled = np.array([value is not None for value in values])
    wrong = np.array([_truth(value, column) for value in values if value is not None])
    if wrong.all() or not wrong.any():
        raise UsageError(f"the column {column!r} is {'true' if wrong.all() else 'false'} for every example; give a column with both values")
    norms = row_norms(reader)[labeled]
    bad = norms[wrong]
    good = norms[~wrong]
    figures = {"AUC of self-influence": Figure(_auc(bad, good), *interval(lambda a, b: _auc(bad[a], good[b]), (len(bad), len(good))))}
    inspected = np.argsort(-norms)[: int(wrong.sum())]
    figures["share found when as many as are wrong are inspected"] = mean_figure(wrong[inspected].astype(float).tolist())
    about = {"rows": len(reader), "without_a_label": int((~labeled).sum()), "column": column, "wrong": int(wrong.sum())}
    return Report("labels", figures, about, "An AUC of 0.5 is chance; examples are ordered by self-influence, largest first.")


def recall(
    index: str | Path | Index,
    reference: str | Path | Index,
    queries: Sequence[Query] | None = None,
    *,
    k: int = 10,
    mode: Mode = "influence",
    sample: int = 100,
) -> Report:
    """Share of the reference's top k in an index's top k, for queries, or for rows used as queries (self-retrieval).

    Args:
        index, reference: directories or open indexes of the same examples; the reference's scores are the truth.
        queries: by default a sample of the index's rows.
        k: best rows to find.
        mode: of the scores.
        sample: number of rows in that sample.

    Raises:
        UsageError: the two do not hold the same examples.
    """
    client = Client(index)
    truth_client = Client(reference)
    paths = f"{client.index.path} and {truth_client.index.path}"
    ids = [[i for shard in c.index.shards for i in c.index.documents(shard).ids()] for c in (client, truth_client)]
    if ids[0] != ids[1]:
        raise UsageError(f"{paths} do not hold the same examples in the same order; build both from the same corpus")
    rows = len(client.index)
    if [m.fingerprint for m in client.index.manifest.models] != [m.fingerprint for m in truth_client.index.manifest.models] or any(
        client.index.example(row).text != truth_client.index.example(row).text for row in range(rows)
    ):
        raise UsageError(f"{paths} have different models, or different texts under the same ids; build both alike")
    if not queries:
        positions = np.sort(np.random.default_rng(0).choice(rows, min(sample, rows), replace=False))
        queries = [Query(row=int(row)) for row in positions]
    if not 1 <= k < rows:
        raise UsageError(f"k is {k}; it must be at least 1 and below the indexes' {rows} rows")
    scores, truth = (score_matrix(c.index, c.encode(queries), Metric(mode)).T for c in (client, truth_client))
    same = [(q.row, i) for i, q in enumerate(queries) if q.row is not None]  # a query row does not count as its own result

    def smallest(matrix: Float32[np.ndarray, "rows queries"]) -> list[list[int]]:
        for position in same:
            matrix[position] = np.inf
        return np.argsort(matrix, axis=0, kind="stable")[:k].T.tolist()

    tops = {"proponents": (smallest(-scores), smallest(-truth)), "opponents": (smallest(scores.copy()), smallest(truth.copy()))}
    shares = {name: [len({*a} & {*b}) / k for a, b in zip(*pair, strict=True)] for name, pair in tops.items()}
    figures = {f"top {k} {name} found again": mean_figure(values) for name, values in shares.items()}
    figures["rank correlation of all scores"] = mean_figure(columns_correlation(scores.astype(float), truth.astype(float)).tolist())
    size, reference_size = (c.index.summary()["bytes_per_example"] for c in (client, truth_client))
    sizes = {"bytes_per_example": size, "reference_bytes_per_example": reference_size}
    about = {"queries": len(queries), "k": k, "mode": mode, "rows": rows, **sizes}
    return Report("recall", figures, about, f"The truth is the exact scan of {truth_client.index.path}.")


def _truth(value: Any, column: str) -> bool:
    if isinstance(value, (bool, int)) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.lower() in ("true", "false", "1", "0"):
        return value.lower() in ("true", "1")
    raise DataError(f"the column {column!r} has {value!r}, which is neither true nor false")


def _auc(bad: np.ndarray, good: np.ndarray) -> float:
    truth = np.repeat([1, 0], [len(bad), len(good)])
    return float(require("sklearn.metrics", "evaluation").roc_auc_score(truth, np.concatenate([bad, good])))


def refuse_contrasts(queries: Sequence[Query]) -> None:
    """Raise a UsageError for a query whose score is a difference of two, since one loss is measured."""
    number = next((number for number, query in enumerate(queries, 1) if query.against is not None), None)
    if number is not None:
        raise UsageError(f"query {number} is a contrast (`against`), and a check measures the loss of one completion; ask for it alone")


def mean_figure(values: Sequence[float]) -> Figure:
    """The mean of the values that are not NaN, with its 95 % interval by bootstrap."""
    array = np.array(values, float)
    if not len(array) or np.isnan(array).all():
        raise NumericalError("there are no values to average; give more queries, or queries whose losses differ")
    if len(array) == 1:
        return Figure(float(array[0]), None, None)
    return Figure(float(np.nanmean(array)), *interval(lambda rows, _: float(np.nanmean(array[rows])), (len(array), 1)))
