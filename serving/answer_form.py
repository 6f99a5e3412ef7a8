"""The form that a domain states for its decisions, as what holds their text to it in the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from twinloop.common.errors import UserError
from twinloop.domains.domain import Domain, domain_code, explained
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.engine.grammar import Grammar, GrammarError, Grammars
from twinloop.serving.response_format import StructuredOutputs


def stated_form(domain: Domain) -> Mapping[str, Any] | None:
    """What `answer_form` says. Raises UserError where it raises."""
    with domain_code(domain, "answer_form", "its decisions"):
        return domain.answer_form()


def form_grammar(
    form: Mapping[str, Any] | None, tokenizer: ChatTokenizer, grammars: Grammars | None = None
) -> Grammar | None:
    """None for no form, and where a head answers with labels. grammars: of the tokenizer, where there are some already.

    Raises UserError for what is no form, or cannot be enforced.
    """
    if form is None or tokenizer.kind != "text":
        return None
    try:
        return StructuredOutputs.model_validate(form).constraint(grammars or Grammars(tokenizer))
    except ValidationError as error:
        raise _refused(explained(error)) from None
    except GrammarError as error:
        raise _refused(f"{next(iter(form))} {error}") from None


def _refused(why: str) -> UserError:
    return UserError(f"answer_form: {why}; correct it in the domain's module")
