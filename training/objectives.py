"""What is optimised: each objective turns a network's outputs on a batch into one loss.

`loss` is a mean over `normaliser(batch)` things (tokens or pairs). Micro-batches weighted by it add up to the full
batch's loss, however the batch is cut. Those below need the log-probabilities of the scored tokens only;
`of_logprobs` is their arithmetic.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twinloop.models.decoder import Decoder
from twinloop.training.tree import TreeBatch, scored_hidden, scored_logprobs, sequence_scores, target_logprobs

Metrics = dict[str, Tensor]


class Objective(Protocol):
    """One that is an `nn.Module` has parameters of its own, such as a critic's head: they train with the network, and
    are part of checkpoints but not of the model directory."""

    def normaliser(self, batch: TreeBatch) -> float:
        """How many things the loss of this batch is a mean over."""
        ...

    def loss(self, model: Decoder, batch: TreeBatch) -> tuple[Tensor, Metrics]:
        """The mean loss, and detached scalars to log. A metric whose name ends in `_max` is joined by maximum."""
        ...


class CausalLMLoss:
    """Pretraining and SFT: mean negative log-probability of the scored tokens, in nats."""

    def normaliser(self, batch: TreeBatch) -> float:
        return batch.total_weight

    def loss(self, model: Decoder, batch: TreeBatch) -> tuple[Tensor, Metrics]:
        return self.of_logprobs(scored_logprobs(model, batch), batch)

    def of_logprobs(self, logprobs_N: Tensor, batch: TreeBatch) -> tuple[Tensor, Metrics]:
        """logprobs_N: log p(target) of each scored token, float32. Returns the mean by weight, in nats."""
        return -(logprobs_N * batch.weight_N).sum() / batch.total_weight, {}


class DPOLoss:
    """DPO: raise the margin of chosen over rejected against a frozen reference (Rafailov et al., 2023).

    A batch holds trees of one prompt with two children: even sequences are chosen, odd ones rejected. With m the margin
    in nats, a pair's loss is

        sigmoid   -(1 - label_smoothing) log σ(beta m) - label_smoothing log σ(-beta m)   (conservative: Mitchell, 2023)
        ipo       (m - 1 / (2 beta))²                                                     (Azar et al., 2023)

    length_normalised: log-probabilities are means over a sequence's tokens, not sums, in the margin and what is logged.
    rpo_alpha: weight of an SFT term, the mean negative log-probability of the chosen answer's tokens (Pang et al.,
    2024), against answers of both kinds becoming less likely.
    """

    def __init__(
        self,
        *,
        beta: float,
        loss: Literal["sigmoid", "ipo"] = "sigmoid",
        label_smoothing: float = 0.0,
        length_normalised: bool = False,
        rpo_alpha: float = 0.0,
    ):
        self.beta = beta
        self.of_margins = {"sigmoid": self._sigmoid, "ipo": self._ipo}[loss]
        self.label_smoothing = label_smoothing
        self.length_normalised = length_normalised
        self.rpo_alpha = rpo_alpha

    def normaliser(self, batch: TreeBatch) -> float:
        return batch.num_sequences / 2

    def loss(self, model: Decoder, batch: TreeBatch) -> tuple[Tensor, Metrics]:
        return self.of_logprobs(scored_logprobs(model, batch), batch)

    def of_logprobs(self, logprobs_N: Tensor, batch: TreeBatch) -> tuple[Tensor, Metrics]:
        """logprobs_N: log p(target) of each scored token, float32. Returns the mean pair loss, in nats."""
        policy_S = batch.sum_by_sequence(logprobs_N)
        shift_S = policy_S - batch.reference_S
        if self.length_normalised:
            shift_S = shift_S / batch.length_S
        margin_P = shift_S[0::2] - shift_S[1::2]
        loss = self.of_margins(margin_P).mean()
        shift_S, margin_P = shift_S.detach(), margin_P.detach()
        metrics = {
            "margin": margin_P.mean(),
            "accuracy": (margin_P > 0).float().mean(),
            "chosen_shift": shift_S[0::2].mean(),  # falls too when a model learns only to avoid the rejected
            "rejected_shift": shift_S[1::2].mean(),
        }
        if self.rpo_alpha:
            chosen_loss = -(policy_S / batch.length_S)[0::2].mean()
            loss = loss + self.rpo_alpha * chosen_loss
            metrics["chosen_loss"] = chosen_loss.detach()
        return loss, metrics

    def _sigmoid(self, margin_P: Tensor) -> Tensor:
        loss_P = -F.logsigmoid(self.beta * margin_P)
        if not self.label_smoothing:
            return loss_P
        return (1 - self.label_smoothing) * loss_P - self.label_smoothing * F.logsigmoid(-self.beta * margin_P)

    def _ipo(self, margin_P: Tensor) -> Tensor:
        return (margin_P - 1 / (2 * self.beta)).square()


class GRPOLoss:
    """GRPO: clipped policy gradient on group-relative advantages, a mean over tokens (Shao et al., 2024).

    The mean runs over all tokens of the step, not first over each completion, so that long completions count by their
    length (Yu et al., 2025). kl_coef > 0 adds a penalty towards the reference, by the k3 estimator (Schulman, 2020).
    """

    def __init__(self, *, clip_eps: float = 0.2, kl_coef: float = 0.0):
        self.clip_eps = clip_eps
        self.kl_coef = kl_coef

    def normaliser(self, batch: TreeBatch) -> float:
        return batch.total_weight

    def loss(self, model: Decoder, batch: TreeBatch) -> tuple[Tensor, Metrics]:
        return self.of_logprobs(scored_logprobs(model, batch), batch)

    def of_logprobs(self, logprobs_N: Tensor, batch: TreeBatch) -> tuple[Tensor, Metrics]:
        """logprobs_N: log p(target) of each sampled token, float32, at the sampler's temperature."""
        loss, metrics = clipped_policy_loss(logprobs_N, batch, self.clip_eps)
        if self.kl_coef:
            assert batch.reference_logprobs_N is not None, "a KL penalty needs the reference's log-probabilities"
            away_N = batch.reference_logprobs_N - logprobs_N
            divergence = mean_by_weight(away_N.exp() - away_N - 1, batch)
            loss = loss + self.kl_coef * divergence
            metrics["reference_kl"] = divergence.detach()
        return loss, metrics


class RewardLoss:
    """Bradley-Terry: the chosen answer's score above the rejected one's, by at least `margin` (Ouyang et al., 2022).

    A batch holds trees of one prompt with two children: even sequences are chosen, odd ones rejected. centring: the
    weight of the squared sum of a pair's scores, which keeps them around 0 (Eisenstein et al., 2023).
    """

    def __init__(self, *, margin: float = 0.0, centring: float = 0.0):
        self.margin = margin
        self.centring = centring

    def normaliser(self, batch: TreeBatch) -> float:
        return batch.num_sequences / 2

    def loss(self, model: Decoder, batch: TreeBatch) -> tuple[Tensor, Metrics]:
        return self.of_scores(sequence_scores(model, batch)[:, 0])

    def of_scores(self, score_S: Tensor) -> tuple[Tensor, Metrics]:
        """score_S: of each sequence, float32. Returns the mean pair loss, in nats."""
        chosen_P, rejected_P = score_S[0::2], score_S[1::2]
        loss = -F.logsigmoid(chosen_P - rejected_P - self.margin).mean()
        if self.centring:
            loss = loss + self.centring * (chosen_P + rejected_P).square().mean()
        chosen_P, rejected_P = chosen_P.detach(), rejected_P.detach()
        return (
            loss,
            {
                "accuracy": (chosen_P > rejected_P).float().mean(),
                "margin": (chosen_P - rejected_P).mean(),
                "chosen_reward": chosen_P.mean(),
                "rejected_reward": rejected_P.mean(),
            },
        )


class ClassifierLoss:
    """Cross-entropy of each text's label, in nats, a mean over texts."""

    def normaliser(self, batch: TreeBatch) -> float:
        return float(batch.num_sequences)

    def loss(self, model: Decoder, batch: TreeBatch) -> tuple[Tensor, Metrics]:
        logits_SL = sequence_scores(model, batch)
        right_S = logits_SL.detach().argmax(dim=1) == batch.label_S
        return F.cross_entropy(logits_SL, batch.label_S), {"accuracy": right_S.float().mean()}


class PPOLoss(nn.Module):
    """PPO: clipped policy gradient on the advantage of each token, and the clipped loss of a critic, means over tokens
    (Schulman et al., 2017).

    The critic is a linear head on the hidden state before each token: it shares the network, and starts at zero. Its
    change is clipped like the policy's, as in the reference implementation: the larger of two squared errors counts.
    """

    def __init__(self, width: int, *, clip_eps: float = 0.2, value_clip: float = 0.2, value_coef: float = 0.5):
        """width: of the network's hidden states. value_clip: how far a value may move from that of the rollout."""
        super().__init__()
        self.clip_eps, self.value_clip, self.value_coef = clip_eps, value_clip, value_coef
        self.head_D = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(()))

    def normaliser(self, batch: TreeBatch) -> float:
        return batch.total_weight

    def loss(self, model: Decoder, batch: TreeBatch) -> tuple[Tensor, Metrics]:
        hidden_ND = scored_hidden(model, batch)
        return self.of_outputs(target_logprobs(model, hidden_ND, batch), self.expected(hidden_ND), batch)

    def values(self, model: Decoder, batch: TreeBatch) -> Tensor:
        """What is expected [N] before each scored token, float32."""
        return self.expected(scored_hidden(model, batch))

    def expected(self, hidden_ND: Tensor) -> Tensor:
        # A sum of products, which autocast leaves in float32: in bfloat16 a value has three digits.
        return (hidden_ND.float() * self.head_D).sum(-1) + self.bias

    def of_outputs(self, logprobs_N: Tensor, value_N: Tensor, batch: TreeBatch) -> tuple[Tensor, Metrics]:
        """logprobs_N: log p(target) of each sampled token, at the sampler's temperature. value_N: as `values`."""
        assert batch.old_value_N is not None, "a rollout carries the critic's values"
        assert batch.return_N is not None, "a rollout carries its returns"
        policy, metrics = clipped_policy_loss(logprobs_N, batch, self.clip_eps)
        change_N = (value_N - batch.old_value_N).clamp(-self.value_clip, self.value_clip)
        plain_N, clipped_N = ((v - batch.return_N) ** 2 for v in (value_N, batch.old_value_N + change_N))
        value = mean_by_weight(torch.maximum(plain_N, clipped_N), batch) / 2
        with torch.no_grad():
            metrics |= {
                "policy_loss": policy.detach(),
                "value_loss": value.detach(),
                "value_clip_fraction": mean_by_weight((clipped_N > plain_N).float(), batch),
            }
        return policy + self.value_coef * value, metrics


def clipped_policy_loss(logprobs_N: Tensor, batch: TreeBatch, clip_eps: float) -> tuple[Tensor, Metrics]:
    """The clipped surrogate of a batch's advantages (Schulman et al., 2017), a mean over tokens, and how far the policy
    is from the one that sampled. logprobs_N: log p(target) of each sampled token, at the sampler's temperature."""
    assert batch.old_logprobs_N is not None, "a rollout carries its sampler's log-probabilities"
    assert batch.advantage_N is not None, "a rollout carries its advantages"
    change_N = logprobs_N - batch.old_logprobs_N
    ratio_N = change_N.exp()
    clipped_N = ratio_N.clamp(1 - clip_eps, 1 + clip_eps)
    loss = -mean_by_weight(torch.minimum(ratio_N * batch.advantage_N, clipped_N * batch.advantage_N), batch)
    with torch.no_grad():
        gap_N = change_N.abs()
        metrics = {
            "ratio": mean_by_weight(ratio_N, batch),
            "clip_fraction": mean_by_weight((ratio_N != clipped_N).float(), batch),
            "approx_kl": mean_by_weight(ratio_N - 1 - change_N, batch),
            "logprob_gap": mean_by_weight(gap_N, batch),
            "logprob_gap_max": gap_N.max(),
        }
    return loss, metrics


def mean_by_weight(values_N: Tensor, batch: TreeBatch) -> Tensor:
    return (values_N * batch.weight_N).sum() / batch.total_weight


def join_metrics(parts: list[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """Metrics of a whole step from its micro-batches' (share, metrics)."""
    joined: dict[str, float] = {}
    for name in parts[0][1] if parts else ():
        if name.endswith("_max"):
            joined[name] = max(metrics[name] for _, metrics in parts)
        else:
            joined[name] = math.fsum(share * metrics[name] for share, metrics in parts)
    return joined
