"""Direct preference optimisation (Rafailov et al., 2023): chosen over rejected, against the network that the stage
starts from, frozen. Its log-probabilities are computed once, before training, so that it takes no memory meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from twinloop.domains.domain import Domain
from twinloop.training.runtime import Runtime
from twinloop.training.settings import EpochSettings, Positive

if TYPE_CHECKING:
    from twinloop.models.decoder import Decoder
    from twinloop.models.tokenizer import ChatTokenizer
    from twinloop.training.objectives import DPOLoss
    from twinloop.training.stream import BatchStream

RECORDS = "preferences"


class DPOSettings(EpochSettings):
    beta: Positive = 0.1

    def check_context(self, max_length: int) -> None:
        """A row may be longer than the context: positions count along one answer of a pair."""


Settings = DPOSettings


def build(
    records: Iterable[dict[str, Any]],
    model: Decoder,
    tokenizer: ChatTokenizer,
    settings: DPOSettings,
    runtime: Runtime,
    domain: Domain,
) -> tuple[DPOLoss, BatchStream]:
    from twinloop.training.adapters import without_adapter
    from twinloop.training.objectives import DPOLoss
    from twinloop.training.scoring import attach_reference
    from twinloop.training.stream import BatchStream
    from twinloop.training.tree import pair

    pairs = [
        pair(
            tokenizer.encode_prompt(record["prompt"]),
            tokenizer.encode_answer(record["chosen"]),
            tokenizer.encode_answer(record["rejected"]),
        )
        for record in records
    ]
    batches = BatchStream(
        attach_reference(without_adapter(model), pairs, seq_len=settings.seq_len, device=runtime.device),
        seq_len=settings.seq_len,
        batch_size=settings.batch_size,
        micro_batch_size=settings.micro_batch_size,
        epochs=settings.epochs,
        seed=runtime.seed,
    )
    return DPOLoss(beta=settings.beta), batches
