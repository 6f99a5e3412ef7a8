"""Memory that the C library keeps after it was freed. Nothing happens here where it is not glibc."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

from twinloop.common.memory import resident_bytes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # names of mallopt's settings, from malloc.h
KEPT = 1 << 28
LARGEST_ON_HEAP = 1 << 25  # the most that glibc's own adjustment comes to
GROWTH = 1.1
"""Of all memory, by holes."""


def keep_free_memory() -> None:
    """Keep up to KEPT bytes for the next activations, from here on in this process.

    By default glibc returns the end of its heap and all large blocks at once, so that each step takes thousands of
    pages anew: a tenth of the time of a step.
    """
    if mallopt := _of_glibc("mallopt"):
        mallopt(MMAP_THRESHOLD, LARGEST_ON_HEAP)
        mallopt(TRIM_THRESHOLD, KEPT)


def return_free_memory() -> None:
    """Give the pages between used blocks back."""
    if trim := _of_glibc("malloc_trim"):
        trim(0)


class Holes:
    """Memory between used blocks, given back once it has grown.

    Activations come in blocks below 32 MiB, which glibc places on its heap, and from one micro-batch to the next the
    holes between them may grow: a network of 135M with an adapter came to 2.7 GiB. To give them back after every
    micro-batch takes 1.95 GiB and a fifth of the time, for pages that are wanted again at once.
    """

    def __init__(self) -> None:
        self._without_holes = 0
        self._closed = True

    def close(self) -> None:
        """Call it after each micro-batch: the first since holes were closed says what one takes."""
        held = resident_bytes()
        if self._closed:
            self._without_holes, self._closed = max(self._without_holes, held), False
        if held > GROWTH * self._without_holes:
            return_free_memory()
            self._closed = True


@cache
def _of_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
