"""By which time speeds are measured.

On one core, it is the CPU time of the process: what an idle core would take, whatever neighbours take of this one.
Threads that wait for each other spend CPU time too, so on more cores it is the clock's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    by_cpu: bool

    @classmethod
    def on(cls, cores: int) -> Clock:
        return cls(by_cpu=cores == 1)

    @property
    def rate(self) -> str:
        return "tokens/CPU s" if self.by_cpu else "tokens/s"

    @property
    def milliseconds(self) -> str:
        return "CPU ms" if self.by_cpu else "ms"


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of another process, the ended ones too (Linux: as clock_getcpuclockid(3) makes it)."""
    return time.clock_gettime(~pid << 3 | 2)
