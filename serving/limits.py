"""How much one API key may ask in a minute: requests, and tokens read and written, in all processes of a server.

A key has what it may use in a minute at once and gets it back evenly. Tokens are known only when an answer has ended: a
request begins while any are left, and what it takes beyond them is waited for.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import struct
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from twinloop.serving.keys import ApiKey

_RECORD = struct.Struct("<32s2d2d")
"""Of one key: its digest; then of requests and of tokens what was left, and at which time of the machine's clock."""


class _Bucket:
    """level: what was left at a time, `at`. Without a limit nothing is counted."""

    def __init__(self, per_minute: int | None, level: float, at: float):
        self._per_minute, self.level, self.at = per_minute, level, at

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until there is so much, to the microsecond: a rounding of the clock is no wait. 0 where there is."""
        if self._per_minute is None:
            return 0.0
        rate = self._per_minute / 60
        self.level, self.at = min(self._per_minute, self.level + (now - self.at) * rate), now
        return max(0.0, round((amount - self.level) / rate, 6))

    def take(self, amount: float) -> None:
        self.level -= amount


class Account:
    """What one key has left, as a record of the file that all processes have open."""

    def __init__(self, key: ApiKey, file: BinaryIO):
        self.key = key
        self._file = file
        self._digest = hashlib.sha256(key.model_dump_json().encode()).digest()
        self._place: int | None = None

    def begin(self) -> int:
        """Count one more request: 0; or, where it must be refused, the seconds after which to try again."""
        with self._buckets() as (requests, tokens):
            now = time.monotonic()
            if wait_s := max(requests.wait_s(1, now), tokens.wait_s(1, now)):
                return max(1, math.ceil(wait_s))
            requests.take(1)
        return 0

    def charge(self, amount: int) -> None:
        """Take the tokens of an answer that has ended."""
        with self._buckets() as (_, tokens):
            tokens.take(amount)

    @contextmanager
    def _buckets(self) -> Iterator[tuple[_Bucket, _Bucket]]:
        """Of requests and of tokens, while no other process has them."""
        descriptor, key = self._file.fileno(), self.key
        # Of a process, and not of the open file, which processes that inherit it have in common, as `flock` would be.
        fcntl.lockf(descriptor, fcntl.LOCK_EX)
        try:
            place, record = self._find(descriptor)
            requests = _Bucket(key.requests_per_minute, *record[0:2])
            tokens = _Bucket(key.tokens_per_minute, *record[2:4])
            yield requests, tokens
            left = (requests.level, requests.at, tokens.level, tokens.at)
            os.pwrite(descriptor, _RECORD.pack(self._digest, *left), place)
        finally:
            fcntl.lockf(descriptor, fcntl.LOCK_UN)

    def _find(self, descriptor: int) -> tuple[int, tuple[float, ...]]:
        """Where this key's record is, and what it holds; a key that is new there has all that it may use."""
        place = self._place or 0
        while record := os.pread(descriptor, _RECORD.size, place):
            digest, *left = _RECORD.unpack(record)
            if digest == self._digest:
                self._place = place
                return place, tuple(left)
            place += _RECORD.size
        now = time.monotonic()
        self._place = place
        return place, (self.key.requests_per_minute or 0, now, self.key.tokens_per_minute or 0, now)


class Accounts:
    """The accounts of all keys that have asked since the start. Used from one thread of a process, the server's."""

    def __init__(self, file: BinaryIO | None = None):
        """file: of several processes, an empty one that all of them have open."""
        self._file = file or tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (as long as this object)
        self._by_name: dict[str, Account] = {}

    def of(self, key: ApiKey) -> Account:
        """A key that was made anew under an old name begins anew."""
        account = self._by_name.get(key.name)
        if account is None or account.key != key:
            account = self._by_name[key.name] = Account(key, self._file)
        return account
