"""Muon for the hidden matrices, AdamW for embeddings, norms, biases and adapters; one learning rate for both.

Why not torch.optim.Muon: it orthogonalises whole matrices, one by one, in bf16, which many CPUs emulate; `make bench`
prints the ratio. Here blocks of them are orthogonalised together, in float32.
Left out: per-group learning rates, since Muon's update is scaled to half of AdamW's (after Liu et al., 2025).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from twinloop.models.adapter_form import is_adapter_tensor
from twinloop.models.products import float32_products, products_in_use
from twinloop.models.shapes import is_hidden_matrix
from twinloop.training.adapters import trained_tensors
from twinloop.training.settings import TrainSettings

MOMENTUM = 0.95  # Jordan et al., 2024
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic that lifts small singular values fastest; same source
NEWTON_SCHULZ_STEPS = 4  # of 5, since values start closer to 1 than by the norm of the matrix, which they divide by
BLOCK_ROWS = 128
# Root mean square of an update at learning rate 1. Liu et al. (2025) take 0.2, what AdamW's usually is; small networks
# learn sooner when embeddings and the norms of queries and keys, which AdamW moves, go twice as fast as the matrices.
UPDATE_RMS = 0.1
BETAS = (0.9, 0.95)
MAX_GRAD_NORM = 1.0


def learning_rate_at(step: int, total_steps: int, settings: TrainSettings) -> float:
    """Warm-up, plateau, linear decay towards zero. step counts from 0; the first and the last step both move."""
    warmup_steps = round(settings.warmup_ratio * total_steps)
    decay_steps = round(settings.decay_ratio * total_steps)
    rise = (step + 1) / (warmup_steps + 1)
    fall = (total_steps - step) / (decay_steps + 1)
    return settings.learning_rate * min(1.0, rise, fall)


def block_rows(rows: int, columns: int) -> int:
    """The most rows of one block into which the matrix divides: BLOCK_ROWS at most, and no more than its columns."""
    return max(size for size in range(1, min(BLOCK_ROWS, columns) + 1) if rows % size == 0)


def orthogonalisers(grams_GII: Tensor) -> Tensor:
    """What makes wide matrices semi-orthogonal from the left, roughly: singular values land near 1.

    Newton-Schulz (Jordan et al., 2024) multiplies x by polynomials of x x^T. So it is done on these products,
    grams_GII, and x itself is read twice, not two times a step. In float32, since singular values are squared here.
    """
    a, b, c = NEWTON_SCHULZ
    bound = torch.linalg.matrix_norm(grams_GII, keepdim=True) + 1e-14  # at least the square of the largest
    gram, total = grams_GII / bound, bound.rsqrt()
    for step in range(NEWTON_SCHULZ_STEPS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        total = factor @ total if step else factor * total
        if step + 1 < NEWTON_SCHULZ_STEPS:
            gram = factor @ gram @ factor
    return total


class Muon:
    """Momentum, then orthogonalisation, of 2-D weights (Jordan et al., 2024), by blocks of adjacent rows.

    Blocks bound its products to a fixed share of a batch's, whatever the width: of whole matrices they took half of a
    step at 10M. Orthogonalising the parts that devices hold, one by one, keeps the quality (Khaled et al., 2025).
    """

    def __init__(self, named: dict[str, nn.Parameter]):
        self._momenta = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
        self._buckets: dict[int, dict[str, nn.Parameter]] = {}
        for name, parameter in named.items():
            rows, columns = parameter.shape
            self._buckets.setdefault(block_rows(rows, columns), {})[name] = parameter

    def step(self, learning_rate: float, weight_decay: float) -> None:
        keep = 1 - learning_rate * weight_decay
        for rows, members in self._buckets.items():
            momenta = [self._momenta[name] for name in members]
            gradients = [_gradient(member) for member in members.values()]
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            torch._foreach_lerp_(gradients, momenta, MOMENTUM)  # Nesterov
            updates = [gradient.view(-1, rows, gradient.shape[1]) for gradient in gradients]
            with float32_products(products_in_use().library):
                factors = orthogonalisers(torch.cat([update @ update.mT for update in updates]))
                parts = factors.split([len(update) for update in updates])
                for member, update, part in zip(members.values(), updates, parts, strict=True):
                    change = learning_rate * UPDATE_RMS * math.sqrt(update.shape[2])
                    member.view_as(update).baddbmm_(part, update, beta=keep, alpha=-change)

    def tensors(self) -> dict[str, Tensor]:
        return {f"muon/{name}": momentum for name, momentum in self._momenta.items()}


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "matrices are stepped together: each needs a gradient"
    return parameter.grad


class Optimizer:
    """Steps every parameter of a model, and of an objective that has some. Its state is a flat dict of tensors, as
    checkpoints keep it. trained: the parameters, by name."""

    def __init__(self, model: nn.Module, settings: TrainSettings, objective: object = None):
        self.settings = settings
        self.trained = trained_tensors(model, objective)
        hidden = {name: p for name, p in self.trained.items() if is_hidden_matrix(name, tuple(p.shape))}
        muon = hidden if settings.optimizer == "muon" else {}
        self._muon = Muon(muon)
        self._named_adamw = {name: p for name, p in self.trained.items() if name not in muon}
        matrices = {name for name in self._named_adamw if name in hidden or is_adapter_tensor(name)}
        decayed = [p for name, p in self._named_adamw.items() if name in matrices]
        plain = [p for name, p in self._named_adamw.items() if name not in matrices]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=settings.learning_rate, betas=BETAS, fused=True
        )

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One update from the gradients, which it then drops."""
        self._muon.step(learning_rate, self.settings.weight_decay)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        for parameter in self.trained.values():
            parameter.grad = None

    def clip_gradients(self) -> Tensor:
        """Scale the gradients down to MAX_GRAD_NORM; returns their norm before, a scalar."""
        return nn.utils.clip_grad_norm_(self.trained.values(), MAX_GRAD_NORM)

    def tensors(self) -> dict[str, Tensor]:
        """All state, by name. Empty for AdamW before its first step."""
        state = self._muon.tensors()
        for name, parameter in self._named_adamw.items():
            for part, value in self._adamw.state.get(parameter, {}).items():
                state[f"adamw/{name}/{part}"] = value
        return state

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over the state that `tensors` returned."""
        for name, momentum in self._muon.tensors().items():
            momentum.copy_(tensors[name])
        for name, parameter in self._named_adamw.items():
            prefix = f"adamw/{name}/"
            self._adamw.state[parameter] = {
                key.removeprefix(prefix): value.to(parameter.device, copy=True)
                for key, value in tensors.items()
                if key.startswith(prefix)
            }


def build_optimizer(model: nn.Module, settings: TrainSettings, objective: object = None) -> Optimizer:
    return Optimizer(model, settings, objective)
