"""Files written whole or not at all, and the checksums that say so.

A data file is written under `staging/`, flushed to disk, and renamed to its name. A manifest is created, never replaced: the
temporary file is hard-linked to its name, which fails where the name exists, so that of two publishers exactly one
wins. A lock keeps two builds apart but is never what makes a commit atomic.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import BusyError, IntegrityError, StorageError, UsageError

FOLDERS = ("documents", "encoder", "manifests", "rows", "search", "staging")
_SMALL_BYTES = 1 << 24
_REFUSED = frozenset(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
)
PLAN = "plan.json"  # in staging/: which build or addition was begun


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals (disk full, read-only, permission) while working on `path` into a StorageError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"no space left on the disk of {path}; free some space and run the same command again: what is finished is kept"
            ) from error
        if error.errno in _REFUSED:
            raise StorageError(f"cannot write {path}: {os.strerror(error.errno)}; choose another place or fix this one") from error
        raise


def regular_size(path: Path) -> int | None:
    """A file's size in bytes; None where there is no regular file (nothing, a folder, a pipe, a device)."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def read_bytes(path: Path, most: int = _SMALL_BYTES) -> bytes:
    """The bytes of a file that must be a regular one of at most `most` bytes, so that a pipe never blocks and a device never ends.

    Raises:
        FileNotFoundError: there is nothing.
        IntegrityError: it is no regular file, or larger.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size > most:
            what = (
                f"has {found.st_size:,} bytes, more than the {most:,} it may have"
                if stat.S_ISREG(found.st_mode)
                else "is not a regular file"
            )
            raise IntegrityError(f"{path} {what}; restore the file or build the index again")
        return file.read(found.st_size)


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(staged: Path, final: Path) -> None:
    """Flush a staged file and rename it to `final`, in place of a file that lies there."""
    with storage_errors(final):
        sync(staged)
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged, final)
        sync_name(final.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file so that readers see the old bytes or the new ones, never a part."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            staged.write_bytes(data)
            sync(staged)
            os.replace(staged, path)
        finally:
            staged.unlink(missing_ok=True)
        sync_name(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """One of the build's own small JSON files.

    Raises:
        IntegrityError: it is not what was written.
    """
    try:
        content = json.loads(read_bytes(path))
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is damaged ({error}); remove the directory that is being built and build again") from error
    if not isinstance(content, dict) or not content:
        raise IntegrityError(f"{path} is damaged; remove the directory that is being built and build again")
    return content


def create_only(path: Path, data: bytes) -> None:
    """Write a file that must not exist yet.

    Raises:
        BusyError: the name is taken; somebody else published first.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            staged.write_bytes(data)
            sync(staged)
            os.link(staged, path)
        except FileExistsError as error:
            raise BusyError(f"{path} was published by somebody else meanwhile; run the command again") from error
        finally:
            staged.unlink(missing_ok=True)
        sync_name(path.parent)


def sync_name(directory: Path) -> None:
    """Flush the names in a directory, without which a rename may be lost with the power."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_links(directory: Path) -> None:
    """Refuse an index whose folders, or what lies in them, are links: a writer would follow them out of the index.

    Raises:
        UsageError: names the link.
    """
    for place in (directory / ".lock", *(directory / name for name in FOLDERS)):
        if place.is_symlink() or (place.name == ".lock" and place.exists() and regular_size(place) is None):
            raise UsageError(f"{place} is a link or no regular file, which a change of the index would follow; remove it")
        if place.name != ".lock" and place.exists() and not place.is_dir():
            raise UsageError(f"{place} is a file, where an index has a folder; remove it")
        if place.is_dir():
            with os.scandir(place) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        raise UsageError(f"{entry.path} is a link, which a change of the index would follow; remove it")
                    if entry.is_dir() and (entry.name == PLAN or place.name == "search"):
                        raise UsageError(f"{entry.path} is a folder, where an index has a file; remove it")


def clear_leftovers(directory: Path) -> None:
    """Remove what killed writers left half-written in `staging/`; all of it where no build or addition is begun there."""
    staging = directory / "staging"
    if not (staging / PLAN).exists():
        shutil.rmtree(staging, ignore_errors=True)
        return
    for leftover in staging.iterdir():
        if leftover.suffix in (".zip", ".arrow", ".safetensors") and leftover.is_file():
            leftover.unlink()


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold the directory's lock, by which one process at a time writes; the operating system drops it when that process dies.

    Raises:
        BusyError: another process holds it.
        UsageError: a folder of the index is a link.
    """
    from filelock import FileLock, Timeout

    with storage_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        refuse_links(directory)
        lock = FileLock(directory / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise BusyError(f"another build is writing into {directory}; wait for it, or choose another `out`") from error
    try:
        clear_leftovers(directory)
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty, or not there
            (directory / "staging").rmdir()
        lock.release()
