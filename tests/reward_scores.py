"""What a reward model gives to texts, each computed by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from twinloop.training.heads import load_reward_model, tree_scores
from twinloop.training.tree import labelled


def reward_scores(directory: Path, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """float32 [texts]. texts: token ids of prompt and answer, the answer's stop token included."""
    model = load_reward_model(directory)
    scores = [tree_scores(model, [labelled(tokens)], seq_len=len(tokens))[0][0, 0] for tokens in texts]
    return np.array(scores, dtype=np.float32)
