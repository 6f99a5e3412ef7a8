"""docs/data.md and `twinloop data schema` say what the record types are, and their examples are rows that are kept."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, Field

from twinloop.domains.chat import domain as chat
from twinloop.domains.classification import Classification
from twinloop.domains.domain import Domain
from twinloop.domains.reasoning import domain as reasoning
from twinloop.domains.record_types import RecordType
from twinloop.domains.returns import domain as returns
from twinloop.records.schema import example_row, fields_of, markdown, other_forms, text
from twinloop.records.validated import read_records
from twinloop.records.validation import validate
from twinloop.tasks.recipe import ValidateSettings

DOCS = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
EMAILS = Classification(["billing", "delivery"], example="I was charged twice.")


class Facts(BaseModel):
    queue: Literal["billing", "shipping"] = Field(description="who must answer", examples=["shipping"])
    priority: int = Field(ge=1, description="1 is the most urgent", examples=[2])


class Expected(BaseModel):
    queue: Literal["billing", "shipping"] = Field(examples=["shipping"])


class Tickets(Domain):
    """The domain of the page's examples."""

    facts = Facts
    expected = Expected

    def gold(self, facts: Facts) -> str:
        return facts.queue

    def wrong(self, gold: str, facts: Facts) -> Iterator[tuple[str, str]]:
        yield "other queue", "billing" if gold == "shipping" else "shipping"


DOMAINS = {"tickets": Tickets(), "classification": EMAILS, "chat": chat, "reasoning": reasoning, "returns": returns}
FORMS = {f"{name}: {record}": (name, record) for name in DOMAINS for record in DOMAINS[name].record_types()}
OF_READY_MADE = {
    "classification": EMAILS, "reasoning": reasoning, "reasoning_heldout": reasoning, "chat_heldout": chat,
}  # fmt: skip
STANDARD = Tickets().record_types()


def kept(record: RecordType, rows: list[dict[str, object]], domain: Domain, folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data" / f"{record.name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = validate(folder / "data", folder / "out", ValidateSettings(), domain, [record.name])
    assert (report.quarantined, report.findings) == (0, ())
    assert report.files[record.name].ignored_fields == []


@pytest.mark.parametrize(("name", "record"), FORMS.values(), ids=FORMS)
def test_an_example_is_a_whole_row_that_validation_keeps(name: str, record: str, tmp_path: Path) -> None:
    domain = DOMAINS[name]
    form = domain.record_types()[record]
    row = example_row(form, domain)
    assert set(form.columns) - set(row) <= {"pair_id"}
    kept(form, [row], domain, tmp_path)


@pytest.mark.parametrize(("name", "record"), FORMS.values(), ids=FORMS)
def test_every_record_type_says_what_it_is_and_what_its_fields_hold(name: str, record: str) -> None:
    form = DOMAINS[name].record_types()[record]
    assert form.about.endswith(".")
    for column in form.columns:
        assert form.meanings[column]


@pytest.mark.parametrize(("name", "record"), FORMS.values(), ids=FORMS)
def test_the_forms_of_other_tools_become_the_same_record(name: str, record: str, tmp_path: Path) -> None:
    domain = DOMAINS[name]
    form = domain.record_types()[record]
    row = example_row(form, domain)
    assert bool(other_forms(form, row)) == ({"messages", "chosen"} & set(form.columns) != set())
    for number, (what, other) in enumerate({"our own": row, **other_forms(form, row)}.items()):
        (folder := tmp_path / str(number)).mkdir()
        kept(form, [other], domain, folder)
        assert read_records(folder / "out", record) == read_records(tmp_path / "0" / "out", record), what


@pytest.mark.parametrize("name", [*STANDARD, *OF_READY_MADE])
def test_the_page_has_the_section_of_every_form(name: str) -> None:
    domain = OF_READY_MADE.get(name) or Tickets()
    section = markdown(domain.record_types()[name], domain)
    assert f"\n\n{section}\n" in DOCS, f"docs/data.md should have:\n\n{section}"


def test_the_page_has_no_other_sections() -> None:
    assert set(re.findall(r"^### (\w+)$", DOCS, re.MULTILINE)) == {*STANDARD, *OF_READY_MADE}


def test_fields_inside_a_field_are_named_with_what_they_hold() -> None:
    fields = {field.name: field for field in fields_of(STANDARD["prompts"])}
    assert fields["facts"].type == "object"
    assert fields["facts.priority"] == ("facts.priority", "integer", "yes", "1 is the most urgent")
    assert {field.name: field.needed for field in fields_of(returns.record_types()["prompts"])}[
        "facts.policy.window_days"
    ] == ""


def test_a_domain_whose_code_fails_on_its_example_still_has_forms() -> None:
    class Broken(Tickets):
        request = Facts
        example = {"queue": "billing", "priority": 1}  # noqa: RUF012

        def build_prompt(self, request: object, passages: object) -> list[dict[str, str]]:
            raise ValueError

        def gold(self, facts: object) -> str:
            raise ValueError

    domain = Broken()
    assert '"Where is my parcel?"' in text(domain.record_types()["chat"], domain)


def test_the_examples_of_other_forms_are_good_rows(tmp_path: Path) -> None:
    [section] = re.findall(r"^## Other forms of a row\n(.*?)^## ", DOCS, re.DOTALL | re.MULTILINE)
    rows = re.findall(r"^\| [^|]+ \| `(\{.*?\})`[^|]* \| `(\w+)`", section, re.MULTILINE)
    assert len(rows) == 5
    for number, (row, name) in enumerate(rows):
        fields = json.loads(row)
        if set(fields) == {"prompt"}:
            fields |= {"chosen": "Blue.", "rejected": "Seven."}
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / f"{name}.jsonl").write_text(json.dumps(fields) + "\n")
        report = validate(folder, folder / "out", ValidateSettings(), Domain(), [name])
        assert (report.quarantined, report.files[name].ignored_fields) == (0, [])
