"""API keys of a project's servers: several, by name, of which only hashes are kept, and how much each may ask.

A key is 256 random bits, so that one SHA-256 hides it as well as a password hash
would, and can be made for each request.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from twinloop.common.errors import UserError
from twinloop.common.files import write_whole

PREFIX = "tl-"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ApiKey(BaseModel):
    """What is kept of one key. The limits are of a minute; None: there is none."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(pattern=f"^{NAME.pattern}$")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    created: str
    requests_per_minute: Annotated[int, Field(ge=1)] | None
    tokens_per_minute: Annotated[int, Field(ge=1)] | None


class _Content(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    keys: tuple[ApiKey, ...] = Field(strict=False)


class KeyStore:
    """The keys in one file, which several processes may read and change. Safe for many threads.

    Where the file has never been, there are no keys and nobody is asked for one. Once it is there it protects, also
    after its last key is revoked, and a process that has read it goes on to ask for keys where it is removed. Raises
    UserError where it cannot be read or holds something else.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._path = Path(path)
        self._lock = threading.Lock()
        self._read: tuple[tuple[int, int, int], tuple[ApiKey, ...]] | None = None

    @property
    def protects(self) -> bool:
        """Whether who asks needs a key."""
        self.all()
        return self._read is not None

    def all(self) -> Sequence[ApiKey]:
        """All of them, in the order in which they were made; read anew where the file has changed."""
        with self._lock:
            try:
                status = os.stat(self._path)
            except FileNotFoundError:
                if self._read is not None:
                    self._read = (self._read[0], ())
                return ()
            except OSError as error:
                raise UserError(f"{self._path}: cannot be read ({error.strerror})") from None
            version = (status.st_ino, status.st_mtime_ns, status.st_size)
            if self._read is None or self._read[0] != version:
                self._read = (version, self._load())
            return self._read[1]

    def find(self, key: bytes) -> ApiKey | None:
        """The record of a key. How long it takes says nothing about the keys that there are."""
        digest = hashlib.sha256(key).hexdigest()
        found = [each for each in self.all() if hmac.compare_digest(each.sha256, digest)]
        return found[0] if found else None

    def create(self, name: str, *, requests_per_minute: int | None = None, tokens_per_minute: int | None = None) -> str:
        """Make a key, which is shown this once and nowhere kept."""
        if NAME.fullmatch(name) is None:
            raise UserError(f"{name!r}: not a name for a key; use at most 64 letters, digits, points, dashes and _")
        key = PREFIX + secrets.token_urlsafe(32)
        record = ApiKey(
            name=name,
            sha256=hashlib.sha256(key.encode()).hexdigest(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
        )
        with self._changing():
            keys = self.all()
            if any(each.name == name for each in keys):
                raise UserError(f"{name}: there is a key of this name; revoke it first, or take another name")
            self._write((*keys, record))
        return key

    def revoke(self, name: str) -> int:
        """Remove a key: from the next request on it is refused. Returns how many are left."""
        with self._changing():
            keys = self.all()
            kept = tuple(each for each in keys if each.name != name)
            if len(kept) == len(keys):
                known = ", ".join(each.name for each in keys) or "none"
                raise UserError(f"{name}: no such key; there are: {known}")
            self._write(kept)
        return len(kept)

    def _changing(self) -> FileLock:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(self._path.with_suffix(".lock"))

    def _load(self) -> tuple[ApiKey, ...]:
        try:
            return _Content.model_validate_json(self._path.read_bytes()).keys
        except OSError as error:
            raise UserError(f"{self._path}: cannot be read ({error.strerror})") from None
        except ValidationError:
            raise UserError(f"{self._path}: does not hold keys; restore it, or remove it and make new keys") from None

    def _write(self, keys: tuple[ApiKey, ...]) -> None:
        write_whole(self._path, _Content(keys=keys).model_dump_json(indent=2).encode() + b"\n", mode=0o600)
