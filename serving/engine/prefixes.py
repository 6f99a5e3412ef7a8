"""Prompts that begin like what a slot holds already: its keys and values are taken over instead of computed.

A slot keeps what it held until it is needed, so the slots are the cache: nothing is stored beside them, and no prompt
meets what another model or another adapter computed. Keys and values of a position depend on the tokens up to it alone,
whatever came after them, and however wide a layer's window is: a slot keeps every position.

Shapes: letters as in `models.shapes`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from twinloop.serving.engine.adapters import LoadedAdapter
from twinloop.serving.engine.runner import ModelRunner

SHORTEST = 16
"""Tokens that are worth a copy. Fewer, such as those with which a chat template begins, are computed as fast."""
COPIED_AS_COMPUTED = 32
"""Tokens that are copied in the time in which one is computed, or more."""


class PrefixCache:
    """What the free slots of a runner hold, kept by last use."""

    def __init__(self, runner: ModelRunner):
        self._runner = runner
        self._used_C = np.zeros(runner.slots, np.int64)  # number of the last prompt while which a slot was in use
        self._prompts = 0

    def place(
        self,
        tokens: Sequence[int],
        free_C: np.ndarray,
        shortest: int = SHORTEST,
        *,
        adapter: LoadedAdapter,
        empty: bool = False,
    ) -> tuple[int, int]:
        """Make the lowest free slot begin with as many of the tokens as any slot holds of this adapter, and with
        nothing else.

        The lowest, so that the range of a decode step stays narrow. What it held, if it was used later than what
        another free slot holds, goes on in that one. Returns the slot and its length: 0, or at least `shortest`.
        empty: it is to hold nothing: it gets the tokens later from another slot, or computes all of them.
        """
        runner = self._runner
        self._prompts += 1
        self._used_C[~free_C] = self._prompts
        free = np.flatnonzero(free_C)
        slot = int(free[0])
        common_C = self._common(np.array(tokens, np.int64), shortest, adapter)
        source = slot if common_C[slot] == common_C.max() else int(common_C.argmax())
        length = int(common_C[source])
        # What is a beginning of the prompt, or the same prompt with another answer, need not be held twice.
        contained_C = common_C == np.minimum(runner.lengths, max(len(tokens), shortest))
        if free_C[source] and contained_C[source]:
            outdated = source
        else:
            outdated = int(free[np.where(contained_C, 0, self._used_C)[free].argmin()])
        if outdated != slot:
            if outdated == source:
                runner.swap(slot, source)
            else:
                runner.copy_prefix(slot, [outdated], int(runner.lengths[slot]))
            self._used_C[outdated] = self._used_C[slot]
        if empty:
            length = 0
        elif source not in (slot, outdated):
            runner.copy_prefix(source, [slot], length)
            self._used_C[source] = self._prompts
        runner.hold([slot], length, adapter)
        self._used_C[slot] = self._prompts
        return slot, length

    def _common(self, tokens_L: np.ndarray, shortest: int, adapter: LoadedAdapter) -> np.ndarray:
        """With how many of the tokens each slot begins, int [C]; 0 where they are fewer than `shortest`, or were read
        with another adapter."""
        equal_CL = self._runner.tokens_CM[:, : len(tokens_L)] == tokens_L
        common_C = np.minimum(np.logical_and.accumulate(equal_CL, axis=1).sum(axis=1), self._runner.lengths)
        return np.where((common_C < shortest) | (self._runner.adapters_C != adapter.number), 0, common_C)
