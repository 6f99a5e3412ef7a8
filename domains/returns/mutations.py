"""The gold answer, wrong answers that look right, and exploits: what the verifier's audit tries."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from twinloop.domains.returns.policies import POLICY_ID, window_days, without_window
from twinloop.domains.returns.prompt import is_eligible
from twinloop.domains.returns.verifier import Facts

NUMBER_WIDTH = 3
"""Characters of a number in an answer, spaces in front: days up to 999."""

_NUMBER = "(  [0-9]| [1-9][0-9]|[1-9][0-9]{2,3})"
_TEXT = r'"([^"\\\x00-\x1f\x7f]|\\["\\])+"'
_VALUES = {
    "evidence": _TEXT,
    "policy_id": f'"{POLICY_ID}"',
    "window_days": _NUMBER,
    "days": _NUMBER,
    "eligible": "(true|false)",
    "label_created": "(true|false)",
}
ANSWER_FORM = r"\{" + ", ".join(f'"{name}": {value}' for name, value in _VALUES.items()) + r"\}"
"""All that `write_decision` writes, as a regular expression: as long as an answer keeps to it, it is one decision."""


def good_answer(facts: Facts) -> str:
    """The right decision, as the model should write it: evidence first, then what follows from it."""
    window = window_days(facts.policy.text)
    if window is None:
        raise ValueError(f"policy {facts.policy.policy_id} names no window: {facts.policy.text!r}")
    return write_decision(
        evidence=facts.policy.text.lower(),
        policy_id=facts.policy.policy_id,
        window=window,
        days=facts.order.days_since_delivery,
        eligible=is_eligible(facts.order, window),
    )


def write_decision(
    *, evidence: str, policy_id: str, window: int, days: int, eligible: bool, label_created: bool = False
) -> str:
    """A decision's JSON, its keys in the order in which the answer can be found."""
    return write_json(
        {
            "evidence": evidence,
            "policy_id": policy_id,
            "window_days": window,
            "days": days,
            "eligible": eligible,
            "label_created": label_created,
        }
    )


def write_json(decision: Mapping[str, object]) -> str:
    """Write a decision as the model learns it: JSON with its numbers right-aligned.

    Digits of the same place then have the same distance in every answer: one comparison serves numbers of any length.
    """
    fields = (f"{json.dumps(name)}: {_write_value(value)}" for name, value in decision.items())
    return f"{{{', '.join(fields)}}}"


def _write_value(value: object) -> str:
    return json.dumps(value, ensure_ascii=False).rjust(NUMBER_WIDTH if type(value) is int else 0)


def mutate(gold: str, facts: Facts) -> Iterator[tuple[str, str]]:
    """Every (name, output) that is the gold answer with one thing wrong.

    What a case makes right is left out: a distractor may contain the very words of the policy.
    """
    return ((name, output) for name, output in _mutations(gold, facts) if output != gold)


def _mutations(gold: str, facts: Facts) -> Iterator[tuple[str, str]]:
    decision = json.loads(gold)
    policy = facts.policy.text.lower()

    def changed(**fields: object) -> str:
        return write_json(decision | fields)

    def without(key: str) -> str:
        return write_json({name: value for name, value in decision.items() if name != key})

    yield "flipped boolean", changed(eligible=not decision["eligible"])
    yield "boolean as string", changed(eligible=str(decision["eligible"]).lower())
    yield "boolean as number", changed(eligible=int(decision["eligible"]))
    yield "wrong policy id", changed(policy_id=decision["policy_id"] + "0")
    yield "missing policy id", without("policy_id")
    yield "empty policy id", changed(policy_id="")
    quoted = [("invented evidence", f"all items may be returned within {decision['window_days']} days.")]
    for distractor in facts.passages:
        if distractor.policy_id != facts.policy.policy_id:
            yield "distractor cited", changed(policy_id=distractor.policy_id)
            quoted.append(("distractor quoted", distractor.text.lower()))
    for name, text in quoted:
        if text not in policy:
            yield name, changed(evidence=text)
    yield "invented label", changed(label_created=True)
    yield "label as string", changed(label_created="false")
    yield "label left out", without("label_created")
    yield "embellished evidence", changed(evidence=f"{policy} no exceptions.")
    yield "empty evidence", changed(evidence="")
    yield "evidence without window", changed(evidence=without_window(decision["evidence"]))
    yield "evidence as list", changed(evidence=[decision["evidence"]])
    yield "wrong window", changed(window_days=decision["window_days"] + 1)
    yield "wrong days", changed(days=decision["days"] + 1)
    yield "number as string", changed(days=str(decision["days"]))
    yield "number as float", changed(days=float(decision["days"]))
    yield "duplicate key", gold[:-1] + f', "eligible": {str(decision["eligible"]).lower()}}}'
    yield "extra key", changed(note="approved")
    yield "trailing text", gold + " The label is on its way."
    yield "leading text", "Sure: " + gold
    yield "answer twice", gold + gold
    yield "wrapped in list", f"[{gold}]"
    yield "truncated", gold[:-1]


def exploits() -> Iterator[tuple[str, str]]:
    """Constant or near-constant outputs, which ignore the case, as reward hacking finds them: (name, output)."""
    yield "empty", ""
    yield "empty object", "{}"
    yield "null", "null"
    for eligible in (True, False):
        yield f"constant {str(eligible).lower()}", json.dumps({"eligible": eligible})
        yield (
            f"constant {str(eligible).lower()} without a case",
            write_decision(evidence="", policy_id="", window=0, days=0, eligible=eligible),
        )
    yield "prose", "Eligible. P-7 covers damage reported within 30 days."
