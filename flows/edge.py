"""The edge of every command: whatever a library raises becomes one line: what, where and what to do."""

from __future__ import annotations

import errno
import os
import select
import sqlite3
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from twinloop.common.errors import UserError, is_disk_full, one_line
from twinloop.common.files import free_bytes, has_space
from twinloop.registry.database import is_locked

MISTAKE, UNFORESEEN, INTERRUPTED, READER_LEFT = 2, 3, 130, 141
STDOUT = 1
FREE_SPACE = "free some space and run it again: it goes on from there"
OTHER_MLFLOW = "see to it, or unset MLFLOW_TRACKING_URI"
NO_ANSWER_OF_MLFLOW = "API request to "
"""How the message of its client begins then (3.17)."""
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
FORBIDDEN_TO_SQLITE = ("readonly database", "unable to open database file")
BUGS = (LookupError, TypeError, AttributeError, NameError, AssertionError, ArithmeticError)
"""Raised while something else was handled, these do not explain that."""


def run_command(command: Callable[[], int | None]) -> int:
    """The exit code of `command`: its own, 2 for what its user can correct, 3 for what nobody foresaw, 130 on Ctrl-C,
    141 where the reader of its output has left."""
    try:
        code = command() or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _say("stopped", INTERRUPTED)
    except Exception as error:
        if isinstance(error, OSError):
            _give_up_output()
        if isinstance(error, BrokenPipeError) and _reader_left():  # `twinloop status | head -1`
            return READER_LEFT
        folder = _project()
        if known := explain(error, folder):
            return _say(known, MISTAKE)
        return _say(_unforeseen(error, folder), UNFORESEEN)
    return code


def explain(error: BaseException, folder: Path) -> str | None:
    """The error in one line, where it is one that a user can do something about. folder: where it happened, unless the
    error names it."""
    for each in _chain(error, contexts=False):
        if isinstance(each, UserError):
            return str(each)
    for each in _chain(error, contexts=not isinstance(error, BUGS)):
        if is_disk_full(each):
            written = _written(each)
            return f"{_full(written, folder)}; {FREE_SPACE} ({_space(error, written or folder)})"
        if isinstance(each, OSError) and each.errno in FORBIDDEN and (file := _file(each)):
            return f"{file}: cannot be used ({one_line(each)}); see to its permissions and its folder's"
        if isinstance(each, NotADirectoryError) and (file := _file(each)):
            return f"{file}: a part of this path is a file and no folder; name another place"
        if _is_sqlites(each) and any(words in str(each) for words in FORBIDDEN_TO_SQLITE):
            return f"{folder}: a database cannot be used ({one_line(each)}); see to the permissions of its folder"
        if is_locked(getattr(each, "orig", each)):
            return f"{folder}: another process keeps a database locked; wait for its end, or end it, and try again"
        if refused := _refused_credentials(each):
            return f"{refused} (for a server of `make up`: the line in state/prefect.auth)"
    if not isinstance(error, BUGS) and not has_space(folder):  # Prefect's server only reports that it failed
        what = f"{type(error).__name__}: {one_line(error)}"
        return f"{_full(None, folder)} ({what}); {FREE_SPACE} ({_space(error, folder)})"
    # After that: a full disk makes Prefect's server and MLflow's answer 500.
    found = map(_unreachable, _chain(error, contexts=not isinstance(error, BUGS)))
    return next(filter(None, found), None)


def _full(file: Path | None, folder: Path) -> str:
    """Which disk is full. An error without a file may be about any."""
    if file or not has_space(folder):
        return f"{file or folder}: the disk is full"
    return f"a disk is full, and it is not that of {folder}"


def _space(error: BaseException, place: Path) -> str:
    """What is free there and, where the command has noted it, what it needs."""
    free = f"{free_bytes(place) / 2**20:,.1f} MiB are free there"
    return "; ".join([free, *getattr(error, "__notes__", ())])


def _unforeseen(error: BaseException, project: Path) -> str:
    """The error in one line, and its traceback in a file of state/, or on stderr where that cannot be written."""
    trace = "".join(traceback.format_exception(error))
    log = project / "state" / "errors" / f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%S.%f}.log"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(trace)
    except OSError:
        print(trace, file=sys.stderr)
        return f"unexpected {type(error).__name__}: {one_line(error)}; please report it"
    return f"unexpected {type(error).__name__}: {one_line(error)}; please report it with {log}"


def _chain(error: BaseException, *, contexts: bool) -> Iterator[BaseException]:
    """The error, what it was raised from, and the members of groups; the outermost first. contexts: also what was being
    handled when it was raised."""
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
        waiting.append(each.__cause__)
        if contexts and not each.__suppress_context__:
            waiting.append(each.__context__)


def _is_sqlites(error: BaseException) -> bool:
    return isinstance(error, sqlite3.Error) or isinstance(getattr(error, "orig", None), sqlite3.Error)


def _refused_credentials(error: BaseException) -> str | None:
    """Which server refused them, and what to set; None for another error. Neither library is imported for it."""
    library = type(error).__module__.partition(".")[0]
    if library == "prefect" and getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        url = os.environ.get("PREFECT_API_URL")
        return f"{url}: Prefect's server refuses the credentials; set PREFECT_API_AUTH_STRING"
    if library == "mlflow" and getattr(error, "error_code", None) in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        variables = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        return f"{os.environ.get('MLFLOW_TRACKING_URI')}: MLflow's server refuses the credentials; set {variables}"
    return None


def _unreachable(error: BaseException) -> str | None:
    """Which server or database is away or broken, and what to do; None for another error. Imports no library."""
    library, name = type(error).__module__.partition(".")[0], type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None) or 0
    mlflow, reason = _address("MLFLOW_TRACKING_URI"), _why(error)
    broken = library == "mlflow" and getattr(error, "error_code", None) in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE")
    # MLflow's server answers with JSON, also errors: with anything else something other is at that address.
    other = library == "mlflow" and name == "MlflowException" and str(error).startswith(NO_ANSWER_OF_MLFLOW)
    if library in ("requests", "urllib3") or ((broken or other) and mlflow.startswith("http")):
        return f"{mlflow}: MLflow's server does not answer as it should ({reason}); {OTHER_MLFLOW}"
    if library == "sqlalchemy" and name == "OperationalError" and not _is_sqlites(error):
        return f"{mlflow}: the database does not answer ({reason}); {OTHER_MLFLOW}"
    if library in ("httpx", "httpcore") or (library == "prefect" and status >= 500):
        url = _address("PREFECT_API_URL")
        return f"{url}: Prefect's server does not answer as it should ({reason}); start it, or unset PREFECT_API_URL"
    return None


def _why(error: BaseException) -> str:
    """What a client's long message comes from: the system's own words, or those at its end."""
    if found := next((each for each in _chain(error, contexts=True) if isinstance(each, OSError) and each.errno), None):
        return one_line(found)
    return " ".join(str(error).split()).rpartition("Caused by ")[2].rstrip(")")[:300]


def _address(variable: str) -> str:
    """What the variable names, without the password in it; the variable where it is not set."""
    named = os.environ.get(variable) or variable
    before, _, host = named.rpartition("@")
    return f"{before.partition('://')[0]}://{host}" if before else named


def _file(error: BaseException) -> Path | None:
    return _path(getattr(error, "filename", None))


def _written(error: BaseException) -> Path | None:
    """The file that was to be written: of a copy the second one."""
    return _path(getattr(error, "filename2", None)) or _file(error)


def _path(name: object) -> Path | None:
    return Path(os.fsdecode(name)) if isinstance(name, (str, bytes)) and name else None


def _project() -> Path:
    from twinloop.tasks.context import find_project

    try:
        return find_project()
    except UserError:
        return Path.cwd()


def _give_up_output() -> None:
    """Where standard output takes nothing more, it is not tried again when the process ends."""
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def _reader_left() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    try:
        output = select.poll()
        output.register(STDOUT, 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in output.poll(0))
    except (OSError, ValueError):  # it is closed, or no file at all
        return False


def _say(message: str, code: int) -> int:
    print(f"twinloop: {' '.join(message.split())}", file=sys.stderr)
    return code
