"""What /openapi.json says beyond the routes' own models: every status of a route, and the domain's schemas.

The description is tested against the server (`tests/serving/test_openapi.py`): what a route gains, it has to say here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Request
from fastapi.security import HTTPBearer
from pydantic import BaseModel, WithJsonSchema, create_model

from twinloop.domains.domain import Domain
from twinloop.serving.decisions import DecisionResponse
from twinloop.serving.errors import ErrorResponse

DESCRIPTION = """\
Every answer with a status of 400 or more has the body `ErrorResponse`. A method that a path does not have gets a 405,
whose header `Allow` names those that it has; `HEAD` is answered wherever `GET` is. `OPTIONS` is answered only to pages
of the origins that the server was started with (`twinloop serve --cors-origin`), and otherwise is such a 405. Whatever
breaks HTTP itself gets a 400. Where `twinloop keys` has made API keys, every route but `/health` and its probes needs
one, as `Authorization: Bearer <key>`, or the administrator's token.
"""

DEFINITIONS = "#/$defs/"
COMPONENT = "Decision."
"""Before the name of a definition of the answer's schema: a model of the request may have the same one."""

_HEADERS = {
    401: {"WWW-Authenticate": {"description": "Bearer", "schema": {"type": "string"}, "required": True}},
    429: {"Retry-After": {"description": "seconds", "schema": {"type": "string"}, "required": True}},
}
_WORDS = {
    400: "The body is not JSON, or the HTTP is malformed",
    401: "The administrator's token, or the API key, is missing or wrong",
    403: "Not open to who asks: another machine, another host name, or a web page of another origin",
    404: "There is no such thing",
    409: "It cannot be done as things are; the message says why",
    413: "The body is too large",
    415: "The body's Content-Type is not JSON's",
    422: "The request is JSON, and not what is asked for here; `param` names the field. Integers are written without a "
    "fraction: 12, not 12.0",
    429: "The queue is full, or the API key has reached its limit; `Retry-After` says when to come back",
    500: "The server failed; its log gives the reason",
    503: "The server cannot answer now: it is stopping (`Retry-After`), or its documents or its keys cannot be read",
    504: "It took longer than requests may take here",
}
EVERYWHERE = (400, 403, 413, 500, 503, 504)
"""Of every route: a request may have a body too large, be for a foreign host, come too slowly, or while the server
stops."""
WITH_BODY = (415, 422)
HEALTH, LIVE, READY = "/health", "/health/live", "/health/ready"
OPEN = {HEALTH, LIVE, READY}
"""The routes that need no API key."""
KEY = (401, 429)
"""Of every other route, where the server has API keys."""
ASKING = (415, 429)
"""Of the routes at which the model is asked."""


def errors(*more: int, words: Mapping[int, str] | None = None) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route: the errors of every route and these. words: descriptions of its own."""
    described = _WORDS | dict(words or {})
    return {
        status: {"model": ErrorResponse, "description": described[status]}
        | ({"headers": _HEADERS[status]} if status in _HEADERS else {})
        for status in sorted({*EVERYWHERE, *more})
    }


@dataclass(frozen=True)
class Guard:
    """What makes a route one for administrators: its dependencies, and the statuses that it may be refused with beside
    those of every route."""

    dependencies: Sequence[Any]
    statuses: tuple[int, ...]


def guard(check: Callable[[Request], None], *, by_token: bool) -> Guard:
    """check: refuses everybody but an administrator; by_token: that is who has the token."""
    if not by_token:
        return Guard([Depends(check)], ())
    return Guard([Depends(check), Depends(HTTPBearer(auto_error=False, description="TWINLOOP_ADMIN_TOKEN"))], (401,))


class PromptTokensDetails(BaseModel):
    """`cached_tokens`: those with which an earlier prompt or conversation began, and which were not computed again."""

    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class AnsweredFunction(BaseModel):
    """What the model calls. `arguments` is a JSON object as text, cut where `finish_reason` is `length`."""

    name: str
    arguments: str


class AnsweredCall(BaseModel):
    id: str
    type: Literal["function"]
    function: AnsweredFunction


class AnswerMessage(BaseModel):
    """`content` is null and `tool_calls` there where the model calls tools without a text before."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[AnsweredCall] | None = None


class TopLogprob(BaseModel):
    """A token; `bytes` are its UTF-8, which may be a part of a character, shown as U+FFFD in `token`."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer, and the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class Choice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    """OpenAI's, of a request without `stream`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage


ASK_WORDS = {
    400: "The request is not one, or cannot be served: `param` names the field, and `code` what is wrong with a "
    "request that has its form",
    404: "Another model is served than `model` names",
}

CHAT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ChatCompletion,
        "description": "The completion; with `stream`, server-sent events of OpenAI's chunks",
        "content": {"text/event-stream": {"schema": {}}},
    },
    **errors(404, *ASKING, words=ASK_WORDS),
}


def decision_response(domain: Domain) -> type[BaseModel]:
    """The response with the domain's own schema for its decision; `describe` adds what it refers to."""
    schema = domain.answer_schema()
    if schema is None:
        return DecisionResponse
    own = {key: value for key, value in _to_components(schema).items() if key != "$defs"}
    decision = Annotated[Any, WithJsonSchema({"anyOf": [own, {"type": "null"}]})]
    described: type[BaseModel] = create_model("DecisionResponse", __base__=DecisionResponse, decision=(decision, ...))
    return described


def describe(app: FastAPI, domain: Domain, *, keys: bool) -> None:
    """Make /openapi.json say what is true of this application. keys: whether it may ask for API keys."""
    definitions = _to_components((domain.answer_schema() or {}).get("$defs", {}))
    generate = app.openapi
    app.description = DESCRIPTION

    def openapi() -> dict[str, Any]:
        described = generate()
        schemas = described.setdefault("components", {}).setdefault("schemas", {})
        schemas.update({f"{COMPONENT}{name}": schema for name, schema in definitions.items()})
        for path, operations in described["paths"].items():
            for operation in operations.values():
                _without_fastapis(operation["responses"])
                if keys and path not in OPEN:
                    operation["responses"] = _with_errors(operation["responses"], KEY)
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        return described

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the description


def _with_errors(responses: Mapping[str, Any], statuses: Sequence[int]) -> dict[str, Any]:
    """The responses of an operation and these, as FastAPI writes what `errors` says."""
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}}
    found = {str(status): {"description": _WORDS[status], "content": content} for status in statuses}
    headers = {str(status): {"headers": _HEADERS[status]} for status in statuses if status in _HEADERS}
    return {status: found[status] | headers.get(status, {}) for status in found} | dict(responses)


def _without_fastapis(responses: dict[str, Any]) -> None:
    """FastAPI declares a 422 of its own form for every route with fields; no route here answers with it."""
    content = responses.get("422", {}).get("content", {}).get("application/json", {})
    if content.get("schema", {}).get("$ref", "").endswith("/HTTPValidationError"):
        del responses["422"]


def _to_components(schema: Any) -> Any:
    """The schema with its references to `$defs` as references to the description's components."""
    if isinstance(schema, Mapping):
        return {key: _to_component(value) if key == "$ref" else _to_components(value) for key, value in schema.items()}
    return [_to_components(each) for each in schema] if isinstance(schema, list) else schema


def _to_component(reference: Any) -> Any:
    inside = isinstance(reference, str) and reference.startswith(DEFINITIONS)
    return f"#/components/schemas/{COMPONENT}{reference.removeprefix(DEFINITIONS)}" if inside else reference
