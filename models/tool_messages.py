"""Tools, calls of tools and their results in a prompt, for chat templates that have a place for them.

As everywhere, what people and models wrote is plain text: names, descriptions, arguments and results are encoded apart
from the template's own text, and none of them can become a special token, nor another that the template writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

from twinloop.common.errors import UserError
from twinloop.models.jinja_template import mark
from twinloop.models.tokenizer import ChatTokenizer

CALL_ID_LENGTH = 9
"""Of every call's id while a template is rendered: Mistral's templates refuse any other length."""

_PROBE_NAME, _PROBE_RESULT = "function-name", "tool-result"
_PROBE_ARGUMENTS = {"argument-name": "argument-value"}

_KEYWORDS = frozenset(
    [
        "$defs",
        "$ref",
        "additionalProperties",
        "allOf",
        "anyOf",
        "const",
        "default",
        "definitions",
        "deprecated",
        "description",
        "enum",
        "examples",
        "exclusiveMaximum",
        "exclusiveMinimum",
        "format",
        "items",
        "maxItems",
        "maxLength",
        "maxProperties",
        "maximum",
        "minItems",
        "minLength",
        "minProperties",
        "minimum",
        "multipleOf",
        "not",
        "oneOf",
        "pattern",
        "patternProperties",
        "prefixItems",
        "properties",
        "readOnly",
        "required",
        "title",
        "type",
        "uniqueItems",
        "writeOnly",
    ]
)
_TYPES = frozenset({"array", "boolean", "integer", "null", "number", "object", "string"})
_BY_NAME = frozenset({"$defs", "definitions", "patternProperties", "properties"})


@lru_cache(maxsize=8)
def call_arguments(tokenizer: ChatTokenizer) -> Literal["object", "text"] | None:
    """How the chat template takes the arguments of a call: as an object, or only as JSON's text. None where it has no
    place for calls of tools and for what they return."""
    if _takes(tokenizer, _PROBE_ARGUMENTS):
        return "object"
    return "text" if _takes(tokenizer, json.dumps(_PROBE_ARGUMENTS)) else None


def _takes(tokenizer: ChatTokenizer, arguments: Any) -> bool:
    """Whether the template writes all of a conversation with such arguments."""
    conversation: list[dict[str, Any]] = [
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": "", "tool_calls": [call_of("firstcall", _PROBE_NAME, arguments)]},
        {"role": "tool", "tool_call_id": "firstcall", "name": _PROBE_NAME, "content": _PROBE_RESULT},
    ]
    try:
        rendered = tokenizer.render_marked(conversation)
    except UserError:
        return False
    return all(text in rendered for text in (_PROBE_NAME, *_PROBE_ARGUMENTS, *_PROBE_ARGUMENTS.values(), _PROBE_RESULT))


def call_of(id: str, name: str, arguments: Any) -> dict[str, Any]:
    """A call as templates take it."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def encode_tool_prompt(
    tokenizer: ChatTokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
) -> list[int]:
    """As `ChatTokenizer.encode_prompt`, for messages with `tool_calls` and of the role `tool`.

    tools: those that the model may call, each {"name", "description" where it has one, "parameters"}.
    Raises UserError where the template refuses them.
    """
    texts = _Texts()
    as_text = any("tool_calls" in message for message in messages) and call_arguments(tokenizer) == "text"
    marked = [_marked_message(message, texts, as_text) for message in _named_results(messages)]
    marked_tools = [_marked_tool(tool, texts.mark) for tool in tools] or None
    return tokenizer.encode_marked(marked, texts.texts, marked_tools)


class _Texts:
    """Texts of a prompt, each with its mark. The same text has the same mark, so that templates may compare."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._marks: dict[str, str] = {}
        self._id_marks: dict[str, str] = {}

    def mark(self, text: str) -> str:
        """Nothing for nothing: templates ask whether there is any content."""
        if text and text not in self._marks:
            self._marks[text] = mark(len(self.texts))
            self.texts.append(text)
        return self._marks[text] if text else ""

    def mark_id(self, text: str) -> str:
        """A mark as long as the ids that templates expect."""
        if text not in self._id_marks:
            self._id_marks[text] = mark(len(self.texts), length=CALL_ID_LENGTH)
            self.texts.append(text)
        return self._id_marks[text]


def _named_results(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages, of which each result has the name of the tool that was called, which some templates write."""
    names: dict[str, str] = {}
    named: list[Mapping[str, Any]] = []
    for message in messages:
        names |= {call["id"]: call["function"]["name"] for call in message.get("tool_calls", ())}
        name = names.get(message.get("tool_call_id", ""))
        named.append(message if name is None else {**message, "name": name})
    return named


def _marked_message(message: Mapping[str, Any], texts: _Texts, arguments_as_text: bool) -> dict[str, Any]:
    """The message with a mark for each text in it that a person, a model or a tool wrote, but its content: templates
    trim that and look into it, for thoughts to drop."""
    fields: dict[str, Any] = {"role": message["role"], "content": message["content"]}
    if "tool_call_id" in message:
        fields["tool_call_id"] = texts.mark_id(message["tool_call_id"])
    if "name" in message:
        fields["name"] = texts.mark(message["name"])
    if "tool_calls" in message:
        fields["tool_calls"] = []
        for call in message["tool_calls"]:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            if arguments_as_text and not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            fields["tool_calls"].append(
                call_of(texts.mark_id(call["id"]), texts.mark(name), _marked(arguments, texts.mark))
            )
    return fields


def _marked(value: Any, plain: Callable[[str], str]) -> Any:
    """Data with a mark for each text in it, keys too: a template may write them."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, Mapping):
        return {plain(key): _marked(each, plain) for key, each in value.items()}
    return [_marked(each, plain) for each in value] if isinstance(value, list) else value


def _marked_tool(tool: Mapping[str, Any], plain: Callable[[str], str]) -> dict[str, Any]:
    function = {key: plain(value) if isinstance(value, str) else value for key, value in tool.items()}
    return {"type": "function", "function": function | {"parameters": _marked_schema(tool["parameters"], plain)}}


def _marked_schema(schema: Any, plain: Callable[[str], str]) -> Any:
    """The schema with marks for all but JSON Schema's own words, which a template may look for."""
    if isinstance(schema, list):
        return [_marked_schema(each, plain) for each in schema]
    if not isinstance(schema, Mapping):
        return _marked(schema, plain)
    marked: dict[str, Any] = {}
    for key, value in schema.items():
        if key not in _KEYWORDS:
            marked[plain(key)] = _marked(value, plain)
        elif key == "type":
            marked[key] = _marked_types(value, plain)
        elif key in _BY_NAME and isinstance(value, Mapping):
            marked[key] = {plain(name): _marked_schema(each, plain) for name, each in value.items()}
        elif key in ("const", "default", "enum", "examples"):
            marked[key] = _marked(value, plain)
        else:
            marked[key] = _marked_schema(value, plain)
    return marked


def _marked_types(value: Any, plain: Callable[[str], str]) -> Any:
    if isinstance(value, list):
        return [_marked_types(each, plain) for each in value]
    return value if isinstance(value, str) and value in _TYPES else _marked(value, plain)
