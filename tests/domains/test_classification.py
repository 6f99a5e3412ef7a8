"""Classification: only the label is right, and everything that merely contains it is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from judged_cases import judged
from pydantic import ValidationError

from twinloop.common.errors import UserError
from twinloop.domains.classification import Classification
from twinloop.domains.loader import load_domain
from twinloop.evaluation.estimates import measured

LABELS = ["billing", "delivery", "technical", "account"]
EMAILS = Classification(LABELS, example="my parcel is late")


def facts(label: str) -> object:
    return EMAILS.read_facts({"facts": {"label": label}})


@pytest.mark.parametrize("label", LABELS)
def test_the_label_is_paid_and_no_wrong_answer_is(label: str) -> None:
    right = facts(label)
    assert EMAILS.verify(EMAILS.gold(right), right).passed
    wrong = list(EMAILS.wrong(EMAILS.gold(right), right))
    assert {"other label", "another case", "label and text", "empty", "all labels"} <= {name for name, _ in wrong}
    assert [output for _, output in wrong if EMAILS.verify(output, right).reward] == []


def test_labels_that_begin_alike_are_told_apart() -> None:
    domain = Classification(["a", "A", "ab"])
    right = domain.read_facts({"facts": {"label": "a"}})
    assert all(domain.verify(output, right).reward == 0 for _, output in domain.wrong("a", right))


def test_a_row_gives_demonstration_prompt_and_case_with_one_prompt() -> None:
    row = {"text": "my card was charged twice", "label": "billing"}
    made = {name: one.make(row, 7) for name, one in EMAILS.derived().items()}
    *asked, answer = made["chat"]["messages"]
    assert asked == made["prompts"]["prompt"] == made["cases"]["prompt"]
    assert asked == EMAILS.build_prompt(EMAILS.request(text=row["text"]), [])
    assert answer == {"role": "assistant", "content": "billing"}
    assert made["cases"]["case_id"] == "held-out-7"
    assert EMAILS.read_facts(made["prompts"]) == facts("billing")


def test_macro_f1_counts_every_label_alike_and_the_confusion_matrix_shows_where() -> None:
    said = {"billing": ["billing"] * 8 + ["delivery"] * 2, "delivery": ["delivery", "no label"]}
    cases = [judged(EMAILS, facts(label), output) for label, outputs in said.items() for output in outputs]
    found = measured(EMAILS, cases)
    assert found["accuracy"].value == pytest.approx(9 / 12)
    # billing: precision 1, recall 0.8; delivery: precision 1/3, recall 1/2; the others do not occur
    assert found["macro_f1"].value == pytest.approx((16 / 18 + 2 / 5) / 2)
    confusion = EMAILS.report(cases)["confusion"]
    assert confusion["billing"] == {"billing": 8, "delivery": 2, "technical": 0, "account": 0}
    assert EMAILS.report(cases)["no_label"] == {"billing": 0, "delivery": 1, "technical": 0, "account": 0}
    assert measured(EMAILS, []) == {}


def test_an_answer_that_is_no_label_is_not_counted_as_the_label_other() -> None:
    domain = Classification(["bug", "other"])
    right = domain.read_facts({"facts": {"label": "other"}})
    cases = [judged(domain, right, said) for said in ("other", "no idea")]
    assert measured(domain, cases)["accuracy"].value == 0.5
    assert domain.report(cases)["confusion"]["other"] == {"bug": 0, "other": 1}


def test_a_text_that_data_would_refuse_is_no_request() -> None:
    with pytest.raises(ValidationError, match="holds a NUL character"):
        EMAILS.request(text="hello\0")


def test_the_server_checks_that_it_is_a_label() -> None:
    request = EMAILS.request.model_validate(EMAILS.example)
    assert EMAILS.check("delivery", request, []).output == "delivery"
    refused = EMAILS.check("a delivery", request, [])
    assert not refused.passed
    assert "not one of the labels" in refused.reasons["parsed"]
    assert EMAILS.answer_schema() == {"type": "string", "enum": LABELS}


@pytest.mark.parametrize(
    ("labels", "problem"),
    [(["one"], "at least two"), (["a", "a"], "each once"), (["a", " b"], "' b' is empty or has spaces")],
)
def test_labels_that_cannot_be_told_apart_are_refused(labels: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        Classification(labels)


def test_a_recipe_that_names_it_without_labels_is_told_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"domain: classification defines no `domain`; it needs your labels"):
        load_domain("classification", tmp_path)
