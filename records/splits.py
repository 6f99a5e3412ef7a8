"""The leakage check: nothing that a model is measured on may be in what it is trained on.

Training and held-out rows may not share the split keys that the recipe chooses. The key `text` is built in: a document
or a prompt, where letter case, white space and Unicode form (NFC) do not matter. All others are the domain's, and which
of them a data set promises to keep is for the recipe to set: a shop's own cases cite the shop's own documents.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from twinloop.common.errors import UserError
from twinloop.common.texts import FORM
from twinloop.domains.domain import SplitKey
from twinloop.domains.record_types import RecordType
from twinloop.records.findings import Finding, normalised
from twinloop.records.reading import Source
from twinloop.records.rows import LINE

CORPUS = "corpus"

IDS_A_PATTERN = 500
"""More in one pattern come near to the size at which the regular expression engine refuses it."""

UNEVEN = r"\s\s|[^\S ]"
"""White space other than single spaces."""


@dataclass(frozen=True)
class Leak:
    """A row to train on that shares something with a held-out row."""

    key: str
    """The split key, by name."""
    file: str
    line: int
    what: str
    held_out_file: str
    held_out_line: int

    def __str__(self) -> str:
        held_out = f"{self.held_out_file} line {self.held_out_line}"
        return f"{self.file} line {self.line}: {self.what} is also in held-out {held_out}"


@dataclass(frozen=True)
class Split:
    """The rows of one record type. frame: with the LINE column, numbers of the rows of `source`."""

    record: RecordType
    frame: pl.DataFrame
    source: Source

    def place(self, number: int) -> tuple[str, int]:
        """The file of the row of this number, and its line there."""
        index, line = self.source.place(number)
        return str(self.source.paths[index]), line


def check_splits(splits: Sequence[Split], keys: Mapping[str, SplitKey | None]) -> None:
    """Raise UserError at the first leak, naming both files and lines, and how many more there are."""
    # A row that several records were derived from leaks once.
    leaks = list({(leak.file, leak.line): leak for leak in reversed(list(_leaks(splits, keys)))}.values())[::-1]
    if leaks:
        more = f" ({len(leaks) - 1} more of such rows)" if len(leaks) > 1 else ""
        raise UserError(
            f"{leaks[0]}{more}; remove it from one of the two, or the score means nothing; where both may have it, "
            f"take {leaks[0].key} out of `validate: {{split_keys: [{', '.join(keys)}]}}` in the recipe"
        )


def unseen_rows(splits: Sequence[Split], keys: Mapping[str, SplitKey | None]) -> list[Finding]:
    """The rows without a value for a split key, of record types that have it: no leak of theirs by this key is seen."""
    found = []
    for name, key in keys.items():
        if key is None:
            continue
        for each in (one for one in splits if one.record.split):
            if key.keys(each.record.name, each.record.split == "held_out") is None:
                continue
            lines = each.frame.filter(~pl.col(LINE).is_in(_keys(each, key)[LINE].unique().implode()))[LINE]
            if len(lines):
                what = f"have no split key {name}, so that the leakage check by it does not see them"
                found.append(Finding.of(each.source, lines.to_list(), len(each.frame), what))
    return found


def _leaks(splits: Sequence[Split], keys: Mapping[str, SplitKey | None]) -> Iterator[Leak]:
    by_name = {each.record.name: each for each in splits}
    train, held_out = ([each for each in splits if each.record.split == side] for side in ("train", "held_out"))
    for name, key in keys.items():
        parts = [_keys(each, key) if key else _texts(each) for each in held_out]
        theirs = pl.concat(parts).unique("key", keep="first", maintain_order=True) if parts else pl.DataFrame()
        if theirs.is_empty():
            continue
        for each in train:
            if key is None:
                ours = _texts(each, among=theirs["key"])
            elif key.in_corpus and each.record.name == CORPUS:
                ours = _mentions(each, theirs["key"])
            else:
                ours = _keys(each, key)
            shared = ours.join(theirs, on="key", how="inner", suffix="_held_out", maintain_order="left")
            for row in shared.unique(LINE, keep="first", maintain_order=True).iter_rows(named=True):
                what = f"{key.title} {row['key']}" if key else "its text"
                ours_at = by_name[row["record"]].place(row[LINE])
                theirs_at = by_name[row["record_held_out"]].place(row[f"{LINE}_held_out"])
                yield Leak(name, *ours_at, what, *theirs_at)


# --- the keys of each row: columns key, LINE, record. A row may have several keys, or none.


def _keys(split: Split, key: SplitKey) -> pl.DataFrame:
    expression = key.keys(split.record.name, split.record.split == "held_out")
    if expression is None:
        return _rows(split.frame.select(pl.lit(None, pl.String).alias("key"), LINE), split)
    keys = split.frame.select(expression.alias("key"), LINE)
    if isinstance(keys.schema["key"], pl.List):
        keys = keys.explode("key")
    return _rows(keys.with_columns(pl.col("key").cast(pl.String).str.normalize(FORM)), split)


def _texts(split: Split, among: pl.Series | None = None) -> pl.DataFrame:
    """The text of each row in NFC, in lower case and with single spaces. among: all others may be left out."""
    texts = normalised(split.frame.select(_text_of(split.record).alias("key"), LINE))
    texts = texts.with_columns(pl.col("key").str.to_lowercase().str.strip_chars())
    if among is not None:  # to replace white space in a million texts would take a second
        texts = texts.filter(pl.col("key").str.contains(UNEVEN) | pl.col("key").is_in(among.implode()))
    return _rows(texts.with_columns(pl.col("key").str.replace_all(r"\s+", " ")), split)


def _text_of(record: RecordType) -> pl.Expr:
    """A document, or the messages of a prompt on one line, whatever system message is before them."""
    if "messages" in record.columns:
        turns = _turns(pl.col("messages"))
        return turns.list.slice(0, turns.list.len() - 1).list.join(" ")
    if "prompt" in record.columns:
        return _turns(pl.col("prompt")).list.join(" ")
    return pl.col("text") if "text" in record.columns else pl.lit(None, pl.String)


def _turns(messages: pl.Expr) -> pl.Expr:
    """The contents of the messages, with null for those of the system."""
    message = pl.element().struct
    return messages.list.eval(pl.when(message.field("role") != "system").then(message.field("content")))


def _mentions(corpus: Split, ids: pl.Series) -> pl.DataFrame:
    """Documents that name one of `ids` as a word of its own (P-7 is not in P-71)."""
    nearly = normalised(corpus.frame.select("text", LINE)).filter(pl.col("text").str.contains_any(ids.to_list()))
    found = []
    for some in _batched(ids, IDS_A_PATTERN):
        word = rf"(?:^|[^\w-])({'|'.join(map(re.escape, some))})(?:$|[^\w-])"
        found.append(nearly.select(pl.col("text").str.extract(word).alias("key"), LINE))
    return _rows(pl.concat(found), corpus)


def _rows(keys: pl.DataFrame, split: Split) -> pl.DataFrame:
    return keys.drop_nulls("key").with_columns(pl.lit(split.record.name).alias("record"))


def _batched(ids: pl.Series, size: int) -> Iterator[list[str]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size].to_list()
