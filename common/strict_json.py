"""JSON as its standard says it, from writers that are not trusted: a data file, a model.

Python's own parser takes the last of two equal keys, reads NaN, and recurses as deep as the text is nested.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

MAX_DEPTH = 128
"""Levels of objects and lists. `json` stops at about 1,000, less what its caller uses of the stack."""


class NotJSONError(ValueError):
    """Why a text is not one JSON value, such as "expecting value at column 1"."""


def parse_json(text: str) -> Any:
    """The one JSON value of a text; a number that is too large is read as infinity.

    Raises NotJSONError, also for a key that appears twice in one object, for NaN and Infinity, and for more than
    MAX_DEPTH levels.
    """
    if _too_deep(text):  # before `json`, which recurses
        raise NotJSONError(f"nested too deep (more than {MAX_DEPTH} levels)")
    try:
        return _JSON.decode(text)
    except json.JSONDecodeError as error:
        raise NotJSONError(f"{error.msg.lower()} at column {error.colno}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise NotJSONError("a key appears twice in one object")
    return fields


def _no_constant(name: str) -> Any:
    raise NotJSONError(f"{name} is no JSON value")


def _integer(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:  # more digits than Python converts; `json` gives infinity for 1e999 too
        return math.inf


_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_integer)
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)


def _too_deep(text: str) -> bool:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return False
    depth = 0
    for token in _STRING_OR_BRACKET.finditer(text):
        start = text[token.start()]
        depth += (start in "[{") - (start in "]}")
        if depth > MAX_DEPTH:
            return True
    return False
