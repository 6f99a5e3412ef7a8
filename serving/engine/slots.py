"""The sequences in an engine's slots, from their prompts to their last tokens.

The core of both drivers: `Engine.generate` (rollouts, evaluation) and `Scheduler` (serving) decide who gets a slot and
when; what happens in it is decided here. What a sequence draws depends on its seed, its number and the position alone.

Shapes: letters as in `models.shapes`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from twinloop.serving.engine.runner import ModelRunner
from twinloop.serving.engine.sampling import (
    ConstraintError,
    ConstraintState,
    SamplingParams,
    choose,
    uniform_draws,
)

FinishReason = Literal["stop", "length"]

# What eight bits of a constraint add to eight logits. Over 150,000 of them a look-up takes 30 us, where choosing by a
# boolean mask takes 60 to 700.
_BIAS_OF_BYTE = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0, -np.inf
).astype(np.float32)


@dataclass(eq=False)
class Prompt:
    """Token ids. Sequences that are admitted with the same object share its computation."""

    tokens: Sequence[int]
    logits_V: np.ndarray | None = None
    """After the last token, once the prompt is computed."""


class Drawn(NamedTuple):
    """The next token of some sequences, an array [B] each.

    positions: tokens that the answer had before. stopped: ended with one of its stop tokens; ended: for that reason or
    because the cache is full. Slots of ended sequences are free again.
    """

    slots: np.ndarray
    sequences: np.ndarray
    positions: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray
    stopped: np.ndarray
    ended: np.ndarray


class SlotConstraintError(ConstraintError):
    """The constraint of the sequence in `slot` failed. The step was not taken: the others lose nothing by it."""

    def __init__(self, slot: int, reason: str):
        super().__init__(reason)
        self.slot = slot


class SlotBatch:
    """The slots of one runner, which it resets and then owns."""

    def __init__(self, runner: ModelRunner):
        runner.reset()
        self._runner = runner
        slots, length, vocabulary = runner.slots, runner.max_length, runner.vocab_size
        self._reading: deque[tuple[Prompt, list[int]]] = deque()
        self._held: list[Prompt | None] = [None] * slots  # what a slot begins with, also after its sequence has ended
        self._occupied_C = np.zeros(slots, bool)
        self._decoding_C = np.zeros(slots, bool)  # occupied, and the prompt is computed
        self._sequence_C = np.zeros(slots, np.int64)
        self._produced_C = np.zeros(slots, np.int64)
        self._limit_C = np.zeros(slots, np.int64)
        self._next_C = np.zeros(slots, np.int64)
        self._temperature_C = np.zeros(slots, np.float32)
        self._top_p_C = np.ones(slots, np.float64)
        self._uniform_ST = np.zeros((slots, length))
        self._stops_SV = np.zeros((slots, vocabulary), bool)
        self._constraints: dict[int, ConstraintState] = {}  # by slot, of the sequences that have one

    @property
    def free(self) -> int:
        """Slots that hold no sequence."""
        return len(self._occupied_C) - int(np.count_nonzero(self._occupied_C))

    @property
    def cache_used(self) -> float:
        """The share of the key-value cache that the sequences in slots fill."""
        lengths_C = self._runner.lengths
        return float(lengths_C[self._occupied_C].sum() / (len(lengths_C) * self._runner.max_length))

    @property
    def decoding(self) -> list[int]:
        """Slots that the next `step` advances."""
        slots: list[int] = np.flatnonzero(self._decoding_C).tolist()
        return slots

    @property
    def reading(self) -> list[int]:
        """Slots of the prompt that the next `read_prompt` continues; empty when all prompts are computed."""
        return self._reading[0][1].copy() if self._reading else []

    def admit(self, prompt: Prompt, params: SamplingParams, sequences: Sequence[int] = (0,)) -> list[int]:
        """Give free slots to sequences of one prompt, at most `free` of them, and return the slots.

        The lowest ones are taken, so that the range of a decode step stays narrow. sequences: their numbers to the
        seed. A prompt that some slot still begins with is copied; any other is computed by `read_prompt`.
        """
        slots: list[int] = np.flatnonzero(~self._occupied_C)[: len(sequences)].tolist()
        assert len(slots) == len(sequences), "more sequences than free slots"
        holder = next((slot for slot, held in enumerate(self._held) if held is prompt), None)
        if prompt.logits_V is not None and holder is not None:
            self._copy(prompt, holder, slots)
        else:
            prompt.logits_V = None
            self._runner.lengths[slots] = 0
        limit = min(params.max_tokens, self._runner.max_length - len(prompt.tokens))
        self._occupied_C[slots] = True
        self._sequence_C[slots] = sequences
        self._produced_C[slots] = 0
        self._limit_C[slots] = limit
        self._temperature_C[slots] = params.temperature
        self._top_p_C[slots] = params.top_p
        self._stops_SV[slots] = False
        self._stops_SV[np.ix_(slots, params.stop)] = True
        for slot, sequence in zip(slots, sequences, strict=True):
            self._held[slot] = prompt
            if params.constraint is not None:
                self._constraints[slot] = params.constraint.start()
            if params.temperature > 0:
                self._uniform_ST[slot, :limit] = uniform_draws(params.seed, sequence, limit)
        self._reading.append((prompt, slots.copy()))
        return slots

    def read_prompt(self, max_tokens: int | None = None) -> tuple[int, Drawn | None]:
        """Compute the next tokens of the prompt that was admitted first, all or `max_tokens` of them.

        Returns how many it computed, and the first tokens of its sequences once it is whole. Raises
        SlotConstraintError, see there.
        """
        prompt, slots = self._reading[0]
        count = 0
        if prompt.logits_V is None:
            done = int(self._runner.lengths[slots[0]])
            part = prompt.tokens[done : None if max_tokens is None else done + max_tokens]
            logits_V = self._runner.prefill(slots[0], part, start=done)
            count = len(part)
            if done + count < len(prompt.tokens):
                return count, None
            prompt.logits_V = logits_V.copy()
            self._copy(prompt, slots[0], slots)
        slots_B = np.array(slots)
        allowed = self._allowed(slots_B)
        self._reading.popleft()
        self._decoding_C[slots] = True
        logits_BV = np.broadcast_to(prompt.logits_V, (len(slots), len(prompt.logits_V)))
        return count, self._draw(slots_B, logits_BV, allowed)

    def step(self) -> Drawn:
        """One token for every sequence whose prompt is computed: a step of the narrowest range that holds them all.

        Raises SlotConstraintError, see there.
        """
        slots = np.flatnonzero(self._decoding_C)
        allowed = self._allowed(slots)
        first, end = int(slots[0]), int(slots[-1]) + 1
        logits_BV = self._runner.decode(first, self._next_C[first:end], self._decoding_C[first:end])
        return self._draw(slots, logits_BV if len(slots) == end - first else logits_BV[slots - first], allowed)

    def release(self, slot: int) -> None:
        """End a slot's sequence before its time. What the slot holds stays until the next prompt comes."""
        self._occupied_C[slot] = self._decoding_C[slot] = False
        self._constraints.pop(slot, None)
        for _, slots in self._reading:
            if slot in slots:
                slots.remove(slot)
        self._reading = deque(entry for entry in self._reading if entry[1])

    def compact_slots(self) -> None:
        """Move the last sequences into the gaps: every later step then has fewer idle rows. All must be decoding.

        A move costs about what two steps of a row cost, so it pays when nobody waits for the gaps.
        """
        assert not self._reading
        count = int(np.count_nonzero(self._occupied_C))
        gaps = np.flatnonzero(~self._occupied_C[:count])
        if not len(gaps):
            return
        occupied = np.flatnonzero(self._occupied_C)
        for target, source in zip(gaps.tolist(), occupied[-len(gaps) :].tolist(), strict=True):
            self._runner.copy_prefix(source, [target], int(self._runner.lengths[source]))
            self._held[target] = self._held[source]
            if source in self._constraints:
                self._constraints[target] = self._constraints.pop(source)
            for state in (
                self._occupied_C,
                self._decoding_C,
                self._sequence_C,
                self._produced_C,
                self._limit_C,
                self._next_C,
                self._temperature_C,
                self._top_p_C,
                self._uniform_ST,
                self._stops_SV,
            ):
                state[target] = state[source]
            self.release(source)

    def _copy(self, prompt: Prompt, source: int, slots: Sequence[int]) -> None:
        """Make `slots` hold the prompt and nothing else; `source`, which may be one of them, begins with it."""
        length = len(prompt.tokens)
        if targets := [slot for slot in slots if slot != source]:
            self._runner.copy_prefix(source, targets, length)
        self._runner.lengths[list(slots)] = length

    def _allowed(self, slots: np.ndarray) -> dict[int, np.ndarray]:
        """What the constraints of slots allow next, bits by row; rows of other slots are left out."""
        allowed: dict[int, np.ndarray] = {}
        for row, slot in enumerate(slots.tolist() if self._constraints else ()):
            if (constraint := self._constraints.get(slot)) is not None:
                try:
                    allowed[row] = constraint.allowed()
                except ConstraintError as error:
                    raise SlotConstraintError(slot, str(error)) from error
        return allowed

    def _draw(self, slots: np.ndarray, logits_BV: np.ndarray, allowed: Mapping[int, np.ndarray]) -> Drawn:
        """Choose each slot's next token, and free the slots whose sequences end with it."""
        logits_BV = logits_BV[:, : self._runner.vocab_size]
        if allowed:
            logits_BV = _masked(logits_BV, allowed)
        positions, top_p_B = self._produced_C[slots], self._top_p_C[slots]
        cut = np.count_nonzero(top_p_B < 1)  # `any` takes ten times as long over so few
        tokens, logprobs = choose(
            logits_BV,
            self._temperature_C[slots],
            self._uniform_ST[slots, positions],
            top_p_B=top_p_B if cut else None,
        )
        self._next_C[slots] = tokens
        self._produced_C[slots] = positions + 1
        for row in allowed:
            self._constraints[int(slots[row])].accept(int(tokens[row]))
        stopped = self._stops_SV[slots, tokens]
        ended = stopped | (positions + 1 >= self._limit_C[slots])
        if np.count_nonzero(ended):
            freed = slots[ended]
            self._occupied_C[freed] = self._decoding_C[freed] = False
            for slot in freed.tolist() if self._constraints else ():
                self._constraints.pop(slot, None)
        return Drawn(slots, self._sequence_C[slots], positions, tokens, logprobs, stopped, ended)


def _masked(logits_BV: np.ndarray, allowed: Mapping[int, np.ndarray]) -> np.ndarray:
    """A copy in which the tokens that a row may not draw have no probability. allowed: bits, by row."""
    masked_BV = logits_BV.copy()
    for row, bits in allowed.items():
        bias_V = _BIAS_OF_BYTE.take(bits, axis=0).reshape(-1)[: masked_BV.shape[1]]
        masked_BV[row, : len(bias_V)] += bias_V
        masked_BV[row, len(bias_V) :] = -np.inf
    return masked_BV
