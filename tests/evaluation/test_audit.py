"""A verifier that pays for one wrong answer does not pass its audit."""

import json
from collections.abc import Iterator

import pytest

from twinloop.domains.returns.mutations import good_answer, mutate, shortcuts
from twinloop.domains.returns.policies import Policy
from twinloop.domains.returns.prompt import Order
from twinloop.domains.returns.verifier import Facts, Verdict, verify
from twinloop.evaluation.audit import AuditReport, audit_verifier


def cases() -> Iterator[tuple[str, Facts]]:
    policies = (
        Policy("P-7", "damaged items reported within 30 days are eligible."),
        Policy("P-3", "late orders may come back within 30 days."),
    )
    for reason, policy in (("damaged", policies[0]), ("late", policies[1])):
        for days in (0, 30, 31, 99):
            order = Order(order_id="A10234", reason=reason, damage_confirmed=True, days_since_delivery=days)
            facts = Facts(order, policy, policies)
            yield good_answer(facts), facts


def test_the_domains_verifier_passes() -> None:
    report = audit_verifier(verify, cases(), mutate, shortcuts)
    assert report.passed, report.summary
    assert report.goods == 8
    assert report.tried["flipped boolean"] == 8
    assert report.tried["duplicate key"] == 8
    assert report.unparsed > 0
    assert AuditReport.model_validate_json(report.model_dump_json()) == report


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("Within 30 days of delivery any damaged goods qualify.", "late orders may come back within 30 days."),
        ("damaged goods qualify within 030 days", "late orders may come back within 30 days."),
        ("all items may be returned within 30 days.", "late orders may come back within 30 days."),
        ("damaged goods qualify within 30 days.", "Damaged goods qualify within 30 days."),
        ("within 30 days", "within 30 days"),
    ],
)
@pytest.mark.parametrize("policy_id", ["P-7", ""])
def test_however_a_policy_is_worded_no_mutation_is_a_right_answer(text: str, other: str, policy_id: str) -> None:
    policy = Policy(policy_id, text)
    order = Order(order_id="A10234", reason="damaged", damage_confirmed=True, days_since_delivery=12)
    facts = Facts(order, policy, (policy, Policy("P-3", other)))
    good = good_answer(facts)
    report = audit_verifier(verify, [(good, facts)], mutate, shortcuts)
    assert report.passed, report.summary
    assert all(output != good for _, output in mutate(good, facts))
    assert {"evidence without window", "embellished evidence", "distractor cited"} <= set(report.tried)


def test_a_lenient_verifier_is_caught_and_named() -> None:
    def lenient(output: str, facts: Facts) -> Verdict:
        try:
            return verify(json.dumps(json.loads(output)), facts)  # loses duplicate keys
        except ValueError:
            return verify(output, facts)

    report = audit_verifier(lenient, cases(), mutate, shortcuts)
    assert not report.passed
    assert report.slipped == {"duplicate key": 8}
    assert len(report.slips) == 8
    assert {slip.name for slip in report.slips} == {"duplicate key"}
    assert "duplicate key (8)" in report.summary


def test_a_verifier_that_refuses_good_answers_is_caught() -> None:
    report = audit_verifier(lambda output, facts: verify(output + "!", facts), cases(), mutate, shortcuts)
    assert not report.passed
    assert report.goods_refused == 8
    assert not report.slipped
    assert all(slip.kind == "good" and slip.why for slip in report.slips)


def test_a_verifier_that_raises_has_failed() -> None:
    def fragile(output: str, facts: Facts) -> Verdict:
        json.loads(output)
        return verify(output, facts)

    report = audit_verifier(fragile, cases(), mutate, shortcuts)
    assert not report.passed
    assert "trailing text" in report.slipped
    assert any("JSONDecodeError" in slip.why for slip in report.slips)


def test_an_audit_of_nothing_proves_nothing() -> None:
    assert not audit_verifier(verify, [], mutate, shortcuts).passed
    nothing = audit_verifier(verify, cases(), lambda good, facts: [], lambda facts: [])
    assert not nothing.passed
    assert "nothing was tried" in nothing.summary
