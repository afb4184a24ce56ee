"""What searches read beside the rows: sets of arrays that can be made anew from them, each marked with what it was made of.

No manifest names these files, and none is trusted: one that is missing, damaged, or made of other rows reads as not there.
"""

import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .errors import IncompatibleError, IntegrityError
from .files import publish, read_bytes
from .rows import map_array, write_array, write_shard

_GROUP = "arrays"
_VERSION = 2  # of how arrays are made: those of another are made anew


def write_cache(directory: Path, arrays: Mapping[str, np.ndarray], source: str, staging: Path) -> None:
    """Put arrays into a directory, in place of what lies there.

    Args:
        source: what they were made of.
        staging: where they are written before they are moved into place.
    """

    def write(group: object) -> None:
        for name, array in arrays.items():
            write_array(group, name, array)

    staged = staging / f"{uuid.uuid4().hex}.zarr"
    kinds = {name: [list(array.shape), array.dtype.name] for name, array in arrays.items()}
    write_shard(staged, {_GROUP: write}, {"version": _VERSION, "source": source, "arrays": kinds})
    shutil.rmtree(directory, ignore_errors=True)
    publish(staged, directory)


def read_cache(directory: Path, source: str) -> dict[str, np.ndarray] | None:
    """The arrays that lie there, as memory maps whose checksums were compared; None where they are not whole, or not of this source."""
    try:
        about = json.loads(read_bytes(directory / "zarr.json"))["attributes"]["wherefrom"]
        if about["source"] != source or about["version"] != _VERSION:
            return None
        arrays = {name: plain(map_array(directory / _GROUP, name, tuple(shape), dtype)) for name, (shape, dtype) in about["arrays"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, IntegrityError, IncompatibleError):
        return None
    return arrays


def plain(array: np.ndarray) -> np.ndarray:
    """An array as the compiled loops know it: no subclass, not to be written."""
    bare = np.asarray(array).view(np.ndarray)
    bare.flags.writeable = False
    return bare
