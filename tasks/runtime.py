"""What a stage of training runs on. It is part of every key: a sum in another order is another last bit."""

from __future__ import annotations

import ctypes
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from pydantic import BaseModel, ConfigDict

from models.errors import UserError
from tasks.recipe import Precision, Recipe


class Runtime(BaseModel):
    """Seed, threads and device of a run."""

    model_config = ConfigDict(frozen=True)

    seed: int
    threads: int
    device: Literal["cpu", "cuda"]

    @classmethod
    def of(cls, recipe: Recipe) -> Runtime:
        """Raises UserError where the recipe wants CUDA and there is none."""
        here = cuda_is_here()
        if recipe.device == "cuda" and not here:
            raise UserError("device: cuda, but torch finds no GPU on this machine; set it to auto or cpu")
        device: Literal["cpu", "cuda"] = "cuda" if here and recipe.device != "cpu" else "cpu"
        return cls(seed=recipe.seed, threads=recipe.threads, device=device)

    @property
    def precision(self) -> Precision:
        """What a checkpoint is measured in: the closest to the training that the device's engine runs."""
        return "bf16" if self.device == "cuda" else "fp32"


def cuda_is_here() -> bool:
    """Whether a GPU and a torch that can use it are here. The driver is asked: importing torch takes 1.5 s."""
    try:
        if version("torch").endswith("+cpu"):
            return False
        driver = ctypes.CDLL("libcuda.so.1")
    except (PackageNotFoundError, OSError):
        return False
    count = ctypes.c_int(0)
    return bool(driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0)
