"""Words as a query of FTS5. They may come from anybody, so nothing in them is read as its syntax."""

from __future__ import annotations

import re

MAX_WORDS = 64
"""Of a longer query the first ones count: a request must not cost more the longer its text is."""

_WORD = re.compile(r"\w+")


def match_expression(query: str) -> str | None:
    """What finds the documents that hold any of the words, or None where there is no word.

    Each word is quoted, so that AND, NEAR or a column's name are words too.
    """
    words = dict.fromkeys(_WORD.findall(query.casefold()))
    return " OR ".join(f'"{word}"' for word in [*words][:MAX_WORDS]) or None
