"""Pairs of answers are judged blind, once, and never lost; what they come to does not depend on who is named first."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from twinloop.common.errors import UserError
from twinloop.domains.classification import Classification
from twinloop.evaluation.cases import Case, read_cases
from twinloop.evaluation.comparison import Comparison, Contestant, Judging, by_verifier
from twinloop.evaluation.judgements import Judgements, Subject

EMAILS = Classification(["billing", "delivery"])
CASES = read_cases(
    [
        {
            "case_id": f"case-{number}",
            "kind": "held_out",
            "prompt": [{"role": "user", "content": f"mail {number}"}],
            "facts": {"label": "billing"},
        }
        for number in range(60)
    ],
    EMAILS,
)


def contestant(name: str, wrong: int, *, said: str = "delivery", cases: list[Case] = CASES) -> Contestant:
    """Right on all but so many cases."""
    answers = {case.case_id: said if number < wrong else "billing" for number, case in enumerate(cases)}
    return Contestant(name, f"digest of {name}", answers)


GOOD, WORSE, WORST = contestant("good", 0), contestant("worse", 20), contestant("worst", 50, said="no label")


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Judgements]:
    with Judgements.opened(tmp_path / "state" / "emails.jsonl", "ada") as judgements:
        yield judgements


def test_the_verifier_prefers_the_right_answer_and_equal_rewards_are_ties() -> None:
    tally = Comparison(CASES, [WORSE, GOOD, WORST]).tally(by_verifier(EMAILS))
    assert tally.preferred.tolist() == [[0, 0, 30], [20, 0, 50], [0, 0, 0]]
    assert tally.ties.tolist() == [[0, 0, 20], [0, 0, 0], [20, 0, 0]], "both are wrong, in different words"
    assert tally.same.tolist() == [[0, 40, 10], [40, 0, 10], [10, 10, 0]]
    assert tally.left == 0
    assert tally.judged == 120
    assert [["worse", "good", "worst"][place] for place in tally.ratings.order] == ["good", "worse", "worst"]
    assert tally.needed == 0


def test_questions_are_in_an_order_and_on_sides_that_do_not_say_whose_the_answers_are() -> None:
    questions = Comparison(CASES, [GOOD, WORST]).questions
    assert len(questions) == 50, "nobody is asked about two equal answers"
    sides = [question.left == "billing" for question in questions]
    assert 15 < sum(sides) < 35
    numbers = [int(question.case.case_id.removeprefix("case-")) for question in questions]
    assert numbers != sorted(numbers)
    assert Comparison(CASES, [WORST, GOOD]).questions == questions


def judge_all(judging: Judging) -> int:
    """A person who likes the word billing."""
    count = 0
    while question := judging.question:
        judging.say("left" if question.left == "billing" else "right" if question.right == "billing" else "tie")
        count += 1
    return count


def test_what_was_judged_is_not_asked_again_also_for_another_version_that_answers_so(kept: Judgements) -> None:
    assert judge_all(Judging(Comparison(CASES, [GOOD, WORSE]), kept)) == 20
    twin = contestant("twin", 20)
    assert Judging(Comparison(CASES, [twin, GOOD]), kept).question is None
    three = Judging(Comparison(CASES, [GOOD, WORSE, WORST]), kept)
    assert three.left == 70, "of 20 cases two questions, of 30 one: good and worse answer alike there"
    assert judge_all(three) == 70
    tally = three.tally()
    assert tally.preferred.tolist() == [[0, 20, 50], [0, 0, 30], [0, 0, 0]]
    assert tally.left == 0


def test_the_last_judgement_may_be_taken_back_and_a_question_asked_later(kept: Judgements) -> None:
    judging = Judging(Comparison(CASES, [GOOD, WORSE]), kept)
    first = judging.question
    assert not judging.take_back()
    judging.say("tie")
    assert judging.tally().ties.sum() == 2
    second = judging.question
    assert judging.take_back()
    assert judging.question == first
    assert judging.tally().ties.sum() == 0
    judging.skip()
    assert judging.question == second
    assert judging.left == 20
    assert judging._open[-1] == first


def test_judgements_outlive_a_death_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "emails.jsonl"
    one, other = Subject("p", "a", "b"), Subject("p", "a", "c")
    with Judgements.opened(path, "ada") as kept:
        kept.add(one, "first")
        whole = path.read_bytes()
        kept.add(other, "tie")
    path.write_bytes(path.read_bytes()[:-5])
    with Judgements.opened(path, "bob") as kept:
        assert kept.chosen(one) == "first"
        assert kept.chosen(other) is None
        assert path.read_bytes() == whole
        kept.add(other, "second")
    with Judgements.opened(path, "bob") as kept:
        assert kept.chosen(other) == "second"
    assert [json.loads(line)["who"] for line in path.read_text().splitlines()] == ["ada", "bob"]


def test_a_disk_that_is_full_keeps_no_half_of_a_judgement(kept: Judgements, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, content: bytes) -> None:
        os.write(descriptor, content[:10])
        raise OSError(28, "No space left on device")

    judging = Judging(Comparison(CASES, [GOOD, WORSE]), kept)
    with monkeypatch.context() as patched:
        patched.setattr("twinloop.evaluation.judgements.write_all", fail)
        with pytest.raises(OSError, match="No space"):
            judging.say("left")
    assert kept._path.read_bytes() == b""
    assert judging.left == 20
    judging.say("left")
    assert judging.left == 19


def test_one_person_judges_at_a_time(kept: Judgements) -> None:
    with pytest.raises(UserError, match="somebody judges these answers now"), Judgements.opened(kept._path, "bob"):
        pass


def test_a_line_that_is_no_judgement_is_named(tmp_path: Path) -> None:
    path = tmp_path / "emails.jsonl"
    path.write_text("{}\n")
    with pytest.raises(UserError, match=r"emails\.jsonl:1: no judgement"), Judgements.opened(path, "ada"):
        pass


def test_more_judgements_are_needed_the_closer_two_models_are(kept: Judgements) -> None:
    judging = Judging(Comparison(CASES, [GOOD, WORST]), kept)
    for number in range(20):
        question = judging.question
        assert question is not None
        good = "left" if question.left == "billing" else "right"
        judging.say(good if number % 5 < 3 else "left" if good == "right" else "right")
    tally = judging.tally()
    assert tally.judged == 20
    assert tally.left == 30
    assert np.triu(tally.same).sum() == 10
    assert tally.needed is not None
    assert tally.needed > 20
