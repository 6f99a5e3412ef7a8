"""Chat: an expected answer is matched word for word, a reference is for perplexity alone."""

from __future__ import annotations

from twinloop.domains.chat import domain


def test_an_expected_answer_is_matched_word_for_word() -> None:
    facts = domain.read_facts({"expected": {"answer": "we open at 10."}})
    assert domain.verify("we open at 10.\n", facts).passed
    assert domain.verify("We open at 10.", facts).failed == ("answer",)
    assert not domain.verify("  ", facts).parsed


def test_a_held_out_conversation_is_a_case_that_any_answer_passes() -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good morning"}]
    case = domain.derived()["cases"].make({"messages": messages}, 4)
    assert case["prompt"] == messages[:1]
    assert case["kind"] in domain.case_kinds
    assert domain.verify("hi", domain.read_facts(case)).passed
    assert domain.reference(case["expected"]) == "good morning"


def test_it_makes_no_decisions_and_pays_no_rewards() -> None:
    assert domain.chat
    assert domain.request is None
    assert not domain.has("gold")
