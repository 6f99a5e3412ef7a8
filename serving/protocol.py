"""HTTP/1.1 as uvicorn speaks it, where a client breaks its rules: one line in the log, and no answer is torn."""

from __future__ import annotations

import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from twinloop.serving.errors import error_body

_BODY = json.dumps(error_body(400, "this is not a valid HTTP request")).encode()
_NOT_HTTP = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_BODY), _BODY)
)


class Protocol(H11Protocol):
    """One connection.

    Written for uvicorn 0.54 and h11 0.16. There, what follows a last request on a connection, and a body that breaks
    off after its answer has begun, end in an exception of h11 (26 to 80 lines in the log) or in a second answer within
    the first.
    """

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
