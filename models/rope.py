"""Rotary positions: the base of a layer's angles, and how a longer context than the trained one scales them.

Only numbers: the network and the ONNX graph make their tables from the same ones.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class RopeScaling(BaseModel):
    """Slower angles than the base gives.

    linear: every frequency divided by `factor` (Chen et al., 2023). llama3: long wavelengths alone, with a smooth
    passage between the two bounds that the other fields set (Llama 3.1; Grattafiori et al., 2024).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Literal["linear", "llama3"]
    factor: Scale
    low_freq_factor: Scale | None = None
    high_freq_factor: Scale | None = None
    original_max_position_embeddings: Annotated[int, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        bounds = (self.low_freq_factor, self.high_freq_factor, self.original_max_position_embeddings)
        if self.kind == "llama3" and None in bounds:
            raise ValueError(
                "llama3 needs low_freq_factor, high_freq_factor and original_max_position_embeddings beside factor"
            )
        return self


class Rope(BaseModel):
    """The angles of one kind of layer."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    theta: Scale
    scaling: RopeScaling | None = None

    def frequency_factors(self, head_dim: int) -> np.ndarray | None:
        """What each frequency [E/2] is multiplied with, float32; None where nothing is scaled."""
        scaling = self.scaling
        if scaling is None:
            return None
        if scaling.kind == "linear":
            return np.full(head_dim // 2, 1 / scaling.factor, np.float32)
        low, high, trained = (
            scaling.low_freq_factor,
            scaling.high_freq_factor,
            scaling.original_max_position_embeddings,
        )
        assert low is not None
        assert high is not None
        assert trained is not None
        frequencies = self.theta ** (-np.arange(0, head_dim, 2) / head_dim)
        turns = trained * frequencies / (2 * math.pi)  # of a pair, over the context that was trained
        # 1: as it was, at `high` turns and more; 0: divided by the factor, at `low` turns and fewer
        kept = np.clip((turns - low) / (high - low), 0, 1) if high != low else (turns >= low).astype(float)
        return (kept + (1 - kept) / scaling.factor).astype(np.float32)
