"""Log-probabilities of the tokens of a text completion, of its prompt too, in OpenAI's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pydantic import BaseModel

from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.engine.sampling import TokenReport
from twinloop.serving.engine.slots import Prompt


class TextLogprobs(BaseModel):
    """Of each token of the text. text_offset: where in the text it begins. A token that is a part of a character is
    written as its bytes. Of an echoed prompt the first token has none, since nothing comes before it."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PlacedToken(NamedTuple):
    """A token of the text. begin: where in the text."""

    id: int
    begin: int
    report: TokenReport | None


def text_logprobs(tokens: Sequence[PlacedToken], tokenizer: ChatTokenizer) -> TextLogprobs:
    return TextLogprobs(
        tokens=[_shown(token.id, tokenizer) for token in tokens],
        token_logprobs=[None if token.report is None else token.report.logprob for token in tokens],
        top_logprobs=[None if token.report is None else _top(token.id, token.report, tokenizer) for token in tokens],
        text_offset=[token.begin for token in tokens],
    )


def prompt_tokens(prompt: Prompt, text: str, tokenizer: ChatTokenizer) -> list[PlacedToken]:
    """Those of a prompt that is computed. text: as which it is shown; what the server put before it, such as BOS, has
    no place there."""
    decoder, ends = tokenizer.decoder_stream(), [0]
    for id in prompt.tokens:
        ends.append(ends[-1] + len(decoder.push_bytes(tokenizer.token_bytes[id])))
    before = ends[-1] + len(decoder.finish()) - len(text)
    begins = [min(max(0, end - before), len(text)) for end in ends[:-1]]
    return [PlacedToken(*each) for each in zip(prompt.tokens, begins, [None, *prompt.reports], strict=True)]


def _top(id: int, report: TokenReport, tokenizer: ChatTokenizer) -> dict[str, float]:
    """The likeliest tokens, and the one that is there; of several that read alike, the likeliest."""
    top: dict[str, float] = {}
    for each, logprob in [*report.top.items(), (id, report.logprob)]:
        name = _shown(each, tokenizer)
        top[name] = max(logprob, top.get(name, logprob))
    return top


def _shown(id: int, tokenizer: ChatTokenizer) -> str:
    text = tokenizer.token_bytes[id]
    try:
        return text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)
