"""One answer of a chat, as the choice of a completion or as those of its chunks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.answers import Form
from twinloop.serving.described import (
    AnsweredCall,
    AnsweredFunction,
    AnswerMessage,
    ChatCompletion,
    Choice,
    ChoiceLogprobs,
    TokenLogprob,
    TopLogprob,
)
from twinloop.serving.generation import TextStream
from twinloop.serving.tool_calls import ArgumentsPiece, CallStart, Piece, read_calls
from twinloop.serving.tools import ToolUse

FORM = Form("chat", "chatcmpl", ChatCompletion, "chat.completion", "chat.completion.chunk")


class ChatAnswer:
    """One of the choices, see `answers.Answer`."""

    def __init__(self, index: int, text: TextStream, use: ToolUse | None, reports_of: ChatTokenizer | None):
        """reports_of: whose tokens `text` reports; None: no logprobs are asked for."""
        self.text = text
        self._index = index
        self._use = use if use is not None and use.may_call else None
        self._tokenizer = reports_of

    def whole(self) -> Choice:
        """Wait for the answer."""
        self.text.wait()
        content, calls = "", list[AnsweredCall]()
        for piece in self._pieces():
            if isinstance(piece, str):
                content += piece
            elif isinstance(piece, CallStart):
                function = AnsweredFunction(name=piece.name, arguments="")
                calls.append(AnsweredCall(id=piece.id, type="function", function=function))
            else:
                calls[piece.index].function.arguments += piece.text
        called = {"tool_calls": calls} if calls else {}  # an answer of text has no such field
        message = AnswerMessage(role="assistant", content=content or (None if calls else ""), refusal=None, **called)
        finish_reason = self._finish_reason(bool(calls))
        return Choice(index=self._index, message=message, logprobs=self._logprobs(), finish_reason=finish_reason)

    def deltas(self) -> Iterator[dict[str, Any]]:
        """The same as the choices of chunks, each as soon as its text is there."""
        called = False
        yield self._delta({"role": "assistant", "content": "" if self._use is None else None})
        for piece in self._pieces():
            called = called or not isinstance(piece, str)
            yield self._delta({"content": piece} if isinstance(piece, str) else {"tool_calls": [_call_delta(piece)]})
        yield self._delta({}, self._finish_reason(called))

    def _delta(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        logprobs = self._logprobs(always=False)
        return {
            "index": self._index,
            "delta": delta,
            "logprobs": None if logprobs is None else logprobs.model_dump(),
            "finish_reason": finish_reason,
        }

    def _pieces(self) -> Iterator[Piece]:
        return iter(self.text) if self._use is None else read_calls(self.text, self._use)

    def _finish_reason(self, called: bool) -> Literal["stop", "length", "tool_calls"]:
        reason = self.text.finish_reason
        return "tool_calls" if called and reason == "stop" else reason

    def _logprobs(self, *, always: bool = True) -> ChoiceLogprobs | None:
        """Of the tokens read since the last call, where they are asked for. always: also where there are none."""
        if self._tokenizer is None:
            return None
        content = [
            TokenLogprob(
                **self._token(token.id, token.report.logprob),
                top_logprobs=[TopLogprob(**self._token(*each)) for each in token.report.top.items()],
            )
            for token in self.text.take_reported()
        ]
        return ChoiceLogprobs(content=content, refusal=None) if content or always else None

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        assert self._tokenizer is not None
        text = self._tokenizer.token_bytes[id]
        return {"token": text.decode(errors="replace"), "logprob": logprob, "bytes": list(text)}


def _call_delta(piece: CallStart | ArgumentsPiece) -> dict[str, Any]:
    if isinstance(piece, ArgumentsPiece):
        return {"index": piece.index, "function": {"arguments": piece.text}}
    function = {"name": piece.name, "arguments": ""}
    return {"index": piece.index, "id": piece.id, "type": "function", "function": function}
