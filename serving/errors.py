"""Every error of the HTTP interface in one form, OpenAI's: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from twinloop.common.errors import UserError
from twinloop.serving.engine.sampling import ConstraintError
from twinloop.serving.engine.scheduler import QueueFullError
from twinloop.serving.generation import GivenUpError
from twinloop.serving.knowledge.documents import DocumentError, DocumentStoreError

log = logging.getLogger(__name__)

RETRY_AFTER_S = 1

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "invalid_request_error", 503: "server_error"}


_WORDS = {
    "missing": "is required",
    "extra_forbidden": "is not a field of this request",
    "string_unicode": "holds characters that are not valid Unicode",
}


class ApiError(HTTPException):
    """An error with a status, a message in plain words, and OpenAI's `code` and `param`."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None):
        super().__init__(status, message)
        self.code = code
        self.param = param


def error_body(status: int, message: str, *, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The JSON object that describes an error."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def constraint_body(error: ConstraintError) -> dict[str, Any]:
    """The error object for an answer that cannot have the form that was asked for."""
    return error_body(400, f"response_format: {error}", param="response_format")


def describe_validation(errors: Sequence[Any], descriptions: Mapping[str, str]) -> tuple[str, str | None]:
    """What is wrong with a request, in one line, and the first field that is.

    `errors` are pydantic's; `descriptions` explain a field, by its path (`field_descriptions`). What the caller
    sent is not repeated, since it may hold a customer's words.
    """
    lines, first = [], None
    for error in errors[:5]:
        location = error["loc"][1:] if error["loc"][:1] == ("body",) else error["loc"]
        place = ".".join(map(str, location))
        first = first or place or None
        if error["type"] == "json_invalid":
            lines.append("the body is not JSON")
            continue
        description = descriptions.get(".".join(part for part in location if isinstance(part, str)))
        words = _WORDS.get(error["type"])
        if words is None and error["type"] == "string_pattern_mismatch" and description:
            words = f"must be {description}"  # nobody reads a regular expression
        elif words is None:
            said = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
            words = said[:1].lower() + said[1:] + (f" ({description})" if description else "")
        lines.append(f"{place or 'body'}: {words}")
    return "; ".join(lines), first


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


def install(app: FastAPI, descriptions: Mapping[str, str]) -> None:
    """Answer every exception in the one form. `descriptions`: of the fields of requests, see `describe_validation`.

    A UserError speaks to whoever runs the server, and may name its files: it goes to the log, and the client gets a
    reason that was written for clients.
    """

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        message, param = describe_validation(error.errors(), descriptions)
        status = 400 if request.url.path.startswith("/v1/chat/") else 422
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

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(GivenUpError)
    async def given_up(request: Request, error: GivenUpError) -> JSONResponse:
        return JSONResponse(error_body(503, "the answer was given up before its end; ask again"), 503)

    @app.exception_handler(ConstraintError)
    async def formless(request: Request, error: ConstraintError) -> JSONResponse:
        return JSONResponse(constraint_body(error), 400)

    @app.exception_handler(QueueFullError)
    async def full(request: Request, error: QueueFullError) -> JSONResponse:
        body = error_body(503, "the server's queue is full; try again soon", code="queue_full")
        return JSONResponse(body, 503, headers={"Retry-After": str(RETRY_AFTER_S)})

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: StarletteHTTPException) -> JSONResponse:
        code, param = getattr(error, "code", None), getattr(error, "param", None)
        return JSONResponse(
            error_body(error.status_code, str(error.detail), code=code, param=param),
            error.status_code,
            headers=error.headers,
        )

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(500, f"internal error ({type(error).__name__}); see the server's log"), 500)
