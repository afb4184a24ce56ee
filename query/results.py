"""Files that a command writes as its result: whom they tell of progress, and how they are complete or not there."""

import json
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ..store.errors import UsageError
from ..store.files import storage_errors


@runtime_checkable
class Reporter(Protocol):
    """Hears of the stages of long work (see ray_jobs/progress.py)."""

    def stage(self, name: str, examples: int | None) -> None:
        """A stage begins, over so many examples."""

    def update(self, examples: int, tokens: int) -> None:
        """The stage has worked through so many examples."""


def refuse_existing(out: Path) -> None:
    """Refuse the name of a result that exists.

    Raises:
        UsageError: it exists, or is not the name of a file.
    """
    if not out.name:
        raise UsageError(f"`out` {out} is a folder; give the name of a file")
    if out.exists() or out.is_symlink():
        raise UsageError(f"`out` {out} exists; choose another name, or remove it first")


@contextmanager
def complete_or_nothing(out: Path) -> Iterator[Path]:
    """Give a path for a file or directory, which is renamed to `out` at the end, and removed after an error.

    Raises:
        StorageError: it cannot be written.
    """
    staged = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        with storage_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            yield staged
            staged.rename(out)
    finally:
        if staged.is_dir():
            shutil.rmtree(staged)
        staged.unlink(missing_ok=True)


def write_lines(out: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records as JSON lines, complete or not at all.

    Raises:
        UsageError: the file exists.
        StorageError: it cannot be written.
    """
    refuse_existing(out)
    with complete_or_nothing(out) as staged, staged.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
