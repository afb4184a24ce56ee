"""Takedown of examples: they are deleted, the shards are written again without them, older states and caches are removed, and every byte of
the index is searched for what was theirs.

What was computed from many examples together stays: the encoder's statistics, and the weights of the model, which learned from them.
"""

import contextlib
import json
import mmap
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .documents import decompressed_batches
from .errors import BusyError, IncompatibleError, IntegrityError, UsageError
from .files import remove_tree
from .index import Index
from .manifest import manifest_numbers
from .objects import StorePath, local_or_store
from .update import compact as compact_index
from .update import delete, prune

_FAISS = "faiss"
_SHORTEST = 16  # bytes that are searched for in every file; shorter ones occur by chance
_SHORTEST_WORD = 3  # bytes of an id or text that is searched for as a word, in files of text
_PIECE = 4096  # bytes of a long content that are searched for at a time
_BINARY = (".zip", ".arrow", ".safetensors", ".faiss")


class _Needle(NamedTuple):
    """Bytes of an example: its id, and the name and bytes of a content, or of a piece of it."""

    id: str
    content: str
    value: bytes

    @property
    def is_word(self) -> bool:
        """True if it is too short for files of other than text."""
        return len(self.value) < _SHORTEST

    def occurs(self, data: mmap.mmap | bytes, is_text: bool) -> bool:
        """Return True if a file's bytes hold it."""
        if not self.is_word:
            return data.find(self.value) >= 0
        return is_text and re.search(rb"(?<![\w.-])%b(?![\w.-])" % re.escape(self.value), data) is not None


@dataclass(frozen=True)
class Found:
    """A content of an example that was taken down and still occurs.

    Attributes:
        id: of the example.
        content: its "id", "text", "metadata", "tokens", "image", "features" or a component's "code".
        file: relative to the index.
        others: ids of other examples that hold the same bytes; empty where nothing explains them.
    """

    id: str
    content: str
    file: str
    others: tuple[str, ...]


@dataclass(frozen=True)
class Takedown:
    """Report of a takedown.

    Attributes:
        ids: of the examples, or chunks, that were taken down.
        rows: that remain.
        files, bytes: that were searched.
        contents: number of byte strings that were searched for.
        short: number of those that are too short to be searched for but in files of text, or at all.
        found: those that still occur.
    """

    ids: tuple[str, ...]
    rows: int
    files: int
    bytes: int
    contents: int
    short: int
    found: tuple[Found, ...]

    @property
    def is_proven(self) -> bool:
        """True if nothing is left but what other examples hold, too."""
        return all(found.others for found in self.found)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, as `wherefrom takedown --json` prints it."""
        return {**asdict(self), "proven": self.is_proven}


def takedown(index: str | Path, ids: Iterable[str]) -> Takedown:
    """Take examples down, and search the index, and the queries that were saved beside it, for what is left of them.

    Args:
        index: its path.
        ids: of examples, or of documents with all their chunks.

    Raises:
        BusyError: another process changes the index.
        UsageError: an id is in no state of the index, every row would be deleted, or the index is in an object store, whose versions and
            logs a reader does not see.
    """
    out = index if isinstance(index, Path) else local_or_store(index)
    if isinstance(out, StorePath):
        raise UsageError(f"{out} is in an object store, which may keep versions that no search sees; take examples down in a local copy")
    wanted = list(dict.fromkeys(ids))
    if not wanted:
        raise UsageError("there are no ids; name the examples to take down")
    newest = Index(out)
    parts: list[_Needle] = []
    alive: list[str] = []
    try:
        for state in _states(out):
            rows, wanted = state.rows_of(wanted)
            removed = np.flatnonzero(rows).tolist()
            parts += [part for row in removed for part in _contents(state, row)]
            if state.manifest.number == newest.manifest.number:
                alive = [newest.example(row).id for row in removed if newest.alive[row]]
            if not wanted:
                break
    except IntegrityError as error:
        if Index(out).manifest.number == newest.manifest.number:
            raise
        raise BusyError(f"another command changed {out} meanwhile; run this one again") from error
    if wanted:
        example = min(wanted)[:100]
        raise UsageError(f"{len(wanted)} of the ids are not in {out}, such as {example!r}; nothing was taken down: fix the ids")
    needles = [needle for needle in parts if len(needle.value) >= _SHORTEST or _is_word(needle)]
    taken = tuple(dict.fromkeys(needle.id for needle in parts))
    if alive:
        delete(out, alive)
    compact_index(out)
    remove_tree(out / _FAISS)
    prune(out)
    remaining = Index(out)
    found = []
    beside = out.with_name(f"{out.name}.queries.jsonl")
    files = [path for path in [*sorted(out.rglob("*")), beside] if path.is_file() and not path.is_symlink()]
    for path in files:
        for needle in _occurring(path, needles):
            others = tuple(_holders(remaining, needle))
            found.append(Found(needle.id, needle.content, path.relative_to(path.parent if path == beside else out).as_posix(), others))
    size = sum(path.stat().st_size for path in files)
    short = sum(len(needle.value) < _SHORTEST for needle in parts)
    return Takedown(taken, len(remaining), len(files), size, len(needles), short, tuple(dict.fromkeys(found)))


def _states(out: Path) -> Iterator[Index]:
    """Yield the states of an index that are not pruned, the newest first: an interrupted takedown left its examples in an older one."""
    for number in reversed(manifest_numbers(out)):
        with contextlib.suppress(IncompatibleError, IntegrityError):
            yield Index(out, number)


def _is_word(needle: _Needle) -> bool:
    """Return True if a short content can be told from others in files of text: an id or text that is no number."""
    return needle.content in ("id", "text") and len(needle.value) >= _SHORTEST_WORD and not needle.value.isdigit()


def _contents(index: Index, row: int) -> list[_Needle]:
    """Return what an example holds, also one that was deleted; a long content in pieces."""
    number = int(np.searchsorted([shard.first for shard in index.shards], row, side="right")) - 1
    shard = index.shards[number]
    offset = row - shard.first
    example = index.documents(shard)[offset]
    contents = [
        *(("id", written) for written in _written(example.id)),
        *(("text", written) for written in _written(example.text)),
        *(("metadata", written) for value in example.metadata.values() if isinstance(value, str) for written in _written(value)),
        ("tokens", example.token_ids.astype("<i4").tobytes()),
        ("image", example.image or b""),
        ("features", b"" if example.features is None else example.features.astype("<f4").tobytes()),
    ]
    for component in index.manifest.components:
        codes = index.rows(shard, component).select(np.array([offset])).arrays["codes"]
        contents.append((f"code of {component.name}", np.ascontiguousarray(codes).tobytes()))
    return [_Needle(example.id, name, piece) for name, content in contents for piece in _pieces(content)]


def _pieces(content: bytes) -> list[bytes]:
    """Cut a content into pieces; the last one overlaps the one before."""
    if not content:
        return []
    starts = [*range(0, len(content) - _PIECE, _PIECE), max(0, len(content) - _PIECE)]
    return list(dict.fromkeys(content[start : start + _PIECE] for start in starts))


def _written(text: str) -> list[bytes]:
    """Return the bytes of a text as it is, and as JSON may write it."""
    quoted = (json.dumps(text, ensure_ascii=ascii)[1:-1] for ascii in (False, True))
    return list(dict.fromkeys(written.encode() for written in (text, *quoted)))


def _occurring(path: Path, needles: Sequence[_Needle]) -> Iterator[_Needle]:
    """Yield the contents that occur in a file. Arrow files are also searched as they are without compression."""
    if path.stat().st_size == 0:
        return
    is_text = path.suffix not in _BINARY
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        occurring = [needle.occurs(data, is_text) for needle in needles]
    for batch in decompressed_batches(path) if path.suffix == ".arrow" else ():
        occurring = [known or needle.occurs(batch, False) for known, needle in zip(occurring, needles, strict=True)]
    yield from compress(needles, occurring)


def _holders(index: Index, needle: _Needle) -> Iterator[str]:
    """Yield the ids of the remaining examples that hold the same bytes."""
    for row in np.flatnonzero(index.alive).tolist():
        if any(other.content == needle.content and needle.value in other.value for other in _contents(index, row)):
            yield index.example(row).id
