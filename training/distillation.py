"""Distillation of a teacher's probabilities into a student (Hinton et al., 2015), from the teacher's likeliest tokens.

Of each scored token's distribution the top K are kept and the others are one bucket, "the rest": no probability is
lost, and the divergence of these K + 1 classes is a lower bound of the whole one, and the whole one where K is the
vocabulary. (Renormalised over the top K, a student would be free to spread any mass over the rest.)

Rows of a vocabulary that are no tokens, as many published models have, are in neither distribution: they are never
sampled, and teacher and student may have different numbers of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from twinloop.models.chunks import logit_chunk
from twinloop.models.decoder import Decoder
from twinloop.training.objectives import Metrics
from twinloop.training.row_values import row_values
from twinloop.training.scoring import Rows, tree_values, with_values
from twinloop.training.tree import Tree, TreeBatch, scored_hidden


def attach_teacher(
    model: Decoder,
    trees: Sequence[Tree],
    *,
    top_k: int,
    temperature: float,
    vocab_size: int,
    seq_len: int,
    device: str = "cpu",
) -> list[Tree]:
    """The same trees, each with what `model`, the teacher, thinks of its scored tokens: about 6 bytes a kept token.

    vocab_size: of the tokenizer, which is that of both: the teacher's rows beyond it are no tokens.
    """
    kept = min(top_k, vocab_size)
    ids = np.uint16 if vocab_size <= 2**16 else np.uint32
    layout = np.dtype([("ids", ids, (kept,)), ("logprobs", np.float32, (kept + (kept < vocab_size),))])

    def likeliest(batch: TreeBatch) -> np.ndarray:
        found = np.empty(len(batch.target_N), dtype=layout)
        chunk = logit_chunk(model.config.vocab_size)
        for index, hidden_ND in enumerate(scored_hidden(model, batch).split(chunk)):
            logits_NV = model.logits(hidden_ND).float()[:, :vocab_size] / temperature
            top_NK = logits_NV.topk(kept).indices
            some = found[index * chunk : (index + 1) * chunk]
            some["ids"] = top_NK.cpu().numpy()
            some["logprobs"] = _class_logprobs(logits_NV, top_NK, rest=kept < vocab_size).cpu().numpy()
        return found

    model.to(device)
    values = tree_values(likeliest, trees, Rows(seq_len, device=device))
    return [with_values(tree, "teacher", own) for tree, own in zip(trees, values, strict=True)]


class DistilLoss:
    """KL(teacher || student) over the teacher's top K tokens and the rest, a mean over scored tokens, in nats.

    At a temperature T both distributions are softened by it, and the loss is multiplied by T², so that gradients keep
    their size (Hinton et al., 2015).
    """

    def __init__(self, *, vocab_size: int, temperature: float = 1.0):
        """vocab_size: of the tokenizer, as for the teacher."""
        self.vocab_size, self.temperature = vocab_size, temperature

    def normaliser(self, batch: TreeBatch) -> float:
        return batch.total_weight

    def loss(self, model: Decoder, batch: TreeBatch) -> tuple[Tensor, Metrics]:
        ids_NK, teacher_NK = batch.teacher_ids_NK, batch.teacher_logprobs_NK
        assert ids_NK is not None, "attach the teacher before training"
        assert teacher_NK is not None, "attach the teacher before training"

        def divergences(hidden: Tensor, index: Tensor) -> Tensor:
            logits_NV = model.logits(hidden)[:, : self.vocab_size].float()
            return self.of_logits(logits_NV, ids_NK[index], teacher_NK[index])

        index_N = torch.arange(len(ids_NK), device=ids_NK.device)
        divergence_N = row_values(model, divergences, scored_hidden(model, batch), index_N)
        return self.temperature**2 * (divergence_N * batch.weight_N).sum() / batch.total_weight, {}

    def of_logits(self, logits_NV: Tensor, ids_NK: Tensor, teacher_NK: Tensor) -> Tensor:
        """Divergence [N] of the student's logits from the teacher's log-probabilities, both at the temperature.

        ids_NK: the teacher's tokens. teacher_NK: theirs, and in a column more that of the rest, where there is one.
        """
        rest = teacher_NK.shape[1] > ids_NK.shape[1]
        student_NK = _class_logprobs(logits_NV / self.temperature, ids_NK, rest=rest)
        return (teacher_NK.exp() * (teacher_NK - student_NK)).sum(-1)


def _class_logprobs(logits_NV: Tensor, ids_NK: Tensor, *, rest: bool) -> Tensor:
    """Log-probabilities [N, K] of these tokens, and with `rest` in a column more that of all others together."""
    top_NK = logits_NV.gather(1, ids_NK)
    if rest:
        others_N1 = logits_NV.scatter(1, ids_NK, -torch.inf).logsumexp(1, keepdim=True)
        top_NK = torch.cat([top_NK, others_N1], dim=1)
    return top_NK - logits_NV.logsumexp(1, keepdim=True)
