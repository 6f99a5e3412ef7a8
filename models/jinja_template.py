"""A chat template as a program: what it renders, and which tokens it may write itself."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from itertools import chain, product
from typing import Any, NoReturn

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from twinloop.common.errors import UserError, one_line

Message = Mapping[str, Any]

MARK = re.compile("\ue000(\\d+)(j?)\ue001")
"""In the place of a text while a template is rendered: its index, and whether the template writes it inside of JSON."""

ROLES = ("assistant", "developer", "function", "ipython", "system", "tool", "user")
_QUESTION, _ANSWER = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
_EARLIER: tuple[list[Message], ...] = ([], [_QUESTION], [_QUESTION, _ANSWER])
"""What comes before a message of each role, to see what the template writes around it."""


def mark(index: int, length: int = 3) -> str:
    """The placeholder of a text while the template is rendered, of at least so many characters."""
    return f"\ue000{index:0{length - 2}}\ue001"


class JinjaTemplate:
    """A model's template, or several by name. Thread-safe: nothing in it changes after construction."""

    def __init__(self, source: Any, *, tokens: Mapping[str, str]):
        """source: as in tokenizer_config.json, a text, or several with their names. tokens: `eos_token` and so on.

        Raises UserError where there is no template, or none that parses.
        """
        self.sources = _by_name(source)
        self._environment, self._tokens = template_environment(), dict(tokens)
        try:
            self._templates = {name: self._environment.from_string(text) for name, text in self.sources.items()}
        except Exception as error:  # Jinja makes Python of it, whose compiler has limits of its own
            raise UserError(f"chat template: it does not parse ({one_line(error)})") from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Any = None) -> str:
        """The conversation as `transformers` renders it. Raises UserError where the template refuses it."""
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        given = {"tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            rendered = self._templates[name].render(messages=messages, **given, **self._tokens)
            rendered.encode()  # it may write a lone surrogate
        except Exception as error:  # it is a program: it raises what Python raises, also for want of memory
            raise UserError(f"chat template: {one_line(error)}") from error
        return rendered

    def written(self, tokens: Collection[str]) -> frozenset[str]:
        """Those of `tokens` that it may write itself: its source has them, or it makes them around a short message."""
        own = [node.data for node in self._nodes(nodes.TemplateData)]
        return _in_any(tokens, [*self.constants, *own, *chain.from_iterable(self._around)])

    def framing(self, tokens: Collection[str]) -> frozenset[str]:
        """Those of `tokens` with which it begins or ends messages: they are around messages that are not the
        assistant's, or come first where an answer is asked for."""
        _, others, requests = self._around
        asking = {token for token in tokens if any(text.lstrip().startswith(token) for text in requests)}
        return _in_any(tokens, others) | asking

    @cached_property
    def constants(self) -> frozenset[str]:
        """The texts that its expressions hold, which it may look for in content."""
        values = (node.value for node in self._nodes(nodes.Const))
        return frozenset(value for value in values if isinstance(value, str) and value.strip())

    def _nodes(self, kind: type[Any]) -> list[Any]:
        return [node for text in self.sources.values() for node in self._environment.parse(text).find_all(kind)]

    @cached_property
    def _around(self) -> tuple[list[str], list[str], list[str]]:
        """Short messages of the assistant and of the other roles as rendered, and how an answer is asked for."""
        answers: list[str] = []
        others: list[str] = []
        requests: list[str] = []
        for role, earlier in product(ROLES, _EARLIER):
            messages = [*earlier, {"role": role, "content": "content"}]
            try:
                start = self.render(earlier, add_generation_prompt=False) if earlier else ""
                whole = self.render(messages, add_generation_prompt=False)
                asked = self.render(messages, add_generation_prompt=True)
            except UserError:  # it has no place for such a message
                continue
            if whole.startswith(start):
                (answers if role == "assistant" else others).append(whole[len(start) :])
            if asked.startswith(whole):
                requests.append(asked[len(whole) :])
        return answers, others, requests


def _in_any(tokens: Collection[str], texts: Collection[str]) -> frozenset[str]:
    joined = "\0".join(texts)
    return frozenset(token for token in tokens if token in joined)


def _by_name(source: Any) -> dict[str, str]:
    named = source if isinstance(source, Mapping) else {"default": source}
    if isinstance(source, Sequence) and not isinstance(source, str):
        entries = [each for each in source if isinstance(each, Mapping) and isinstance(each.get("name"), str)]
        named = {each["name"]: each.get("template") for each in entries}
    if not isinstance(named.get("default"), str) or not all(isinstance(text, str) for text in named.values()):
        raise UserError("tokenizer_config.json: no chat_template; add the template that the model is trained with")
    return dict(named)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for others. It renders what is in it."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def template_environment() -> Environment:
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
