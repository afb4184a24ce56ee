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
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import BusyError, IntegrityError, StorageError


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
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EIO):
            raise StorageError(f"cannot write {path}: {os.strerror(error.errno)}; choose another place or mend this one") from error
        raise


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or a directory and everything below it, to disk."""
    if path.is_dir():
        for child in path.iterdir():
            sync(child)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(staged: Path, final: Path) -> None:
    """Flush a staged file or directory and rename it to `final`.

    Publishing what is already there (a shard that two workers made, byte for byte the same) keeps the first.
    """
    with storage_errors(final):
        sync(staged)
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(staged, final)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            shutil.rmtree(staged)
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
        content = json.loads(path.read_bytes())
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


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold the directory's build lock; the operating system drops it when the process dies, however it dies.

    Raises:
        BusyError: another process holds it.
    """
    from filelock import FileLock, Timeout

    with storage_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise BusyError(f"another build is writing into {directory}; wait for it, or choose another --out") from error
    try:
        yield
    finally:
        lock.release()
