"""Forms of a row that people have, as the standard form of its record type.

| form | its fields | becomes |
| --- | --- | --- |
| Alpaca | instruction, input, output (or target), system, history | messages |
| ShareGPT | conversations of {from, value} (or of {role, content}), system | messages |
| prompt and completion | prompt, completion: text or messages | messages |
| preferences | chosen, rejected: messages; prompt: text, messages, or how both begin | prompt, chosen, rejected |
| a prompt of text | prompt | the user's message |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import polars as pl

from twinloop.domains.record_types import MESSAGES, RecordType

Row = dict[str, Any]
Message = dict[str, Any]

INSTRUCTION = ("instruction", "input", "target", "output", "system", "history")
CONVERSATIONS = ("conversations", "system")
COMPLETION = ("prompt", "completion")
ROLES = {
    **{"human": "user", "gpt": "assistant"},
    **dict.fromkeys(("chatgpt", "bing", "bard"), "assistant"),  # as in the conversations that people first shared
}
"""Those of ShareGPT; any other name is the role itself."""


class UnusableError(Exception):
    """Why a row cannot be used."""


def form_fields(record: RecordType) -> frozenset[str]:
    """The fields of other forms that a row of this record type may have."""
    fields = {*INSTRUCTION, *CONVERSATIONS, *COMPLETION} if "messages" in record.columns else ()
    return frozenset(fields) - set(record.columns)


def to_standard(row: Any, record: RecordType) -> Any:
    """The row with the fields of the record type; unchanged where it has none of the other forms.

    Raises UnusableError for a row of another form that contradicts itself.
    """
    if not isinstance(row, dict):
        return row
    if "messages" in record.columns:
        return _chat(row, form_fields(record))
    if {"prompt", "chosen", "rejected"} <= set(record.columns):
        row = _pair(row)
    if "prompt" in record.columns and row.get("prompt") is not None:
        return row | {"prompt": _asked(row["prompt"])}
    return row


# --- chat


def _chat(row: Row, known: frozenset[str]) -> Row:
    if row.get("messages") is not None:
        return row | {"messages": _turns(row["messages"])}
    there = {name for name in known if row.get(name) is not None}
    if "conversations" in there:
        return _replaced(row, CONVERSATIONS, [*_system(row), *_turns_after_system(row)])
    if there.issuperset(COMPLETION):
        answer = row["completion"]
        answered = [_said("assistant", answer)] if isinstance(answer, str) else _turns(answer)
        if not isinstance(asked := _asked(row["prompt"]), list) or not isinstance(answered, list):
            raise UnusableError("prompt and completion are neither text nor messages")
        return _replaced(row, COMPLETION, [*asked, *answered])
    if "instruction" in there and (answer := _answer_of(row)) is not None:
        parts = [_as_text(row[name], name) for name in ("instruction", "input") if row.get(name) is not None]
        question = "\n".join(filter(None, parts))
        turns = [*_system(row), *_history(row), _said("user", question), _said("assistant", answer)]
        return _replaced(row, INSTRUCTION, turns)
    return row


def _replaced(row: Row, fields: tuple[str, ...], messages: list[Any]) -> Row:
    return {name: value for name, value in row.items() if name not in fields} | {"messages": messages}


def _said(role: str, content: Any) -> Message:
    return {"role": role, "content": content}


def _system(row: Row) -> list[Message]:
    return [_said("system", row["system"])] if row.get("system") not in (None, "") else []


def _turns_after_system(row: Row) -> list[Any]:
    """Those of a row whose field `system` is said first, and is not said twice."""
    turns = _turns(row["conversations"])
    if not isinstance(turns, list):
        raise UnusableError("conversations is not a list of messages")
    for given in _system(row):
        if turns and _is_from(turns[0], "system"):
            if turns[0].get("content") != given["content"]:
                raise UnusableError("system differs from the system message in conversations")
            return turns[1:]
    return turns


def _history(row: Row) -> list[Message]:
    turns: list[Message] = []
    for pair in [] if row.get("history") is None else _listed(row["history"]):
        if len(said := _listed(pair)) != 2:
            raise UnusableError(NO_HISTORY)
        turns += [_said("user", said[0]), _said("assistant", said[1])]
    return turns


NO_HISTORY = "history is not a list of [question, answer]"


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise UnusableError(NO_HISTORY)
    return value


def _answer_of(row: Row) -> str | None:
    given = {name: row[name] for name in ("target", "output") if row.get(name) is not None}
    answers = {_as_text(value, name) for name, value in given.items()}
    if len(answers) > 1:
        raise UnusableError("target differs from output")
    return next(iter(answers), None)


def _as_text(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        raise UnusableError(f"a number in {name} is too large, or NaN") from None


# --- messages and preferences


def _asked(prompt: Any) -> Any:
    return [_said("user", prompt)] if isinstance(prompt, str) else _turns(prompt)


def _turns(messages: Any) -> Any:
    """Messages as {role, content}, those of {from, value} too; what is no list is unchanged."""
    return [_turn(message) for message in messages] if isinstance(messages, list) else messages


def _turn(message: Any) -> Any:
    if not isinstance(message, dict) or message.get("role") is not None or message.get("from") is None:
        return message
    role = message["from"]
    others = {name: value for name, value in message.items() if name not in ("from", "value")}
    return others | _said(ROLES.get(role, role) if isinstance(role, str) else role, message.get("value"))


def _is_from(message: Any, role: str) -> bool:
    return isinstance(message, dict) and message.get("role") == role


def _pair(row: Row) -> Row:
    """Answers of text, out of conversations that begin alike and end with one answer each."""
    chosen, rejected = _turns(row.get("chosen")), _turns(row.get("rejected"))
    if not (isinstance(chosen, list) and isinstance(rejected, list) and chosen and rejected):
        return row
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and _same(chosen[shared], rejected[shared]):
        shared += 1
    begin = chosen[:shared]
    asked = begin if row.get("prompt") is None else _asked(row["prompt"])
    if asked == []:
        raise UnusableError("prompt is missing, and chosen and rejected do not begin with the same messages")
    if isinstance(asked, list) and begin:
        if len(asked) > shared or not all(map(_same, asked, begin[shared - len(asked) :])):
            raise UnusableError("prompt is not how chosen and rejected begin")
        asked = begin
    answers: Row = {}
    for name, turns in (("chosen", chosen[shared:]), ("rejected", rejected[shared:])):
        if len(turns) != 1 or not _is_from(turns[0], "assistant"):
            raise UnusableError(f"{name} is not the prompt and one answer of the assistant")
        answers[name] = turns[0].get("content")
        # reported like any other field that nobody reads
        answers |= {f"{name}.{field}": value for field, value in turns[0].items() if field not in ("role", "content")}
    return row | {"prompt": asked} | answers


def _same(one: Any, other: Any) -> bool:
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return False
    return all(one.get(name) == other.get(name) for name in ("role", "content"))


# --- the form that is wanted


def wanted_form(record: RecordType) -> str:
    """A row of the record type as JSON, with only the fields that must be there."""
    row = {
        name: _example(dtype, "assistant" if name == "messages" else None)
        for name, dtype in record.columns.items()
        if name not in record.optional
    }
    return json.dumps(row, ensure_ascii=False)


def _example(dtype: Any, answered_by: str | None = None) -> Any:
    if dtype == MESSAGES:
        return [_said(role, "…") for role in ("user", answered_by) if role]
    if isinstance(dtype, pl.Struct):
        return {part.name: _example(part.dtype) for part in dtype.fields}
    if isinstance(dtype, pl.List):
        return [_example(dtype.inner)]
    examples: Mapping[Any, Any] = {pl.String: "…", pl.Int64: 1, pl.Float64: 0.5, pl.Boolean: True}
    return examples[dtype.base_type()]
