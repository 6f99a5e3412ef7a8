"""What a chat template would take from its caller or the clock, written down in the template itself.

A model is trained with one prompt, and then answers in this server, in transformers and in llama.cpp. All of them read
the template beside the weights, so what is stated there is the same everywhere, today and in a year.
"""

from __future__ import annotations

import datetime

from jinja2 import nodes
from pydantic import BaseModel, ConfigDict

from twinloop.models.jinja_template import template_environment

THINKING, DATE = "enable_thinking", "strftime_now"
"""Names that published templates look up (Qwen3, SmolLM3; Llama 3.2, SmolLM3)."""


class TemplatePins(BaseModel):
    """thinking: whether an answer may begin with a thought; without, the prompt has the empty one where the template
    can write it. date: what the template writes as today's."""

    model_config = ConfigDict(frozen=True)

    thinking: bool
    date: datetime.date

    def applied(self, source: str) -> str:
        """The template, what it looks up of these stated first; itself where it looks up neither."""
        program = template_environment().parse(source)
        looked_up = {name.name for name in program.find_all(nodes.Name) if name.ctx == "load"}
        stated = []
        if THINKING in looked_up and not self.thinking:
            stated.append(f"{{%- set {THINKING} = {THINKING} | default(false) %}}")
        if DATE in looked_up:
            stated.append(self._dates(program))
        # Where blocks are trimmed, the line break after the last one is not written.
        return "".join([*stated, "\n", source]) if stated else source

    def _dates(self, program: nodes.Template) -> str:
        """`strftime_now` as a macro: Jinja has no way to format a date by itself."""
        forms = [
            argument.value
            for call in program.find_all(nodes.Call)
            if isinstance(call.node, nodes.Name) and call.node.name == DATE
            for argument in call.args
            if isinstance(argument, nodes.Const) and isinstance(argument.value, str)
        ]
        branches = [f"if form == {form!r} %}}{self.date.strftime(form)}" for form in dict.fromkeys(forms)]
        last = self.date.isoformat()
        text = "{%- el".join([*branches, f"se %}}{last}"]) + "{%- endif %}" if branches else last
        return f"{{%- macro {DATE}(form) %}}{'{%- ' if branches else ''}{text}{{%- endmacro %}}"
