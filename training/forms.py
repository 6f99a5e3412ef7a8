"""The standard forms of a record, by its columns: what of it is text, what is trained, and how long that is.

`text` is a document; `messages` a chat that ends with its answer; `prompt` one whose answer is sampled, or that has the
answers `chosen` and `rejected`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twinloop.models.tokenizer import ChatTokenizer

Record = Mapping[str, Any]
Message = dict[str, str]
ANSWERS = ("chosen", "rejected")


@dataclass(frozen=True)
class Lengths:
    """packed: tokens that a record takes in a row, all its answers together. path: of its prompt with the longest
    answer, which is how many positions the network must have."""

    packed: int
    path: int


def texts(record: Record) -> list[str]:
    """What a tokenizer can be trained on."""
    said = [message["content"] for column in ("messages", "prompt") for message in record.get(column) or ()]
    return [record[column] for column in ("text", *ANSWERS) if record.get(column)] + said


def conversations(record: Record) -> list[list[Message]]:
    """Chats that end with an answer which is trained."""
    if "messages" in record:
        return [record["messages"]]
    return [
        [*record["prompt"], {"role": "assistant", "content": record[answer]}] for answer in ANSWERS if answer in record
    ]


def lengths(record: Record, tokenizer: ChatTokenizer) -> Lengths | None:
    """None for a document, which is cut into rows."""
    if "messages" in record:
        longest = max(len(turns.ids) for turns in tokenizer.encode_turns(record["messages"]))
        return Lengths(longest, longest)
    prompt = record.get("prompt")
    if not prompt:
        return None
    answers = [record[answer] for answer in ANSWERS if answer in record]
    asked = len(tokenizer.encode_prompt(prompt))
    answered = [len(tokenizer.encode_answer(answer)) for answer in answers]
    return Lengths(asked + sum(answered), asked + max(answered, default=0))


HELD_OUT_OF = 10
"""One of so many prompts is held out where a method's own records are what it is measured on."""


def is_held_out(record: Record) -> bool:
    """Whether the record is measured on and not trained on: a matter of its prompt alone, so that all answers to one
    prompt are on one side."""
    return prompt_digest(record)[0] % HELD_OUT_OF == 0


def prompt_digest(record: Record) -> bytes:
    prompt = [[message["role"], message["content"]] for message in record["prompt"]]
    return hashlib.sha256(json.dumps(prompt).encode()).digest()
