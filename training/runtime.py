"""What training runs on. It is part of every key: a sum in another order is another last bit."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from twinloop.models.config import Precision

if TYPE_CHECKING:
    from torch import Tensor

MUCH_FASTER = 1.4
"""From which on another way to multiply is taken. Where one gains at all it is about twice as fast."""
DOUBTFUL = (1.2, 1.7)
"""How many times as fast is too near to MUCH_FASTER. A machine has to decide alike each time: it is a part of every
key. Beside other work the least of 20 times is up to a third off, that of 300 is not."""
FLOAT32_ERROR = 1e-5
"""Of a product of normal numbers, relative to its largest: rounding in float32 leaves 1e-6, in bfloat16 4e-3."""
ROUNDS, MOST_ROUNDS = 20, 300


class Runtime(BaseModel):
    """Seed, threads and device of a run, and how its matrices are multiplied (`models.products`)."""

    model_config = ConfigDict(frozen=True)

    seed: int
    threads: int
    device: Literal["cpu", "cuda"] = "cpu"
    library: Literal["blas", "onednn"] = "blas"
    backward: Literal["float32", "bfloat16"] = "float32"

    @property
    def precision(self) -> Precision:
        """What a checkpoint is measured in: the closest to the training that the device's engine runs."""
        return "bf16" if self.device == "cuda" else "fp32"

    def use(self) -> None:
        """Let torch compute so, from here on, in this process."""
        import torch

        from twinloop.models.products import Products, use_products

        torch.set_num_threads(self.threads)
        use_products(Products(self.library, self.backward))


@functools.cache
def fastest_products() -> tuple[Literal["blas", "onednn"], Literal["float32", "bfloat16"]]:
    """What multiplies float32 faster on this CPU, and whether bfloat16 is faster still, by a tenth of a second of
    products, besides torch's import; by a second where that leaves doubt.
    """
    import torch

    from twinloop.models.products import float32_products

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) for shape in ((512, 256), (256, 512)))

    def by(library: str) -> Tensor:
        with float32_products(library):
            return a @ b

    def rounded() -> Tensor:
        return a.bfloat16() @ b.bfloat16()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = least_seconds({"blas": lambda: by("blas"), "onednn": lambda: by("onednn"), "bfloat16": rounded})
        exact = (a.double() @ b.double()).float()
        error = float((by("onednn") - exact).abs().max() / exact.abs().max())
    finally:
        torch.set_num_threads(threads)
    return choose_products(seconds, error)


def least_seconds(products: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """The least CPU time of each, in turns, until none of them is a doubtful number of times as fast as another."""
    seconds = dict.fromkeys(products, float("inf"))
    for done in range(1, MOST_ROUNDS + 1):
        for name, product in products.items():
            started = time.thread_time()
            product()
            seconds[name] = min(seconds[name], time.thread_time() - started)
        gains = (slower / faster for slower, faster in itertools.permutations(seconds.values(), 2))
        if done >= ROUNDS and not any(DOUBTFUL[0] < gain < DOUBTFUL[1] for gain in gains):
            break
    return seconds


def choose_products(
    seconds: Mapping[str, float], onednn_error: float
) -> tuple[Literal["blas", "onednn"], Literal["float32", "bfloat16"]]:
    """seconds: of a product by `blas` and `onednn` in float32, and in `bfloat16`. onednn_error: as FLOAT32_ERROR."""
    library: Literal["blas", "onednn"] = "blas"
    if onednn_error < FLOAT32_ERROR and seconds["blas"] > MUCH_FASTER * seconds["onednn"]:
        library = "onednn"
    return library, "bfloat16" if seconds[library] > MUCH_FASTER * seconds["bfloat16"] else "float32"


def cuda_is_here() -> bool:
    """Whether a GPU is here that both torch and ONNX Runtime can use. Torch itself is not asked: its import takes
    1.5 s."""
    from twinloop.serving.engine.session import cuda_devices  # a recipe may be checked without ONNX Runtime's 0.1 s

    try:
        return not version("torch").endswith("+cpu") and cuda_devices() > 0
    except PackageNotFoundError:
        return False
