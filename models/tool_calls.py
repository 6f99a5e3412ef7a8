"""The form in which a model writes calls of tools: read from its chat template, which shows calls of earlier turns."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from twinloop.common.errors import UserError
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.models.tool_messages import CALL_ID_LENGTH, call_of, has_tools, takes_arguments_as_text

_NAMES = ("first-function", "other-function", "final-function")
_IDS = ("firstcall", "othercall", "finalcall")
_ARGUMENTS = ({"first-key": "first-value"}, {"other-key": "other-value"}, {"final-key": "final-value"})
_TEXT, _RESULT = "text-before", "what-came-back"
_DESCRIPTION, _PROPERTY = "what-it-does", "property-name"
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
"""Those that OpenAI allows in the name of a tool."""


@dataclass(frozen=True)
class CallForm:
    """What is around names and arguments (a JSON object) where an answer is calls of tools.

    The answer is `opening`, name, `after_name`, arguments, then, where there is one, `before_id` and an id of
    CALL_ID_LENGTH letters and digits; then `between` and the next call from its name on, or `closing` and the stop
    token. between: None where the template takes one call only. trigger: how a call begins, blanks aside; no text
    has it. after_text: whether a text may come before the calls. text_first: whether one must, since the prompt begins
    it (a thought).
    """

    opening: str
    after_name: str
    before_id: str | None
    between: str | None
    closing: str
    trigger: str
    after_text: bool
    text_first: bool

    @property
    def id_length(self) -> int:
        """Characters from the end of the arguments to the end of the id that follows them."""
        return 0 if self.before_id is None else len(self.before_id) + CALL_ID_LENGTH


def takes_tools(tokenizer: ChatTokenizer) -> bool:
    """Whether the chat template has a place for tools, for calls of them and for what they return."""
    try:
        prompt = _Probe(tokenizer).prompt
    except UserError:
        return False
    return all(text in prompt for text in (*_NAMES, _DESCRIPTION, _PROPERTY)) and has_tools(tokenizer)


def read_call_form(tokenizer: ChatTokenizer) -> CallForm:
    """The form of calls. Raises UserError, with the reason, where the chat template does not show one that can be
    distinguished from text and read back."""
    probe = _Probe(tokenizer)
    if not probe.plain_text():
        raise UserError("it writes something around an answer of text")
    turn = probe.turn(1)
    opening, rest = _split(turn, _NAMES[0], "name")
    after_name, rest = _split(rest, json.dumps(_ARGUMENTS[0]), "arguments as JSON")
    if after_name[:1] in _NAME_CHARACTERS or not after_name:
        raise UserError("nothing marks the end of a tool's name")
    if _IDS[0] in opening + after_name:
        raise UserError("the id of a call comes before its arguments")
    before_id, closing = _split(rest, _IDS[0], "id") if _IDS[0] in rest else (None, rest)
    form = CallForm(
        opening=opening,
        after_name=after_name,
        before_id=before_id,
        between=None,
        closing=closing,
        trigger=_trigger(opening, tokenizer),
        after_text=False,
        text_first=probe.start < len(probe.prompt),
    )
    form = replace(form, between=_between(form, probe), after_text=_after_text(form, probe))
    if form.text_first and not form.after_text:
        raise UserError("the prompt begins a text after which no call can come")
    return form


class _Probe:
    """Conversations with known texts, as the template renders them."""

    def __init__(self, tokenizer: ChatTokenizer):
        self._tokenizer = tokenizer
        self._stop = tokenizer.token_bytes[tokenizer.stop_id].decode()
        self._as_text = takes_arguments_as_text(tokenizer)
        parameters = {"type": "object", "properties": {_PROPERTY: {"type": "string"}}, "required": [_PROPERTY]}
        self._tools = [
            {"type": "function", "function": {"name": name, "description": _DESCRIPTION, "parameters": parameters}}
            for name in _NAMES
        ]
        self.prompt = self._render([])

    def _render(self, more: list[dict[str, Any]]) -> str:
        return self._tokenizer.render_marked([{"role": "user", "content": "question"}, *more], self._tools)

    @cached_property
    def start(self) -> int:
        """Where the model's answer begins: where the prompt ends, or before a text with which the prompt begins it."""
        called, said = self._render(self._calls(1, "")), self._render(self._calls(1, _TEXT))
        if called.startswith(self.prompt):
            return len(self.prompt)
        pairs = enumerate(zip(called, said, strict=False))
        length = next((place for place, (one, other) in pairs if one != other), len(called))
        if not self.prompt.startswith(called[:length]):
            raise UserError("an answer with calls does not begin where its prompt ends")
        return length

    def plain_text(self) -> bool:
        """Whether an answer without calls is its text alone."""
        said = [{"role": "assistant", "content": _TEXT}, {"role": "user", "content": "question"}]
        return self._render(said)[self.start :].strip().startswith(_TEXT)

    def turn(self, calls: int, content: str = "") -> str:
        """What the model writes for so many calls, up to the stop token."""
        whole = self._render(self._calls(calls, content))
        answer, stop, _ = whole[self.start :].partition(self._stop)
        if not stop or _NAMES[0] not in answer or _RESULT in answer:
            raise UserError(f"a turn with calls does not end with {self._stop!r}")
        return answer

    def _calls(self, calls: int, content: str) -> list[dict[str, Any]]:
        """An answer with so many calls, and what they return."""
        names_ids_arguments = list(zip(_IDS, _NAMES, _ARGUMENTS, strict=True))[:calls]
        made = [
            call_of(id, name, json.dumps(arguments) if self._as_text else arguments)
            for id, name, arguments in names_ids_arguments
        ]
        results = [
            {"role": "tool", "tool_call_id": id, "name": name, "content": _RESULT}
            for id, name, _ in names_ids_arguments
        ]
        return [{"role": "assistant", "content": content, "tool_calls": made}, *results]


def _split(text: str, part: str, words: str) -> tuple[str, str]:
    before, found, after = text.partition(part)
    if not found:
        raise UserError(f"a call's {words} cannot be found in it")
    if part in after:
        raise UserError(f"a call's {words} is in it more than once")
    return before, after


def _trigger(opening: str, tokenizer: ChatTokenizer) -> str:
    start = opening.lstrip()
    specials = [token for id in tokenizer.special_ids if start.startswith(token := tokenizer.token_bytes[id].decode())]
    trigger = max(specials, key=len) if specials else start.partition(" ")[0].partition("\n")[0]
    if not trigger:
        raise UserError("nothing marks the beginning of a call")
    return trigger


def _between(form: CallForm, probe: _Probe) -> str | None:
    """What is from the end of one call to the name of the next; None where there is nothing that always does."""
    try:
        two, three = probe.turn(2), probe.turn(3)
    except UserError:  # some templates take one call only
        return None
    calls = [
        name + form.after_name + json.dumps(arguments) + ("" if form.before_id is None else form.before_id + id)
        for name, arguments, id in zip(_NAMES, _ARGUMENTS, _IDS, strict=True)
    ]
    between, found, _ = two.removeprefix(form.opening + calls[0]).partition(calls[1] + form.closing)
    return between if found and three == form.opening + between.join(calls) + form.closing else None


def _after_text(form: CallForm, probe: _Probe) -> bool:
    try:
        text, found, calls = probe.turn(1, _TEXT).partition(_TEXT)
    except UserError:
        return False
    return bool(found) and not text.strip() and calls.lstrip().startswith(form.opening.lstrip() + _NAMES[0])
