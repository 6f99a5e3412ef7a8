"""The shape of each record, and of the answer that a demonstration shows."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pandera.polars as pa
import polars as pl
import pytest

from twinloop.domains.returns import domain
from twinloop.domains.returns.case_maker import GeneratorParams
from twinloop.domains.returns.generator import generate
from twinloop.domains.returns.policies import window_days
from twinloop.domains.returns.schemas import audit_answer, audit_target, window_of

RECORD_TYPES = domain.record_types()
REFERENCE = json.loads((Path(__file__).parents[1] / "reference_cases.json").read_text())
SMALL = GeneratorParams(**{name: 20 for name, field in GeneratorParams.model_fields.items() if field.is_required()})


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Generated rows of every record type."""
    folder = tmp_path_factory.mktemp("raw")
    generate(SMALL, folder)
    return {name: [json.loads(line) for line in (folder / f"{name}.jsonl").open()] for name in RECORD_TYPES}


@pytest.mark.parametrize("case", REFERENCE["sft_target_audit"])
def test_target_audit_agrees_with_the_worked_examples(case: dict[str, Any]) -> None:
    verdict = audit_target(case["target"])
    assert verdict.verdict == case["verdict"]
    assert verdict.missing == case.get("missing", [])


def test_the_worked_demonstration_is_kept() -> None:
    assert audit_target(REFERENCE["sft_example"]["target"]).verdict == "keep"


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"eligible": "true"}, "eligible of type str, not bool"),
        ({"eligible": 1}, "eligible of type int, not bool"),
        ({"policy_id": 7}, "policy_id of type int, not str"),
        ({"evidence": None}, "evidence of type NoneType, not str"),
        ({"days": True}, "days of type bool, not int"),
        ({"days": 12.0}, "days of type float, not int"),
    ],
)
def test_target_of_a_wrong_type_is_rejected(change: dict[str, Any], wrong: str) -> None:
    verdict = audit_target({"eligible": True, "policy_id": "P-7", "evidence": "within 30 days"} | change)
    assert (verdict.verdict, verdict.wrong) == ("reject", [wrong])
    assert wrong in verdict.reason


@pytest.mark.parametrize(
    "answer",
    ["", "Eligible.", "[]", "null", '{"eligible": true', '{"eligible": true, "eligible": true}', "{} {}", "[" * 10_000],
)
def test_answer_that_is_not_one_json_object_is_rejected(answer: str) -> None:
    assert audit_answer(answer).verdict == "reject"


@pytest.mark.parametrize("name", RECORD_TYPES)
def test_generated_rows_keep_every_rule(name: str, rows: dict[str, list[dict[str, Any]]]) -> None:
    record = RECORD_TYPES[name]
    frame = pl.DataFrame(rows[name], schema=dict(record.columns), strict=True)
    assert len(record.model.validate(frame, lazy=True)) == len(rows[name])


def edited(row: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    row = copy.deepcopy(row)
    *parents, last = path.split(".")
    place: Any = row
    for key in parents:
        place = place[int(key) if key.lstrip("-").isdigit() else key]
    place[last] = value
    return row


NUL = "\0"


@pytest.mark.parametrize(
    ("name", "path", "value", "reason"),
    [
        ("corpus", "text", " \n", "text is empty"),
        ("corpus", "text", "a" * 1_000_001, "text is longer than 1000000 characters"),
        ("corpus", "text", f"a{NUL}b", "text holds a NUL byte"),
        ("chat", "messages", [], "messages is without a question"),
        ("chat", "messages.-1.role", "user", "messages does not end with the assistant"),
        ("chat", "messages.0.role", "tool", "messages has an unknown role"),
        ("chat", "messages.0.content", "", "messages has a message that is empty"),
        ("chat", "messages.0.content", "a" * 100_001, "messages has a message longer than 100000 characters"),
        ("chat", "messages.0.content", f"a{NUL}", "messages has a message with a NUL byte"),
        ("preferences", "chosen", "", "chosen is empty"),
        ("preferences", "prompt.0.role", "assistant", "prompt does not end with the user"),
        ("prompts", "facts.order.order_id", "10234", "facts has an order_id that is no order's"),
        ("prompts", "facts.order.reason", "it broke", "facts has a reason that is not one lower-case word"),
        ("prompts", "facts.order.days_since_delivery", -1, "facts has days_since_delivery out of range"),
        ("prompts", "facts.policy.policy_id", "P-0", "facts has a policy that is not among its passages"),
        ("prompts", "facts.passages", [], "facts has a policy that is not among its passages"),
        ("prompts", "facts.policy.window_days", 99, "facts has a window_days that its policy's text does not say"),
        ("prompts", "facts.policy.window_days", None, "facts has a window_days that its policy's text does not say"),
        ("cases", "kind", "easy", "kind is none of golden, held_out, contrast, injection"),
        ("cases", "expected.policy_id", "P-0", "expected.policy_id is not the policy of its facts"),
        ("documents", "text", "", "text is empty"),
    ],
)
def test_a_row_that_breaks_a_rule_is_found(
    name: str, path: str, value: Any, reason: str, rows: dict[str, list[dict[str, Any]]]
) -> None:
    record = RECORD_TYPES[name]
    bad = [*rows[name][:2], edited(rows[name][2], path, value), *rows[name][3:]]
    frame = pl.DataFrame(bad, schema=dict(record.columns), strict=True)
    with pytest.raises(pa.errors.SchemaErrors) as raised:
        record.model.validate(frame, lazy=True)
    found = raised.value.failure_cases
    assert set(found["index"]) == {2}
    assert any(check.startswith(reason) for check in found["check"])


@pytest.mark.parametrize(
    "text", ["damaged items are eligible.", "damaged items within 30 days, or within 60 days with a receipt."]
)
@pytest.mark.parametrize(("name", "refused"), [("prompts", True), ("cases", True), ("chat", False)])
def test_answers_are_paid_and_judged_only_under_a_policy_that_names_one_window(
    text: str, name: str, refused: bool, rows: dict[str, list[dict[str, Any]]]
) -> None:
    """A policy may name no window, and then no answer can be right."""
    record = RECORD_TYPES[name]
    row = copy.deepcopy(rows[name][2])
    row["facts"]["policy"] |= {"text": text, "window_days": None}
    row["facts"]["passages"] = [{"policy_id": row["facts"]["policy"]["policy_id"], "text": text}]
    if name == "cases":
        row["expected"]["eligible"] = False
    bad = [*rows[name][:2], row, *rows[name][3:]]
    frame = pl.DataFrame(bad, schema=dict(record.columns), strict=True)
    if not refused:
        assert len(record.model.validate(frame, lazy=True)) == len(bad)
        return
    with pytest.raises(pa.errors.SchemaErrors) as raised:
        record.model.validate(frame, lazy=True)
    found = raised.value.failure_cases
    assert set(found["index"]) == {2}
    assert list(found["check"]) == ["facts has a policy that names no window"]


def test_a_case_whose_expectation_does_not_follow_is_found(rows: dict[str, list[dict[str, Any]]]) -> None:
    record = RECORD_TYPES["cases"]
    bad = [edited(row, "expected.eligible", not row["expected"]["eligible"]) for row in rows["cases"]]
    with pytest.raises(pa.errors.SchemaErrors) as raised:
        record.model.validate(pl.DataFrame(bad, schema=dict(record.columns), strict=True), lazy=True)
    assert set(raised.value.failure_cases["index"]) == set(range(len(bad)))


@pytest.mark.parametrize(
    "text",
    [
        "damaged items within 30 days are eligible.",
        "Within 7 Days of delivery",
        "within 30 days, or within 60 days with a receipt",
        "within thirty days",
        "within 12345 days",
        "",
    ],
)
def test_window_of_a_column_is_that_of_each_text(text: str) -> None:
    assert pl.DataFrame({"text": [text]}).select(window_of(pl.col("text"))).item() == window_days(text)
