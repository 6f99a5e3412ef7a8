"""What a chat template would take from its caller or the clock, written down in the template itself.

A model is trained with one prompt, and then answers in this server, in transformers and in llama.cpp. All of them read
the template beside the weights, so what is stated there is the same everywhere, today and in a year. It is stated
whatever the caller says: llama.cpp gives every template `enable_thinking`, true unless it is told otherwise, and those
of Llama 3 today's `date_string`.
"""

from __future__ import annotations

import datetime

from jinja2 import nodes
from pydantic import BaseModel, ConfigDict

from twinloop.models.jinja_template import template_environment

THINKING, CLOCK, DATE = "enable_thinking", "strftime_now", "date_string"
"""Names that published templates look up (Qwen3, SmolLM3; Llama 3.2, SmolLM3; Llama 3)."""

_LLAMA_FORM = "%d %b %Y"
"""Of a date that a template takes from its caller and doesn't write by itself: Llama 3.1's."""


class TemplatePins(BaseModel):
    """thinking: whether an answer may begin with a thought; without, the prompt has the empty one where the template
    can write it. date: what the template writes as today's."""

    model_config = ConfigDict(frozen=True)

    thinking: bool
    date: datetime.date

    def applied(self, source: str) -> str:
        """The template, what it looks up of these stated first; itself where it looks up none of them."""
        program = template_environment().parse(source)
        looked_up = {name.name for name in program.find_all(nodes.Name) if name.ctx == "load"}
        forms = _date_forms(program)
        stated = []
        if THINKING in looked_up and not self.thinking:
            stated.append(f"{{%- set {THINKING} = false %}}")
        if CLOCK in looked_up:
            stated.append(self._clock(forms))
        if DATE in looked_up:
            stated.append(f"{{%- set {DATE} = {self.date.strftime([*forms, _LLAMA_FORM][0])!r} %}}")
        # Where blocks are trimmed, the line break after the last one is not written.
        return "".join([*stated, "\n", source]) if stated else source

    def _clock(self, forms: list[str]) -> str:
        """`strftime_now` as a macro: Jinja has no way to format a date by itself."""
        branches = [f"if form == {form!r} %}}{self.date.strftime(form)}" for form in forms]
        last = self.date.isoformat()
        text = "{%- el".join([*branches, f"se %}}{last}"]) + "{%- endif %}" if branches else last
        return f"{{%- macro {CLOCK}(form) %}}{'{%- ' if branches else ''}{text}{{%- endmacro %}}"


def _date_forms(program: nodes.Template) -> list[str]:
    """The forms in which a template asks for the date."""
    forms = [
        argument.value
        for call in program.find_all(nodes.Call)
        if isinstance(call.node, nodes.Name) and call.node.name == CLOCK
        for argument in call.args
        if isinstance(argument, nodes.Const) and isinstance(argument.value, str)
    ]
    return list(dict.fromkeys(forms))
