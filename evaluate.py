"""Evaluation from Python: does an index predict what retraining does? docs/evaluation.md describes the checks."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .evaluation.agreement import agreement as replay
from .evaluation.checks import brittleness, labels, recall, tailpatch
from .evaluation.judge import Judgement, judge_index, judge_scores
from .evaluation.packs import Half
from .evaluation.retrain import PackConfig, make_pack
from .evaluation.slope import slope
from .query.options import ScoreOptions
from .ray_jobs.progress import default_reporter
from .store.errors import UsageError
from .store.index import Index

__all__ = ["brittleness", "labels", "lds", "pack", "recall", "replay", "slope", "tailpatch"]


def lds(
    pack: str | Path,
    index: str | Path | Index | None = None,
    *,
    scores: str | Path | None = None,
    data: str | Path | None = None,
    half: Half = "all",
    scoring: ScoreOptions | None = None,
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
        scoring: options of the index's scores, such as {"mode": "cosine"}; those of its preset where they are not given.
        baselines: judge these, too.
        options: of the build (see `BuildConfig`), or `model` and `device` for `scores`.

    Raises:
        NotFoundError: there is no such pack.
        IntegrityError: the pack is damaged.
        UsageError: the extra `evaluation` is not installed, or an option means nothing here.
    """
    place = None if data is None else Path(data)
    if scores is not None:
        if scoring or index is not None:
            raise UsageError("`scoring` and `index` mean nothing beside `scores`, for which no index is asked; leave them out")
        return judge_scores(Path(pack), Path(scores), data=place, half=half, **options)
    path = index.path if isinstance(index, Index) else index
    with default_reporter() as reporter:
        return judge_index(Path(pack), options, index=path, data=place, half=half, scoring=scoring, baselines=baselines, reporter=reporter)


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
