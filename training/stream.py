"""Where batches come from: a stream with a position that can be saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import numpy as np

from twinloop.common.errors import UserError
from twinloop.training.packing import Packing, Row, cut, pack
from twinloop.training.settings import EpochSettings
from twinloop.training.tree import Tree, TreeBatch, collate


@dataclass(frozen=True)
class Step:
    """What one optimizer step learns from. metrics: what the stream itself has to report (such as rewards). last: the
    stream ends with this step, though it had more."""

    micro_batches: list[TreeBatch]
    metrics: dict[str, float] = field(default_factory=dict)
    last: bool = False


class Batches(Protocol):
    """A stream of steps. After `restore(state())`, also in another process, it goes on with the same steps."""

    @property
    def total_steps(self) -> int: ...

    def next(self) -> Step: ...

    def state(self) -> dict[str, Any]:
        """The position, as JSON."""
        ...

    def restore(self, state: dict[str, Any]) -> None: ...


def micro_batches(
    rows: Sequence[Row],
    seq_len: int,
    micro_batch_size: int | None,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> list[TreeBatch]:
    """One step's rows as batches of at most micro_batch_size rows (None: one batch)."""
    size = micro_batch_size or max(1, len(rows))
    pieces = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [collate(piece, seq_len, temperature=temperature, vocab_size=vocab_size) for piece in pieces]


class BatchStream:
    """A fixed set of trees, in rows packed once; each epoch passes all rows in its own order.

    The last step of an epoch takes the rows that are left: none is dropped, and no step mixes two epochs.
    """

    def __init__(
        self,
        trees: Sequence[Tree],
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        epochs: int | None = None,
        steps: int | None = None,
        tokens: int | None = None,
        micro_batch_size: int | None = None,
    ):
        """Give one of epochs, steps and tokens: as many steps as take about so many tokens, padding not counted.

        micro_batch_size: rows that go through the network at once, to save memory.
        """
        if [epochs, steps, tokens].count(None) != 2:
            raise ValueError("give one of epochs, steps and tokens")
        if not trees:
            raise UserError("training data: no examples are left to train on; look at what validation quarantined")
        pieces = cut(trees, seq_len)  # before they are shuffled, so that an error names the caller's example
        shuffled = [pieces[index] for index in np.random.default_rng(seed).permutation(len(pieces))]
        self.packing: Packing = pack(shuffled, seq_len)
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.steps_per_epoch = -(-len(self.packing.rows) // batch_size)
        if tokens is not None:
            epochs_of_tokens = tokens / sum(piece.length for piece in pieces)
            steps = max(1, round(epochs_of_tokens * self.steps_per_epoch))
        self._total_steps = steps if steps is not None else self.steps_per_epoch * (epochs or 0)
        self._step = 0
        self._order: tuple[int, np.ndarray] | None = None

    @classmethod
    def of_epochs(cls, trees: Sequence[Tree], settings: EpochSettings, *, seed: int) -> Self:
        """As a stage's settings have it."""
        return cls(
            trees,
            seq_len=settings.seq_len,
            batch_size=settings.batch_size,
            micro_batch_size=settings.micro_batch_size,
            epochs=settings.epochs,
            seed=seed,
        )

    @property
    def total_steps(self) -> int:
        return self._total_steps

    def next(self) -> Step:
        epoch, index = divmod(self._step, self.steps_per_epoch)
        chosen = self._epoch_order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        self._step += 1
        rows = [self.packing.rows[row] for row in chosen]
        return Step(micro_batches(rows, self.packing.seq_len, self.micro_batch_size))

    def state(self) -> dict[str, Any]:
        return {"step": self._step}

    def restore(self, state: dict[str, Any]) -> None:
        self._step = state["step"]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.packing.rows))
        return self._order[1]
