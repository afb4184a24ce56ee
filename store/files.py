"""Atomic writes, checked reads, checksums and the lock of an index directory.

A data file is written under `staging/`, flushed to disk, and renamed. A manifest is created and never replaced: the temporary file is
hard-linked to its name, which fails if the name exists, so that exactly one of two concurrent publishers succeeds. A lock keeps two builds
apart, but commits are atomic without it.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BusyError, IntegrityError, StorageError, UsageError
from .objects import STAGING, StorePath

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

FOLDERS = ("documents", "encoder", "faiss", "manifests", "rerank", "rows", "search", STAGING)
_SMALL_BYTES = 1 << 24
_REFUSED = frozenset(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
)
INPUTS = "inputs.json"  # in the staging folder: the inputs of the build or addition in progress


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Raise a StorageError for an operating system's error about `path`: disk full, read-only, no permission."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"no space left on the disk of {path}; free some space and run the same command again, which continues"
            ) from error
        if error.errno in _REFUSED:
            raise StorageError(f"cannot write {path}: {os.strerror(error.errno)}; choose another place or fix this one") from error
        raise


def write_tensors(path: Path, arrays: "Mapping[str, np.ndarray]") -> None:
    """Write arrays as a safetensors file, in the order of their names.

    Raises:
        StorageError: the file cannot be written, such as for want of space.
    """
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file({name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}, path)
        except SafetensorError as error:  # holds an error of the operating system in words
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def regular_size(path: Path) -> int | None:
    """Return a file's size in bytes; None if it is missing or not a regular file (a folder, a pipe, a device)."""
    try:
        status = path.stat() if isinstance(path, StorePath) else os.stat(path)
    except StorageError:
        raise
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def size_problem(path: Path, size: int) -> str | None:
    """Return a sentence about a file that is missing or has another size than recorded; None if it has that size."""
    actual = regular_size(path)
    if actual is None:
        return f"{path} is missing"
    return None if actual == size else f"{path} has {actual:,} bytes where {size:,} belong (truncated?)"


def read_bytes(path: Path, most: int = _SMALL_BYTES) -> bytes:
    """Read a regular file of at most `most` bytes; pipes and devices, which may block or never end, are refused.

    Raises:
        FileNotFoundError: there is no such file.
        IntegrityError: it is not a regular file, or it is larger.
    """
    if isinstance(path, StorePath) and path.scratch is None:
        mirror, key = path.place
        size = path.stat().st_size
        if size > most:
            raise IntegrityError(f"{path} has {size:,} bytes, more than {most:,}; restore the file or build the index again")
        return mirror.get(key)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise IntegrityError(f"{path} is not a regular file; restore the file or build the index again")
        if status.st_size > most:
            raise IntegrityError(f"{path} has {status.st_size:,} bytes, more than {most:,}; restore the file or build the index again")
        return file.read(status.st_size)


def memory_map(path: Path) -> "pa.Buffer":
    """Map a file that is not empty into memory; its bytes are read when they are first used, in a store after `read_ahead` of them.

    Arrow's map remains without an open file, where numpy's keeps a descriptor open for each of an index's thousands of files.

    Raises:
        OSError: the file cannot be read.
    """
    import pyarrow as pa

    with pa.memory_map(path.map() if isinstance(path, StorePath) else str(path)) as file:
        first = file.read_buffer(1)  # Arrow tells the system to read all bytes that it is asked for
        return pa.foreign_buffer(first.address, file.size(), first)


def read_ahead(path: Path, ranges: Iterable[tuple[int, int]]) -> None:
    """Tell the system to read ranges of a mapped file, so that it does not read everything around each page that is used.

    Ranges of an object in a store are fetched, and have to be before they are used.

    Args:
        ranges: first byte and number of bytes of each.
    """
    if isinstance(path, StorePath):
        path.fetch(ranges)
        return
    if not hasattr(os, "posix_fadvise"):
        return
    with contextlib.suppress(OSError):  # the bytes are then read when they are used
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            for first, size in ranges:
                if size:  # 0 would mean the rest of the file
                    os.posix_fadvise(descriptor, first, size, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or the names in a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(staged: Path, final: Path) -> None:
    """Flush a staged file and rename it to `final`, or put it into the store, replacing an existing file."""
    if isinstance(final, StorePath):
        final.publish(staged)
        return
    with storage_errors(final):
        sync(staged)
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged, final)
        sync(final.parent)


@contextlib.contextmanager
def _temporary(path: Path, data: bytes) -> Iterator[Path]:
    """Write a temporary file next to `path`, flush it to disk, and remove it if it still exists at the end."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            staged.write_bytes(data)
            sync(staged)
            yield staged
        finally:
            staged.unlink(missing_ok=True)
        sync(path.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file atomically: readers see the old bytes or the new ones."""
    if isinstance(path, StorePath):
        mirror, key = path.place
        mirror.put(key, data)
        return
    with _temporary(path, data) as staged:
        os.replace(staged, path)


def read_json(path: Path) -> dict[str, Any]:
    """Read one of the small JSON files of a build in progress.

    Raises:
        IntegrityError: it is damaged.
    """
    try:
        content = json.loads(read_bytes(path))
        if not isinstance(content, dict) or not content:
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is damaged ({error}); remove the unfinished index and build again") from error
    return content


def create_only(path: Path, data: bytes) -> None:
    """Write a file that must not exist yet.

    Raises:
        BusyError: the file exists, since another process published first.
    """
    if isinstance(path, StorePath):
        mirror, key = path.place
        mirror.create(key, data)
        return
    with _temporary(path, data) as staged:
        try:
            os.link(staged, path)
        except FileExistsError as error:
            raise BusyError(f"{path} was published by somebody else meanwhile; run the command again") from error


def refuse_links(directory: Path) -> None:
    """Refuse an index with links as folders or in its folders, which a writer would follow out of the index.

    Raises:
        UsageError: there is a link, or a folder or file in place of the other.
    """
    for place in (directory / name for name in FOLDERS):
        if place.is_symlink():
            raise UsageError(f"{place} is a link, and changing the index could write outside it; remove it")
        if place.exists() and not place.is_dir():
            raise UsageError(f"{place} is a file, but an index has a folder of that name; remove it")
        if place.is_dir():
            with os.scandir(place) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        raise UsageError(f"{entry.path} is a link, and changing the index could write outside it; remove it")
                    if entry.is_dir() and (entry.name == INPUTS or place.name == "search"):
                        raise UsageError(f"{entry.path} is a folder, but an index has a file of that name; remove it")


def remove_tree(folder: Path) -> None:
    """Remove a folder and all that is in it, if it exists."""
    if isinstance(folder, StorePath):
        folder.remove_tree()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def staging_folder(directory: Path) -> Path:
    """Return the folder of an index directory in which files are written before they are published."""
    return directory / STAGING


def discard_inputs(directory: Path) -> None:
    """Remove the record of an interrupted build or addition, so that it is not resumed."""
    (staging_folder(directory) / INPUTS).unlink(missing_ok=True)


def clear_leftovers(directory: Path) -> None:
    """Remove unfinished files of killed writers from `staging/`; all of `staging/` if no build or addition is in progress there."""
    staging = staging_folder(directory)
    if not (staging / INPUTS).exists():
        remove_tree(staging)
        return
    local = Path(os.fspath(staging))  # in a store, unfinished files are local
    for leftover in local.iterdir() if local.is_dir() else ():
        if leftover.suffix in (".zip", ".arrow", ".safetensors") and leftover.is_file():
            leftover.unlink()


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold the lock of an index directory, so that one process writes at a time; the operating system releases it when that process dies.

    Raises:
        BusyError: another process holds it.
        UsageError: a folder of the index is a link.
    """
    if isinstance(directory, StorePath):
        mirror, _ = directory.place
        with mirror.lease():
            clear_leftovers(directory)
            yield
        return
    from filelock import FileLock, Timeout

    with storage_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / ".lock"
        if path.is_symlink() or (path.exists() and regular_size(path) is None):
            raise UsageError(f"{path} is a link or not a regular file, and changing the index could write outside it; remove it")
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise BusyError(f"another build is writing into {directory}; wait for it, or choose another `out`") from error
    try:
        with storage_errors(directory):
            refuse_links(directory)
        clear_leftovers(directory)
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty, or missing
            staging_folder(directory).rmdir()
        lock.release()
