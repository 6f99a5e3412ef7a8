"""Networks with a head: of labels or of one score, on a text's last token, in the place of the vocabulary's logits.

What `transformers` calls sequence classification: the same tensors by the same names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from torch import nn

from twinloop.common.errors import UserError
from twinloop.models.decoder import Decoder
from twinloop.models.directory import load_config
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.training.scoring import Rows, tree_values
from twinloop.training.tree import Tree, TreeBatch, sequence_scores
from twinloop.training.weights import load_decoder

REWARD = ("reward",)
"""The one label of a reward model."""


def attach_head(
    model: Decoder,
    labels: Sequence[str],
    tokenizer: ChatTokenizer,
    ends: Iterable[int],
    *,
    words: Sequence[int] | None = None,
) -> None:
    """Give the network a head for these labels in the place of its vocabulary's logits, which starts at 0. A network
    that has a head for just these labels keeps it. Either trains, also where an adapter has frozen all else.

    ends: the tokens with which texts end. None of them may be the padding, which `transformers` looks for to find a
    text's last token. words: a token for each label; the head then starts as the vocabulary's rows of these. Raises
    UserError where the tokenizer has no other special token, and for words without a vocabulary to take them from.
    """
    if model.config.labels != tuple(labels):
        rows = None if words is None else _vocabulary_rows(model, words)
        for name in ("lm_head", "score"):
            if hasattr(model, name):
                delattr(model, name)
        device = model.model.embed_tokens.weight.device
        model.score = nn.Linear(model.config.hidden_size, len(labels), bias=False, device=device)
        with torch.no_grad():
            model.score.weight.copy_(torch.zeros_like(model.score.weight) if rows is None else rows)
    model.score.requires_grad_(True)
    padding = _padding(model.config.pad_token_id, tokenizer, {*ends, *tokenizer.stop_ids})
    changes = {"labels": tuple(labels), "tie_word_embeddings": True, "pad_token_id": padding}
    model.config = model.config.model_copy(update=changes)


def _padding(pad_id: int | None, tokenizer: ChatTokenizer, ends: set[int]) -> int:
    possible = [id for id in (pad_id, *sorted(tokenizer.special_ids)) if id is not None and id not in ends]
    if not possible:
        raise UserError("tokenizer: every special token may end a text, and none is left to pad with; add one to it")
    return possible[0]


def _vocabulary_rows(model: Decoder, ids: Sequence[int]) -> torch.Tensor:
    """Copies [labels, D] of what the vocabulary's logits of these tokens are made with."""
    if model.config.labels:
        raise UserError("head: words: the network has a head of other labels and writes no words; take head: labels")
    table = model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head
    return table.weight.detach()[list(ids)].clone()


def tree_scores(model: Decoder, trees: Sequence[Tree], *, seq_len: int, device: str = "cpu") -> list[np.ndarray]:
    """For each tree, in the order given, what the head gives to its scored segments: float32 [segments, labels].

    A segment is scored with all before it, so that of a prompt with several answers the prompt is computed once.
    seq_len: tokens of a row, at least those of the longest tree.
    """
    model.to(device)

    def scores(batch: TreeBatch) -> np.ndarray:
        found: np.ndarray = sequence_scores(model, batch).cpu().numpy()
        return found

    return tree_values(scores, trees, Rows(seq_len, device=device), count=attrgetter("num_sequences"))


def load_reward_model(directory: Path) -> Decoder:
    """Raises UserError where the model directory is not a reward model's: one label on the last token."""
    kind = load_config(directory).kind
    if kind != "reward":
        gives = {"text": "writes text", "labels": "gives labels"}[kind]
        raise UserError(f"{directory}: it {gives} and is no reward model; train one with `method: reward`")
    return load_decoder(directory)
