"""Distillation (Hinton et al., 2015): a student learns what a teacher would say next at every token of the answers.

The teacher's likeliest tokens and their log-probabilities are computed once, before training, and kept beside the
records' tokens, so that it takes no memory meanwhile. It reads the student's tokens: both have one tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinloop.domains.domain import Domain
from twinloop.training.runtime import Runtime
from twinloop.training.settings import Count, EpochSettings, ModelName, NamedModel, Positive

if TYPE_CHECKING:
    from twinloop.models.decoder import Decoder
    from twinloop.models.tokenizer import ChatTokenizer
    from twinloop.training.distillation import DistilLoss
    from twinloop.training.stream import BatchStream

RECORDS = "chat"


class Settings(EpochSettings):
    teacher: ModelName
    top_k: Count = 32
    """The teacher's tokens that are kept of each distribution; the others count as one."""
    temperature: Positive = 1.0
    """Of both distributions: above 1 the unlikely tokens count for more."""

    def named_models(self) -> dict[str, NamedModel]:
        return {"teacher": NamedModel(self.teacher)}


def build(
    records: Iterable[dict[str, Any]],
    model: Decoder,
    tokenizer: ChatTokenizer,
    settings: Settings,
    runtime: Runtime,
    domain: Domain,
) -> tuple[DistilLoss, BatchStream]:
    from twinloop.training.distillation import DistilLoss, attach_teacher
    from twinloop.training.methods.sft import answer_trees
    from twinloop.training.stream import BatchStream
    from twinloop.training.weights import load_decoder

    trees = attach_teacher(
        load_decoder(Path(settings.teacher["path"])),
        answer_trees(records, tokenizer),
        top_k=settings.top_k,
        temperature=settings.temperature,
        vocab_size=tokenizer.vocab_size,
        seq_len=settings.seq_len,
        device=runtime.device,
    )
    batches = BatchStream.of_epochs(trees, settings, seed=runtime.seed)
    return DistilLoss(vocab_size=tokenizer.vocab_size, temperature=settings.temperature), batches
