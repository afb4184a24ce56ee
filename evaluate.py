"""Evaluation from Python: does an index predict what retraining does? docs/evaluation.md describes the checks."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .client import Client
from .evaluation import checks
from .evaluation.checks import Optimizer, Report
from .evaluation.judge import Judgement, judge_index, judge_scores
from .evaluation.packs import Half
from .evaluation.retrain import PackConfig, make_pack
from .query.options import Mode, Query
from .ray_jobs.progress import default_reporter
from .store.index import Index

__all__ = ["brittleness", "labels", "lds", "pack", "recall", "tailpatch"]


def lds(
    pack: str | Path,
    index: str | Path | Index | None = None,
    *,
    scores: str | Path | None = None,
    data: str | Path | None = None,
    half: Half = "all",
    mode: Mode = "influence",
    baselines: bool = True,
    **options: Any,
) -> Judgement:
    """Compute the linear datamodeling score on a ground-truth pack: the rank correlation of summed scores with retrained losses.

    Args:
        pack: its directory.
        index: of the pack's training documents; by default one is built in a temporary directory.
        scores: a file with a matrix [examples, queries] to judge instead of an index.
        data: directory of an image pack's IDX files.
        half: the queries to use: "all", "even" or "odd".
        mode: of the scores.
        baselines: judge these, too.
        options: of the build (see `BuildConfig`), or `model` and `device` for `scores`.

    Raises:
        NotFoundError: there is no such pack.
        IntegrityError: the pack is damaged.
        UsageError: the extra `evaluation` is not installed.
    """
    place = None if data is None else Path(data)
    if scores is not None:
        return judge_scores(Path(pack), Path(scores), data=place, half=half, **options)
    path = None if index is None else _directory(index)
    with default_reporter() as reporter:
        return judge_index(Path(pack), options, index=path, data=place, half=half, mode=mode, baselines=baselines, reporter=reporter)


def tailpatch(
    index: str | Path | Index | Client,
    queries: Sequence[Query],
    *,
    k: int = 10,
    mode: Mode = "influence",
    optimizer: Optimizer = "sgd",
    rate: float = 1e-2,
) -> Report:
    """Take one optimizer step on each of the top proponents, and measure the fall of the query's loss (see `checks.tailpatch`).

    Args:
        index: or a client of one.
        queries: to check.
        k: proponents of each query, and random examples.
        mode: of the scores.
        optimizer: "sgd" or "adam".
        rate: the step's learning rate.
    """
    client = index if isinstance(index, Client) else Client(index)
    with default_reporter() as reporter:
        return checks.tailpatch(client, queries, k=k, mode=mode, optimizer=optimizer, rate=rate, reporter=reporter)


def brittleness(index: str | Path | Index, queries: Sequence[Query], train: str, base: str | Path, **options: Any) -> Report:
    """Retrain without the top proponents, and measure the rise of the query's loss (see `checks.brittleness`).

    Args:
        index: or its directory.
        queries: to check.
        train: your training function, `module:function`.
        base: the model that training starts from.
        options: k, draws, mode, model, device, workers, threads, address.
    """
    with default_reporter() as reporter:
        return checks.brittleness(_directory(index), queries, train, os.fspath(base), reporter=reporter, **options)


def labels(index: str | Path | Index, column: str) -> Report:
    """Compute the AUC of self-influence for examples whose metadata column is true (see `checks.labels`).

    Args:
        index: or its directory.
        column: true where an example's label is known to be wrong.
    """
    return checks.labels(_directory(index), column)


def recall(
    index: str | Path | Index,
    reference: str | Path | Index,
    queries: Sequence[Query] | None = None,
    *,
    k: int = 10,
    mode: Mode = "influence",
) -> Report:
    """Compute the share of a reference index's top k that another index of the same corpus finds (see `checks.recall`).

    Args:
        index: or its directory.
        reference: of the same examples; its scores are the truth.
        queries: by default a sample of the index's rows.
        k: best rows to find.
        mode: of the scores.
    """
    return checks.recall(_directory(index), _directory(reference), queries, k=k, mode=mode)


def pack(
    train: str, model: str | Path, data: str | Path | Sequence[str | Path], queries: str | Path, out: str | Path, **options: Any
) -> Path:
    """Make ground truth: retrain a model on random subsets of its corpus and measure the queries' losses (see `PackConfig`).

    Args:
        train: your training function, `module:function`.
        model: directory or hub id.
        data: training documents.
        queries: documents whose losses are measured.
        out: directory to make.
        options: subsets, fraction, seeds, max_tokens and others of `PackConfig`.
    """
    sources = tuple(map(str, (data,) if isinstance(data, str | Path) else data))
    config = PackConfig(train=train, model=os.fspath(model), data=sources, queries=os.fspath(queries), out=os.fspath(out), **options)
    with default_reporter() as reporter:
        return make_pack(config, reporter)


def _directory(index: str | Path | Index) -> str:
    return str(index.path if isinstance(index, Index) else index)
