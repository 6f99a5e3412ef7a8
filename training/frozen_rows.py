"""Values of hidden states under weights that do not train, such as the vocabulary's projection below an adapter.

Each row's value depends on that row alone, and no weight needs a gradient. So the gradient of a row is known as soon as
its value is: both are computed piece by piece, once, and what is kept for the backward pass is as wide as the network
and not as its vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

RowValues = Callable[[Tensor, Tensor], Tensor]
"""(hidden [N, D], target [N]) to values [N]."""


def frozen_rows(values: RowValues, hidden_ND: Tensor, target_N: Tensor, *, chunk: int) -> Tensor:
    """values(hidden, target) [N], differentiable with respect to the hidden states alone."""
    found: Tensor = _FrozenRows.apply(values, hidden_ND, target_N, chunk)
    return found


class _FrozenRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: RowValues, hidden_ND: Tensor, target_N: Tensor, chunk: int) -> Tensor:
        needed = ctx.needs_input_grad[1]
        found, gradients = [], []
        for hidden, target in zip(hidden_ND.split(chunk), target_N.split(chunk), strict=True):
            with torch.set_grad_enabled(needed):
                hidden = hidden.detach().requires_grad_(needed)
                some = values(hidden, target)
                if needed:
                    gradients += torch.autograd.grad(some.sum(), hidden)
            found.append(some.detach())
        ctx.save_for_backward(*([torch.cat(gradients)] if needed else []))
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[None, Tensor, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return None, gradient_ND * outputs[0][:, None].to(gradient_ND.dtype), None, None
