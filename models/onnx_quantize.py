"""Eight-bit weights in blocks, as com.microsoft.MatMulNBits reads them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# MatMulNBits takes an absent zero point for the middle of the range.
_ZERO_POINT = 128


@dataclass(frozen=True)
class QuantizedBlocks:
    """values: uint8 [out, blocks, block_size], scales: float32 [out, blocks]."""

    values: np.ndarray
    scales: np.ndarray
    block_size: int


def choose_block_size(in_features: int) -> int:
    """64, which the CPU kernels do fast, or 32 where it divides the width (or comes closer to it) and 64 does not."""
    return min((64, 32), key=lambda size: -in_features % size)


def quantize_blocks(weight: np.ndarray) -> QuantizedBlocks:
    """Round each block of a row to 255 steps, symmetric about zero. weight: float32 [out, in].

    A width that is no multiple of the block is padded with zeros, which the kernel ignores.
    """
    out_features, in_features = weight.shape
    size = choose_block_size(in_features)
    padded = np.pad(weight, ((0, 0), (0, -in_features % size))).reshape(out_features, -1, size)
    scales = np.abs(padded).max(axis=-1) / 127
    steps = np.rint(padded / np.where(scales == 0, 1, scales)[..., None])
    return QuantizedBlocks((steps + _ZERO_POINT).astype(np.uint8), scales.astype(np.float32), size)
