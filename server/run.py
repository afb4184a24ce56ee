"""Startup of `wherefrom serve`: bind, register the server in a discovery file, and stop gracefully."""

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import uvicorn

from ..client import Client
from ..remote import Served, announce
from ..store.errors import NotFoundError, UsageError
from .app import create_app

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})
_MOST_CONNECTIONS = 512
_GRACE = 10


def named(paths: list[str]) -> dict[str, Path]:
    """Names of indexes: NAME=PATH, or the directory's name without its ending.

    Raises:
        UsageError: two have the same name, or one has none.
    """
    indexes: dict[str, Path] = {}
    for argument in paths:
        name, equals, path = argument.partition("=")
        index = Path(path if equals and "/" not in name else argument)
        name = name if equals and "/" not in name else index.resolve().stem
        if not name or name in indexes:
            raise UsageError(f"two indexes are called {name!r}; name them: NAME={index}" if name else f"{argument!r} names no index")
        indexes[name] = index
    return indexes


def read_token(file: str | None) -> str | None:
    """Read the token in a file.

    Raises:
        NotFoundError: there is no such file.
        UsageError: it does not contain one token of at least 16 visible ASCII characters.
    """
    if file is None:
        return None
    if not Path(file).is_file():
        raise NotFoundError(f"there is no token file {file}")
    token = Path(file).read_text(encoding="utf-8", errors="replace").strip()
    if len(token) < 16 or not all(33 <= ord(c) < 127 for c in token):
        raise UsageError(f"{file} must contain one token of at least 16 visible ASCII characters")
    return token


def serve(clients: Mapping[str, Client], host: str, port: int, token: str | None, batch: int) -> None:
    """Serve until a signal.

    Raises:
        UsageError: the address is not available, or is reachable from other machines without a token.
    """
    if host not in _LOOPBACK and token is None:
        raise UsageError(f"{host} can be reached from elsewhere; give `token_file`, or use 127.0.0.1")
    hosts = _LOOPBACK if host in _LOOPBACK else None
    config = uvicorn.Config(
        create_app(clients, token=token, hosts=hosts, batch=batch),
        host=host,
        port=port,
        log_level="error",
        ws="none",
        access_log=False,
        server_header=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=_GRACE,
        lifespan="on",
    )
    try:
        socket = config.bind_socket()
    except (SystemExit, OSError) as error:
        raise UsageError(f"cannot listen on {host}:{port} (is something else there?); choose another `port`, or 0 for any") from error
    socket.listen(_MOST_CONNECTIONS)  # before the discovery file is written, so that its readers can connect
    url = f"http://{host if ':' not in host else f'[{host}]'}:{socket.getsockname()[1]}"
    served = Served(url, os.getpid(), token, {name: str(client.index.path.resolve()) for name, client in clients.items()})
    discovery_file: Path | None = None
    try:
        discovery_file = announce(served)
    except OSError as error:
        sys.stderr.write(f"commands will not find this server by themselves ({error}); set WHEREFROM_URL\n")
    sys.stderr.write(f"serving {', '.join(clients)} at {url} (stop with Ctrl-C)\n")
    sys.stderr.flush()

    def leave(*_: object) -> None:
        """Exit without waiting for threads: uvicorn passes signals on after its last answer or the grace period."""
        if discovery_file is not None:
            discovery_file.unlink(missing_ok=True)
        os._exit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    try:
        uvicorn.Server(config).run(sockets=[socket])
    finally:
        if discovery_file is not None:
            discovery_file.unlink(missing_ok=True)
