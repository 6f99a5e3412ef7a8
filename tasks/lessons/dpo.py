"""Preferences: chosen over rejected, against the network that the stage starts from, frozen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from twinloop.models.decoder import Decoder
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.tasks.recipe import PreferenceSettings
from twinloop.tasks.runtime import Runtime
from twinloop.training.objectives import DirectPreference
from twinloop.training.scoring import attach_reference
from twinloop.training.stream import BatchStream
from twinloop.training.tree import pair


def lesson(
    records: Iterable[dict[str, Any]],
    network: Decoder,
    tokenizer: ChatTokenizer,
    settings: PreferenceSettings,
    runtime: Runtime,
) -> tuple[DirectPreference, BatchStream]:
    """records: preferences. network: as it stands, the reference."""
    pairs = [
        pair(
            tokenizer.encode_prompt(record["prompt"]),
            tokenizer.encode_answer(record["chosen"]),
            tokenizer.encode_answer(record["rejected"]),
        )
        for record in records
    ]
    trees = attach_reference(network, pairs, row_length=settings.row_length, device=runtime.device)
    batches = BatchStream(
        trees,
        row_length=settings.row_length,
        rows_per_step=settings.rows_per_step,
        micro_rows=settings.micro_rows,
        epochs=settings.epochs,
        seed=runtime.seed,
    )
    return DirectPreference(beta=settings.beta), batches
