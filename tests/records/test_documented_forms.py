"""docs/data.md says what the record types are, and its examples are rows that validation keeps."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pytest
from pydantic import BaseModel, Field

from twinloop.domains.domain import Domain
from twinloop.domains.record_types import RecordType
from twinloop.records.validation import validate
from twinloop.tasks.recipe import ValidateSettings

TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
SECTIONS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^### |\Z)", TEXT, re.DOTALL | re.MULTILINE))


class Facts(BaseModel):
    queue: Literal["billing", "shipping"]
    priority: int = Field(ge=1)


class Expected(BaseModel):
    queue: Literal["billing", "shipping"]


class Tickets(Domain):
    facts = Facts
    expected = Expected


RECORD_TYPES = Tickets().record_types()


def described(dtype: Any) -> str:
    if isinstance(dtype, pl.Struct):
        return f"{{{', '.join(f'{part.name}: {described(part.dtype)}' for part in dtype.fields)}}}"
    if isinstance(dtype, pl.List):
        return f"list of {described(dtype.inner)}"
    return {pl.String: "text", pl.Int64: "integer"}[dtype.base_type()]


def table(record: RecordType) -> str:
    rows = [
        f"| {name} | {described(dtype)} | {'yes ' if name in record.optional else ''}|"
        for name, dtype in record.columns.items()
    ]
    return "\n".join(["| field | type | may be left out |", "| --- | --- | --- |", *rows])


def test_every_form_is_documented() -> None:
    assert list(SECTIONS) == list(RECORD_TYPES)


@pytest.mark.parametrize("name", RECORD_TYPES)
def test_the_table_of_a_form_is_its_columns(name: str) -> None:
    assert f"\n\n{table(RECORD_TYPES[name])}\n\n" in SECTIONS[name]


def test_the_examples_are_good_rows(tmp_path: Path) -> None:
    for name, section in SECTIONS.items():
        [example] = re.findall(r"```json\n(.*?)\n```", section, re.DOTALL)
        (tmp_path / f"{name}.jsonl").write_text(example + "\n")
    report = validate(tmp_path, tmp_path / "out", ValidateSettings(), Tickets(), RECORD_TYPES)
    assert report.quarantined == 0
    assert all(file.ignored_fields == [] for file in report.files.values())


def test_the_examples_of_other_forms_are_good_rows(tmp_path: Path) -> None:
    [section] = re.findall(r"^## Other forms of a row\n(.*?)^## ", TEXT, re.DOTALL | re.MULTILINE)
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
