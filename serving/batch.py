"""Many prompts through the engine's slots: a slot is filled again as soon as its sequence ends.

What a sequence draws depends on the seed, its index and the position alone; which slots and steps it shares follows
from the arguments alone. So a run that was cut off and begun again gives the same completions, bit for bit.

Shapes: S slots, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from twinloop.common.errors import UserError
from twinloop.serving.sampling import choose, uniform_draws

if TYPE_CHECKING:
    from twinloop.serving.engine import Engine


@dataclass(frozen=True)
class Completion:
    """tokens: the answer, the stop token included where it ended with one. logprobs: natural, one a token, under the
    distribution drawn from (plain softmax at temperature 0)."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float,
    seed: int | None,
    group: int,
    stop_ids: Sequence[int],
    first_sequence: int,
) -> list[Completion]:
    """See `Engine.generate`."""
    if max_tokens < 1 or group < 1 or temperature < 0:
        raise UserError(
            f"generate: max_tokens {max_tokens} and group {group} must be at least 1, "
            f"and temperature {temperature} at least 0"
        )
    for prompt in prompts:
        engine.check_prompt(prompt)
    batch = _Batch(engine, prompts, max_tokens, temperature, seed, group, stop_ids, first_sequence)
    while batch.fill():
        batch.step()
    return [completion for completion in batch.done if completion is not None]


class _Batch:
    """The sequences in flight, as arrays over the slots."""

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        temperature: float,
        seed: int | None,
        group: int,
        stop_ids: Sequence[int],
        first_sequence: int,
    ):
        engine.reset()
        self.first_sequence = first_sequence
        self.engine, self.prompts, self.group, self.seed = engine, prompts, group, seed
        slots = engine.slots
        self.waiting = deque(range(len(prompts) * group))
        self.done: list[Completion | None] = [None] * (len(prompts) * group)
        self.stops_V = np.zeros(engine.config.vocab_size, bool)
        self.stops_V[list(stop_ids)] = True
        self.max_tokens = min(max_tokens, engine.max_length - 1)
        self.temperature_S = np.full(slots, temperature, np.float32)
        self.active_S = np.zeros(slots, bool)
        self.sequence_S = np.full(slots, -1)
        self.prompt_S = np.full(slots, -1)  # whose tokens a slot begins with, also after its sequence has ended
        self.room_S = np.zeros(slots, np.int64)
        self.produced_S = np.zeros(slots, np.int64)
        self.next_S = np.zeros(slots, np.int64)
        self.prompt_logits_V = np.empty(0, np.float32)  # of the prompt started last
        self.uniforms = np.zeros((slots, self.max_tokens))
        self.tokens = np.zeros((slots, self.max_tokens), np.int64)
        self.logprobs = np.zeros((slots, self.max_tokens), np.float32)

    def fill(self) -> bool:
        """Start waiting sequences in free slots. False when nothing is left to do."""
        while self.waiting and not self.active_S.all():
            free = np.flatnonzero(~self.active_S)
            prompt = self.waiting[0] // self.group
            members = [self.waiting.popleft() for _ in range(min(len(free), self._unstarted(prompt)))]
            self._start(prompt, members, [int(slot) for slot in free[: len(members)]])
        if not self.active_S.any():
            return False
        if not self.waiting:
            self._close_ranks()
        return True

    def _unstarted(self, prompt: int) -> int:
        return (prompt + 1) * self.group - self.waiting[0]

    def _start(self, prompt: int, sequences: list[int], slots: list[int]) -> None:
        """Compute the prompt in the first slot, unless some slot still begins with it, and copy it to the others."""
        tokens = self.prompts[prompt]
        holders = np.flatnonzero(self.prompt_S == prompt)
        if len(holders):  # the rest of a group that did not fit
            source = int(holders[0])
        else:
            source = slots[0]
            self.prompt_logits_V = self.engine.prefill(source, tokens).copy()
        targets = [slot for slot in slots if slot != source]
        if targets:
            self.engine.copy_prefix(source, targets, len(tokens))
        self.engine.lengths[slots] = len(tokens)
        self.prompt_S[slots] = prompt
        self.sequence_S[slots] = sequences
        self.room_S[slots] = min(self.max_tokens, self.engine.max_length - len(tokens))
        self.produced_S[slots] = 0
        self.active_S[slots] = True
        if self.temperature_S[0] > 0:
            for slot, sequence in zip(slots, sequences, strict=True):
                self.uniforms[slot] = uniform_draws(self.seed, self.first_sequence + sequence, self.max_tokens)
        self._take(np.array(slots), np.broadcast_to(self.prompt_logits_V, (len(slots), len(self.prompt_logits_V))))

    def step(self) -> None:
        """One decode step of the narrowest range that holds every active slot."""
        active = np.flatnonzero(self.active_S)
        first, end = int(active[0]), int(active[-1]) + 1
        logits = self.engine.decode(first, self.next_S[first:end], self.active_S[first:end])
        self._take(active, logits if len(active) == end - first else logits[active - first])

    def _take(self, slots: np.ndarray, logits: np.ndarray) -> None:
        """Draw each slot's next token, note it, and end the sequences that are complete."""
        at = self.produced_S[slots]
        tokens, logprobs = choose(logits, self.temperature_S[slots], self.uniforms[slots, at])
        self.tokens[slots, at] = tokens
        self.logprobs[slots, at] = logprobs
        self.next_S[slots] = tokens
        at += 1
        self.produced_S[slots] = at
        stopped = self.stops_V[tokens]
        ended = stopped | (at >= self.room_S[slots])
        if ended.any():
            for index in np.flatnonzero(ended):
                self._finish(int(slots[index]), bool(stopped[index]))

    def _finish(self, slot: int, stopped: bool) -> None:
        count = int(self.produced_S[slot])
        self.done[self.sequence_S[slot]] = Completion(
            self.tokens[slot, :count].tolist(), self.logprobs[slot, :count].tolist(), "stop" if stopped else "length"
        )
        self.active_S[slot] = False

    def _close_ranks(self) -> None:
        """When no one waits, move the last sequences into the gaps: every later step then has fewer idle rows.

        A move costs about what two steps of a row cost.
        """
        active = np.flatnonzero(self.active_S)
        gaps = np.flatnonzero(~self.active_S[: len(active)])
        for target, source in zip(gaps, active[len(active) - len(gaps) :], strict=True):
            self.engine.copy_prefix(int(source), [int(target)], int(self.engine.lengths[source]))
            for state in (
                self.sequence_S,
                self.prompt_S,
                self.room_S,
                self.produced_S,
                self.next_S,
                self.uniforms,
                self.tokens,
                self.logprobs,
            ):
                state[target] = state[source]
            self.active_S[[target, source]] = True, False
