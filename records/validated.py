"""The good rows of each record type: what `twinloop.records.validation` writes and all later stages read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl


def write_records(frame: pl.DataFrame, data: Path, name: str) -> None:
    """Write the good rows of one record type. data: the directory of a validate artifact."""
    import pyarrow.parquet

    # half of the time that polars takes: level 1, and no dictionaries, which texts that all differ have no use for
    pyarrow.parquet.write_table(
        frame.to_arrow(),
        data / f"{name}.parquet",
        compression="zstd",
        compression_level=1,
        use_dictionary=False,
        write_statistics=False,
    )


def read_records(data: Path, name: str) -> list[dict[str, Any]]:
    """The good rows of one record type, such as "corpus", in order. data: the directory of a validate artifact."""
    import polars as pl

    return pl.read_parquet(data / f"{name}.parquet").to_dicts()


def has_records(data: Path, name: str) -> bool:
    """Whether the data set has this record type."""
    return (data / f"{name}.parquet").is_file()


def ignored_files(data: Path) -> dict[str, str]:
    """Why nothing reads a file of the data set, by its path there."""
    ignored: dict[str, str] = _report(data)["ignored_files"]
    return ignored


def source_line(data: Path, name: str, index: int) -> tuple[str, int]:
    """The user's file that the good row at `index` comes from, and its line there, quarantined rows counted.

    A derived record has the line of the row that it was made from.
    """
    report = _report(data)
    name = report["derived"].get(name, name)
    quarantine = data / "quarantine" / f"{name}.jsonl"
    rows = quarantine.read_text(encoding="utf-8").split("\n")[:-1] if quarantine.exists() else []
    bad = [(row["file"], row["line"]) for row in map(json.loads, rows)]
    before = index
    for file, count in report["files"][name]["files"].items():
        gaps = sorted(line for each, line in bad if each == file)
        if before < count - len(gaps):
            line = before + 1
            for gap in gaps:
                line += gap <= line
            return file, line
        before -= count - len(gaps)
    raise IndexError(index)


def _report(data: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((data / "report.json").read_text(encoding="utf-8"))
    return report
