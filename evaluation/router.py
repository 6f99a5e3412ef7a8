"""From a failure to the layer that owns it, and what to do there next.

Debugging starts by knowing which loop owns the failure: weights (data, training), or what stands around frozen weights
(retrieval, prompt, serving, release). A failure may show several signs; the gravest decides.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Route:
    """Who looks at a failure, and what they do first."""

    owner: str
    next_action: str


RETRIEVAL = Route("retrieval index", "refresh retrieval document and rerun policy evals")
FORMAT = Route("prompt contract or SFT data", "tighten output contract and rerun format evals")
SIDE_EFFECT = Route("preference data and safety eval", "add preference pairs and rerun safety evals")
LATENCY = Route("inference serving", "profile queueing and KV-cache pressure")
RELEASE = Route("evaluation gate and rollback", "block or roll back the release")
UNKNOWN = Route("investigate with a labeled trace", "label the trace")

# In order of gravity: a promise to a customer first, a slow answer last. A sign is one expression, or several that must
# follow one another in the text. Each is searched after the end of the one before: as one expression, joined by `.*`,
# they would take quadratic or cubic time. That gives the same answer as long as an expression's first match is also the
# first to end, which holds for whole words that do not contain each other.
_SIGNS: tuple[tuple[Route, tuple[tuple[str, ...], ...]], ...] = (
    (
        SIDE_EFFECT,
        (
            (r"side[- ]effect|without (?:a )?tool|no tool (?:ran|was|call)|unperformed",),
            (
                r"\b(?:promis|claim|invent|pretend|hallucinat|confirm|assert)\w*\b",
                r"\b(?:label|refund|replacement|action)",
            ),
            (
                r"\b(?:label|refund|replacement)\b",
                r"\b(?:promised|claimed|invented|never (?:created|issued|sent))",
            ),
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
            (
                r"\b(?:stale|outdated|out-of-date|out of date|superseded|obsolete|expired|old|previous)\b",
                r"\b(?:polic|passage|document|evidence|index|version|p-\d)",
            ),
            (
                r"\b(?:polic\w*|passage|document|index|p-\d+)\b",
                r"\b(?:stale|outdated|out-of-date|out of date|superseded|obsolete|not (?:retrieved|found|refreshed))",
            ),
        ),
    ),
    (
        FORMAT,
        (
            (
                r"\b(?:missing|lacks?|without|omits?|omitted|no|drops?|dropped|forgot|forgets)\b",
                r"\b(?:policy_id|policy id|evidence|eligible|label_created|window_days|field|key|citation)",
            ),
            (
                r"\b(?:policy_id|policy id|evidence|field|key|citation)\b",
                r"\b(?:missing|absent|omitted|left out|empty)",
            ),
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
_EXPRESSIONS = tuple(
    (route, tuple(tuple(re.compile(part, re.IGNORECASE) for part in sign) for sign in signs)) for route, signs in _SIGNS
)


@dataclass(frozen=True)
class Failure:
    """What is known of a failure, measured rather than told."""

    failed_predicates: frozenset[str] = field(default_factory=frozenset)
    """Names of the verifier's predicates that do not hold; "parsed" among them means that no other could be judged."""
    claims_action: bool = False
    missing_fields: tuple[str, ...] = ()
    """Fields of the decision that are absent or empty."""
    release_regression: bool = False
    """It concerns a case that a release must never fail, or one that the champion passes."""
    policy_version: int | None = None
    """Version of the policy that the answer was given under, and the one now in force."""
    current_policy_version: int | None = None
    ttft_ms: float | None = None
    ttft_budget_ms: float | None = None

    @property
    def stale_policy(self) -> bool:
        used, current = self.policy_version, self.current_policy_version
        return used is not None and current is not None and used < current

    @property
    def over_budget(self) -> bool:
        measured, budget = self.ttft_ms, self.ttft_budget_ms
        # Not `measured > budget`: a NaN is no proof of being in time.
        return measured is not None and budget is not None and not measured <= budget


def route(failure: str | Failure) -> Route:
    """The layer that owns a failure, from a symptom in plain words or from what was measured."""
    if isinstance(failure, str):
        return next((owner for owner, signs in _EXPRESSIONS if any(_shows(failure, sign) for sign in signs)), UNKNOWN)
    unparsed = "parsed" in failure.failed_predicates
    if failure.claims_action or ("no_side_effect" in failure.failed_predicates and not unparsed):
        return SIDE_EFFECT
    if failure.release_regression:
        return RELEASE
    if failure.stale_policy:
        return RETRIEVAL
    if unparsed or failure.missing_fields:
        return FORMAT
    return LATENCY if failure.over_budget else UNKNOWN


def _shows(symptom: str, sign: tuple[re.Pattern[str], ...]) -> bool:
    """Whether the parts of a sign follow one another in the text. Takes time in proportion to its length."""
    end = 0
    for part in sign:
        match = part.search(symptom, end)
        if match is None:
            return False
        end = match.end()
    return True
