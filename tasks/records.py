"""Validated data as typed records: what the stages of training and evaluation read.

Everything here trusts its input: it was written by `tasks.validate`. Records come in the order of their file, which is
the order that makes runs repeat.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet

from domains.returns.policies import Policy
from domains.returns.verifier import Facts
from evaluation import cases
from models.errors import UserError

Messages = list[dict[str, str]]
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class SftExample:
    """A conversation that ends with the answer to learn. `facts` are None in data that came without them."""

    messages: Messages
    facts: Facts | None

    @property
    def prompt(self) -> Messages:
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt, and why one of them is better."""

    prompt: Messages
    chosen: str
    rejected: str
    reason: str | None
    facts: Facts | None


@dataclass(frozen=True)
class RlPrompt:
    """A prompt, and the facts by which the verifier judges what is sampled for it."""

    prompt: Messages
    facts: Facts


def read_corpus(folder: Path, *, held_out: bool = False) -> Iterator[str]:
    """The texts of the pretraining corpus, or of its held-out part."""
    return (row["text"] for row in _rows(folder, "corpus_heldout" if held_out else "corpus"))


def read_sft(folder: Path) -> Iterator[SftExample]:
    return (SftExample(row["messages"], _facts(row["facts"])) for row in _rows(folder, "sft_examples"))


def read_preferences(folder: Path) -> Iterator[PreferencePair]:
    return (
        PreferencePair(row["prompt"], row["chosen"], row["rejected"], row["reason"], _facts(row["facts"]))
        for row in _rows(folder, "preference_pairs")
    )


def read_rl_prompts(folder: Path) -> Iterator[RlPrompt]:
    return (RlPrompt(row["prompt"], Facts.from_record(row["facts"])) for row in _rows(folder, "rl_prompts"))


def read_cases(folder: Path) -> list[cases.Case[Facts]]:
    """The held-out policy cases. Raises UserError where a flip pair has not two sides."""
    return cases.read_cases(_rows(folder, "policy_cases"), Facts.from_record)


def read_policies(folder: Path) -> Iterator[Policy]:
    """The policies of today, to be put into the index that serving retrieves from."""
    return (Policy(row["policy_id"], row["text"], row["version"] or 1) for row in _rows(folder, "policies"))


def count(folder: Path, name: str) -> int:
    """Number of records of one type; reads only the file's footer."""
    return int(pyarrow.parquet.read_metadata(_path(folder, name)).num_rows)


def _facts(record: dict[str, Any] | None) -> Facts | None:
    return Facts.from_record(record) if record is not None else None


def _rows(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    with pyarrow.parquet.ParquetFile(_path(folder, name)) as file:
        for batch in file.iter_batches(ROWS_AT_ONCE):
            yield from batch.to_pylist()


def _path(folder: Path, name: str) -> Path:
    path = folder / f"{name}.parquet"
    if not path.is_file():
        raise UserError(f"{folder}: no {name}.parquet; validate the data first")
    return path
