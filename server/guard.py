"""Checks of every request before the application (host, token, size, time limit), and security headers of every response.

This is plain ASGI, so that a body is only read after the checks of the headers.
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
_CROSS_SITE = (b"cross-site", b"same-site")


def problem(status: int, detail: str, title: str, kind: str = "UsageError") -> tuple[int, bytes]:
    """A problem+json document (RFC 9457); `kind` is the error that a client raises."""
    return status, json.dumps({"type": "about:blank", "title": title, "status": status, "detail": detail, "kind": kind}).encode()


class Guard:
    """ASGI wrapper of the application.

    Args:
        app: the application.
        token: bearer token, required except for the explorer's files and the health checks; None requires none.
        hosts: accepted host names, against DNS rebinding by pages of other hosts; None accepts any.
        patience: time limit (seconds) for receiving a request.
    """

    def __init__(self, app: App, token: str | None, hosts: frozenset[str] | None, patience: float = _PATIENCE) -> None:
        self._app = app
        self._token = token
        self._hosts = hosts
        self._patience = patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        rejection = self._rejection(scope, headers)
        if rejection is not None:
            await _respond(send, *rejection)
            return
        body, failure = await self._body(receive)
        if failure is not None:
            await _respond(send, *failure)
            return
        sent = False
        started = False
        disconnected = asyncio.Event()

        async def replay() -> MutableMapping[str, Any]:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            await disconnected.wait()
            return {"type": "http.disconnect"}

        async def secured(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        work = asyncio.ensure_future(self._app(scope, replay, secured))
        disconnect = asyncio.ensure_future(receive())
        try:
            await asyncio.wait({work, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():  # the client disconnected
                disconnected.set()
                work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
        except asyncio.CancelledError:  # the server's grace period is over
            if not started:
                await _respond(send, *problem(503, "the server is stopping; ask again later", "Busy", "BusyError"))
        finally:
            disconnect.cancel()
            work.cancel()

    def _rejection(self, scope: Scope, headers: dict[bytes, bytes]) -> tuple[int, bytes] | None:
        host = headers.get(b"host", b"").decode("latin-1")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self._hosts is not None and name.lower() not in self._hosts:
            return problem(421, f"this server is not called {name[:100]!r}; use the address that it printed", "Misdirected")
        # A page of another origin could send a query and learn from the response time.
        if headers.get(b"sec-fetch-site", b"").lower() in _CROSS_SITE and scope["path"] not in _OPEN and not _is_static(scope["path"]):
            return problem(403, "a page of another address cannot use this server; use the explorer, or a program", "Forbidden")
        body_problem = _body_problem(scope, headers)
        if body_problem is not None:
            return body_problem
        if self._token is not None and scope["path"] not in _OPEN and not _is_static(scope["path"]):
            scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
            if not hmac.compare_digest(token.strip(), self._token.encode()) or scheme.lower() != b"bearer":
                return problem(401, "a bearer token is required: Authorization: Bearer TOKEN", "Unauthorized")
        return None

    async def _body(self, receive: Receive) -> tuple[bytes, tuple[int, bytes] | None]:
        parts = []
        size = 0
        deadline = asyncio.get_running_loop().time() + self._patience
        while True:
            try:
                message = await asyncio.wait_for(receive(), deadline - asyncio.get_running_loop().time())
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


def _body_problem(scope: Scope, headers: dict[bytes, bytes]) -> tuple[int, bytes] | None:
    """Problem of a body, by its headers; None without one."""
    try:
        length = int(headers.get(b"content-length", b"0"))
    except ValueError:
        return problem(400, "the content length is not a number", "Bad request")
    if length > MOST_BYTES:
        return problem(413, f"the body has {length:,} bytes; at most {MOST_BYTES:,} are read", "Too large")
    kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
    if scope["method"] == "POST" and kind != "application/json":
        return problem(415, "the body must be JSON, with the header Content-Type: application/json", "Unsupported media type")
    return None


def _is_static(path: str) -> bool:
    return path.startswith("/static/")


class Impatient(H11Protocol):
    """Connection of uvicorn with a time limit for a request's headers and for reading an answer."""

    patience = _PATIENCE
    _header_timer: TimerHandle | None = None
    _write_timer: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._start_timer()

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`; closes the connection if the answer is not read in time."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.patience, self.transport.abort)

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._start_timer()
        elif self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _start_timer(self) -> None:
        """Start the time limit of a request; later bytes do not restart it."""
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(self.patience, self.transport.close)


async def _respond(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/problem+json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *_HEADERS]})
    await send({"type": "http.response.body", "body": body})
