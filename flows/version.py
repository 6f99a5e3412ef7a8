"""Which Twinloop this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def version_text() -> str:
    """The package's version, and the commit where it runs from a git checkout of its own."""
    from twinloop.registry.tracking import code_version

    root = Path(__file__).resolve().parents[1]
    try:
        number = version("twinloop")
    except PackageNotFoundError:  # run from a checkout that nobody installed
        number = "(not installed)"
    if not (root / ".git").exists():
        return f"twinloop {number}"
    code = code_version(root)
    changes = ", with uncommitted changes" if code.dirty else ""
    return f"twinloop {number} (commit {code.commit or 'none'}{changes})"
