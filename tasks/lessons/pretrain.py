"""The next token of packed documents."""

from __future__ import annotations

from collections.abc import Iterable

from twinloop.models.tokenizer import ChatTokenizer
from twinloop.tasks.recipe import PretrainSettings
from twinloop.tasks.runtime import Runtime
from twinloop.training.objectives import NextToken
from twinloop.training.stream import BatchStream
from twinloop.training.tree import document


def lesson(
    texts: Iterable[str], tokenizer: ChatTokenizer, settings: PretrainSettings, runtime: Runtime
) -> tuple[NextToken, BatchStream]:
    """texts: of the corpus, in its order."""
    # As encode_document, but on all cores: 17 MB take one core 8 s.
    trees = [document([tokenizer.bos_id, *ids, tokenizer.stop_id]) for ids in tokenizer.encode_batch(list(texts))]
    batches = BatchStream(
        trees,
        row_length=settings.row_length,
        rows_per_step=settings.rows_per_step,
        micro_rows=settings.micro_rows,
        steps=settings.steps,
        seed=runtime.seed,
    )
    return NextToken(), batches
