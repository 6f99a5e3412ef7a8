"""PPO from rewards (Schulman et al., 2017; Ouyang et al., 2022): the network's own answers, sampled on the engine that
serves. A critic that shares the network credits each token; each costs how far it leads from the stage's start."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from pydantic import model_validator

from twinloop.domains.domain import Domain
from twinloop.training.runtime import Runtime
from twinloop.training.settings import Count, NotNegative, Positive, RolloutSettings, Share

if TYPE_CHECKING:
    from twinloop.models.decoder import Decoder
    from twinloop.models.tokenizer import ChatTokenizer
    from twinloop.training.objectives import PPOLoss
    from twinloop.training.rollouts import RolloutStream

RECORDS = "prompts"
NEEDS_VERIFIER = True
SHOWN = ("reward", "kl")


class Settings(RolloutSettings):
    epochs: Count = 4
    minibatches: Count = 1
    """Optimizer steps an epoch: each on its share of the rollout's groups."""
    gamma: Share = 1.0
    lam: Share = 0.95
    clip_eps: Positive = 0.2
    value_clip: Positive = 0.2
    value_coef: NotNegative = 0.5
    """Of the critic's loss."""
    kl_coef: NotNegative = 0.05
    """What a token costs for each nat by which it is surer than the network that the stage starts from."""
    kl_target: Positive | None = None
    """Nats an answer: the coefficient is corrected in kl_horizon answers (Ziegler et al., 2019). None: it is fixed."""
    kl_horizon: Count = 10_000

    def passes(self) -> tuple[int, int]:
        return self.epochs, self.minibatches

    def has_reference(self) -> bool:
        return self.kl_coef > 0

    @model_validator(mode="after")
    def _coefficient_can_move(self) -> Self:
        if self.kl_target and not self.kl_coef:
            raise ValueError("kl_target: the coefficient begins at kl_coef and stays 0; raise kl_coef")
        if self.kl_horizon != type(self).model_fields["kl_horizon"].default and not self.kl_target:
            raise ValueError("kl_horizon: without kl_target the coefficient is fixed; set kl_target too")
        return self


def build(
    records: Iterable[dict[str, Any]],
    model: Decoder,
    tokenizer: ChatTokenizer,
    settings: Settings,
    runtime: Runtime,
    domain: Domain,
) -> tuple[PPOLoss, RolloutStream]:
    from twinloop.training.adapters import frozen_reference
    from twinloop.training.credit import KLController, TokenCredit
    from twinloop.training.objectives import PPOLoss
    from twinloop.training.rewards import prompts_and_rewards
    from twinloop.training.rollouts import RolloutStream
    from twinloop.training.scoring import Rows

    prompts, rewards = prompts_and_rewards(records, tokenizer, settings, runtime, domain)
    loss = PPOLoss(model.config.hidden_size, **settings.model_dump(include={"clip_eps", "value_clip", "value_coef"}))
    rollouts = RolloutStream(
        model,
        prompts,
        rewards,
        tokenizer.decode,
        settings,
        runtime,
        stop_ids=tokenizer.stop_ids,
        vocab_size=tokenizer.vocab_size,
        credit=TokenCredit(
            prompts,
            partial(loss.values, model),
            KLController(settings.kl_coef, target=settings.kl_target, horizon=settings.kl_horizon),
            gamma=settings.gamma,
            lam=settings.lam,
            reference=frozen_reference(model) if settings.has_reference() else None,
            rows=Rows.of(prompts, settings, runtime, tokenizer.vocab_size),
        ),
    )
    return loss, rollouts
