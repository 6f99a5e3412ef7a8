"""The draw of one answer that asks for more than a temperature, and of a batch in which there are such answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

import numpy as np

from twinloop.serving.engine.sampling.constraint import masked
from twinloop.serving.engine.sampling.cuts import draw_cut, largest
from twinloop.serving.engine.sampling.draws import choose
from twinloop.serving.engine.sampling.params import SamplingParams

_RANKED = 64
"""Tokens among which the likeliest are looked for: `largest` is slow for few. The first of 49k takes 2.5 ms by itself,
and 0.024 ms so."""


class TokenReport(NamedTuple):
    """Log-probabilities, the model's own. top: of the likeliest tokens by id, falling; those that a constraint does not
    allow are not among them."""

    logprob: float
    top: dict[int, float]


class AnswerSampler:
    """What one answer's draw needs beside its temperature, and how far it has come."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int]):
        self._params = params
        self._constraint = None if params.constraint is None else params.constraint.start()
        self._edits = params.start_edits(prompt, params.stop)
        self._cuts = params if params.cutting and params.temperature > 0 else None
        self._allowed: np.ndarray | None = None
        self.constrained = self._constraint is not None
        more = self._cuts is not None or self._edits or params.top_logprobs is not None
        self.masks_alone = self.constrained and not more
        """Whether the constraint is all that it asks for, so that `choose` draws it from masked logits."""

    @classmethod
    def if_needed(cls, params: SamplingParams, prompt: Sequence[int]) -> Self | None:
        """None for an answer that asks for no more than a temperature."""
        sampler = cls(params, prompt)
        asks = (sampler._constraint, sampler._cuts, sampler._edits or None, params.top_logprobs)
        return None if all(each is None for each in asks) else sampler

    def prepare(self) -> None:
        """Ask the constraint what may be next: once before each draw, from any thread. Raises ConstraintError."""
        if self._constraint is not None:
            self._allowed = self._constraint.allowed()

    def masked(self, logits_V: np.ndarray) -> np.ndarray:
        """A copy of logits without the tokens that may not be next, or the logits themselves."""
        return logits_V if self._allowed is None else masked(logits_V, self._allowed)

    def accept(self, token: int) -> None:
        """The answer goes on with this token."""
        for edit in self._edits:
            edit.accept(token)
        if self._constraint is not None:
            self._constraint.accept(token)

    def forced(self) -> list[int]:
        """Tokens that a constraint leaves no choice about, see `ConstraintState`."""
        return [] if self._constraint is None else self._constraint.forced()

    def draw(self, logits_V: np.ndarray, uniform: float) -> tuple[int, float, TokenReport | None]:
        """The next token, its log-probability under the distribution drawn from, and its report where asked for.

        `prepare` must have been called since the last draw. logits_V is not changed.
        """
        own_V = self.masked(logits_V)
        edited_V = own_V.copy() if self._edits else own_V
        for edit in self._edits:
            edit.apply(edited_V)
        token, logprob = self._choose(edited_V, uniform)
        self.accept(token)
        top = self._params.top_logprobs
        return token, logprob, None if top is None else report_token(own_V, token, top)

    def _choose(self, logits_V: np.ndarray, uniform: float) -> tuple[int, float]:
        temperature = self._params.temperature
        if self._cuts is not None:
            return draw_cut(logits_V, self._cuts, temperature, uniform)
        tokens_B, logprobs_B = choose(logits_V[None], np.array([temperature], np.float32), np.array([uniform]))
        return int(tokens_B[0]), float(logprobs_B[0])


def draw(
    logits_BV: np.ndarray,
    temperature_B: np.ndarray,
    uniform_B: np.ndarray,
    samplers: Mapping[int, AnswerSampler],
) -> tuple[np.ndarray, np.ndarray, dict[int, TokenReport]]:
    """Next tokens, int64 [B], their log-probabilities, float32 [B], and reports by row.

    samplers: of the rows that have one; the others are drawn by `choose`.
    """
    if not samplers:
        return *choose(logits_BV, temperature_B, uniform_B), {}
    tokens_B, logprobs_B = np.empty(len(logits_BV), np.int64), np.empty(len(logits_BV), np.float32)
    if plain := [row for row in range(len(logits_BV)) if row not in samplers]:
        tokens_B[plain], logprobs_B[plain] = choose(logits_BV[plain], temperature_B[plain], uniform_B[plain])
    if held := [row for row, sampler in samplers.items() if sampler.masks_alone]:
        masked_BV = np.array([samplers[row].masked(logits_BV[row]) for row in held])
        tokens_B[held], logprobs_B[held] = choose(masked_BV, temperature_B[held], uniform_B[held])
        for row, token in zip(held, tokens_B[held].tolist(), strict=True):
            samplers[row].accept(token)
    reports: dict[int, TokenReport] = {}
    for row, sampler in samplers.items():
        if sampler.masks_alone:
            continue
        tokens_B[row], logprobs_B[row], report = sampler.draw(logits_BV[row], float(uniform_B[row]))
        if report is not None:
            reports[row] = report
    return tokens_B, logprobs_B, reports


def report_token(logits_V: np.ndarray, token: int, count: int) -> TokenReport:
    """What its logits say of a token. count: of the likeliest ones."""
    best = logits_V.max()
    total = best + np.log(np.exp(logits_V - best).sum(dtype=np.float64))
    ids_N = largest(logits_V, max(count, _RANKED))[0] if count else np.empty(0, np.int64)
    ids_N = ids_N[np.argsort(-logits_V[ids_N], kind="stable")[:count]]
    top = {int(id): float(logits_V[id] - total) for id in ids_N if logits_V[id] > -np.inf}
    return TokenReport(float(logits_V[token] - total), top)
