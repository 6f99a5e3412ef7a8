"""The benchmark of records measures rows that are all good."""

from pathlib import Path

from benchmarks.records import record_rows


def test_every_step_is_measured(tmp_path: Path) -> None:
    rows = [row.what for row in record_rows(tmp_path, 100) if not row.what.startswith("·")]
    assert rows == ["read", "validate", "leakage check by text", "write Parquet", "read, validate and split"]
