"""From an answer's text to its calls of tools, as they come."""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterator
from dataclasses import dataclass

from twinloop.models.tool_messages import CALL_ID_LENGTH
from twinloop.serving.engine.sampling import ConstraintError
from twinloop.serving.generation import FormError, TextStream
from twinloop.serving.tools import ToolUse

_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class CallStart:
    """A call begins, the answer's `index`-th."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ArgumentsPiece:
    """More of the arguments of a call, JSON's text."""

    index: int
    text: str


Piece = str | CallStart | ArgumentsPiece
"""Of an answer; a str is of its text."""


def read_calls(text: TextStream, use: ToolUse) -> Iterator[Piece]:
    """The pieces of an answer that follows the constraint of `use`. Raises what `text` raises."""
    reader = _Reader(use)
    try:
        for piece in text:
            yield from reader.read(piece)
    except ConstraintError as error:
        if not reader.calling:
            raise
        raise FormError("tools", str(error)) from error
    yield from reader.finish()


class _Reader:
    """Reads an answer piece by piece. What may still become another thing is held back."""

    def __init__(self, use: ToolUse):
        self._form, self._anchored = use.form, use.anchored
        self._held = ""
        self._read = self._text
        self._index = -1
        self._said = False  # that it begins with a text, so that an anchored call can no longer come
        self._depth, self._in_string, self._escaped = 0, False, False

    @property
    def calling(self) -> bool:
        """Whether a call has begun."""
        return self._read != self._text

    def read(self, piece: str) -> Iterator[Piece]:
        self._held += piece
        reading = None
        while reading != (self._read, len(self._held)):  # until nothing more can be told
            reading = (self._read, len(self._held))
            yield from self._read()

    def finish(self) -> Iterator[Piece]:
        """The answer has ended."""
        if self._read == self._text and self._held:
            yield self._held

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        return taken

    def _text(self) -> Iterator[Piece]:
        trigger = self._form.trigger
        place = self._held.find(trigger)
        may_call = not self._anchored or (not self._said and not self._held[:place].strip())
        if place >= 0 and may_call:
            if text := self._take(place).rstrip():
                yield text
            self._read = self._opening
            return
        # The blanks before a call belong to its form.
        sure = len(self._held.rstrip()) if self._held.strip() else 0
        for length in range(min(len(trigger), len(self._held)), 0, -1):
            if self._held.endswith(trigger[:length]):
                sure = min(sure, len(self._held[:-length].rstrip()))
                break
        begun = self._held.strip()
        self._said = self._said or bool(begun and not trigger.startswith(begun))
        if self._anchored and self._said:
            sure = len(self._held)
        if sure:
            yield self._take(sure)

    def _opening(self) -> Iterator[Piece]:
        opening = self._form.opening.lstrip()
        if len(self._held) >= len(opening):
            self._take(len(opening))
            self._read = self._name
        yield from ()

    def _name(self) -> Iterator[Piece]:
        place = self._held.find(self._form.after_name)
        if place >= 0:
            self._index += 1
            yield CallStart(self._index, self._new_id(), self._take(place))
            self._take(len(self._form.after_name))
            self._read = self._arguments

    def _new_id(self) -> str:
        """The caller's name for the call; what the model writes as an id comes too late, after the arguments."""
        if self._form.before_id is None:
            return f"call_{secrets.token_hex(12)}"
        return "".join(secrets.choice(_LETTERS) for _ in range(CALL_ID_LENGTH))

    def _arguments(self) -> Iterator[Piece]:
        end = self._end_of_object()
        text = self._take(len(self._held) if end is None else end)
        if end is not None:
            self._read = self._after
        if text:
            yield ArgumentsPiece(self._index, text)

    def _end_of_object(self) -> int | None:
        for place, character in enumerate(self._held):
            if self._in_string:
                self._in_string = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return place + 1
        return None

    def _after(self) -> Iterator[Piece]:
        between, skipped = self._form.between, self._form.id_length
        if between is not None and self._held[skipped:].startswith(between):
            self._take(skipped + len(between))
            self._read = self._name
        yield from ()
