"""What every request must pass before it reaches the application: host, token, size and patience; and what every response carries.

Plain ASGI, so that nothing of a body is read before it is known to be wanted.
"""

import asyncio
import contextlib
import hmac
import json
from asyncio import TimerHandle, Transport
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MOST_BYTES = 1 << 20
_PATIENCE = 15.0
_OPEN = ("/", "/docs", "/healthz", "/readyz", "/favicon.ico")
_CSP = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", _CSP.encode()),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
_ELSEWHERE = (b"cross-site", b"same-site")


def problem(status: int, detail: str, title: str, kind: str = "UsageError") -> tuple[int, bytes]:
    """A problem+json document (RFC 9457); `kind` is the error that a client raises."""
    return status, json.dumps({"type": "about:blank", "title": title, "status": status, "detail": detail, "kind": kind}).encode()


class Guard:
    """Wraps the application.

    Args:
        app: what is guarded.
        token: a bearer token that all but the explorer's own files and the health checks ask for; None asks for none.
        hosts: names by which the server may be called, so that no page elsewhere can reach it through a name of its own (DNS rebinding);
            None admits any.
        patience: seconds that a client may take for its request.
    """

    def __init__(self, app: App, token: str | None, hosts: frozenset[str] | None, patience: float = _PATIENCE) -> None:
        self._app, self._token, self._hosts, self._patience = app, token, hosts, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        refused = self._refused(scope, headers)
        if refused is not None:
            await _respond(send, *refused)
            return
        body, failed = await self._body(receive)
        if failed is not None:
            await _respond(send, *failed)
            return
        sent, begun, gone = False, False, asyncio.Event()

        async def replay() -> MutableMapping[str, Any]:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def secured(message: MutableMapping[str, Any]) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        work = asyncio.ensure_future(self._app(scope, replay, secured))
        left = asyncio.ensure_future(receive())
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():  # whoever asked is gone
                gone.set()
                work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
        except asyncio.CancelledError:  # the server is stopping, and has waited long enough
            if not begun:
                await _respond(send, *problem(503, "the server is stopping; ask again later", "Busy", "BusyError"))
        finally:
            left.cancel()
            work.cancel()

    def _refused(self, scope: Scope, headers: dict[bytes, bytes]) -> tuple[int, bytes] | None:
        host = headers.get(b"host", b"").decode("latin-1")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self._hosts is not None and name.lower() not in self._hosts:
            return problem(421, f"this server is not called {name[:100]!r}; use the address that it printed", "Misdirected")
        # A page of another address, or of another port here, may send a query and learn from the time that the answer takes.
        if headers.get(b"sec-fetch-site", b"").lower() in _ELSEWHERE and scope["path"] not in _OPEN and not _is_static(scope["path"]):
            return problem(403, "a page of another address cannot ask this server; ask from the explorer, or from a program", "Forbidden")
        unwanted = _unwanted(scope, headers)
        if unwanted is not None:
            return unwanted
        if self._token is not None and scope["path"] not in _OPEN and not _is_static(scope["path"]):
            given = headers.get(b"authorization", b"")
            scheme, _, token = given.partition(b" ")
            if not hmac.compare_digest(token.strip(), self._token.encode()) or scheme.lower() != b"bearer":
                return problem(401, "a bearer token is asked for: Authorization: Bearer TOKEN", "Unauthorized")
        return None

    async def _body(self, receive: Receive) -> tuple[bytes, tuple[int, bytes] | None]:
        parts, size = [], 0
        until = asyncio.get_running_loop().time() + self._patience
        while True:
            try:
                message = await asyncio.wait_for(receive(), until - asyncio.get_running_loop().time())
            except TimeoutError:
                return b"", problem(408, "the request did not come to its end", "Timeout")
            if message["type"] != "http.request":
                return b"", problem(400, "the request was broken off", "Bad request")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > MOST_BYTES:
                return b"", problem(413, f"at most {MOST_BYTES:,} bytes are read", "Too large")
            if not message.get("more_body"):
                return b"".join(parts), None


def _unwanted(scope: Scope, headers: dict[bytes, bytes]) -> tuple[int, bytes] | None:
    """What is wrong with a body, as far as its headers tell."""
    try:
        length = int(headers.get(b"content-length", b"0"))
    except ValueError:
        return problem(400, "the content length is not a number", "Bad request")
    if length > MOST_BYTES:
        return problem(413, f"the body has {length:,} bytes; at most {MOST_BYTES:,} are read", "Too large")
    kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
    if scope["method"] == "POST" and kind != "application/json":
        return problem(415, "the body is JSON, which its sender must say: Content-Type: application/json", "Unsupported media type")
    return None


def _is_static(path: str) -> bool:
    return path.startswith("/static/")


class Impatient(H11Protocol):
    """uvicorn's connection, closed where the headers of a request do not come to their end, or an answer is not read; idle between requests
    uvicorn ends it.
    """

    patience = _PATIENCE
    _waits: TimerHandle | None = None
    _unread: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._wait()

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`: whoever does not read what was asked for is let go."""
        super().pause_writing()
        self._unread = self.loop.call_later(self.patience, self.transport.abort)

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._wait()
        elif self._waits is not None:
            self._waits.cancel()
            self._waits = None

    def _wait(self) -> None:
        """Seconds count from the first byte on: more bytes do not begin them anew."""
        if self._waits is None:
            self._waits = self.loop.call_later(self.patience, self.transport.close)


async def _respond(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/problem+json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *_HEADERS]})
    await send({"type": "http.response.body", "body": body})
