"""Whether the prompts of a data set are those that the server will ask: what the domain's `build_prompt` makes.

A prompt is built again where the domain can say which request it was made from (`Domain.request_of`). Elsewhere it is
compared with the form of the domain's prompts: their roles, and the text before the first and after the last thing that
differs from request to request. The form is found by building the prompt of the domain's example with each of its
values changed in turn.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import polars as pl
from pydantic import BaseModel, ValidationError
from pydantic_core import to_json

from twinloop.common.errors import UserError
from twinloop.domains.domain import Document, Domain, Message, domain_code
from twinloop.domains.examples import example_request
from twinloop.domains.record_types import RecordType
from twinloop.records.findings import Finding
from twinloop.records.reading import Source
from twinloop.records.rows import LINE

MOST_ROWS = 1000
"""Looked at of one file, spread evenly."""
MOST_SHOWN = 240
"""Characters of the wanted form in the message."""
MOST_NAMED_VALUES = 50
"""Of the request's enumerations that are tried."""

Prompt = Sequence[Message]


@dataclass(frozen=True)
class PromptForm:
    """What the prompts of a domain have in common."""

    example: Prompt
    roles: frozenset[tuple[str, ...]]
    fixed: tuple[tuple[str, str], ...]
    """Of each message of the example: how it begins and how it ends, whatever the request is."""

    def fits(self, prompt: Prompt) -> bool:
        roles = _roles(prompt)
        if roles != _roles(self.example):
            return roles in self.roles
        return all(
            message["content"].startswith(begin) and message["content"].endswith(end)
            for message, (begin, end) in zip(prompt, self.fixed, strict=True)
        )


def foreign_prompts(frame: pl.DataFrame, record: RecordType, source: Source, domain: Domain) -> list[Finding]:
    """The rows whose prompts `build_prompt` would not make. Raises UserError where it fails on the domain's example."""
    column = next((name for name in ("prompt", "messages") if name in record.columns), None)
    if column is None or frame.is_empty() or (column == "messages" and domain.chat):
        return []
    if (form := prompt_form(domain)) is None:
        return []
    rebuilds = _gives_back_the_example(domain, form.example)
    looked_at = frame.gather_every(-(-len(frame) // MOST_ROWS))
    foreign: list[int] = []
    for row in looked_at.iter_rows(named=True):
        prompt = row[column][:-1] if column == "messages" else row[column]
        made = _rebuilt(domain, prompt, row.get("facts")) if rebuilds else None
        if not (form.fits(prompt) if made is None else list(made) == prompt):
            foreign.append(row[LINE])
    if not foreign:
        return []
    shown = json.dumps(form.example, ensure_ascii=False)
    wanted = shown if len(shown) <= MOST_SHOWN else f"{shown[:MOST_SHOWN]}…"
    sampled = f" (of {len(frame)} rows, evenly spread ones were looked at)" if len(looked_at) < len(frame) else ""
    what = f"have a prompt that the domain's build_prompt does not make, while the server asks no other{sampled}"
    return [Finding.of(source, foreign, len(looked_at), f"{what}; for its example it makes {wanted}")]


def example_prompt(domain: Domain) -> Prompt | None:
    """What the domain asks for its example, or for a request of texts in its place; None: for neither.

    Raises UserError where `build_prompt` fails on the example."""
    asked = _asked(domain)
    return asked.prompt if asked else None


def prompt_form(domain: Domain) -> PromptForm | None:
    """None where there is no prompt to find it by. Raises UserError where `build_prompt` fails on the example."""
    if (asked := _asked(domain)) is None:
        return None
    request, documents, example = asked.request, asked.documents, asked.prompt
    variants, constant = _variants(domain, request, documents)
    alike = [each for each in variants if _roles(each) == _roles(example)]
    fixed = []
    for index, message in enumerate(example):
        contents = [message["content"], *(each[index]["content"] for each in alike)]
        begin, end = _common_beginning(contents), _common_beginning([text[::-1] for text in contents])
        fixed.append((_before(begin, constant), _before(end, [value[::-1] for value in constant])[::-1]))
    return PromptForm(example, frozenset(map(_roles, [example, *variants])), tuple(fixed))


@dataclass(frozen=True)
class _Asked:
    request: BaseModel
    documents: Sequence[Document]
    prompt: Prompt


def _asked(domain: Domain) -> _Asked | None:
    if domain.request is None or not domain.has("build_prompt"):
        return None
    documents = domain.example_documents[: domain.passages]
    try:
        with domain_code(domain, "build_prompt", "its example"):
            request = _read(domain, example_request(domain))
            return _Asked(request, documents, domain.build_prompt(request, documents))
    except UserError:
        if domain.example:
            raise
        return None  # not every request is of texts alone


def _gives_back_the_example(domain: Domain, example: Prompt) -> bool:
    """Whether `request_of` fits `build_prompt`: of a subclass that asks in another way it may not."""
    if not domain.has("request_of"):
        return False
    made = _rebuilt(domain, example, None)
    return made is None or list(made) == list(example)


def _rebuilt(domain: Domain, prompt: Prompt, facts: Any) -> Prompt | None:
    """The prompt that the server would build; an empty one where it would refuse the request."""
    with domain_code(domain, "request_of", "a prompt of the data"):
        try:
            asked = domain.request_of(prompt, facts)
        except ValidationError:
            return []
        return None if asked is None else domain.build_prompt(*asked)


def _roles(prompt: Prompt) -> tuple[str, ...]:
    return tuple(message["role"] for message in prompt)


def _common_beginning(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)  # what these two share, all between them do
    same = (place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
    return first[: next(same, min(len(first), len(last)))]


def _before(text: str, values: Sequence[str]) -> str:
    """The text up to the first of these values, whatever their letter case."""
    places = [text.lower().find(value.lower()) for value in values if value]
    return text[: min((place for place in places if place >= 0), default=len(text))]


# --- the example with its values changed


def _variants(domain: Domain, request: BaseModel, documents: Sequence[Document]) -> tuple[list[Prompt], list[str]]:
    """Prompts of requests and documents that differ from the example in one thing; values that no other could be found
    for, as text."""
    fields = request.model_dump(mode="json")
    named = list(_named_values(type(request).model_json_schema()))[:MOST_NAMED_VALUES]
    found: list[Prompt] = []
    constant: list[str] = []
    for path, value in _leaves(fields):
        made = [
            prompt
            for other in _others(value, named)
            if (prompt := _try(domain, _changed(fields, path, other), documents)) is not None
        ]
        found += made
        if not made and value not in (None, []):
            constant.append(str(value))
    others = [replace(each, text=_turned(each.text), document_id=_turned(each.document_id)) for each in documents]
    for some in (others, documents[::-1], documents[:1], ()):
        if (prompt := _try(domain, fields, some)) is not None:
            found.append(prompt)
    return found, constant


def _try(domain: Domain, fields: Mapping[str, Any], documents: Sequence[Document]) -> Prompt | None:
    """None where this is no request, or where the domain builds no prompt of it."""
    try:
        return domain.build_prompt(_read(domain, fields), documents)
    except Exception:  # the user's own code, on what nobody asked
        return None


def _read(domain: Domain, fields: Mapping[str, Any]) -> BaseModel:
    assert domain.request is not None
    return domain.request.model_validate_json(to_json(fields))


def _leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in inside:
        yield from _leaves(inner, (*path, name))
    if not isinstance(value, dict):
        yield path, value


def _changed(value: Any, path: Sequence[str | int], other: Any) -> Any:
    if not path:
        return other
    copy = value.copy()
    copy[path[0]] = _changed(value[path[0]], path[1:], other)
    return copy


def _others(value: Any, named: Sequence[Any]) -> list[Any]:
    """Values that a field may have instead: not all will be allowed."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [value + 1, value - 1, value * 10]
    if isinstance(value, list):
        return [[], value[:1], value * 2]
    if value is None:
        return ["x", 1, True, *named]
    return [each for each in (_turned(value), "x", *named) if each != value]


def _turned(text: str) -> str:
    """Every letter and digit replaced by the next one, so that the text keeps its form: A10234 becomes B21345."""
    return text.translate(_NEXT)


_RUNS = (string.ascii_lowercase, string.ascii_uppercase, string.digits)
_NEXT = str.maketrans("".join(_RUNS), "".join(run[1:] + run[0] for run in _RUNS))


def _named_values(schema: Any) -> Iterator[Any]:
    """The values of every enumeration in a JSON schema."""
    if isinstance(schema, dict):
        yield from schema.get("enum", [])
        for inner in schema.values():
            yield from _named_values(inner)
    elif isinstance(schema, list):
        for inner in schema:
            yield from _named_values(inner)
