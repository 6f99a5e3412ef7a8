"""GRPO with verifiable rewards (Shao et al., 2024): the network's own answers, sampled on the engine that serves, and
rewarded by the domain's verifier; better than the mean of the group is reinforced.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from twinloop.domains.domain import Domain, Verdict, domain_code
from twinloop.training.runtime import Runtime
from twinloop.training.settings import NotNegative, Positive, RolloutSettings

if TYPE_CHECKING:
    from twinloop.models.decoder import Decoder
    from twinloop.models.tokenizer import ChatTokenizer
    from twinloop.training.objectives import GRPOLoss
    from twinloop.training.rollouts import RolloutStream

RECORDS = "prompts"
NEEDS_VERIFIER = True
SHOWN = ("reward",)


class GRPOSettings(RolloutSettings):
    clip_eps: Positive = 0.2
    kl_coef: NotNegative = 0.0
    """Of a penalty towards the network that the stage starts from."""

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
    from twinloop.training.rollouts import RolloutStream

    prompts, facts = [], []
    for number, record in enumerate(records, 1):
        prompts.append(tokenizer.encode_prompt(record["prompt"]))
        with domain_code(domain, "read_facts", f"prompt {number}"):
            facts.append(domain.read_facts(record))

    def reward(prompt: int, answer: str) -> Verdict:
        with domain_code(domain, "verify", f"prompt {prompt + 1}"):
            return domain.verify(answer, facts[prompt])

    rollouts = RolloutStream(
        model,
        prompts,
        reward,
        tokenizer.decode,
        settings,
        runtime,
        stop_ids=tokenizer.stop_ids,
        vocab_size=tokenizer.vocab_size,
        reference=frozen_reference(model) if settings.has_reference() else None,
    )
    return GRPOLoss(clip_eps=settings.clip_eps, kl_coef=settings.kl_coef), rollouts
