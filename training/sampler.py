"""The engine that ships, bound to the weights that train: what the optimizer changed, the next rollout sees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from onnxruntime import OrtValue
from torch import Tensor

from models.decoder import Decoder
from serving.batch import Completion
from serving.engine import Engine

SLOTS = 64  # rows of a decode step; more only wait longer for the longest of them


class BoundSampler:
    """Samples from a network that is being trained.

    On CPU the graph's initializers are the parameters themselves. On CUDA, where the network keeps float32 and the
    engine's kernels take 16 bits, they are a bf16 shadow on the same device, refreshed before each use.
    """

    def __init__(self, model: Decoder, *, max_length: int, sequences: int, threads: int | None = None):
        """max_length: the longest prompt with its completion. sequences: how many are asked for at once.

        threads: of the engine; None leaves the choice to it.
        """
        self._weights: dict[str, Tensor] = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self._bound = self._weights
        self._on_cuda = next(iter(self._weights.values())).is_cuda
        if self._on_cuda:
            self._bound = {name: tensor.bfloat16() for name, tensor in self._weights.items()}
            torch.cuda.synchronize()
        initializers = {name: OrtValue.from_dlpack(tensor) for name, tensor in self._bound.items()}
        self.engine = Engine.from_weights(
            model.config, initializers, max_length=max_length, slots=min(sequences, SLOTS), threads=threads
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        group: int,
        max_tokens: int,
        temperature: float,
        seed: int,
        stop_ids: Sequence[int],
    ) -> list[Completion]:
        """Complete each prompt `group` times with the weights as they stand; see Engine.generate."""
        if self._on_cuda:
            torch._foreach_copy_(list(self._bound.values()), list(self._weights.values()))
            torch.cuda.synchronize()
        return self.engine.generate(
            prompts, max_tokens=max_tokens, temperature=temperature, seed=seed, group=group, stop_ids=stop_ids
        )
