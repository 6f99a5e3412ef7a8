"""`make` in a folder that was moved or copied with its environment."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[2] / "Makefile"
# In the place of Python, pip and `twinloop`: an environment of the real ones takes minutes.
PYTHON = """#!/bin/sh
case "$*" in
  *"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  *"-m pip"*)
    printf '#!%s/.venv/bin/python\\n' "$PWD" > .venv/bin/twinloop
    chmod +x .venv/bin/twinloop
    echo made >> made.log ;;
  *bin/twinloop*) echo "ran by $0" ;;
esac
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    shutil.copy(MAKEFILE, folder / "Makefile")
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).touch()
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return folder


def run(project: Path) -> str:
    command = ["make", "run", f"PYTHON={project.parent / 'python'}"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"ran by {project}/.venv/bin/python" in done.stdout
    return done.stdout


def times_made(project: Path) -> int:
    return len((project / "made.log").read_text().splitlines())


def test_an_environment_is_made_once(project: Path) -> None:
    run(project)
    assert "made in another folder" not in run(project)
    assert times_made(project) == 1


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_in_another_folder_it_is_made_again(how: str, project: Path) -> None:
    run(project)
    there = project.with_name("there")
    if how == "moved":
        project.rename(there)
    else:
        shutil.copytree(project, there)
    assert ".venv was made in another folder: it is made again" in run(there)
    assert times_made(there) == 2
    assert "made again" not in run(there)
