"""The same bits each time, also on CUDA: for the loop, and for whatever computes before it starts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """CUDA kernels that add in a fixed order. On CPU the ones we use already do. May be nested."""
    if device.type != "cuda":
        yield
        return
    # What cuBLAS asks for. It reads it at its first use in a process, so nothing may multiply on CUDA outside of here.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    memory: Any = torch.utils.deterministic  # its switch is a property of the module, which no type checker sees
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # a debugging aid that costs a kernel for each allocation
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill
