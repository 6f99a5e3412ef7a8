"""Files that are written whole or not at all, and flushed to disk."""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path

MIN_FREE_BYTES = 4 * 2**20
"""With less on its disk, what failed there needs no other explanation: a database and its journal take a few pages."""


def free_bytes(path: Path) -> int:
    """What is free on the disk of that file, or of the folder that it would be in."""
    place = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(place).free


def has_space(path: Path) -> bool:
    """Whether the disk of that file, or of the folder that it would be in, has free space."""
    return free_bytes(path) >= MIN_FREE_BYTES


def file_digest(path: Path) -> str:
    """Sha256. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Return when the file, or the folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(original: Path, place: Path) -> None:
    """Hard-link a file that nobody writes to, or copy it where that cannot be."""
    try:
        place.hardlink_to(original)
    except OSError:  # another file system, or one without links
        shutil.copy2(original, place)


def write_whole(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Make the file hold this content: all of it, on disk, or what it held before. Raises OSError."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        beside.replace(path)
    except OSError:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def write_all(descriptor: int, content: bytes) -> None:
    """Write at the position of the descriptor. Raises OSError, after a part perhaps: a disk that is full takes what
    still fits, and reports it only with the next write."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
