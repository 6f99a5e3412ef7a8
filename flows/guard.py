"""What protects the servers of `make up` and of a run: this machine's names, their own pages, the project's secret.

Whoever may ask Prefect's server runs code as the operator, and MLflow's reads and writes files as the operator where an
experiment's location is. Neither has a setting for all of this (Prefect 3.8, MLflow 3.17).
"""

from __future__ import annotations

import base64
import binascii
import secrets

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from twinloop.serving.access import Headers, are_of_own_origin, is_for_this_machine

OPEN_PATHS = ("/health",)
"""What `make up` asks to see whether a server is ready."""


class ThisMachineOnly:
    """Refuses requests under a foreign host name, and those that a page of another origin makes: also where a browser
    would not let that page read the answer. policy: what the server's own pages may load, as a Content-Security-Policy;
    None leaves it to them."""

    def __init__(self, app: ASGIApp, *, policy: str | None = None):
        self.app = app
        self.policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start" and self.policy:
                policy = (b"content-security-policy", self.policy.encode())
                message["headers"] = [*message.get("headers", ()), policy]
            await send(message)

        headers = scope["headers"]
        if is_for_this_machine(headers) and are_of_own_origin(headers):
            await self.app(scope, receive, send_with_policy)
        else:
            text = "this server answers requests under this machine's own names and from its own pages only"
            await _refuse(scope, receive, send, PlainTextResponse(text, 403))


class WithSecret:
    """Asks for the project's secret, `user:password`, by HTTP's basic authentication."""

    def __init__(self, app: ASGIApp, secret: str):
        self.app = app
        self.secret = secret.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS or self._is_known(scope["headers"]):
            await self.app(scope, receive, send)
            return
        ask = {"WWW-Authenticate": 'Basic realm="Twinloop: the line in state/prefect.auth"'}
        await _refuse(scope, receive, send, PlainTextResponse("this needs the project's secret", 401, headers=ask))

    def _is_known(self, headers: Headers) -> bool:
        given = [value for name, value in headers if name == b"authorization"]
        scheme, _, credentials = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        try:
            return scheme.lower() == b"basic" and secrets.compare_digest(base64.b64decode(credentials), self.secret)
        except binascii.Error:
            return False


async def _refuse(scope: Scope, receive: Receive, send: Send, answer: PlainTextResponse) -> None:
    if scope["type"] == "websocket":
        await WebSocketClose(1008)(scope, receive, send)
    else:
        await answer(scope, receive, send)
