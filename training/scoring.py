"""What a network gives to the scored tokens of trees while nothing trains: log-probabilities of the reference of DPO
and of KL penalties, and what a critic expects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from twinloop.models.decoder import Decoder
from twinloop.training.packing import pack
from twinloop.training.reproducible import reproducible
from twinloop.training.tree import Segment, Tree, TreeBatch, collate, scored_logprobs

ROWS_AT_ONCE = 16


def attach_reference(
    model: Decoder, trees: Sequence[Tree], *, seq_len: int, temperature: float = 1.0, device: str = "cpu"
) -> list[Tree]:
    """The same trees, each with its own log-probabilities under `model`, the frozen reference.

    They are part of the tree from then on: no shuffling, packing or partial batch can separate them.
    """
    values = tree_logprobs(model, trees, seq_len=seq_len, temperature=temperature, device=device)
    return [_with_reference(tree, logprobs) for tree, logprobs in zip(trees, values, strict=True)]


def _with_reference(tree: Tree, logprobs: np.ndarray) -> Tree:
    segments: list[Segment] = []
    for segment in tree.segments:
        own, logprobs = np.split(logprobs, [segment.num_scored])
        segments.append(replace(segment, reference_logprobs=own))
    return replace(tree, segments=tuple(segments))


def tree_logprobs(
    model: Decoder, trees: Sequence[Tree], *, seq_len: int, temperature: float = 1.0, device: str = "cpu"
) -> list[np.ndarray]:
    """For each tree, in the order given, the log-probabilities [scored tokens] float32 of its scored tokens."""
    model.to(device)
    score = partial(scored_logprobs, model)
    return scores_by_tree(score, trees, seq_len=seq_len, temperature=temperature, device=device)


@torch.no_grad()
def scores_by_tree(
    score: Callable[[TreeBatch], Tensor],
    trees: Sequence[Tree],
    *,
    seq_len: int,
    temperature: float = 1.0,
    device: str = "cpu",
) -> list[np.ndarray]:
    """For each tree, in the order given, what `score` gives to its scored tokens [scored tokens], float32."""
    target = torch.device(device)
    place = {id(tree): index for index, tree in enumerate(trees)}
    values: list[np.ndarray] = [np.zeros(0, dtype=np.float32)] * len(trees)
    rows = pack(trees, seq_len).rows
    for start in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[start : start + ROWS_AT_ONCE]
        with reproducible(target), torch.autocast(target.type, torch.bfloat16, enabled=target.type == "cuda"):
            batch = collate(some, seq_len, temperature=temperature).to(target)
            scores = score(batch).cpu().numpy()
        for tree in (tree for row in some for tree in row):
            own, scores = np.split(scores, [tree.num_scored])
            values[place[id(tree)]] = own
    return values
