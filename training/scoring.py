"""What a network gives to trees while nothing trains. To scored tokens: log-probabilities of the reference of DPO and
of KL penalties, a teacher's probabilities, what a critic expects. To sequences: the scores of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from twinloop.common.errors import UserError
from twinloop.models.decoder import Decoder
from twinloop.training.packing import pack, row_length
from twinloop.training.reproducible import reproducible
from twinloop.training.runtime import Runtime
from twinloop.training.settings import RolloutSettings
from twinloop.training.tree import Segment, Tree, TreeBatch, collate, scored_logprobs

ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class Rows:
    """How trees are read: in rows of seq_len tokens, on this device, with the sampler's temperature and ids (see
    `TreeBatch`)."""

    seq_len: int
    temperature: float = 1.0
    vocab_size: int | None = None
    device: str = "cpu"

    @classmethod
    def of(
        cls, prompts: Sequence[Sequence[int]], settings: RolloutSettings, runtime: Runtime, vocab_size: int | None
    ) -> Rows:
        """Rows into which any group of completions fits. Raises UserError where there are no prompts."""
        if not prompts:
            raise UserError("rollouts: there are no prompts; look at what validation quarantined")
        longest = max(len(prompt) for prompt in prompts) + settings.group_size * settings.max_new_tokens
        return cls(row_length(longest, runtime.device), settings.temperature, vocab_size, runtime.device)


def attach_reference(model: Decoder, trees: Sequence[Tree], rows: Rows) -> list[Tree]:
    """The same trees, each with its own log-probabilities under `model`, the frozen reference.

    They are part of the tree from then on: no shuffling, packing or partial batch can separate them.
    """
    values = tree_logprobs(model, trees, rows)
    return [with_values(tree, "reference_logprobs", own) for tree, own in zip(trees, values, strict=True)]


def with_values(tree: Tree, field: str, values: np.ndarray) -> Tree:
    """The same tree, whose segments have their part of the values [scored tokens] in this field."""
    segments: list[Segment] = []
    for segment in tree.segments:
        own, values = np.split(values, [segment.num_scored])
        change: dict[str, Any] = {field: own}
        segments.append(replace(segment, **change))
    return replace(tree, segments=tuple(segments))


def tree_logprobs(model: Decoder, trees: Sequence[Tree], rows: Rows) -> list[np.ndarray]:
    """For each tree, in the order given, the log-probabilities [scored tokens] float32 of its scored tokens."""
    model.to(rows.device)

    def logprobs(batch: TreeBatch) -> np.ndarray:
        found: np.ndarray = scored_logprobs(model, batch).cpu().numpy()
        return found

    return tree_values(logprobs, trees, rows)


@torch.no_grad()
def tree_values(
    values: Callable[[TreeBatch], np.ndarray],
    trees: Sequence[Tree],
    rows: Rows,
    *,
    count: Callable[[Tree], int] = attrgetter("num_scored"),
) -> list[np.ndarray]:
    """For each tree, in the order given, its values, as `values` gives them for a batch on the device. count: how many
    values a tree has: by default one a scored token."""
    target = torch.device(rows.device)
    place = {id(tree): index for index, tree in enumerate(trees)}
    found: list[np.ndarray] = [np.zeros(0, dtype=np.float32)] * len(trees)
    packed = pack(trees, rows.seq_len).rows
    for start in range(0, len(packed), ROWS_AT_ONCE):
        some = packed[start : start + ROWS_AT_ONCE]
        with reproducible(target), torch.autocast(target.type, torch.bfloat16, enabled=target.type == "cuda"):
            batch = collate(some, rows.seq_len, temperature=rows.temperature, vocab_size=rows.vocab_size)
            batched = values(batch.to(target))
        for tree in (tree for row in some for tree in row):
            own, batched = np.split(batched, [count(tree)])
            found[place[id(tree)]] = own
    return found
