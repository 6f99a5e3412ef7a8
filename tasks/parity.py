"""Does the exported model compute what the trained network computes?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from twinloop.models.decoder import Decoder
from twinloop.serving.engine import Engine
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.training.weights import load_decoder


@dataclass(frozen=True)
class Parity:
    """logit_gap: the largest difference of any logit, all at once or step by step. token_agreement: share of greedy
    tokens that the network would have chosen too. tokens: how many were looked at."""

    logit_gap: float
    token_agreement: float
    tokens: int


def parity(
    model_dir: Path, exported_dir: Path, prompts: Sequence[list[int]], params: SamplingParams, *, threads: int
) -> Parity:
    """Compare three ways: teacher forcing, prefill and then decode steps, and the tokens of answers.

    params: of the answers, greedy.
    """
    engine = Engine.load(exported_dir, slots=8, threads=threads)
    network = load_decoder(model_dir)
    answers = engine.generate(prompts, params)
    gap, agreed, total = 0.0, 0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = [*prompt, *answer.tokens]
        reference_LV = _network_logits(network, tokens)
        gap = max(gap, _gap(engine.score(tokens), reference_LV))
        step_V = engine.prefill(0, prompt)
        for position in range(len(prompt) - 1, len(tokens) - 1):
            gap = max(gap, _gap(step_V, reference_LV[position]))
            step_V = engine.decode(0, np.array([tokens[position + 1]]), np.array([True]))[0]
        chosen = reference_LV[len(prompt) - 1 : len(tokens) - 1, : engine.vocab_size].argmax(axis=-1)
        agreed += int((chosen == np.array(answer.tokens)).sum())
        total += len(answer.tokens)
    return Parity(gap, agreed / total, total)


@torch.no_grad()
def _network_logits(network: Decoder, tokens: Sequence[int]) -> np.ndarray:
    """[L, V], float32."""
    tokens_BL = torch.tensor([tokens])
    hidden = network.hidden(tokens_BL, torch.arange(len(tokens))[None])
    logits: np.ndarray = network.logits(hidden)[0].float().numpy()
    return logits


def _gap(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(left - right).max())
