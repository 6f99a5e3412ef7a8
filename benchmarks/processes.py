"""Other projects' commands and environments, and what is reported where they fail."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path

from twinloop.common.errors import UserError


def last_words(code: int, *texts: str) -> str:
    """Why a process ended: the last line of the first text that has one."""
    lines = next(filter(None, (text.strip().splitlines() for text in texts)), None)
    return lines[-1].strip()[:200] if lines else f"it ended with code {code}, without a word"


def call(what: str, command: Sequence[object], environment: Mapping[str, str] | None = None) -> str:
    """Run a command to its end; returns its stdout. Raises UserError, with its last words, where it fails."""
    try:
        done = subprocess.run(
            [*map(str, command)], capture_output=True, text=True, errors="replace", env=environment, check=False
        )
    except OSError as error:
        raise UserError(f"{what}: {error}") from None
    if done.returncode:
        raise UserError(f"{what}: {last_words(done.returncode, done.stderr, done.stdout)}")
    return done.stdout


def install(folder: Path, packages: Sequence[str]) -> Path:
    """The interpreter of the virtual environment in `folder`, made where it lacks one of these `name==version`.

    Raises UserError where pip cannot install them.
    """
    python, stamp = folder.absolute() / "bin" / "python", folder / ".installed"
    installed, wanted = dict[str, str](), _versions(packages)
    if stamp.exists():
        installed = _versions(stamp.read_text(encoding="utf-8").split())
        if installed.items() >= wanted.items():
            return python
    print(f"making {folder}: {', '.join(packages) or 'pip'}", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True)  # again where it was interrupted
    if packages:
        call(f"{folder}: pip install", [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages])
    stamp.write_text("\n".join(map("==".join, (installed | wanted).items())), encoding="utf-8")
    return python


def _versions(packages: Sequence[str]) -> dict[str, str]:
    return dict(package.split("==") for package in packages)
