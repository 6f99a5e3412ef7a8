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
    """Loss of one text. `tokens` counts the targets, stop tokens among them; `bytes` is UTF-8."""

    nats: float
    tokens: int
    bytes: int


def score_texts(engine: Scorer, tokenizer: ChatTokenizer, texts: Iterable[str]) -> list[TextScore]:
    """Score each text as the document it is in pretraining: BOS, text, stop token.

    A text longer than the engine's context is scored in pieces, each of which sees nothing of those before it.
    Raises UserError when there is no text.
    """
    scores = []
    for text in texts:
        document = tokenizer.encode_document(text)
        starts = range(0, len(document) - 1, engine.max_length)
        pieces = [document[start : start + engine.max_length + 1] for start in starts]
        if pieces:
            nats = math.fsum(_loss(engine.score(piece[:-1]), piece[1:]) for piece in pieces)
            scores.append(TextScore(nats, len(document) - 1, len(text.encode("utf-8", "replace"))))
    if not any(score.bytes for score in scores):
        raise UserError("held-out texts: none has any text; bits per byte needs some")
    return scores


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


def losses(scores: Sequence[TextScore], prefix: str = "") -> dict[str, Estimate]:
    """Perplexity and bits per byte of all these texts, with their intervals, by a bootstrap over the texts; of one text
    there is none. prefix: of their names. What is no finite number is no measurement and left out. Empty texts have no
    bits per byte."""
    if not all(math.isfinite(score.nats) for score in scores):
        return {}
    terms = [{"nats": score.nats, "tokens": score.tokens, "bytes": score.bytes} for score in scores]

    def bits(sums: Mapping[str, float]) -> float | None:
        return metrics.bits_per_byte(sums["nats"], round(sums["bytes"])) if sums["bytes"] else None

    found = {
        f"{prefix}perplexity": estimated(terms, lambda sums: metrics.perplexity(sums["nats"], round(sums["tokens"]))),
        f"{prefix}bits_per_byte": estimated(terms, bits),
    }
    return {name: each for name, each in found.items() if each is not None and each.is_finite}


def _loss(logits_LV: np.ndarray, targets: list[int]) -> float:
    """Summed cross-entropy in nats; in float64, since thousands of terms are added."""
    logits_LV = logits_LV.astype(np.float64)
    top_L = logits_LV.max(axis=-1)
    log_partition_L = top_L + np.log(np.exp(logits_LV - top_L[:, None]).sum(axis=-1))
    return float((log_partition_L - logits_LV[np.arange(len(targets)), targets]).sum())
