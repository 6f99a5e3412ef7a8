"""The one exception that means: the user can correct this. And the one fault that any library may meet: a full disk."""

from __future__ import annotations

import errno


class UserError(Exception):
    """A mistake in input, settings or usage. Its message is one line: what, where, and what to do.

    The `twinloop` command prints the message without a traceback and exits with code 2.
    """


_DISK_FULL = ("no space left on device", "disk is full", "disk quota exceeded", "os error 28")
"""As SQLite, and the libraries that write files from C++ and Rust, say it."""


def is_disk_full(error: BaseException) -> bool:
    """Whether the error says that there is no room on a disk. What it was raised from is not asked."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error).lower()
    return any(words in text for words in _DISK_FULL)


def one_line(error: BaseException) -> str:
    """What the error says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    for each in (error, error.__cause__, error.__context__):
        # SQLAlchemy's say where they come from, the statement, its parameters and an address; what SQLite said is here.
        if isinstance(said := getattr(each, "orig", None), Exception):
            return one_line(said)
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
