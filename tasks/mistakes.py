"""Mistakes in a recipe, in words: where they are, what is wrong, and what is allowed there."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def explain_all(
    error: ValidationError, fields: Any, model: type[BaseModel], place: str = "", others: Sequence[str] = ()
) -> list[str]:
    """One line for each mistake in `fields`, which are those of `model`. place: where the recipe holds them, with
    `others` beside them."""
    # An unknown key explains a missing one: it comes first.
    found = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    return [_explain(dict(problem), fields, model, place, others) for problem in found]


def _explain(problem: dict[str, Any], fields: Any, model: type[BaseModel], place: str, others: Sequence[str]) -> str:
    location: Sequence[str | int] = problem["loc"]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    key = f"{place}{path}".removeprefix(".")
    context = problem.get("ctx", {})
    if problem["type"] == "extra_forbidden":
        known = [*(others if len(location) == 1 else ()), *_keys(model, location[:-1])]
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{key}: missing, and it has no default"
    value: Any = fields
    for part in location:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            value = None
            break
    if problem["type"] == "literal_error":
        near = difflib.get_close_matches(str(value), [w.strip("' ") for w in re.split(r",| or ", context["expected"])])
        hint = f" (did you mean {near[0]}?)" if near else ""
        return f"{key}: {value!r} is not one of {context['expected'].replace(' or ', ', ')}{hint}"
    if problem["type"] == "model_type":
        return f"{key}: {value!r}: not a mapping; known in it: {', '.join(_keys(model, location))}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {value!r}: {message[0].lower()}{message[1:]}"


def _keys(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """The keys that a section knows."""
    for part in (part for part in location if isinstance(part, str)):  # a list's sections have one kind
        found = next((field for name, field in model.model_fields.items() if part in (name, field.alias)), None)
        kinds = get_args(found.annotation) or (found.annotation,) if found else ()  # of `Section | None`, the section
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if section is None:
            return []
        model = section
    return [field.alias or name for name, field in model.model_fields.items()]
