"""Clients of a running server, and its discovery. Only the standard library is imported, so that a command starts at once.

A server writes a discovery file with its address, token and indexes, which only its owner can read. `wherefrom query` uses the server of
WHEREFROM_URL, else one with a discovery file.
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
from .query.asking import BaseClient, Options, check_options
from .store import errors
from .store.errors import NotFoundError, UsageError, WherefromError

_TIMEOUT = 600.0
_MOST_QUERIES = 256
_MOST_COSTLY = 16
_MOST_ANSWERS = 20_000
_MOST_ROWS = 20
_MOST_BYTES = 900_000


class RemoteClient(BaseClient):
    """Client of a server, with the interface of `Client`.

    Args:
        url: the server's address, such as "http://127.0.0.1:8787".
        index: one of its indexes, by name or absolute path; optional if there is only one.
        token: its bearer token, if it requires one.
        timeout: seconds to wait for an answer.

    Raises:
        UsageError: the address or the token is invalid.
    """

    def __init__(self, url: str, *, index: str | None = None, token: str | None = None, timeout: float = _TIMEOUT) -> None:
        try:
            parts = urlsplit(url)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            (parts.hostname or "").encode("idna")
        except (ValueError, AttributeError, TypeError):
            valid = False
        if not valid or parts.query or parts.fragment or parts.username:
            raise UsageError(f"{url!r} is not a server's address; write it as http://127.0.0.1:8787")
        if token is not None and not (token.isascii() and token.isprintable()):
            raise UsageError("a server's token has only visible ASCII characters; check WHEREFROM_TOKEN")
        self.url = url.rstrip("/")
        self.index = index
        self._token = token
        self._timeout = timeout
        self._parts = parts

    def __repr__(self) -> str:
        return f"RemoteClient({self.url!r}" + (f", index={self.index!r})" if self.index else ")")

    def query_many(self, queries: Sequence[Query], **options: Unpack[Options]) -> list[Answer]:
        """See `Client.query_many`; splits the queries into requests of an accepted size."""
        check_options(options)
        answers: list[Answer] = []
        for part in [queries] if options.get("mean") else self._requests(queries, options):
            body = self._query_body(part, options)
            response = self.request("POST", "/v1/query", body)
            response = response if "queries" in body else {"answers": [response]}
            answers += self._parse(lambda r: list(map(Answer.from_dict, r["answers"])), response)
        return answers

    def explain(self, rows: Sequence[int], query: Query, *, tokens: bool = True, **options: Unpack[Options]) -> list[Explanation]:
        """See `Client.explain`."""
        check_options(options)
        explanations: list[Explanation] = []
        for first in range(0, len(rows), _MOST_ROWS):
            part = list(rows[first : first + _MOST_ROWS])
            body = {**query.to_dict(), **_set_options(options), "rows": part, "tokens": tokens, "index": self.index}
            response = self.request("POST", "/v1/explain", body)
            explanations += self._parse(lambda r: list(map(Explanation.from_dict, r["explanations"])), response)
        return explanations

    def complete(self, prompt: str, tokens: int = 16) -> str:
        """See `Client.complete`."""
        response = self.request("POST", "/v1/complete", {"prompt": prompt, "tokens": tokens, "index": self.index})
        return self._parse(lambda r: str(r["completion"]), response)

    def request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Send a request; returns the JSON of the response.

        Raises:
            NotFoundError: no server answers at the address.
            WherefromError: the server's error, of the class that the library would raise.
        """
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=self._timeout)
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self._token}"} if self._token else {})}
        try:
            connection.request(method, self._parts.path.rstrip("/") + path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            status = response.status
            content = response.read()
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise NotFoundError(
                f"no server answers at {self.url} ({error}); start one with wherefrom serve, or ask with --local"
            ) from error
        finally:
            connection.close()
        return _parse_response(status, content, self.url)

    def _requests(self, queries: Sequence[Query], options: Mapping[str, Any]) -> Iterator[Sequence[Query]]:
        """Split queries into parts that a server accepts in one request."""
        most = _MOST_COSTLY if options.get("group_by") or options.get("baselines") else _MOST_QUERIES
        most = max(1, min(most, _MOST_ANSWERS // (options.get("k") or 10)))
        first = size = 0
        for position, query in enumerate(queries):
            query_size = len(json.dumps(query.to_dict())) + 2
            if position > first and (position - first == most or size + query_size > _MOST_BYTES):
                yield queries[first:position]
                first = position
                size = 0
            size += query_size
        if first < len(queries):
            yield queries[first:]

    def _parse(self, parse: Callable[[Any], Any], response: Any) -> Any:
        """Parse a response; raise a NotFoundError if it is not that of a Wherefrom server."""
        try:
            return parse(response)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise NotFoundError(f"{self.url} answers, but not as a Wherefrom server does") from error

    def _query_body(self, queries: Sequence[Query], options: Mapping[str, Any]) -> dict[str, Any]:
        bodies = [query.to_dict() for query in queries]
        single = len(bodies) == 1 and not options.get("mean")
        return {**(bodies[0] if single else {"queries": bodies}), **_set_options(options), "index": self.index}


def connect(where: str | Path, **options: Any) -> BaseClient:
    """A client of an index directory or of a server; both have the same methods and give the same answers.

    Args:
        where: a directory, or a server's address such as "http://127.0.0.1:8787".
        options: of `Client` (model, device, trust_remote_code, task) or of `RemoteClient` (index, token, timeout).

    Raises:
        NotFoundError, IncompatibleError, IntegrityError: there is no index, or it cannot be read.
        UsageError: the address is invalid.
    """
    if str(where).startswith(("http://", "https://")):
        return RemoteClient(str(where), **options)
    from .client import Client

    return Client(where, **options)


def _set_options(options: Mapping[str, Any]) -> dict[str, Any]:
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in options.items()}
    return {name: value for name, value in plain.items() if value is not None}


def _parse_response(status: int, content: bytes, url: str) -> Any:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise NotFoundError(f"{url} answers, but not as a Wherefrom server does (status {status})") from error
    if status < 400:
        return value
    kind = getattr(errors, str(value.get("kind")), None) if isinstance(value, dict) else None
    if not (isinstance(kind, type) and issubclass(kind, WherefromError)) or "detail" not in value:
        raise NotFoundError(f"{url} answers, but not as a Wherefrom server does (status {status})")
    raise kind(str(value["detail"]))


@dataclass(frozen=True)
class Served:
    """A running server, as in its discovery file."""

    url: str
    pid: int
    token: str | None
    indexes: Mapping[str, str]


def servers_directory() -> Path:
    """Directory of the servers' discovery files."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "wherefrom" if runtime else Path.home() / ".cache/wherefrom/servers"


def announce(served: Served) -> Path:
    """Register a server in a discovery file that only its owner can read."""
    directory = servers_directory()
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    path, staged = (directory / f"{socket.gethostname()}-{served.pid}{ending}" for ending in (".json", ".tmp"))
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump({"url": served.url, "pid": served.pid, "token": served.token, "indexes": dict(served.indexes)}, file)
    os.replace(staged, path)
    return path


def find_server(index: str) -> RemoteClient | None:
    """Connect to a running server of an index: that of WHEREFROM_URL (with WHEREFROM_TOKEN), else one registered on this machine."""
    name = str(Path(index).resolve()) if Path(index).exists() else index
    url = os.environ.get("WHEREFROM_URL")
    if url:
        return RemoteClient(url, index=name, token=os.environ.get("WHEREFROM_TOKEN"))
    directory = servers_directory()
    for path in sorted(directory.glob(f"{glob.escape(socket.gethostname())}-*.json")) if directory.is_dir() else ():
        try:
            server = json.loads(path.read_text())
            os.kill(int(server["pid"]), 0)
            if name not in dict(server["indexes"]).values():
                continue
            client = RemoteClient(server["url"], index=name, token=server["token"])
            client.request("GET", "/healthz")
        except ProcessLookupError:
            path.unlink(missing_ok=True)  # left by a server that was killed
        except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, WherefromError):
            continue  # not a discovery file, or the server does not answer
        else:
            return client
    return None
