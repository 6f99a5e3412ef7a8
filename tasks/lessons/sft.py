"""Demonstrations: only the answer is learned, its stop token included."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from twinloop.models.tokenizer import ChatTokenizer
from twinloop.tasks.recipe import FinetuneSettings
from twinloop.tasks.runtime import Runtime
from twinloop.training.objectives import NextToken
from twinloop.training.stream import BatchStream
from twinloop.training.tree import example


def lesson(
    records: Iterable[dict[str, Any]], tokenizer: ChatTokenizer, settings: FinetuneSettings, runtime: Runtime
) -> tuple[NextToken, BatchStream]:
    """records: chat."""
    trees = []
    for record in records:
        *prompt, answer = record["messages"]
        trees.append(example(tokenizer.encode_prompt(prompt), tokenizer.encode_answer(answer["content"])))
    batches = BatchStream(
        trees,
        row_length=settings.row_length,
        rows_per_step=settings.rows_per_step,
        micro_rows=settings.micro_rows,
        epochs=settings.epochs,
        seed=runtime.seed,
    )
    return NextToken(), batches
