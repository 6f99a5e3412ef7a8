"""The engine that ships, bound to the weights that train: what the optimizer changed, the next rollout sees."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from onnxruntime import OrtValue
from torch import Tensor

from twinloop.models.decoder import Decoder
from twinloop.serving.engine import Completion, Engine
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.serving.engine.session import session_threads
from twinloop.training.adapters import adapter_form

SLOTS = 64  # rows of a decode step; more only wait longer for the longest of them


class BoundSampler:
    """Samples from a network that is being trained.

    On CPU the graph's initializers are the parameters themselves, those of an adapter too. On CUDA, where the network
    keeps float32 and the engine's kernels take 16 bits, they are a bf16 shadow on the same device, refreshed before
    each use.

    A small network's engine is no faster with a second thread, so several engines over the same weights share the
    prompts, a thread each.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        max_length: int,
        prompts: int,
        group: int,
        threads: int = 1,
        vocab_size: int | None = None,
    ):
        """max_length: the longest prompt with its completion. prompts, group: how many are asked for at once.

        threads: of the CPU, together. vocab_size: of the tokenizer; by default the network's.
        """
        self._weights: dict[str, Tensor] = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self._bound = self._weights
        self._on_cuda = next(iter(self._weights.values())).is_cuda
        if self._on_cuda:
            self._bound = {name: tensor.bfloat16() for name, tensor in self._weights.items()}
            torch.cuda.synchronize()
        initializers = {name: OrtValue.from_dlpack(tensor) for name, tensor in self._bound.items()}
        engines = 1 if self._on_cuda else min(threads // session_threads(model.config, "cpu", threads), prompts)
        slots = min(-(-prompts // engines) * group, SLOTS)
        self.engines = [
            Engine.from_weights(
                model.config,
                initializers,
                max_length=max_length,
                slots=slots,
                threads=threads,
                vocab_size=vocab_size,
                lora=adapter_form(model),
            )
            for _ in range(engines)
        ]
        self._pool = ThreadPoolExecutor(engines, thread_name_prefix="sampler")

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, group: int) -> list[Completion]:
        """Complete each prompt `group` times with the current weights; see Engine.generate.

        A function of weights, arguments, slots and number of threads.
        """
        if self._on_cuda:
            torch._foreach_copy_(list(self._bound.values()), list(self._weights.values()))
            torch.cuda.synchronize()
        share = -(-len(prompts) // len(self.engines))

        def complete(engine: Engine, start: int) -> list[Completion]:
            mine = prompts[start : start + share]
            return engine.generate(mine, params, group=group, first_sequence=start * group)

        parts = self._pool.map(complete, self.engines, range(0, len(prompts), share))
        return [completion for part in parts for completion in part]
