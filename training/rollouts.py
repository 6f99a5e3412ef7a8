"""GRPO rollouts: sample groups on the serving engine, judge them, keep the groups that give a gradient.

Advantages are relative to the group: (reward - mean) / standard deviation. A group whose rewards are all alike has
none; it is dropped and counted, and further prompts are drawn to fill the step, up to MAX_ROUNDS. All informative
groups of the last round are kept, also those past the number wanted, at most twice of it less one: their samples exist,
and since the loss is a mean over tokens, more of them make the step's direction surer and not its length. The ratio's
denominator is the sampler's own log-probability, so its distance from 1 in the first update of a rollout measures
the parity of trainer and engine, at every step. Left out: filtering over-long completions, replay of old rollouts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from twinloop.common.errors import UserError
from twinloop.domains.domain import Verdict
from twinloop.models.decoder import Decoder
from twinloop.serving.engine import Completion
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.training.packing import pack
from twinloop.training.runtime import Runtime
from twinloop.training.sampler import BoundSampler
from twinloop.training.scoring import attach_reference
from twinloop.training.settings import RolloutSettings
from twinloop.training.stream import Step, micro_batches
from twinloop.training.tree import Tree, TreeBatch, group

MAX_ROUNDS = 4
ROW_MULTIPLE = {"cpu": 16, "cuda": 128}  # of a row's length: a vector's width, FlexAttention's block


@dataclass(frozen=True)
class _Group:
    """A prompt's completions that are worth a gradient. What a checkpoint keeps of a rollout in use."""

    prompt: int
    completions: list[list[int]]
    logprobs: list[list[float]]
    advantages: list[float]


class RolloutStream:
    """The loop's batches, sampled from the network's weights at each rollout.

    A function of the weights, the seed and the position alone: a resumed run samples what the stopped one would have.
    """

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        reward: Callable[[int, str], Verdict],
        decode: Callable[[list[int]], str],
        settings: RolloutSettings,
        runtime: Runtime,
        *,
        stop_ids: Sequence[int],
        vocab_size: int | None = None,
        reference: Decoder | None = None,
    ):
        """reward: judges (prompt's index, answer's text). vocab_size: ids that `decode` knows; by default all of the
        network's. reference: for a KL penalty; the network before RL."""
        if not prompts:
            raise UserError("rollouts: there are no prompts; look at what validation quarantined")
        self._model, self._reference = model, reference
        self._prompts, self._reward, self._decode = prompts, reward, decode
        self._settings, self._runtime, self._stop_ids = settings, runtime, stop_ids
        self._vocab_size = vocab_size
        self._longest_prompt = max(len(prompt) for prompt in prompts)
        self._sampler: BoundSampler | None = None  # made at the first rollout, when the network is on its device
        self._step = 0
        self._cursor = 0
        self._pending: list[_Group] = []
        self._batches: list[TreeBatch] = []
        self._metrics: dict[str, float] = {}

    @property
    def total_steps(self) -> int:
        return self._settings.steps

    def next(self) -> Step:
        rollout, update = divmod(self._step, self._settings.updates_per_rollout)
        if update == 0:
            self._pending, self._metrics = self._roll_out(rollout)
            self._batches = self._micro_batches()
        self._step += 1
        return Step(self._batches, self._metrics)

    def state(self) -> dict[str, Any]:
        last = self._step % self._settings.updates_per_rollout == 0
        pending = [] if last else [vars(group) for group in self._pending]
        return {"step": self._step, "cursor": self._cursor, "pending": pending, "metrics": self._metrics}

    def restore(self, state: dict[str, Any]) -> None:
        self._step, self._cursor, self._metrics = state["step"], state["cursor"], state["metrics"]
        self._pending = [_Group(**group) for group in state["pending"]]
        self._batches = self._micro_batches()

    # --- inside ---------------------------------------------------------------------------------------------------

    def _roll_out(self, rollout: int) -> tuple[list[_Group], dict[str, float]]:
        """Rounds of prompts_per_step prompts until as many groups are informative."""
        started = time.perf_counter()
        settings = self._settings
        stats = _RolloutStats()
        informative: list[_Group] = []
        for attempt in range(MAX_ROUNDS):
            chosen = self._draw_prompts(settings.prompts_per_step)
            completions = self._sample(chosen, np.random.SeedSequence([self._runtime.seed, rollout, attempt]))
            for position, prompt in enumerate(chosen):
                members = completions[position * settings.group_size : (position + 1) * settings.group_size]
                verdicts = [self._reward(prompt, self._text(member)) for member in members]
                advantages = group_advantages([float(verdict.reward) for verdict in verdicts])
                stats.add(members, verdicts, informative=advantages is not None)
                if advantages is not None:
                    tokens, logprobs = [m.tokens for m in members], [m.logprobs for m in members]
                    informative.append(_Group(prompt, tokens, logprobs, advantages))
            if len(informative) >= settings.prompts_per_step:
                break
        return informative, stats.metrics(time.perf_counter() - started)

    def _draw_prompts(self, count: int) -> list[int]:
        """The next prompts of the stream; each epoch goes through all in its own order."""
        drawn: list[int] = []
        while len(drawn) < count:
            epoch, start = divmod(self._cursor, len(self._prompts))
            order = np.random.default_rng([self._runtime.seed, epoch]).permutation(len(self._prompts))
            some = order[start : start + count - len(drawn)].tolist()
            drawn += some
            self._cursor += len(some)
        return drawn

    def _sample(self, chosen: list[int], seeds: np.random.SeedSequence) -> list[Completion]:
        settings = self._settings
        if self._sampler is None:
            max_length = self._longest_prompt + settings.max_new_tokens
            self._sampler = BoundSampler(
                self._model,
                max_length=max_length,
                prompts=settings.prompts_per_step,
                group=settings.group_size,
                threads=self._runtime.threads,
                vocab_size=self._vocab_size,
            )
        params = SamplingParams(
            max_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            stop=tuple(self._stop_ids),
            seed=int(seeds.generate_state(1)[0]),
        )
        return self._sampler.generate([self._prompts[index] for index in chosen], params, group=settings.group_size)

    def _text(self, completion: Completion) -> str:
        stopped = completion.finish_reason == "stop"
        return self._decode(completion.tokens[:-1] if stopped else completion.tokens)

    def _micro_batches(self) -> list[TreeBatch]:
        if not self._pending:
            return []
        temperature = self._settings.temperature
        trees = [
            group(self._prompts[g.prompt], g.completions, advantages=g.advantages, old_logprobs=g.logprobs)
            for g in self._pending
        ]
        seq_len = self._choose_seq_len(trees)
        if self._reference is not None:
            trees = attach_reference(
                self._reference, trees, seq_len=seq_len, temperature=temperature, device=self._runtime.device
            )
        rows = pack(trees, seq_len).rows
        return micro_batches(rows, seq_len, self._settings.micro_batch_size, temperature=temperature)

    def _choose_seq_len(self, trees: list[Tree]) -> int:
        """As short as the step allows on CPU; always the same on CUDA, where each length compiles a kernel."""
        longest = max(tree.length for tree in trees)
        if self._runtime.device == "cuda":
            longest = self._longest_prompt + self._settings.group_size * self._settings.max_new_tokens
        multiple = ROW_MULTIPLE[self._runtime.device]
        return -(-longest // multiple) * multiple


def group_advantages(rewards: Sequence[float]) -> list[float] | None:
    """(reward - mean) / standard deviation of each member; None where all rewards are alike."""
    mean = math.fsum(rewards) / len(rewards)
    deviation = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards))
    if max(rewards) == min(rewards):
        return None
    return [(reward - mean) / deviation for reward in rewards]


class _RolloutStats:
    """Counts over all that a rollout sampled, dropped groups included."""

    def __init__(self) -> None:
        self.groups = self.informative = self.completions = self.tokens = self.cut_off = self.unparseable = 0
        self.rewards = self.logprobs = 0.0

    def add(self, members: Sequence[Completion], verdicts: Sequence[Verdict], *, informative: bool) -> None:
        self.groups += 1
        self.informative += informative
        self.completions += len(members)
        self.tokens += sum(len(member.tokens) for member in members)
        self.logprobs += math.fsum(math.fsum(member.logprobs) for member in members)
        self.cut_off += sum(member.finish_reason == "length" for member in members)
        self.rewards += math.fsum(verdict.reward for verdict in verdicts)
        self.unparseable += sum(not verdict.parsed for verdict in verdicts)

    def metrics(self, seconds: float) -> dict[str, float]:
        """entropy: nats a token, estimated by the mean surprise of what was sampled. Shares are of completions."""
        return {
            "reward": self.rewards / self.completions,
            "groups": float(self.groups),
            "informative_groups": float(self.informative),
            "length": self.tokens / self.completions,
            "length_limited": self.cut_off / self.completions,
            "unparseable": self.unparseable / self.completions,
            "entropy": -self.logprobs / self.tokens,
            "rollout_tokens_per_s": self.tokens / seconds,
        }
