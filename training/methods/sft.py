"""Supervised fine-tuning (Ouyang et al., 2022): only the answer is learned, its stop token included."""

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

RECORDS = "chat"
Settings = EpochSettings


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
    from twinloop.training.tree import example

    trees = []
    for record in records:
        *prompt, answer = record["messages"]
        trees.append(example(tokenizer.encode_prompt(prompt), tokenizer.encode_answer(answer["content"])))
    batches = BatchStream(
        trees,
        seq_len=settings.seq_len,
        batch_size=settings.batch_size,
        micro_batch_size=settings.micro_batch_size,
        epochs=settings.epochs,
        seed=runtime.seed,
    )
    return CausalLMLoss(), batches
