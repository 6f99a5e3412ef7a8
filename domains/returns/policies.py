"""Return policies: numbered sentences that state within how many days what may come back."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

WINDOW = r"(?i)\bwithin ([0-9]{1,4}) days\b"
"""How a text names a window; the group is its number of days. For `re` and for polars alike."""
POLICY_ID = "P-(0|[1-9][0-9]{0,8})"
MAX_TEXT_CHARACTERS = 300

_WINDOW = re.compile(WINDOW)
_POLICY_ID = re.compile(POLICY_ID)
_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories that have no place in a policy: control, invisible and line-breaking characters, surrogates."""


@dataclass(frozen=True)
class Policy:
    """One version of one policy, as retrieved."""

    policy_id: str
    text: str
    version: int = 1


def window_days(text: str) -> int | None:
    """The number of days that a policy grants, or None where `within N days` is not in it exactly once."""
    found = _WINDOW.findall(text)
    return int(found[0]) if len(found) == 1 else None


def without_window(text: str) -> str:
    """The text without the words that name its window."""
    return _WINDOW.sub("", text)


def check_policy(policy_id: str, text: str) -> str | None:
    """Why no decision could be based on a policy, or None. White space around its text does not count."""
    if _POLICY_ID.fullmatch(policy_id) is None:
        return "the id must be P- and a number, such as P-7"
    text = text.strip()
    if not text:
        return "the text is empty; write one sentence that names its window"
    if len(text) > MAX_TEXT_CHARACTERS:
        return f"the text has {len(text)} characters; at most {MAX_TEXT_CHARACTERS} fit"
    for place, character in enumerate(text):
        if unicodedata.category(character) in _UNPRINTABLE:
            return f"character {place + 1} (U+{ord(character):04X}) cannot be seen; remove it"
    if window_days(text) is None:
        return 'the text must say "within N days" exactly once; nothing can be decided without a window'
    return None


def words(text: str) -> frozenset[str]:
    """The lower-case words of a text: what retrieval and the checks compare."""
    return frozenset(re.findall(r"[a-z]+", text.lower()))


def covers(text: str, reason: str) -> bool:
    """Whether a policy covers this reason: each of the reason's words is in it."""
    return bool(reason) and words(reason) <= words(text)
