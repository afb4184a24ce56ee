"""Agreement of an index's scores with exact influence, from a replay of the recorded training run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..client import Client
from ..indexer.models import ModelSource, load_causal_lm, model_fingerprint
from ..query.metric import Metric
from ..query.options import Mode, Query
from ..query.scoring import score_matrix
from ..ray_jobs.progress import Reporter, reporting
from ..store.errors import DataError, IncompatibleError
from ..store.shapes import Float
from ..store.training import read_training
from .baselines import content_baselines, require_libraries
from .checks import Report, mean_figure, refuse_contrasts
from .lds import columns_correlation
from .replay import Replayed, match_rows, replay_examples

_BEST = 10
_SUBSETS = 100


def agreement(
    index: str | Path | Client,
    run: str | Path,
    queries: Sequence[Query],
    *,
    mode: Mode = "influence",
    model: Sequence[str] = (),
    reporter: Reporter | None = None,
    **resources: Any,
) -> Report:
    """Compare an index's scores with exact influence from a replay of the training run.

    Examples are compared that are both in the record and in the index, by their tokens and loss masks.

    Args:
        index: of the run's training examples, under its trained model.
        run: directory of the record.
        queries: to ask.
        mode: of the index's scores.
        model: the index's models, if they were moved.
        resources: device, workers, threads, address.

    Raises:
        DataError: hardly any example of the index is in the record.
        IncompatibleError: the index is of another model than the run's.
    """
    require_libraries()
    client = index if isinstance(index, Client) else Client(index, model=model, device=resources.get("device", "auto"))
    with reporting(reporter) as current:
        scores, exact, compared = exact_scores(client, run, queries, mode, current, **resources)
    matched = [client.index.example(row) for row in compared.rows]
    baselines = content_baselines(matched, client.query_examples(queries))
    methods = {"the index": scores, **{name: baselines[name] for name in ("chars", "bm25", "random")}}
    figures = {}
    subsets = np.random.default_rng(0).random((_SUBSETS, len(matched))) < 0.5
    for name, matrix in methods.items():
        figures[f"{name}: rank correlation of sums over random halves"] = mean_figure(
            columns_correlation(subsets @ matrix, subsets @ exact).tolist()
        )
        figures[f"{name}: rank correlation over examples"] = mean_figure(columns_correlation(matrix, exact).tolist())
        figures[f"{name}: share of the {_BEST} best"] = mean_figure(_shared_best(matrix, exact))
    about = {
        "queries": len(queries),
        "examples_compared": len(matched),
        "examples_of_the_index_that_the_run_did_not_see": len(client.index) - len(matched),
        "examples_of_the_run_without_a_row": compared.without_row,
        "steps": compared.replayed.steps,
        "difference": round(compared.replayed.difference, 6),
        "mode": mode,
    }
    explained = "Compared with the derivatives of the queries' losses through the whole recorded training."
    return Report("replay", figures, about, explained)


class Compared(NamedTuple):
    """The examples of an index that a recorded run has.

    Attributes:
        rows: of these examples.
        without_row: number of the run's examples that the index lacks.
    """

    rows: list[int]
    without_row: int
    replayed: Replayed


def exact_scores(
    client: Client, run: str | Path, queries: Sequence[Query], mode: Mode, reporter: Reporter, **resources: Any
) -> tuple[Float[np.ndarray, "examples queries"], Float[np.ndarray, "examples queries"], Compared]:
    """Compute an index's scores, and exact influence by a replay, of the examples that both have.

    Raises:
        DataError, IncompatibleError: see `agreement`.
    """
    refuse_contrasts(queries)
    examples = client.query_examples(queries)
    rows = [client.index.example(row) for row in range(len(client.index))]
    recorded = read_training(Path(run).resolve())
    model_record = client.index.manifest.models[-1]
    trained_model = load_causal_lm(ModelSource(str(recorded.directory), dtype=model_record.dtype, device="cpu"))
    if model_fingerprint(trained_model) != model_record.fingerprint:
        raise IncompatibleError(
            f"{client.index.path} is not an index of the model that the recorded run {run} ended with; build it from {run}"
        )
    del trained_model
    pairs = match_rows(rows, recorded.examples)
    if len(pairs) * 2 < len(rows):
        raise DataError(
            f"only {len(pairs):,} of the index's {len(rows):,} examples are in the recorded run, with the same tokens and loss mask; build "
            "the index from what was trained on, with the same max_tokens and end-of-text token"
        )
    replayed = replay_examples(run, examples, reporter, **resources)
    matched_rows = [pair[0] for pair in pairs]
    numbers = [pair[1] for pair in pairs]
    shared = np.bincount(numbers, minlength=len(recorded.examples))[numbers]  # equal rows share an example's derivative
    exact = replayed.scores[:, numbers].T.astype(np.float64) / shared[:, None]
    scores = score_matrix(client.index, client.encode(queries), Metric(mode)).T[matched_rows].astype(np.float64)
    return scores, exact, Compared(matched_rows, len(recorded.examples) - len(set(numbers)), replayed)


def _shared_best(scores: Float[np.ndarray, "examples queries"], exact: Float[np.ndarray, "examples queries"]) -> list[float]:
    k = min(_BEST, len(scores))
    best, truly = (np.argsort(-matrix, axis=0, kind="stable")[:k] for matrix in (scores, exact))
    return [len(set(best[:, q]) & set(truly[:, q])) / k for q in range(scores.shape[1])]
