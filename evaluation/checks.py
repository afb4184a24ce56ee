"""Four checks of an index against the world: does the model really react, can labels be trusted, what did compression lose?

    tailpatch     one optimizer step on a proponent: does the query's loss fall, and more than after a step on a random example?
                  (Chang et al., TrackStar, arXiv 2410.17413, section 5)
    brittleness   train again without the top k: does the query's loss rise more than without k random examples?
                  (Ilyas et al., Datamodels, arXiv 2202.00622, section 4.2)
    labels        are examples with a wrong label those of largest self-influence? (Koh and Liang, arXiv 1703.04730, section 5.4)
    recall        a compressed index against the scores of its float32 twin

Each gives its figures with 95 % intervals, by bootstrap over queries (labels: over examples), and the random choice beside them.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32
from torch import nn

from ..client import Client
from ..indexer.encoder import Progress, ignore_progress
from ..indexer.models import keep_freed_memory, resolve_device
from ..indexer.tasks import import_object
from ..query.answers import Query
from ..query.baselines import row_norms
from ..query.metric import Metric, Mode
from ..ray_jobs.executor import Resources, open_executor
from ..ray_jobs.progress import Reporter, Silent
from ..ray_jobs.worker import absolute
from ..store.documents import Example
from ..store.errors import DataError, NumericalError, UsageError
from ..store.index import Index
from .baselines import score_matrix
from .lds import columns_correlation, interval
from .retrain import Train, measure_losses, trained

Optimizer = Literal["sgd", "adam"]
_OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": partial(torch.optim.AdamW, weight_decay=0.0),
}


@dataclass(frozen=True)
class Figure:
    """A mean with its 95 % interval; None where there is only one value."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Report:
    """Named figures of one check, what they mean, and how many queries (or examples) they rest on."""

    check: str
    figures: Mapping[str, Figure]
    about: Mapping[str, Any]
    explained: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, as printed with --json."""
        return {
            "check": self.check,
            **self.about,
            "figures": {name: asdict(e) for name, e in self.figures.items()},
            "explained": self.explained,
        }


def tailpatch(
    client: Client,
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
        optimizer, rate: of the step, on the example's loss (its mean over loss tokens, as training has it); every weight may move.

    Raises:
        UsageError: an optimizer or rate that cannot be meant.
        NumericalError: a step ends in a loss that is not finite.
    """
    if optimizer not in _OPTIMIZERS:
        raise UsageError(f"--optimizer is {optimizer!r}; it can be {', '.join(_OPTIMIZERS)}")
    if not 0 < rate < np.inf:
        raise UsageError(f"--rate is {rate}; it must be a number above 0")
    reporter, generator = reporter or Silent(), np.random.default_rng(0)
    asked = client.examples(queries)
    if not 1 <= k <= len(client.index):
        raise UsageError(f"-k is {k}; it must be between 1 and the index's {len(client.index)} rows")
    scores = score_matrix(client, client.rows(queries), Metric(mode)).T
    patched = _Patched(client, optimizer, rate)
    before = measure_losses(client.task, patched.model, asked)
    reporter.stage("steps", len(queries) * 2 * k)
    falls: dict[str, list[np.ndarray]] = {"proponents": [], "random": []}
    agreement = []
    for number, (query, score, loss) in enumerate(zip(asked, scores, before, strict=True)):
        chosen = {"proponents": np.argsort(-score, kind="stable")[:k], "random": generator.choice(len(score), k, replace=False)}
        for kind, rows in chosen.items():
            falls[kind].append(float(loss) - np.array([patched.loss_after(int(row), query) for row in rows]))
        tested = np.concatenate([score[rows] for rows in chosen.values()]).astype(float)
        agreement.append(float(columns_correlation(tested[:, None], np.concatenate([f[-1] for f in falls.values()])[:, None])[0]))
        reporter.update((number + 1) * 2 * k, 0)
    figures = {f"{kind}: loss falls by (nats)": _mean([f.mean() for f in found]) for kind, found in falls.items()}
    figures |= {f"{kind}: share of steps after which it fell": _mean([(f > 0).mean() for f in found]) for kind, found in falls.items()}
    figures["rank correlation of score and fall"] = _mean(agreement)
    about = {"queries": len(queries), "k": k, "mode": mode, "optimizer": optimizer, "rate": rate}
    return Report(
        "tailpatch", figures, about, f"One {optimizer} step of rate {rate:g} on each example, always from the index's own weights."
    )


class _Patched:
    """The index's model, put back after every step."""

    def __init__(self, client: Client, optimizer: Optimizer, rate: float) -> None:
        self._client, self._optimizer, self._rate = client, optimizer, rate
        self.model: nn.Module = copy.deepcopy(client.encoder.model)
        if next(self.model.parameters()).dtype != torch.float64:
            self.model.float()  # small steps would be rounded away in bfloat16
        self._kept = {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def loss_after(self, row: int, query: Example) -> float:
        task, model = self._client.task, self.model
        batch = task.collate([self._client.index.example(row)], next(model.parameters()).device)
        model.requires_grad_(True)
        optimizer = _OPTIMIZERS[self._optimizer](model.parameters(), lr=self._rate)
        (task.loss(model, batch).sum() / (batch.targets >= 0).sum()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.requires_grad_(False)
        loss = float(measure_losses(task, model, [query])[0])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self._kept[name])
        return loss


def brittleness(
    index: str,
    queries: Sequence[Query],
    train: str,
    base: str,
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
    """Train again without each query's k best proponents, and without k random examples `draws` times; compare with training on all.

    Args:
        train: the user's training function, `module:function` (see retrain.py); every training has the same seed.
        base: what it starts from: a model that has not seen the examples (the index's own has).

    Raises:
        UsageError: k leaves nothing to train on.
    """
    import_object(train, "training function")
    resolve_device(device)  # a model that is trained lies on one
    client = Client(index, model=model, device=device)
    rows = len(client.index)
    if not 1 <= k < rows:
        raise UsageError(f"-k is {k}; it must leave some of the index's {rows} rows to train on")
    if draws < 1:
        raise UsageError(f"--draws is {draws}; it must be at least 1")
    reporter, generator = reporter or Silent(), np.random.default_rng(0)
    scores = score_matrix(client, client.rows(queries), Metric(mode))
    best = [np.argsort(-score, kind="stable")[:k].tolist() for score in scores.T]
    removed = [[], *best, *(generator.choice(rows, k, replace=False).tolist() for _ in range(draws))]
    factory = partial(
        Remover, train, absolute(base), str(Path(index).resolve()), tuple(queries), tuple(map(absolute, model)), device, threads
    )
    reporter.stage("retraining", sum(rows - len(r) for r in removed))
    with open_executor(factory, Resources(workers, threads, address, device, own_code=True)) as executor:
        losses = np.stack(list(executor.map("losses_without", (), [(r,) for r in removed], reporter)))
    whole, top, random = losses[0], losses[1 : 1 + len(queries)], losses[1 + len(queries) :]
    by_top = np.diagonal(top) - whole
    by_chance = random - whole
    figures = {
        "without the proponents, the loss rises by (nats)": _mean(by_top.tolist()),
        "without random examples, the loss rises by (nats)": _mean(by_chance.mean(axis=0).tolist()),
        "share of queries where the proponents' removal costs more than every random one": _mean((by_top > by_chance.max(axis=0)).tolist()),
    }
    about = {
        "queries": len(queries),
        "k": k,
        "draws": draws,
        "mode": mode,
        "rows": rows,
        "chance_of_the_share": round(1 / (draws + 1), 3),
    }
    return Report("brittleness", figures, about, f"Trained again by {train} without {k} of {rows:,} examples, always with the same seed.")


class Remover:
    """A worker that trains without some of an index's examples and measures the queries."""

    def __init__(
        self, train: str, base: str, index: str, queries: Sequence[Query], model: Sequence[str], device: str, threads: int
    ) -> None:
        keep_freed_memory()
        torch.set_num_threads(threads)
        self._train: Train = import_object(train, "training function")
        self._client = Client(index, model=model, device=device)
        self._device, self._base = device, base
        self._asked = self._client.examples(queries)
        self._examples = [self._client.index.example(row) for row in range(len(self._client.index))]

    def losses_without(self, removed: Sequence[int], progress: Progress = ignore_progress) -> Float32[np.ndarray, " queries"]:
        """The queries' losses (nats) after training on all examples but these."""
        left = set(range(len(self._examples))) - set(removed)
        model = trained(self._train, [self._examples[i] for i in sorted(left)], self._base, 0, self._device)
        losses = measure_losses(self._client.task, model, self._asked)
        progress(len(left), 0)
        return losses


def labels(index: str, column: str) -> Report:
    """The AUC with which self-influence (a row's squared norm) tells examples whose metadata column `column` is true from the others.

    Raises:
        UsageError: the column is not there, or the same for all examples.
    """
    opened = Index(index)
    known = [opened.example(row).metadata.get(column) for row in range(len(opened))]
    if all(value is None for value in known):
        raise UsageError(f"the index has no metadata column {column!r}")
    labelled = np.array([value is not None for value in known])
    wrong = np.array([_truth(value, column) for value in known if value is not None])
    if wrong.all() or not wrong.any():
        raise UsageError(f"the column {column!r} is {'true' if wrong.all() else 'false'} for every example; there is nothing to tell apart")
    norms = row_norms(opened)[labelled]
    bad, good = norms[wrong], norms[~wrong]
    figures = {"AUC of self-influence": Figure(_auc(bad, good), *interval(lambda a, b: _auc(bad[a], good[b]), (len(bad), len(good))))}
    inspected = np.argsort(-norms)[: int(wrong.sum())]
    figures["share found when as many as are wrong are inspected"] = _mean(wrong[inspected].astype(float).tolist())
    about = {"rows": len(opened), "without_a_label": int((~labelled).sum()), "column": column, "wrong": int(wrong.sum())}
    return Report("labels", figures, about, "An AUC of 0.5 is chance; examples are ordered by self-influence, largest first.")


def recall(
    index: str, reference: str, queries: Sequence[Query] | None = None, *, k: int = 10, mode: Mode = "influence", sample: int = 100
) -> Report:
    """How much of the reference's top k an index's own top k holds, for queries, or for rows of the reference asked back.

    Args:
        index, reference: of the same examples; the reference's scores count as the truth.
        sample: rows asked when there are no queries.

    Raises:
        UsageError: the two do not hold the same examples.
    """
    ours, theirs = Client(index), Client(reference)
    ids = [[i for shard in c.index.shards for i in c.index.documents(shard).ids()] for c in (ours, theirs)]
    if ids[0] != ids[1]:
        raise UsageError(f"{index} and {reference} do not hold the same examples in the same order; build both from the same corpus")
    rows = len(ours.index)
    if [m.fingerprint for m in ours.index.manifest.models] != [m.fingerprint for m in theirs.index.manifest.models] or any(
        ours.index.example(row).text != theirs.index.example(row).text for row in range(rows)
    ):
        raise UsageError(f"{index} and {reference} are of different models, or of different texts under the same ids; build both alike")
    if not queries:
        chosen = np.sort(np.random.default_rng(0).choice(rows, min(sample, rows), replace=False))
        queries = [Query(row=int(row)) for row in chosen]
    if not 1 <= k < rows:
        raise UsageError(f"k is {k}; it must be at least 1 and below the indexes' {rows} rows")
    found, truth = (score_matrix(c, c.rows(queries), Metric(mode)) for c in (ours, theirs))
    own = [(q.row, i) for i, q in enumerate(queries) if q.row is not None]  # a row that finds itself is not an achievement
    ranked = []
    for s in (found, truth):
        best_first, worst_first = -s, s.copy()
        for at in own:
            best_first[at] = worst_first[at] = np.inf
        ranked.append([np.argsort(v, axis=0, kind="stable")[:k] for v in (best_first, worst_first)])
    best, worst = [r[0] for r in ranked], [r[1] for r in ranked]
    shares = {
        name: [len({*a} & {*b}) / k for a, b in zip(*(t.T.tolist() for t in tops), strict=True)]
        for name, tops in (("proponents", best), ("opponents", worst))
    }
    figures = {f"top {k} {name} found again": _mean(values) for name, values in shares.items()}
    figures["rank correlation of all scores"] = _mean(columns_correlation(found.astype(float), truth.astype(float)).tolist())
    sizes = {
        name: c.index.summary()["bytes_per_example"] for name, c in (("bytes_per_example", ours), ("reference_bytes_per_example", theirs))
    }
    about = {"queries": len(queries), "k": k, "mode": mode, "rows": rows, **sizes}
    return Report("recall", figures, about, f"The truth is the exact scan of {reference}.")


def _truth(value: Any, column: str) -> bool:
    if isinstance(value, (bool, int)) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.lower() in ("true", "false", "1", "0"):
        return value.lower() in ("true", "1")
    raise DataError(f"the column {column!r} holds {value!r}, which is neither true nor false")


def _auc(bad: np.ndarray, good: np.ndarray) -> float:
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([bad, good]))[: len(bad)]
    return float((ranks.mean() - (len(bad) + 1) / 2) / len(good))


def _mean(values: Sequence[float]) -> Figure:
    found = np.array(values, float)
    if not len(found) or np.isnan(found).all():
        raise NumericalError("there is nothing to average: too few queries, or every one of them without an answer")
    if len(found) == 1:
        return Figure(float(found[0]), None, None)
    return Figure(float(np.nanmean(found)), *interval(lambda rows, _: float(np.nanmean(found[rows])), (len(found), 1)))


def show(report: Report) -> None:
    """Print a report for people."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=report.check, title_justify="left", box=SIMPLE_HEAD)
    for name in ("", "mean", "95 % interval"):
        table.add_column(name, justify="left" if not name else "right")
    for name, e in report.figures.items():
        table.add_row(name, f"{e.value:.4g}", "one alone has none" if e.low is None else f"{e.low:.4g} to {e.high:.4g}")
    console = Console()
    console.print(table)
    counted = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in report.about.items())
    console.print(f"{report.explained} {counted}.", style="dim", highlight=False)
