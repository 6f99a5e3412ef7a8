"""What else the machine does while something is timed."""

from __future__ import annotations

import os
import time

import psutil

BUSY_CORES = 0.25
"""Used by other processes, from which on the times are not those of an idle machine."""


class OtherProcesses:
    """How many cores everything but this process uses, since it was made."""

    def __init__(self) -> None:
        self._start = self._now()

    def cores(self) -> float:
        wall, busy = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return max(0.0, busy / wall) if wall else 0.0

    @staticmethod
    def _now() -> tuple[float, float]:
        machine, own = psutil.cpu_times(), os.times()
        idle = machine.idle + getattr(machine, "iowait", 0.0)
        # a guest's time is already in `user`, and what the host took is not ours to use either
        everything = sum(machine) - getattr(machine, "guest", 0.0) - getattr(machine, "guest_nice", 0.0)
        return time.perf_counter(), everything - idle - own.user - own.system
