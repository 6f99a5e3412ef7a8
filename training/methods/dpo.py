"""Direct preference optimisation (Rafailov et al., 2023): chosen over rejected, against the network that the stage
starts from, frozen. Its log-probabilities are computed once, before training, so that it takes no memory meanwhile.
Its kin are settings: `DPOLoss` has their formulas and papers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from twinloop.domains.domain import Domain
from twinloop.training.runtime import Runtime
from twinloop.training.settings import EpochSettings, NotNegative, Positive

if TYPE_CHECKING:
    from twinloop.models.decoder import Decoder
    from twinloop.models.tokenizer import ChatTokenizer
    from twinloop.training.objectives import DPOLoss
    from twinloop.training.stream import BatchStream
    from twinloop.training.tree import Tree

RECORDS = "preferences"


class DPOSettings(EpochSettings):
    beta: Positive = 0.1
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs whose labels are taken to be swapped; of the sigmoid loss."""
    length_normalised: bool = False
    """Mean log-probabilities of answers in place of sums, as in TRL's IPO. It wants a `beta` as many times larger as
    answers are long."""
    rpo_alpha: NotNegative = 0.0
    """Of an SFT term on the chosen answers."""

    def check_context(self, max_length: int) -> None:
        """A row may be longer than the context: positions count along one answer of a pair."""

    @model_validator(mode="after")
    def _smooths_what_has_labels(self) -> Self:
        if self.label_smoothing and self.loss == "ipo":
            raise ValueError("label_smoothing is a setting of loss sigmoid; ipo has none")
        return self


Settings = DPOSettings


def preference_trees(records: Iterable[dict[str, Any]], tokenizer: ChatTokenizer) -> list[Tree]:
    """The pairs: of each, the prompt once."""
    from twinloop.training.tree import pair

    return [
        pair(
            tokenizer.encode_prompt(record["prompt"]),
            tokenizer.encode_answer(record["chosen"]),
            tokenizer.encode_answer(record["rejected"]),
        )
        for record in records
    ]


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
    from twinloop.training.scoring import Rows, attach_reference
    from twinloop.training.stream import BatchStream

    pairs = preference_trees(records, tokenizer)
    referred = attach_reference(without_adapter(model), pairs, Rows(settings.seq_len, device=runtime.device))
    batches = BatchStream.of_epochs(referred, settings, seed=runtime.seed)
    kin = settings.model_dump(include={"beta", "loss", "label_smoothing", "length_normalised", "rpo_alpha"})
    return DPOLoss(**kin), batches
