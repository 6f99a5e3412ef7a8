"""How much one API key may ask in a minute: requests, and tokens read and written. Used from one thread, the server's.

A key has what it may use in a minute at once and gets it back evenly. Tokens are known only when an answer has ended: a
request begins while any are left, and what it takes beyond them is waited for.
"""

from __future__ import annotations

import math
import time

from twinloop.serving.keys import ApiKey


class _Bucket:
    def __init__(self, per_minute: int, now: float):
        self._per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until there is so much; 0 where there is."""
        rate = self._per_minute / 60
        self._level = min(self._per_minute, self._level + (now - self._at) * rate)
        self._at = now
        return max(0.0, (amount - self._level) / rate)

    def take(self, amount: float) -> None:
        self._level -= amount


class Account:
    """What one key has left."""

    def __init__(self, key: ApiKey):
        self.key = key
        now = time.monotonic()
        self._requests = _Bucket(key.requests_per_minute, now) if key.requests_per_minute else None
        self._tokens = _Bucket(key.tokens_per_minute, now) if key.tokens_per_minute else None

    def begin(self) -> int:
        """Count one more request: 0; or, where it must be refused, the seconds after which to try again."""
        now = time.monotonic()
        waits = [bucket.wait_s(1, now) for bucket in (self._requests, self._tokens) if bucket is not None]
        if wait_s := max(waits, default=0.0):
            return max(1, math.ceil(wait_s))
        if self._requests is not None:
            self._requests.take(1)
        return 0

    def charge(self, tokens: int) -> None:
        """Take the tokens of an answer that has ended."""
        if self._tokens is not None:
            self._tokens.take(tokens)


class Accounts:
    """The accounts of all keys that have asked since the start."""

    def __init__(self) -> None:
        self._by_name: dict[str, Account] = {}

    def of(self, key: ApiKey) -> Account:
        """A key that was made anew under an old name begins anew."""
        account = self._by_name.get(key.name)
        if account is None or account.key != key:
            account = self._by_name[key.name] = Account(key)
        return account
