"""Data of a domain of a user's own: facts as columns, split keys, record types, and only the files that are needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import polars as pl
import pytest
from pydantic import BaseModel, ConfigDict, Field

from twinloop.common.errors import UserError
from twinloop.domains.domain import Domain, SplitKey
from twinloop.domains.record_types import RecordType, classification
from twinloop.records.validated import read_records
from twinloop.records.validation import ValidationReport, validate
from twinloop.tasks.recipe import ValidateSettings


class Channel(StrEnum):
    MAIL = "mail"
    PHONE = "phone"


class Person(BaseModel):
    name: Annotated[str, Field(min_length=1)]
    age: int | None = None


class TicketFacts(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    queue: Literal["billing", "shipping"]
    priority: Annotated[int, Field(ge=1, le=5)]
    weight: float = 1.0
    channel: Channel = Channel.MAIL
    urgent: bool = False
    agent: str | None
    tags: tuple[Annotated[str, Field(max_length=8)], ...] = ()
    people: list[Person] = []


class Expected(BaseModel):
    queue: Literal["billing", "shipping"]


class Tickets(Domain):
    name = "tickets"
    facts = TicketFacts
    expected = Expected

    def record_types(self) -> Mapping[str, RecordType]:
        return {**super().record_types(), "classification": classification(("billing", "shipping"))}

    def split_keys(self) -> Mapping[str, SplitKey]:
        def agent(record: str, held_out: bool) -> pl.Expr | None:
            return pl.col("facts").struct.field("agent") if record in ("prompts", "cases") else None

        return {"agent": SplitKey("agent", agent, in_corpus=True)}

    def check_document(self, document_id: str, text: str) -> str | None:
        return None if document_id.startswith("D-") else "the id must begin with D-"


TICKETS = Tickets()
FACTS: dict[str, Any] = {"queue": "billing", "priority": 2, "agent": "ann"}
LENIENT = ValidateSettings(max_quarantined=0.9)


def prompt(text: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": text, "facts": dict(facts)}


def case(text: str, facts: Mapping[str, Any], queue: str = "billing") -> dict[str, Any]:
    return {"case_id": text, "kind": "held_out", **prompt(text, facts), "expected": {"queue": queue}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path


def check(
    folder: Path, settings: ValidateSettings = LENIENT, domain: Domain = TICKETS, **files: list[Any]
) -> ValidationReport:
    """Validates these files, all of which are needed."""
    for name, rows in files.items():
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        (folder / "data" / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return validate(folder / "data", folder / "out", settings, domain, files)


def quarantined(folder: Path, name: str) -> dict[int, str]:
    path = folder / "out" / "quarantine" / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["line"]: row["reason"] for row in rows}


WHOLE = {
    "weight": 2.5,
    "channel": "phone",
    "urgent": True,
    "tags": ["a", "b"],
    "people": [{"name": "eve", "age": 3}, {"name": "bob"}],
}


def test_facts_come_back_as_the_domains_model(folder: Path) -> None:
    assert check(folder, prompts=[prompt("a", FACTS), prompt("b", FACTS | WHOLE)]).quarantined == 0
    first, second = map(TICKETS.read_facts, read_records(folder / "out", "prompts"))
    assert first == TicketFacts(queue="billing", priority=2, agent="ann")
    assert second.people == [Person(name="eve", age=3), Person(name="bob")]
    assert (second.channel, second.tags, second.weight) == (Channel.PHONE, ("a", "b"), 2.5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"queue": "sales"}, "facts.queue: input should be 'billing' or 'shipping'"),
        ({"priority": 6}, "facts.priority: input should be less than or equal to 5"),
        ({"priority": "2"}, "facts.priority is text, not integer"),
        ({"priority": None}, "facts.priority is missing"),
        ({"channel": "fax"}, "facts.channel: input should be 'mail' or 'phone'"),
        ({"weight": "heavy"}, "facts.weight is text, not number"),
        ({"weight": 10**400}, "facts.weight is too large a number"),
        ({"urgent": 1}, "facts.urgent is integer, not boolean"),
        ({"tags": ["a", "far too long"]}, "facts.tags.1: string should have at most 8 characters"),
        ({"tags": ["a", None]}, "facts.tags"),
        ({"people": [{"name": ""}]}, "facts.people.0.name: string should have at least 1 character"),
        ({"people": [{"age": 3}]}, "facts.people.name is missing"),
        ({"agent": None}, None),
        ({"weight": 3}, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["prompts", "cases", "chat", "preferences"])
def test_facts_that_the_model_refuses_are_quarantined(
    name: str, change: dict[str, Any], reason: str | None, folder: Path
) -> None:
    def row(text: str, facts: Mapping[str, Any]) -> dict[str, Any]:
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
        return {
            "prompts": prompt(text, facts),
            "cases": case(text, facts),
            "chat": {"messages": turns, "facts": facts},
            "preferences": prompt(text, facts) | {"chosen": "yes", "rejected": "no"},
        }[name]

    report = check(folder, **{name: [row("a", FACTS), row("b", FACTS | change), row("c", FACTS)]})
    assert report.files[name].kept == (2 if reason else 3)
    found = quarantined(folder, name)
    assert set(found) == ({2} if reason else set())
    assert not reason or found[2].startswith(reason)


def test_numbers_are_the_same_on_both_ways_of_reading(folder: Path) -> None:
    weights = ["1", "0.1", "1e3", "-0.0", "1.7976931348623157e308", "123456789012345678901234567890", "1e999"]
    texts = [json.dumps(prompt(w, FACTS))[:-2] + f', "weight": {w}}}}}' for w in weights]
    check(folder, prompts=texts)
    together = [row["facts"]["weight"] for row in read_records(folder / "out", "prompts")]
    assert together == [float(weight) for weight in weights[:-1]]
    assert quarantined(folder, "prompts") == {7: "facts.weight is too large a number"}


def test_an_expectation_that_the_model_refuses_is_quarantined(folder: Path) -> None:
    check(folder, cases=[case("a", FACTS), case("b", FACTS, "sales")])
    assert quarantined(folder, "cases") == {2: "expected.queue: input should be 'billing' or 'shipping'"}


def test_a_field_that_no_column_can_hold_is_named() -> None:
    class Strange(BaseModel):
        when: dict[str, int]

    class Odd(Domain):
        facts = Strange

    with pytest.raises(UserError, match=r"Strange\.when: a column cannot hold dict"):
        Odd().record_types()


def test_rows_of_an_own_record_type_are_validated_and_split(folder: Path) -> None:
    rows = [{"text": "where is it?", "label": "shipping"}, {"text": "pay", "label": "sales"}, {"text": "pay"}]
    check(folder, classification=rows)
    assert quarantined(folder, "classification") == {
        2: "label is none of billing, shipping",
        3: "label is missing",
    }
    with pytest.raises(
        UserError, match=r"classification\.jsonl line 1: its text is also in held-out .*cases\.jsonl line 1"
    ):
        check(folder, classification=rows, cases=[case("Where  is it?", FACTS)])


def test_a_document_is_checked_by_the_rule_of_the_server(folder: Path) -> None:
    ids = ("D-1", "1", "D-2 ", "D-\u200b3")
    check(folder, documents=[{"document_id": each, "text": "a"} for each in ids])
    assert quarantined(folder, "documents") == {
        2: "the id must begin with D-",
        3: "its id must have 1 to 200 characters, and no white space around them",
        4: "its id has a character that cannot be seen; remove it",
    }


def test_only_the_files_that_are_needed_must_be_there(folder: Path) -> None:
    report = check(folder, corpus=[{"text": "a"}])
    assert list(report.files) == ["corpus"]
    (folder / "data" / "documents.jsonl").write_text('{"document_id": "D-1", "text": "a"}\n')
    assert list(check(folder, corpus=[{"text": "a"}]).files) == ["corpus", "documents"]
    with pytest.raises(UserError, match=r"no chat\.jsonl or chat\.parquet"):
        validate(folder / "data", folder / "out", LENIENT, TICKETS, {"corpus", "chat"})
    with pytest.raises(UserError, match="domain tickets has no record type letters; it has corpus, "):
        validate(folder / "data", folder / "out", LENIENT, TICKETS, {"letters"})


@pytest.mark.parametrize(
    "files",
    [{"prompts": [prompt("b", FACTS)]}, {"corpus": [{"text": "as ann said"}]}],
    ids=["key", "word in the corpus"],
)
def test_a_split_key_of_the_domain_is_checked_where_the_recipe_asks(files: dict[str, Any], folder: Path) -> None:
    check(folder, cases=[case("a", FACTS)], **files)
    by_agent = ValidateSettings(split_keys=["agent"])
    with pytest.raises(UserError, match=r"line 1: agent ann is also in held-out .*") as raised:
        check(folder, by_agent, cases=[case("a", FACTS)], **files)
    assert "take agent out of `validate: {split_keys: [agent]}` in the recipe" in str(raised.value)
    check(folder, by_agent, cases=[case("a", FACTS | {"agent": None})], **files)


@pytest.mark.parametrize(
    ("name", "hint"), [("agnet", "did you mean agent?"), ("order_id", "known to domain tickets: text, agent")]
)
def test_a_split_key_that_there_is_not_names_the_nearest(name: str, hint: str, folder: Path) -> None:
    with pytest.raises(UserError) as raised:
        check(folder, ValidateSettings(split_keys=["text", name]), corpus=[{"text": "a"}])
    assert str(raised.value) == f"validate.split_keys: '{name}' is no split key; {hint}"


def test_white_space_and_letter_case_hide_no_leak_of_a_conversation(folder: Path) -> None:
    turns = [("user", "Hello\u00a0 THERE"), ("assistant", "Yes?"), ("user", "ÄRGER\tand more "), ("assistant", "ok")]
    chat = [{"role": role, "content": text} for role, text in turns]
    asked = [{"role": role, "content": text} for role, text in turns[:3]]
    asked[0], asked[2] = asked[0] | {"content": "hello there"}, asked[2] | {"content": "ärger and  more"}
    held_out = {"case_id": "1", "kind": "held_out", "prompt": [{"role": "system", "content": "Be kind."}, *asked]}
    with pytest.raises(UserError, match=r"chat\.jsonl line 1: its text is also in held-out"):
        check(folder, LENIENT, Domain(), chat=[{"messages": chat}], cases=[held_out])
