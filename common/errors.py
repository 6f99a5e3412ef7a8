"""The one exception that means: the user can correct this. And the one fault that any library may meet: a full disk."""

from __future__ import annotations

import errno


class UserError(Exception):
    """A mistake in input, settings or usage. Its message is one line: what, where, and what to do.

    The `twinloop` command prints the message without a traceback and exits with code 2.
    """


_DISK_FULL = ("no space left on device", "disk is full", "disk quota exceeded", "os error 28")
"""As worded by SQLite, and by the libraries that write files from C++ and Rust."""


def is_disk_full(error: BaseException) -> bool:
    """Whether the error means that a disk is full. The errors that it was raised from are not examined."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error).lower()
    return any(words in text for words in _DISK_FULL)


def one_line(error: BaseException) -> str:
    """The message of the error, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    for each in (error, error.__cause__, error.__context__):
        # SQLAlchemy's name their origin, the statement, its parameters and an address; SQLite's own message is here.
        if isinstance(said := getattr(each, "orig", None), Exception):
            return one_line(said)
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
