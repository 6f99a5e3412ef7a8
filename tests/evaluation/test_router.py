"""Every failure has an owner; what nobody recognises gets a labelled trace, not a guess."""

import pytest

from twinloop.evaluation.router import FORMAT, LATENCY, RELEASE, RETRIEVAL, SIDE_EFFECT, UNKNOWN, Failure, Route, route


@pytest.mark.parametrize(
    ("symptom", "expected"),
    [
        ("The answer quoted an outdated policy", RETRIEVAL),
        ("policy P-7 is out of date in the index", RETRIEVAL),
        ("policy_id missing from the response", FORMAT),
        ("response is not valid JSON", FORMAT),
        ("Output truncated in the middle of the object", FORMAT),
        ("It claimed that the refund was paid", SIDE_EFFECT),
        ("invented side effect", SIDE_EFFECT),
        ("TTFT doubled since noon", LATENCY),
        ("requests time out under load", LATENCY),
        ("latency budget exceeded", LATENCY),
        ("policy regression", RELEASE),
        ("The candidate checkpoint fails golden cases", RELEASE),
        ("MISSING POLICY_ID", FORMAT),
        ("customer is unhappy with the tone", UNKNOWN),
        ("", UNKNOWN),
    ],
)
def test_symptoms_in_other_words_reach_the_same_owner(symptom: str, expected: Route) -> None:
    assert route(symptom) == expected


def test_the_gravest_sign_decides() -> None:
    assert route("slow answer from a stale policy that promises a label") == SIDE_EFFECT
    assert route("slow answer from a stale policy") == RETRIEVAL


@pytest.mark.parametrize(
    ("symptom", "expected"),
    [
        ("the candidate, a model of today, fails", RELEASE),
        ("fails: the model is the candidate", UNKNOWN),
        ("golden: two fail", RELEASE),
        ("two fail, and they are golden", RELEASE),
        ("the old text of the policy", RETRIEVAL),
        ("a passage that is\nsuperseded", RETRIEVAL),
        ("the label was never issued", SIDE_EFFECT),
        ("it was never issued, the label", UNKNOWN),
        ("the field is empty", FORMAT),
        ("empty: the field", UNKNOWN),
    ],
)
def test_the_parts_of_a_sign_count_in_their_order_only(symptom: str, expected: Route) -> None:
    assert route(symptom) == expected


@pytest.mark.parametrize(
    "part",
    ["new model ", "label ", "claim ", "stale ", "p-1 ", "p-1", "no ", "key\n", "golden ", "promis", "out of ", " "],
)
def test_a_symptom_of_any_length_is_read_once(part: str) -> None:
    assert route(part * 50_000) == UNKNOWN


def test_measured_failures() -> None:
    assert route(Failure(failed_predicates=frozenset({"no_side_effect", "eligible"}))) == SIDE_EFFECT
    assert route(Failure(claims_action=True, release_regression=True)) == SIDE_EFFECT
    assert route(Failure(failed_predicates=frozenset({"eligible"}), release_regression=True)) == RELEASE
    assert route(Failure(policy_version=1, current_policy_version=2)) == RETRIEVAL
    assert route(Failure(policy_version=2, current_policy_version=2)) == UNKNOWN
    assert route(Failure(missing_fields=("policy_id",))) == FORMAT
    assert route(Failure(ttft_ms=1001, ttft_budget_ms=1000)) == LATENCY
    assert route(Failure(ttft_ms=999, ttft_budget_ms=1000)) == UNKNOWN
    assert route(Failure(ttft_ms=float("nan"), ttft_budget_ms=1000)) == LATENCY
    assert route(Failure(failed_predicates=frozenset({"eligible"}))) == UNKNOWN


def test_an_unparsed_answer_is_a_matter_of_format_although_every_predicate_fails() -> None:
    assert route(Failure(failed_predicates=frozenset({"parsed", "eligible", "no_side_effect"}))) == FORMAT
