"""Before anything is trained it is known which rules no model can pass, and how many cases each limit takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from twinloop.common.errors import UserError
from twinloop.domains.chat import domain as chat
from twinloop.domains.classification import Classification
from twinloop.domains.domain import Domain, Metric
from twinloop.domains.reasoning import domain as reasoning
from twinloop.domains.returns import domain as returns
from twinloop.evaluation.cases import Case, read_cases
from twinloop.evaluation.gate import GateRules, load_rules
from twinloop.evaluation.metrics import wilson_interval
from twinloop.evaluation.outlook import Outlook, foresee

ROOT = Path(__file__).parents[2]
EMAILS = Classification(["billing", "delivery"])


def cases(kind: str, count: int, domain: Domain = EMAILS, *, pairs: bool = False, **fields: Any) -> list[Case]:
    facts = fields.pop("facts", {"label": "billing"})
    return read_cases(
        [
            {
                "case_id": f"{kind}-{number}",
                "kind": kind,
                "pair_id": f"{kind}-{number // 2}" if pairs else None,
                "prompt": [{"role": "user", "content": f"{number}"}],
                "facts": facts,
                **fields,
            }
            for number in range(count)
        ],
        domain,
    )


def outlook(limits: dict[str, float], some: Sequence[Case], domain: Domain = EMAILS, **settings: Any) -> Outlook:
    return foresee(GateRules(limits, domain, "recipes/gate.yaml"), some, **{"has_texts": True, **settings})


def refused(*arguments: Any, **settings: Any) -> str:
    with pytest.raises(UserError) as raised:
        outlook(*arguments, **settings)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_thirty_right_cases_do_not_reach_the_limit_and_the_number_that_does_is_named() -> None:
    message = refused({"held_out_pass_rate": 0.95}, cases("held_out", 30))
    assert message == (
        "recipes/gate.yaml: no model can pass: held_out_pass_rate: 30 cases of kind held_out, all right, reach 0.886, "
        "and the limit is 0.95; 73 or more are needed: add cases, or change the rule"
    )
    assert wilson_interval(73, 73)[0] >= 0.95 > wilson_interval(72, 72)[0]
    outlook({"held_out_pass_rate": 0.95}, cases("held_out", 73))


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_a_kind_without_cases_is_not_measured_and_blocks_whatever_the_limit_is(limit: float) -> None:
    message = refused({"golden_pass_rate": limit}, cases("held_out", 3))
    assert "golden_pass_rate: there are no cases of kind golden, and what is not measured blocks; 1 or more" in message


def test_every_rule_that_cannot_pass_is_named_in_one_line() -> None:
    message = refused({"golden_pass_rate": 1.0, "held_out_pass_rate": 0.94}, cases("held_out", 5))
    assert "golden_pass_rate: there are no cases" in message
    assert "held_out_pass_rate: 5 cases of kind held_out, all right, reach 0.566" in message


def test_a_limit_of_one_on_the_lower_end_of_an_interval_is_never_reached() -> None:
    assert "no number of cases reaches 1; lower the limit" in refused({"held_out_pass_rate": 1}, cases("held_out", 9))


@pytest.mark.parametrize(("limit", "count", "right"), [(0.94, 400, 386), (0.92, 400, 379), (0.95, 1000, 964)])
def test_how_many_may_be_wrong_is_said(limit: float, count: int, right: int) -> None:
    [prospect] = outlook({"held_out_pass_rate": limit}, cases("held_out", count)).prospects
    assert (prospect.right, prospect.cases) == (right, count)
    assert wilson_interval(right, count)[0] >= limit > wilson_interval(right - 1, count)[0]
    assert (
        f"{right} of the {count} cases right, {count - right} wrong at most; it takes {prospect.needed} cases"
        in str(prospect)
    )


def test_pairs_are_counted_where_pairs_are_judged() -> None:
    facts = {
        "order": {"order_id": "A1000", "reason": "late", "damage_confirmed": False, "days_since_delivery": 3},
        "policy": {"policy_id": "P-7", "text": "late items within 9 days are eligible."},
        "passages": [],
    }
    some = cases("contrast", 800, returns, pairs=True, facts=facts, expected={})
    [prospect] = outlook({"contrast_pass_rate": 0.93}, some, returns).prospects
    assert (prospect.right, prospect.cases, prospect.unit) == (383, 400, "pairs")


def test_the_rules_that_come_with_it_can_pass_with_the_cases_that_are_generated() -> None:
    rules = load_rules(ROOT / "recipes" / "gate.yaml", returns)
    needed = {"golden": 9, "held_out": 1000, "injection": 600, "contrast": 800}
    facts = {
        "order": {"order_id": "A1000", "reason": "late", "damage_confirmed": False, "days_since_delivery": 3},
        "policy": {"policy_id": "P-7", "text": "late items within 9 days are eligible."},
        "passages": [],
    }
    some = [
        case
        for kind, count in needed.items()
        for case in cases(kind, count, returns, pairs=kind == "contrast", facts=facts, expected={})
    ]
    text = foresee(rules, some, has_texts=True).text()
    assert (
        "held_out_pass_rate: at least 0.95, which is 964 of the 1000 cases right, 36 wrong at most; it takes 73" in text
    )


def test_rules_that_ask_nothing_of_the_cases_say_nothing() -> None:
    assert outlook({"memory_gib": 4.0}, cases("held_out", 5)).text() == ""


def test_what_no_text_and_no_reference_measures_is_refused() -> None:
    some = cases("held_out", 50, chat, facts=None, expected={"answer": None, "reference": None})
    message = refused({"perplexity": 3.0, "answer_perplexity": 2.0}, some, chat, has_texts=False)
    assert "perplexity: there is no corpus_heldout to measure it on" in message
    assert "answer_perplexity: no case has a reference answer" in message
    some = cases("held_out", 50, chat, facts=None, expected={"answer": "yes", "reference": None})
    outlook({"perplexity": 3.0, "answer_perplexity": 2.0}, some, chat)


def test_a_metric_that_right_answers_leave_unmeasured_is_a_warning() -> None:
    some = cases("held_out", 90, reasoning, facts={"question": "1 + 1 = ?", "answer": "2"})
    limits = {"pass_at_1": 0.9, "pass_at_4": 0.95}
    assert outlook(limits, some, reasoning, samples=4).warnings == ()
    [warning] = outlook(limits, some, reasoning, samples=2).warnings
    assert "pass_at_4 is not measured where every answer is right" in warning


def test_a_metric_that_right_answers_do_not_pass_is_a_warning() -> None:
    [warning] = outlook({"bias": 0.9, "accuracy": 0.9}, cases("held_out", 100, Doubting()), Doubting()).warnings
    assert "bias is 0.5 where every answer is right" in warning


def test_a_metric_that_has_too_few_cases_for_its_limit_is_a_warning() -> None:
    [warning] = outlook({"accuracy": 0.9}, cases("held_out", 10)).warnings
    assert "accuracy is 1 [0.7225, 1] where every answer is right, and blocks" in warning


class Doubting(Classification):
    metrics: Mapping[str, Metric] = {**Classification.metrics, "bias": Metric("bias")}

    def __init__(self) -> None:
        super().__init__(["billing", "delivery"])

    def measure(self, judged: Any) -> dict[str, float]:
        return {"bias": 0.5}


def test_a_reward_model_is_asked_for_held_out_prompts_and_for_no_answers() -> None:
    """And a model that writes text is not asked for what only a reward model has."""
    judged = {"kind": "reward", "has_texts": False}
    limits = {"reward_accuracy": 0.9}
    (found,) = outlook(limits, [], held_out_prompts=100, **judged).prospects
    assert wilson_interval(found.right, 100)[0] >= 0.9 > wilson_interval(found.right - 1, 100)[0]
    assert "reward_accuracy: 10 held-out prompts of kind preference" in refused(
        limits, [], held_out_prompts=10, **judged
    )
    assert "there are no held-out prompts" in refused(limits, [], **judged)
    message = refused({**limits, "held_out_pass_rate": 0.5, "perplexity": 9}, [], held_out_prompts=100, **judged)
    for name in ("held_out_pass_rate", "perplexity"):
        assert f"{name}: the release is a reward model, of which it is not measured; take the rule out" in message
    assert "reward_accuracy: it is of reward models" in refused(limits, [])
    assert "perplexity: the release gives labels" in refused({"perplexity": 9}, [], kind="labels")
