"""What training runs on. It is part of every key: a sum in another order is another last bit."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from pydantic import BaseModel, ConfigDict

from twinloop.models.config import Precision


class Runtime(BaseModel):
    """Seed, threads and device of a run."""

    model_config = ConfigDict(frozen=True)

    seed: int
    threads: int
    device: Literal["cpu", "cuda"] = "cpu"

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
