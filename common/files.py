"""Files that are written whole or not at all, and flushed to disk."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


@contextmanager
def folder_beside(place: Path) -> Iterator[Path]:
    """An empty folder in the one that `place` is in, for what is renamed to it once it is whole. It is removed at the
    end; what a process that was killed left there, before.

    Raises BlockingIOError where another process uses it.
    """
    folder = place.with_name(f".{place.name}.twinloop-new")
    descriptor = _locked(folder)
    try:
        for left in folder.iterdir():
            shutil.rmtree(left)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


def _locked(folder: Path) -> int:
    """A descriptor of the folder, made where it is not there, with a lock that ends with its process, however that
    dies. Raises BlockingIOError where another process has it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # the process that had it has just removed it
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_there = os.path.samestat(os.fstat(descriptor), folder.stat())
            except BaseException:
                os.close(descriptor)
                raise
            if is_there:
                return descriptor
            os.close(descriptor)


def write_all(descriptor: int, content: bytes) -> None:
    """Write at the position of the descriptor. Raises OSError, after a part perhaps: a disk that is full takes what
    still fits, and reports it only with the next write."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
