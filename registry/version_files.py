"""The files of a registered version: put in place whole, and read only where every byte is as it was registered."""

from __future__ import annotations

import shutil
from pathlib import Path

from twinloop.common.errors import UserError
from twinloop.common.files import fsync, link_or_copy
from twinloop.registry.artifact import MANIFEST, Manifest, integrity_error


def verified_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact, once every byte is found to match it. Raises UserError."""
    try:
        manifest = Manifest.read(folder / MANIFEST)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: no artifact here ({MANIFEST} is missing or changed); run the recipe again"
        ) from error
    if problem := integrity_error(folder, manifest):
        raise UserError(f"{folder}: {problem}; run the recipe again")
    return manifest


def version_error(folder: Path, digest: str) -> str | None:
    """What differs from what was registered under `digest`, in words; None if nothing does. Reads every byte."""
    try:
        manifest = Manifest.read(folder / MANIFEST)
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or changed"
    if manifest.digest != digest:
        return "another artifact than was registered lies"
    return integrity_error(folder, manifest)


def install(source: Path, target: Path, *, copy: bool) -> None:
    """Put `source`'s files at `target`, whole or not at all: copied, or hard-linked where that is possible."""

    def link(original: str, place: str) -> None:
        link_or_copy(Path(original), Path(place))

    new = target.with_name(f"{target.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(source, new, copy_function=shutil.copy2 if copy else link)
    for path in [*new.rglob("*"), new]:  # on disk before MLflow promises them
        fsync(path)
    new.rename(target)
