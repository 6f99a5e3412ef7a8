"""Which characters of a rendered conversation are content, and which tokens in it are meant as such.

A template may trim, split or look into content, so content is rendered where it is and as it is. Its place is found by
rendering twice: as it is, and with each of its visible characters replaced by one of a private plane (its image). Where
the images are, the first rendering has content; everywhere else it has the template's own text. The two must be the
same text once the images are replaced back. A template that looks for a text of its own in content (such as `</think>`)
makes them differ: then these texts stay as they are, where they cannot be a part of a token that no content may be,
each with a sign beside it where it is not the assistant's.

Three kinds of added tokens are told from their spelling in content. Special tokens, and plain ones with which the
template frames messages (`<|user|>`, where a tokenizer has it as a plain one), are the template's alone. Other plain
ones that the template writes (`<think>`, `<tool_call>`) are the template's and the assistant's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from twinloop.common.errors import UserError
from twinloop.models.jinja_template import MARK, ROLES, JinjaTemplate, Message

_IMAGES = range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFD)
_ANY_IMAGE = "\U0010fffd"
"""Of content that is not the assistant's, whatever character it is."""
_IMAGE = re.compile("[\U000f0000-\U0010ffff]")
_ESCAPED = frozenset({*map(chr, range(0x20)), '"', "\\"})
"""What JSON does not write as it is."""
_AFTER, _BEFORE = range(0xE100, 0xEC00), range(0xEC00, 0xF700)
"""Signs, after or before a text that stays as it is in a shadow: each such text has its own."""
_SIGN = re.compile("[\ue100-\uf6ff]")


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation. shadow: the same text, with an image in the place of each visible character of content.
    answered: the assistant's characters by their images. contents: the messages', as they are in the shadow."""

    text: str
    shadow: str
    answered: _Table
    contents: tuple[str, ...] = ()

    @cached_property
    def half_shadow(self) -> str:
        """The shadow, with the assistant's content as it is."""
        return self.answered.replaced(self.shadow)

    def with_texts(self, texts: Sequence[str]) -> Rendered:
        """With texts[i], as content that is not the assistant's, in the place of each `mark(i)`."""
        text, shadow = [], []
        last = 0
        for found in MARK.finditer(self.shadow):  # content has images there, so no mark in it is taken for one
            start, end = found.span()
            content = texts[int(found[1])]
            content = json.dumps(content, ensure_ascii=False)[1:-1] if found[2] else content
            images = _ANY_IMAGE * len(content)
            text += [self.text[last:start], content]
            shadow += [self.shadow[last:start], images]
            last = end
        return Rendered("".join([*text, self.text[last:]]), "".join([*shadow, self.shadow[last:]]), self.answered)


@dataclass(frozen=True)
class Token:
    """A token in a text, and where it is."""

    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Turn:
    """A conversation that ends with an answer. It is asked with whole[:begin], and answered with whole[begin:end], of
    which the last characters, from `stop` on, are the stop token."""

    whole: Rendered
    begin: int
    stop: int
    end: int


class ChatTemplate:
    """A model's template, and which tokens its conversations have. Thread-safe: nothing in it changes."""

    def __init__(
        self, template: JinjaTemplate, *, added: Collection[str], special: Collection[str], markers: Collection[str]
    ):
        """added: tokens at which text is split before it is encoded. Of these: special ones, and others that the
        template writes (markers)."""
        self._template, self._added = template, frozenset(added)
        # Of a pair such as <think>, </think> both are what an answer may hold. Some templates explain them in the
        # system's message (SmolLM3), where they seem to frame it.
        single = [token for token in markers if not _counterparts(token) & self._added]
        self._reserved = template.framing(single) | {*special}
        self._special = _Finder(special, added)
        self._own = _Finder({*special, *markers}, added)
        self._said = _Finder({*markers} - self._reserved, added)

    @property
    def sources(self) -> Mapping[str, str]:
        """Jinja by name; `default` is always there."""
        return self._template.sources

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Any = None) -> str:
        """The conversation as `transformers` renders it. Raises UserError where the template refuses it."""
        return self._template.render(messages, add_generation_prompt=add_generation_prompt, tools=tools)

    def trace(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Any = None) -> Rendered:
        """As `render`, and where the messages' content is, which is text. What else they and tools hold has marks.

        Raises UserError for a template that changes content in a way that cannot be followed.
        """
        images = _images(messages)
        back = [_Table((image, character) for character, image in each.items()) for each in images]
        both = _Table(back[False] | back[True])
        for signs in (None, _AFTER, _BEFORE):
            text = self.render(messages, add_generation_prompt=add_generation_prompt, tools=tools)
            self._check_roles(messages)
            contents = [self._shadow(message, images[_is_answer(message)], signs) for message in messages]
            shadowed = [{**message, "content": each} for message, each in zip(messages, contents, strict=True)]
            shadow = self.render(shadowed, add_generation_prompt=add_generation_prompt, tools=tools)
            if both.replaced(shadow if signs is None else _SIGN.sub("", shadow)) == text:
                shadow = shadow if signs is None else self._without_signed(shadow)
                return Rendered(text, shadow, back[True], tuple(contents))
        raise UserError("chat template: it changes what messages say in a way that cannot be followed")

    def turn(self, messages: Sequence[Message], stops: Collection[str]) -> Turn:
        """Where the answer at the end of a conversation is. stops: the stop tokens.

        Raises UserError where it would not be trained as it is asked for, or without a stop token.
        """
        prompt = self.render(messages[:-1], add_generation_prompt=True)
        whole = self.trace(messages, add_generation_prompt=False)
        begin = len(prompt)
        if not whole.text.startswith(prompt):
            raise UserError(f"chat template: {self._difference(messages, prompt, whole.text)}")
        images = _IMAGE.findall(whole.shadow, begin)
        if images != _IMAGE.findall(whole.contents[-1]):
            raise UserError("chat template: it leaves out or moves a part of the answer, which would not be trained")
        first = whole.shadow.index(images[0], begin) if images else begin
        begins = any(self.specials(whole.shadow, begin, first))
        if begins and self.render(messages[:-1], add_generation_prompt=False) == prompt:
            raise UserError(
                f"chat template: it does not ask for an answer (add_generation_prompt), and begins one with "
                f"{whole.text[begin:first]!r}, which the model would have to write itself; add to it what asks"
            )
        last = whole.shadow.rindex(images[-1]) + 1 if images else begin
        ending = next(self.specials(whole.shadow, last), None)
        if ending is None:
            raise UserError("chat template: no special token follows an answer: its stop token would not be trained")
        if ending.text not in stops:
            raise UserError(
                f"chat template: an answer ends with {ending.text}, which is none of the stop tokens "
                f"({', '.join(sorted(stops))}), so a stop token would not be trained; add its id to eos_token_id of "
                "generation_config.json"
            )
        return Turn(whole, begin, ending.start, ending.end)

    def specials(self, shadow: str, start: int = 0, end: int | None = None) -> Iterator[Token]:
        """Special tokens in a shadow, which are the template's own."""
        return self._special.find(shadow, start, end)

    def tokens(self, rendered: Rendered, start: int = 0, end: int | None = None) -> Iterator[Token]:
        """What is meant as a token in a rendered text: the template's own, and what an answer may hold."""
        own = self._own.find(rendered.shadow, start, end)
        # What the assistant says is in the text too: where that has none of these tokens, nothing is looked for.
        said = self._said.find(rendered.half_shadow, start, end) if self._said.may_find(rendered.text) else ()
        for token in sorted({*own, *said}, key=lambda token: (token.start, -token.end)):
            if token.start >= start:
                yield token
                start = token.end

    def said_tokens(self, text: str) -> Iterator[Token]:
        """What is meant as a token in a text of no conversation: what an answer may hold."""
        return self._said.find(text)

    def _difference(self, messages: Sequence[Message], prompt: str, whole: str) -> str:
        """Why a conversation does not begin with the prompt of its answer."""
        before = self.render(messages[:-1], add_generation_prompt=False)
        if prompt.startswith(before) and whole.startswith(before):
            asked = prompt[len(before) :]
            thinks = "; a base with `thinking: true` is asked for answers that think" if "</think>" in asked else ""
            return (
                f"it asks for an answer with {asked!r}, but the answer in a conversation does not follow that: "
                f"{whole[len(before) :][:40]!r}; it would be trained otherwise than it is asked for{thinks}"
            )
        return "it writes earlier messages otherwise once an answer follows them, so the prompt is not its beginning"

    def _check_roles(self, messages: Sequence[Message]) -> None:
        """Raise UserError for a role that may be a part of a token: it is rendered as it is."""
        for index, role in enumerate(message["role"] for message in messages):
            if role not in ROLES and (not re.fullmatch(r"[\w-]+", role) or any(role in each for each in self._added)):
                raise UserError(f"messages[{index}]: role {role!r} is not one of {', '.join(ROLES)}")

    def _shadow(self, message: Message, image_of: _Table, signs: range | None) -> str:
        """A message's content in images. signs: where texts that the template may look for stay as they are: those of
        the assistant without a sign, others with one after them, or before them. The sign is on the other side of a
        text with which content ends, or begins: templates look there."""
        content = message["content"]
        pieces, last = [], 0
        for match in self._looked_for.finditer(content) if signs else ():
            start, end = match.span()
            after = bool(content[end:].strip()) if signs is _AFTER else not content[:start].strip()
            sign = "" if _is_answer(message) else chr((_AFTER if after else _BEFORE)[self._kept.index(match[0])])
            pieces += [image_of.replaced(content[last:start]), match[0] + sign if after else sign + match[0]]
            last = end
        return "".join([*pieces, image_of.replaced(content[last:])])

    def _without_signed(self, shadow: str) -> str:
        """A shadow with images in the place of texts that have a sign, and without signs."""
        return _SIGN.sub("", self._signed.sub(lambda match: _ANY_IMAGE * (len(match[0]) - 1), shadow))

    @cached_property
    def _kept(self) -> list[str]:
        """The texts of the template's expressions that stay as they are where they are in content: none of them can
        be a part of a token that no content may be."""
        return sorted(text for text in self._template.constants if not _may_join(text, self._reserved))[: len(_AFTER)]

    @cached_property
    def _looked_for(self) -> re.Pattern[str]:
        return _any_of(self._kept)

    @cached_property
    def _signed(self) -> re.Pattern[str]:
        signed = zip(self._kept, map(chr, _AFTER), map(chr, _BEFORE), strict=False)
        return _any_of(chain.from_iterable((text + after, before + text) for text, after, before in signed))


class _Finder:
    """Finds tokens in a text. An added token that holds one of them comes before it, as wherever text is split."""

    def __init__(self, tokens: Collection[str], added: Collection[str]):
        within = _any_of(tokens)
        self._tokens = frozenset(tokens)
        self._pattern = _any_of({*tokens, *(token for token in added if within.search(token))})

    def may_find(self, text: str) -> bool:
        """Much faster than the pattern, for a corpus."""
        return any(token in text for token in self._tokens)

    def find(self, text: str, start: int = 0, end: int | None = None) -> Iterator[Token]:
        if not self.may_find(text):
            return
        for match in self._pattern.finditer(text, start, len(text) if end is None else end):
            if match[0] in self._tokens:
                yield Token(*match.span(), match[0])


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """The longest that is there; nothing where there are no texts."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def _is_answer(message: Message) -> bool:
    return bool(message["role"] == "assistant")


def _counterparts(token: str) -> set[str]:
    """`</x>` of `<x>`, and the reverse."""
    return {f"</{token[1:]}", token.replace("</", "<", 1)} - {token} if token.startswith("<") else set()


def _images(messages: Sequence[Message]) -> list[_Table]:
    """An image for each character that is visible, and that JSON writes as it is: for all content but the assistant's,
    and other ones for the assistant's."""
    free = map(chr, chain(*_IMAGES))
    images = []
    for answers in (False, True):
        content = [each["content"] for each in messages if _is_answer(each) is answers]
        visible = set("".join(" ".join(content).split())) - _ESCAPED
        images.append(_Table(zip(visible, free, strict=False)))
        if len(images[-1]) < len(visible):
            raise UserError("messages: they hold more different characters than can be distinguished")
    return images


class _Table(dict[str, str]):
    """What stands for a character; one that it does not have stands for itself."""

    def replaced(self, text: str) -> str:
        """As `str.translate`, which takes several times as long where images are in the text or come of it."""
        return "".join(map(self.__getitem__, text)) if self else text

    def __missing__(self, character: str) -> str:
        self[character] = character
        return character


def _may_join(text: str, tokens: Collection[str]) -> bool:
    """Whether a text could be, hold, begin, end or lie inside of one of the tokens."""
    for token in tokens:
        if text in token or token in text:
            return True
        for length in range(1, min(len(text), len(token))):
            if text.endswith(token[:length]) or text.startswith(token[-length:]):
                return True
    return False
