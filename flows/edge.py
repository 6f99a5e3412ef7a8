"""The edge of every command: whatever a library raises becomes one line that says what, where and what to do."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from common.errors import UserError, is_disk_full, one_line

MISTAKE, UNFORESEEN, INTERRUPTED = 2, 3, 130
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
READ_ONLY = ("readonly database", "read-only file system", "permission denied", "unable to open database file")


def run_command(command: Callable[[], int | None], *, project: Path | None = None) -> int:
    """The exit code of `command`: its own, 2 for what its user can correct, 3 for what nobody foresaw, 130 on Ctrl-C.

    project: the folder to name where an error names no file; by default the current one.
    """
    try:
        return command() or 0
    except KeyboardInterrupt:
        return _say("stopped", INTERRUPTED)
    except BrokenPipeError:  # whoever read the output has left: `twinloop status | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if known := explain(error, project or Path.cwd()):
            return _say(known, MISTAKE)
        return _say(_unforeseen(error, project or Path.cwd()), UNFORESEEN)


def explain(error: BaseException, folder: Path) -> str | None:
    """The error in one line, where it is one that a user can do something about. folder: where it happened, unless the
    error says so itself."""
    chain = list(_chain(error))
    for each in chain:
        if isinstance(each, UserError):
            return str(each)
    for each in chain:
        where = _file(each) or folder
        if is_disk_full(each):
            free = f"{shutil.disk_usage(_existing(where)).free / 2**20:,.1f} MiB are free"
            return f"{where}: the disk is full ({free}); make room and run it again: it goes on from there"
        if _is_forbidden(each):
            return f"{where}: cannot be written ({one_line(each)}); see to the permissions of its folder"
    return None


def _unforeseen(error: BaseException, project: Path) -> str:
    """The error in one line, and its traceback in a file of state/, or on stderr where that cannot be written."""
    told = "".join(traceback.format_exception(error))
    log = project / "state" / "errors" / f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%S.%f}.log"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(told)
    except OSError:
        print(told, file=sys.stderr)
        return f"unexpected {type(error).__name__}: {one_line(error)}; please report it"
    return f"unexpected {type(error).__name__}: {one_line(error)}; please report it with {log}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and the members of groups; the outermost first."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop(0)
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        if isinstance(each, BaseExceptionGroup):
            waiting += each.exceptions
        waiting += [each.__cause__, each.__context__]


def _is_forbidden(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in FORBIDDEN:
        return True
    text = str(error).lower()
    return any(words in text for words in READ_ONLY)


def _file(error: BaseException) -> Path | None:
    name = getattr(error, "filename", None)
    return Path(os.fsdecode(name)) if isinstance(name, (str, bytes)) and name else None


def _existing(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _say(message: str, code: int) -> int:
    print(f"twinloop: {' '.join(message.split())}", file=sys.stderr)
    return code
