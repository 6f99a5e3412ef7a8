"""Memory of this process, and what it can still take."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil


def peak_bytes() -> int:
    """The most that this process held. On Linux ru_maxrss may be the parent's, so the kernel's mark is read."""
    status = Path("/proc/self/status")
    if status.exists():
        marks = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(marks["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes


def resident_bytes() -> int:
    """What this process holds."""
    held: int = psutil.Process().memory_info().rss
    return held


def available_bytes(root: Path = Path("/")) -> int:
    """What the machine has available or, where that is less, what the limits of this process's cgroups leave.

    Pages of files that the kernel can drop count as available in both. root: of the files that name the cgroups.
    """
    return max(0, min([psutil.virtual_memory().available, *_cgroup_rests(root)]))


# By the version of cgroups: below /sys/fs/cgroup, the limit, what is used, and the pages of files in memory.stat.
_CGROUP_FILES = {
    1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
    2: ("", "memory.max", "memory.current", ("active_file", "inactive_file")),
}


def _cgroup_rests(root: Path) -> Iterator[int]:
    """What each limited cgroup leaves, from this process's own to the outermost that is mounted here."""
    listing = root / "proc/self/cgroup"
    for line in listing.read_text().splitlines() if listing.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, limit_file, used_file, droppable = _CGROUP_FILES[1 if controllers else 2]
        own = PurePosixPath(path)
        for group in (own, *own.parents):
            folder = root / "sys/fs/cgroup" / mount / str(group).lstrip("/")
            # In a container the path may be that of the host, and only the mount itself is there.
            if not (folder / limit_file).exists() or (limit := (folder / limit_file).read_text().strip()) == "max":
                continue
            pages = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / used_file).read_text()) - sum(int(pages[name]) for name in droppable)
            yield int(limit) - used
