"""Reasoning: only the final value is judged, and there is exactly one."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace

import pytest
from judged_cases import judged

from twinloop.common.errors import UserError
from twinloop.domains.domain import CaseKind, Judged
from twinloop.domains.metrics import pass_at_k
from twinloop.domains.reasoning import Reasoning, Solution, domain, gym_problems, thinking
from twinloop.evaluation.estimates import measured

PROBLEM = Solution(question="ann has 7 pens and buys 12 pens. how many pens?", answer="19")


def test_the_final_value_is_paid_however_it_was_reached() -> None:
    for output in ("answer: 19", "7 + 12 = 19\nanswer: 19", "12 + 7 = 20 - 1\nanswer: 19.0"):
        assert domain.verify(output, PROBLEM).passed, output
    assert domain.verify("7 + 12 = 19\nanswer: 19", PROBLEM).output == {"answer": "19", "steps": "7 + 12 = 19"}


@pytest.mark.parametrize(
    "problem",
    [
        PROBLEM,
        Solution(question="5 - 5 = ?", answer="0"),
        Solution(question="-3 + 1 = ?", answer="-2"),
        Solution(question="2.5 * 2 = ?", answer="5"),
        Solution(question="the capital of the country with 2 kings?", answer="old town"),
        Solution(question="no number here", answer="yes"),
    ],
)
def test_no_wrong_answer_and_no_exploit_is_paid(problem: Solution) -> None:
    gold = domain.gold(problem)
    assert domain.verify(gold, problem).passed
    wrong = list(domain.wrong(gold, problem))
    assert {"several final values", "value inside text", "value alone", "empty"} <= {name for name, _ in wrong}
    assert [output for _, output in wrong if domain.verify(output, problem).reward] == []


def test_the_numbers_of_the_question_are_among_the_exploits() -> None:
    tried = [output for name, output in domain.wrong("answer: 19", PROBLEM) if name == "a number of the question"]
    assert tried == ["answer: 7", "answer: 12"]


def test_a_demonstration_that_the_verifier_would_not_pay_is_no_record() -> None:
    examine = domain.record_types()["reasoning"].examine
    assert examine is not None
    assert examine({"question": "1 + 1 = ?", "steps": "1 + 1 = 2", "answer": "2"}) is None
    assert examine({"question": "1 + 1 = ?", "steps": None, "answer": "2"}) is None
    assert "does not end with one" in str(examine({"question": "1 + 1 = ?", "steps": "answer: 3", "answer": "2"}))


def test_a_row_gives_demonstration_prompt_and_case() -> None:
    row = {"question": "1 + 1 = ?", "steps": "1 + 1 = 2", "answer": "2"}
    made = {name: one.make(row, 3) for name, one in domain.derived().items()}
    *asked, answer = made["chat"]["messages"]
    assert asked == made["prompts"]["prompt"] == made["cases"]["prompt"]
    assert answer["content"] == "1 + 1 = 2\nanswer: 2"
    assert domain.verify(answer["content"], domain.read_facts(made["cases"])).passed


def test_a_held_out_row_says_what_kind_of_case_it_is() -> None:
    make = domain.derived()["cases"].make
    row = {"question": "1 + 1 = ?", "steps": None, "answer": "2"}
    assert [make({**row, "kind": kind}, 1)["kind"] for kind in ("hard", None)] == ["hard", "held_out"]


def test_thinking_is_the_words_before_the_last_line_of_all_cases_and_of_a_kind() -> None:
    class Levels(Reasoning):
        case_kinds = {kind: CaseKind(kind) for kind in ("easy", "hard", "other")}  # noqa: RUF012
        metrics = {"all": thinking(), **{kind: thinking(kind) for kind in case_kinds}}  # noqa: RUF012

    levels = Levels()
    answers = {"answer: 19": "easy", "7 + 12 = 19\nanswer: 19": "hard", "7 + 1 = 8\n8 + 2\nno value": "hard"}
    cases = [replace(judged(levels, PROBLEM, answer), kind=kind) for answer, kind in answers.items()]
    found = {name: estimate.value for name, estimate in measured(levels, cases).items()}
    assert found == {"all": pytest.approx(13 / 3), "easy": 0, "hard": 6.5}


def test_problems_of_a_package_that_is_not_there_say_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"`\.venv/bin/pip install -e '\.\[reasoning\]'`"):
        gym_problems("chain_sum", seed=1, count=1)


def test_pass_at_k_is_the_mean_over_all_choices_of_k_answers() -> None:
    for passed in range(6):
        answers = [True] * passed + [False] * (5 - passed)
        choices = list(itertools.combinations(answers, 3))
        assert pass_at_k(5, passed, 3) == pytest.approx(sum(map(any, choices)) / len(choices))
    with pytest.raises(ValueError, match="pass@4"):
        pass_at_k(3, 1, 4)


def test_a_metric_that_was_sampled_too_rarely_is_left_out() -> None:
    def values(*cases: Judged) -> dict[str, float]:
        return {name: estimate.value for name, estimate in measured(domain, cases).items()}

    few = values(judged(domain, PROBLEM, "answer: 19"), judged(domain, PROBLEM, "answer: 20"))
    assert few == {"pass_at_1": 0.5, "thinking": 0}
    four = judged(domain, PROBLEM, "greedy", "answer: 19", "answer: 1", "answer: 2", "answer: 3")
    assert values(four) == {"pass_at_1": 0.25, "pass_at_4": 1.0, "thinking": 0}
