"""The commands of `twinloop keys`: who may ask the project's servers."""

from __future__ import annotations

import sys
from pathlib import Path

from twinloop.serving.keys import KeyStore


def project_keys(project: Path) -> KeyStore:
    """The keys of all servers of a project."""
    return KeyStore(project / "state" / "api_keys.json")


def create_key(project: Path, name: str, *, requests_per_minute: int | None, tokens_per_minute: int | None) -> int:
    """Print a new key, and nothing else, on stdout."""
    store = project_keys(project)
    first = not store.protects
    print(store.create(name, requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute), flush=True)
    print(f"{name}: shown this once; only its hash is kept", file=sys.stderr)
    if first:
        print("From now on the project's servers answer nobody without a key, but for /health", file=sys.stderr)
    return 0


def list_keys(project: Path) -> int:
    store = project_keys(project)
    for key in store.all():
        limits = (f"{key.requests_per_minute or 'any'} requests", f"{key.tokens_per_minute or 'any'} tokens a minute")
        print(f"{key.name:<20} {key.created}  {', '.join(limits)}")
    if not store.all():
        words = "nobody may ask" if store.protects else "whoever reaches a server may ask it"
        print(f"no keys: {words}; `twinloop keys create NAME` makes one", file=sys.stderr)
    return 0


def revoke_key(project: Path, name: str) -> int:
    left = project_keys(project).revoke(name)
    note = "" if left else "; it was the last, and nobody but the administrator's token may ask now"
    print(f"{name}: revoked{note}")
    return 0
