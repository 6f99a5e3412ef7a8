"""What a stage of training runs on. It is part of every key: a sum in another order is another last bit."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from pydantic import BaseModel, ConfigDict

from twinloop.common.errors import UserError
from twinloop.models.config import Precision
from twinloop.tasks.recipe import Recipe


class Runtime(BaseModel):
    """Seed, threads and device of a run."""

    model_config = ConfigDict(frozen=True)

    seed: int
    threads: int
    device: Literal["cpu", "cuda"]

    @classmethod
    def of(cls, recipe: Recipe) -> Runtime:
        """Raises UserError where the recipe wants CUDA, or a precision that only CUDA runs, and there is none."""
        here = cuda_is_here()
        if recipe.device == "cuda" and not here:
            raise UserError("device: cuda, but torch finds no GPU on this machine; set it to auto or cpu")
        device: Literal["cpu", "cuda"] = "cuda" if here and recipe.device != "cpu" else "cpu"
        if device == "cpu" and (wrong := recipe.export.only_on_cuda()):
            raise UserError(
                f"export.precisions: {wrong} runs on CUDA only, and this machine has no GPU; take fp32 or int8"
            )
        return cls(seed=recipe.seed, threads=recipe.threads, device=device)

    @property
    def precision(self) -> Precision:
        """What a checkpoint is measured in: the closest to the training that the device's engine runs."""
        return "bf16" if self.device == "cuda" else "fp32"


def cuda_is_here() -> bool:
    """Whether a GPU is here that both torch and ONNX Runtime can use. Torch itself is not asked: its import takes
    1.5 s."""
    from twinloop.serving.engine.session import cuda_devices  # a recipe may be checked without ONNX Runtime's 0.1 s

    try:
        return not version("torch").endswith("+cpu") and cuda_devices() > 0
    except PackageNotFoundError:
        return False
