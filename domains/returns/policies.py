"""Return policies: numbered sentences that say within how many days what may come back."""

from __future__ import annotations

import re
from dataclasses import dataclass

_WINDOW = re.compile(r"\bwithin (\d{1,4}) days\b", re.IGNORECASE)


@dataclass(frozen=True)
class Policy:
    """One version of one policy, as retrieved."""

    policy_id: str
    text: str
    version: int = 1


def window_days(text: str) -> int | None:
    """The number of days that a policy grants, or None where it does not say `within N days` exactly once."""
    found = _WINDOW.findall(text)
    return int(found[0]) if len(found) == 1 else None


def words(text: str) -> frozenset[str]:
    """The lower-case words of a text: what retrieval and the checks compare."""
    return frozenset(re.findall(r"[a-z]+", text.lower()))


def covers(text: str, reason: str) -> bool:
    """Whether a policy speaks of this reason: each of the reason's words stands in it."""
    return bool(reason) and words(reason) <= words(text)
