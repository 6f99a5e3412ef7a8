"""How sampled answers are credited with what they earned: relative to their group (GRPO), or token by token (PPO)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from twinloop.models.decoder import Decoder
from twinloop.training.scoring import Rows, tree_logprobs, tree_values
from twinloop.training.tree import Tree, TreeBatch, group

MOST_CORRECTION = 0.2
"""Share of the target by which the KL may seem to be off, when its coefficient is corrected (Ziegler et al., 2019)."""


@dataclass(frozen=True)
class Group:
    """A prompt's completions and what they earned. What a checkpoint keeps of a rollout in use.

    logprobs: one a token, of the sampler. rewards: one a completion. advantages: one a completion, or one a token.
    values, returns: one a token, where there is a critic; see `tree.Segment`.
    """

    prompt: int
    completions: list[list[int]]
    logprobs: list[list[float]]
    rewards: list[float]
    advantages: list[Any] = field(default_factory=list)
    values: list[list[float]] = field(default_factory=list)
    returns: list[list[float]] = field(default_factory=list)

    def tree(self, prompts: Sequence[Sequence[int]]) -> Tree:
        """prompts: the tokens of all."""
        return group(
            prompts[self.prompt],
            self.completions,
            advantages=self.advantages,
            old_logprobs=self.logprobs,
            old_values=self.values,
            returns=self.returns,
        )


class Credit(Protocol):
    def assign(self, groups: list[Group]) -> tuple[list[Group], dict[str, float]]:
        """Those that give a gradient, with their advantages, and numbers to log."""
        ...

    def state(self) -> dict[str, float]:
        """What it has to know when training goes on from a checkpoint."""
        ...

    def restore(self, state: dict[str, float]) -> None: ...


class GroupCredit:
    """Better than the mean of the group is reinforced. A group whose rewards are all alike has no gradient."""

    def assign(self, groups: list[Group]) -> tuple[list[Group], dict[str, float]]:
        credited = [(group, group_advantages(group.rewards)) for group in groups]
        return [replace(group, advantages=found) for group, found in credited if found is not None], {}

    def state(self) -> dict[str, float]:
        return {}

    def restore(self, state: dict[str, float]) -> None: ...


def group_advantages(rewards: Sequence[float]) -> list[float] | None:
    """(reward - mean) / standard deviation of each member; None where all rewards are alike."""
    mean = math.fsum(rewards) / len(rewards)
    deviation = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards))
    if max(rewards) == min(rewards):
        return None
    return [(reward - mean) / deviation for reward in rewards]


class KLController:
    """The coefficient of the KL penalty: fixed, or, with a target, corrected after each rollout by how far the KL is
    from it (Ziegler et al., 2019)."""

    def __init__(self, coef: float, *, target: float | None = None, horizon: int = 10_000):
        """target: nats an answer. horizon: answers in which the whole correction is made, or fewer."""
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl: float, answers: int) -> None:
        """kl: nats an answer, the mean of so many answers."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -MOST_CORRECTION), MOST_CORRECTION)
            self.coef *= 1 + error * min(1, answers / self.horizon)


class TokenCredit:
    """Generalised advantages of each token by a critic (Schulman et al., 2016), whitened over the rollout.

    An answer's reward comes with its last token. Each token costs the controller's coefficient times how much surer of
    it the sampler was than the reference; the sum over an answer estimates the KL.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        critic: Callable[[TreeBatch], Tensor],
        controller: KLController,
        *,
        gamma: float,
        lam: float,
        reference: Decoder | None,
        rows: Rows,
    ):
        """critic: its values as they are now, [N]. reference: None where there is no penalty. rows: in which both read
        the answers."""
        self._prompts, self._critic, self._controller = prompts, critic, controller
        self._gamma, self._lam, self._reference, self._rows = gamma, lam, reference, rows

    def _expected(self, batch: TreeBatch) -> np.ndarray:
        found: np.ndarray = self._critic(batch).cpu().numpy()
        return found

    def assign(self, groups: list[Group]) -> tuple[list[Group], dict[str, float]]:
        trees = [group.tree(self._prompts) for group in groups]
        lengths_S = [len(tokens) for group in groups for tokens in group.completions]
        ends_S = np.cumsum(lengths_S)
        value_N = np.concatenate(tree_values(self._expected, trees, self._rows)).astype(np.float64)
        reward_N, metrics = self._penalties(groups, trees)
        reward_N[ends_S - 1] += [reward for group in groups for reward in group.rewards]
        answers = zip(np.split(reward_N, ends_S[:-1]), np.split(value_N, ends_S[:-1]), strict=True)
        found = [generalised_advantages(*answer, gamma=self._gamma, lam=self._lam) for answer in answers]
        advantage_N = np.concatenate(found)
        return_N = advantage_N + value_N
        metrics |= {"value": float(value_N.mean()), "explained_variance": explained_variance(value_N, return_N)}
        parts = [np.split(values_N, ends_S[:-1]) for values_N in (whitened(advantage_N), value_N, return_N)]
        by_answer = zip(*parts, strict=True)
        credited = []
        for rated in groups:
            advantages, values, returns = zip(*(next(by_answer) for _ in rated.completions), strict=True)
            credited.append(
                replace(rated, advantages=_lists(advantages), values=_lists(values), returns=_lists(returns))
            )
        return credited, metrics

    def state(self) -> dict[str, float]:
        return {"kl_coef": self._controller.coef}

    def restore(self, state: dict[str, float]) -> None:
        self._controller.coef = state["kl_coef"]

    def _penalties(self, groups: list[Group], trees: list[Tree]) -> tuple[np.ndarray, dict[str, float]]:
        """What each token costs [N], as a reward, and the KL in nats an answer."""
        sampled = [np.array(logprobs) for group in groups for logprobs in group.logprobs]
        sampled_N = np.concatenate(sampled)
        if self._reference is None:
            return np.zeros(len(sampled_N)), {}
        reference_N = np.concatenate(tree_logprobs(self._reference, trees, self._rows))
        coef, surer_N = self._controller.coef, sampled_N - reference_N
        kl = float(surer_N.sum()) / len(sampled)
        self._controller.update(kl, len(sampled))
        return -coef * surer_N, {"kl": kl, "kl_coef": coef}


def generalised_advantages(reward_T: np.ndarray, value_T: np.ndarray, *, gamma: float, lam: float) -> np.ndarray:
    """GAE [T] of one answer: the errors of the critic from each token on, discounted by gamma * lam a token.

    reward_T: with each token. value_T: what the critic expected before it. Nothing is expected after the last.
    """
    advantage_T = np.zeros(len(reward_T))
    following, after = 0.0, 0.0  # the next token's advantage and value
    for token in range(len(reward_T) - 1, -1, -1):
        error = reward_T[token] + gamma * after - value_T[token]
        following = advantage_T[token] = error + gamma * lam * following
        after = value_T[token]
    return advantage_T


def whitened(values_N: np.ndarray) -> np.ndarray:
    """With mean 0 and standard deviation 1."""
    return (values_N - values_N.mean()) / (values_N.std() + 1e-8)


def explained_variance(expected_N: np.ndarray, return_N: np.ndarray) -> float:
    """Share of the returns' variance that the critic knew: 1 is all of it, 0 no better than their mean."""
    variance = return_N.var()
    return float(1 - (return_N - expected_N).var() / variance) if variance else 0.0


def _lists(arrays: Sequence[np.ndarray]) -> list[list[float]]:
    return [array.astype(np.float32).tolist() for array in arrays]
