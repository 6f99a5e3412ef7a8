"""The leakage check: a held-out row that training data repeats stops the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from validating import dump, lines_of, refused, row, write

from twinloop.tasks.recipe import ValidateSettings


def held_out_case(data: Path, kind: str = "held_out") -> tuple[int, dict[str, Any]]:
    for number, line in enumerate(lines_of(data / "cases.jsonl"), 1):
        case = json.loads(line)
        if case["kind"] == kind:
            return number, case
    raise AssertionError(kind)


def append(path: Path, record: dict[str, Any]) -> int:
    lines = lines_of(path)
    write(path, [*lines, dump(record)])
    return len(lines) + 1


@pytest.mark.parametrize("name", ["chat", "preferences", "prompts"])
def test_a_held_out_prompt_in_training_stops_the_run(name: str, check, data: Path) -> None:
    number, case = held_out_case(data)
    asked = [m | {"content": m["content"].upper().replace(" ", "  ")} for m in case["prompt"]]
    record = row(data / f"{name}.jsonl")
    if name == "chat":
        record["messages"] = [{"role": "system", "content": "Decide."}, *asked, record["messages"][-1]]
    else:
        record["prompt"] = asked
    line = append(data / f"{name}.jsonl", record)
    message = refused(check, ["text"])
    assert f"{name}.jsonl line {line}: its text is also in held-out" in message
    assert f"cases.jsonl line {number}" in message


def test_a_held_out_document_in_the_corpus_stops_the_run(check, data: Path) -> None:
    line = append(data / "corpus.jsonl", row(data / "corpus_heldout.jsonl", 5))
    assert f"corpus.jsonl line {line}: its text is also in held-out" in refused(check, ["text"])


def test_a_held_out_order_in_training_stops_the_run(check, data: Path) -> None:
    _, case = held_out_case(data, "golden")
    record = row(data / "prompts.jsonl")
    record["facts"]["order"]["order_id"] = case["facts"]["order"]["order_id"]
    line = append(data / "prompts.jsonl", record)
    assert f"prompts.jsonl line {line}: order A10234 is also in held-out" in refused(check)


@pytest.mark.parametrize("named", ["order", "policy"])
def test_an_id_of_a_case_that_the_corpus_names_stops_the_run(named: str, check, data: Path) -> None:
    name = {"order": "A10234", "policy": "P-7"}[named]
    line = append(data / "corpus.jsonl", {"text": f"as was decided ({name}), so it is"})
    assert f"corpus.jsonl line {line}: {named} {name} is also in" in refused(check)


@pytest.mark.parametrize("text", ["order A102345", "XP-7", "P-70", "P-7-b", "p-7"])
def test_a_longer_word_is_not_the_id(text: str, check, data: Path) -> None:
    append(data / "corpus.jsonl", {"text": text})
    check(ValidateSettings(max_quarantined=0.5, split_keys=["order_id"]))
    ids = [case["facts"]["policy"]["policy_id"] for case in map(json.loads, lines_of(data / "cases.jsonl"))]
    if not set(text.split()) & set(ids):
        check()


def test_a_held_out_policy_even_as_a_distractor_stops_the_run(check, data: Path) -> None:
    record = row(data / "chat.jsonl")
    record["facts"]["passages"].append({"policy_id": "P-7", "text": "late items within 9 days are eligible."})
    line = append(data / "chat.jsonl", record)
    assert f"chat.jsonl line {line}: policy P-7 is also in held-out" in refused(check)
    check(ValidateSettings(max_quarantined=0.5, split_keys=["text", "order_id"]))


def test_a_held_out_pair_in_training_stops_the_run(check, data: Path) -> None:
    record = row(data / "preferences.jsonl")
    record["chosen"] += " "
    text = "damaged items within 30 days are eligible."
    record["facts"]["policy"] = {"policy_id": "P-2", "text": text, "window_days": 30}
    record["facts"]["passages"] = [{"policy_id": "P-2", "text": text}]
    record["facts"]["order"]["days_since_delivery"] = 45
    line = append(data / "preferences.jsonl", record)
    message = refused(check)
    assert f"preferences.jsonl line {line}: the pair of 30 days of window and day 45 is also in" in message


def test_every_leak_is_counted(check, data: Path) -> None:
    for number in (1, 2, 3):
        append(data / "corpus.jsonl", row(data / "corpus_heldout.jsonl", number))
    assert "(2 more of such rows)" in refused(check, ["text"])
