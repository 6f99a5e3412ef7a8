"""Every number over cases has an interval: Wilson's where it is a share, else from drawing the cases again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from judged_cases import judged
from sacrebleu.metrics import BLEU, CHRF

from twinloop.common.errors import UserError
from twinloop.domains.chat import Chat
from twinloop.domains.chat import domain as chat
from twinloop.domains.classification import Classification
from twinloop.domains.domain import Domain, Judged, Metric, Statistic
from twinloop.domains.metrics import bleu, calibration_error, chrf, exact_match, mean, pass_at
from twinloop.domains.reasoning import Solution
from twinloop.domains.reasoning import domain as reasoning
from twinloop.evaluation.estimates import estimated, measured
from twinloop.evaluation.gate import GateRules, passes
from twinloop.evaluation.metrics import Estimate, Rate
from twinloop.evaluation.rules import Measurements

WORDS = ["the", "museum", "opens", "at", "ten", "and", "closes", "late", "on", "friday", "while", "tours", "start"]


def having(**metrics: Metric) -> Domain:
    domain = Chat()
    domain.metrics = metrics
    return domain


def translations(count: int) -> list[Judged]:
    """Answers of which some words differ from the reference answer."""
    rng = np.random.default_rng(5)
    cases = []
    for _ in range(count):
        said = rng.choice(WORDS, size=rng.integers(4, 16)).tolist()
        answer = [str(rng.choice(WORDS)) if rng.random() < 0.2 else word for word in said]
        cases.append(judged(chat, None, " ".join(answer), reference=" ".join(said)))
    return cases


def ratio(sums: Mapping[Any, float]) -> float:
    return sums["top"] / sums["bottom"]


@pytest.mark.parametrize("tokenize", ["13a", "char"])
def test_bleu_and_chrf_are_sacrebleus_of_the_whole_corpus(tokenize: str) -> None:
    cases = [*translations(60), judged(chat, None, "an answer without a reference")]
    found = measured(having(bleu=bleu(tokenize), chrf=chrf(), chrf_words=chrf(word_order=2)), cases)
    said, references = [case.greedy for case in cases[:-1]], [[case.reference for case in cases[:-1]]]
    assert found["bleu"].value == pytest.approx(BLEU(tokenize=tokenize).corpus_score(said, references).score)
    assert found["chrf"].value == pytest.approx(CHRF().corpus_score(said, references).score)
    assert found["chrf_words"].value == pytest.approx(CHRF(word_order=2).corpus_score(said, references).score)


def test_the_interval_of_bleu_is_about_that_of_sacrebleus_own_bootstrap() -> None:
    cases = translations(150)
    found = measured(having(bleu=bleu()), cases)["bleu"]
    theirs = BLEU(references=[[case.reference for case in cases]]).corpus_score(
        [case.greedy for case in cases], None, n_bootstrap=1000
    )
    assert found.interval is not None
    low, high = found.interval
    assert low < found.value < high
    assert (high - low) / 2 == pytest.approx(theirs._ci, rel=0.15)


def test_the_bootstrap_of_a_ratio_agrees_with_the_delta_method() -> None:
    rng = np.random.default_rng(1)
    bottom = rng.uniform(1, 5, size=800)
    top = 2 * bottom + rng.normal(size=800)
    found = estimated([{"top": a, "bottom": b} for a, b in zip(top, bottom, strict=True)], ratio)
    assert found is not None
    assert found.interval is not None
    value = top.sum() / bottom.sum()
    error = np.std(top - value * bottom) / np.sqrt(800) / bottom.mean()
    assert found.value == pytest.approx(value)
    assert found.interval == pytest.approx((value - 1.96 * error, value + 1.96 * error), abs=0.15 * error * 1.96)


def test_an_interval_is_the_same_every_time_and_many_cases_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    terms = [{"top": float(number % 7), "bottom": 2.0} for number in range(90)]
    once = estimated(terms, ratio)
    assert estimated(terms, ratio) == once
    monkeypatch.setattr("twinloop.evaluation.estimates.AT_ONCE", 90 * 300)
    assert estimated(terms, ratio) == once


@pytest.mark.parametrize("count", [1, 3, 80])
def test_few_cases_that_are_all_alike_are_no_proof_of_the_next(count: int) -> None:
    domain = Classification(["billing", "delivery"])
    facts = domain.read_facts({"facts": {"label": "billing"}})
    cases = [judged(domain, facts, "billing", confidence=1.0) for _ in range(count)]
    low = Rate(successes=count, total=count).interval[0]
    same = [judged(chat, None, "a b c d e", reference="a b c d e") for _ in range(count)]
    found = measured(domain, cases) | measured(having(bleu=bleu(), chrf=chrf()), same)
    ends = {
        "macro_f1": (1, (low, 1)),
        "calibration_error": (0, (0, 1 - low)),
        "bleu": (100, (100 * low, 100)),
        "chrf": (100, (100 * low, 100)),
    }
    for name, (value, interval) in ends.items():
        assert found[name].value == pytest.approx(value)
        assert found[name].interval == pytest.approx(interval)


@pytest.mark.parametrize(("count", "ships"), [(3, False), (80, True)])
def test_a_gate_does_not_pass_on_a_few_perfect_answers(count: int, ships: bool) -> None:
    domain = Classification(["billing", "delivery"])
    facts = domain.read_facts({"facts": {"label": "billing"}})
    found = measured(domain, [judged(domain, facts, "billing", confidence=1.0)] * count)
    for name, limit in {"macro_f1": 0.95, "calibration_error": 0.05}.items():
        assert passes(GateRules({name: limit}, domain), name, Measurements(metrics=found)) is ships


def test_one_mistake_more_never_makes_an_interval_begin_higher() -> None:
    domain = Classification(["billing", "delivery"])
    facts = domain.read_facts({"facts": {"label": "billing"}})
    lows = []
    for wrong in range(4):
        answers = ["billing"] * (40 - wrong) + ["delivery"] * wrong
        interval = measured(domain, [judged(domain, facts, answer) for answer in answers])["macro_f1"].interval
        assert interval is not None
        lows.append(interval[0])
    assert lows == sorted(lows, reverse=True)


def test_the_interval_of_a_share_is_wilsons() -> None:
    cases = [judged(chat, None, answer, reference=" yes\n") for answer in ["yes"] * 37 + ["no"] * 3]
    found = measured(having(exact=exact_match()), cases)["exact"]
    assert found == Estimate(value=37 / 40, interval=Rate(successes=37, total=40).interval)


def test_several_k_come_from_one_sampling_and_the_greedy_answer_is_not_among_it() -> None:
    def sums(*outputs: str) -> Judged:
        return judged(reasoning, Solution(question="9 + 10 = ?", answer="19"), "answer: 19", *outputs)

    cases = [sums("answer: 19", "answer: 1", "answer: 2", "answer: 3"), sums(*["answer: 19"] * 4), sums("no", "no")]
    domain = having(**{f"pass_at_{k}": pass_at(k) for k in (1, 2, 4, 8)})
    values = {name: estimate.value for name, estimate in measured(domain, cases).items()}
    assert values == pytest.approx({"pass_at_1": 1.25 / 3, "pass_at_2": 1.5 / 3, "pass_at_4": 1.0})


def test_the_calibration_error_is_the_weighted_gap_between_confidence_and_accuracy() -> None:
    domain = Classification(["billing", "delivery"])
    right = domain.read_facts({"facts": {"label": "billing"}})
    sure = [judged(domain, right, answer, confidence=0.9) for answer in ["billing"] * 6 + ["delivery"] * 4]
    unsure = [judged(domain, right, answer, confidence=0.1) for answer in ["billing"] * 2 + ["who knows"] * 8]
    found = measured(domain, [*sure, *unsure])["calibration_error"]
    assert found.value == pytest.approx((10 * abs(0.9 - 0.6) + 10 * abs(0.1 - 0.2)) / 20)
    assert found.interval is not None
    assert 0 <= found.interval[0] <= found.value <= found.interval[1] <= 1
    certain = [judged(domain, right, "billing", confidence=1.0)] * 5
    unseen = 1 - Rate(successes=5, total=5).interval[0]
    assert measured(domain, certain)["calibration_error"] == Estimate(value=0.0, interval=(0.0, unseen))
    assert "calibration_error" not in measured(domain, [judged(domain, right, "billing")])


def test_a_domain_may_read_the_confidence_from_the_answer() -> None:
    domain = having(error=calibration_error(lambda output: int(output) / 100 if output.isdigit() else None))
    cases = [judged(domain, "80", answer, confidence=0.5) for answer in ("80", "60", "high")]
    assert measured(domain, cases)["error"].value == pytest.approx((0.2 + 0.6) / 2)
    with pytest.raises(UserError, match=r"metric error raised ValueError on all cases: 8\.0 is not a number from 0"):
        measured(domain, [judged(domain, "80", "800")])


def test_classification_counts_every_sampled_answer_and_macro_f1_has_a_bootstrap_interval() -> None:
    domain = Classification(["billing", "delivery"])
    facts = {label: domain.read_facts({"facts": {"label": label}}) for label in domain.labels}
    cases = [judged(domain, facts["billing"], "billing", "billing", "delivery") for _ in range(10)]
    cases += [judged(domain, facts["delivery"], "delivery") for _ in range(5)]
    cases += [judged(domain, facts["delivery"], "billing") for _ in range(5)]
    found = measured(domain, cases)
    assert found["accuracy"].value == pytest.approx(0.5)
    assert found["macro_f1"].value == pytest.approx((2 * 10 / (20 + 15) + 2 * 5 / (10 + 15)) / 2)
    assert found["macro_f1"].interval is not None
    low, high = found["macro_f1"].interval
    assert low < found["macro_f1"].value < high


def test_one_case_has_no_interval_unless_its_metric_has_a_range() -> None:
    length = Metric("length", of=Statistic(lambda case: {"n": len(case.greedy)}, lambda sums: sums["n"]))
    found = measured(having(exact=exact_match(), length=length, chrf=chrf()), translations(1))
    assert found["length"].interval is None
    assert found["chrf"].interval is not None
    low, high = found["chrf"].interval
    assert 0 < high - low < 100
    assert low <= found["chrf"].value <= high
    assert found["exact"].interval == Rate(successes=round(found["exact"].value), total=1).interval


class Own(Chat):
    metrics: Mapping[str, Metric] = {
        "length": Metric("length", of=Statistic(lambda case: {"n": len(case.greedy)}, lambda sums: sums["n"])),
        "bad": Metric("bad"),
        "half": Metric("half", of=mean(lambda case: 0.5)),
    }

    def __init__(self, value: Any) -> None:
        self.value = value

    def measure(self, cases: Sequence[Judged]) -> Mapping[str, Any]:
        return {} if self.value is None else self.value


def test_what_measure_returns_has_no_interval_and_must_be_a_number_that_no_statistic_defines() -> None:
    cases = translations(4)
    assert measured(Own({"bad": 2}), cases)["bad"] == Estimate(value=2.0)
    assert measured(Own(None), []) == {}
    with pytest.raises(UserError, match="measure returned nan as bad, which is no finite number"):
        measured(Own({"bad": math.nan}), cases)
    with pytest.raises(UserError, match="measure returned half, which is a Statistic in `metrics`"):
        measured(Own({"half": 0.5}), cases)


def test_a_statistic_that_is_no_number_for_some_draws_of_the_cases_is_an_error() -> None:
    def mostly(sums: Mapping[Any, float]) -> float:
        return sums["n"] if sums["last"] else math.nan

    terms = iter([{"n": 1.0, "last": float(number == 7)} for number in range(8)])
    domain = having(broken=Metric("broken", of=Statistic(lambda case: next(terms), mostly)))
    with pytest.raises(UserError, match="value returned nan as broken, which is no finite number"):
        measured(domain, translations(8))
