"""Client of a running server, and discovery of servers. Only the standard library is imported, so that commands start fast.

A server writes a discovery file with its address, token and indexes, which only the server's user can read. `wherefrom query` uses the
server of WHEREFROM_URL, else one with a discovery file.
"""

import glob
import http.client
import inspect
import json
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack
from urllib.parse import urlsplit

from .query.answers import Answer, Explanation
from .query.asking import BaseClient
from .query.options import Options, Query, ScoreOptions, check_options, check_queries
from .store import errors
from .store.errors import NotFoundError, UsageError, WherefromError
from .store.presets import mixes

if TYPE_CHECKING:
    import numpy as np

    from .store.shapes import Float32
    from .store.vectors import Rows

MOST_QUERIES = 256  # in a request
MOST_COSTLY = 16  # queries with groups, baselines or a rerank, in a request
MOST_ANSWERS = 20_000
MOST_EXPLAINED = 20
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

    def __init__(self, url: str, *, index: str | None = None, token: str | None = None, timeout: float = 600.0) -> None:
        try:
            parts = urlsplit(url)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            (parts.hostname or "").encode("idna")
        except (ValueError, AttributeError, TypeError):
            valid = False
        if not valid or parts.query or parts.fragment or parts.username:
            raise UsageError(f"{url!r} is not the address of a server; write it as http://127.0.0.1:8787")
        if token is not None and not (token.isascii() and token.isprintable()):
            raise UsageError("the token has other characters than visible ASCII ones; check `token` or WHEREFROM_TOKEN")
        self.url = url.rstrip("/")
        self.index = index
        self._token = token
        self._timeout = timeout
        self._parts = parts

    def __repr__(self) -> str:
        return f"RemoteClient({self.url!r}" + (f", index={self.index!r})" if self.index else ")")

    def query_many(self, queries: Sequence[Query], **options: Unpack[Options]) -> list[Answer]:
        """See `Client.query_many`. The queries are split into requests of a size that the server accepts."""
        check_queries(queries)
        check_options(options)
        answers: list[Answer] = []
        parts = [queries] if options.get("mean") else list(self._requests(queries, options))
        if len(parts) > 1 and mixes(options):
            raise UsageError(
                f"these {len(queries)} queries take {len(parts)} requests, and `mix` needs all in one; ask fewer, or open the index itself"
            )
        for part in parts:
            body = self._query_body(part, options)
            response = self.request("POST", "/v1/query", body)
            response = response if "queries" in body else {"answers": [response]}
            answers += self._parse(lambda r: list(map(Answer.from_dict, r["answers"])), response)
        return answers

    def scores(
        self, queries: Sequence[Query], where: str | None = None, **options: Unpack[ScoreOptions]
    ) -> 'Float32[np.ndarray, "queries rows"]':
        """See `Client.scores`."""
        import numpy as np

        check_queries(queries)
        check_options(options)
        if len(queries) > 1 and mixes(options):
            raise UsageError("scores of several queries that are mixed into the curvature take the index itself; open it, or ask for one")
        rows = []
        for query in queries:
            body = {**query.to_dict(), **_set_options({**options, "where": where}), "format": "float32", "index": self.index}
            content = self._send("POST", "/v1/scores", body)
            rows.append(self._parse(lambda content: np.frombuffer(content, "<f4"), content))
        return np.stack(rows)

    def encode(self, queries: Sequence[Query], **options: Unpack[ScoreOptions]) -> "Rows":
        """See `Client.encode`."""
        from .store.vectors import concatenate, from_bytes

        check_queries(queries)
        check_options(options)
        settings = {**_set_options(options), "index": self.index}
        contents = [self._send("POST", "/v1/encode", {**query.to_dict(), **settings}) for query in queries]
        return concatenate([self._parse(from_bytes, content) for content in contents])

    def explain(self, examples: Sequence[int], query: Query, *, tokens: bool = True, **options: Unpack[ScoreOptions]) -> list[Explanation]:
        """See `Client.explain`."""
        check_queries([query])
        check_options(options)
        explanations: list[Explanation] = []
        for first in range(0, len(examples), MOST_EXPLAINED):
            part = list(examples[first : first + MOST_EXPLAINED])
            body = {**query.to_dict(), **_set_options(options), "examples": part, "tokens": tokens, "index": self.index}
            response = self.request("POST", "/v1/explain", body)
            explanations += self._parse(lambda r: list(map(Explanation.from_dict, r["explanations"])), response)
        return explanations

    def complete(self, prompt: str, tokens: int = 16) -> str:
        """See `Client.complete`."""
        response = self.request("POST", "/v1/complete", {"prompt": prompt, "tokens": tokens, "index": self.index})
        return self._parse(lambda r: str(r["completion"]), response)

    def request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Send a request; return the JSON of the response.

        Raises:
            NotFoundError: no server answers at the address.
            WherefromError: the server's error, of the class that the library would raise.
        """
        return self._parse(json.loads, self._send(method, path, body))

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        """Send a request; return the content of the response, or raise the errors of `request`."""
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
                f"no server answers at {self.url} ({error}); start one with wherefrom serve, or use the index directory"
            ) from error
        finally:
            connection.close()
        if status >= 400:
            raise _server_error(status, content, self.url)
        return content

    def _requests(self, queries: Sequence[Query], options: Mapping[str, Any]) -> Iterator[Sequence[Query]]:
        """Split queries into parts that a server accepts in one request."""
        is_costly = options.get("group_by") or options.get("baselines") or options.get("rerank") != 0
        most = MOST_COSTLY if is_costly else MOST_QUERIES
        most = max(1, min(most, MOST_ANSWERS // (options.get("k") or 10)))
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
            raise NotFoundError(f"{self.url} answers, but not as a Wherefrom server does; check the address") from error

    def _query_body(self, queries: Sequence[Query], options: Mapping[str, Any]) -> dict[str, Any]:
        bodies = [query.to_dict() for query in queries]
        single = len(bodies) == 1 and not options.get("mean")
        return {**(bodies[0] if single else {"queries": bodies}), **_set_options(options), "index": self.index}


def connect(index: Any, /, **options: Any) -> BaseClient:
    """Return a client of an index directory or of a server; both have the same methods and give the same answers.

    Args:
        index: a directory, an open index, or a server's address such as "http://127.0.0.1:8787".
        options: of `Client` (model, tokenizer, device, trust_remote_code, task) or of `RemoteClient` (index, token, timeout).

    Raises:
        NotFoundError: there is no index.
        IncompatibleError: a newer version of Wherefrom wrote it.
        IntegrityError: it is damaged.
        UsageError: the address is invalid.
    """
    address = str(index)
    if address.startswith(("http://", "https://")):
        _check_arguments(RemoteClient, options)
        return RemoteClient(address, **options)
    if re.fullmatch(r"[\w.-]+:\d+", address) and not Path(address).exists():
        raise UsageError(f"{address} is neither an index nor an address; a server's address begins with http://")
    from .client import Client

    _check_arguments(Client, options)
    return Client(index, **options)


def _check_arguments(kind: type, options: Mapping[str, Any]) -> None:
    """Refuse options that a kind of client does not have."""
    known = list(inspect.signature(kind).parameters)[1:]
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise UsageError(f"{unknown[0]} is not an option of a {kind.__name__}; it has {', '.join(known)}")


def _set_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are not None, with tuples as lists."""
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in options.items()}
    return {name: value for name, value in plain.items() if value is not None}


def _server_error(status: int, content: bytes, url: str) -> WherefromError:
    """Return the error that a response describes, of the class that the library would raise."""
    try:
        value = json.loads(content)
        kind = getattr(errors, str(value["kind"]))
        detail = str(value["detail"])
    except (ValueError, KeyError, TypeError, AttributeError):
        kind = None
        detail = ""
    if not (isinstance(kind, type) and issubclass(kind, WherefromError)):
        return NotFoundError(f"{url} answers, but not as a Wherefrom server does (status {status}); check the address")
    return kind(detail)


def servers_directory() -> Path:
    """Return the directory of the discovery files."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "wherefrom" if runtime else Path.home() / ".cache/wherefrom/servers"


def announce(url: str, token: str | None, indexes: Mapping[str, str], pid: int) -> Path:
    """Register a running server in a discovery file that only its user can read; return the path of the file.

    Args:
        indexes: the absolute paths of its indexes, by name.
        pid: the number of its process.
    """
    directory = servers_directory()
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = directory / f"{socket.gethostname()}-{pid}.json"
    staged = path.with_suffix(".tmp")
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump({"url": url, "pid": pid, "token": token, "indexes": dict(indexes)}, file)
    os.replace(staged, path)
    return path


def find_server(index: str) -> RemoteClient | None:
    """Connect to a server of an index, if any: that of WHEREFROM_URL (with WHEREFROM_TOKEN), else one with a discovery file."""
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
