"""Slope of measured on predicted changes of losses: the worth of a nat that an index predicts.

Predicted changes are sums of scores (query/units.py) over the examples that a training lacks; measured ones come from retraining on a
pack's subsets, or from the derivatives of a replayed training. Both are taken from their mean over the subsets, for each query. With
p and m these changes, the slope is sum p m / sum p^2: the factor after which predictions have the least squared error. A noisy prediction
has a smaller slope than an exact one, as it must. A replay gives each example's part of the change, so p and m are these parts.

Scores are of leaving one example out of all. In a training on a part of the examples each weighs more: by the inverse of the part where
training converges (a slope from halves is twice that of single examples), by less where it ends early. What a pack's subsets hold stands
with the slope.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..client import Client
from ..query.metric import Metric
from ..query.options import Query
from ..query.scoring import score_matrix
from ..query.units import Unit
from ..ray_jobs.progress import Reporter, reporting
from ..store.errors import IntegrityError, NotFoundError, NumericalError, UsageError
from ..store.manifest import Slope
from ..store.shapes import Float64
from ..store.update import record_slope
from .agreement import exact_scores
from .checks import Figure, Report
from .judge import pack_examples
from .lds import estimate, interval
from .packs import Half, read_pack
from .pages import verify_report

_MOST_REPORT_BYTES = 1 << 28
_METRIC = Metric("influence")
_Change = Annotated[float, Field(ge=-1e12, le=1e12)]  # nats


def slope(
    index: str | Path | Client,
    pack: str | Path | None = None,
    *,
    data: Path | None = None,
    half: Half = "all",
    run: str | Path | None = None,
    queries: Sequence[Query] = (),
    report: str | Path | None = None,
    keep: bool = True,
    reporter: Reporter | None = None,
    **resources: Any,
) -> Report:
    """Measure the slope of an index's scores, and keep it in the index, so that its answers are in measured nats.

    Args:
        index: of the pack's training documents, or of the run's.
        pack: its directory; the changes are those of retraining on its subsets.
        data: directory of an image pack's IDX files.
        half: the pack's queries to use.
        run: directory of a recorded training, instead of a pack; the changes are those of `queries`, by a replay.
        report: JSON report of `act`, instead of either; the changes are those of its trainings.
        keep: write the slope into the index.
        resources: of a replay: device, workers, threads, address.

    Raises:
        UsageError: not exactly one of pack, run and report, or scores of the index have no unit.
        NumericalError: measured changes do not rise with predicted ones, so that no slope above 0 fits.
    """
    if [pack, run, report].count(None) != 2:
        raise UsageError("a slope is measured by a `pack`, by the `run` of a recorded training or by a `report` of act; give one of them")
    client = index if isinstance(index, Client) else Client(index, device=resources.get("device", "auto"))
    unit = Unit.of(client.index, _METRIC)
    if unit.name is None:
        raise UsageError(f"scores of {client.index.path} have no unit (see docs/how-it-works.md), so that no slope can be measured")
    if report is not None:
        result = _of_report(Path(report), client)
        if keep:
            record_slope(client.index.path, result)
        return _report(result, {}, keep)
    if pack is not None:
        ground_truth = read_pack(Path(pack), data).half(half)
        _, examples = pack_examples(client, ground_truth, Path(pack))
        scores = score_matrix(client.index, client.encode_examples(examples, _METRIC), _METRIC).T.astype(np.float64)
        masks = ground_truth.masks.astype(np.float64)
        measured = ground_truth.losses.mean(axis=1, dtype=np.float64)
        part = float(masks.mean())
        by = f"retraining on {len(masks)} subsets of {part:.0%} of the examples (pack {ground_truth.name[:80]})"
    else:
        assert run is not None
        with reporting(reporter) as current:
            scores, exact, _ = exact_scores(client, run, queries, "influence", current, **resources)
        by = f"a replay of the training ({len(queries)} queries)"
    kept = 1.0 if unit.slope is None else unit.slope.value
    if run is None:
        predicted = -(masks @ scores) / kept
        trainings = len(masks)
        ranks = estimate(scores, masks > 0, measured[:, None])
        correlation = {"lds": ranks.value, "lds_low": ranks.low, "lds_high": ranks.high}
    else:
        predicted = scores / kept
        measured = exact
        trainings = 1
        correlation = {}
    fit = fitted_slope if run is None else through_zero
    value = fit(predicted, measured)

    def resampled(rows: np.ndarray, columns: np.ndarray) -> float:
        cells = np.ix_(rows, columns)
        return fit(predicted[cells], measured[cells])

    low, high = interval(resampled, predicted.shape)
    if not value > 0:
        raise NumericalError(f"the slope is {value:.3g}: measured changes do not rise with predicted ones; these scores should not be used")
    result = Slope(value=value, low=low, high=high, measured_by=by, trainings=trainings, queries=predicted.shape[1], **correlation)
    if keep:
        record_slope(client.index.path, result)
    figures: dict[str, Figure] = {}
    if unit.slope is not None:
        figures["for each nat predicted with the slope that the index had"] = Figure(value / kept, low / kept, high / kept)
    if run is None:
        figures["rank correlation with the measured changes (LDS)"] = Figure(ranks.value, ranks.low, ranks.high)
    return _report(result, figures, keep)


class _Effect(BaseModel):
    """An effect as far as a slope needs it (see act.py)."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    held_out: bool
    predicted: _Change | None
    predicted_by_chance: _Change | None
    measured: _Change
    by_chance: _Change


class _ActReport(BaseModel):
    """A report of `act` as far as a slope needs it."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    report: Literal["wherefrom act 1"]
    index: str
    seeds: Annotated[int, Field(ge=1, le=10**6)]
    draws: Annotated[int, Field(ge=1, le=10**6)]
    kept_slope: Annotated[float, Field(ge=1e-9, le=1e9)]
    effects: Annotated[list[_Effect], Field(max_length=1_000_000)]
    signature: dict[str, Any] | None = None


def _report(slope: Slope, figures: Mapping[str, Figure], keep: bool) -> Report:
    measured = {"measured change for each nat predicted without a slope": Figure(slope.value, slope.low, slope.high)}
    about = {"measured_by": slope.measured_by, "queries": slope.queries, "trainings": slope.trainings, "kept": keep}
    return Report(
        "slope", {**measured, **figures}, about, "The factor after which predicted changes of losses have the least squared error."
    )


def _of_report(path: Path, client: Client) -> Slope:
    """Take the slope of a report of `act`, over its queries.

    Raises:
        NotFoundError, IntegrityError: there is no such file, or it is not such a report.
        UsageError: it is of another index, or of one query alone, which gives no interval.
        NumericalError: losses do not change as predicted.
    """
    if not path.is_file():
        raise NotFoundError(f"there is no report {path}")
    if path.stat().st_size > _MOST_REPORT_BYTES:
        raise IntegrityError(f"{path} is larger than any report")
    try:
        content = _ActReport.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise IntegrityError(f"{path} is not a report of wherefrom act ({where or 'JSON'}: {first['msg']}); write it again") from error
    if content.signature is not None:
        verify_report(path)
    changes = [
        (e.predicted - e.predicted_by_chance, e.measured - e.by_chance)
        for e in content.effects
        if not e.held_out and e.predicted is not None and e.predicted_by_chance is not None
    ]
    predicted, measured = np.array(changes, np.float64).reshape(-1, 2).T
    predicted = predicted / content.kept_slope
    trainings = content.seeds * (2 + content.draws)
    if content.index != str(client.index.path.resolve()):
        raise UsageError(f"{path} is of {content.index}, and not of {client.index.path}")
    if len(predicted) < 2:
        raise UsageError(f"{path} has the changes of {len(predicted)} queries; a slope and its interval need at least two")
    value, low, high = slope_over_queries(predicted, measured)
    if not low > 0:
        raise NumericalError(
            f"the slope is {value:.3g} ({low:.3g} to {high:.3g}): it may be zero, so these queries do not tell the size of scores; ask more"
        )
    return Slope(
        value=value, low=low, high=high, measured_by="trainings without some examples", trainings=trainings, queries=len(predicted)
    )


def slope_over_queries(predicted: Float64[np.ndarray, " queries"], measured: Float64[np.ndarray, " queries"]) -> tuple[float, float, float]:
    """The slope of one measured change for each query on the predicted one, through zero, with its 95 % interval over queries.

    NaN without predicted changes.
    """
    low, high = interval(lambda rows, _: through_zero(predicted[rows], measured[rows]), (len(predicted), 1))
    return through_zero(predicted, measured), low, high


def fitted_slope(predicted: Float64[np.ndarray, "subsets queries"], measured: Float64[np.ndarray, "subsets queries"]) -> float:
    """The slope of measured changes on predicted ones, each from its query's mean; NaN without predicted changes."""
    return through_zero(predicted - predicted.mean(axis=0), measured - measured.mean(axis=0))


def through_zero(predicted: Float64[np.ndarray, "*changes"], measured: Float64[np.ndarray, "*changes"]) -> float:
    """The slope of measured changes on predicted ones, of a line through zero; NaN without predicted changes."""
    total = float((predicted * predicted).sum())
    return float((predicted * measured).sum()) / total if total > 0 else float("nan")
