"""The socket at which a server listens, and how long it goes on once it must stop."""

from __future__ import annotations

import socket

from twinloop.common.errors import UserError

BACKLOG = 1024
"""Connections that wait until a server accepts them."""
SHUTDOWN_S = 10
"""How long running requests may take to end after SIGTERM."""


def listen(host: str, port: int) -> socket.socket:
    """Port 0 takes any free one. Raises UserError for an address that cannot be had."""
    if not 0 <= port <= 65535:  # the system would take the rest of a division by 65536
        raise UserError(f"{host}:{port}: not a port; choose a --port between 0 and 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # With its protocol named, asyncio sends small answers at once; else each waits 40 ms for a delayed ACK.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except OSError as error:
        raise UserError(f"{host}:{port}: not an address to serve at ({error}); try --host 127.0.0.1") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise UserError(f"{host}:{port}: cannot be served at ({error.strerror}); choose another --port") from None
    return listener


def address_of(host: str, listener: socket.socket) -> str:
    """What a client asks, where the socket listens at this host."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"
