"""Words as a query of FTS5. They may come from anybody, so nothing in them is read as its syntax."""

from __future__ import annotations

import unicodedata

MAX_WORDS = 64
"""Of a longer query the first ones count: a request must not cost more the longer its text is."""


def match_expression(query: str) -> str | None:
    """What finds the documents that hold any of the words, or None where there is no word.

    Each word is quoted, so that AND, NEAR or a column's name are words too. What is one word, and that letter case does
    not matter, is FTS5's rule (unicode61), for the documents and for the query: here it is only cut where both agree.
    """
    words = dict.fromkeys("".join(c if _in_word(c) else " " for c in query.lower()).split())
    return " OR ".join(f'"{word}"' for word in [*words][:MAX_WORDS]) or None


def _in_word(character: str) -> bool:
    """Letters, numbers and the marks on them."""
    return unicodedata.category(character)[0] in "LNM"
