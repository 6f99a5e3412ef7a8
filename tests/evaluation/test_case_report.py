"""What a report of cases keeps for people: samples, confidence, right and answered outcomes."""

from __future__ import annotations

import math
from typing import Any

import pytest
from test_cases import Answer, ScriptedEngine, labelled

from twinloop.domains.classification import Classification
from twinloop.evaluation.case_report import CaseReport
from twinloop.evaluation.cases import Answering, Case, read_cases, run_cases
from twinloop.models.new_tokenizer import train_tokenizer
from twinloop.models.tokenizer import ChatTokenizer

departments = Classification(["billing", "delivery"])


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return train_tokenizer(["billing delivery"], 300)


def department(case_id: str, label: str, kind: str = "held_out") -> dict[str, Any]:
    return labelled(case_id, label, kind) | {"facts": {"label": label}}


def report_on(tokenizer: ChatTokenizer, cases: list[Case], answers: dict[str, str]) -> CaseReport:
    engine = ScriptedEngine(tokenizer, cases, lambda case: answers.get(case.case_id, case.facts.label))
    return run_cases(engine, tokenizer, cases, departments, Answering(20))


def test_samples_are_of_every_kind_and_the_same_cases_in_whatever_order_they_come(tokenizer: ChatTokenizer) -> None:
    records = [department(f"held-{n}", "billing") for n in range(40)]
    records += [department(f"golden-{n}", "delivery", "golden") for n in range(3)]
    answers = {record["case_id"]: "delivery" for record in records}
    one = report_on(tokenizer, read_cases(records, departments), answers)
    other = report_on(tokenizer, read_cases(records[::-1], departments), answers)
    assert {sample.case_id for sample in one.samples} == {sample.case_id for sample in other.samples}
    assert len(one.samples) == 10
    assert [sample.passed for sample in one.samples if sample.kind == "golden"] == [True] * 3
    assert {sample.passed for sample in one.samples if sample.kind == "held_out"} == {False}
    assert {sample.prompt[-1]["content"] for sample in one.samples} == {f"text {s.case_id}" for s in one.samples}


def test_a_failure_has_its_prompt(tokenizer: ChatTokenizer) -> None:
    [failure] = report_on(tokenizer, read_cases([department("a", "billing")], departments), {"a": "delivery"}).failures
    assert failure.prompt == ({"role": "user", "content": "text a"},)


def test_the_confidence_of_an_answer_is_the_probability_of_all_its_tokens(tokenizer: ChatTokenizer) -> None:
    report = report_on(tokenizer, read_cases([department("a", "billing")], departments), {})
    tokens = tokenizer.encode_answer("billing")
    assert [result.confidence for result in report.results] == [pytest.approx(0.5 ** len(tokens))]
    assert math.isclose(sum(Answer(tokens, "stop").logprobs), len(tokens) * math.log(0.5))


def test_outcomes_are_counted_by_the_right_one_and_an_answer_without_a_form_has_none(
    tokenizer: ChatTokenizer,
) -> None:
    labels = {"a": "billing", "b": "billing", "c": "delivery", "d": "delivery"}
    cases = read_cases([department(case_id, label) for case_id, label in labels.items()], departments)
    report = report_on(tokenizer, cases, {"b": "delivery", "d": "who knows"})
    assert report.outcomes == {
        "billing": {"billing": 1, "delivery": 1, "no answer": 0},
        "delivery": {"billing": 0, "delivery": 1, "no answer": 1},
    }
    assert CaseReport.model_validate_json(report.model_dump_json()) == report
