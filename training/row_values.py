"""Values of hidden states, such as log-probabilities, without the logits of all of them in memory at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from twinloop.models.chunks import logit_chunk
from twinloop.models.decoder import Decoder
from twinloop.training.adapters import adapter_layers

RowValues = Callable[[Tensor, Tensor], Tensor]
"""(hidden [N, D], target [N]) to values [N]."""


def row_values(
    model: Decoder, values: RowValues, hidden_ND: Tensor, target_N: Tensor, *, chunk: int | None = None
) -> Tensor:
    """values(hidden, target) [N] of rows of hidden states, differentiable; each row's depends on that row alone.

    The vocabulary projection, within `values`, runs only at these positions. Past `chunk` of them it runs piece by
    piece: [N, V] logits are never in memory at once. Where it trains it runs again in the backward pass.
    """
    chunk = chunk or logit_chunk(model.config.vocab_size)
    if adapter_layers(model) and len(hidden_ND):
        return _frozen_rows(values, hidden_ND, target_N, chunk=chunk)
    if len(hidden_ND) <= chunk:
        return values(hidden_ND, target_N)
    pieces = zip(hidden_ND.split(chunk), target_N.split(chunk), strict=True)
    return torch.cat([checkpoint(values, *piece, use_reentrant=False) for piece in pieces])


def _frozen_rows(values: RowValues, hidden_ND: Tensor, target_N: Tensor, *, chunk: int) -> Tensor:
    """Where no weight that `values` reads needs a gradient, such as below an adapter: the gradient of a row is known as
    soon as its value is. Both are computed piece by piece, once, and what is kept for the backward pass is as wide as
    the network and not as its vocabulary.
    """
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
