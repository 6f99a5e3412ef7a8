"""The secret of this project's own servers, Prefect's and MLflow's: made at first use and kept in state/."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from twinloop.common.errors import UserError
from twinloop.common.files import write_whole

USER = "twinloop"
_AUTH = re.compile(rf"{USER}:[A-Za-z0-9_-]{{32,}}")


def auth_file(project: Path) -> Path:
    """Where the secret is kept. The pages of both servers ask for what this file holds."""
    return project / "state" / "prefect.auth"


def auth_string(project: Path) -> str:
    """The secret as `user:password`, made where there is none. Only the owner of the file may read it.

    Raises UserError where the file holds anything else.
    """
    path = auth_file(project)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".auth.lock")):
        if not path.exists():
            write_whole(path, f"{USER}:{secrets.token_urlsafe(32)}\n".encode(), mode=0o600)
        text = _read(path)
    if not _AUTH.fullmatch(text):
        raise UserError(
            f"{path}: holds no `{USER}:<password>`; run `make down` and remove it, and the next start makes a new one"
        )
    return text


@contextmanager
def prefect_client(project: Path, url: str) -> Iterator[None]:
    """Meanwhile, this process and its children speak to the project's own server at `url`, the API's address."""
    ours = {"PREFECT_API_URL": url, "PREFECT_API_AUTH_STRING": auth_string(project)}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _read(path: Path) -> str:
    """The content of our own file, which then only its owner may read. A link is not followed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return ""
        raise
    with os.fdopen(descriptor, errors="replace") as file:
        text = file.read().strip()
        if _AUTH.fullmatch(text):
            os.fchmod(descriptor, 0o600)  # it may have been copied or restored with other rights
        return text
