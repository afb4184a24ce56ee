"""Takedown of examples: they are deleted, the shards are written again without them, older states and caches are removed, and every byte of
the index is searched for what was theirs.

What was computed from many examples together stays: the encoder's statistics, and the weights of the model, which learned from them.
"""

import json
import mmap
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from .documents import decompressed_batches
from .errors import UsageError
from .files import remove_tree
from .index import Index
from .objects import StorePath
from .update import compact as compact_index
from .update import delete, prune

_FAISS = "faiss"
_SHORTEST = 16  # bytes that are searched for; shorter ones occur by chance
_PART = 4096  # bytes at each end of a long content


@dataclass(frozen=True)
class Found:
    """A content of an example that was taken down and still occurs.

    Attributes:
        id: of the example.
        content: its "id", "text", "tokens", "image", "features" or a component's "code".
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
        found: those that still occur.
    """

    ids: tuple[str, ...]
    rows: int
    files: int
    bytes: int
    contents: int
    found: tuple[Found, ...]

    @property
    def is_proven(self) -> bool:
        """True if nothing is left but what other examples hold, too."""
        return all(found.others for found in self.found)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, as `wherefrom takedown --json` prints it."""
        return {**asdict(self), "proven": self.is_proven}


def takedown(out: Path, ids: Iterable[str]) -> Takedown:
    """Take examples down, and search the index for what is left of them.

    Args:
        ids: of examples, or of documents with all their chunks.

    Raises:
        UsageError: an id is not in the index, every row would be deleted, or the index is in an object store, whose versions and logs a
            reader does not see.
    """
    if isinstance(out, StorePath):
        raise UsageError(f"{out} is in an object store, which may keep versions that no search sees; take examples down in a local copy")
    index = Index(out)
    rows, unknown = index.rows_of(list(ids))
    if unknown:
        raise UsageError(f"{len(unknown)} of the ids are not in {out}, such as {min(unknown)!r}; nothing was taken down: fix the ids")
    removed = np.flatnonzero(rows).tolist()
    if not removed:
        raise UsageError("there are no ids; name the examples to take down")
    deleted = set(index.deleted.tolist())
    contents = [content for row in removed if row not in deleted for content in _contents(index, row)]
    taken = tuple(dict.fromkeys(id for id, _, _ in contents))
    delete(out, taken)
    compact_index(out)
    remove_tree(out / _FAISS)
    prune(out)
    remaining = Index(out)
    found = []
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and not path.is_symlink()]
    for path in files:
        for id, name, needle in _occurring(path, contents):
            others = tuple(_holders(remaining, name, needle))
            found.append(Found(id, name, path.relative_to(out).as_posix(), others))
    size = sum(path.stat().st_size for path in files)
    return Takedown(taken, len(remaining), len(files), size, len(contents), tuple(found))


def _contents(index: Index, row: int) -> list[tuple[str, str, bytes]]:
    """Return the id of an example, and the names and bytes of what it holds; of a long content, both ends."""
    example = index.example(row)
    shard, offset = index.locate(row)
    contents = [
        *(("id", written) for written in _written(example.id)),
        *(("text", written) for written in _written(example.text)),
        ("tokens", example.token_ids.astype("<i4").tobytes()),
        ("image", example.image or b""),
        ("features", b"" if example.features is None else example.features.astype("<f4").tobytes()),
    ]
    for component in index.manifest.components:
        codes = index.rows(shard, component).select(np.array([offset])).arrays["codes"]
        contents.append((f"code of {component.name}", np.ascontiguousarray(codes).tobytes()))
    parts = [(name, part) for name, content in contents for part in dict.fromkeys((content[:_PART], content[-_PART:]))]
    return [(example.id, name, part) for name, part in parts if len(part) >= _SHORTEST]


def _written(text: str) -> list[bytes]:
    """Return the bytes of a text as it is, and as JSON may write it."""
    quoted = (json.dumps(text, ensure_ascii=ascii)[1:-1] for ascii in (False, True))
    return list(dict.fromkeys(written.encode() for written in (text, *quoted)))


def _occurring(path: Path, contents: list[tuple[str, str, bytes]]) -> Iterator[tuple[str, str, bytes]]:
    """Yield the contents that occur in a file."""
    if path.stat().st_size == 0:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        occurring = [data.find(needle) >= 0 for _, _, needle in contents]
    if path.parent.name == "documents":  # in an index from an object store, its batches are compressed
        for batch in decompressed_batches(path):
            occurring = [known or needle in batch for known, (_, _, needle) in zip(occurring, contents, strict=True)]
    yield from compress(contents, occurring)


def _holders(index: Index, name: str, needle: bytes) -> Iterator[str]:
    """Yield the ids of the remaining examples that hold the same bytes."""
    for row in np.flatnonzero(index.alive).tolist():
        for _, other_name, content in _contents(index, row):
            if other_name == name and needle in content:
                yield index.example(row).id
                break
