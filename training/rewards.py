"""What a sampled answer earns: by the domain's verifier, by reward models, or a weighted sum of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from twinloop.common.errors import UserError
from twinloop.domains.domain import Domain, Message, Verdict, domain_code
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.training.heads import load_reward_model, tree_scores
from twinloop.training.packing import row_length
from twinloop.training.runtime import Runtime
from twinloop.training.settings import RolloutSettings
from twinloop.training.tree import group

VERIFIER, MODEL = "verifier", "model_reward"


@dataclass(frozen=True)
class Answer:
    """A sampled answer. prompt: its number. finished: whether it ended by itself."""

    prompt: int
    text: str
    finished: bool


@dataclass(frozen=True)
class Earned:
    """parsed: False where the verifier could not read the answer. parts: where there are several sources, what each
    gave, before its weight."""

    reward: float
    parsed: bool = True
    parts: Mapping[str, float] = field(default_factory=dict)


Rewards = Callable[[Sequence[Answer]], list[Earned]]


def prompts_and_rewards(
    records: Iterable[Mapping[str, Any]],
    tokenizer: ChatTokenizer,
    settings: RolloutSettings,
    runtime: Runtime,
    domain: Domain,
) -> tuple[list[list[int]], Rewards]:
    """The tokens of each record's prompt, and what judges answers to them, as `settings.rewards` says."""
    kept = list(records)
    sources: dict[str, tuple[Rewards, float]] = {}
    for source in settings.rewards:
        if source.verifier is not None:
            sources[VERIFIER] = _verifier(kept, domain), source.verifier
        if source.model is not None:
            number = len(sources.keys() - {VERIFIER}) + 1
            name = MODEL if number == 1 else f"{MODEL}_{number}"
            model = RewardModel(Path(source.model["path"]), [record["prompt"] for record in kept], runtime)
            sources[name] = model, source.weight
    return [tokenizer.encode_prompt(record["prompt"]) for record in kept], WeightedSum(sources)


def _verifier(records: Sequence[Mapping[str, Any]], domain: Domain) -> Verifier:
    facts = []
    for number, record in enumerate(records, 1):
        with domain_code(domain, "read_facts", f"prompt {number}"):
            facts.append(domain.read_facts(record))

    def verify(prompt: int, answer: str) -> Verdict:
        with domain_code(domain, "verify", f"prompt {prompt + 1}"):
            verdict = domain.verify(answer, facts[prompt])
            if not math.isfinite(verdict.reward):
                raise UserError(
                    f"domain {domain.name}: verify gave an answer to prompt {prompt + 1} the reward {verdict.reward}; "
                    "a reward is a finite number"
                )
            return verdict

    return Verifier(verify)


class Verifier:
    """The reward of a verdict on each answer."""

    def __init__(self, verify: Callable[[int, str], Verdict]):
        """verify: judges (prompt's number, answer's text)."""
        self._verify = verify

    def __call__(self, answers: Sequence[Answer]) -> list[Earned]:
        verdicts = [self._verify(answer.prompt, answer.text) for answer in answers]
        return [Earned(float(verdict.reward), verdict.parsed) for verdict in verdicts]


class WeightedSum:
    def __init__(self, sources: Mapping[str, tuple[Rewards, float]]):
        """sources: what gives rewards and its weight, by the name under which it is reported."""
        self._sources = sources

    def __call__(self, answers: Sequence[Answer]) -> list[Earned]:
        given = {name: source(answers) for name, (source, _) in self._sources.items()}
        summed = []
        for index in range(len(answers)):
            parts = {name: earned[index].reward for name, earned in given.items()}
            total = math.fsum(weight * parts[name] for name, (_, weight) in self._sources.items())
            parsed = all(earned[index].parsed for earned in given.values())
            summed.append(Earned(total, parsed, parts if len(parts) > 1 else {}))
        return summed


class RewardModel:
    """The score of each answer by a model directory that the method `reward` made.

    It reads prompt and answer as it was trained: by its own tokenizer, and with the stop token behind an answer that
    ended by itself. One that was cut off has none, and scores as what is not finished. So does one that is too long to
    be read: text may have more tokens than were sampled for it.
    """

    def __init__(self, directory: Path, prompts: Sequence[Sequence[Message]], runtime: Runtime):
        """prompts: of all answers, by their numbers. Raises UserError for a directory that is no reward model."""
        self._network, self._tokenizer = load_reward_model(directory), ChatTokenizer.load(directory)
        self._directory, self._prompts, self._device = directory, prompts, runtime.device

    def __call__(self, answers: Sequence[Answer]) -> list[Earned]:
        trees = []
        for prompt, members in groupby(answers, key=lambda answer: answer.prompt):
            asked = self._tokenizer.encode_prompt(self._prompts[prompt])
            left = self._network.config.max_position_embeddings - len(asked)
            if left < 1:
                raise UserError(
                    f"rewards: {self._directory} takes {left + len(asked)} tokens, and a prompt has {len(asked)}; "
                    "train the reward model on a longer base"
                )
            trees.append(group(asked, [self._encode(each)[:left] for each in members]))
        seq_len = row_length(max(tree.length for tree in trees), self._device)
        scores = tree_scores(self._network, trees, seq_len=seq_len, device=self._device)
        return [Earned(float(score)) for score in np.concatenate(scores)[:, 0]]

    def _encode(self, answer: Answer) -> list[int]:
        tokens = self._tokenizer.encode_sampled(answer.text)
        return tokens if answer.finished or len(tokens) == 1 else tokens[:-1]
