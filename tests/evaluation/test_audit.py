"""A verifier that accepts one wrong answer does not pass its audit."""

import json
from collections.abc import Callable, Iterator

import pytest
from labels import domain as labels

from twinloop.common.errors import UserError
from twinloop.domains.domain import Domain, Verdict
from twinloop.domains.returns.domain import Returns
from twinloop.domains.returns.mutations import good_answer, mutate
from twinloop.domains.returns.policies import Policy
from twinloop.domains.returns.prompt import Order
from twinloop.domains.returns.verifier import Facts, verify
from twinloop.evaluation.audit import AuditReport, audit_verifier


def cases() -> Iterator[Facts]:
    policies = (
        Policy("P-7", "damaged items reported within 30 days are eligible."),
        Policy("P-3", "late orders may come back within 30 days."),
    )
    for reason, policy in (("damaged", policies[0]), ("late", policies[1])):
        for days in (0, 30, 31, 99):
            order = Order(order_id="A10234", reason=reason, damage_confirmed=True, days_since_delivery=days)
            yield Facts(order, policy, policies)


def judged_by(judge: Callable[[str, Facts], Verdict]) -> Domain:
    """The returns domain with another verifier."""

    class Other(Returns):
        def verify(self, output: str, facts: Facts) -> Verdict:
            return judge(output, facts)

    return Other()


def test_the_domains_verifier_passes() -> None:
    report = audit_verifier(Returns(), cases())
    assert report.passed, report.summary
    assert report.gold_answers == 8
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
    report = audit_verifier(Returns(), [facts])
    assert report.passed, report.summary
    assert all(output != good for _, output in mutate(good, facts))
    assert {"evidence without window", "embellished evidence", "distractor cited"} <= set(report.tried)


def test_a_lenient_verifier_is_caught_and_named() -> None:
    def lenient(output: str, facts: Facts) -> Verdict:
        try:
            return verify(json.dumps(json.loads(output)), facts)  # loses duplicate keys
        except ValueError:
            return verify(output, facts)

    report = audit_verifier(judged_by(lenient), cases())
    assert not report.passed
    assert report.exploits == {"duplicate key": 8}
    assert len(report.misjudged) == 8
    assert {one.name for one in report.misjudged} == {"duplicate key"}
    assert "duplicate key (8)" in report.summary


def test_a_verifier_that_rejects_gold_answers_is_caught() -> None:
    report = audit_verifier(judged_by(lambda output, facts: verify(output + "!", facts)), cases())
    assert not report.passed
    assert report.gold_rejected == 8
    assert not report.exploits
    assert all(one.kind == "gold" and one.why for one in report.misjudged)


def test_a_verifier_that_raises_has_failed() -> None:
    def fragile(output: str, facts: Facts) -> Verdict:
        json.loads(output)
        return verify(output, facts)

    report = audit_verifier(judged_by(fragile), cases())
    assert not report.passed
    assert "trailing text" in report.exploits
    assert any("JSONDecodeError" in one.why for one in report.misjudged)


def test_an_audit_of_nothing_has_not_passed() -> None:
    class Careless(Returns):
        def wrong(self, gold: str, facts: Facts) -> list[tuple[str, str]]:
            return []

    assert not audit_verifier(Returns(), []).passed
    nothing = audit_verifier(Careless(), cases())
    assert not nothing.passed
    assert "nothing was tried" in nothing.summary


def test_a_domain_of_ones_own_is_audited_alike() -> None:
    report = audit_verifier(labels, ["billing", "spam"])
    assert report.passed, report.summary
    assert report.tried == {"empty": 2, "other label": 4}


@pytest.mark.parametrize("method", ["gold", "wrong"])
def test_answers_that_cannot_be_made_are_one_line_that_names_the_prompt(method: str) -> None:
    def divide(*_: object) -> int:
        return 1 // 0

    broken = Returns()
    setattr(broken, method, divide)
    with pytest.raises(UserError, match=rf"^domain {broken.name}: {method} raised ZeroDivisionError on prompt 1: "):
        audit_verifier(broken, cases())
