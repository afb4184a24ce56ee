"""Search caches: arrays that searches read beside the rows of a group of shards, made from these and again where they are missing.

`search/<group>.zarr.zip` holds a group of arrays for each component (see postings.py, scan_codes.py), and `columns`: of each shard, by its
number in the group, the columns that filters and groups read (an Arrow IPC stream, see documents.py). No manifest names these files. One
that is missing, cannot be read, or was made of other rows counts as not there; a posting list that fails its checksum is an error.
"""

import uuid
from collections.abc import Mapping
from pathlib import Path

from .arrays import ArrayFile, ArrayGroup, write_arrays
from .errors import IntegrityError
from .files import publish

_REMAKE = "make it anew with wherefrom reindex"
_VERSION = 4  # of how arrays are made: those of another are made anew


def write_cache(path: Path, source: str, groups: Mapping[str, ArrayGroup], staging: Path) -> None:
    """Write a search cache in place of what lies there.

    Args:
        source: names what it was made of.
        staging: where it is written before it is moved into place.
    """
    staged = staging / f"{uuid.uuid4().hex}.zarr.zip"
    about = ArrayGroup({}, {"wherefrom": {"version": _VERSION, "source": source}})
    write_arrays(staged, {"": about, **groups})
    publish(staged, path)


def read_cache(path: Path, source: str) -> ArrayFile | None:
    """The search cache that lies there; None where it cannot be read, or is of another source or version."""
    try:
        file = ArrayFile(path, remedy=_REMAKE)
        about = file.attributes().get("wherefrom")
    except IntegrityError:
        return None
    return file if about == {"version": _VERSION, "source": source} else None
