"""How well the engine predicts held-out text and reference answers, by teacher forcing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from twinloop.common.errors import UserError
from twinloop.domains.domain import Message
from twinloop.evaluation import metrics
from twinloop.evaluation.estimates import estimated
from twinloop.evaluation.metrics import Estimate
from twinloop.models.tokenizer import ChatTokenizer


class Scorer(Protocol):
    """The part of serving.engine.Engine that this needs."""

    @property
    def max_length(self) -> int: ...

    def score(self, tokens: list[int]) -> np.ndarray:
        """Logits [L, V], float32: row i predicts what follows tokens[: i + 1]."""
        ...


@dataclass(frozen=True)
class TextScore:
    """Total loss over some texts. `tokens` counts the targets, stop tokens among them; `bytes` is UTF-8."""

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        return metrics.bits_per_byte(self.nats, self.bytes)

    @property
    def perplexity(self) -> float:
        return metrics.perplexity(self.nats, self.tokens)


def score_texts(engine: Scorer, tokenizer: ChatTokenizer, texts: Iterable[str]) -> TextScore:
    """Score each text as the document it is in pretraining: BOS, text, stop token.

    A text longer than the engine's context is scored in pieces, each of which sees nothing of those before it.
    Raises UserError when there is no text.
    """
    nats, tokens, size = 0.0, 0, 0
    for text in texts:
        document = tokenizer.encode_document(text)
        size += len(text.encode("utf-8", "replace"))
        for start in range(0, len(document) - 1, engine.max_length):
            piece = document[start : start + engine.max_length + 1]
            nats += _loss(engine.score(piece[:-1]), piece[1:])
            tokens += len(piece) - 1
    if not size:
        raise UserError("held-out texts: none has any text; bits per byte needs some")
    return TextScore(nats, tokens, size)


def score_answers(
    engine: Scorer, tokenizer: ChatTokenizer, examples: Iterable[tuple[Sequence[Message], str]]
) -> list[TextScore]:
    """Score each (prompt, reference answer): the tokens of the answer and the stop token, given the prompt.

    Of an answer that is longer than the engine's context, what fits is scored. Raises UserError when there is none.
    """
    scores = []
    for messages, text in examples:
        prompt = tokenizer.encode_prompt(messages)
        every = tokenizer.encode_answer(text)
        answer = every[: max(0, engine.max_length + 1 - len(prompt))]
        if answer:
            scored = text if answer == every else tokenizer.decode(answer)
            nats = _loss(engine.score([*prompt, *answer[:-1]])[len(prompt) - 1 :], answer)
            scores.append(TextScore(nats, len(answer), len(scored.encode("utf-8", "replace"))))
    if not scores:
        raise UserError("reference answers: there are none, or none fits behind its prompt")
    return scores


def answer_losses(scores: Sequence[TextScore]) -> dict[str, Estimate]:
    """Perplexity and bits per byte of reference answers, with their intervals. What is no finite number is no
    measurement and left out. Empty answers have no bits per byte."""
    if not all(math.isfinite(score.nats) for score in scores):
        return {}
    terms = [{"nats": score.nats, "tokens": score.tokens, "bytes": score.bytes} for score in scores]

    def bits(sums: Mapping[str, float]) -> float | None:
        return metrics.bits_per_byte(sums["nats"], round(sums["bytes"])) if sums["bytes"] else None

    found = {
        "answer_perplexity": estimated(terms, lambda sums: metrics.perplexity(sums["nats"], round(sums["tokens"]))),
        "answer_bits_per_byte": estimated(terms, bits),
    }
    return {name: each for name, each in found.items() if each is not None and each.is_finite}


def _loss(logits_LV: np.ndarray, targets: list[int]) -> float:
    """Summed cross-entropy in nats; in float64, since thousands of terms are added."""
    logits_LV = logits_LV.astype(np.float64)
    top_L = logits_LV.max(axis=-1)
    log_partition_L = top_L + np.log(np.exp(logits_LV - top_L[:, None]).sum(axis=-1))
    return float((log_partition_L - logits_LV[np.arange(len(targets)), targets]).sum())
