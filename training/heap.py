"""Memory that the C library keeps after it was freed. Nothing happens here where it is not glibc."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # names of mallopt's settings, from malloc.h
KEPT = 1 << 28
LARGEST_ON_HEAP = 1 << 25  # the most that glibc's own adjustment comes to


def keep_free_memory() -> None:
    """Keep up to KEPT bytes for the next activations, from here on in this process.

    By default glibc returns the end of its heap and all large blocks at once, so that each step takes thousands of
    pages anew: a tenth of the time of a step.
    """
    if mallopt := _of_glibc("mallopt"):
        mallopt(MMAP_THRESHOLD, LARGEST_ON_HEAP)
        mallopt(TRIM_THRESHOLD, KEPT)


def return_free_memory() -> None:
    """Give the pages between used blocks back.

    Activations come in blocks below 32 MiB, which glibc places on its heap. From one micro-batch to the next the holes
    grow: a network of 135M with an adapter took 2.7 GiB after a few, 1.9 so; it costs 7% of the time.
    """
    if trim := _of_glibc("malloc_trim"):
        trim(0)


@cache
def _of_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
