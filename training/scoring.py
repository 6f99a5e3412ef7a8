"""What a network gives to trees while nothing trains. To scored tokens: log-probabilities of the reference of DPO and
of KL penalties, a teacher's probabilities, what a critic expects. To sequences: the scores of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from twinloop.models.decoder import Decoder
from twinloop.training.packing import pack
from twinloop.training.reproducible import reproducible
from twinloop.training.tree import Segment, Tree, TreeBatch, collate, scored_logprobs

ROWS_AT_ONCE = 16


def attach_reference(
    model: Decoder,
    trees: Sequence[Tree],
    *,
    seq_len: int,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    device: str = "cpu",
) -> list[Tree]:
    """The same trees, each with its own log-probabilities under `model`, the frozen reference. temperature, vocab_size:
    as in `TreeBatch`.

    They are part of the tree from then on: no shuffling, packing or partial batch can separate them.
    """
    values = tree_logprobs(model, trees, seq_len=seq_len, temperature=temperature, vocab_size=vocab_size, device=device)
    return [with_values(tree, "reference_logprobs", own) for tree, own in zip(trees, values, strict=True)]


def with_values(tree: Tree, field: str, values: np.ndarray) -> Tree:
    """The same tree, whose segments have their part of the values [scored tokens] in this field."""
    segments: list[Segment] = []
    for segment in tree.segments:
        own, values = np.split(values, [segment.num_scored])
        change: dict[str, Any] = {field: own}
        segments.append(replace(segment, **change))
    return replace(tree, segments=tuple(segments))


def tree_logprobs(
    model: Decoder,
    trees: Sequence[Tree],
    *,
    seq_len: int,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    device: str = "cpu",
) -> list[np.ndarray]:
    """For each tree, in the order given, the log-probabilities [scored tokens] float32 of its scored tokens."""
    model.to(device)

    def logprobs(batch: TreeBatch) -> np.ndarray:
        found: np.ndarray = scored_logprobs(model, batch).cpu().numpy()
        return found

    return tree_values(logprobs, trees, seq_len=seq_len, temperature=temperature, vocab_size=vocab_size, device=device)


@torch.no_grad()
def tree_values(
    values: Callable[[TreeBatch], np.ndarray],
    trees: Sequence[Tree],
    *,
    seq_len: int,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    device: str = "cpu",
    count: Callable[[Tree], int] = attrgetter("num_scored"),
) -> list[np.ndarray]:
    """For each tree, in the order given, its values, as `values` gives them for a batch on the device. count: how many
    values a tree has: by default one a scored token."""
    target = torch.device(device)
    place = {id(tree): index for index, tree in enumerate(trees)}
    found: list[np.ndarray] = [np.zeros(0, dtype=np.float32)] * len(trees)
    rows = pack(trees, seq_len).rows
    for start in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[start : start + ROWS_AT_ONCE]
        with reproducible(target), torch.autocast(target.type, torch.bfloat16, enabled=target.type == "cuda"):
            batched = values(collate(some, seq_len, temperature=temperature, vocab_size=vocab_size).to(target))
        for tree in (tree for row in some for tree in row):
            own, batched = np.split(batched, [count(tree)])
            found[place[id(tree)]] = own
    return found
