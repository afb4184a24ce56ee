"""Clients of a running server, and how one is found. Only the standard library is imported, so that a command starts at once.

A server leaves a file that says where it listens and which indexes it serves, readable by its owner alone; `wherefrom query` looks there
first, and at WHEREFROM_URL before that.
"""

import glob
import http.client
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack
from urllib.parse import urlsplit

from .query.answers import Answer, Explanation, Query
from .query.asking import Asks, Options, check_options
from .store import errors
from .store.errors import NotFoundError, UsageError, WherefromError

_TIMEOUT = 600.0
_MOST_QUERIES, _MOST_COSTLY, _MOST_ANSWERS, _MOST_ROWS, _MOST_BYTES = 256, 16, 20_000, 20, 900_000


class RemoteClient(Asks):
    """Asks a server as `Client` asks an index.

    Args:
        url: the server's address, such as "http://127.0.0.1:8787".
        index: which of its indexes, by name or absolute path; may be left out when there is one.
        token: its bearer token, if it asks for one.
        timeout: seconds to wait for an answer.

    Raises:
        UsageError: that is not an address.
    """

    def __init__(self, url: str, *, index: str | None = None, token: str | None = None, timeout: float = _TIMEOUT) -> None:
        try:
            parts = urlsplit(url)
            known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            (parts.hostname or "").encode("idna")
        except (ValueError, AttributeError, TypeError):
            known = False
        if not known or parts.query or parts.fragment or parts.username:
            raise UsageError(f"{url!r} is not a server's address; it is written as http://127.0.0.1:8787")
        if token is not None and not (token.isascii() and token.isprintable()):
            raise UsageError("a server's token holds visible ASCII characters alone; look at WHEREFROM_TOKEN")
        self.url, self.index, self._token, self._timeout = url.rstrip("/"), index, token, timeout
        self._parts = parts

    def query_many(self, queries: Sequence[Query], **options: Unpack[Options]) -> list[Answer]:
        """See `Client.query_many`; so many in a request as a server takes."""
        check_options(options)
        answers: list[Answer] = []
        for part in [queries] if options.get("mean") else self._requests(queries, options):
            body = self._query_body(part, options)
            found = self.request("POST", "/v1/query", body)
            found = found if "queries" in body else {"answers": [found]}
            answers += self._read(lambda r: list(map(Answer.from_dict, r["answers"])), found)
        return answers

    def explain(self, rows: Sequence[int], query: Query, *, tokens: bool = True, **options: Unpack[Options]) -> list[Explanation]:
        """See `Client.explain`."""
        check_options(options)
        explanations: list[Explanation] = []
        for first in range(0, len(rows), _MOST_ROWS):
            part = list(rows[first : first + _MOST_ROWS])
            body = {**query.to_dict(), **_given(options), "rows": part, "tokens": tokens, "index": self.index}
            found = self.request("POST", "/v1/explain", body)
            explanations += self._read(lambda r: list(map(Explanation.from_dict, r["explanations"])), found)
        return explanations

    def complete(self, prompt: str, tokens: int = 16) -> str:
        """See `Client.complete`."""
        found = self.request("POST", "/v1/complete", {"prompt": prompt, "tokens": tokens, "index": self.index})
        return self._read(lambda r: str(r["completion"]), found)

    def request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """One request, as JSON.

        Raises:
            NotFoundError: nobody listens there.
            WherefromError: what the server says was wrong, as the error that the library itself would have raised.
        """
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=self._timeout)
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self._token}"} if self._token else {})}
        try:
            connection.request(method, self._parts.path.rstrip("/") + path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            status, content = response.status, response.read()
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise NotFoundError(
                f"no server answers at {self.url} ({error}); start one with wherefrom serve, or ask with --local"
            ) from error
        finally:
            connection.close()
        return _checked(status, content, self.url)

    def _requests(self, queries: Sequence[Query], options: Mapping[str, Any]) -> Iterator[Sequence[Query]]:
        """Queries in parts that a server takes in one request."""
        most = _MOST_COSTLY if options.get("group_by") or options.get("baselines") else _MOST_QUERIES
        most = max(1, min(most, _MOST_ANSWERS // (options.get("k") or 10)))
        first = size = 0
        for at, query in enumerate(queries):
            own = len(json.dumps(query.to_dict())) + 2
            if at > first and (at - first == most or size + own > _MOST_BYTES):
                yield queries[first:at]
                first, size = at, 0
            size += own
        if first < len(queries):
            yield queries[first:]

    def _read(self, read: Callable[[Any], Any], found: Any) -> Any:
        """What a server's answer holds."""
        try:
            return read(found)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise NotFoundError(f"{self.url} answers, but not as a Wherefrom server does") from error

    def _query_body(self, queries: Sequence[Query], options: Mapping[str, Any]) -> dict[str, Any]:
        asked = [query.to_dict() for query in queries]
        single = len(asked) == 1 and not options.get("mean")
        return {**(asked[0] if single else {"queries": asked}), **_given(options), "index": self.index}


class AsyncClient:
    """The same for asyncio: every method of `RemoteClient` as a coroutine."""

    def __init__(self, url: str, *, index: str | None = None, token: str | None = None, timeout: float = _TIMEOUT) -> None:
        self._client = RemoteClient(url, index=index, token=token, timeout=timeout)

    async def query(self, **query_and_options: Any) -> Answer:
        """See `Client.query`."""
        return await self._in_thread(self._client.query, **query_and_options)

    async def query_many(self, queries: Sequence[Query], **options: Unpack[Options]) -> list[Answer]:
        """See `Client.query_many`."""
        return await self._in_thread(self._client.query_many, queries, **options)

    async def explain(self, rows: Sequence[int], query: Query, **options: Any) -> list[Explanation]:
        """See `Client.explain`."""
        return await self._in_thread(self._client.explain, rows, query, **options)

    async def complete(self, prompt: str, tokens: int = 16) -> str:
        """See `Client.complete`."""
        return await self._in_thread(self._client.complete, prompt, tokens)

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        import asyncio  # which takes as long as all else here

        return await asyncio.to_thread(function, *arguments, **named)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in options.items()}
    return {name: value for name, value in plain.items() if value is not None}


def _checked(status: int, content: bytes, url: str) -> Any:
    try:
        found = json.loads(content)
    except ValueError as error:
        raise NotFoundError(f"{url} answers, but not as a Wherefrom server does (status {status})") from error
    if status < 400:
        return found
    kind = getattr(errors, str(found.get("kind")), None) if isinstance(found, dict) else None
    if not (isinstance(kind, type) and issubclass(kind, WherefromError)) or "detail" not in found:
        raise NotFoundError(f"{url} answers, but not as a Wherefrom server does (status {status})")
    raise kind(str(found["detail"]))


@dataclass(frozen=True)
class Served:
    """What a running server left word of."""

    url: str
    pid: int
    token: str | None
    indexes: Mapping[str, str]


def servers_directory() -> Path:
    """Where servers leave word of themselves."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "wherefrom" if runtime else Path.home() / ".cache/wherefrom/servers"


def announce(served: Served) -> Path:
    """Leave word of a server; the file is the owner's alone."""
    directory = servers_directory()
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    path, staged = (directory / f"{socket.gethostname()}-{served.pid}{ending}" for ending in (".json", ".tmp"))
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump({"url": served.url, "pid": served.pid, "token": served.token, "indexes": dict(served.indexes)}, file)
    os.replace(staged, path)
    return path


def find_server(index: str) -> RemoteClient | None:
    """A client of a running server that has an index: the one that WHEREFROM_URL names (its token in WHEREFROM_TOKEN), else one that left
    word of itself on this machine.
    """
    where = str(Path(index).resolve()) if Path(index).exists() else index
    url = os.environ.get("WHEREFROM_URL")
    if url:
        return RemoteClient(url, index=where, token=os.environ.get("WHEREFROM_TOKEN"))
    directory = servers_directory()
    for path in sorted(directory.glob(f"{glob.escape(socket.gethostname())}-*.json")) if directory.is_dir() else ():
        try:
            found = json.loads(path.read_text())
            os.kill(int(found["pid"]), 0)
            if where not in dict(found["indexes"]).values():
                continue
            client = RemoteClient(found["url"], index=where, token=found["token"])
            client.request("GET", "/healthz")
        except ProcessLookupError:
            path.unlink(missing_ok=True)  # left by a server that was killed
        except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, WherefromError):
            continue  # no word of a server, or of one that does not answer
        else:
            return client
    return None
