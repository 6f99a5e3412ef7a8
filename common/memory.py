"""Memory of this process."""

from __future__ import annotations

import resource
from pathlib import Path


def peak_bytes() -> int:
    """The most that this process held. On Linux ru_maxrss may be the parent's, so the kernel's mark is read."""
    status = Path("/proc/self/status")
    if status.exists():
        marks = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(marks["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes
