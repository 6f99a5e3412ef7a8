"""The stage that lets data in: every row is kept, or set aside with the reason why, and the splits are disjoint.

Out comes one Parquet file a record type, which `records.validated` reads, `quarantine/<name>.jsonl` with the rows that
were set aside, and report.json. A few bad rows are normal; past the recipe's limit the data is taken for broken, and
the stage fails.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pandera.polars as pa
import polars as pl
from pandera.config import ValidationDepth, config_context

from twinloop.common.errors import UserError
from twinloop.domains.record_types import RecordType
from twinloop.domains.returns.schemas import RECORD_TYPES, audit_answer
from twinloop.records.reading import data_files, original_lines, read_rows
from twinloop.records.rows import LINE, Rejected, Rows, rejected_line
from twinloop.records.splits import Apart, check_splits

WORST_REASONS = 3


class Settings(Protocol):
    """The recipe's section `validate`."""

    @property
    def max_quarantined(self) -> float:
        """Share of one file's rows that may be set aside before the stage fails."""

    @property
    def apart(self) -> Sequence[Apart]:
        """What training and held-out rows may not have in common."""


@dataclass(frozen=True)
class FileReport:
    """One file's rows: all of them are kept or quarantined."""

    file: str
    rows: int
    kept: int
    quarantined: int
    reasons: dict[str, int] = field(default_factory=dict)
    """Rows by the reason why they were set aside, most first; numbers in a reason are left out here."""
    ignored_fields: list[str] = field(default_factory=list)
    """Fields that no stage reads; they are not in what is kept."""


@dataclass(frozen=True)
class ValidationReport:
    files: dict[str, FileReport]
    """By record type."""
    apart: tuple[Apart, ...]
    """What was checked to be disjoint."""

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


def validate(input_dir: Path, output_dir: Path, settings: Settings) -> ValidationReport:
    """Check every data file in `input_dir` and write what is good to `output_dir`.

    Raises UserError where a file is missing, unreadable or holds no usable row, where too many of its rows are bad, and
    where a training row leaks from a held-out set. What was set aside until then stands in `output_dir`/quarantine.
    """
    paths = {name: _find(input_dir, name) for name in RECORD_TYPES}
    (output_dir / "quarantine").mkdir(parents=True, exist_ok=True)
    frames: dict[str, pl.DataFrame] = {}
    reports: dict[str, FileReport] = {}
    for name, path in paths.items():
        rows = check_rows(path, RECORD_TYPES[name])
        frames[name] = rows.frame
        reports[name] = _report(path, rows)
        _write_quarantine(output_dir / "quarantine" / f"{name}.jsonl", rows.rejected)
        _refuse_too_many(path, rows, settings.max_quarantined)
    check_splits(frames, {name: str(path) for name, path in paths.items()}, tuple(settings.apart))
    for name, frame in frames.items():
        frame.drop(LINE).write_parquet(output_dir / f"{name}.parquet", compression="zstd", statistics=False)
    report = ValidationReport(reports, tuple(settings.apart))
    (output_dir / "report.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    return report


def check_rows(path: Path, record: RecordType) -> Rows:
    """Read a file and set aside what breaks a rule or stands there twice. The frame keeps its LINE column."""
    rows = read_rows(path, record)
    read = len(rows.frame) + len(rows.rejected)
    reasons = _broken_rules(rows.frame, record)
    if record.name == "chat":
        reasons |= _unlearnable(rows.frame, reasons)
    reasons |= _duplicates(rows.frame, record, reasons)
    if reasons:
        originals = original_lines(path, set(reasons), record)
        rows.rejected += [rejected_line(line, reason, originals[line]) for line, reason in reasons.items()]
        rows.rejected.sort(key=lambda rejected: rejected.line)
        rows.frame = rows.frame.filter(~pl.col(LINE).is_in(list(reasons)))
    assert len(rows.frame) + len(rows.rejected) == read, f"{path}: a row was lost"
    return rows


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


def _unlearnable(frame: pl.DataFrame, broken: dict[int, str]) -> dict[int, str]:
    """Demonstrations whose answer has not the shape of a decision."""
    frame = frame.filter(~pl.col(LINE).is_in(list(broken)))
    answers = frame.select(pl.col("messages").list.last().struct.field("content")).to_series()
    verdicts = ((line, audit_answer(answer)) for line, answer in zip(frame[LINE], answers, strict=True))
    return {line: verdict.reason for line, verdict in verdicts if verdict.verdict == "reject"}


def _duplicates(frame: pl.DataFrame, record: RecordType, broken: dict[int, str]) -> dict[int, str]:
    """Rows that say again what an earlier good row says."""
    same = list(record.identity or record.columns)
    good = frame.filter(~pl.col(LINE).is_in(list(broken)))
    again = good.filter(~pl.struct(same).is_first_distinct()).select(*same, LINE)
    if again.is_empty():
        return {}
    first = good.filter(pl.struct(same).is_first_distinct()).select(*same, pl.col(LINE).alias("first"))
    both = again.join(first, on=same, how="left", nulls_equal=True)
    return {line: f"duplicate of line {before}" for line, before in both.select(LINE, "first").iter_rows()}


def _find(folder: Path, name: str) -> Path:
    found = data_files(folder, name)
    if not found:
        raise UserError(f"{folder}: no {name}.jsonl or {name}.parquet; put the {name.replace('_', ' ')} there")
    if len(found) > 1:
        raise UserError(f"{folder}: both {found[0].name} and {found[1].name}; keep the one that counts")
    return found[0]


def _report(path: Path, rows: Rows) -> FileReport:
    kept, quarantined = len(rows.frame), len(rows.rejected)
    reasons = dict(_counted(rows.rejected).most_common())
    return FileReport(path.name, kept + quarantined, kept, quarantined, reasons, sorted(rows.ignored))


def _counted(rejected: list[Rejected]) -> Counter[str]:
    """Rows by reason, without what differs from row to row."""
    return Counter(reason.reason.split(" at column ")[0].split(" of line ")[0] for reason in rejected)


def _refuse_too_many(path: Path, rows: Rows, limit: float) -> None:
    bad, total = len(rows.rejected), len(rows.frame) + len(rows.rejected)
    if not total:
        raise UserError(f"{path}: holds no rows; put at least one there")
    if bad > limit * total or bad == total:
        counts = _counted(rows.rejected).most_common(WORST_REASONS)
        worst = "; ".join(f"{count} x {reason}" for reason, count in counts)
        first = rows.rejected[0]
        raise UserError(
            f"{path}: {bad} of {total} rows cannot be used (limit {limit:.1%}): {worst}; the first is "
            f"line {first.line}: {first.reason}; fix the file or raise validate.max_quarantined"
        )


def _write_quarantine(path: Path, rejected: list[Rejected]) -> None:
    """One JSON object a row, with `base64` only where it is needed. No file where nothing was set aside."""
    if not rejected:
        path.unlink(missing_ok=True)
        return
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rejected:
            told = {name: value for name, value in asdict(row).items() if value is not None}
            file.write(json.dumps(told, ensure_ascii=False) + "\n")
