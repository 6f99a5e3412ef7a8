"""How long the longest records are under a tokenizer, and whether a recipe has room for them.

Measured once a tokenizer, compared before anything is trained: a record that does not fit would stop a later stage
after hours, or be answered half. Changing a limit measures nothing again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from twinloop.common.errors import UserError
from twinloop.records.validated import read_records, source_line
from twinloop.registry.artifact import Artifact
from twinloop.tasks.recipe import Recipe

if TYPE_CHECKING:
    from twinloop.models.tokenizer import ChatTokenizer

Lengths = Callable[["ChatTokenizer", Mapping[str, Any]], dict[str, int]]


class Longest(BaseModel):
    """The longest record of one kind. `line` is that of the user's file (a row, in Parquet)."""

    model_config = ConfigDict(frozen=True)

    tokens: int
    file: str
    line: int


def _example(tokenizer: ChatTokenizer, record: Mapping[str, Any]) -> dict[str, int]:
    *prompt, answer = record["messages"]
    return {"example": len(tokenizer.encode_prompt(prompt)) + len(tokenizer.encode_answer(answer["content"]))}


def _pair(tokenizer: ChatTokenizer, record: Mapping[str, Any]) -> dict[str, int]:
    prompt = len(tokenizer.encode_prompt(record["prompt"]))
    sides = [len(tokenizer.encode_answer(record[side])) for side in ("chosen", "rejected")]
    return {"pair": prompt + sum(sides), "pair_side": prompt + max(sides)}


def _rl_prompt(tokenizer: ChatTokenizer, record: Mapping[str, Any]) -> dict[str, int]:
    return {"rl_prompt": len(tokenizer.encode_prompt(record["prompt"]))}


def _case_prompt(tokenizer: ChatTokenizer, record: Mapping[str, Any]) -> dict[str, int]:
    return {"case_prompt": len(tokenizer.encode_prompt(record["prompt"]))}


MEASURED: Mapping[str, Lengths] = {
    "chat": _example,
    "preferences": _pair,
    "prompts": _rl_prompt,
    "cases": _case_prompt,
}


def measure_lengths(tokenizer: ChatTokenizer, data: Path) -> dict[str, Any]:
    """By kind of record, `Longest` as plain values. data: the directory of a validate artifact."""
    found = {}
    for name, lengths in MEASURED.items():
        measured = [lengths(tokenizer, record) for record in read_records(data, name)]
        for kind in measured[0]:
            longest = max(range(len(measured)), key=lambda index: measured[index][kind])
            file, line = source_line(data, name, longest)
            found[kind] = Longest(tokens=measured[longest][kind], file=file, line=line).model_dump()
    return found


def check_lengths(recipe: Recipe, tokenizer: Artifact) -> None:
    """Raises UserError for the first kind of record that does not fit, before any training."""
    window = recipe.model.max_length
    limits = {
        "example": (min(recipe.sft.row_length, window), "sft.row_length and model.max_length", "example"),
        "pair": (recipe.dpo.row_length, "dpo.row_length", "prompt and both answers"),
        "pair_side": (window, "model.max_length", "prompt and the longer answer"),
        "rl_prompt": (
            window - recipe.rlvr.max_new_tokens,
            "model.max_length less rlvr.max_new_tokens",
            "prompt",
        ),
        "case_prompt": (
            window - recipe.evaluate.max_new_tokens,
            "model.max_length less evaluate.max_new_tokens",
            "prompt",
        ),
    }
    for kind, (limit, setting, what) in limits.items():
        longest = Longest.model_validate(tokenizer.metrics["longest"][kind])
        if longest.tokens > limit:
            raise UserError(
                f"data/{longest.file} line {longest.line}: {what} of {longest.tokens} tokens, and {setting} leaves "
                f"room for {limit}; shorten it, or give it room"
            )
