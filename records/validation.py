"""The stage that validates data: every row is kept, or quarantined with its reason, and the splits are disjoint.

What a row must be is defined by the domain (`Domain.record_types`). The result is one Parquet file for each record type
that has data, which `records.validated` reads, `quarantine/<name>.jsonl` with the rows that cannot be used, and
report.json. A few bad rows are normal; above the recipe's limit the data are considered broken, and the stage fails.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pandera.polars as pa
import polars as pl
from pandera.config import ValidationDepth, config_context

from twinloop.common.errors import UserError
from twinloop.domains.domain import Derived, Domain, chosen_split_keys, domain_code
from twinloop.domains.record_types import RecordType
from twinloop.records.files import DataFiles, find_data
from twinloop.records.findings import Finding, find_in
from twinloop.records.forms import wanted_form
from twinloop.records.misspelt import misspelt_fields
from twinloop.records.prompts import foreign_prompts
from twinloop.records.reading import Source, original_lines, read_files
from twinloop.records.rows import LINE, Rejected, Rows, rejected_line
from twinloop.records.splits import Split, check_splits, unseen_rows
from twinloop.records.validated import write_records

DUPLICATE = "duplicate of "
"""What the reason of a row begins with that is there twice."""
WORST_REASONS = 3
WRONG_FORM = re.compile(r" is missing|, not |^not a JSON object| begin$")
"""Reasons of rows that are of another form."""


class Settings(Protocol):
    """The recipe's section `validate`."""

    @property
    def max_quarantined(self) -> float:
        """Share of one file's rows that may be quarantined before the stage fails."""

    @property
    def split_keys(self) -> Sequence[str]:
        """What training and held-out rows may not share, by name."""


@dataclass(frozen=True)
class FileReport:
    """One record type's rows: all of them are kept or quarantined."""

    files: dict[str, int]
    """Rows of each file, by its path in the data folder, in the order in which they are read."""
    rows: int
    kept: int
    quarantined: int
    reasons: dict[str, int] = field(default_factory=dict)
    """Rows by the reason why they were quarantined, most first; numbers in a reason are left out here."""
    ignored_fields: list[str] = field(default_factory=list)
    """Fields that no stage reads; they are not in what is kept."""


@dataclass(frozen=True)
class ValidationReport:
    files: dict[str, FileReport]
    """By record type."""
    derived: dict[str, str]
    """Record types that have no file: by name, the record type from whose rows they were made."""
    split_keys: tuple[str, ...]
    """What was checked to be disjoint."""
    ignored_files: dict[str, str]
    """Why nothing reads a file of the data folder, by its path there."""
    findings: tuple[Finding, ...] = ()
    """What stops nothing and the owner of the data should know."""

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files.values())

    @property
    def quarantined(self) -> int:
        return sum(file.quarantined for file in self.files.values())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def metrics(self) -> dict[str, float]:
        """Flat numbers for a tracker."""
        counts = {f"kept/{name}": float(file.kept) for name, file in self.files.items()}
        counts |= {f"quarantined/{name}": float(file.quarantined) for name, file in self.files.items()}
        return counts | {"rows": float(self.rows), "quarantined": float(self.quarantined)}


def validate(
    input_dir: Path, output_dir: Path, settings: Settings, domain: Domain, names: Collection[str]
) -> ValidationReport:
    """Check the data files in `input_dir` (see `records.files`) and write what is good to `output_dir`.

    names: the record types that are wanted. Each must have a file, or one of the record type that the domain derives it
    from. Files of the domain's other types are read where there are any.
    Raises UserError where a file is missing, unreadable or holds no usable row, where too many of its rows are bad, and
    where a row to train on leaks from a held-out one. What was quarantined until then is in `output_dir`/quarantine.
    """
    records, keys = domain.record_types(), chosen_split_keys(domain, settings.split_keys)
    if unknown := sorted(set(names) - set(records)):
        raise UserError(f"domain {domain.name} has no record type {unknown[0]}; it has {', '.join(records)}")
    data = find_data(input_dir, records)
    derived = {name: how for name, how in domain.derived().items() if name in names and name not in data.of}
    _refuse_missing(input_dir, data, [derived[name].source if name in derived else name for name in names])
    (output_dir / "quarantine").mkdir(parents=True, exist_ok=True)
    splits: list[Split] = []
    reports: dict[str, FileReport] = {}
    findings: list[Finding] = []
    for name, paths in data.of.items():
        rows, source = check_rows(input_dir, paths, records[name])
        misspelt = misspelt_fields(source, rows, records[name])
        findings += misspelt
        splits.append(Split(records[name], rows.frame, source))
        reports[name] = _report(source, rows)
        quarantine = output_dir / "quarantine" / f"{name}.jsonl"
        _write_quarantine(quarantine, source, rows.rejected)
        _refuse_too_many(source, rows, settings.max_quarantined, records[name], misspelt, quarantine)
    sources = {split.record.name: split for split in splits}
    splits += [_derive(records[name], how, sources[how.source], domain) for name, how in derived.items()]
    check_splits(splits, keys)
    findings += unseen_rows(splits, keys)
    for split in splits:
        findings += find_in(split.frame, split.record, split.source)
        findings += foreign_prompts(split.frame, split.record, split.source, domain)
    for split in splits:
        write_records(split.frame.drop(LINE), output_dir, split.record.name)
    made_from = {name: how.source for name, how in derived.items()}
    keys_checked, found = tuple(settings.split_keys), tuple(dict.fromkeys(findings))
    report = ValidationReport(reports, made_from, keys_checked, dict(data.ignored), found)
    (output_dir / "report.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    return report


def check_rows(folder: Path, paths: Sequence[Path], record: RecordType) -> tuple[Rows, Source]:
    """Read files of `folder` and quarantine what breaks a rule or repeats an earlier row. The frame keeps its LINE
    column."""
    rows, source = read_files(folder, paths, record)
    reasons = unusable(rows.frame, record, source)
    if not reasons:
        return rows, source
    originals = original_lines(source, set(reasons), record)
    found = [rejected_line(line, reason, originals[line]) for line, reason in reasons.items()]
    rejected = sorted([*rows.rejected, *found], key=lambda one: one.line)
    kept = _without(rows.frame, reasons)
    assert len(kept) + len(found) == len(rows.frame), f"{source}: a row was lost"
    return Rows(kept, tuple(rejected), rows.ignored), source


def unusable(frame: pl.DataFrame, record: RecordType, source: Source) -> dict[int, str]:
    """Number and reason of each row that breaks a rule of its record type, or repeats an earlier row."""
    reasons = _broken_rules(frame, record)
    reasons |= _examined(_without(frame, reasons), record)
    duplicates = _duplicates(_without(frame, reasons), record)
    return reasons | {number: f"{DUPLICATE}{source.line(before)}" for number, before in duplicates.items()}


def _derive(record: RecordType, how: Derived, source: Split, domain: Domain) -> Split:
    """The records that the domain makes from the good rows of another type; their lines are those of the rows.

    Raises UserError for one that breaks a rule of its type.
    """
    lines = source.frame[LINE]
    rows = zip(source.frame.drop(LINE).iter_rows(named=True), lines, strict=True)
    made = []
    for row, line in rows:
        with domain_code(domain, "derived", "{} line {}".format(*source.place(line))):
            made.append(how.make(row, line))
    frame = pl.DataFrame(made, schema=dict(record.columns)).with_columns(lines)
    for line, reason in _broken_rules(frame, record).items():
        path, line = source.place(line)
        raise UserError(f"{path} line {line}: the {record.name} record that the domain makes of it: {reason}")
    return Split(record, frame, source.source)


def _without(frame: pl.DataFrame, reasons: Collection[int]) -> pl.DataFrame:
    """The frame without these lines."""
    return frame.filter(~pl.col(LINE).is_in(list(reasons))) if reasons else frame


def _broken_rules(frame: pl.DataFrame, record: RecordType) -> dict[int, str]:
    """Line and first reason of each row that breaks a rule of its pandera schema."""
    try:
        # whatever PANDERA_… the environment sets: here the data are looked at, not only their types
        with config_context(validation_enabled=True, validation_depth=ValidationDepth.SCHEMA_AND_DATA):
            record.model.validate(frame.drop(LINE), lazy=True)
    except pa.errors.SchemaErrors as errors:
        cases = errors.failure_cases
        # a case without a row is no bad data: the frame itself would be of the wrong type
        assert cases["index"].null_count() == 0, f"{record.name}: {cases.filter(pl.col('index').is_null())}"
        lines = frame[LINE].gather(cases["index"]).to_list()
        reasons: dict[int, str] = {}
        for line, reason in zip(lines, cases["check"], strict=True):
            reasons.setdefault(line, reason)
        return reasons
    return {}


def _examined(frame: pl.DataFrame, record: RecordType) -> dict[int, str]:
    """Line and reason of each row that the record type's own check refuses."""
    if record.examine is None:
        return {}
    rows = zip(frame[LINE], frame.drop(LINE).iter_rows(named=True), strict=True)
    return {line: reason for line, row in rows if (reason := record.examine(row)) is not None}


def _duplicates(frame: pl.DataFrame, record: RecordType) -> dict[int, int]:
    """Rows that repeat an earlier one, with the number of that one."""
    same = list(record.identity or record.columns)
    # equal hashes are looked for first: to compare a million rows themselves takes four times as long
    frame = frame.filter(pl.struct(same).hash().is_duplicated())
    again = frame.filter(~pl.struct(same).is_first_distinct()).select(*same, LINE)
    if again.is_empty():
        return {}
    first = frame.filter(pl.struct(same).is_first_distinct()).select(*same, pl.col(LINE).alias("first"))
    both = again.join(first, on=same, how="left", nulls_equal=True)
    return dict(both.select(LINE, "first").iter_rows())


def _refuse_missing(folder: Path, data: DataFiles, required: Collection[str]) -> None:
    for name in required:
        if name not in data.of:
            there = f"; nothing reads {', '.join(data.ignored)}, which is there" if data.ignored else ""
            raise UserError(
                f"{folder}: no {name}.jsonl or {name}.parquet; put it there (its form is in docs/data.md){there}"
            )


def _report(source: Source, rows: Rows) -> FileReport:
    kept, quarantined = len(rows.frame), len(rows.rejected)
    reasons = dict(_counted(rows.rejected).most_common())
    files = dict(zip(source.names, source.rows, strict=True))
    return FileReport(files, kept + quarantined, kept, quarantined, reasons, sorted(rows.ignored))


def _counted(rejected: Sequence[Rejected]) -> Counter[str]:
    """Rows by reason, without what differs from row to row."""
    return Counter(reason.reason.split(" at column ")[0].split(" of line ")[0] for reason in rejected)


def _refuse_too_many(
    source: Source, rows: Rows, limit: float, record: RecordType, misspelt: Sequence[Finding], quarantine: Path
) -> None:
    """quarantine: the file with the rows that are refused."""
    # A row that is there twice is used once: nothing is lost, and data that people write holds many.
    unusable = [row for row in rows.rejected if not row.reason.startswith(DUPLICATE)]
    bad, total = len(unusable), len(rows.frame) + len(rows.rejected)
    if not total:
        raise UserError(f"{source}: holds no rows; put at least one there")
    if bad > limit * total or bad == total:
        counts = _counted(unusable).most_common(WORST_REASONS)
        worst = "; ".join(f"{count} x {reason}" for reason, count in counts)
        first = unusable[0]
        form = f"; a row is {wanted_form(record)}" if WRONG_FORM.search(counts[0][0]) else ""
        hint = f" ({misspelt[0].rows} of the rows {misspelt[0].what})" if misspelt else ""
        rest = f"; {others} for other reasons" if (others := bad - sum(count for _, count in counts)) else ""
        raise UserError(
            f"{source}: {bad} of {total} rows cannot be used (limit {limit:.1%}): {worst}{rest}; the first is "
            f"{source.line(first.line)}: {first.reason}{hint}{form}; each is in {quarantine}; fix the file or raise "
            "validate.max_quarantined"
        )


def _write_quarantine(path: Path, source: Source, rejected: Sequence[Rejected]) -> None:
    """One JSON object a row, with `base64` only where it is needed. No file where nothing is quarantined."""
    if not rejected:
        path.unlink(missing_ok=True)
        return
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rejected:
            index, line = source.place(row.line)
            known = {name: value for name, value in asdict(row).items() if value is not None}
            fields = {"file": source.names[index], **known, "line": line}
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")
