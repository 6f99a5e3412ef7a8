"""Every error of the HTTP interface in one form, OpenAI's: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Match

from twinloop.common.errors import UserError
from twinloop.serving.engine.sampling import ConstraintError
from twinloop.serving.engine.scheduler import EngineDiedError, QueueFullError, SchedulerClosedError
from twinloop.serving.generation import FormError, GivenUpError
from twinloop.serving.knowledge.documents import DocumentError, DocumentStoreError
from twinloop.serving.worker_process import SupervisorSilentError

log = logging.getLogger(__name__)

SOON = {"Retry-After": "1"}

ENGINE_DIED = "the model's engine has ended with an error, and this server process ends; ask again"

METHODS = ("DELETE", "GET", "PATCH", "POST", "PUT")

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

_WORDS = {
    "missing": "is required",
    "extra_forbidden": "is not a field of this request",
    "string_unicode": "holds characters that are not valid Unicode",
    "none_required": "is not supported; leave it out",
    "model_attributes_type": "should be a JSON object",
    "model_type": "should be a JSON object",
    "dict_type": "should be a JSON object",
}

Code = Literal[
    "context_length_exceeded",
    "deadline_exceeded",
    "empty_prompt",
    "invalid_api_key",
    "model_not_found",
    "queue_full",
    "rate_limit_exceeded",
    "too_many_prompts",
    "unknown_token",
    "unsupported_message",
    "unsupported_parameter",
]

OTHERS_ROUTES = ("/v1/chat/", "/v1/completions", "/v1/classify", "/tokenize", "/detokenize")
"""In the form of OpenAI's and vLLM's, where what is wrong with a request is a 400."""


class ErrorDetail(BaseModel):
    """What went wrong. `param` is the path of a field of the request, such as `messages.0.content`."""

    message: str
    type: Literal[
        "invalid_request_error", "authentication_error", "permission_error", "rate_limit_error", "server_error"
    ]
    param: str | None
    code: Code | None


class ErrorResponse(BaseModel):
    """The body of every answer with a status of 400 or more, as OpenAI's clients read it."""

    error: ErrorDetail


class ApiError(HTTPException):
    """An error with a status, a message in plain words, and OpenAI's `code` and `param`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: Code | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        self.code = code
        self.param = param


def error_body(status: int, message: str, *, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The JSON object that describes an error."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def queue_full() -> JSONResponse:
    """For a request that has no place in the queue."""
    body = error_body(429, "the server's queue is full; try again soon", code="queue_full")
    return JSONResponse(body, 429, headers=SOON)


def stopping() -> JSONResponse:
    """For a request that a server gets, or does not get ready with, while it stops."""
    return JSONResponse(
        error_body(503, "the server is stopping; ask again"), 503, headers=SOON | {"Connection": "close"}
    )


def constraint_body(error: ConstraintError) -> dict[str, Any]:
    """The error object for an answer that cannot have the form that was asked for."""
    param = error.param if isinstance(error, FormError) else "response_format"
    return error_body(400, f"{param}: {error}", code="unsupported_parameter", param=param)


def describe_validation(
    errors: Sequence[Any], descriptions: Mapping[str, str], sent: Any = None
) -> tuple[str, str | None]:
    """What is wrong with a request, in one line, and the path of the first field that is.

    `errors` are pydantic's; `descriptions` explain a field, by its path (`field_descriptions`); `sent` is the request
    as it was read from JSON. What the caller sent is not repeated, since it may hold a customer's words.
    """
    said: dict[tuple[Any, ...], list[str]] = {}
    for error in errors:
        if error["type"] == "json_invalid":
            return "the body is not JSON" + _position(error), None
        in_body = error["loc"][:1] == ("body",)
        place = error["loc"][1:] if in_body else error["loc"]
        if in_body and sent is not None:
            place = _place(place, sent, absent=error["type"] == "missing")
        if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
            place = (*place, error["ctx"]["discriminator"].strip("'"))
        words = _words(error, descriptions.get(".".join(part for part in place if isinstance(part, str))))
        if words not in said.setdefault(place, []):
            said[place].append(words)
    # Of the alternatives of a field, those that the request came further in say more.
    deepest = [place for place in said if not any(other[: len(place)] == place != other for other in said)]
    lines = [f"{'.'.join(map(str, place)) or 'body'}: {', or '.join(said[place])}" for place in deepest]
    return "; ".join(lines[:5]), ".".join(map(str, deepest[0])) or None


def _position(error: Any) -> str:
    place = error["loc"][-1] if error["loc"] else None
    return f" (at character {place + 1})" if isinstance(place, int) else ""


def _place(location: Sequence[Any], sent: Any, *, absent: bool) -> tuple[Any, ...]:
    """The path in what was sent, without the names that pydantic gives to the alternatives of a field.

    absent: the last part of the location is a field that was not sent.
    """
    place: list[Any] = []
    for position, part in enumerate(location):
        is_in = part in sent if isinstance(sent, dict) else isinstance(sent, list) and part in range(len(sent))
        if is_in or (absent and position == len(location) - 1):
            place.append(part)
            sent = sent[part] if is_in else None
    return tuple(place)


def _words(error: Any, description: str | None) -> str:
    """What is wrong with a field, after its name and a colon."""
    if error["type"] == "string_pattern_mismatch" and description:
        return f"must be {description}"  # nobody reads a regular expression
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return f"must be one of {error['ctx']['expected_tags']}" if "expected_tags" in error["ctx"] else "is required"
    if words := _WORDS.get(error["type"]):
        return words
    said = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return str(said[:1].lower() + said[1:] + (f" ({description})" if description else ""))


def field_descriptions(model: type[BaseModel]) -> dict[str, str]:
    """What each field of a request is, by its dotted path, also of the models in it."""
    return dict(_described(model, "", frozenset({model})))


def _described(model: type[BaseModel], prefix: str, above: frozenset[type]) -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        if field.description:
            yield prefix + name, field.description
        for inner in _models_in(field.annotation):
            if inner not in above:  # a model may hold others of its own kind
                yield from _described(inner, f"{prefix}{name}.", above | {inner})


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def allowed_methods(request: Request) -> str:
    """The methods of all routes of a request's path, as the header Allow lists them."""
    found = {method for method in METHODS if any(_takes(route, request, method) for route in request.app.routes)}
    return ", ".join(sorted(found | ({"HEAD"} if "GET" in found else set())))


def _takes(route: BaseRoute, request: Request, method: str) -> bool:
    return route.matches({**request.scope, "method": method})[0] is Match.FULL


def _not_json(content_type: str | None) -> str:
    sent = f"Content-Type {content_type[:80]!r} is not read" if content_type else "the body has no Content-Type"
    return f"{sent}; send JSON, with the header 'Content-Type: application/json' (curl: -H, before -d)"


def install(app: FastAPI, descriptions: Mapping[str, str]) -> None:
    """Answer every exception in the one form. `descriptions`: of the fields of requests, see `describe_validation`.

    A UserError speaks to whoever runs the server, and may name its files: it goes to the log, and the client gets a
    reason that was written for clients.
    """

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        kinds = {each["type"] for each in error.errors()}
        if isinstance(error.body, bytes) and "missing" not in kinds:  # it was not read as JSON
            return JSONResponse(error_body(415, _not_json(request.headers.get("content-type"))), 415)
        message, param = describe_validation(error.errors(), descriptions, error.body)
        status = 400 if "json_invalid" in kinds or request.url.path.startswith(OTHERS_ROUTES) else 422
        return JSONResponse(error_body(status, message, param=param), status)

    @app.exception_handler(DocumentError)
    async def unusable(request: Request, error: DocumentError) -> JSONResponse:
        return JSONResponse(error_body(422, str(error)), 422)

    @app.exception_handler(DocumentStoreError)
    async def unavailable(request: Request, error: DocumentStoreError) -> JSONResponse:
        log.error("%s", error)
        return JSONResponse(error_body(503, error.reason), 503)

    @app.exception_handler(UserError)
    async def mistaken(request: Request, error: UserError) -> JSONResponse:
        log.error("%s", error)
        return JSONResponse(error_body(500, "the server cannot do this; its log gives the reason"), 500)

    @app.exception_handler(SupervisorSilentError)
    async def unknown(request: Request, error: SupervisorSilentError) -> JSONResponse:
        body = error_body(503, "what the server's other processes do is not known now; ask again")
        return JSONResponse(body, 503, headers=SOON)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(GivenUpError)
    async def given_up(request: Request, error: GivenUpError) -> JSONResponse:
        body = error_body(503, "the answer was given up before its end; ask again")
        return JSONResponse(body, 503, headers=SOON)

    @app.exception_handler(ConstraintError)
    async def formless(request: Request, error: ConstraintError) -> JSONResponse:
        return JSONResponse(constraint_body(error), 400)

    @app.exception_handler(QueueFullError)
    async def full(request: Request, error: QueueFullError) -> JSONResponse:
        return queue_full()

    @app.exception_handler(SchedulerClosedError)
    async def closed(request: Request, error: SchedulerClosedError) -> JSONResponse:
        return stopping()

    @app.exception_handler(EngineDiedError)
    async def dead(request: Request, error: EngineDiedError) -> JSONResponse:
        return JSONResponse(error_body(503, ENGINE_DIED), 503, headers=SOON | {"Connection": "close"})

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: StarletteHTTPException) -> JSONResponse:
        status, headers = error.status_code, error.headers
        if isinstance(error, ApiError):
            body = error_body(status, str(error.detail), code=error.code, param=error.param)
            return JSONResponse(body, status, headers=headers)
        if status == 405:
            allowed = allowed_methods(request)
            words = f"{request.method} is not a method of this path; it has {allowed}"
            return JSONResponse(error_body(status, words), status, headers={"Allow": allowed})
        # FastAPI's own words for a body that no JSON parser gets through
        known = {400: "the body is not JSON", 404: "there is nothing at this path; /openapi.json lists what there is"}
        return JSONResponse(error_body(status, known.get(status, str(error.detail))), status, headers=headers)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(500, f"internal error ({type(error).__name__}); see the server's log"), 500)
