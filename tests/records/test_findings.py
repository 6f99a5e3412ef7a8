"""What stops nothing and is reported: misspelt fields, rows that a check cannot see, contradictions, repeats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from validating import SPLIT_KEYS, dump, lines_of, row, write

from twinloop.common.errors import UserError
from twinloop.domains.chat import domain as chat
from twinloop.records.misspelt import nearest
from twinloop.records.validation import ValidationReport, validate
from twinloop.tasks.recipe import ValidateSettings

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"
LENIENT = ValidateSettings(max_quarantined=0.9)


def said(report: ValidationReport) -> list[str]:
    return [str(finding) for finding in report.findings]


def talk(question: str, answer: str = "yes") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def case(question: str) -> dict[str, Any]:
    return {"case_id": question, "kind": "held_out", "prompt": question, "expected": {"answer": "yes"}}


def check(folder: Path, settings: ValidateSettings = LENIENT, **files: list[dict[str, Any]]) -> ValidationReport:
    """Validates these files as the chat domain's."""
    shutil.rmtree(folder / "chat", ignore_errors=True)
    (folder / "chat").mkdir()
    for name, rows in files.items():
        write(folder / "chat" / f"{name}.jsonl", [json.dumps(one).encode() for one in rows])
    return validate(folder / "chat", folder / "out", settings, chat, files)


# --- fields that are misspelt


@pytest.mark.parametrize(
    ("name", "known", "near"),
    [
        ("fact", ["facts", "messages"], "facts"),
        ("mesages", ["facts", "messages"], "messages"),
        ("Chosen", ["prompt", "chosen", "rejected"], "chosen"),
        ("chsoen", ["prompt", "chosen", "rejected"], "chosen"),
        ("documentId", ["document_id", "text"], "document_id"),
        ("pair-id", ["case_id", "pair_id"], "pair_id"),
        ("expect", ["expected", "prompt"], "expected"),
        ("source", ["facts", "messages", "text"], None),
        ("prompt_tokens", ["prompt", "chosen"], None),
        ("name", ["role", "content"], None),
        ("x", [], None),
    ],
)
def test_a_name_is_near_another_by_a_letter_in_four(name: str, known: list[str], near: str | None) -> None:
    assert nearest(name, known) == near


def misspell(path: Path, name: str, other: str, lines: set[int]) -> None:
    rows = [json.loads(line) for line in lines_of(path)]
    changed = [
        {other if key == name else key: value for key, value in one.items()} if number in lines else one
        for number, one in enumerate(rows, 1)
    ]
    write(path, [dump(one) for one in changed])


def test_an_optional_field_that_is_misspelt_is_named_once_with_the_rows_and_the_first_line(check, data: Path) -> None:
    misspell(data / "chat.jsonl", "facts", "fact", {3, 5})
    report = check(ValidateSettings(split_keys=["text", "order_id"]))
    assert report.quarantined == 0
    assert said(report) == [
        "chat.jsonl: 2 of 80 rows (first: line 3) have the unknown field fact and no facts: misspelt?",
        "chat.jsonl: 2 of 80 rows (first: line 3) have no split key order_id, so that the leakage check by it "
        "does not see them",
    ]
    assert json.loads((data.parent / "out" / "report.json").read_text())["findings"][0]["rows"] == 2


def test_a_case_that_lost_its_pair_is_named(check, data: Path) -> None:
    lines = {number for number, line in enumerate(lines_of(data / "cases.jsonl"), 1) if json.loads(line)["pair_id"]}
    misspell(data / "cases.jsonl", "pair_id", "pairid", lines)
    assert f"(first: line {min(lines)}) have the unknown field pairid and no pair_id: misspelt?" in said(check())[0]


def test_an_optional_field_inside_another_is_named_too(check, data: Path) -> None:
    record = row(data / "chat.jsonl", 4)
    policy = record["facts"]["policy"]
    policy["text"] = "damaged items come back at once."  # names no window
    record["facts"]["passages"] = [{"policy_id": policy["policy_id"], "text": policy["text"]}]
    policy["window_day"] = policy.pop("window_days")
    lines = lines_of(data / "chat.jsonl")
    write(data / "chat.jsonl", [*lines[:3], dump(record), *lines[4:]])
    assert "facts.policy.window_day and no facts.policy.window_days: misspelt?" in said(check())[0]


def test_an_unknown_field_beside_the_known_one_is_no_mistake(check, data: Path) -> None:
    path = data / "chat.jsonl"
    write(path, [dump(json.loads(line) | {"fact": 1, "message": 2}) for line in lines_of(path)])
    assert said(check()) == []


def test_a_misspelt_column_of_parquet_is_in_all_its_rows(check, data: Path) -> None:
    frame = pl.DataFrame([json.loads(line) for line in lines_of(data / "chat.jsonl")])
    frame.rename({"facts": "fact"}).write_parquet(data / "chat.parquet")
    (data / "chat.jsonl").unlink()
    first = said(check())[0]
    assert first == "chat.parquet: 80 of 80 rows (first: line 1) have the unknown field fact and no facts: misspelt?"


def test_a_needed_field_that_is_misspelt_is_named_where_the_stage_fails(check, data: Path) -> None:
    misspell(data / "chat.jsonl", "messages", "mesages", set(range(1, 81)))
    with pytest.raises(
        UserError, match=r"messages is missing \(80 of the rows have the unknown field mesages and no messages"
    ):
        check()


# --- rows that a check cannot see


def test_rows_without_a_split_key_are_counted_by_key_and_file(check, data: Path) -> None:
    path = data / "preferences.jsonl"
    first, *others = (json.loads(line) for line in lines_of(path))
    del first["facts"]
    write(path, [dump(one) for one in (first, *others)])
    found = said(check(ValidateSettings(split_keys=SPLIT_KEYS)))
    assert len(found) == 3
    assert all(one.startswith("preferences.jsonl: 1 of 80 rows (first: line 1) have no ") for one in found)


# --- contradictions and repeats


def pair(chosen: str, rejected: str, prompt: str = "which?") -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_pairs_that_are_there_with_their_answers_swapped_are_counted(tmp_path: Path) -> None:
    pairs = [pair("c", "d"), pair("a", COMPOSED), pair("a", "c"), pair(DECOMPOSED, "a"), pair("b", "a", "who?")]
    report = check(tmp_path, preferences=pairs)
    assert report.quarantined == 0
    assert said(report) == [
        "preferences.jsonl: 2 of 5 rows (first: line 2) are there again with chosen and rejected swapped, and each "
        "undoes the other"
    ]
    assert said(check(tmp_path, preferences=pairs[:3])) == []


def test_rows_that_differ_only_in_unicode_form_are_counted(tmp_path: Path) -> None:
    report = check(tmp_path, chat=[talk("a"), talk(COMPOSED), talk("b"), talk(DECOMPOSED)])
    assert said(report) == [
        "chat.jsonl: 1 of 4 rows (first: line 4) repeat an earlier one in another Unicode form (in NFC they are equal)"
    ]
    assert said(check(tmp_path, chat=[talk(COMPOSED), talk(DECOMPOSED, "no")])) == []


@pytest.mark.parametrize(("trained", "held_out"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_a_leak_in_another_unicode_form_stops_the_run(trained: str, held_out: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"chat\.jsonl line 1: its text is also in held-out .*cases\.jsonl line 1"):
        check(tmp_path, chat=[talk(trained)], cases=[case(held_out)])


# --- answers that nobody can see


@pytest.mark.parametrize("answer", ["\u200b", "\ufeff", "\u202e", "\ufe0f", "\u3164", "\u00a0\u2003"])
def test_an_answer_of_invisible_characters_is_empty(answer: str, tmp_path: Path) -> None:
    report = check(tmp_path, chat=[talk("a"), talk("b", answer)], preferences=[pair("a", answer), pair("a", "b")])
    assert report.files["chat"].reasons == {"messages has a message that is empty": 1}
    assert report.files["preferences"].reasons == {"rejected is empty": 1}


# --- data of several files


def test_the_first_row_is_named_with_its_file_where_there_are_several(tmp_path: Path) -> None:
    rows = {"chat": [talk("a"), talk(COMPOSED)], "chat_2": [talk("b"), talk(DECOMPOSED)]}
    (tmp_path / "data").mkdir()
    for name, some in rows.items():
        write(tmp_path / "data" / f"{name}.jsonl", [dump(one) for one in some])
    report = validate(tmp_path / "data", tmp_path / "out", LENIENT, chat, ["chat"])
    assert said(report) == [
        "chat.jsonl and 1 more: 1 of 4 rows (first: line 2 of chat_2.jsonl) repeat an earlier one in another Unicode "
        "form (in NFC they are equal)"
    ]


def test_a_misspelt_column_of_one_part_is_in_the_rows_of_that_part(check, data: Path) -> None:
    frame = pl.DataFrame([json.loads(line) for line in lines_of(data / "chat.jsonl")])
    write(data / "chat.jsonl", lines_of(data / "chat.jsonl")[:30])
    frame[30:].rename({"facts": "fact"}).write_parquet(data / "chat_2.parquet")
    first = said(check())[0]
    assert first.startswith("chat.jsonl and 1 more: 50 of 80 rows (first: line 1 of chat_2.parquet) have the unknown")
