"""What is installed: every package folder and every file in one, under the one import name."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).parents[2]
SETUPTOOLS: dict[str, Any] = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS: dict[str, str] = SETUPTOOLS["package-dir"]
DATA: dict[str, list[str]] = SETUPTOOLS["package-data"]


def package_of(folder: Path) -> str:
    return ".".join(("twinloop", *folder.relative_to(PROJECT).parts))


def package_folders() -> Iterator[Path]:
    for top in FOLDERS.values():
        yield from (file.parent for file in (PROJECT / top).rglob("__init__.py"))


def files_in_packages() -> Iterator[Path]:
    for top in FOLDERS.values():
        yield from (file for file in (PROJECT / top).rglob("*") if file.is_file() and "__pycache__" not in file.parts)


def is_installed(file: Path) -> bool:
    """As a module of its folder, or by a pattern of the package that is nearest above it; `*` ends at a slash."""
    if file.suffix == ".py" and (file.parent / "__init__.py").is_file():
        return True
    package = next(folder for folder in file.parents if (folder / "__init__.py").is_file())
    parts = file.relative_to(package).parts
    patterns = [Path(pattern).parts for pattern in DATA.get(package_of(package), [])]
    return any(len(pattern) == len(parts) and all(map(fnmatch, parts, pattern)) for pattern in patterns)


def test_every_package_folder_is_listed() -> None:
    top = {folder.parent.name for folder in PROJECT.glob("*/__init__.py")} - {"benchmarks", "tests"}
    assert {f"twinloop.{name}": name for name in top} == FOLDERS
    assert sorted(SETUPTOOLS["packages"]) == sorted(map(package_of, package_folders()))


def test_every_file_in_a_package_is_installed() -> None:
    assert [str(file.relative_to(PROJECT)) for file in files_in_packages() if not is_installed(file)] == []


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


@pytest.mark.parametrize("folder", [*FOLDERS.values(), "benchmarks", "tests"])
def test_packages_are_imported_by_their_whole_name(folder: str) -> None:
    bare = [
        f"{file.relative_to(PROJECT)}: {name}"
        for file in (PROJECT / folder).rglob("*.py")
        for name in imported(file)
        if name.split(".")[0] in ("", *FOLDERS.values())
    ]
    assert bare == []
