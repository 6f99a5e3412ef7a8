"""How long the longest records are under a tokenizer, and whether a recipe has room for them.

Measured once a tokenizer, compared before anything is trained: a record that does not fit would stop a later stage
after hours, or be answered half. Changing a limit measures nothing again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from models.errors import UserError
from tasks.artifact import Artifact
from tasks.recipe import Recipe
from tasks.records import read_records, source_line

if TYPE_CHECKING:
    from models.tokenizer import ChatTokenizer

Length = Callable[["ChatTokenizer", Mapping[str, Any]], int]


class Longest(BaseModel):
    """The longest record of one kind. `line` is that of the user's file (a row, in Parquet)."""

    model_config = ConfigDict(frozen=True)

    tokens: int
    file: str
    line: int


def _prompt(tokenizer: ChatTokenizer, record: Mapping[str, Any]) -> int:
    return len(tokenizer.encode_prompt(record["prompt"]))


def _example(tokenizer: ChatTokenizer, record: Mapping[str, Any]) -> int:
    *prompt, answer = record["messages"]
    return len(tokenizer.encode_prompt(prompt)) + len(tokenizer.encode_answer(answer["content"]))


def _sides(tokenizer: ChatTokenizer, record: Mapping[str, Any]) -> list[int]:
    return [len(tokenizer.encode_answer(record[side])) for side in ("chosen", "rejected")]


def _pair(tokenizer: ChatTokenizer, record: Mapping[str, Any]) -> int:
    return _prompt(tokenizer, record) + sum(_sides(tokenizer, record))


def _side(tokenizer: ChatTokenizer, record: Mapping[str, Any]) -> int:
    return _prompt(tokenizer, record) + max(_sides(tokenizer, record))


MEASURED: Mapping[str, tuple[str, Length]] = {
    "example": ("sft_examples", _example),
    "pair": ("preference_pairs", _pair),
    "pair_side": ("preference_pairs", _side),
    "rl_prompt": ("rl_prompts", _prompt),
    "case_prompt": ("policy_cases", _prompt),
}


def measure_lengths(tokenizer: ChatTokenizer, data: Path) -> dict[str, Any]:
    """By kind of record, `Longest` as plain values. data: the directory of a validate artifact."""
    found = {}
    for kind, (name, length) in MEASURED.items():
        lengths = [length(tokenizer, record) for record in read_records(data, name)]
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        file, line = source_line(data, name, longest)
        found[kind] = Longest(tokens=lengths[longest], file=file, line=line).model_dump()
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
