"""What stops nothing in a data set and its owner should know: rows that contradict each other, or nearly repeat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from twinloop.common.texts import FORM
from twinloop.domains.record_types import RecordType
from twinloop.records.reading import Source
from twinloop.records.rows import LINE


@dataclass(frozen=True)
class Finding:
    """Something about `rows` of the `among` rows of one record type that were looked at.

    files: where they are. first: the place of the first, such as "line 7".
    """

    files: str
    rows: int
    among: int
    first: str
    what: str

    @classmethod
    def of(cls, source: Source, numbers: Sequence[int], among: int, what: str) -> Finding:
        """numbers: of the rows, in order."""
        others = len(source.names) - 1
        files = f"{source.names[0]}{f' and {others} more' if others else ''}"
        return cls(files, len(numbers), among, source.line(numbers[0]), what)

    def __str__(self) -> str:
        return f"{self.files}: {self.rows} of {self.among} rows (first: {self.first}) {self.what}"


def find_in(frame: pl.DataFrame, record: RecordType, source: Source) -> list[Finding]:
    """What is to be said of the good rows of one record type. frame: with the LINE column."""
    return [*_contradictions(frame, record, source), *_repeated_in_another_form(frame, record, source)]


def _contradictions(frame: pl.DataFrame, record: RecordType, source: Source) -> list[Finding]:
    """Preference pairs that are there a second time with chosen and rejected swapped."""
    if not {"prompt", "chosen", "rejected"} <= set(record.columns):
        return []
    pairs = normalised(frame.select("prompt", "chosen", "rejected", LINE))
    swapped = pairs.select("prompt", chosen="rejected", rejected="chosen")
    found = pairs.join(swapped, on=["prompt", "chosen", "rejected"], how="semi", maintain_order="left")
    if found.is_empty():
        return []
    what = "are there again with chosen and rejected swapped, and each undoes the other"
    return [Finding.of(source, found[LINE].to_list(), len(frame), what)]


def _repeated_in_another_form(frame: pl.DataFrame, record: RecordType, source: Source) -> list[Finding]:
    """Rows that repeat an earlier one and differ from it only by the Unicode form of a character. frame: of rows that
    are not equal as they are."""
    same = list(record.identity or record.columns)
    plain = frame.select(*same, LINE)
    compared = normalised(plain)
    if compared is plain:
        return []
    compared = compared.filter(pl.struct(same).hash().is_duplicated())
    again = compared.filter(~pl.struct(same).is_first_distinct())[LINE]
    if again.is_empty():
        return []
    what = f"repeat an earlier one in another Unicode form (in {FORM} they are equal)"
    return [Finding.of(source, again.to_list(), len(frame), what)]


# --- texts in one Unicode form


def normalised(frame: pl.DataFrame) -> pl.DataFrame:
    """The same rows with every text in NFC; the frame itself where all are ASCII, which is quick to see."""
    columns = frame.schema.items()
    if (
        frame.is_empty()
        or frame.select(pl.all_horizontal(_ascii(pl.col(name), dtype) for name, dtype in columns).all()).item()
    ):
        return frame
    return frame.with_columns(_nfc(pl.col(name), dtype).alias(name) for name, dtype in columns)


def _ascii(value: pl.Expr, dtype: Any) -> pl.Expr:
    """Whether all texts in a value are ASCII."""
    if isinstance(dtype, pl.Struct):
        parts = [_ascii(value.struct.field(part.name), part.dtype) for part in dtype.fields]
        return pl.all_horizontal(parts) if parts else pl.lit(value=True)
    if isinstance(dtype, pl.List):
        return value.list.eval(_ascii(pl.element(), dtype.inner)).list.all().fill_null(value=True)
    return (
        (value.str.len_bytes() == value.str.len_chars()).fill_null(value=True)
        if dtype == pl.String
        else pl.lit(value=True)
    )


def _nfc(value: pl.Expr, dtype: Any) -> pl.Expr:
    if isinstance(dtype, pl.Struct):
        parts = [_nfc(value.struct.field(part.name), part.dtype).alias(part.name) for part in dtype.fields]
        return pl.when(value.is_not_null()).then(pl.struct(parts)) if parts else value
    if isinstance(dtype, pl.List):
        return value.list.eval(_nfc(pl.element(), dtype.inner))
    return value.str.normalize(FORM) if dtype == pl.String else value
