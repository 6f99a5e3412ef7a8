"""GRPO with verifiable rewards (Shao et al., 2024): the network's own answers, sampled on the engine that serves, and
rewarded by the domain's verifier, by reward models, or both; better than the mean of the group is reinforced.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from twinloop.domains.domain import Domain
from twinloop.training.runtime import Runtime
from twinloop.training.settings import Count, NotNegative, Positive, RolloutSettings

if TYPE_CHECKING:
    from twinloop.models.decoder import Decoder
    from twinloop.models.tokenizer import ChatTokenizer
    from twinloop.training.objectives import GRPOLoss
    from twinloop.training.rollouts import RolloutStream

RECORDS = "prompts"
NEEDS_VERIFIER = True
SHOWN = ("reward",)


class GRPOSettings(RolloutSettings):
    group_size: Annotated[int, Field(ge=2)]
    """At least 2: an advantage is relative to the others of the group."""
    updates_per_rollout: Count = 1
    """Optimizer steps taken on each rollout."""
    clip_eps: Positive = 0.2
    kl_coef: NotNegative = 0.0
    """Of a penalty towards the network that the stage starts from."""

    def passes(self) -> tuple[int, int]:
        return self.updates_per_rollout, 1

    def has_reference(self) -> bool:
        return self.kl_coef > 0


Settings = GRPOSettings


def build(
    records: Iterable[dict[str, Any]],
    model: Decoder,
    tokenizer: ChatTokenizer,
    settings: GRPOSettings,
    runtime: Runtime,
    domain: Domain,
) -> tuple[GRPOLoss, RolloutStream]:
    from twinloop.training.adapters import frozen_reference
    from twinloop.training.objectives import GRPOLoss
    from twinloop.training.rewards import prompts_and_rewards
    from twinloop.training.rollouts import RolloutStream

    prompts, rewards = prompts_and_rewards(records, tokenizer, settings, runtime, domain)
    rollouts = RolloutStream(
        model,
        prompts,
        rewards,
        tokenizer.decode,
        settings,
        runtime,
        stop_ids=tokenizer.stop_ids,
        vocab_size=tokenizer.vocab_size,
        reference=frozen_reference(model) if settings.has_reference() else None,
    )
    return GRPOLoss(clip_eps=settings.clip_eps, kl_coef=settings.kl_coef), rollouts
