"""Many prompts at once through the slots of one model, for rollouts and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from twinloop.common.errors import UserError
from twinloop.serving.engine.adapters import LoadedAdapter
from twinloop.serving.engine.runner import ModelRunner
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.serving.engine.slots import Drawn, FinishReason, Prompt, SlotBatch


@dataclass(frozen=True)
class Completion:
    """tokens: the answer, the stop token included where it ended with one. logprobs: natural, one a token, under the
    distribution drawn from (plain softmax at temperature 0)."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason


class Engine(ModelRunner):
    """A model that completes prompts. While a `Scheduler` serves it, the scheduler owns it."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        group: int = 1,
        first_sequence: int = 0,
        adapter: LoadedAdapter | None = None,
    ) -> list[Completion]:
        """Complete every prompt `group` times; completion i of prompt p is number p * group + i of the result.

        first_sequence: the number of the first completion to the seed, where several engines share the work of one
        call. adapter: None for the model's own.

        Synchronous, and takes all slots: a slot is filled again as soon as its sequence ends. The result is a function
        of weights, arguments and number of slots alone, bit for bit (with a seed, or at temperature 0). Raises
        UserError for a prompt too long to be answered.
        """
        if group < 1:
            raise UserError(f"generate: group is {group}; it must be at least 1")
        for tokens in prompts:
            self.check_prompt(tokens)
        batch = SlotBatch(self)
        answers = _Answers(first_sequence, len(prompts) * group, min(params.max_tokens, self.max_length - 1))
        for index, tokens in enumerate(prompts):
            prompt = Prompt(tokens, adapter)
            members = range(first_sequence + index * group, first_sequence + (index + 1) * group)
            while members:
                if free := batch.free:
                    batch.admit(prompt, params, members[:free])
                    members = members[free:]
                    answers.add(batch.read_prompt().drawn)
                else:
                    answers.add(batch.step())
        while batch.free < self.slots:
            batch.compact_slots()
            answers.add(batch.step())
        return answers.completions()


class _Answers:
    """The tokens drawn so far, by sequence. Shapes: letters as in `models.shapes`."""

    def __init__(self, first_sequence: int, count: int, longest: int):
        self._first = first_sequence
        self._tokens_ST = np.empty((count, longest), np.int64)
        self._logprobs_ST = np.empty((count, longest), np.float32)
        self._length_S = np.zeros(count, np.int64)
        self._stopped_S = np.zeros(count, bool)

    def add(self, drawn: Drawn | None) -> None:
        assert drawn is not None, "a prompt is read whole"
        rows = drawn.sequences - self._first
        self._tokens_ST[rows, drawn.positions] = drawn.tokens
        self._logprobs_ST[rows, drawn.positions] = drawn.logprobs
        if np.count_nonzero(drawn.ended):
            self._length_S[rows] = drawn.positions + 1
            self._stopped_S[rows] = drawn.stopped

    def completions(self) -> list[Completion]:
        return [
            Completion(tokens_T[:length].tolist(), logprobs_T[:length].tolist(), "stop" if stopped else "length")
            for tokens_T, logprobs_T, length, stopped in zip(
                self._tokens_ST, self._logprobs_ST, self._length_S, self._stopped_S, strict=True
            )
        ]
