"""Indexes and corpora in object stores (s3://, gs://, az://, ...): paths whose bytes are fetched when they are read.

A `StorePath` is a path in the mirror of a prefix of a store: a local folder with a sparse file for each object that was read, of which the
blocks that were fetched are known. Readers map that file into memory and say which bytes they are about to read (`files.read_ahead`); these
are fetched before, and nothing else is. All that is read is compared with checksums, so that a block which nobody asked for, and which is
therefore zeros, cannot be taken for data. The size of all mirrors together is bounded.

What is written is written locally, and put into the store as a whole when it is published. A manifest is put on the condition that none of
its name exists. Objects in `staging/` are records of a build in progress; local files there are not objects yet.

    WHEREFROM_CACHE         folder of the mirrors; by default ~/.cache/wherefrom/objects
    WHEREFROM_CACHE_BYTES   their size together, 20 GB by default; the files that were used longest ago are removed

`file:///mnt/share/my.wherefrom` reads a slow network disk in this way, too. Stores are opened by obstore, with the environment variables of
the store's own tools (AWS_..., GOOGLE_..., AZURE_...).
"""

import contextlib
import hashlib
import io
import json
import os
import re
import resource
import shutil
import stat
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeVar

from .errors import BusyError, IntegrityError, StorageError, UsageError, first_line
from .extras import require

if TYPE_CHECKING:
    import numpy as np

SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl")
_URL = re.compile(rf"({'|'.join(SCHEMES)})://[^/]+(/|$)|file:///[^/]")
_BLOCK = 1 << 12
_GAP = 1 << 13  # bytes between two ranges that are fetched rather than asked for apart
_PIECE = 8 << 20  # of a range that is fetched in several requests
_KNOWN_SECONDS = 0.2  # for which a list of objects is known, where objects come and go
_CACHE_BYTES = 20_000_000_000
_OPEN = 8192  # local files of a mirror that stay open
_EVICT_EVERY = 256 << 20  # fetched bytes between two looks at the size of the mirrors
_LEASE_SECONDS = 30.0  # without a renewal, after which a lock is left over
_RENEW_SECONDS = 8.0
_LOCK = ".lock"
_OBJECTS = "objects"  # folder of a mirror for the files of objects; files that are not published yet lie beside it
_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT", "GOOGLE_SERVICE_ACCOUNT_KEY")
"""Variables that name the server of a store; one that speaks HTTP without TLS is used as it is told."""
STAGING = "staging"  # folder of unfinished files and of the records of a build in progress
_PASSING = ("manifests", STAGING)  # folders in which objects come and go
_MOST_RETRIES = 8  # of a request, by obstore
_ATTEMPTS = 3  # to get an answer as a whole
_FIRST_PAUSE = 0.2  # seconds; each later one is twice as long
Result = TypeVar("Result")
_TIMEOUT = timedelta(seconds=30)
_RETRY_TIMEOUT = timedelta(seconds=40)


class Entry(NamedTuple):
    """An object: its size in bytes, the tag of its content, and when it was written (nanoseconds)."""

    size: int
    tag: str
    modified: int


@dataclass
class Traffic:
    """Requests and bytes of a process, for reports."""

    requests: int = 0
    fetched: int = 0
    put: int = 0


TRAFFIC = Traffic()


@dataclass
class _Local:
    """The local file of an object, and which of its blocks were fetched.

    The file stays open, so that a map of it sees what is fetched later, also if another process removes the name to gain room.
    """

    path: str
    entry: Entry
    blocks: "np.ndarray"
    descriptor: int
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def open_path(self) -> str:
        """A path of the open file."""
        return f"/proc/self/fd/{self.descriptor}"

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.descriptor)


def is_url(text: object) -> bool:
    """Return True for the address of an object store."""
    return isinstance(text, str) and _URL.match(text) is not None


def local_or_store(path: str | Path) -> Path:
    """Return the path of a directory or file, in an object store if it is the address of one.

    Raises:
        UsageError: obstore is not installed, or does not know the address.
    """
    text = path if isinstance(path, str) else None
    return _mirror(text.rstrip("/")).path if text is not None and is_url(text) else Path(path)


def cache_folder() -> Path:
    """Return the folder of the mirrors."""
    given = os.environ.get("WHEREFROM_CACHE")
    return Path(given) if given else Path.home() / ".cache/wherefrom/objects"


_MIRRORS: dict[str, "Mirror"] = {}
_MIRRORS_LOCK = threading.Lock()


def _mirror(url: str) -> "Mirror":
    """Return the mirror of a prefix of a store."""
    root = cache_folder() / hashlib.sha256(url.encode()).hexdigest()[:24]
    with _MIRRORS_LOCK:
        if str(root) not in _MIRRORS:
            _MIRRORS[str(root)] = Mirror(url, root)
        return _MIRRORS[str(root)]


class Mirror:
    """A prefix of an object store, and the local files of what was read of it."""

    def __init__(self, url: str, root: Path) -> None:
        self.url = url
        self.root = root
        self.path = StorePath(root)
        self._obstore = require("obstore", "object-stores")
        self._open_store()
        self._lock = threading.Lock()
        self._listings: dict[str, tuple[float, dict[str, Entry]]] = {}
        self._locals: OrderedDict[str, _Local] = OrderedDict()
        self._unseen = _EVICT_EVERY
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit[1], limit[1]))

    def _open_store(self) -> None:
        from obstore.store import from_url

        is_plain = any("http://" in os.environ.get(name, "") for name in _ENDPOINTS)
        allow_http = {"allow_http": True} if is_plain or os.environ.get("AZURE_STORAGE_USE_EMULATOR") == "true" else {}
        try:
            opened: Any = from_url
            self._store: Any = opened(
                self.url,
                client_options={"timeout": _TIMEOUT, "connect_timeout": _TIMEOUT, **allow_http},
                retry_config={"max_retries": _MOST_RETRIES, "retry_timeout": _RETRY_TIMEOUT},
            )
        except Exception as error:  # obstore's errors have no base class of their own but Exception
            raise UsageError(f"{self.url} is not the address of an object store: {first_line(error)}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return _mirror, (self.url,)

    # --- what there is

    def entry(self, key: str) -> Entry | None:
        """Return an object's entry; None if there is none."""
        folder, _, name = key.rpartition("/")
        with self._lock:
            known = self._listings.get(folder)
        if known is not None:
            age = time.monotonic() - known[0]
            if name in known[1] and (folder not in _PASSING or age < _KNOWN_SECONDS):
                return known[1][name]
            if age < _KNOWN_SECONDS:
                return None
        return self.listing(folder).get(name) if folder else self._head(key)

    def _head(self, key: str) -> Entry | None:
        found: Entry | None = self._ask(key, lambda: _entry(self._obstore.head(self._store, key)))
        return found

    def listing(self, folder: str) -> dict[str, Entry]:
        """List the objects that lie directly in a folder, by name."""
        prefix = f"{folder}/" if folder else ""
        metas = self._ask(folder, lambda: [m for batch in self._obstore.list(self._store, prefix=folder or None) for m in batch], [])
        names = ((meta["path"].removeprefix(prefix), meta) for meta in metas)
        found = {name: _entry(meta) for name, meta in names if "/" not in name}
        with self._lock:
            self._listings[folder] = time.monotonic(), found
        return found

    def folders(self) -> set[str]:
        """Return the names of the folders and objects at the top."""
        nothing: dict[str, Any] = {"common_prefixes": [], "objects": []}
        found = self._ask("", lambda: self._obstore.list_with_delimiter(self._store), nothing)
        return {name.rpartition("/")[2] for name in (*found["common_prefixes"], *(meta["path"] for meta in found["objects"]))}

    def tree(self, folder: str) -> list[str]:
        """Return the keys of all objects below a folder."""
        keys: list[str] = self._ask(
            folder, lambda: [meta["path"] for batch in self._obstore.list(self._store, prefix=folder or None) for meta in batch], []
        )
        return keys

    # --- reading

    def get(self, key: str) -> bytes:
        """Read an object as a whole, and keep no copy of it.

        Raises:
            FileNotFoundError: there is none.
        """
        missing = FileNotFoundError(f"{self.url}/{key} does not exist")
        content: bytes = self._ask(key, lambda: bytes(self._obstore.get(self._store, key).bytes()), missing)
        TRAFFIC.fetched += len(content)
        return content

    def local(self, key: str) -> _Local:
        """Return the local file of an object, of its size; its bytes are those of `fetch`.

        Raises:
            FileNotFoundError: there is no such object.
        """
        entry = self.entry(key)
        if entry is None:
            raise FileNotFoundError(f"{self.url}/{key} does not exist")
        with self._lock:
            known = self._locals.get(key)
            if known is None or known.entry != entry:
                self._evict()
                known = self._locals[key] = _open_local(os.path.join(self.root, _OBJECTS, key), entry)
                while len(self._locals) > _OPEN:
                    self._locals.popitem(last=False)
            self._locals.move_to_end(key)
        return known

    def fetch(self, key: str, ranges: Iterable[tuple[int, int]]) -> None:
        """Fetch ranges of an object (first byte, number of bytes) to its local file, if they are not there.

        Raises:
            FileNotFoundError: there is no such object.
            StorageError: the store does not answer, or the disk is full.
        """
        import numpy as np

        local = self.local(key)
        with local.lock:
            wanted = np.zeros(len(local.blocks) + 1, np.int64)
            for first, size in ranges:
                begin, end = max(0, first), min(first + size, local.entry.size)
                if end > begin:
                    wanted[begin // _BLOCK] += 1
                    wanted[-(-end // _BLOCK)] -= 1
            missing = np.flatnonzero((np.cumsum(wanted[:-1]) > 0) & (local.blocks == 0))
            runs = _runs(missing, local.entry.size)
            if not runs:
                return
            starts, ends = zip(*runs, strict=True)
            TRAFFIC.requests += len(runs) - 1
            absent = FileNotFoundError(f"{self.url}/{key} does not exist")
            parts = [memoryview(content) for content in self._ask(key, lambda: self._ranges(key, starts, ends), absent)]
            if [len(part) for part in parts] != [end - begin for begin, end in runs]:
                raise IntegrityError(f"{self.url}/{key} has fewer bytes than its size says; restore it or build again")
            self._write(local, runs, parts)
            TRAFFIC.fetched += sum(len(part) for part in parts)
            self._unseen += sum(len(part) for part in parts)

    def _ranges(self, key: str, starts: Sequence[int], ends: Sequence[int]) -> list[Any]:
        return list(self._obstore.get_ranges(self._store, key, starts=list(starts), ends=list(ends), coalesce=0))

    def _write(self, local: _Local, runs: list[tuple[int, int]], parts: list[memoryview]) -> None:
        """Write fetched ranges to the local file, and then which blocks they are."""
        for (begin, end), part in zip(runs, parts, strict=True):
            os.pwrite(local.descriptor, part, begin)
            local.blocks[begin // _BLOCK : -(-end // _BLOCK)] = 1
        with contextlib.suppress(FileNotFoundError):  # another process removed the mirror
            _write_blocks(local)

    def whole(self, key: str) -> str:
        """Fetch an object as a whole, and return the path of its local file."""
        local = self.local(key)
        self.fetch(key, [(0, local.entry.size)])
        return local.open_path

    def _evict(self) -> None:
        """Remove the files of mirrors that were used longest ago, if all take too much; none that this process reads."""
        if self._unseen < _EVICT_EVERY:
            return
        self._unseen = 0
        limit = int(os.environ.get("WHEREFROM_CACHE_BYTES") or _CACHE_BYTES)
        own = {local.path for mirror in _MIRRORS.values() for local in mirror._locals.values()}
        files = []
        for folder, _, names in os.walk(cache_folder()):
            for name in names:
                path = os.path.join(folder, name)
                with contextlib.suppress(OSError):
                    status = os.stat(path)
                    files.append((status.st_atime_ns, status.st_blocks * 512, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= limit:
                break
            if path.removesuffix(".blocks") not in own and f"/{_OBJECTS}/" in path:
                with contextlib.suppress(OSError):
                    os.unlink(path)
                    total -= size

    # --- writing

    def put(self, key: str, content: bytes | Path) -> None:
        """Put an object, in place of an earlier one."""
        self._put(key, content, "overwrite")

    def create(self, key: str, content: bytes) -> None:
        """Put an object that must not exist yet.

        Raises:
            BusyError: it exists.
        """
        self._put(key, content, "create")

    def _put(self, key: str, content: bytes | Path, mode: Any) -> None:
        size = len(content) if isinstance(content, bytes) else os.stat(content).st_size
        source = content if isinstance(content, bytes) else Path(os.fspath(content))
        whole = {"use_multipart": False} if mode == "create" else {}  # a multipart upload has no condition
        try:
            self._ask(key, lambda: self._obstore.put(self._store, key, source, mode=mode, **whole))
        except BusyError:
            if self.get(key) != content:  # else an earlier attempt had succeeded, whose answer was lost
                raise
        TRAFFIC.put += size
        folder = key.rpartition("/")[0]
        with self._lock:
            self._listings.pop(folder, None)
            self._locals.pop(key, None)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; those that do not exist are none."""
        keys = list(keys)
        for key in keys:
            self._ask(key, partial(self._obstore.delete, self._store, key))
        with self._lock:
            for key in keys:
                self._listings.pop(key.rpartition("/")[0], None)
                self._locals.pop(key, None)

    @contextlib.contextmanager
    def lease(self) -> Iterator[None]:
        """Hold the lock of the prefix: an object that is created on the condition that none exists, and renewed while it is held.

        A lock that is not renewed for `_LEASE_SECONDS` was left by a writer that died, and is removed.

        Raises:
            BusyError: somebody else holds it.
        """
        owner = json.dumps({"host": os.uname().nodename, "process": os.getpid(), "id": uuid.uuid4().hex}).encode()
        try:
            self.create(_LOCK, owner)
        except BusyError:
            self._await_leftover()
            try:
                self.create(_LOCK, owner)
            except BusyError as error:
                raise self._is_busy() from error
        stopped = threading.Event()

        def renew() -> None:
            while not stopped.wait(_RENEW_SECONDS):
                with contextlib.suppress(Exception):  # the next renewal may succeed
                    if self.get(_LOCK) == owner:
                        self.put(_LOCK, owner)

        thread = threading.Thread(target=renew, name="wherefrom-lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()
            with contextlib.suppress(Exception):
                if self.get(_LOCK) == owner:
                    self.delete([_LOCK])

    def _await_leftover(self) -> None:
        """Wait as long as the lock is not renewed, and remove it when it was left over.

        Raises:
            BusyError: it was renewed.
        """
        first = self._head(_LOCK)
        deadline = time.monotonic() + _LEASE_SECONDS
        while first is not None and time.monotonic() < deadline:
            time.sleep(min(1.0, _LEASE_SECONDS / 10))
            now = self._head(_LOCK)
            if now is not None and now.modified != first.modified:
                raise self._is_busy()
            first = now
        if first is not None and self._head(_LOCK) == first:  # else another writer that waited has removed it and has its own there
            self.delete([_LOCK])

    def _is_busy(self) -> BusyError:
        return BusyError(f"another build is writing into {self.url}; wait for it, or choose another `out`")

    def _ask(self, key: str, request: Callable[[], Result], missing: Any = None) -> Any:
        """Make a request, again if its answer is broken off, and turn obstore's errors into one sentence.

        Args:
            missing: what to return if there is no such object, or an exception to raise.
        """
        kinds = self._obstore.exceptions
        for attempt in range(_ATTEMPTS):
            TRAFFIC.requests += 1
            try:
                return request()
            except FileNotFoundError as error:
                if isinstance(missing, Exception):
                    raise missing from error
                return missing
            except kinds.AlreadyExistsError as error:
                raise BusyError(f"{self.url}/{key} was published by somebody else meanwhile; run the command again") from error
            except (kinds.PermissionDeniedError, kinds.UnauthenticatedError) as error:
                raise StorageError(f"{self.url} refuses access: {_reason(error)}; check the credentials of the store") from error
            except (kinds.GenericError, TimeoutError, ConnectionError) as error:
                if attempt + 1 == _ATTEMPTS:
                    raise StorageError(f"{self.url}/{key} cannot be read or written: {_reason(error)}; try again") from error
                time.sleep(_FIRST_PAUSE * 2**attempt)
            except (kinds.BaseError, OSError) as error:
                raise StorageError(f"{self.url}/{key} cannot be used: {_reason(error)}; check the address and the store") from error
        raise AssertionError


def _reason(error: Exception) -> str:
    return first_line(error)[:300]


def _entry(meta: Any) -> Entry:
    return Entry(meta["size"], meta["e_tag"] or "", round(meta["last_modified"].timestamp() * 1e9))


def _runs(blocks: "np.ndarray", size: int) -> list[tuple[int, int]]:
    """Return the byte ranges of blocks: neighbours together, and those with a small gap between them; none longer than `_PIECE`."""
    import numpy as np

    if not len(blocks):
        return []
    breaks = np.flatnonzero(np.diff(blocks) > 1 + _GAP // _BLOCK) + 1
    runs = []
    for run in np.split(blocks, breaks):
        begin, end = int(run[0]) * _BLOCK, min((int(run[-1]) + 1) * _BLOCK, size)
        runs += [(first, min(first + _PIECE, end)) for first in range(begin, end, _PIECE)]
    return runs


def _open_local(path: str, entry: Entry) -> _Local:
    """Open the local file of an object, with the blocks that were fetched of this very object."""
    import numpy as np

    blocks = np.zeros(-(-entry.size // _BLOCK), np.uint8)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with contextlib.suppress(OSError, ValueError):
        local = _Local(path, entry, blocks, os.open(path, os.O_RDWR | os.O_CLOEXEC))
        head = _head_of(local)
        with open(f"{path}.blocks", "rb") as file:
            content = file.read()
        if content[: len(head)] == head and len(content) == len(head) + len(blocks):
            blocks[:] = np.frombuffer(content, np.uint8, offset=len(head))
            os.utime(path)
            return local
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # of another content, and perhaps mapped by another process
    local = _Local(path, entry, blocks, os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    os.ftruncate(local.descriptor, entry.size)
    _write_blocks(local)
    return local


def _head_of(local: _Local) -> bytes:
    """Return what tells a local file apart: the object, and the file itself, since another process may have removed and made it anew."""
    status = os.fstat(local.descriptor)
    return json.dumps([local.entry.size, local.entry.tag, status.st_size, status.st_ino]).encode() + b"\n"


def _write_blocks(local: _Local) -> None:
    staged = f"{local.path}.blocks.{uuid.uuid4().hex}"
    with open(staged, "wb") as file:
        file.write(_head_of(local) + local.blocks.tobytes())
    os.replace(staged, f"{local.path}.blocks")


class StorePath(type(Path())):  # type: ignore[misc]
    """The path of an object or a prefix in a store. It is shown as an address; as a path of the system it is the local file."""

    __slots__ = ()

    def __str__(self) -> str:
        found = self._place()
        return super().__str__() if found is None else f"{found[0].url}/{found[1]}".rstrip("/")

    def __fspath__(self) -> str:
        return super().__str__()

    def __repr__(self) -> str:
        return f"StorePath({str(self)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        mirror, key = self.place
        return _rebuilt, (mirror.url, key)

    def _place(self) -> "tuple[Mirror, str] | None":
        text = super().__str__()
        for root, mirror in _MIRRORS.items():
            if text == root or text.startswith(root + os.sep):
                return mirror, text[len(root) + 1 :]
        return None

    @property
    def place(self) -> "tuple[Mirror, str]":
        """The mirror, and the key of the object in its prefix."""
        found = self._place()
        if found is None:
            raise ValueError(f"{super().__str__()} is in no mirror of an object store")
        return found

    @property
    def scratch(self) -> str | None:
        """The path of a local file that is not published yet; None where there is none."""
        _, key = self.place
        return os.fspath(self) if key.startswith(f"{STAGING}/") and os.path.isfile(os.fspath(self)) else None

    @property
    def entry(self) -> Entry | None:
        """The object's entry; None for a prefix, or if there is nothing."""
        mirror, key = self.place
        return mirror.entry(key) if key else None

    def exists(self, **options: Any) -> bool:
        """Return True for an object, or a prefix of some."""
        return self.is_file() or self.is_dir()

    def is_file(self, **options: Any) -> bool:
        """Return True for an object."""
        mirror, key = self.place
        return bool(key) and mirror.entry(key) is not None

    def is_dir(self, **options: Any) -> bool:
        """Return True for a prefix of objects."""
        mirror, key = self.place
        return bool(mirror.folders() if not key else mirror.tree(key))

    def is_symlink(self) -> bool:
        """Return False: stores have no links."""
        return False

    def resolve(self, strict: bool = False) -> "StorePath":
        """Return the path, which is whole."""
        return self

    def absolute(self) -> "StorePath":
        """Return the path, which is whole."""
        return self

    def stat(self, **options: Any) -> Any:
        """Return size and time of an object."""
        mirror, key = self.place
        scratch = self.scratch
        if scratch is not None:
            return os.stat(scratch)
        entry = mirror.entry(key)
        if entry is None:
            raise FileNotFoundError(f"{self} does not exist")
        number = int(hashlib.sha256(entry.tag.encode()).hexdigest()[:12], 16)
        return SimpleNamespace(st_size=entry.size, st_mtime_ns=entry.modified, st_mode=stat.S_IFREG, st_ino=number)

    def iterdir(self) -> Iterator["StorePath"]:
        """Yield what lies directly in a prefix."""
        mirror, key = self.place
        return (self / name for name in sorted(mirror.listing(key) if key else mirror.folders()))

    def glob(self, pattern: str, **options: Any) -> Iterator["StorePath"]:
        """Yield the objects of a folder whose names match: `*.ending` in this one, `folder/*` in another."""
        folder, _, name = str(pattern).rpartition("/")
        return (path for path in (self / folder).iterdir() if fnmatchcase(path.name, name))

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete an object, or a local file that was not published."""
        scratch = self.scratch
        if scratch is not None:
            os.unlink(scratch)
            return
        mirror, key = self.place
        if not missing_ok and mirror.entry(key) is None:
            raise FileNotFoundError(f"{self} does not exist")
        mirror.delete([key])

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Make the local folder; stores have none."""
        os.makedirs(os.fspath(self), exist_ok=True)

    def rmdir(self) -> None:
        """Remove the local folder, if it is empty."""
        os.rmdir(os.fspath(self))

    def open(self, mode: str = "r", *arguments: Any, **options: Any) -> IO[Any]:
        """Open an object for reading, fetched as a whole."""
        mirror, key = self.place
        return open(self.scratch or mirror.whole(key), mode, *arguments, **options)

    def read_bytes(self) -> bytes:
        """Read an object as a whole."""
        with self.open("rb") as file:
            return bytes(file.read())

    def remove_tree(self) -> None:
        """Delete all objects below the prefix, and the local files."""
        mirror, key = self.place
        mirror.delete(mirror.tree(key))
        shutil.rmtree(os.fspath(self), ignore_errors=True)

    def publish(self, staged: Path) -> None:
        """Put a local file into the store as this object, and remove it."""
        mirror, key = self.place
        mirror.put(key, staged)
        os.unlink(os.fspath(staged))

    def map(self) -> str:
        """Return the path of the local file, to be mapped into memory; see `fetch`."""
        mirror, key = self.place
        return self.scratch or mirror.local(key).open_path

    def fetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Fetch ranges of the object to the local file."""
        mirror, key = self.place
        if self.scratch is None:
            mirror.fetch(key, ranges)


class _Bytes(io.RawIOBase):
    """The bytes of an object, from one on, which are fetched as they are read."""

    def __init__(self, path: StorePath, start: int) -> None:
        self._path = path
        self._mirror, self._key = path.place
        self._local = self._mirror.local(self._key)
        self._position = start

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a byte, counted from the start, from here or from the end; return its place."""
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._local.entry.size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes; return their number."""
        view = memoryview(buffer)
        self._mirror.fetch(self._key, [(self._position, len(view))])
        count = os.preadv(self._local.descriptor, [view], self._position)
        self._position += count
        return count


def open_from(path: Path, start: int) -> io.BufferedReader | IO[bytes]:
    """Open a file at a byte; what follows is read as it is needed, also from an object."""
    if isinstance(path, StorePath) and path.scratch is None:
        return io.BufferedReader(_Bytes(path, start), _PIECE)
    file = path.open("rb")
    file.seek(start)
    return file


def fetched(path: Path) -> Path:
    """Return a local path with all bytes of a file: itself, or that of an object which is fetched as a whole."""
    if not isinstance(path, StorePath):
        return path
    mirror, key = path.place
    return Path(mirror.whole(key))


def _rebuilt(url: str, key: str) -> StorePath:
    path: StorePath = _mirror(url).path / key if key else _mirror(url).path
    return path
