"""Is a decision right? One boolean a predicate; the reward is 1 only when all of them hold.

`verify` knows the policy that applies and is used in training and evaluation. `check` knows only what the server
knows: the order's facts and the passages that were retrieved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twinloop.common.strict_json import NotJSONError, parse_json
from twinloop.domains.domain import Verdict
from twinloop.domains.returns.claims import claims_action
from twinloop.domains.returns.policies import Policy, covers, window_days
from twinloop.domains.returns.prompt import Order, is_eligible

PREDICATES = ("parsed", "eligible", "policy_id", "evidence", "window_days", "days", "no_unperformed_action")

CLAIM = "it claims an action, and no tool ran"

FIELDS: dict[str, type] = {
    "evidence": str,
    "policy_id": str,
    "window_days": int,
    "days": int,
    "eligible": bool,
    "label_created": bool,
}

_JSON_TYPES = {str: "string", int: "integer", bool: "boolean"}
DECISION_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {name: {"type": _JSON_TYPES[kind]} for name, kind in FIELDS.items()},
    "required": list(FIELDS),
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Facts:
    """What is trusted about a case. The model's output can never set it."""

    order: Order
    policy: Policy
    passages: tuple[Policy, ...]

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Facts:
        """Read the `facts` of a data record."""
        policy = record["policy"]
        return cls(
            order=Order(**record["order"]),
            policy=Policy(policy["policy_id"], policy["text"]),
            passages=tuple(Policy(p["policy_id"], p["text"]) for p in record["passages"]),
        )

    def to_record(self) -> dict[str, Any]:
        return {
            "order": self.order.model_dump(),
            "policy": {
                "policy_id": self.policy.policy_id,
                "text": self.policy.text,
                "window_days": window_days(self.policy.text),
            },
            "passages": [{"policy_id": p.policy_id, "text": p.text} for p in self.passages],
        }


def parse_decision(output_text: str) -> tuple[dict[str, Any] | None, str]:
    """The decision in an output, or None and what is wrong with it.

    Exactly one JSON object with exactly the fields of FIELDS, each of its own type (`true` is not 1, and "false" is
    not false), no key twice, nothing before or after.
    """
    try:
        decision = parse_json(output_text)
    except NotJSONError as error:
        return None, f"not one JSON object: {error}"
    if not isinstance(decision, dict):
        return None, "not a JSON object"
    if set(decision) != set(FIELDS):
        missing, extra = sorted(set(FIELDS) - set(decision)), sorted(set(decision) - set(FIELDS))
        return None, f"wrong fields: missing {missing}, unexpected {extra}"
    for name, kind in FIELDS.items():
        if type(decision[name]) is not kind:
            return None, f"{name} is {type(decision[name]).__name__}, not {kind.__name__}"
    return decision, ""


def quotes(evidence: str, passage: str) -> bool:
    """Whether the evidence is the passage's own words, its window included; letter case does not matter."""
    return window_days(evidence) is not None and evidence.lower() in passage.lower()


def _unparsed(output_text: str, problem: str) -> Verdict:
    """Nothing holds of what is no decision, except that also such a text may or may not claim an action."""
    claims = claims_action(output_text)
    reasons = {"parsed": f"the answer is {problem}"} | ({"no_unperformed_action": CLAIM} if claims else {})
    checks = dict.fromkeys(PREDICATES, False) | {"no_unperformed_action": not claims}
    return Verdict(checks, 0.0, reasons, parsed=False)


def _verdict(decision: dict[str, Any], order: Order, policy: Policy, eligible: bool, policy_found: bool) -> Verdict:
    window = window_days(policy.text)
    quoted = quotes(decision["evidence"], policy.text)
    predicates = {
        "parsed": True,
        "eligible": decision["eligible"] is eligible,
        "policy_id": policy_found and decision["policy_id"] == policy.policy_id,
        "evidence": quoted,
        "window_days": window is not None and decision["window_days"] == window,
        "days": decision["days"] == order.days_since_delivery,
        # A policy's own words may speak of labels that were sent; invented ones must not.
        "no_unperformed_action": not decision["label_created"] and (quoted or not claims_action(decision["evidence"])),
    }
    explanations = {
        "eligible": f"the verdict {str(decision['eligible']).lower()} does not follow from the policy and the facts",
        "policy_id": f"{decision['policy_id']} is not the policy that applies",
        "evidence": "the evidence is not quoted from the policy",
        "window_days": f"the window of {decision['window_days']} days is not the policy's",
        "days": f"{decision['days']} days is not what the order says ({order.days_since_delivery})",
        "no_unperformed_action": CLAIM,
    }
    reasons = {name: explanations[name] for name, holds in predicates.items() if not holds}
    return Verdict.of(predicates, output=decision, reasons=reasons)


def verify(output_text: str, facts: Facts) -> Verdict:
    """Judge an output against the trusted facts and the policy that applies."""
    decision, problem = parse_decision(output_text)
    if decision is None:
        return _unparsed(output_text, problem)
    window = window_days(facts.policy.text)
    eligible = window is not None and is_eligible(facts.order, window)
    return _verdict(decision, facts.order, facts.policy, eligible, policy_found=True)


def check(output_text: str, order: Order, passages: Sequence[Policy]) -> Verdict:
    """Judge an output by what the server knows; a decision that fails is not returned to anybody.

    The cited policy must be among the passages and speak of the order's reason, and the verdict must follow from the
    window that its text grants.
    """
    decision, problem = parse_decision(output_text)
    if decision is None:
        return _unparsed(output_text, problem)
    cited = next((p for p in passages if p.policy_id == decision["policy_id"]), None)
    if cited is None:
        return _verdict(decision, order, Policy("", ""), eligible=False, policy_found=False)
    window = window_days(cited.text)
    eligible = window is not None and is_eligible(order, window)
    return _verdict(decision, order, cited, eligible, policy_found=covers(cited.text, order.reason))
