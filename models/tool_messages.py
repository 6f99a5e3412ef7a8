"""Messages with calls of tools and their results, for chat templates that have a place for them.

As everywhere, what people and models wrote is plain text: names, arguments and results are encoded apart from the
template's own text, and none of them can become a special token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from twinloop.common.errors import UserError
from twinloop.models.chat_template import mark
from twinloop.models.tokenizer import ChatTokenizer

_NAME, _KEY, _VALUE, _RESULT = "function-name", "argument-name", "argument-value", "tool-result"
_PROBE: list[dict[str, Any]] = [
    {"role": "user", "content": "question"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "call_0", "type": "function", "function": {"name": _NAME, "arguments": {_KEY: _VALUE}}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_0", "content": _RESULT},
]  # fmt: skip
"""A conversation of which a template with tools leaves nothing out."""


def has_tools(tokenizer: ChatTokenizer) -> bool:
    """Whether the chat template has a place for calls of tools and for what they return."""
    try:
        rendered = tokenizer.render_marked(_PROBE)
    except UserError:
        return False
    return all(text in rendered for text in (_NAME, _KEY, _VALUE, _RESULT))


def encode_tool_prompt(tokenizer: ChatTokenizer, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """As `ChatTokenizer.encode_prompt`, for messages with `tool_calls` and of the role `tool`.

    Raises UserError where the template refuses them.
    """
    texts: list[str] = []

    def plain(text: str) -> str:
        texts.append(text)
        return mark(len(texts) - 1)

    return tokenizer.encode_marked([_marked_message(message, plain) for message in messages], texts)


def _marked_message(message: Mapping[str, Any], plain: Callable[[str], str]) -> dict[str, Any]:
    """The message with a mark for each text in it that a person, a model or a tool wrote."""
    fields = {"role": message["role"], "content": plain(message["content"])}
    if "tool_call_id" in message:
        fields["tool_call_id"] = plain(message["tool_call_id"])
    if "tool_calls" in message:
        fields["tool_calls"] = [
            {"id": plain(call["id"]), "type": call["type"], "function": _marked(call["function"], plain)}
            for call in message["tool_calls"]
        ]
    return fields


def _marked(value: Any, plain: Callable[[str], str], *, keys: bool = False) -> Any:
    """keys: whether those of this object are texts too, as in arguments: a template may write them."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, Mapping):
        return {plain(key) if keys else key: _marked(each, plain, keys=True) for key, each in value.items()}
    return [_marked(each, plain, keys=True) for each in value] if isinstance(value, list) else value
