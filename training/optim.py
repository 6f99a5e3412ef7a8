"""Muon for the hidden matrices, AdamW for embeddings, norms, biases and adapters; one learning rate for both.

Why not torch.optim.Muon: it walks the matrices one by one, in bf16, which many CPUs emulate; `make bench` prints the
ratio. Here matrices of one shape are orthogonalised together, in float32 on CPU.
Left out: per-group learning rates, since Muon's update is scaled to half the size of AdamW's (after Liu et al., 2025).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from twinloop.models.adapter_form import is_adapter_tensor
from twinloop.models.products import backward_dtype, float32_products, products_in_use
from twinloop.models.shapes import is_hidden_matrix
from twinloop.training.adapters import trained_tensors
from twinloop.training.settings import TrainSettings

MOMENTUM = 0.95  # Jordan et al., 2024
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic that lifts small singular values fastest; same source
NEWTON_SCHULZ_STEPS = 5
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


def orthogonalise(matrices_GIJ: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly: singular values land near 1 (Newton-Schulz; Jordan et al., 2024).

    matrices_GIJ: I <= J (letters: `models.shapes`). bf16 suffices, where it is fast.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices_GIJ / (matrices_GIJ.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.to(backward_dtype(x.device))
    with float32_products(products_in_use().library):
        for _ in range(NEWTON_SCHULZ_STEPS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices_GIJ.dtype)


class Muon:
    """Momentum, then orthogonalisation, of 2-D weights (Jordan et al., 2024). Same shapes are one batch."""

    def __init__(self, named: dict[str, nn.Parameter]):
        self._buckets: dict[tuple[int, int], list[nn.Parameter]] = {}
        for parameter in named.values():
            self._buckets.setdefault((min(parameter.shape), max(parameter.shape)), []).append(parameter)
        self._momenta = {
            shape: torch.zeros(len(members), *shape, device=members[0].device)
            for shape, members in self._buckets.items()
        }

    def step(self, learning_rate: float, weight_decay: float) -> None:
        for shape, members in self._buckets.items():
            momentum_GIJ = self._momenta[shape]
            gradient_GIJ = torch.stack([_wide(_gradient(member)) for member in members])
            momentum_GIJ.lerp_(gradient_GIJ, 1 - MOMENTUM)
            update_GIJ = orthogonalise(gradient_GIJ.lerp_(momentum_GIJ, MOMENTUM))  # Nesterov
            if weight_decay:
                torch._foreach_mul_(list[Tensor](members), 1 - learning_rate * weight_decay)
            scale = UPDATE_RMS * math.sqrt(shape[1])
            for member, update in zip(members, update_GIJ, strict=True):
                member.add_(_like(update, member), alpha=-learning_rate * scale)

    def tensors(self) -> dict[str, Tensor]:
        return {f"muon/{m}x{n}": momentum for (m, n), momentum in self._momenta.items()}


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "matrices of one shape are stepped together: each needs a gradient"
    return parameter.grad


def _wide(matrix: Tensor) -> Tensor:
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix


def _like(update_IJ: Tensor, parameter: Tensor) -> Tensor:
    return update_IJ.mT if parameter.shape[0] > parameter.shape[1] else update_IJ


class Optimizer:
    """Steps every parameter of a model. Its state is a flat dict of tensors, as checkpoints keep it."""

    def __init__(self, model: nn.Module, settings: TrainSettings):
        self.settings = settings
        self._parameters = trained_tensors(model)
        hidden = {name: p for name, p in self._parameters.items() if is_hidden_matrix(name, tuple(p.shape))}
        muon = hidden if settings.optimizer == "muon" else {}
        self._muon = Muon(muon)
        self._named_adamw = {name: p for name, p in self._parameters.items() if name not in muon}
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
        for parameter in self._parameters.values():
            parameter.grad = None

    def clip_gradients(self) -> Tensor:
        """Scale the gradients down to MAX_GRAD_NORM; returns their norm before, a scalar."""
        return nn.utils.clip_grad_norm_(self._parameters.values(), MAX_GRAD_NORM)

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


def build_optimizer(model: nn.Module, settings: TrainSettings) -> Optimizer:
    return Optimizer(model, settings)
