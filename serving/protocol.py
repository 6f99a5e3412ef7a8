"""HTTP/1.1 as uvicorn speaks it, where a client breaks its rules: one line in the log, and no answer is torn; and where
a client is slow: no connection is held for ever."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from twinloop.serving.errors import error_body

HEAD_S = 10.0
"""How long a connection may be without a request whose head is complete, from its beginning or from the last answer.
One that sends nothing more after an answer is closed earlier, by uvicorn's own limit of 5 s."""

ABORT_AFTER = "twinloop.abort_after"
"""An extension of ASGI, `abort_after(seconds)`: the connection is aborted then, unless the answer to its request has
been sent to the last byte. A `send` that waits for a client that does not read ends with it."""

_BODY = json.dumps(error_body(400, "this is not a valid HTTP request")).encode()
_NOT_HTTP = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_BODY), _BODY)
)


class Protocol(H11Protocol):
    """One connection.

    Written for uvicorn 0.54 and h11 0.16. There, what follows a last request on a connection, and a body that breaks
    off after its answer has begun, end in an exception of h11 (26 to 80 lines in the log) or in a second answer within
    the first. It closes an idle connection only once it has had an answer and as long as nothing more has come, and
    waits without end until a client has read what it was sent.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ):
        super().__init__(config, server_state, app_state, _loop)
        self.app = self._with_abort_after(self.app)
        self._head_limit: asyncio.TimerHandle | None = None
        self._answer_limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for limit in (self._head_limit, self._answer_limit):
            if limit is not None:
                limit.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._await_head()  # first: the next request may be there already
        super().on_response_complete()

    def _await_head(self) -> None:
        if self._head_limit is not None:
            self._head_limit.cancel()
        self._head_limit = self.loop.call_later(HEAD_S, self._head_is_late)

    def _head_is_late(self) -> None:
        answered = self.cycle is None or self.cycle.response_complete
        if answered and not self.transport.get_write_buffer_size():  # an answer that is still read has its own limit
            self.transport.abort()

    def _with_abort_after(self, app: ASGIApp) -> ASGIApp:
        async def extended(scope: Scope, receive: Receive, send: Send) -> None:
            scope["extensions"] = {ABORT_AFTER: self._abort_after}
            await app(scope, receive, send)

        return extended

    def _abort_after(self, seconds: float) -> None:
        if self._answer_limit is not None:
            self._answer_limit.cancel()
        self._answer_limit = self.loop.call_later(seconds, self._answer_is_late)

    def _answer_is_late(self) -> None:
        if not self.cycle.response_complete or self.transport.get_write_buffer_size():
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        # After a request that asked to close, or that was malformed, nothing on this connection is a request.
        if self.conn.their_state not in (h11.MUST_CLOSE, h11.CLOSED, h11.ERROR):
            super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        """Answer what is malformed, unless an answer has begun: that one goes on, and h11 has it end the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            if self.cycle is not None:  # its request will never be complete
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            self.transport.write(_NOT_HTTP)
            self.transport.close()
        elif self.cycle.response_complete:
            self.transport.close()

    def _should_upgrade(self) -> bool:
        """Never: a request to upgrade is answered as any other one (RFC 9110, 7.8)."""
        return False
