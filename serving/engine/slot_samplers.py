"""The samplers of the sequences in slots, and when their constraints are asked: beside the model's step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np

from twinloop.serving.engine.sampling import AnswerSampler, ConstraintError

_BESIDE = 2**15
"""Tokens of the vocabularies of all rows with a constraint, from which on their masks take longer than to have another
thread compute them."""


class SlotConstraintError(ConstraintError):
    """The constraint of the sequence in `slot` failed. The step was not taken: the others lose nothing by it."""

    def __init__(self, slot: int, reason: str):
        super().__init__(reason)
        self.slot = slot


class SlotSamplers:
    """By slot, of the sequences that need one."""

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size
        self._of_slot: dict[int, AnswerSampler] = {}

    def put(self, slot: int, sampler: AnswerSampler) -> None:
        self._of_slot[slot] = sampler

    def get(self, slot: int) -> AnswerSampler | None:
        return self._of_slot.get(slot)

    def move(self, source: int, target: int) -> None:
        if source in self._of_slot:
            self._of_slot[target] = self._of_slot.pop(source)

    def drop(self, slots: Sequence[int] | np.ndarray) -> None:
        for slot in map(int, slots) if self._of_slot else ():
            self._of_slot.pop(slot, None)

    def prepared(self, slots: np.ndarray) -> Mapping[int, AnswerSampler]:
        """Those of these slots, by row, ready for their next draw. Raises SlotConstraintError."""
        samplers = self._by_row(slots)
        _prepare(slots, samplers)
        return samplers

    def prepare_beside(self, slots: np.ndarray) -> Callable[[], Mapping[int, AnswerSampler]]:
        """`prepared`, begun now and waited for by the call of what is returned, which raises as that; so does this
        one, where masks are so small that they are computed at once. Nothing else may touch the samplers meanwhile."""
        samplers = self._by_row(slots)
        if sum(sampler.constrained for sampler in samplers.values()) * self._vocab_size < _BESIDE:
            _prepare(slots, samplers)
            return lambda: samplers
        masks = self._thread.submit(_prepare, slots, samplers)

        def wait() -> Mapping[int, AnswerSampler]:
            masks.result()
            return samplers

        return wait

    def _by_row(self, slots: np.ndarray) -> dict[int, AnswerSampler]:
        if not self._of_slot:
            return {}
        return {row: self._of_slot[slot] for row, slot in enumerate(slots.tolist()) if slot in self._of_slot}

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="masks")


def _prepare(slots: np.ndarray, samplers: Mapping[int, AnswerSampler]) -> None:
    for row, sampler in samplers.items():
        try:
            sampler.prepare()
        except ConstraintError as error:
            raise SlotConstraintError(int(slots[row]), str(error)) from error
