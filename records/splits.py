"""Nothing that a model is measured on may stand in what it is trained on.

Held out are corpus_heldout and cases. Four things can leak: a text (a corpus document or a prompt; letter case
and white space do not matter), an order id, a policy id, and a (window, days) pair. Which of them this data set
promises to keep apart is for the recipe to say: a shop's own cases cite the shop's own policies.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import polars as pl

from twinloop.common.errors import UserError
from twinloop.domains.record_types import MESSAGES
from twinloop.records.rows import LINE

Apart = Literal["text", "order_id", "policy_id", "window_and_days"]

TRAIN = ("corpus", "chat", "preferences", "prompts")
HELD_OUT = ("corpus_heldout", "cases")

IDS_A_PATTERN = 500
"""More in one pattern come near to the size at which the regular expression engine refuses it."""

_FACTS = pl.col("facts").struct
_ORDER, _POLICY = _FACTS.field("order").struct, _FACTS.field("policy").struct
_PAIR = pl.concat_str(
    _POLICY.field("window_days"), pl.lit(" days of window and day "), _ORDER.field("days_since_delivery")
)


@dataclass(frozen=True)
class Leak:
    """A row of a training file that shares something with a held-out row."""

    file: str
    line: int
    what: str
    held_out_file: str
    held_out_line: int

    def __str__(self) -> str:
        held_out = f"{self.held_out_file} line {self.held_out_line}"
        return f"{self.file} line {self.line}: {self.what} also stands in held-out {held_out}"


def check_splits(frames: Mapping[str, pl.DataFrame], files: Mapping[str, str], apart: tuple[Apart, ...]) -> None:
    """Raise UserError at the first leak, naming both files and lines, and how many more there are.

    frames: by record type, with the LINE column; files: the name of each one's file.
    """
    leaks = list(_leaks(frames, files, apart))
    if leaks:
        more = f" ({len(leaks) - 1} more rows leak)" if len(leaks) > 1 else ""
        raise UserError(f"{leaks[0]}{more}; take it out of one of the two, or the score means nothing")


def _leaks(frames: Mapping[str, pl.DataFrame], files: Mapping[str, str], apart: tuple[Apart, ...]) -> Iterator[Leak]:
    for kind in apart:
        held_out = pl.concat([_keys(frames[name], kind, name, files) for name in HELD_OUT if name in frames])
        held_out = held_out.unique("key", keep="first", maintain_order=True)
        if held_out.is_empty():
            continue
        for name in TRAIN:
            if name not in frames:
                continue
            if name == "corpus" and kind in ("order_id", "policy_id"):
                train = _mentions(frames[name], held_out["key"], files[name])
            else:
                train = _keys(frames[name], kind, name, files)
            found = train.join(held_out, on="key", how="inner", suffix="_held_out", maintain_order="left")
            for row in found.unique(LINE, keep="first", maintain_order=True).iter_rows(named=True):
                what = "its text" if kind == "text" else f"{_NAMES[kind]} {row['key']}"
                yield Leak(row["file"], row[LINE], what, row["file_held_out"], row[f"{LINE}_held_out"])


_NAMES = {"order_id": "order", "policy_id": "policy", "window_and_days": "the pair of"}


def _keys(frame: pl.DataFrame, kind: Apart, name: str, files: Mapping[str, str]) -> pl.DataFrame:
    """What may leak of each row: columns key, LINE, file. A row may have several keys, or none."""
    keys = frame.select(_key(frame, kind, name).alias("key"), LINE)
    if isinstance(keys.schema["key"], pl.List):
        keys = keys.explode("key")
    return keys.drop_nulls("key").with_columns(pl.lit(files[name]).alias("file"))


def _key(frame: pl.DataFrame, kind: Apart, name: str) -> pl.Expr:
    nothing = pl.lit(None, dtype=pl.String)
    if kind == "text":
        if "text" in frame.columns:
            return normalised(pl.col("text"))
        asked = pl.col("messages").list.slice(0, pl.col("messages").list.len() - 1)
        return _prompt_text(asked if name == "chat" else pl.col("prompt"))
    if "facts" not in frame.columns:
        return nothing
    if kind == "order_id":
        return _ORDER.field("order_id")
    if kind == "window_and_days":
        return _PAIR
    cited = _POLICY.field("policy_id")
    if name in HELD_OUT:
        return cited  # a distractor may be a policy that training knows
    passages = _FACTS.field("passages").list.eval(pl.element().struct.field("policy_id"))
    return pl.concat_list(cited, passages).list.unique(maintain_order=True)


def normalised(text: pl.Expr) -> pl.Expr:
    """Lower case, single spaces."""
    return text.str.to_lowercase().str.replace_all(r"\s+", " ").str.strip_chars()


def _prompt_text(messages: pl.Expr) -> pl.Expr:
    """The messages of a prompt on one line, whatever system message stands before them."""
    content = pl.element().struct.field("content")
    turns = messages.cast(MESSAGES).list.eval(pl.when(pl.element().struct.field("role") != "system").then(content))
    return normalised(turns.list.drop_nulls().list.join("\n"))


def _mentions(corpus: pl.DataFrame, ids: pl.Series, file: str) -> pl.DataFrame:
    """Documents that name one of `ids` as a word of its own (P-7 is not in P-71): columns key, LINE, file."""
    nearly = corpus.filter(pl.col("text").str.contains_any(ids.to_list()))
    found = [
        nearly.select(pl.col("text").str.extract(rf"(?:^|[^\w-])({'|'.join(map(re.escape, some))})(?:$|[^\w-])"), LINE)
        for some in _batched(ids, IDS_A_PATTERN)
    ]
    return pl.concat(found).rename({"text": "key"}).drop_nulls("key").with_columns(pl.lit(file).alias("file"))


def _batched(ids: pl.Series, size: int) -> Iterator[list[str]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size].to_list()
