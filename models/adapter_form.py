"""What a fresh LoRA adapter is: which matrices it adapts, with which shapes and scale. Imports next to nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from twinloop.models.shapes import weight_shapes

if TYPE_CHECKING:
    from twinloop.models.config import DecoderConfig

LORA_A, LORA_B = "lora_A.weight", "lora_B.weight"
"""Ends of the names of an adapter's tensors, behind the linear layer's: as PEFT's."""

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS: tuple[Target, ...] = get_args(Target)
"""Every linear layer inside the network's layers."""


@dataclass(frozen=True)
class AdapterForm:
    """The same rank and scale for each of its targets, in every layer.

    The scale is alpha / rank (Hu et al., 2021), or alpha / sqrt(rank) where rank-stabilised (Kalajdzievski, 2023).
    """

    rank: int
    alpha: float
    rank_stabilised: bool = False
    targets: tuple[Target, ...] = TARGETS

    @property
    def scale(self) -> float:
        return adapter_scale(self.rank, self.alpha, rank_stabilised=self.rank_stabilised)

    def modules(self, config: DecoderConfig) -> dict[str, tuple[int, int]]:
        """Names of the linear layers that it adapts, such as `model.layers.0.self_attn.q_proj`: their [out, in]."""
        return {name: shape for name, shape in linear_layers(config).items() if name.endswith(self.targets)}

    def shapes(self, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
        """Every tensor of it, by name: A [rank, in], B [out, rank]."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (out, into) in self.modules(config).items():
            shapes |= {f"{name}.{LORA_A}": (self.rank, into), f"{name}.{LORA_B}": (out, self.rank)}
        return shapes

    def num_parameters(self, config: DecoderConfig) -> int:
        return sum(math.prod(shape) for shape in self.shapes(config).values())


def adapter_scale(rank: int, alpha: float, *, rank_stabilised: bool) -> float:
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)


def linear_layers(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Linear layers that can be adapted: [out, in] by name."""
    weights = {name.removesuffix(".weight"): shape for name, shape in weight_shapes(config).items()}
    return {name: (shape[0], shape[1]) for name, shape in weights.items() if name.endswith(TARGETS)}


def is_adapter_tensor(name: str) -> bool:
    return name.endswith((LORA_A, LORA_B))
