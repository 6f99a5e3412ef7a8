"""A reward model (Ouyang et al., 2022): one score on the last token of an answer, higher for the one that people chose,
by the Bradley-Terry model of preferences. It starts at 0 for every answer.

A share of the prompts is held out with all their pairs, and what it is worth is measured on those.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from twinloop.domains.domain import Domain
from twinloop.training.forms import is_held_out
from twinloop.training.runtime import Runtime
from twinloop.training.settings import HeadSettings, NotNegative

if TYPE_CHECKING:
    from twinloop.models.decoder import Decoder
    from twinloop.models.tokenizer import ChatTokenizer
    from twinloop.training.objectives import RewardLoss
    from twinloop.training.stream import BatchStream

RECORDS = "preferences"
HEAD = "reward"
SHOWN = ("accuracy",)


class RewardSettings(HeadSettings):
    margin: NotNegative = 0.0
    """By how much the chosen answer is to score higher."""
    centring: NotNegative = 0.0
    """Weight of the squared sum of a pair's scores, which keeps rewards around 0 (TRL's center_rewards_coefficient)."""

    def check_context(self, max_length: int) -> None:
        """A row may be longer than the context: positions count along one answer of a pair."""


Settings = RewardSettings


def build(
    records: Iterable[dict[str, Any]],
    model: Decoder,
    tokenizer: ChatTokenizer,
    settings: RewardSettings,
    runtime: Runtime,
    domain: Domain,
) -> tuple[RewardLoss, BatchStream]:
    from twinloop.training.heads import REWARD, attach_head
    from twinloop.training.methods.dpo import preference_trees
    from twinloop.training.objectives import RewardLoss
    from twinloop.training.stream import BatchStream

    pairs = preference_trees([record for record in records if not is_held_out(record)], tokenizer)
    attach_head(model, REWARD, tokenizer, ends=tokenizer.stop_ids)
    batches = BatchStream.of_epochs(pairs, settings, seed=runtime.seed)
    return RewardLoss(margin=settings.margin, centring=settings.centring), batches
