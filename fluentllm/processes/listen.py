"""The public socket: bound by the supervisor before anything long begins, inherited by every front end that it starts."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING

from fluentllm.core.errors import ConfigError

if TYPE_CHECKING:
    from fluentllm.core.settings import ServerSettings

BACKLOG = 2048
"""Connections that wait while a front end starts."""


def bind(server: ServerSettings) -> socket.socket:
    """A socket bound to `server.host`, `server.port`; `listen` makes it take connections. Raises `ConfigError`."""
    host, port = server.host, server.port
    if not host:  # to the system this is every network: too much for a variable that was left empty
        raise ConfigError(
            "server.host is empty.",
            fix="Use 127.0.0.1 for this machine only, 0.0.0.0 for every network.",
            param="server.host",
        )
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(
            f"server.host is {host!r}, which is no address of this machine: {error}.",
            fix="Use 127.0.0.1 for this machine only, 0.0.0.0 for every network.",
            param="server.host",
        ) from None
    public = socket.socket(family, kind, protocol)
    try:
        public.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        public.bind(address)
    except OSError as error:
        public.close()
        raise _explained(error, host, port) from None
    return public


def listen(public: socket.socket, server: ServerSettings) -> None:
    """Take connections from now on; they wait until a front end accepts them. Raises `ConfigError`."""
    try:
        public.listen(BACKLOG)
    except OSError as error:
        raise _explained(error, server.host, server.port) from None
    public.setblocking(False)


def url_of(public: socket.socket) -> str:
    """What to type into a browser on this machine."""
    host, port = public.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _explained(error: OSError, host: str, port: int) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        other = port + 1 if port < 65535 else 8000
        return ConfigError(
            f"server.port is {port}, but another program listens on {host}:{port} already.",
            fix=f"Stop it, or choose another port: `--port {other}`, or `--port 0` for a free one.",
            param="server.port",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        other = port + 1 if port < 65535 else 8000
        return ConfigError(
            f"server.port is {port}, but this user may not listen on it: {error.strerror}.",
            fix="Use a port from 1024 up, such as `--port 8000`.",
            param="server.port",
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return ConfigError(
            f"server.host is {host!r}, which is no address of this machine.",
            fix="Use 127.0.0.1 for this machine only, 0.0.0.0 for every network.",
            param="server.host",
        )
    return ConfigError(f"Cannot listen on {host}:{port}: {error.strerror}.", fix="Choose another server.host or server.port.")
