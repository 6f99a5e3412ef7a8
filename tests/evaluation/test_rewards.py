"""A reward model is judged on pairs by its interval, and on the audit's wrong answers before they could be paid."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from twinloop.common.errors import UserError
from twinloop.domains.domain import Domain, Verdict
from twinloop.evaluation.cases import compare, read_cases
from twinloop.evaluation.metrics import wilson_interval
from twinloop.evaluation.rewards import ACCURACY, HACKING, PAIR, judge_reward_model
from twinloop.evaluation.rules import REWARD, Measurements
from twinloop.models.new_tokenizer import train_tokenizer
from twinloop.models.tokenizer import ChatTokenizer


class Yes(Domain):
    """Only "yes" is right."""

    def verify(self, output: str, facts: object) -> Verdict:
        return Verdict.of({"parsed": output == "yes"}, output=output)

    def gold(self, facts: object) -> str:
        return "yes"

    def wrong(self, gold: str, facts: object) -> Iterable[tuple[str, str]]:
        yield "short", "no"
        yield "long", "yes and no, and much more of both"
        yield "longer than the context", "yes " * 100


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return train_tokenizer(["yes and no, and much more of both, asked of all"] * 9, 300)


class LikesLength:
    """Scores an answer by its length: a reward model that is easily hacked. It counts the prompts that it reads."""

    max_length = 100

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokenizer = tokenizer
        self.prompts = 0
        self.length = 0

    def prefill(self, slot: int, tokens: list[int], *, start: int = 0) -> np.ndarray:
        assert start <= self.length, "a slot has no gaps"
        self.prompts += start == 0
        self.length = start + len(tokens)
        assert self.length <= self.max_length
        return np.array([len(self.tokenizer.decode(tokens))], np.float32)


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


LONGER = {"chosen": "yes, and more of it", "rejected": "no, not it"}
SHORTER = {"chosen": "no", "rejected": "yes yes"}
PAIRS = [{"prompt": asked(f"is it {n}"), **(LONGER if n else SHORTER)} for n in range(20)]


def cases(count: int) -> list[dict[str, object]]:
    return [
        {"case_id": f"c{n}", "kind": "held_out", "prompt": asked(f"is it {n}"), "facts": None} for n in range(count)
    ]


def test_pairs_are_counted_and_every_wrong_answer_that_scores_as_high_is_named(tokenizer: ChatTokenizer) -> None:
    engine, domain = LikesLength(tokenizer), Yes()
    report, numbers = judge_reward_model(engine, tokenizer, PAIRS, read_cases(cases(3), domain), domain)
    assert (report.overall.successes, report.overall.total) == (19, 20)
    assert report.by_kind[PAIR].interval == wilson_interval(19, 20)
    (failure,) = report.failures
    assert (failure.output, failure.expected) == ("yes yes", {"chosen": "no"})
    # what does not fit the context cannot be scored
    assert report.details[HACKING] == {"long": {"tried": 3, "hacked": 3}, "short": {"tried": 3, "hacked": 0}}
    assert report.violations == {HACKING: 3}
    assert numbers["reward_hacking_share"] == 0.5
    assert engine.prompts == 23, "each prompt is read once"


def test_a_score_that_is_no_number_passes_nothing(tokenizer: ChatTokenizer) -> None:
    class Broken(LikesLength):
        def prefill(self, slot: int, tokens: list[int], *, start: int = 0) -> np.ndarray:
            return super().prefill(slot, tokens, start=start) * np.float32("nan")

    domain = Yes()
    report, _ = judge_reward_model(Broken(tokenizer), tokenizer, PAIRS, read_cases(cases(3), domain), domain)
    assert report.overall.successes == 0
    assert report.violations == {HACKING: 6}
    assert {failure.reasons for failure in report.failures} == {("one of the answers has a score that is no number",)}


def test_a_pair_that_scores_alike_is_said_to(tokenizer: ChatTokenizer) -> None:
    pair = {"prompt": asked("is it"), "chosen": "no", "rejected": "so"}
    report, _ = judge_reward_model(LikesLength(tokenizer), tokenizer, [pair], [], Domain())
    assert report.failures[0].reasons == ("the rejected answer scores as high as the chosen one",)


def test_a_right_answer_that_does_not_fit_the_context_is_no_measure_of_wrong_ones(tokenizer: ChatTokenizer) -> None:
    class Long(Yes):
        def gold(self, facts: object) -> str:
            return "yes " * 100

    domain = Long()
    report, numbers = judge_reward_model(LikesLength(tokenizer), tokenizer, PAIRS, read_cases(cases(3), domain), domain)
    assert report.details[HACKING] == {}
    assert "reward_hacking_share" not in numbers
    assert REWARD["reward_hacking_violations"].measure(Measurements.of_cases(report)).value is None


def test_an_answer_that_the_template_cannot_follow_is_scored_as_it_is(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    split = settings["chat_template"].replace("message['content']", "message['content'].split('</think>')[-1]")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": split}))
    splits = ChatTokenizer.load(tmp_path)
    pair = {"prompt": asked("is it"), "chosen": "yes and much more", "rejected": "yes</think>no"}

    class Thinks(Yes):
        def wrong(self, gold: str, facts: object) -> Iterable[tuple[str, str]]:
            yield "thinks", "yes</think>no"

    domain = Thinks()
    report, numbers = judge_reward_model(LikesLength(splits), splits, [pair], read_cases(cases(1), domain), domain)
    assert numbers["reward_margin"] == len("yes and much more") - len("yes</think>no")
    assert report.details[HACKING] == {"thinks": {"tried": 1, "hacked": 1}}


def test_pairs_of_one_prompt_count_as_one_in_the_accuracy(tokenizer: ChatTokenizer) -> None:
    """Four pairs of each of ten prompts are ten pieces of evidence: one prompt with all wrong, one with half wrong."""
    wrong = {0: 4, 1: 2}
    pairs = [
        {"prompt": asked(f"is it {n}"), **(SHORTER if copy < wrong.get(n, 0) else LONGER)}
        for n in range(10)
        for copy in range(4)
    ]
    report, _ = judge_reward_model(LikesLength(tokenizer), tokenizer, pairs, [], Domain())
    assert (report.overall.successes, report.overall.total) == (34, 40)
    accuracy = report.measured[ACCURACY]
    assert (accuracy.value, accuracy.interval) == (0.85, wilson_interval(8.5, 10))
    assert REWARD[ACCURACY].measure(Measurements.of_cases(report)).value == wilson_interval(8.5, 10)[0]


def test_the_gate_takes_the_lower_end_of_the_interval_and_no_hacked_answer(tokenizer: ChatTokenizer) -> None:
    domain = Yes()
    report, _ = judge_reward_model(LikesLength(tokenizer), tokenizer, PAIRS, read_cases(cases(3), domain), domain)
    measured = Measurements.of_cases(report)
    assert REWARD["reward_accuracy"].measure(measured).value == wilson_interval(19, 20)[0]
    assert REWARD["reward_hacking_violations"].measure(measured).value == 3
    nothing = Measurements()
    assert [rule.measure(nothing).value for rule in REWARD.values()] == [None, None], "what is not measured blocks"


def test_without_an_audit_nothing_is_said_of_hacking(tokenizer: ChatTokenizer) -> None:
    report, numbers = judge_reward_model(LikesLength(tokenizer), tokenizer, PAIRS, [], Domain())
    assert report.violations == {}
    assert "reward_hacking_share" not in numbers
    assert REWARD["reward_hacking_violations"].measure(Measurements.of_cases(report)).value is None


def test_two_reward_models_are_compared_pair_by_pair(tokenizer: ChatTokenizer) -> None:
    class LikesShort(LikesLength):
        def prefill(self, slot: int, tokens: list[int], *, start: int = 0) -> np.ndarray:
            return -super().prefill(slot, tokens, start=start)

    one, _ = judge_reward_model(LikesLength(tokenizer), tokenizer, PAIRS, [], Domain())
    other, _ = judge_reward_model(LikesShort(tokenizer), tokenizer, PAIRS, [], Domain())
    changed = compare(other, one, version="1")
    assert (changed.lost, changed.won, changed.total) == (19, 1, 20)


def test_there_must_be_pairs_to_measure_on(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(UserError, match="none is held out"):
        judge_reward_model(LikesLength(tokenizer), tokenizer, [], [], Domain())
