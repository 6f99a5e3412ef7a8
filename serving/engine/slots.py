"""The sequences in an engine's slots, from their prompts to their last tokens.

The core of both drivers: `Engine.generate` (rollouts, evaluation) and `Scheduler` (serving) decide who gets a slot and
when; what happens in it is decided here. What a sequence draws depends on its seed, its number and the position alone.

Shapes: letters as in `models.shapes`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from twinloop.serving.engine.adapters import LoadedAdapter
from twinloop.serving.engine.prefixes import COPIED_AS_COMPUTED, SHORTEST, PrefixCache
from twinloop.serving.engine.runner import ModelRunner
from twinloop.serving.engine.sampling import (
    AnswerSampler,
    SamplingParams,
    TokenReport,
    draw,
    report_token,
    uniform_draws,
)
from twinloop.serving.engine.slot_samplers import SlotConstraintError, SlotSamplers

FinishReason = Literal["stop", "length"]

_REPORTED_LOGITS = 2**22
"""Logits of a prompt whose tokens are reported that exist at once: 16 MiB, those of 85 tokens in a vocabulary of 49k.
They are computed for every token, where any other prompt has those of its last alone."""


@dataclass(eq=False)
class Prompt:
    """Token ids. Sequences that are admitted with the same object share its computation. adapter: what it is computed
    and answered with; None: the model's own. top_logprobs: report its tokens too, as `SamplingParams` has it."""

    tokens: Sequence[int]
    adapter: LoadedAdapter | None = None
    top_logprobs: int | None = None
    logits_V: np.ndarray | None = None
    """After the last token, once the prompt is computed."""
    cached_tokens: int | None = None
    """Those that a slot held already when the first sequences got theirs by `SlotBatch.admit_reusing`."""
    reports: list[TokenReport] = field(default_factory=list)
    """Of every token but the first, which nothing comes before, once the prompt is computed."""

    @property
    def unreported(self) -> bool:
        """Whether logits of its tokens are still wanted."""
        return self.top_logprobs is not None and len(self.reports) < len(self.tokens) - 1


class Drawn(NamedTuple):
    """The next token of some sequences, an array [B] each.

    positions: tokens that the answer had before. stopped: ended with one of its stop tokens; ended: for that reason or
    because the cache is full. Slots of ended sequences are free again. reports: by row, of the sequences whose
    parameters ask for them.
    """

    slots: np.ndarray
    sequences: np.ndarray
    positions: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray
    stopped: np.ndarray
    ended: np.ndarray
    reports: Mapping[int, TokenReport]


class PromptRead(NamedTuple):
    """A step of a prompt. computed: tokens; drawn: the first tokens of its sequences, once it is whole; cost: as many
    tokens are computed in the time that it took."""

    computed: int
    drawn: Drawn | None
    cost: int


class Alone(NamedTuple):
    """A sequence: tokens_L, of its prompt and answer; left: those that may still come; forced: by its constraint."""

    tokens_L: np.ndarray
    left: int
    forced: list[int]


class SlotBatch:
    """The slots of one runner, which it resets and then owns."""

    def __init__(self, runner: ModelRunner):
        runner.reset()
        self._runner = runner
        slots, length, vocabulary = runner.slots, runner.max_length, runner.vocab_size
        self._reading: deque[tuple[Prompt, list[int]]] = deque()
        self._prefixes = PrefixCache(runner)
        self._held: list[Prompt | None] = [None] * slots  # what a slot begins with, also after its sequence has ended
        self._occupied_C = np.zeros(slots, bool)
        self._decoding_C = np.zeros(slots, bool)  # occupied, and the prompt is computed
        self._sequence_C = np.zeros(slots, np.int64)
        self._produced_C = np.zeros(slots, np.int64)
        self._limit_C = np.zeros(slots, np.int64)
        self._next_C = np.zeros(slots, np.int64)
        self._temperature_C = np.zeros(slots, np.float32)
        self._uniform_ST = np.zeros((slots, length))
        self._stops_SV = np.zeros((slots, vocabulary), bool)
        self._samplers = SlotSamplers(vocabulary)

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
        slots: list[int] = self._decoding_C.nonzero()[0].tolist()
        return slots

    @property
    def reading(self) -> list[int]:
        """Slots of the prompt that the next `read_prompt` continues; empty when all prompts are computed."""
        return self._reading[0][1].copy() if self._reading else []

    def admit(self, prompt: Prompt, params: SamplingParams, sequences: Sequence[int] = (0,)) -> list[int]:
        """Give free slots to sequences of one prompt, at most `free` of them, and return the slots.

        The lowest ones are taken, so that the range of a decode step stays narrow. sequences: their numbers to the
        seed. A prompt that some slot still begins with is copied; any other is computed by `read_prompt`, once for all
        that are admitted with it before it is whole.
        """
        slots: list[int] = np.flatnonzero(~self._occupied_C)[: len(sequences)].tolist()
        assert len(slots) == len(sequences), "more sequences than free slots"
        holder = self._holder(prompt)
        if prompt.logits_V is not None and holder is not None:
            self._copy(prompt, holder, slots)
        else:
            prompt.logits_V = None
            self._runner.hold(slots, 0, prompt.adapter or self._runner.own)
        self._occupy(slots, prompt, params, sequences)
        return slots

    def admit_reusing(self, prompt: Prompt, params: SamplingParams, sequences: Sequence[int] = (0,)) -> list[int]:
        """`admit` for a prompt that goes on from the longest beginning that any slot holds of it.

        `read_prompt` need not compute that, nor anything for sequences that come once the prompt is computed. So
        computed, logits differ by the rounding of a prompt that is read in other pieces. One whose tokens are to be
        reported is computed from its first token on: a slot holds keys and values, and no logits.
        """
        assert len(sequences) <= self.free, "more sequences than free slots"
        self._held = [None] * len(self._held)  # what slots hold may move
        # The last token is computed for its logits, where they are not known.
        whole = prompt.logits_V is not None
        tokens, shortest = (prompt.tokens, len(prompt.tokens)) if whole else (prompt.tokens[:-1], SHORTEST)
        adapter = prompt.adapter or self._runner.own
        free_C = ~self._occupied_C
        slots: list[int] = []
        for number in range(len(sequences)):
            empty = number > 0 or prompt.unreported
            slot, _ = self._prefixes.place(tokens, free_C, shortest, adapter=adapter, empty=empty)
            free_C[slot] = False
            slots.append(slot)
        length = int(self._runner.lengths[slots[0]])
        if prompt.cached_tokens is None:
            prompt.cached_tokens = length
        if length == len(prompt.tokens):
            self._copy(prompt, slots[0], slots)
        else:
            prompt.logits_V = None
        self._occupy(slots, prompt, params, sequences)
        return slots

    def _occupy(self, slots: list[int], prompt: Prompt, params: SamplingParams, sequences: Sequence[int]) -> None:
        # Nothing is occupied where one of these fails.
        samplers = [AnswerSampler.if_needed(params, prompt.tokens) for _ in slots]
        self._stops_SV[slots] = bool(self._runner.config.labels)  # a label is a whole answer
        self._stops_SV[np.ix_(slots, params.stop)] = True
        limit = min(params.max_tokens, self._runner.max_length - len(prompt.tokens))
        self._occupied_C[slots] = True
        self._sequence_C[slots] = sequences
        self._produced_C[slots] = 0
        self._limit_C[slots] = limit
        self._temperature_C[slots] = params.temperature
        for slot, sequence, sampler in zip(slots, sequences, samplers, strict=True):
            self._held[slot] = prompt
            if sampler is not None:
                self._samplers.put(slot, sampler)
            if params.temperature > 0:
                self._uniform_ST[slot, :limit] = uniform_draws(params.seed, sequence, limit)
        for reading, readers in self._reading:
            if reading is prompt:
                readers += slots
                return
        self._reading.append((prompt, slots.copy()))

    def read_prompt(self, max_tokens: int | None = None) -> PromptRead:
        """Compute the next tokens of the prompt that was admitted first, all or `max_tokens` of them. Raises
        SlotConstraintError, see there."""
        prompt, slots = self._reading[0]
        count = 0
        if prompt.logits_V is None:
            count, logits_V = self._read(prompt, slots[0], max_tokens)
            if self._runner.lengths[slots[0]] < len(prompt.tokens):
                return PromptRead(count, None, max(count, SHORTEST))
            prompt.logits_V = logits_V.copy()
            self._copy(prompt, slots[0], slots)
        slots_B = np.array(slots)
        samplers = self._samplers.prepared(slots_B)
        self._reading.popleft()
        self._decoding_C[slots] = True
        logits_BV = np.broadcast_to(prompt.logits_V, (len(slots), len(prompt.logits_V)))
        copied = (prompt.cached_tokens or 0) + (len(slots) - 1) * len(prompt.tokens)
        cost = max(count, SHORTEST) + copied // COPIED_AS_COMPUTED
        return PromptRead(count, self._draw(slots_B, logits_BV, samplers), cost)

    def _read(self, prompt: Prompt, slot: int, max_tokens: int | None) -> tuple[int, np.ndarray]:
        """Compute the next tokens of a prompt. Returns how many, and the logits after the last of them, a view."""
        done = int(self._runner.lengths[slot])
        part = prompt.tokens[done : None if max_tokens is None else done + max_tokens]
        if not prompt.unreported:
            return len(part), self._runner.prefill(slot, part, start=done)
        assert prompt.top_logprobs is not None
        part = part[: max(1, _REPORTED_LOGITS // self._runner.config.vocab_size)]
        logits_LV = self._runner.extend(slot, part)
        following = prompt.tokens[done + 1 : done + 1 + len(part)]
        prompt.reports[done : done + len(part)] = [
            report_token(logits_V[: self._runner.vocab_size], token, prompt.top_logprobs)
            for logits_V, token in zip(logits_LV, following, strict=False)  # nothing follows the last one
        ]
        return len(part), logits_LV[-1]

    def step(self) -> Drawn:
        """One token for every sequence whose prompt is computed: a step of the narrowest range that holds them all.

        Raises SlotConstraintError, see there.
        """
        slots = self._decoding_C.nonzero()[0]
        prepared = self._samplers.prepare_beside(slots)
        first, end = int(slots[0]), int(slots[-1]) + 1
        logits_BV = self._runner.decode(first, self._next_C[first:end], self._decoding_C[first:end])
        try:
            samplers = prepared()
        except SlotConstraintError:
            self._runner.lengths[slots] -= 1  # what the step wrote lies behind the end of each slot again
            raise
        return self._draw(slots, logits_BV if len(slots) == end - first else logits_BV[slots - first], samplers)

    @property
    def greedy_alone(self) -> bool:
        """Whether the only sequence that decodes is greedy."""
        (slot,) = self.decoding
        return bool(self._temperature_C[slot] == 0)

    def alone(self) -> Alone:
        """The only sequence that decodes."""
        (slot,) = self.decoding
        read_L = self._runner.tokens_CM[slot, : self._runner.lengths[slot]]
        sampler = self._samplers.get(slot)
        return Alone(
            tokens_L=np.append(read_L, self._next_C[slot]),
            left=int(self._limit_C[slot] - self._produced_C[slot]),
            forced=sampler.forced() if sampler is not None else [],
        )

    def step_along(self, guess: Sequence[int]) -> list[Drawn]:
        """The tokens that `step` would draw one by one for a sequence alone, from one pass, while they are those of a
        guess; and the one after. guess: shorter than what is left of the answer. Raises SlotConstraintError, see there.
        """
        slots = self._decoding_C.nonzero()[0]
        samplers = self._samplers.prepared(slots)
        slot, drawn = int(slots[0]), list[Drawn]()
        length = int(self._runner.lengths[slot])
        logits_LV = self._runner.extend(slot, [self._next_C[slot], *guess])
        for logits_V, expected in zip(logits_LV, [*guess, -1], strict=True):
            if drawn:
                try:
                    samplers = self._samplers.prepared(slots)
                except SlotConstraintError:
                    break  # the next step raises it
            drawn.append(self._draw(slots, logits_V[None], samplers))
            if drawn[-1].ended[0] or drawn[-1].tokens[0] != expected:
                break
        self._runner.lengths[slot] = length + len(drawn)
        return drawn

    def release(self, slot: int) -> None:
        """End a slot's sequence before its time. What the slot holds stays until the next prompt comes."""
        self._occupied_C[slot] = self._decoding_C[slot] = False
        self._samplers.drop([slot])
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
            self._samplers.move(source, target)
            for state in (
                self._occupied_C,
                self._decoding_C,
                self._sequence_C,
                self._produced_C,
                self._limit_C,
                self._next_C,
                self._temperature_C,
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

    def _holder(self, prompt: Prompt) -> int | None:
        """A slot that begins with the whole prompt."""
        for slot, held in enumerate(self._held):
            if held is prompt and self._runner.lengths[slot] >= len(prompt.tokens):
                return slot
        return None

    def _draw(self, slots: np.ndarray, logits_BV: np.ndarray, samplers: Mapping[int, AnswerSampler]) -> Drawn:
        """Choose each slot's next token, and free the slots whose sequences end with it."""
        logits_BV = logits_BV[:, : self._runner.vocab_size]
        positions = self._produced_C[slots]
        tokens, logprobs, reports = draw(
            logits_BV, self._temperature_C[slots], self._uniform_ST[slots, positions], samplers
        )
        self._next_C[slots] = tokens
        self._produced_C[slots] = positions + 1
        stopped = self._stops_SV[slots, tokens]
        ended = stopped | (positions + 1 >= self._limit_C[slots])
        if np.count_nonzero(ended):
            freed = slots[ended]
            self._occupied_C[freed] = self._decoding_C[freed] = False
            self._samplers.drop(freed)
        return Drawn(slots, self._sequence_C[slots], positions, tokens, logprobs, stopped, ended, reports)
