"""Supervised fine-tuning (Ouyang et al., 2022): only the assistant's answers are learned, their stop tokens included.

Every answer of a conversation is. Where the template shows earlier answers in another way than they were given (without
their thinking), each is learned from the prompt that it was given for, in a sequence of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from twinloop.domains.domain import Domain
from twinloop.training.runtime import Runtime
from twinloop.training.settings import EpochSettings

if TYPE_CHECKING:
    from twinloop.models.decoder import Decoder
    from twinloop.models.tokenizer import ChatTokenizer
    from twinloop.training.objectives import CausalLMLoss
    from twinloop.training.stream import BatchStream
    from twinloop.training.tree import Tree

RECORDS = "chat"
Settings = EpochSettings


def answer_trees(records: Iterable[dict[str, Any]], tokenizer: ChatTokenizer) -> list[Tree]:
    """The conversations, their answers scored."""
    from twinloop.training.tree import conversation

    return [
        conversation(turns.ids, turns.answers)
        for record in records
        for turns in tokenizer.encode_turns(record["messages"])
    ]


def build(
    records: Iterable[dict[str, Any]],
    model: Decoder,
    tokenizer: ChatTokenizer,
    settings: EpochSettings,
    runtime: Runtime,
    domain: Domain,
) -> tuple[CausalLMLoss, BatchStream]:
    from twinloop.training.objectives import CausalLMLoss
    from twinloop.training.stream import BatchStream

    batches = BatchStream.of_epochs(answer_trees(records, tokenizer), settings, seed=runtime.seed)
    return CausalLMLoss(), batches
