"""Checks of every request before the application, and security headers of every response.

This is plain ASGI, so that a body is only read after the checks of the headers.
"""

import asyncio
import contextlib
import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi.security import HTTPBearer
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..store.errors import StorageError
from .access import Audit, Tokens

_MOST_BYTES = 1 << 20
_LONGEST_DETAIL = 600
_OPEN = ("/", "/docs", "/healthz", "/readyz", "/favicon.ico")
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "content-security-policy": ("default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"),
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
_bearer = HTTPBearer(auto_error=False)


def _is_open(path: str) -> bool:
    """Return True for a path that needs no token."""
    return path in _OPEN or path.startswith("/static/")


def problem(status: int, detail: str, kind: str = "UsageError", headers: Mapping[str, str] | None = None) -> Response:
    """A problem+json response (RFC 9457); `kind` is the error that a client raises."""
    content = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail if len(detail) <= _LONGEST_DETAIL else f"{detail[:_LONGEST_DETAIL]} ...",
        "kind": kind,
    }
    waiting = {"retry-after": "1"} if status == 503 else {}
    return Response(json.dumps(content), status, {**waiting, **(headers or {})}, "application/problem+json")


class Guard:
    """ASGI wrapper of the application.

    Args:
        tokens: bearer tokens, one of which is required except for the explorer's files and the health checks, if there are any.
        audit: log of the requests for which a token would be required; None for no log.
        body_timeout: time limit (seconds) for receiving a body.
    """

    def __init__(self, app: ASGIApp, tokens: Tokens, audit: Audit | None, body_timeout: float) -> None:
        self._app = app
        self._tokens = tokens
        self._audit = audit
        self._body_timeout = body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False
        is_withheld = False

        async def secured(message: Message) -> None:
            nonlocal started, is_withheld
            if message["type"] == "http.response.start":
                started = True
                try:
                    self._log(scope, message["status"])
                except StorageError as error:
                    is_withheld = True
                    await problem(503, str(error), "StorageError", _HEADERS)(scope, receive, send)
                MutableHeaders(scope=message).update(_HEADERS)
            if not is_withheld:
                await send(message)

        request = Request(scope, receive)
        try:
            await self._check(request)
            await self._answer(request, await self._body(request), secured)
        except HTTPException as error:
            headers = {"connection": "close", **(error.headers or {})}
            await problem(error.status_code, error.detail, headers=headers)(scope, receive, secured)
        except asyncio.CancelledError:  # the server's grace period is over
            if not started:
                await problem(503, "the server is stopping; ask again later", "BusyError")(scope, receive, secured)

    def _log(self, scope: Scope, status: int) -> None:
        if self._audit is not None and not _is_open(scope["path"]):
            details = scope.get("wherefrom.asked", {})
            self._audit.add(scope.get("wherefrom.access"), scope["method"], scope["path"], status, details)

    async def _check(self, request: Request) -> None:
        is_open = _is_open(request.scope["path"])
        given = await _bearer(request)
        access = self._tokens.access(None if given is None else given.credentials)
        if not is_open:
            request.scope["wherefrom.access"] = access
        # A page of another origin could send a query and learn from the response time.
        if not is_open and request.headers.get("sec-fetch-site", "").lower() in ("cross-site", "same-site"):
            raise HTTPException(403, "a page of another address cannot use this server; use the explorer, or a program")
        if int(request.headers.get("content-length", 0)) > _MOST_BYTES:
            raise HTTPException(413, f"at most {_MOST_BYTES:,} bytes are read")
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if request.method == "POST" and kind != "application/json":
            raise HTTPException(415, "the body must be JSON, with the header Content-Type: application/json")
        if not is_open and access is None:
            raise HTTPException(401, "a bearer token is required: Authorization: Bearer TOKEN", {"www-authenticate": "Bearer"})

    async def _body(self, request: Request) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(self._body_timeout):
                async for part in request.stream():
                    body += part
                    if len(body) > _MOST_BYTES:
                        raise HTTPException(413, f"at most {_MOST_BYTES:,} bytes are read")
        except TimeoutError:
            raise HTTPException(408, "the request did not come to its end") from None
        except ClientDisconnect:
            raise HTTPException(400, "the request was broken off") from None
        return bytes(body)

    async def _answer(self, request: Request, body: bytes, send: Send) -> None:
        """Let the application answer, unless the client disconnects."""
        disconnect = asyncio.ensure_future(request.receive())
        messages: list[Message] = [{"type": "http.request", "body": body}]

        async def replay() -> Any:
            return messages.pop() if messages else await asyncio.shield(disconnect)

        work = asyncio.ensure_future(self._app(request.scope, replay, send))
        try:
            await asyncio.wait({work, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():  # the client disconnected
                work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
        finally:
            disconnect.cancel()
            work.cancel()
