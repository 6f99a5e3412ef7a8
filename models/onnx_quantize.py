"""Eight- and four-bit weights in blocks, as com.microsoft.MatMulNBits reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# MatMulNBits takes an absent zero point for the middle of the range.
_ZERO_POINT = 128
_MIDDLE, _LAST = 8, 15  # of four bits

FOUR_BIT_BLOCK = 32
"""Smaller blocks follow the weights more closely: at 64 the error of a block is a fifth larger."""

_EIGHT_BITS = ("embed_tokens.weight", "lm_head.weight", "v_proj.weight", "down_proj.weight")
"""In int4 these keep eight bits: every token passes through the vocabulary, and values and the MLP's output are the
most sensitive of the rest. SmolLM2-135M's divergence from float32 falls from 0.20 to 0.08 nats a token by the last two,
for 12 MiB of 106."""


def takes_four_bits(name: str) -> bool:
    """Whether int4 keeps a matrix of this name in four bits; in eight otherwise."""
    return not name.endswith(_EIGHT_BITS)


@dataclass(frozen=True)
class QuantizedBlocks:
    """values: uint8 [out, blocks, block_size * bits / 8], of two four-bit values in a byte the earlier one low.
    scales: float32 [out, blocks]. zero_points: uint8 [out, blocks * bits / 8, rounded up], packed as the values are;
    None: the middle of the range."""

    values: np.ndarray
    scales: np.ndarray
    block_size: int
    bits: int = 8
    zero_points: np.ndarray | None = None


def choose_block_size(in_features: int) -> int:
    """64, which the CPU kernels do fast, or 32 where it divides the width (or comes closer to it) and 64 does not."""
    return min((64, 32), key=lambda size: -in_features % size)


def quantize_blocks(weight: np.ndarray) -> QuantizedBlocks:
    """Round each block of a row to 255 steps, symmetric about zero. weight: float32 [out, in].

    A width that is no multiple of the block is padded with zeros, which the kernel ignores.
    """
    size = choose_block_size(weight.shape[1])
    blocks = _in_blocks(weight, size)
    scales = np.abs(blocks).max(axis=-1) / 127
    steps = np.rint(blocks / np.where(scales == 0, 1, scales)[..., None])
    return QuantizedBlocks((steps + _ZERO_POINT).astype(np.uint8), scales.astype(np.float32), size)


def quantize_four_bit_blocks(weight: np.ndarray) -> QuantizedBlocks:
    """Round each block of a row to 16 steps. weight: float32 [out, in], padded as by `quantize_blocks`.

    Of each block, that grid is taken whose squared error is least: symmetric about zero, or between its least and its
    greatest weight; each with the scale that fits its steps best. (Grids of less than a block's range, which round its
    largest weight down, have a smaller error still, and a larger divergence of the answers.)
    """
    blocks = _in_blocks(weight, FOUR_BIT_BLOCK)
    least = np.full(blocks.shape[:-1], np.inf, np.float32)
    steps, zeros = np.zeros(blocks.shape, np.uint8), np.full(blocks.shape[:-1], _MIDDLE, np.uint8)
    scales = np.zeros(blocks.shape[:-1], np.float32)
    for scale, zero in _grids(blocks):
        safe = np.where(scale == 0, 1, scale)
        tried = np.clip(np.rint(blocks / safe[..., None]) + zero[..., None], 0, _LAST)
        centred = tried - zero[..., None]
        squares = np.square(centred).sum(axis=-1)
        fitted = np.where(squares == 0, 0, (blocks * centred).sum(axis=-1) / np.where(squares == 0, 1, squares))
        error = np.square(blocks - centred * fitted[..., None]).sum(axis=-1)
        better = error < least
        least = np.where(better, error, least)
        scales = np.where(better, fitted, scales)
        zeros = np.where(better, zero, zeros).astype(np.uint8)
        steps = np.where(better[..., None], tried, steps).astype(np.uint8)
    return QuantizedBlocks(_packed(steps), scales.astype(np.float32), FOUR_BIT_BLOCK, 4, _packed(zeros))


def _grids(blocks: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(scale, zero point) of every grid that is tried, each [out, blocks]."""
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1, keepdims=True), axis=-1)[..., 0]
    low, high = np.minimum(blocks.min(axis=-1), 0), np.maximum(blocks.max(axis=-1), 0)
    # The range has one step more below its middle than above: the largest weight gets it, by the scale's sign.
    yield -extreme / _MIDDLE, np.full(extreme.shape, _MIDDLE, np.float32)
    scale = (high - low) / _LAST
    yield scale, np.rint(-low / np.where(scale == 0, 1, scale))


def _in_blocks(weight: np.ndarray, size: int) -> np.ndarray:
    """float32 [out, blocks, size]."""
    return np.pad(weight, ((0, 0), (0, -weight.shape[1] % size))).reshape(len(weight), -1, size)


def _packed(values: np.ndarray) -> np.ndarray:
    """Two four-bit values to a byte along the last axis, the earlier one low; an odd one is alone in its byte."""
    even = np.pad(values, (*[(0, 0)] * (values.ndim - 1), (0, values.shape[-1] % 2)))
    packed: np.ndarray = even[..., ::2] | (even[..., 1::2] << 4)
    return packed
