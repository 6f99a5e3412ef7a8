"""The returns domain, as the decision service takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from twinloop.domains.returns.policies import Policy, covers, window_days
from twinloop.domains.returns.prompt import MAX_MESSAGE_CHARACTERS, RETRIEVED_PASSAGES, Order, build_prompt, is_eligible
from twinloop.domains.returns.verifier import check
from twinloop.serving.decisions import DecisionDomain

MAX_ANSWER_TOKENS = 160
"""The longest decision quotes a policy of full length; the usual one has about 60 tokens."""


def _query(order: Order) -> str:
    return order.reason


def _precheck(order: Order, passages: Sequence[Policy]) -> Mapping[str, str]:
    """Cases that no answer could settle: no policy speaks of the reason, or two that do contradict each other."""
    applicable = [passage for passage in passages if covers(passage.text, order.reason)]
    if not applicable:
        return {"retrieval": f"no policy in force speaks of {order.reason} items"}
    windows = {policy.policy_id: window_days(policy.text) for policy in applicable}
    if len({window is not None and is_eligible(order, window) for window in windows.values()}) > 1:
        return {"retrieval": f"policies in force contradict each other: {' and '.join(windows)}"}
    return {}


_FORMAT = "prompt contract or SFT data"
_UNKNOWN = "investigate with a labeled trace"

OWNERS = {
    "retrieval": "retrieval index",
    "prompt": _FORMAT,
    "generation": "inference serving",
    "check": "inference serving",
    "parsed": _FORMAT,
    "no_unperformed_action": "preference data and safety eval",
    **dict.fromkeys(("eligible", "policy_id", "evidence", "window_days", "days"), _UNKNOWN),
}
"""The layer that owns a failed check, by the names that the failure router uses."""

RETURNS: DecisionDomain[Order] = DecisionDomain(
    order_model=Order,
    retrieved_passages=RETRIEVED_PASSAGES,
    max_message_characters=MAX_MESSAGE_CHARACTERS,
    max_answer_tokens=MAX_ANSWER_TOKENS,
    query=_query,
    precheck=_precheck,
    build_prompt=build_prompt,
    check=check,
    owners=OWNERS,
)
