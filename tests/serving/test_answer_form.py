"""Decisions keep to the form that their domain states, whatever the weights would write: served, and in evaluation."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from served import make_app, running, small_tokenizer
from test_structured import small_engine

from twinloop.common.errors import UserError
from twinloop.domains.classification import Classification
from twinloop.domains.domain import Domain
from twinloop.domains.returns import domain as returns
from twinloop.domains.returns.mutations import ANSWER_FORM
from twinloop.evaluation.cases import Answering, Case, run_cases
from twinloop.serving.answer_form import form_grammar, stated_form
from twinloop.serving.engine.grammar import Grammars
from twinloop.serving.engine.scheduler import Scheduler

EMAILS = Classification(["billing", "delivery", "technical"], example="my parcel is late")


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


def return_facts():
    order = {"order_id": "A10234", "reason": "damaged", "damage_confirmed": True}
    for days, window in ((0, 7), (12, 30), (365, 1000)):
        policy = {"policy_id": "P-7", "text": f'"Damaged\\" items reported within {window} days are eligible.'}
        record = {"order": {**order, "days_since_delivery": days}, "policy": policy, "passages": [policy]}
        yield returns.read_facts({"facts": record})


def test_a_model_that_knows_nothing_answers_with_a_label_over_http(tmp_path, tokenizer):
    scheduler = Scheduler(small_engine(tokenizer, slots=2))
    with running(make_app(tmp_path, scheduler, tokenizer, domain=EMAILS)) as client:
        answers = [client.post("/v1/decisions", json={"text": text}).json() for text in ("one", "another", "a third")]
    scheduler.close()
    assert all(answer["decision"] in EMAILS.labels and not answer["escalated"] for answer in answers)


@pytest.mark.parametrize("samples", [1, 3])
def test_cases_are_measured_as_they_are_served(tokenizer, samples):
    cases = [
        Case(str(n), "held_out", ({"role": "user", "content": f"text {n}"},), facts, None, {}, str(n))
        for n, facts in enumerate(EMAILS.read_facts({"facts": {"label": label}}) for label in EMAILS.labels * 2)
    ]
    report = run_cases(small_engine(tokenizer, slots=4), tokenizer, cases, EMAILS, Answering(20, samples))
    assert report.unparsed == 0
    assert report.by_predicate["parsed"].rate == 1


def test_the_form_of_returns_takes_what_is_a_decision_as_the_model_learns_it(tokenizer):
    grammar = form_grammar(stated_form(returns), tokenizer)
    assert grammar is not None
    for facts in return_facts():
        gold = returns.gold(facts)
        assert grammar.takes(gold)
        assert re.fullmatch(ANSWER_FORM, gold)
        for name, output in returns.wrong(gold, facts):
            parsed = returns.verify(output, facts).parsed
            assert parsed or not grammar.takes(output), name
            assert bool(re.fullmatch(ANSWER_FORM, output)) == grammar.takes(output), name


def test_a_head_of_labels_needs_no_form():
    labels = SimpleNamespace(kind="labels")
    assert form_grammar(stated_form(EMAILS), labels) is None


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"regex": "(a"}, "answer_form: regex "),
        ({"json": {"type": "string"}, "choice": ["a"]}, "must have one of json, json_object, regex, choice"),
        ({"jsonschema": {}}, "answer_form: jsonschema: "),
        (["billing"], "answer_form: "),
    ],
)
def test_what_is_no_form_is_refused_in_one_line(tokenizer, form, said):
    class Odd(Domain):
        def answer_form(self):
            return form

    with pytest.raises(UserError, match=re.escape(said)) as raised:
        form_grammar(stated_form(Odd()), tokenizer, Grammars(tokenizer))
    assert "\n" not in str(raised.value)


def test_a_form_that_raises_is_named(tokenizer):
    class Broken(Domain):
        def answer_form(self):
            raise KeyError("labels")

    with pytest.raises(UserError, match="answer_form raised KeyError"):
        stated_form(Broken())
