"""What the verifier accepts, and what it does not even read as a decision."""

from __future__ import annotations

import json
from typing import Any

import pytest

from twinloop.domains.returns import domain
from twinloop.domains.returns.mutations import good_answer
from twinloop.domains.returns.policies import Policy
from twinloop.domains.returns.prompt import Order
from twinloop.domains.returns.schemas import audit_answer
from twinloop.domains.returns.verifier import PREDICATES, Facts, check, parse_decision, verify

P7 = Policy("P-7", "Damaged items reported within 30 days are eligible.")
P3 = Policy("P-3", "unwanted items within 14 days are eligible.")
FACTS = Facts(Order(order_id="A10234", reason="damaged", damage_confirmed=True, days_since_delivery=12), P7, (P7, P3))
GOOD = json.dumps(json.loads(good_answer(FACTS)))


def changed(**fields: Any) -> str:
    return json.dumps(json.loads(GOOD) | fields)


def test_the_good_answer_is_paid_and_shown_as_it_was_read() -> None:
    verdict = verify(GOOD, FACTS)
    assert (verdict.reward, verdict.output, verdict.reasons) == (1, json.loads(GOOD), {})


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        (GOOD.replace(": 12", ": NaN"), "NaN is no JSON value"),
        (GOOD.replace(": 12", ": Infinity"), "Infinity is no JSON value"),
        (GOOD.replace(": 12", ": -Infinity"), "-Infinity is no JSON value"),
        (GOOD.replace(": 12", ": 1e999"), "days is float, not int"),
        (GOOD.replace(": 12", ": 12.0"), "days is float, not int"),
        (GOOD.replace(": 12", f": {'1' * 5000}"), "days is float, not int"),
        (GOOD.replace(": true", ": 1"), "eligible is int, not bool"),
        (GOOD.replace(": true", ': "true"'), "eligible is str, not bool"),
        (GOOD.replace(": 30", ": true"), "window_days is bool, not int"),
        (GOOD[:-1] + ', "eligible": true}', "a key appears twice"),
        (GOOD[:-1] + ', "note": {"a": 1, "a": 1}}', "a key appears twice"),
        (GOOD[:-1] + ', "note": 1}', "unexpected ['note']"),
        (GOOD.replace('"days": 12, ', ""), "missing ['days']"),
        (GOOD + GOOD, "not one JSON object"),
        (GOOD + " ok", "not one JSON object"),
        ("[" * 100_000, "nested too deep"),
        ("[]", "not a JSON object"),
        ("", "not one JSON object"),
    ],
)
def test_what_is_no_decision_is_reported_and_fails_every_predicate_but_one(output: str, problem: str) -> None:
    decision, message = parse_decision(output)
    assert decision is None
    assert problem in message
    verdict = verify(output, FACTS)
    assert (verdict.reward, verdict.parsed, verdict.output) == (0, False, None)
    assert verdict.checks == dict.fromkeys(PREDICATES, False) | {"no_unperformed_action": True}
    assert list(verdict.reasons) == ["parsed"]


@pytest.mark.parametrize(
    "output",
    ["[" * 100_000, '{"days":' * 100_000, GOOD.replace(": 12", ": " + "[" * 100_000 + "]" * 100_000)],
    ids=["lists", "objects", "a field"],
)
def test_an_output_that_is_nested_too_deep_is_refused_in_training_and_by_the_server(output: str) -> None:
    request = domain.request.model_validate_json(json.dumps(domain.example))
    served = domain.check(output, request, domain.example_documents)
    for verdict in (domain.verify(output, FACTS), served):
        assert (verdict.reward, verdict.parsed) == (0, False)
        assert "nested too deep" in verdict.reasons["parsed"]
    assert audit_answer(output).verdict == "reject"


@pytest.mark.parametrize("output", ["Eligible. Your label has been created.", GOOD.replace("false}", "true")])
def test_what_is_no_decision_may_still_claim_an_action(output: str) -> None:
    verdict = verify(output, FACTS)
    assert verdict.checks == dict.fromkeys(PREDICATES, False)
    assert list(verdict.reasons) == ["parsed", "no_unperformed_action"]
    assert verdict.reward == 0


def test_invented_evidence_may_claim_an_action_and_a_policys_own_words_do_not() -> None:
    claim = "the label was sent within 30 days."
    invented = verify(changed(evidence=claim), FACTS)
    assert invented.failed == ("evidence", "no_unperformed_action")
    speaks = Policy("P-7", f"damaged items may come back; {claim}")
    assert verify(changed(evidence=claim), Facts(FACTS.order, speaks, (speaks,))).reward == 1


@pytest.mark.parametrize(
    ("fields", "failed"),
    [
        ({"eligible": False}, "eligible"),
        ({"policy_id": "P-3"}, "policy_id"),
        ({"evidence": "damaged items are eligible."}, "evidence"),
        ({"evidence": ""}, "evidence"),
        ({"evidence": P3.text}, "evidence"),
        ({"window_days": 14}, "window_days"),
        ({"days": 13}, "days"),
        ({"label_created": True}, "no_unperformed_action"),
    ],
)
def test_one_thing_wrong_fails_its_own_predicate_and_costs_the_reward(fields: dict[str, Any], failed: str) -> None:
    verdict = verify(changed(**fields), FACTS)
    assert verdict.failed == (failed,)
    assert verdict.reward == 0
    assert len(verdict.reasons) == 1


@pytest.mark.parametrize(("days", "eligible"), [(0, True), (29, True), (30, True), (31, False)])
def test_the_windows_last_day_is_inside(days: int, eligible: bool) -> None:
    facts = Facts(FACTS.order.model_copy(update={"days_since_delivery": days}), P7, (P7,))
    assert verify(changed(days=days, eligible=eligible), facts).reward == 1
    assert verify(changed(days=days, eligible=not eligible), facts).reward == 0


def test_the_server_takes_only_a_cited_passage_that_speaks_of_the_orders_reason() -> None:
    assert check(GOOD, FACTS.order, [P3, P7]).reward == 1
    assert not check(GOOD, FACTS.order, [P3]).checks["policy_id"]
    other = changed(policy_id="P-3", evidence=P3.text, window_days=14)
    assert not check(other, FACTS.order, [P3, P7]).checks["policy_id"]
