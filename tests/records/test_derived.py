"""Rows in the form that people have become the records that the stages read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from twinloop.common.errors import UserError
from twinloop.domains.classification import Classification
from twinloop.records.validated import read_records, source_line
from twinloop.records.validation import validate
from twinloop.tasks.recipe import ValidateSettings

EMAILS = Classification(["billing", "delivery"])
WANTED = ("chat", "prompts", "cases")
SETTINGS = ValidateSettings(max_quarantined=0.5)


def write(folder: Path, **files: list[dict[str, str]]) -> Path:
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def row(text: str, label: str = "billing") -> dict[str, str]:
    return {"text": text, "label": label}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_labelled_rows_become_demonstrations_prompts_and_cases(tmp_path: Path, out: Path) -> None:
    rows = [row("an invoice"), row("a wrong label", "chess"), row("a parcel", "delivery")]
    report = validate(
        write(tmp_path, classification=rows, classification_heldout=[row("a bill")]), out, SETTINGS, EMAILS, WANTED
    )
    assert report.derived == {"chat": "classification", "prompts": "classification", "cases": "classification_heldout"}
    assert report.files["classification"].quarantined == 1
    answers = [record["messages"][-1]["content"] for record in read_records(out, "chat")]
    assert answers == ["billing", "delivery"]
    facts = [EMAILS.read_facts(record).label for record in read_records(out, "prompts")]
    assert facts == answers
    assert source_line(out, "prompts", 1) == ("classification.jsonl", 3)
    [case] = read_records(out, "cases")
    assert (case["case_id"], case["kind"], case["facts"]) == ("held-out-1", "held_out", {"label": "billing"})


def test_a_file_that_is_there_is_read_and_not_derived(tmp_path: Path, out: Path) -> None:
    prompt = [{"role": "user", "content": "hi"}]
    case = {"case_id": "mine", "kind": "golden", "prompt": prompt, "facts": {"label": "billing"}}
    write(tmp_path, classification=[row("an invoice")])
    (tmp_path / "cases.jsonl").write_text(json.dumps(case) + "\n")
    assert "cases" not in validate(tmp_path, out, SETTINGS, EMAILS, WANTED).derived
    assert [record["case_id"] for record in read_records(out, "cases")] == ["mine"]


def test_what_is_missing_is_named_as_people_have_it(tmp_path: Path, out: Path) -> None:
    with pytest.raises(UserError, match=r"no classification_heldout\.jsonl"):
        validate(write(tmp_path, classification=[row("an invoice")]), out, SETTINGS, EMAILS, WANTED)


def test_a_text_that_is_also_held_out_stops_the_run_and_both_lines_are_named(tmp_path: Path, out: Path) -> None:
    write(
        tmp_path,
        classification=[row("a parcel", "delivery"), row("An  invoice")],
        classification_heldout=[row("an invoice")],
    )
    with pytest.raises(
        UserError, match=r"classification\.jsonl line 2: its text .*classification_heldout\.jsonl line 1"
    ):
        validate(tmp_path, out, SETTINGS, EMAILS, WANTED)
