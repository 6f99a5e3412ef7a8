"""How the network's matrices are multiplied while it trains: on CPUs it decides the time of a step.

A float32 product goes through torch's own BLAS, or through oneDNN: on AMD's AVX-512 cores MKL keeps to half of their
width, and oneDNN is twice as fast (240 against 105 GFLOP/s a core of Zen 5). Where the CPU has instructions for it, the
products of the backward pass can round their factors to bfloat16 (470); the forward pass, on which the ratios of DPO
and GRPO rest, and the weights stay float32.

The library is chosen by measurement, the rounding by the recipe; `training.runtime` sets both, as part of every key.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROW_MULTIPLE = 16
"""oneDNN makes a kernel for each shape, which takes as long as three of its products. So numbers of rows are rounded
up to this."""


@dataclass(frozen=True)
class Products:
    library: Literal["blas", "onednn"] = "blas"
    backward: Literal["float32", "bfloat16"] = "float32"


_chosen = Products()


def use_products(products: Products) -> None:
    """From here on, in the whole process."""
    global _chosen
    _chosen = products


def products_in_use() -> Products:
    return _chosen


def backward_dtype(device: torch.device) -> torch.dtype:
    """What factors are rounded to in the backward pass, where precision matters least."""
    return torch.bfloat16 if device.type == "cuda" or _chosen.backward == "bfloat16" else torch.float32


@contextlib.contextmanager
def float32_products(library: str) -> Iterator[None]:
    """torch 2.13 has no name for "oneDNN, in float32". Its permission to round to bfloat16 goes there, and oneDNN only
    uses it where the CPU has AMX: `training.runtime` measures the error before it chooses this.
    """
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16" if library == "onednn" else "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., columns] times weight [rows, columns], transposed, by the products in use."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or _chosen == Products():
        return F.linear(x, weight, bias)
    rows = x.flatten(0, -2)
    spare = -len(rows) % ROW_MULTIPLE
    padded = F.pad(rows, (0, 0, 0, spare)) if spare else rows
    out: Tensor = _Linear.apply(padded, weight)
    out = out[: len(rows)].unflatten(0, x.shape[:-1])
    return out if bias is None else out + bias


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with float32_products(_chosen.library):
            return x @ weight.mT

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        dtype = backward_dtype(x.device)
        d_out = gradients[0].to(dtype)
        with float32_products(_chosen.library):
            d_x = (d_out @ weight.to(dtype)).float() if needs_x else None
            d_weight = (d_out.mT @ x.to(dtype)).float() if needs_weight else None
        return d_x, d_weight
