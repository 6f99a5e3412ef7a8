"""What surrounds every request: its admission, the limits of its body and time, its count, and an answer where the
server ends before it."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from contextlib import suppress

import anyio
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twinloop.domains.documents import MAX_TEXT_CHARACTERS
from twinloop.serving.errors import ApiError, error_body, queue_full, stopping
from twinloop.serving.metrics import ASKED, Metrics
from twinloop.serving.protocol import ABORT_AFTER

MAX_BODY_BYTES = 12 * MAX_TEXT_CHARACTERS + 64 * 1024
"""The longest document that data may bring must fit, however JSON writes it: an escaped pair of surrogates has 12."""

REST_S = 5.0
"""How long the rest of a body is read once it is answered."""
REST_PIECE_S = 1.0
"""How long its next piece is waited for."""


class LimitBody:
    """Refuse bodies over MAX_BODY_BYTES before they are read, or in the middle where their length was not said."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > MAX_BODY_BYTES:
            await _too_large()(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                raise ApiError(413, _TOO_LARGE)
            return message

        await self.app(scope, counted, send)


_TOO_LARGE = f"the body is too large; at most {MAX_BODY_BYTES} bytes are read"


def _too_large() -> JSONResponse:
    return JSONResponse(error_body(413, _TOO_LARGE), 413, headers={"Connection": "close"})


class RefuseWhenFull:
    """Refuse requests to the model that have no place in its queue, before anything of them is read or looked up.

    full: whether there is none. A place is taken later, so that one of several that race may still find none.
    """

    def __init__(self, app: ASGIApp, full: Callable[[], bool]):
        self.app = app
        self.full = full

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in ASKED and self.full():
            await queue_full()(scope, receive, send)
            return
        await self.app(scope, receive, send)


LAST_S = REST_S + REST_PIECE_S
"""How long the end of a request that is given up may take: a client has to read why, and may still send its body."""


CLIENT_TIMEOUTS = {b"x-stainless-read-timeout": 0.0, b"x-stainless-timeout": 1.0}
"""Headers in which OpenAI's clients say how many seconds they wait, and how many more it may be: that for Python says
what it was set to, that for JavaScript leaves the fraction out."""


class Deadline:
    """Give up requests that take longer, from their head to their answer's last byte: a body that comes too slowly, a
    place in the queue, an answer. What the model still wrote for them is cancelled. A client that does not read loses
    its connection LAST_S later.

    Requests to the model are also given up when their client does not wait any longer (CLIENT_TIMEOUTS). As in the
    client itself, its time begins anew with each piece of an answer: it may be shorter than a stream."""

    def __init__(self, app: ASGIApp, seconds: float):
        self.app = app
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started: Message | None = None
        patience_s, end = _patience(scope), anyio.current_time() + self.seconds

        async def sent(message: Message) -> None:
            nonlocal started
            started = started or message
            limit.deadline = end  # while the client reads slowly, it does not wait
            await send(message)
            limit.deadline = min(end, anyio.current_time() + patience_s)

        if (abort_after := scope.get("extensions", {}).get(ABORT_AFTER)) is not None:
            abort_after(self.seconds + LAST_S)
        with anyio.move_on_after(min(self.seconds, patience_s)) as limit:
            await self.app(scope, receive, sent)
        if not limit.cancelled_caught:
            return
        if limit.deadline < end:
            words = f"nothing could be sent for {patience_s:g} s, and the client waits no longer, by its own time-out"
        else:
            words = f"the request took longer than {self.seconds:g} s, which is this server's limit"
        body = error_body(504, words, code="deadline_exceeded")
        if started is None:
            await JSONResponse(body, 504, headers={"Connection": "close"})(scope, receive, send)
        elif (b"content-type", b"text/event-stream; charset=utf-8") in started["headers"]:
            event = f"data: {json.dumps(body)}\n\n".encode()
            await send({"type": "http.response.body", "body": event, "more_body": False})


def _patience(scope: Scope) -> float:
    """For how many seconds the client of a request to the model waits; where it does not say so, without end."""
    if scope["type"] != "http" or scope["path"] not in ASKED:
        return math.inf
    said = [_seconds(value) + CLIENT_TIMEOUTS[name] for name, value in scope["headers"] if name in CLIENT_TIMEOUTS]
    return min(said, default=math.inf)


def _seconds(value: bytes) -> float:
    """What a header says. Without end where that is no time: others than the client may have written it."""
    try:
        seconds = float(value)
    except ValueError:
        return math.inf
    return seconds if seconds > 0 else math.inf


class CountRequests:
    """Count answers, and clients that left before, by route: not by path, so that no client can invent new series."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        gone = started = complete = False

        def route() -> str:
            refused_before: str = scope["path"] if scope["path"] in ASKED else "none"
            path: str = getattr(scope.get("route"), "path", refused_before)
            return path

        async def received() -> Message:
            nonlocal gone
            message = await receive()
            if message["type"] == "http.disconnect" and not (gone or complete):
                gone = True
                self.metrics.clients_gone.labels(route()).inc()
            return message

        async def counted(message: Message) -> None:
            nonlocal started, complete
            started = True
            if message["type"] == "http.response.start" and not gone:
                self.metrics.requests.labels(route(), str(message["status"])).inc()
            complete = complete or (message["type"] == "http.response.body" and not message.get("more_body", False))
            await send(message)

        try:
            await self.app(scope, received, counted)
        except Exception:  # whoever is around this one answers it with a 500
            if not (gone or started):
                self.metrics.requests.labels(route(), "500").inc()
            raise


class ReadRest:
    """Read what a client still sends of a body that was answered before it was there: closed with bytes unread, a
    connection is reset, which takes the answer with it. The answer itself does not wait."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _body_follows(scope):
            await self.app(scope, receive, send)
            return
        read = held = False

        async def received() -> Message:
            nonlocal read
            message = await receive()
            read = message["type"] == "http.disconnect" or not message.get("more_body", False)
            return message

        async def sent(message: Message) -> None:
            nonlocal held
            held = message["type"] == "http.response.body" and not message.get("more_body", False) and not read
            await send({**message, "more_body": True} if held else message)

        await self.app(scope, received, sent)
        if held:
            until = anyio.current_time() + REST_S
            # A server that ends cancels its requests, and this one is answered.
            with suppress(asyncio.CancelledError), anyio.CancelScope() as limit:
                while not read:
                    limit.deadline = min(until, anyio.current_time() + REST_PIECE_S)
                    await received()
            await send({"type": "http.response.body"})


def _body_follows(scope: Scope) -> bool:
    """Whether a client may send one. Who expects a 100 may too: it has had one, or did not wait for it."""
    names = {name for name, value in scope["headers"] if value != b"0"}
    return bool(names & {b"content-length", b"transfer-encoding"})


class AnswerHead:
    """HEAD as GET: the server itself sends no body then."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # a copy: the server looks at its own
        await self.app(scope, receive, send)


class AnswerAtTheEnd:
    """Answer requests that are cancelled, which uvicorn does to those that outlast the time for shutting down."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def sent(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, sent)
        except asyncio.CancelledError:
            if scope["type"] != "http":
                raise
            if not started:
                await stopping()(scope, receive, send)
