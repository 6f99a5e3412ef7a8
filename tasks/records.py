"""Reading what `tasks.validate` let through."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def read_records(data: Path, name: str) -> list[dict[str, Any]]:
    """The good rows of one record type ("corpus", say), in their order. data: the directory of a validate artifact."""
    import polars as pl

    return pl.read_parquet(data / f"{name}.parquet").to_dicts()
