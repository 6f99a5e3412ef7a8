"""Verifier RL (GRPO): the network's own answers, sampled on the engine that ships and paid by the verifier."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from twinloop.domains.domain import Verdict
from twinloop.domains.returns.verifier import Facts, verify
from twinloop.models.decoder import Decoder
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.tasks.recipe import ReinforceSettings
from twinloop.tasks.runtime import Runtime
from twinloop.training.objectives import GroupRelative
from twinloop.training.rollouts import RolloutSettings, RolloutStream


def lesson(
    records: Iterable[dict[str, Any]],
    network: Decoder,
    tokenizer: ChatTokenizer,
    settings: ReinforceSettings,
    runtime: Runtime,
    *,
    judge: Callable[[str, Facts], Verdict] = verify,
) -> tuple[GroupRelative, RolloutStream]:
    """records: prompts. network: what is trained, and so what samples; as it stands, the reference of a KL penalty.

    judge: another one is for benchmarks, whose networks know nothing that the verifier would pay for.
    """
    prompts, facts = [], []
    for record in records:
        prompts.append(tokenizer.encode_prompt(record["prompt"]))
        facts.append(Facts.from_record(record["facts"]))

    def reward(prompt: int, answer: str) -> Verdict:
        return judge(answer, facts[prompt])

    rollouts = RolloutStream(
        network,
        prompts,
        reward,
        tokenizer.decode,
        RolloutSettings(
            prompts_per_step=settings.prompts_per_step,
            group=settings.group_size,
            sampling=SamplingParams(
                max_tokens=settings.max_new_tokens, temperature=settings.temperature, stop=(tokenizer.stop_id,)
            ),
            updates_per_rollout=settings.updates_per_rollout,
        ),
        steps=settings.steps,
        seed=runtime.seed,
        micro_rows=settings.micro_rows,
        reference=copy.deepcopy(network) if settings.kl else None,
        threads=runtime.threads,
        device=runtime.device,
    )
    return GroupRelative(clip=settings.clip, kl=settings.kl), rollouts
