"""The end of a server: what it has begun is answered, what comes meanwhile is told to come back, and then it ends."""

from __future__ import annotations

import socket
import time
from types import FrameType

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from twinloop.serving.errors import stopping
from twinloop.serving.listener import BACKLOG

ACCEPTED_AT_ONCE = 1
"""Connections, before a server does anything else: of several processes at one socket those that have time take more.

asyncio accepts as many as its backlog says, and sets the socket's to the same; `DrainingServer` sets that one back."""


class Draining:
    """The application, which refuses requests from `begin` on and knows how many others it still answers."""

    def __init__(self, app: ASGIApp):
        self.app = app
        self.begun_at: float | None = None
        self.running = 0

    def begin(self) -> None:
        self.begun_at = self.begun_at or time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.begun_at is not None:
            await stopping()(scope, receive, send)
            return
        self.running += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.running -= 1


class DrainingServer(uvicorn.Server):
    """Listens on at a signal until all running requests are answered, or its configuration's time for shutting down is
    over, or a second signal comes; then it ends those that are left. Written for uvicorn 0.54."""

    def __init__(self, config: uvicorn.Config, draining: Draining):
        config.backlog = ACCEPTED_AT_ONCE
        super().__init__(config)
        self._draining = draining

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining.begun_at is not None:
            self._end_now()
        self._draining.begin()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)

    async def on_tick(self, counter: int) -> bool:
        begun_at = self._draining.begun_at
        if begun_at is not None:
            if time.monotonic() - begun_at > (self.config.timeout_graceful_shutdown or 0):
                self._end_now()
            self.should_exit = self.should_exit or not self._draining.running
        return await super().on_tick(counter)

    def _end_now(self) -> None:
        self.config.timeout_graceful_shutdown = 0
        self.should_exit = True
