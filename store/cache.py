"""Search caches: arrays for the search of a group of shards, which are computed from the rows and can be computed again.

`search/<group>.zarr.zip` has a group of arrays for each component (see postings.py, scan_codes.py), and

    columns    for each shard, by its number in the group, the columns for filters and groups (an Arrow IPC stream, see documents.py)
    scales     of all rows of the group, the losses and the lengths in each component, so that no shard is opened for these

No manifest lists these files. A file that is missing, cannot be read, or was computed from other rows is ignored; a posting list that fails
its checksum is an error.
"""

import uuid
from collections.abc import Mapping
from pathlib import Path

from .arrays import ArrayFile, ArrayGroup, write_arrays
from .errors import IntegrityError
from .files import publish

_REMAKE = "run wherefrom reindex"
_VERSION = 5  # of the arrays; a search cache of another version is ignored


def write_cache(path: Path, source: str, groups: Mapping[str, ArrayGroup], staging: Path) -> None:
    """Write a search cache, replacing an existing one.

    Args:
        source: the identity of the shards that it was computed from (see `Group.source`).
        staging: the folder in which it is written before it is moved to `path`.
    """
    staged = staging / f"{uuid.uuid4().hex}.zarr.zip"
    about = ArrayGroup({}, {"wherefrom": {"version": _VERSION, "source": source}})
    write_arrays(staged, {"": about, **groups})
    publish(staged, path)


def read_cache(path: Path, source: str) -> ArrayFile | None:
    """Open a search cache; None if it cannot be read, or has another source or version."""
    try:
        file = ArrayFile(path, remedy=_REMAKE)
        about = file.attributes().get("wherefrom")
    except IntegrityError:
        return None
    return file if about == {"version": _VERSION, "source": source} else None
