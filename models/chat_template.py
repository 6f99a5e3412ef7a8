"""Chat templates as Jinja has them, and the marks that stand for content while one is rendered."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from twinloop.common.errors import UserError

MARK = re.compile("\ue000(\\d+)(j?)\ue001")
"""In the place of a text while a template is rendered: its index, and whether the template writes it inside of JSON."""


def mark(index: int, length: int = 3) -> str:
    """The placeholder of a text while the template is rendered, of at least so many characters."""
    return f"\ue000{index:0{length - 2}}\ue001"


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    """The filter `tojson` as transformers has it: Jinja's own would sort keys and write `<` as HTML needs it."""
    return MARK.sub("\ue000\\1j\ue001", json.dumps(value, ensure_ascii=False, indent=indent))


def compile_template(source: Any) -> Any:
    """The template of tokenizer_config.json. Raises UserError where there is none, or none that parses."""
    if not isinstance(source, str):
        raise UserError("tokenizer_config.json: no chat_template; add the template that the model is trained with")
    # As transformers does it: sandboxed, since a model directory may come from strangers.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _raise_template_error
    environment.filters["tojson"] = _to_json
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise UserError(f"tokenizer_config.json: chat_template does not parse ({error})") from error


def _raise_template_error(message: str) -> NoReturn:
    raise TemplateError(message)
