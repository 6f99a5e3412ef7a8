"""Chat templates as models come with them, and which characters of a rendered conversation are content.

A template may trim, split or look into content, so content is rendered where it is and as it is. Its place is found by
rendering twice: as it is, and with each of its visible characters replaced by one of a private plane (its image). Where
the images are, the first rendering has content; everywhere else it has the template's own text. The two must be the
same text once the images are replaced back. A template that looks for a text of its own in content (such as `</think>`)
makes them differ: then these texts stay as they are, where they cannot be a part of a special token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import chain
from typing import Any, NoReturn

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from twinloop.common.errors import UserError

Message = Mapping[str, Any]

MARK = re.compile("\ue000(\\d+)(j?)\ue001")
"""In the place of a text while a template is rendered: its index, and whether the template writes it inside of JSON."""

_IMAGES = range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE)
_IMAGE = re.compile("[\U000f0000-\U0010ffff]")
# Templates may write any text with these in their names: a role is never mapped to images.
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})


def mark(index: int, length: int = 3) -> str:
    """The placeholder of a text while the template is rendered, of at least so many characters."""
    return f"\ue000{index:0{length - 2}}\ue001"


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation. shadow: the same text, with an image in the place of each visible character of content.
    contents: the messages' contents, as they are in the shadow."""

    text: str
    shadow: str
    contents: tuple[str, ...] = ()

    @classmethod
    def from_marks(cls, rendered: str, texts: Sequence[str]) -> Rendered:
        """Of a text with marks, in which `mark(i)` is the place of texts[i]."""
        text, shadow = [], []
        pieces = MARK.split(rendered)
        for template, index, in_json in zip(pieces[::3], [*pieces[1::3], None], [*pieces[2::3], ""], strict=True):
            content = "" if index is None else texts[int(index)]
            content = json.dumps(content, ensure_ascii=False)[1:-1] if in_json else content
            text += [template, content]
            shadow += [template, chr(_IMAGES[0][0]) * len(content)]
        return cls("".join(text), "".join(shadow))


@dataclass(frozen=True)
class Turn:
    """A conversation that ends with an answer. It is asked with whole[:begin], and answered with whole[begin:end], of
    which the last characters, from `stop` on, are the stop token."""

    whole: Rendered
    begin: int
    stop: int
    end: int


class ChatTemplate:
    """A model's template. Thread-safe: nothing in it changes after construction."""

    def __init__(self, source: Any, *, tokens: Mapping[str, str], added: Collection[str], special: Collection[str]):
        """source: as in tokenizer_config.json, a text, or several with their names. tokens: `eos_token` and so on.

        added, special: tokens with which the text is encoded. Raises UserError where there is no template, or none
        that parses.
        """
        self.sources = _by_name(source)
        environment = _environment()
        try:
            self._templates = {name: environment.from_string(text) for name, text in self.sources.items()}
        except TemplateError as error:
            raise UserError(f"chat template: it does not parse ({error})") from error
        self._environment, self._tokens, self._special = environment, dict(tokens), frozenset(special)
        # A plain token that holds a special one comes before it, as wherever text is split at added tokens.
        within = _any_of(special)
        self._found = _any_of({*special, *(token for token in added if within.search(token))})

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Any = None) -> str:
        """The conversation as `transformers` renders it. Raises UserError where the template refuses it."""
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        given = {"tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            return self._templates[name].render(messages=messages, **given, **self._tokens)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise UserError(f"chat template: {error}") from error  # its expressions raise what Python raises

    def trace(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> Rendered:
        """As `render`, for messages of role and content, and where their content is.

        Raises UserError for a template that changes content in a way that cannot be followed.
        """
        contents = [message["content"] for message in messages]
        image_of = _images(set("".join(contents)))
        back = {ord(image): chr(character) for character, image in image_of.items()}
        for kept in (_nothing, self._own_texts):
            text = self.render(messages, add_generation_prompt=add_generation_prompt)
            self._check_roles(messages)
            shadows = [_shadow(content, image_of, kept(content)) for content in contents]
            shadowed = [{**message, "content": each} for message, each in zip(messages, shadows, strict=True)]
            shadow = self.render(shadowed, add_generation_prompt=add_generation_prompt)
            if shadow.translate(back) == text:
                return Rendered(text, shadow, tuple(shadows))
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
        if self.render(messages[:-1], add_generation_prompt=False) == prompt and any(
            self.specials(whole.shadow, begin, first)
        ):
            raise UserError(
                f"chat template: it does not ask for an answer (add_generation_prompt), and begins one with "
                f"{whole.text[begin:first]!r}, which the model would have to write itself; add to it what asks"
            )
        last = whole.shadow.rindex(images[-1]) + 1 if images else begin
        ending = next(self.specials(whole.shadow, last), None)
        if ending is None:
            raise UserError("chat template: no special token follows an answer: its stop token would not be trained")
        if ending[0] not in stops:
            raise UserError(
                f"chat template: an answer ends with {ending[0]}, which is none of the stop tokens "
                f"({', '.join(sorted(stops))}), so a stop token would not be trained; add its id to eos_token_id of "
                "generation_config.json"
            )
        return Turn(whole, begin, ending.start(), ending.end())

    def specials(self, shadow: str, start: int = 0, end: int | None = None) -> Iterator[re.Match[str]]:
        """Special tokens in a shadow, which are the template's own."""
        found = self._found.finditer(shadow, start, len(shadow) if end is None else end)
        return (match for match in found if match[0] in self._special)

    def _difference(self, messages: Sequence[Message], prompt: str, whole: str) -> str:
        """Why a conversation does not begin with the prompt of its answer."""
        before = self.render(messages[:-1], add_generation_prompt=False)
        if prompt.startswith(before) and whole.startswith(before):
            return (
                f"it asks for an answer with {prompt[len(before) :]!r}, but the answer in a conversation does not "
                f"follow that: {whole[len(before) :][:40]!r}; it would be trained otherwise than it is asked for"
            )
        return "it writes earlier messages otherwise once an answer follows them, so the prompt is not its beginning"

    def _check_roles(self, messages: Sequence[Message]) -> None:
        """Raise UserError for a role that may be a part of a special token: it is rendered as it is."""
        for index, role in enumerate(message["role"] for message in messages):
            if role not in _ROLES and (
                not re.fullmatch(r"[\w-]+", role) or any(role in each for each in self._special)
            ):
                raise UserError(f"messages[{index}]: role {role!r} is not one of {', '.join(sorted(_ROLES))}")

    def _own_texts(self, content: str) -> list[tuple[int, int]]:
        """Where content has texts that the template may look for, except those near to a special token."""
        runs = [match.span() for match in self._constants.finditer(content)]
        return [(start, end) for start, end in runs if not _may_join(content[start:end], self._special)]

    @cached_property
    def _constants(self) -> re.Pattern[str]:
        """Runs of the texts that the template's expressions hold."""
        trees = map(self._environment.parse, self.sources.values())
        values = (node.value for node in chain.from_iterable(tree.find_all(nodes.Const) for tree in trees))
        texts = {value for value in values if isinstance(value, str) and value.strip()}
        allowed = [text for text in texts if not _may_join(text, self._special)]
        return re.compile(f"(?:{_any_of(allowed).pattern})+")


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """The longest that is there; nothing where there are no texts."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def _nothing(_: str) -> list[tuple[int, int]]:
    return []


def _images(characters: set[str]) -> dict[int, str]:
    """An image for each character that is visible, and that JSON writes as it is."""
    visible = [ord(each) for each in characters if not (each.isspace() or each < " " or each in '"\\')]
    if len(visible) > sum(map(len, _IMAGES)):
        raise UserError("messages: they hold more different characters than can be distinguished")
    return dict(zip(visible, map(chr, chain(*_IMAGES)), strict=False))


def _shadow(content: str, image_of: Mapping[int, str], kept: Sequence[tuple[int, int]]) -> str:
    pieces, last = [], 0
    for start, end in kept:
        pieces += [content[last:start].translate(image_of), content[start:end]]
        last = end
    return "".join([*pieces, content[last:].translate(image_of)])


def _may_join(text: str, specials: Collection[str]) -> bool:
    """Whether a text could be, hold, begin, end or lie inside of a special token."""
    for special in specials:
        if text in special or special in text:
            return True
        for length in range(1, min(len(text), len(special))):
            if text.endswith(special[:length]) or text.startswith(special[-length:]):
                return True
    return False


def _by_name(source: Any) -> dict[str, str]:
    named = source if isinstance(source, Mapping) else {"default": source}
    if isinstance(source, Sequence) and not isinstance(source, str):
        named = {each.get("name"): each.get("template") for each in source if isinstance(each, Mapping)}
    if not isinstance(named.get("default"), str) or not all(isinstance(text, str) for text in named.values()):
        raise UserError("tokenizer_config.json: no chat_template; add the template that the model is trained with")
    return dict(named)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for others. It renders what is in it."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment() -> Environment:
    """As transformers has it: sandboxed, since a model directory may come from strangers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.globals["raise_exception"] = _raise_template_error
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = _to_json
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers has it: Jinja's own would sort keys and write `<` as HTML needs it."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return MARK.sub("\ue000\\1j\ue001", text)


def _raise_template_error(message: str) -> NoReturn:
    raise TemplateError(message)
