"""Builds from Python: models, tokenizers and data may be in memory."""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from .indexer.models import DTYPES, LoadedModel
from .ray_jobs.build import build as build_index
from .ray_jobs.config import BuildConfig
from .ray_jobs.progress import Reporter, Silent, default_reporter
from .store.errors import DataError, UsageError
from .store.files import sha256
from .store.index import Index

_NO_DOCUMENTS = "the data has no documents; give at least one"


def build(
    model: Any,
    data: Any,
    out: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    reporter: Reporter | None = None,
    progress: bool = True,
    **options: Any,
) -> Index:
    """Build an index, resume a build that was interrupted, or open a finished one.

    Args:
        model: a directory or hub id of a causal language model, or a model in memory; or a list of several: checkpoints in their order, or
            an ensemble. Of a model in memory, its train/eval mode, requires_grad and .grad are unchanged, its weights not copied.
        data: a file, folder or hub dataset, a list of these, a `datasets.Dataset`, or an iterable of dictionaries, such as
            `[{"text": "..."}]` or `[{"prompt": "...", "completion": "..."}]`.
        out: the index directory to make.
        tokenizer: of a model in memory.
        reporter: of progress, instead of the default one.
        progress: show progress on standard error or in the notebook.
        options: see `BuildConfig`.

    Returns:
        The index, to open with `connect` or to read.

    Raises:
        UsageError: an invalid option, or `out` contains something else.
        DataError: a document cannot be used.
        BusyError: another build is writing there.

    Examples:
        >>> index = build("gpt2", [{"text": "To be, or not to be."}], "my.wherefrom")  # doctest: +SKIP
        >>> connect(index).query(text="To be").proponents[0].text  # doctest: +SKIP
    """
    models = tuple(model) if isinstance(model, list | tuple) else (model,)
    is_name = [isinstance(item, str | os.PathLike) for item in models]
    loaded = [LoadedModel(item, tokenizer) for item, named in zip(models, is_name, strict=True) if not named]
    if any(is_name) and loaded:
        raise UsageError("models are either all in memory or all directories and hub ids; load the named models or save the loaded ones")
    if tokenizer is not None and not loaded:
        raise UsageError("a tokenizer belongs to a model in memory; a directory or hub id has its own")
    if loaded:
        options = {"dtype": _dtype(loaded[0]), **options}
    names = models if not loaded else _names(loaded)
    reports = default_reporter() if progress and reporter is None else nullcontext(reporter or Silent())
    with _sources(data) as (sources, data_sha256), reports as current:
        config = BuildConfig(model=names, data=sources, out=out, **options)
        build_index(config, current, loaded, data_sha256)
    return Index(config.out)


def _dtype(loaded: LoadedModel) -> str:
    dtype = next(loaded.model.parameters()).dtype
    return next((name for name, supported in DTYPES.items() if supported == dtype), "float32")


def _names(loaded: list[LoadedModel]) -> tuple[str, ...]:
    """Names of models in memory, different for each."""
    names = [model.id for model in loaded]
    return tuple(name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, 1))


@contextmanager
def _sources(data: Any) -> Iterator[tuple[Any, str | None]]:
    """Yield the corpus's sources and, for data in memory, the SHA-256 of the file it was written to."""
    items = list(data) if isinstance(data, list | tuple) else [data]
    if all(isinstance(item, str | os.PathLike) for item in items) and items:
        yield data, None
        return
    with tempfile.TemporaryDirectory(prefix="wherefrom-") as folder:
        path = _write(data, Path(folder))
        yield path, sha256(path)


def _write(data: Any, folder: Path) -> Path:
    """Write data in memory to a file."""
    if hasattr(data, "to_parquet"):  # a datasets.Dataset
        if not len(data):
            raise DataError(_NO_DOCUMENTS)
        path = folder / "data.parquet"
        data.to_parquet(str(path))
        return path
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise UsageError(f"data has the type {type(data).__name__}; give a path, a list of dictionaries, or a dataset")
    path = folder / "data.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number, record in enumerate(data, 1):
            if not isinstance(record, Mapping):
                raise DataError(f"item {number} of the data has the type {type(record).__name__}; give a dictionary of columns")
            try:
                file.write(json.dumps(dict(record), ensure_ascii=False) + "\n")
            except (TypeError, ValueError, UnicodeEncodeError) as error:
                raise DataError(f"item {number} of the data: {error}; columns hold text, numbers, truth values, lists or None") from error
    if not path.stat().st_size:
        raise DataError(_NO_DOCUMENTS)
    return path
