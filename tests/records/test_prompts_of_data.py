"""A data set whose prompts the domain's build_prompt did not make is reported before training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel
from validating import dump, lines_of, write

from twinloop.domains.classification import Classification
from twinloop.domains.domain import Document, Domain, Message
from twinloop.domains.loader import load_domain
from twinloop.domains.reasoning import domain as reasoning
from twinloop.domains.returns.domain import Returns
from twinloop.flows.init import KINDS, init_project
from twinloop.records.prompts import prompt_form
from twinloop.records.validated import read_records
from twinloop.records.validation import validate
from twinloop.tasks.recipe import ValidateSettings

EMAILS = Classification(["billing", "delivery"])


def found_in(folder: Path, domain: Domain, **files: list[dict[str, Any]]) -> list[str]:
    (folder / "data").mkdir(exist_ok=True)
    for name, rows in files.items():
        write(folder / "data" / f"{name}.jsonl", [dump(row) for row in rows])
    report = validate(folder / "data", folder / "out", ValidateSettings(max_quarantined=0.5), domain, files)
    assert report.quarantined == 0
    return [str(finding) for finding in report.findings]


def talk(*prompt: tuple[str, str], answer: str = "billing") -> dict[str, Any]:
    messages = [{"role": role, "content": content} for role, content in (*prompt, ("assistant", answer))]
    return {"messages": messages}


# --- the ready-made domains


def test_the_prompts_of_generated_data_are_those_of_the_domain(check) -> None:
    assert check().findings == ()


@pytest.mark.parametrize("domain", [name for name, kind in KINDS.items() if kind.file])
def test_nothing_is_said_of_the_example_data_of_a_new_project(domain: str, tmp_path: Path) -> None:
    init_project(tmp_path / "project", domain)
    task = load_domain(f"./{KINDS[domain].file}", tmp_path / "project").domain
    assert task.params is not None
    (tmp_path / "data").mkdir()
    task.generate(task.params.model_validate({"training": 30, "held_out": 10}), tmp_path / "data")
    report = validate(tmp_path / "data", tmp_path / "out", ValidateSettings(), task, ["chat", "cases"])
    assert report.findings == ()


@pytest.mark.parametrize("name", ["chat", "preferences", "prompts", "cases"])
def test_prompts_of_ones_own_are_named_with_the_wanted_form(name: str, check, data: Path) -> None:
    rows = [json.loads(line) for line in lines_of(data / f"{name}.jsonl")]
    for number, row in enumerate(rows, 1):
        message = row["messages" if name == "chat" else "prompt"][0]
        if number >= 3:
            message["content"] = message["content"].replace(" | reason: ", ", because it is ")
    write(data / f"{name}.jsonl", [dump(row) for row in rows])
    [finding] = [str(each) for each in check().findings]
    assert finding.startswith(
        f"{name}.jsonl: {len(rows) - 2} of {len(rows)} rows (first: line 3) have a prompt that the domain's "
        "build_prompt does not make, while the server asks no other; for its example it makes "
    )
    assert "customer: hello, can i send this order back?" in finding


def test_prompts_without_facts_are_compared_with_the_form(check, data: Path) -> None:
    rows = [json.loads(line) for line in lines_of(data / "chat.jsonl")]
    for row in rows:
        del row["facts"]
    rows[6]["messages"][0]["content"] = "May I send A10001 back?"
    write(data / "chat.jsonl", [dump(row) for row in rows])
    found = [str(each) for each in check(ValidateSettings(split_keys=["text"])).findings]
    assert [one[:43] for one in found] == ["chat.jsonl: 1 of 80 rows (first: line 7) ha"]


@pytest.mark.parametrize(
    "row",
    [
        talk(("user", "an invoice")),
        talk(("system", "sort this"), ("user", "an invoice")),
        talk(("system", EMAILS.instruction), ("user", "hi"), ("assistant", "hello"), ("user", "an invoice")),
        talk(("system", EMAILS.instruction), ("user", "x" * 5000)),
    ],
    ids=["no instruction", "another instruction", "turns before it", "longer than a request"],
)
def test_chats_of_ones_own_for_labels_are_compared(row: dict[str, Any], tmp_path: Path) -> None:
    good = talk(("system", EMAILS.instruction), ("user", "a parcel"))
    [found] = found_in(tmp_path, EMAILS, chat=[good, row])
    assert found.startswith("chat.jsonl: 1 of 2 rows (first: line 2) have a prompt that")


def test_questions_of_ones_own_for_reasoning_are_compared(tmp_path: Path) -> None:
    rows = [talk(("user", "1 + 1 = ?"), answer="answer: 2"), talk(("system", "add"), ("user", "2"), answer="answer: 2")]
    assert len(found_in(tmp_path, reasoning, chat=rows[:1])) == 0
    assert len(found_in(tmp_path, reasoning, chat=rows)) == 1


# --- domains that ask in another way


class Asked(Classification):
    def build_prompt(self, request: Any, passages: Sequence[Document]) -> list[Message]:
        return [{"role": "user", "content": f"Text: {request.text}\nLabel?"}]


def test_what_is_made_from_labelled_rows_is_asked_as_the_server_asks(tmp_path: Path) -> None:
    rows = [{"text": "an invoice", "label": "billing"}]
    (tmp_path / "data").mkdir()
    for name in ("classification", "classification_heldout"):
        write(tmp_path / "data" / f"{name}.jsonl", [dump(rows[0] | {"text": name})])
    domain = Asked(["billing", "delivery"])
    report = validate(tmp_path / "data", tmp_path / "out", ValidateSettings(), domain, ["chat", "prompts", "cases"])
    assert report.findings == ()
    [record] = read_records(tmp_path / "out", "chat")
    assert record["messages"][0]["content"] == "Text: classification\nLabel?"


def test_a_subclass_that_asks_in_another_way_is_held_to_its_own_way(tmp_path: Path) -> None:
    domain = Asked(["billing", "delivery"])
    assert found_in(tmp_path, domain, chat=[talk(("user", "Text: an invoice\nLabel?"))]) == []
    assert len(found_in(tmp_path, domain, chat=[talk(("system", EMAILS.instruction), ("user", "an invoice"))])) == 1


class Politely(Returns):
    def build_prompt(self, request: Any, passages: Sequence[Document]) -> list[Message]:
        [message] = super().build_prompt(request, passages)
        return [{"role": "user", "content": f"Please decide.\n{message['content']}"}]


def test_a_subclass_of_returns_too(check, data: Path, tmp_path: Path) -> None:
    settings = ValidateSettings(split_keys=["text"])
    found = validate(data, tmp_path / "out", settings, Politely(), ["chat"]).findings
    assert [each.rows for each in found] == [80] * 3 + [len(lines_of(data / "cases.jsonl"))]
    rows = [json.loads(line) for line in lines_of(data / "chat.jsonl")]
    for row in rows:
        row["messages"][0]["content"] = f"Please decide.\n{row['messages'][0]['content']}"
    write(data / "chat.jsonl", [dump(row) for row in rows])
    found = validate(data, tmp_path / "out", settings, Politely(), ["chat"]).findings
    assert all("chat.jsonl" not in str(each) for each in found)


# --- a domain of one's own, which is only known by its example


class Ticket(BaseModel):
    queue: Literal["billing", "delivery"]
    urgent: bool
    age: int
    text: str
    note: str | None = None


def asked(build: Callable[[Ticket], list[tuple[str, str]]]) -> Domain:
    class Tickets(Domain):
        request = Ticket
        example: Mapping[str, Any] = {"queue": "billing", "urgent": False, "age": 3, "text": "an invoice"}

        def build_prompt(self, request: Any, passages: Sequence[Document]) -> list[Message]:
            return [{"role": role, "content": content} for role, content in build(request)]

    return Tickets()


QUEUES = {"billing": "Money", "delivery": "Parcels"}
TICKETS = asked(
    lambda ticket: [
        ("system", f"{QUEUES[ticket.queue]} desk. Sort the ticket."),
        ("user", f"{'Urgent' if ticket.urgent else 'Normal'} ticket of {ticket.age} days: {ticket.text} (end)"),
    ]
)


def test_the_form_is_what_no_request_changes() -> None:
    form = prompt_form(TICKETS)
    assert form.fixed == (("", " desk. Sort the ticket."), ("", " (end)"))
    assert form.roles == {("system", "user")}


@pytest.mark.parametrize(
    ("prompt", "fits"),
    [
        ([("system", "Parcels desk. Sort the ticket."), ("user", "Urgent ticket of 900 days: where? (end)")], True),
        ([("system", "Sort the ticket."), ("user", "Urgent ticket of 900 days: where? (end)")], False),
        ([("system", "Parcels desk. Sort the ticket."), ("user", "where?")], False),
        ([("user", "Urgent ticket of 900 days: where? (end)")], False),
    ],
)
def test_rows_are_compared_with_the_form_of_the_example(prompt: list[Any], fits: bool, tmp_path: Path) -> None:
    assert (found_in(tmp_path, TICKETS, chat=[talk(*prompt)]) == []) is fits


def test_a_message_that_only_some_requests_have_is_no_other_form(tmp_path: Path) -> None:
    domain = asked(
        lambda ticket: [*([("system", ticket.note)] if ticket.note else []), ("user", f"Ticket: {ticket.text}")]
    )
    rows = [talk(("user", "Ticket: a")), talk(("system", "a note"), ("user", "Ticket: b"))]
    assert found_in(tmp_path, domain, chat=rows) == []
    assert len(found_in(tmp_path, domain, chat=[*rows, talk(("user", "c"))])) == 1


def test_only_a_sample_of_many_rows_is_looked_at_and_that_is_said(tmp_path: Path) -> None:
    rows = [talk(("user", f"question {number}")) for number in range(2500)]
    [found] = found_in(tmp_path, TICKETS, chat=rows)
    assert found.startswith("chat.jsonl: 834 of 834 rows (first: line 1)")
    assert "(of 2500 rows, evenly spread ones were looked at)" in found


def test_a_domain_that_also_chats_may_be_trained_on_other_chats(tmp_path: Path) -> None:
    class Talking(type(TICKETS)):  # type: ignore[misc]
        chat = True

    assert found_in(tmp_path, Talking(), chat=[talk(("user", "hello"))]) == []
