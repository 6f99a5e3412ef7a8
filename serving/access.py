"""Who may ask: the names that a server on loopback answers to, and who is an administrator.

Headers are judged as they were sent. A framework puts the server's own address where it cannot parse a Host header,
and then a request from anywhere would look like one from here.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
from collections.abc import Callable, Sequence

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers as StarletteHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from twinloop.common.errors import UserError
from twinloop.serving.errors import ApiError, error_body

Headers = Sequence[tuple[bytes, bytes]]
"""Names in lower case, and values, as ASGI has them."""

_HOST = re.compile(rb"(?:\[([0-9a-f.]*:[0-9a-f:.]*)\]|([0-9a-z.]+))(?::([0-9]{1,5}))?", re.IGNORECASE)
_ORIGIN = re.compile(rb"http://" + _HOST.pattern, re.IGNORECASE)

_PROXY_HEADER = re.compile(
    rb"via|(?:.*[-_])?forwarded.*|(?:cf|cdn|fastly|akamai|ngrok|tailscale)-.*|front-end-https|max-forwards"
    rb"|x-(?:akamai|amzn|arr|azure|cloud-trace|envoy|haproxy|host|nginx|original|port|proxy|real|remote|rewrite|scheme"
    rb"|ssl|traefik|varnish|vercel).*"
    rb"|(?:.*-)?(?:client|real|connecting|originating|user|socket)-?ip(?:v6)?|(?:remote|client)-addr"
)
"""What proxies and content networks add: the standard's own, X-Forwarded-*, CF-*, and each `…-Client-IP`."""


def is_this_machine(host: str) -> bool:
    """Whether a host name or an address, without a port, is the loopback interface's."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_for_this_machine(headers: Headers) -> bool:
    """Whether a request names one host, and that is this machine. Any port will do: it may have come by a tunnel."""
    hosts = _values(headers, b"host")
    match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
    return match is not None and is_this_machine((match[1] or match[2]).decode("ascii"))


def are_of_own_origin(headers: Headers) -> bool:
    """Whether each page that asks, if one does, is at this machine and at the port that it asks."""
    asked = _HOST.fullmatch(_values(headers, b"host")[0])
    pages = [_ORIGIN.fullmatch(origin) for origin in _values(headers, b"origin")]
    return asked is not None and all(
        page is not None and is_this_machine((page[1] or page[2]).decode("ascii")) and page[3] == asked[3]
        for page in pages
    )


class OwnHostsOnly:
    """Refuse requests for other hosts: a web page whose name was pointed at 127.0.0.1 must not read from here."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_for_this_machine(scope["headers"]):
            await JSONResponse(error_body(403, _FOREIGN_HOST), 403)(scope, receive, send)
            return
        await self.app(scope, receive, send)


_FOREIGN_HOST = (
    "this server answers to its own machine's names only, such as 127.0.0.1 and localhost; "
    "to serve other names through a proxy, start it with TWINLOOP_ADMIN_TOKEN"
)


class OtherOrigins(CORSMiddleware):
    """Let pages of these origins ask, as browsers want it said (CORS). Without it no page but the console can.

    It opens nothing that a program could not reach: who is an administrator is asked as everywhere.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]):
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("GET", "POST", "PUT"),
            allow_headers=("*",),
            expose_headers=("Retry-After",),
            allow_private_network=True,
        )

    def preflight_response(self, request_headers: StarletteHeaders) -> Response:
        response = super().preflight_response(request_headers)
        headers = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        if response.status_code == 200:
            return Response(status_code=204, headers=headers)
        words = "pages of this origin may not ask so here; `twinloop serve --cors-origin` opens it to an origin"
        return JSONResponse(error_body(403, words), 403, headers=headers)


_WEB_ORIGIN = re.compile(r"(https?)://([0-9a-z.-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?")


def origin(text: str) -> str:
    """The origin of a web page, as browsers name it. Raises UserError for what is none."""
    match = _WEB_ORIGIN.fullmatch(text.strip().lower())
    if match is None:
        raise UserError(
            f"--cors-origin {text}: not an origin, which is a scheme, a host and a port if it is not the usual one, "
            "such as https://shop.example or http://localhost:3000"
        )
    scheme, host, port = match.groups()
    usual = {"http": "80", "https": "443"}[scheme]
    return f"{scheme}://{host}" + (f":{port}" if port not in (None, usual) else "")


def administrators_only(token: str | None, local_admin: bool) -> Callable[[Request], None]:
    """A dependency that refuses everybody but an administrator. See `create_app` for who that is."""

    def check(request: Request) -> None:
        headers = request.scope["headers"]
        if token is not None:
            if not has_token(headers, token):
                words = "this needs the administrator's token: Authorization: Bearer <token>"
                raise ApiError(401, words, headers={"WWW-Authenticate": "Bearer"})
        elif not (local_admin and _comes_from_here(request)):
            raise ApiError(
                403,
                "this is open to the server's own machine only; "
                "to open it to an administrator elsewhere, start the server with TWINLOOP_ADMIN_TOKEN",
            )

    return check


def has_token(headers: Headers, token: str) -> bool:
    """Whether a request has this bearer token."""
    scheme, credentials = authorization(headers)
    wanted = token.encode(errors="surrogateescape")  # the bytes that the environment held
    return secrets.compare_digest(credentials, wanted) and scheme == b"bearer"


def authorization(headers: Headers) -> tuple[bytes, bytes]:
    """The scheme, in lower case, and the credentials of a request; both empty where it has none, or several."""
    given = _values(headers, b"authorization")
    scheme, _, credentials = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
    return scheme.lower(), credentials.strip(b" ")


def _comes_from_here(request: Request) -> bool:
    """Whether a request shows no sign of coming from another machine, or from a web page that is not our console."""
    headers: Headers = request.scope["headers"]
    return (
        request.client is not None
        and is_this_machine(request.client.host)
        and is_for_this_machine(headers)
        and not any(_PROXY_HEADER.fullmatch(name) for name, _ in headers)
        and _is_of_own_page(headers)
    )


def _is_of_own_page(headers: Headers) -> bool:
    """Whether the page that asks, as a browser reports it, is ours; true where no page does.

    A page on another port of this machine is foreign too.
    """
    own = b"http://" + _values(headers, b"host")[0].lower()
    return all(origin == own for origin in _values(headers, b"origin")) and all(
        site in (b"same-origin", b"none") for site in _values(headers, b"sec-fetch-site")
    )


def _values(headers: Headers, name: bytes) -> list[bytes]:
    return [value for key, value in headers if key == name]
