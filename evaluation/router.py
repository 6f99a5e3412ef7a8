"""From a failure to the layer that owns it, and what to do there next.

Debugging starts by knowing which loop owns the failure: weights (data, training), or what surrounds frozen weights
(retrieval, prompt, serving, release). A failure may show several signs; the most severe decides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from twinloop.domains.domain import Domain
from twinloop.domains.owners import FORMAT, LATENCY, RELEASE, RETRIEVAL, SIDE_EFFECT, UNKNOWN, Owner

Sign = tuple[re.Pattern[str], ...]


@dataclass(frozen=True)
class Failure:
    """What is known of a failure by measurement."""

    failed_predicates: frozenset[str] = field(default_factory=frozenset)
    """Names of the domain's predicates that do not hold; with "parsed" among them, only critical ones were judged."""
    missing_fields: tuple[str, ...] = ()
    """Fields of the answer that are absent or empty."""
    release_regression: bool = False
    """It concerns a case that a release must never fail, or one that the champion passes."""
    document_version: int | None = None
    """Version of the document that the answer was given under, and the one that is current."""
    current_document_version: int | None = None
    ttft_ms: float | None = None
    ttft_budget_ms: float | None = None

    @property
    def stale_document(self) -> bool:
        used, current = self.document_version, self.current_document_version
        return used is not None and current is not None and used < current

    @property
    def over_budget(self) -> bool:
        measured, budget = self.ttft_ms, self.ttft_budget_ms
        # Not `measured > budget`: with a NaN nothing shows that it was in time.
        return measured is not None and budget is not None and not measured <= budget


def route(failure: str | Failure, domain: Domain) -> Owner:
    """The layer that owns a failure, from a symptom in plain words or from what was measured."""
    if isinstance(failure, str):
        signs = _signs(tuple(domain.symptoms), tuple(domain.actions))
        return next((owner for owner, all_of in signs if any(_shows(failure, sign) for sign in all_of)), UNKNOWN)
    failed = [name for name in domain.predicates if name in failure.failed_predicates]
    if critical := [name for name in failed if name in domain.critical]:
        return domain.predicates[critical[0]].owner
    if failure.release_regression:
        return RELEASE
    if failure.stale_document:
        return RETRIEVAL
    if "parsed" in failure.failed_predicates or failure.missing_fields:
        return FORMAT
    owners = [domain.predicates[name].owner for name in failed]
    return next((owner for owner in owners if owner != UNKNOWN), LATENCY if failure.over_budget else UNKNOWN)


@cache
def _signs(symptoms: Sequence[str], actions: Sequence[str]) -> tuple[tuple[Owner, tuple[Sign, ...]], ...]:
    """By owner, in order of severity: an invented action first, a slow answer last.

    A sign is one expression, or several that must follow one another in the text. Each is searched after the end of the
    one before: as one expression, joined by `.*`, they would take quadratic or cubic time. That gives the same answer
    as long as an expression's first match is also the first to end, which holds for whole words that do not contain
    each other.
    """
    document = "|".join(("passage", "document", "evidence", "index", "version", *symptoms))
    part = "|".join(("field", "key", "citation", "evidence", *symptoms))
    action = "|".join(("action", *actions))
    outdated = "stale|outdated|out-of-date|out of date|superseded|obsolete"
    signs: tuple[tuple[Owner, tuple[tuple[str, ...], ...]], ...] = (
        (
            SIDE_EFFECT,
            (
                (r"side[- ]effect|without (?:a )?tool|no tool (?:ran|was|call)|unperformed",),
                (r"\b(?:promis|claim|invent|pretend|hallucinat|confirm|assert)\w*\b", rf"\b(?:{action})"),
                (rf"\b(?:{action})\b", r"\b(?:promised|claimed|invented|never (?:created|issued|sent))"),
            ),
        ),
        (
            RELEASE,
            (
                (r"regress|\bworse than (?:the )?champion",),
                (
                    r"\b(?:new|latest|candidate|promoted|released?)\b",
                    r"\b(?:checkpoint|model|version|release|weights)\b",
                    r"\b(?:fail|worse|broke|wrong|drop)",
                ),
                (r"\bgolden\b", r"\bfail"),
                (r"\bfail\w*\b", r"\bgolden"),
            ),
        ),
        (
            RETRIEVAL,
            (
                (rf"\b(?:{outdated}|expired|old|previous)\b", rf"\b(?:{document})"),
                (rf"\b(?:{document})\b", rf"\b(?:{outdated}|not (?:retrieved|found|refreshed))"),
            ),
        ),
        (
            FORMAT,
            (
                (
                    r"\b(?:missing|lacks?|without|omits?|omitted|no|drops?|dropped|forgot|forgets)\b",
                    rf"\b(?:{part})",
                ),
                (rf"\b(?:{part})\b", r"\b(?:missing|absent|omitted|left out|empty)"),
                (
                    r"\b(?:malformed|invalid|broken|unparse?able|unparsed|truncated|cut off)\b|not (?:valid )?json"
                    r"|wrong format|duplicate key",
                ),
            ),
        ),
        (
            LATENCY,
            (
                (
                    r"\bslow|latenc|\bttft\b|first token|time[ds]? ?out|throughput|queue|kv[- ]cache|too long to"
                    r"|out of memory|\boom\b",
                ),
            ),
        ),
    )
    return tuple(
        (owner, tuple(tuple(re.compile(part, re.IGNORECASE) for part in sign) for sign in all_of))
        for owner, all_of in signs
    )


def _shows(symptom: str, sign: Sign) -> bool:
    """Whether the parts of a sign follow one another in the text. Takes time in proportion to its length."""
    end = 0
    for part in sign:
        match = part.search(symptom, end)
        if match is None:
            return False
        end = match.end()
    return True
