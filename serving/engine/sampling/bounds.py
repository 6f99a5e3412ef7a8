"""Fields of a dataclass that say which values they may have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, fields
from typing import Any

from twinloop.common.errors import UserError


def bounded(default: Any, holds: Callable[[Any], bool], words: str) -> Any:
    """A field. words: what its value must be, where `holds` is not true of it."""
    return field(default=default, metadata={"holds": holds, "words": words})


def check_bounds(params: Any) -> None:
    """Raise UserError for the first field of a dataclass whose value is out of bounds."""
    for each in fields(params):
        value = getattr(params, each.name)
        if "holds" in each.metadata and not each.metadata["holds"](value):
            raise UserError(f"sampling: {each.name} is {value}; it must be {each.metadata['words']}")
