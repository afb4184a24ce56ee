"""Removal of training examples put to the test: training again with and without them, and without as many random ones.

For each query, the change of its loss that the index predicts stands beside the one that was measured, with those of queries that should
not change, and what the model says before and after.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..client import Client
from ..indexer.encoder import Progress, ignore_progress
from ..indexer.models import resolve_device
from ..indexer.tasks import import_object
from ..query.metric import Metric
from ..query.options import Query
from ..query.scoring import score_matrix
from ..query.units import Unit
from ..ray_jobs.executor import Resources, open_executor
from ..ray_jobs.progress import Reporter, reporting
from ..ray_jobs.worker import absolute
from ..store.errors import NotFoundError, UsageError
from .checks import Figure, Remover, mean_figure, refuse_contrasts
from .pages import bars, check_report, points, write_report
from .retrain import compute_losses, trained
from .slope import slope_over_queries

_SAID_TOKENS = 24
_SHOWN_IDS = 50


@dataclass(frozen=True)
class Effect:
    """Effect of the removal on one query.

    Attributes:
        predicted: change of its loss that the index predicts, in the unit of its scores; None where they have none.
        predicted_by_chance: that without as many random examples, the mean over draws.
        measured: change of its loss (nats), the mean over seeds.
        by_chance: the mean change without as many random examples, and its standard deviation over draws and seeds.
        before, after: its loss; what the model says then, for queries with a prompt.
        indexed: its loss under the index's model, near `before` if the training is like the one that was indexed.
    """

    id: str
    held_out: bool
    text: str
    predicted: float | None
    predicted_by_chance: float | None
    measured: float
    by_chance: float
    chance_deviation: float
    before: float
    after: float
    indexed: float
    said_before: str | None
    said_after: str | None


@dataclass(frozen=True)
class ActReport:
    """Report of a removal.

    Attributes:
        removed: ids of the examples that were left out.
        rows: of the index; `trained_on` are those that were left.
        unit: of the predictions; `kept_slope` is the one that the index had measured and they hold, 1 without one; `slope` is the measured
            change for each predicted one, with its interval over queries.
        collateral: mean change of the held-out queries' losses, beyond that of random removals; None without such queries.
    """

    index: str
    removed: tuple[str, ...]
    rows: int
    seeds: int
    draws: int
    train: str
    base: str
    unit: str | None
    kept_slope: float
    slope: Figure | None
    removal: Figure
    chance: Figure
    collateral: Figure | None
    effects: tuple[Effect, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, as `wherefrom act --json` prints it."""
        return {"report": "wherefrom act 1", **asdict(self)}

    def page(self) -> dict[str, Any]:
        """The content of its HTML page (see pages.py)."""
        asked = [e for e in self.effects if not e.held_out]
        held_out = [e for e in self.effects if e.held_out]
        summary = [
            f"{len(self.removed):,} of {self.rows:,} training examples were left out, and the model trained again by {self.train} from "
            f"{self.base}: {self.seeds} times with each choice, and {self.draws} times without as many random examples.",
            f"Without them, the queries' losses rise by {_figure(self.removal)} nats; without random ones, by {_figure(self.chance)}.",
        ]
        if self.slope is not None:
            summary.append(f"For each nat that the index predicted by its stored rows, {_figure(self.slope)} were measured.")
        before, indexed = (np.mean([getattr(e, name) for e in asked]) for name in ("before", "indexed"))
        summary.append(
            f"Trained on everything, their mean loss is {before:.3g} nats, and {indexed:.3g} under the model of the index: the nearer "
            "these are, the more the trainings are like the one that was indexed."
        )
        if self.collateral is not None:
            summary.append(f"Held-out queries' losses rise by {_figure(self.collateral)} nats more than without random examples.")
        columns = ["query", "predicted", "measured", "by chance", "loss before", "after"]
        sections = []
        compared = [
            (e.predicted - e.predicted_by_chance, e.measured - e.by_chance, e.id)
            for e in asked
            if e.predicted is not None and e.predicted_by_chance is not None
        ]
        if compared:
            title = "Predicted and measured changes, beyond those without random examples"
            sections.append({"title": title, **points(compared, "predicted (nats)", "measured (nats)")})
        for title, effects in (("Queries", asked), ("Held-out queries", held_out)):
            if effects:
                chart = bars([(e.id, e.measured - e.by_chance, None, None) for e in effects[:40]])
                rows = [[e.text[:200], *map(_number, (e.predicted, e.measured, e.by_chance, e.before, e.after))] for e in effects]
                text = ["Bars: how much more the loss rises than without random examples (nats)."]
                sections.append({"title": title, "bars": chart, "columns": columns, "rows": rows, "text": text})
        said = [[e.text[:200], e.said_before, e.said_after] for e in asked if e.said_before is not None]
        if said:
            sections.append({"title": "What the model says", "columns": ["query", "before", "after"], "rows": said})
        more = "" if len(self.removed) <= _SHOWN_IDS else f" … and {len(self.removed) - _SHOWN_IDS:,} more"
        sections.append({"title": "What was left out", "text": [", ".join(self.removed[:_SHOWN_IDS]) + more]})
        return {"title": "Removal of training examples", "summary": summary, "sections": sections, "foot": f"Index: {self.index}"}


def _figure(figure: Figure) -> str:
    interval = "" if figure.low is None else f" ({figure.low:.3g} to {figure.high:.3g})"
    return f"{figure.value:.3g}{interval}"


def _number(value: float | None) -> float | str:
    return "" if value is None else round(value, 4)


def act(
    index: str | Path,
    remove: Sequence[str],
    queries: Sequence[Query],
    train: str,
    base: str | Path,
    *,
    held_out: Sequence[Query] = (),
    draws: int = 3,
    seeds: int = 1,
    out: str | Path | None = None,
    key: str | Path | None = None,
    model: Sequence[str] = (),
    device: str = "auto",
    workers: int = 1,
    threads: int = 1,
    address: str | None = None,
    reporter: Reporter | None = None,
) -> ActReport:
    """Train again with and without some examples, and compare predicted with measured changes of losses.

    Args:
        remove: ids of the examples, or of documents with all their chunks.
        queries: whose losses should change.
        train: the user's training function, `module:function` (see retrain.py).
        base: the initial model, not trained on the examples.
        held_out: queries whose losses should not change.
        draws: random choices of as many examples, for comparison.
        seeds: trainings with each choice.
        out: name of the report: `<out>.json` and `<out>.html`.
        key: private Ed25519 key (PEM) that signs the report.
        model, device, workers, threads, address: as for a build.
        reporter: of progress, instead of the default one.

    Raises:
        UsageError: an id is not in the index, nothing or everything would be left out, or there are no queries.
    """
    import_object(train, "training function")
    if str(base).startswith((".", "/", "~")) and not Path(base).is_dir():
        raise NotFoundError(f"there is no folder {base}; name the model that training starts from")
    if out is not None:
        check_report(Path(out), None if key is None else Path(key))
    resolve_device(device)
    client = Client(index, model=model, device=device)
    rows = len(client.index)
    if client.index.manifest.deleted:
        raise UsageError(f"{client.index.path} has deleted examples, which cannot be trained on; run wherefrom compact first")
    removed = np.flatnonzero(client.index.known_rows(remove, "fix the ids")).tolist()
    if not removed or len(removed) == rows:
        raise UsageError(f"{len(removed):,} of {rows:,} examples would be left out; name some and not all")
    refuse_contrasts([*queries, *held_out])
    if not queries:
        raise UsageError("there are no queries; add those whose answers should change")
    if draws < 1 or seeds < 1:
        raise UsageError(f"draws is {draws} and seeds {seeds}; both must be at least 1")
    everything = [*queries, *held_out]
    unit = Unit.of(client.index, Metric())
    scores = score_matrix(client.index, client.encode(everything))
    generator = np.random.default_rng(0)
    choices = [[], removed, *(sorted(generator.choice(rows, len(removed), replace=False).tolist()) for _ in range(draws))]
    predicted, *by_draw = (scores[:, choice].sum(axis=1, dtype=np.float64) for choice in choices[1:])
    predicted_by_chance = np.mean(by_draw, axis=0)
    directory = str(client.index.path.resolve())
    factory = partial(_Trainer, train, absolute(str(base)), directory, tuple(everything), tuple(map(absolute, model)), device, threads)
    tasks = [(choice, seed, number < 2 and seed == 0) for number, choice in enumerate(choices) for seed in range(seeds)]
    resources = Resources(workers, threads, address, device, own_code=True)
    with reporting(reporter) as current, open_executor(factory, resources) as executor:
        current.stage("training again", sum(rows - len(choice) for choice, _, _ in tasks))
        outcomes = list(executor.map("outcome", (), tasks, current))
    losses = np.stack([outcome[0] for outcome in outcomes]).reshape(len(choices), seeds, len(everything)).astype(np.float64)
    said = {number: outcomes[number * seeds][1] for number in range(2)}
    indexed = compute_losses(client.recorded.task, client.encoder.model, client.query_examples(everything))
    measured = (losses[1] - losses[0]).mean(axis=0)
    chance = (losses[2:] - losses[0]).reshape(-1, len(everything))
    effects = tuple(
        Effect(
            id=query.id or str(number),
            held_out=number >= len(queries),
            text=example.text,
            predicted=None if unit.name is None else float(predicted[number]),
            predicted_by_chance=None if unit.name is None else float(predicted_by_chance[number]),
            measured=float(measured[number]),
            by_chance=float(chance[:, number].mean()),
            chance_deviation=float(chance[:, number].std()),
            before=float(losses[0, :, number].mean()),
            after=float(losses[1, :, number].mean()),
            indexed=float(indexed[number]),
            said_before=said[0][number],
            said_after=said[1][number],
        )
        for number, (query, example) in enumerate(zip(everything, client.query_examples(everything), strict=True))
    )
    asked = slice(0, len(queries))
    report = ActReport(
        index=directory,
        removed=tuple(client.index.example(row).id for row in removed),
        rows=rows,
        seeds=seeds,
        draws=draws,
        train=train,
        base=str(base),
        unit=unit.name,
        kept_slope=1.0 if unit.slope is None else unit.slope.value,
        slope=None if unit.name is None else _slope((predicted - predicted_by_chance)[asked], (measured - chance.mean(axis=0))[asked]),
        removal=mean_figure(measured[asked].tolist()),
        chance=mean_figure(chance.mean(axis=0)[asked].tolist()),
        collateral=mean_figure((measured - chance.mean(axis=0))[len(queries) :].tolist()) if held_out else None,
        effects=effects,
    )
    if out is not None:
        write_report(Path(out), report.to_dict(), report.page(), None if key is None else Path(key))
    return report


def _slope(predicted: np.ndarray, measured: np.ndarray) -> Figure | None:
    """The measured change for each predicted nat, beyond that of random removals; None where nothing was predicted."""
    if not predicted.any():
        return None
    value, low, high = slope_over_queries(predicted, measured)
    return Figure(value, low, high) if len(predicted) > 1 else Figure(value, None, None)


class _Trainer(Remover):
    """A worker that trains without some examples, measures the queries, and lets the model complete their prompts."""

    def outcome(
        self, removed: Sequence[int], seed: int, with_words: bool, progress: Progress = ignore_progress
    ) -> tuple[np.ndarray, list[str | None]]:
        """The queries' losses (nats) after training on all other examples, and what the model says."""
        remaining = sorted(set(range(len(self._examples))) - set(removed))
        model = trained(self._train, [self._examples[i] for i in remaining], self._base, seed, self._device)
        losses = compute_losses(self._client.recorded.task, model, self._queries)
        progress(len(remaining), 0)
        return losses, [self._said(model, query) for query in self._asked] if with_words else [None] * len(self._queries)

    @torch.no_grad()
    def _said(self, model: Any, query: Query) -> str | None:
        tokenizer = getattr(self._client.recorded.converter, "tokenizer", None)
        if query.completion is None or not query.prompt or tokenizer is None or not hasattr(model, "generate"):
            return None
        ids = tokenizer(query.prompt, return_tensors="pt")["input_ids"].to(next(model.parameters()).device)
        end = tokenizer.eos_token_id
        context = self._client.recorded.context or ids.shape[1] + _SAID_TOKENS
        count = max(1, min(_SAID_TOKENS, context - ids.shape[1]))
        said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=end)
        return str(tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True))
