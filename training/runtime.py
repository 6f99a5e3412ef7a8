"""What training runs on. It is part of every key: a sum in another order is another last bit."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from twinloop.models.config import Precision

if TYPE_CHECKING:
    from torch import Tensor

MUCH_FASTER = 1.4
"""From which on another way to multiply is taken. Where one gains at all it is about twice as fast, so that noise does
not decide, and a machine decides alike each time."""
FLOAT32_ERROR = 1e-5
"""Of a product of normal numbers, relative to its largest: rounding in float32 leaves 1e-6, in bfloat16 4e-3."""
ROUNDS = 20


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
    products, besides torch's import.
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

    products = {"blas": lambda: by("blas"), "onednn": lambda: by("onednn"), "bfloat16": rounded}
    seconds = dict.fromkeys(products, float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(ROUNDS):
            for name, product in products.items():
                started = time.thread_time()
                product()
                seconds[name] = min(seconds[name], time.thread_time() - started)
        exact = (a.double() @ b.double()).float()
        error = float((by("onednn") - exact).abs().max() / exact.abs().max())
    finally:
        torch.set_num_threads(threads)
    return choose_products(seconds, error)


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
