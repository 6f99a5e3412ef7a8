"""Does a form of a model choose the tokens that the trained network chooses?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from twinloop.models.decoder import Decoder
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.training.sampler import BoundSampler

TIE = 1e-3
"""Two tokens whose logits are closer than this in the network are as good as each other: another order of summing up
may choose either."""

Logits: TypeAlias = Callable[[Sequence[int]], np.ndarray]
"""float32 [L, V] of tokens [L]."""


@dataclass(frozen=True)
class Exchange:
    """A prompt and the network's greedy answer to it."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Agreement:
    """tokens: greedy ones that were compared. alike: those that the form chooses too. logit_gap: the largest
    difference of any logit."""

    tokens: int
    alike: int
    logit_gap: float


def greedy_exchanges(
    network: Decoder, prompts: Sequence[list[int]], *, vocab_size: int, stop_id: int, max_tokens: int
) -> list[Exchange]:
    """The network's greedy answers, by the engine that serves, bound to its tensors. vocab_size: of the tokenizer."""
    longest = max(map(len, prompts)) + max_tokens
    max_length = min(network.config.max_position_embeddings, longest)
    sampler = BoundSampler(network, max_length=max_length, prompts=len(prompts), group=1, vocab_size=vocab_size)
    greedy = SamplingParams(max_tokens=max_tokens, stop=(stop_id,))
    answers = sampler.generate(prompts, greedy, group=1)
    return [Exchange(prompt, list(answer.tokens)) for prompt, answer in zip(prompts, answers, strict=True)]


def agreement(network: Decoder, form: Logits, exchanges: Sequence[Exchange], *, vocab_size: int) -> Agreement:
    """Compare along the network's answers: one token that differs does not make all behind it incomparable."""
    tokens, alike, gap = 0, 0, 0.0
    reference = network_logits(network)
    for exchange in exchanges:
        text = [*exchange.prompt, *exchange.answer]
        expected_LV, found_LV = reference(text), form(text)
        gap = max(gap, float(np.abs(expected_LV - found_LV).max()))
        chosen = slice(len(exchange.prompt) - 1, len(text) - 1)
        expected_TV = expected_LV[chosen, :vocab_size]
        best_T = found_LV[chosen, :vocab_size].argmax(-1)
        behind_T = expected_TV.max(-1) - expected_TV[np.arange(len(best_T)), best_T]
        tokens += len(best_T)
        alike += int((behind_T <= TIE).sum())
    return Agreement(tokens, alike, gap)


def network_logits(network: Decoder) -> Logits:
    """What the network gives for tokens, all at once."""

    @torch.no_grad()
    def logits(tokens: Sequence[int]) -> np.ndarray:
        hidden = network.hidden(torch.tensor([list(tokens)]), torch.arange(len(tokens))[None])
        logits_LV: np.ndarray = network.logits(hidden)[0].float().numpy()
        return logits_LV

    return logits
