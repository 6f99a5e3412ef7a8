"""Every failure has an owner; what nobody recognises gets a labelled trace, not a guess."""

from collections.abc import Mapping

import pytest

from twinloop.domains.domain import Domain, Predicate
from twinloop.domains.owners import FORMAT, LATENCY, RELEASE, RETRIEVAL, SIDE_EFFECT, TRAINING, UNKNOWN, Owner
from twinloop.domains.returns import domain
from twinloop.evaluation.router import Failure, route


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
def test_symptoms_in_other_words_reach_the_same_owner(symptom: str, expected: Owner) -> None:
    assert route(symptom, domain) == expected


def test_the_most_severe_sign_decides() -> None:
    assert route("slow answer from a stale policy that promises a label", domain) == SIDE_EFFECT
    assert route("slow answer from a stale policy", domain) == RETRIEVAL


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
def test_the_parts_of_a_sign_count_in_their_order_only(symptom: str, expected: Owner) -> None:
    assert route(symptom, domain) == expected


@pytest.mark.parametrize(
    "part",
    ["new model ", "label ", "claim ", "stale ", "p-1 ", "p-1", "no ", "key\n", "golden ", "promis", "out of ", " "],
)
def test_a_symptom_of_any_length_is_read_once(part: str) -> None:
    assert route(part * 50_000, domain) == UNKNOWN


def test_a_domain_brings_its_own_words() -> None:
    other = Domain()
    assert route("an outdated document", other) == route("an outdated policy", domain) == RETRIEVAL
    assert route("the field is missing", other) == route("window_days is missing", domain) == FORMAT
    assert route("it claims an action", other) == route("it claims a refund", domain) == SIDE_EFFECT
    for symptom in ("an outdated policy", "window_days is missing", "it claims a refund"):
        assert route(symptom, other) == UNKNOWN


def failed(*predicates: str, **others: bool) -> Owner:
    return route(Failure(failed_predicates=frozenset(predicates), **others), domain)


def test_measured_failures() -> None:
    assert failed("no_unperformed_action", "eligible") == SIDE_EFFECT
    assert failed("no_unperformed_action", release_regression=True) == SIDE_EFFECT
    assert failed("eligible", release_regression=True) == RELEASE
    assert route(Failure(document_version=1, current_document_version=2), domain) == RETRIEVAL
    assert route(Failure(document_version=2, current_document_version=2), domain) == UNKNOWN
    assert route(Failure(missing_fields=("policy_id",)), domain) == FORMAT
    assert route(Failure(ttft_ms=1001, ttft_budget_ms=1000), domain) == LATENCY
    assert route(Failure(ttft_ms=999, ttft_budget_ms=1000), domain) == UNKNOWN
    assert route(Failure(ttft_ms=float("nan"), ttft_budget_ms=1000), domain) == LATENCY
    assert failed("eligible") == UNKNOWN


def test_an_unparsed_answer_is_a_matter_of_format_unless_it_claims_an_action() -> None:
    assert failed("parsed", "eligible", "policy_id") == FORMAT
    assert failed("parsed", "eligible", "policy_id", "no_unperformed_action") == SIDE_EFFECT


def test_a_predicate_that_fails_goes_to_its_own_owner() -> None:
    class Labels(Domain):
        predicates: Mapping[str, Predicate] = {
            "parsed": Predicate("one label", FORMAT),
            "label": Predicate("right label", TRAINING),
        }

    assert route(Failure(failed_predicates=frozenset({"label"})), Labels()) == TRAINING
    assert route(Failure(failed_predicates=frozenset({"label", "parsed"})), Labels()) == FORMAT
