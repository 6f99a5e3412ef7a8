"""The forms of the data files for people: every record type with its fields, what they mean, and a whole example row.

All of it is read from the record types themselves, by `twinloop data schema` and for docs/data.md alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import polars as pl
from pydantic import BaseModel

from twinloop.common.errors import UserError
from twinloop.domains.domain import Domain
from twinloop.domains.record_types import RecordType
from twinloop.records.prompts import example_prompt
from twinloop.records.rows import TYPE_NAMES, python_type

QUESTION, ANSWER, WORSE = "Where is my parcel?", "It left our warehouse on Monday.", "I do not know."
TEXT = "Parcels that are lost are replaced within 14 days."
"""Of a domain that says nothing better itself."""

HEADS = ("field", "type", "needed", "meaning")


class Field(NamedTuple):
    """A row of the table of a record type."""

    name: str
    type: str
    needed: str
    meaning: str


def fields_of(record: RecordType) -> list[Field]:
    """The columns of its pandera schema, each followed by the fields inside it, by their dotted names."""
    found: list[Field] = []
    for name, column in record.model.columns.items():
        first, *inside = _fields(name, record.columns[name], record)
        found += [first._replace(meaning=column.description or ""), *inside]
    return found


def _fields(path: str, dtype: Any, record: RecordType) -> Iterator[Field]:
    yield Field(path, _described(dtype), "" if record.nullable(path) else "yes", record.meanings.get(path, ""))
    while isinstance(dtype, pl.List):
        dtype = dtype.inner
    for part in dtype.fields if isinstance(dtype, pl.Struct) else ():
        yield from _fields(f"{path}.{part.name}", part.dtype, record)


def example_row(record: RecordType, domain: Domain) -> dict[str, Any]:
    """A whole row, as it is in a file: what the record type gives itself, and else what the domain's example is."""
    row = dict(record.example)
    if "facts" in record.columns and "facts" not in row and domain.facts is not None:
        row["facts"] = _of_model(domain.facts)
    prompt, (better, worse) = _prompt(domain), _answers(domain, row)
    kind = next(iter(domain.case_kinds), "held_out")
    made = {
        "messages": [*prompt, {"role": "assistant", "content": better}],
        "prompt": prompt,
        "chosen": better,
        "rejected": worse,
        "reason": "the first answer is right",
        "case_id": f"{kind}-1",
        "kind": kind,
        "pair_id": f"{kind}-1" if domain.case_kinds[kind].pairs else None,
        "expected": _of_model(domain.expected) if domain.expected else None,
        "document_id": domain.example_documents[0].document_id if domain.example_documents else "faq-7",
        "text": domain.example_documents[0].text if domain.example_documents else TEXT,
        "version": 1,
    }
    row = {name: row.get(name, made.get(name)) for name in record.columns}
    return {name: value for name, value in row.items() if value is not None}


def other_forms(record: RecordType, row: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """An example row in the forms of other tools that are read too (`records.forms`), by what the form is called."""
    if "messages" in record.columns:
        *prompt, answer = row["messages"]
        others = {name: value for name, value in row.items() if name != "messages"}
        said = [(each["role"], each["content"]) for each in row["messages"]]
        turns = [{"from": _SHAREGPT.get(role, role), "value": content} for role, content in said]
        alpaca = {_ALPACA[role]: content for role, content in said}
        return {
            "ShareGPT": {"conversations": turns, **others},
            "Alpaca": {**alpaca, **others},
            "prompt and completion": {"prompt": prompt, "completion": [answer], **others},
        }
    if {"prompt", "chosen", "rejected"} <= set(record.columns):
        others = {name: value for name, value in row.items() if name not in ("prompt", "chosen", "rejected")}
        answers = {
            name: [*row["prompt"], {"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")
        }
        return {"conversational": {**answers, **others}}
    return {}


_SHAREGPT = {"user": "human", "assistant": "gpt"}
_ALPACA = {"system": "system", "user": "instruction", "assistant": "output"}
"""Of a conversation with one question, as the examples are."""


def text(record: RecordType, domain: Domain) -> str:
    """For a terminal: what the rows are, a line a field, and the example as a line of JSON."""
    rows = [Field(*HEADS), *fields_of(record)]
    widths = [max(len(row[index]) for row in rows) for index in range(3)]
    table = ["  " + "  ".join([*map(str.ljust, row[:3], widths), row.meaning]).rstrip() for row in rows]
    example = json.dumps(example_row(record, domain), ensure_ascii=False)
    return "\n".join([f"{record.name}: {record.about}".rstrip(": "), "", *table, "", example])


def markdown(record: RecordType, domain: Domain) -> str:
    """The same as a section of docs/data.md."""
    table = [f"| {' | '.join(row)} |".replace("  |", " |") for row in (HEADS, ["---"] * 4, *fields_of(record))]
    example = json.dumps(example_row(record, domain), ensure_ascii=False)
    return "\n".join([f"### {record.name}", "", record.about, "", *table, "", "```json", example, "```"])


def _described(dtype: Any) -> str:
    return f"list of {_described(dtype.inner)}s" if isinstance(dtype, pl.List) else TYPE_NAMES[python_type(dtype)]


# --- an example of a domain


def _prompt(domain: Domain) -> list[dict[str, str]]:
    try:
        made = example_prompt(domain)
    except UserError:  # the stage that needs it will report it
        made = None
    return [dict(one) for one in made or ({"role": "user", "content": QUESTION},)]


def _answers(domain: Domain, row: Mapping[str, Any]) -> tuple[str, str]:
    """The right answer by the facts of a row, and a wrong one."""
    if row.get("facts") is None or not domain.has("gold"):
        return ANSWER, WORSE
    try:
        facts = domain.read_facts(row)
        gold = domain.gold(facts)
        worse = next((output for _, output in domain.wrong(gold, facts)), WORSE) if domain.has("wrong") else WORSE
        return gold, worse
    except Exception:  # the user's own code: the stage that needs it will report it
        return ANSWER, WORSE


def _of_model(model: type[BaseModel]) -> Any:
    """The fields of a domain's model, of values that their types allow: `Field(examples=[…])` sets them."""
    schema = model.model_json_schema()
    return _of_schema(schema, schema.get("$defs", {}), "")


def _of_schema(schema: Mapping[str, Any], models: Mapping[str, Any], name: str) -> Any:
    if "$ref" in schema:
        return _of_schema(models[schema["$ref"].rpartition("/")[2]], models, name)
    for given in ("examples", "enum"):
        if schema.get(given):
            return schema[given][0]
    if "const" in schema:
        return schema["const"]
    if "anyOf" in schema:
        return _of_schema(schema["anyOf"][0], models, name)
    if schema.get("type") == "object":
        needed = schema.get("required", ())
        shown = {
            inner: part for inner, part in schema.get("properties", {}).items() if inner in needed or "examples" in part
        }
        return {inner: _of_schema(part, models, inner) for inner, part in shown.items()}
    if schema.get("type") == "array":
        return [_of_schema(schema["items"], models, name)] * max(1, schema.get("minItems", 1))
    if "default" in schema:
        return schema["default"]
    if schema.get("type") in ("integer", "number"):
        return schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1 if "exclusiveMinimum" in schema else 1)
    return {"boolean": True, "null": None}.get(schema.get("type", ""), name[: schema.get("maxLength", len(name))])
