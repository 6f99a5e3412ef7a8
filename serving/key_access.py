"""API keys of a server: once a project has one, every route but `/health` and its probes needs one.

Keys come on top of what else is asked (`serving/access.py`): a key makes nobody an administrator, and where this
machine administers without a token, its requests need a key like all others. The administrator's token opens what a key
opens.
"""

from __future__ import annotations

import base64
import binascii
import logging

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from twinloop.common.errors import UserError
from twinloop.serving.access import Headers, authorization, has_token
from twinloop.serving.described import OPEN
from twinloop.serving.errors import SOON, error_body
from twinloop.serving.keys import ApiKey, KeyStore
from twinloop.serving.limits import Account, Accounts

log = logging.getLogger(__name__)

PAGE = "/"
"""The console: browsers ask their user for a key, as a password, and then send it with all that the page asks."""
_ACCOUNT = "twinloop.account"


class RequireKey:
    """Refuse requests without a key, and those beyond their key's limits."""

    def __init__(self, app: ASGIApp, keys: KeyStore, admin_token: str | None, accounts: Accounts):
        self.app = app
        self.keys = keys
        self.admin_token = admin_token
        self.accounts = accounts
        self._reported = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" and scope["path"] not in OPEN else None
        await (refusal or self.app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers: Headers = scope["headers"]
        try:
            if not self.keys.protects:
                return None
            key = self._key(headers)
        except UserError as error:
            return self._unreadable(error)
        if key is None:
            if self.admin_token is not None and has_token(headers, self.admin_token):
                return None
            return _unknown(scope["path"])
        account = self.accounts.of(key)
        if wait_s := account.begin():
            words = f"the key {key.name} has reached its limit; try again in {wait_s} s"
            body = error_body(429, words, code="rate_limit_exceeded")
            return JSONResponse(body, 429, headers={"Retry-After": str(wait_s)})
        scope[_ACCOUNT] = account
        return None

    def _key(self, headers: Headers) -> ApiKey | None:
        scheme, credentials = authorization(headers)
        if scheme == b"basic":
            try:
                credentials = base64.b64decode(credentials, validate=True).partition(b":")[2]
            except binascii.Error:
                return None
        return self.keys.find(credentials) if scheme in (b"bearer", b"basic") else None

    def _unreadable(self, error: UserError) -> JSONResponse:
        """Nobody gets in while it is not known who may."""
        if str(error) != self._reported:
            self._reported = str(error)
            log.error("%s", error)
        return JSONResponse(error_body(503, "the server's keys cannot be read; its log gives the reason"), 503, SOON)


def account_of(request: Request) -> Account | None:
    """Of the key that a request came with."""
    account: Account | None = request.scope.get(_ACCOUNT)
    return account


def _unknown(path: str) -> JSONResponse:
    words = "an API key is needed that this server knows: Authorization: Bearer <key>"
    scheme = 'Basic realm="an API key of Twinloop as the password", charset="UTF-8"' if path == PAGE else "Bearer"
    return JSONResponse(error_body(401, words, code="invalid_api_key"), 401, headers={"WWW-Authenticate": scheme})
