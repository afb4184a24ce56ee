"""Deletion of an index's examples, and removal of their storage; neither needs the models.

Every change publishes a new manifest and keeps the files of the previous one, so an open index stays a snapshot of its manifest. `prune`
removes files that the newest manifest does not name.
"""

import re
import warnings
from collections.abc import Iterable
from hashlib import sha256 as digest
from pathlib import Path

import numpy as np

from .errors import UsageError
from .files import discard_inputs
from .index import changing, write_search_caches
from .manifest import Slope, manifest_path
from .shard import derived_id, has_id, publish_index

_PATTERNS = ("rows/*.zarr.zip", "documents/*.arrow", "encoder/*.safetensors", "manifests/*.json", "manifests/*.zarr.zip")


def delete(out: Path, ids: Iterable[str] = (), where: str | None = None) -> int:
    """Delete examples, so that they are in no answer.

    Args:
        ids: of examples, or of documents with all their chunks.
        where: a filter of the examples to delete (see store/filters.py).

    Returns:
        The number of rows that were deleted; rows that were deleted before are not counted.

    Raises:
        UsageError: an id is not in the index, or every row would be deleted.
    """
    with changing(out) as index:
        manifest = index.manifest
        matches = index.known_rows(ids, "nothing was deleted: fix the ids")
        if where is not None:
            matches |= index.matching(where)
        deleted = matches & index.alive
        remaining = index.alive & ~matches
        if not remaining.any():
            raise UsageError(f"that would delete every example of {out}; remove the directory instead")
        if deleted.any():
            publish_index(out, index.shards, np.flatnonzero(~remaining), {**dict(manifest), "number": manifest.number + 1})
    return int(deleted.sum())


def record_slope(out: Path, slope: Slope) -> None:
    """Record the measured slope of an index's scores, in place of an earlier one."""
    with changing(out) as index:
        manifest = index.manifest
        publish_index(out, index.shards, index.deleted, {**dict(manifest), "number": manifest.number + 1, "slope": slope})


def compact(out: Path) -> int:
    """Rewrite the shards with deleted rows, without these; the rows after them get lower numbers. See `prune` for the old files.

    Returns:
        The number of rows that were removed.
    """
    with changing(out) as index:
        manifest = index.manifest
        shards = []
        for shard in index.shards:
            remaining = np.flatnonzero(index.alive[shard.first : shard.first + shard.rows])
            if len(remaining) == shard.rows:
                shards.append(shard)
            elif len(remaining):
                new_id = derived_id(f"{shard.id}:{digest(remaining.tobytes()).hexdigest()}", 0)
                shards.append(index.reader(shard).select(remaining, new_id))
        dropped = manifest.rows - sum(shard.rows for shard in shards)
        if not shards:
            raise UsageError(f"every example of {out} was deleted; remove the directory instead")
        if dropped:
            publish_index(out, shards, np.zeros(0, np.int64), {**dict(manifest), "number": manifest.number + 1})
        _refresh(out)
    return dropped


def prune(out: Path) -> int:
    """Remove older manifests, and files that the newest manifest does not name. Open indexes of older manifests become unusable.

    Returns:
        The number of bytes that were removed.
    """
    with changing(out) as index:
        manifest = index.manifest
        named = {out / manifest.encoder.path, out / manifest.table.path, manifest_path(out, manifest.number)}
        for shard in index.shards:
            named |= {out / record.path for record in shard.files()}
        freed = 0
        for path in sorted(path for pattern in _PATTERNS for path in out.glob(pattern)):
            if path not in named and _is_index_file(path):
                freed += path.stat().st_size
                path.unlink()
        _refresh(out)
    return freed


def _refresh(out: Path) -> None:
    """Remove the record of an interrupted build or addition, and write the missing search caches."""
    discard_inputs(out)
    problem = write_search_caches(out)
    if problem is not None:
        warnings.warn(problem, stacklevel=3)


def _is_index_file(path: Path) -> bool:
    """Return True for a regular file whose name is that of a file of an index."""
    has_name = has_id(path) or re.fullmatch(r"[0-9]{6,18}\.json", path.name) is not None
    return has_name and not path.is_symlink() and path.is_file()
