"""Rollouts of RL: sample groups of answers on the serving engine, judge them, credit them, train on those that give a
gradient.

What gives none by `credit` (in GRPO, a group whose rewards are all alike) is dropped and counted, and further prompts
are drawn to fill the step, up to MAX_ROUNDS. All informative groups of the last round are kept, also those past the
number wanted, at most twice of it less one: their samples exist, and since the loss is a mean over tokens, more of them
make the step's direction surer and not its length. The ratio's denominator is the sampler's own log-probability, so its
distance from 1 in the first update of a rollout measures the parity of trainer and engine, at every step. Left out:
filtering over-long completions, replay of old rollouts.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np

from twinloop.models.decoder import Decoder
from twinloop.serving.engine import Completion
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.training.credit import Credit, Group, GroupCredit
from twinloop.training.packing import pack, row_length
from twinloop.training.rewards import Answer, Earned
from twinloop.training.runtime import Runtime
from twinloop.training.sampler import BoundSampler
from twinloop.training.scoring import Rows, attach_reference
from twinloop.training.settings import RolloutSettings
from twinloop.training.stream import Step, micro_batches
from twinloop.training.tree import Tree, TreeBatch

MAX_ROUNDS = 4
REWARDED_ROLLOUTS = 5
"""Whose mean reward ends the training, where it is to end at one: a single rollout may be lucky."""


class RolloutStream:
    """The loop's batches, sampled from the network's weights at each rollout.

    A function of the weights, the seed and the position alone: a resumed run samples what the stopped one would have.
    """

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        rewards: Callable[[Sequence[Answer]], Sequence[Earned]],
        decode: Callable[[list[int]], str],
        settings: RolloutSettings,
        runtime: Runtime,
        *,
        stop_ids: Sequence[int],
        vocab_size: int | None = None,
        reference: Decoder | None = None,
        credit: Credit | None = None,
    ):
        """vocab_size: ids that `decode` knows, the only ones that are sampled; by default all of the network's.
        reference: the network before RL, whose log-probabilities the objective needs. credit: by default relative to
        the group; one with rows of its own reads the same ids."""
        self._model, self._reference = model, reference
        self._prompts, self._rewards, self._decode = prompts, rewards, decode
        self._settings, self._runtime, self._stop_ids = settings, runtime, stop_ids
        self._credit: Credit = credit or GroupCredit()
        self._rows = Rows.of(prompts, settings, runtime, vocab_size)
        self._longest_prompt = max(len(prompt) for prompt in prompts)
        self._sampler: BoundSampler | None = None  # made at the first rollout, when the network is on its device
        self._epochs, self._minibatches = settings.passes()
        self._step = 0
        self._cursor = 0
        self._pending: list[Group] = []
        self._batches: list[TreeBatch] | None = None
        self._metrics: dict[str, float] = {}
        self._earned: list[float] = []

    @property
    def total_steps(self) -> int:
        return self._settings.steps

    def next(self) -> Step:
        rollout, update = divmod(self._step, self._epochs * self._minibatches)
        if update == 0:
            self._pending, self._metrics = self._roll_out(rollout)
            self._earned = [*self._earned, self._metrics["reward"]][-REWARDED_ROLLOUTS:]
        if update == 0 or self._minibatches > 1 or self._batches is None:
            self._batches = self._micro_batches(self._minibatch(rollout, update))
        self._step += 1
        return Step(self._batches, self._metrics, last=self._between_rollouts() and self._earns_enough())

    def state(self) -> dict[str, Any]:
        pending = [] if self._between_rollouts() else [vars(group) for group in self._pending]
        position = {"step": self._step, "cursor": self._cursor, "credit": self._credit.state()}
        return {**position, "pending": pending, "metrics": self._metrics, "earned": self._earned}

    def restore(self, state: dict[str, Any]) -> None:
        self._step, self._cursor, self._metrics = state["step"], state["cursor"], state["metrics"]
        self._credit.restore(state["credit"])
        self._earned = state["earned"]
        self._pending, self._batches = [Group(**group) for group in state["pending"]], None

    # --- inside ---------------------------------------------------------------------------------------------------

    def _between_rollouts(self) -> bool:
        return self._step % (self._epochs * self._minibatches) == 0

    def _earns_enough(self) -> bool:
        wanted = self._settings.stop_at_reward
        return wanted is not None and len(self._earned) == REWARDED_ROLLOUTS and fmean(self._earned) >= wanted

    def _roll_out(self, rollout: int) -> tuple[list[Group], dict[str, float]]:
        """Rounds of prompts_per_step prompts until as many groups are informative."""
        started = time.perf_counter()
        settings, size = self._settings, self._settings.group_size
        stats = _RolloutStats()
        informative: list[Group] = []
        credited: dict[str, float] = {}
        for attempt in range(MAX_ROUNDS):
            chosen = self._draw_prompts(settings.prompts_per_step)
            completions = self._sample(chosen, np.random.SeedSequence([self._runtime.seed, rollout, attempt]))
            prompts = [prompt for prompt in chosen for _ in range(size)]
            earned = self._rewards([self._answer(*each) for each in zip(prompts, completions, strict=True)])
            groups = []
            for first, prompt in zip(range(0, len(completions), size), chosen, strict=True):
                members = completions[first : first + size]
                tokens, logprobs = [m.tokens for m in members], [m.logprobs for m in members]
                rewards = [each.reward for each in earned[first : first + size]]
                groups.append(Group(prompt, tokens, logprobs, rewards))
            kept, credited = self._credit.assign(groups)
            informative += kept
            stats.add(completions, earned, groups=len(groups), informative=len(kept))
            if len(informative) >= settings.prompts_per_step:
                break
        return informative, stats.metrics(time.perf_counter() - started) | credited

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
                vocab_size=self._rows.vocab_size,
            )
        params = SamplingParams(
            max_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            stop=tuple(self._stop_ids),
            seed=int(seeds.generate_state(1)[0]),
        )
        return self._sampler.generate([self._prompts[index] for index in chosen], params, group=settings.group_size)

    def _answer(self, prompt: int, completion: Completion) -> Answer:
        finished = completion.finish_reason == "stop"
        text = self._decode(completion.tokens[:-1] if finished else completion.tokens)
        return Answer(prompt, text, finished)

    def _minibatch(self, rollout: int, update: int) -> list[Group]:
        """The groups of an update: each epoch of a rollout deals them out anew."""
        if self._minibatches == 1:
            return self._pending
        epoch, index = divmod(update, self._minibatches)
        order = np.random.default_rng([self._runtime.seed, rollout, epoch]).permutation(len(self._pending))
        return [self._pending[group] for group in np.array_split(order, self._minibatches)[index]]

    def _micro_batches(self, groups: list[Group]) -> list[TreeBatch]:
        if not groups:
            return []
        trees = [group.tree(self._prompts) for group in groups]
        rows = replace(self._rows, seq_len=self._choose_seq_len(trees))
        if self._reference is not None:
            trees = attach_reference(self._reference, trees, rows)
        return micro_batches(
            pack(trees, rows.seq_len).rows,
            rows.seq_len,
            self._settings.micro_batch_size,
            temperature=rows.temperature,
            vocab_size=rows.vocab_size,
        )

    def _choose_seq_len(self, trees: list[Tree]) -> int:
        """As short as the step allows on CPU; always the same on CUDA, where each length compiles a kernel."""
        if self._runtime.device == "cuda":
            return self._rows.seq_len
        return row_length(max(tree.length for tree in trees), self._runtime.device)


class _RolloutStats:
    """Counts over all that a rollout sampled, dropped groups included."""

    def __init__(self) -> None:
        self.groups = self.informative = self.completions = self.tokens = self.cut_off = self.unparseable = 0
        self.rewards = self.logprobs = 0.0
        self.parts: Counter[str] = Counter()

    def add(self, members: Sequence[Completion], earned: Sequence[Earned], *, groups: int, informative: int) -> None:
        self.groups += groups
        self.informative += informative
        self.completions += len(members)
        self.tokens += sum(len(member.tokens) for member in members)
        self.logprobs += math.fsum(math.fsum(member.logprobs) for member in members)
        self.cut_off += sum(member.finish_reason == "length" for member in members)
        self.rewards += math.fsum(each.reward for each in earned)
        self.unparseable += sum(not each.parsed for each in earned)
        for each in earned:
            self.parts.update(each.parts)

    def metrics(self, seconds: float) -> dict[str, float]:
        """entropy: nats a token, estimated by the mean surprise of what was sampled. Shares are of completions."""
        return {
            "reward": self.rewards / self.completions,
            **{name: total / self.completions for name, total in self.parts.items()},
            "groups": float(self.groups),
            "informative_groups": float(self.informative),
            "length": self.tokens / self.completions,
            "length_limited": self.cut_off / self.completions,
            "unparseable": self.unparseable / self.completions,
            "entropy": -self.logprobs / self.tokens,
            "rollout_tokens_per_s": self.tokens / seconds,
        }
