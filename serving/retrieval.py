"""The policies in force: an append-only, versioned file that any process may read while another one writes it.

One JSON line a version. A line counts once its newline is on the disk; a writer that was killed leaves at most a tail
without one, which readers skip and the next writer cuts off. Every line carries the digest of the whole history up to
it, so a damaged line is noticed, and a trace's index digest names the exact policies that an answer was given under.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import threading
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from domains.returns.policies import Policy, window_days
from models.errors import UserError
from serving.bm25 import Bm25

MAX_TEXT_CHARACTERS = 300

EMPTY_DIGEST = hashlib.sha256(b"").hexdigest()

Policies = list[Policy]

_POLICY_ID = re.compile(r"P-([0-9]{1,9})")
_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories that have no place in a policy: control, invisible and line-breaking characters, surrogates."""


@dataclass(frozen=True)
class SearchResult:
    """The passages found, best first, and the digest of the index that they were found in."""

    passages: Policies
    index_digest: str


@dataclass
class _State:
    """What the complete lines of the file say."""

    versions: dict[int, list[Policy]] = field(default_factory=dict)
    ranking: Bm25 = field(default_factory=Bm25)
    digest: str = EMPTY_DIGEST
    lines: int = 0
    read_bytes: int = 0
    stamp: tuple[int, int, int] = (0, 0, 0)


class _DamagedLineError(Exception):
    """A line of the index does not say what was once written there."""


class PolicyIndex:
    """The policies in the file at `path`. Safe for many threads and many processes at once.

    Every method sees what other processes have put before it was called. A missing file is an empty index. Methods
    raise UserError where a line of the file is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._lock = threading.Lock()
        self._state = _State()

    def put(self, policy_id: str, text: str) -> Policy:
        """Make a text the policy's newest version and return it; it is on the disk when this returns.

        The text that is in force already keeps its version. Raises UserError for an id or a text that no decision
        could be based on.
        """
        number, text = checked(policy_id, text)
        with self._lock, self._writing():
            self._refresh(alone=True)
            versions = self._state.versions.get(number, [])
            if versions and versions[-1].text == text:
                return versions[-1]
            policy = Policy(policy_id, text, version=len(versions) + 1)
            line = _line(policy, _chain(self._state.digest, policy))
            self._append(line)
            self._refresh(alone=True)
            return policy

    def seed(self, policies: Iterable[Policy]) -> int:
        """Fill an index that is still empty, all or nothing, and return how many policies that were.

        An index that holds anything is left as it is. Raises UserError like `put`.
        """
        new = [Policy(policy.policy_id, checked(policy.policy_id, policy.text)[1]) for policy in policies]
        if len({policy.policy_id for policy in new}) != len(new):
            raise UserError(f"{self.path}: a policy id stands twice among the policies to start with; keep one of each")
        with self._lock, self._writing():
            self._refresh(alone=True)
            if self._state.lines:
                return 0
            digest, lines = EMPTY_DIGEST, []
            for policy in new:
                digest = _chain(digest, policy)
                lines.append(_line(policy, digest))
            beside = self.path.with_name(f"{self.path.name}.new")
            with open(beside, "wb") as file:
                file.write(b"".join(lines))
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self.path)
            _sync_folder(self.path.parent)
            self._refresh(alone=True)
            return len(new)

    def list(self) -> Policies:
        """The newest version of every policy, in order of their numbers."""
        with self._lock:
            self._refresh()
            return [versions[-1] for _, versions in sorted(self._state.versions.items())]

    def history(self, policy_id: str) -> Policies:
        """Every version of a policy, oldest first; empty for a policy that is not there."""
        match = _POLICY_ID.fullmatch(policy_id)
        with self._lock:
            self._refresh()
            return [*self._state.versions.get(int(match[1]), [])] if match else []

    def find(self, query: str, k: int) -> SearchResult:
        """The k policies in force that fit the query best, and the digest of the index at that moment.

        Policies that share no word with the query fill the places that are left, in order of their numbers: a prompt
        holds as many passages in service as it does in training.
        """
        with self._lock:
            self._refresh()
            state = self._state
            found = state.ranking.search(query, k)
            if len(found) < k:
                found += sorted(set(state.versions) - set(found))[: k - len(found)]
            return SearchResult([state.versions[number][-1] for number in found], state.digest)

    def digest(self) -> str:
        """Sha256 over every version ever put, in order: equal digests mean equal policies and equal histories."""
        with self._lock:
            self._refresh()
            return self._state.digest

    def _refresh(self, *, alone: bool = False) -> None:
        """Read what was added since the last look. `alone`: the caller holds the file lock."""
        try:
            try:
                self._read()
            except _DamagedLineError:
                # A reader may have looked while a writer cut off a torn tail: a second look, alone, is believed.
                self._state = _State()
                if alone:
                    self._read()
                else:
                    with self._writing():
                        self._read()
        except _DamagedLineError as error:
            self._state = _State()
            raise UserError(
                f"{self.path}: {error}; restore the file from a copy, or delete that line and all that follow it"
            ) from None
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}); see to its permissions") from None

    def _read(self) -> None:
        try:
            file = open(self.path, "rb")  # noqa: SIM115 (a missing file is an answer here)
        except FileNotFoundError:
            self._state = _State()
            return
        with file:
            status = os.fstat(file.fileno())
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
            if stamp == self._state.stamp:
                return
            if status.st_ino != self._state.stamp[0] or status.st_size < self._state.read_bytes:
                self._state = _State()
            file.seek(self._state.read_bytes)
            added = file.read()
        complete = added[: added.rfind(b"\n") + 1]
        for line in complete.split(b"\n")[:-1]:
            self._apply(line)
        self._state.read_bytes += len(complete)
        self._state.stamp = stamp

    def _apply(self, line: bytes) -> None:
        state = self._state
        state.lines += 1
        try:
            record = json.loads(line)
            policy = Policy(record["policy_id"], record["text"], record["version"])
            number = int(_POLICY_ID.fullmatch(policy.policy_id)[1])  # type: ignore[index] # None is caught below
            intact = record["digest"] == _chain(state.digest, policy)
        except (ValueError, KeyError, TypeError):
            intact = False
        if not intact:
            raise _DamagedLineError(f"line {state.lines} is damaged")
        state.versions.setdefault(number, []).append(policy)
        state.ranking.put(number, policy.text)
        state.digest = record["digest"]

    def _append(self, line: bytes) -> None:
        """Write one line after the last complete one. The caller holds the file lock and has just refreshed."""
        is_new = not self.path.exists()
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.ftruncate(descriptor, self._state.read_bytes)
            if os.pwrite(descriptor, line, self._state.read_bytes) != len(line):
                os.ftruncate(descriptor, self._state.read_bytes)
                raise UserError(f"{self.path}: the disk is full; make room and put the policy again")
            os.fsync(descriptor)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); nothing was changed") from None
        finally:
            os.close(descriptor)
        if is_new:
            _sync_folder(self.path.parent)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the lock that keeps other processes from writing; the kernel lets it go when a process dies."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = open(self.path.with_name(f"{self.path.name}.lock"), "ab")  # noqa: SIM115 (closed below)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be locked ({error.strerror}); see to its permissions") from None
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def checked(policy_id: str, text: str) -> tuple[int, str]:
    """The policy's number and its text without white space around it.

    Raises UserError for an id that is not `P-<digits>`, and for a text that is empty, too long, holds characters that
    cannot be seen, or does not name exactly one window.
    """
    match = _POLICY_ID.fullmatch(policy_id)
    if match is None or match[1] != str(int(match[1])):
        raise UserError(f"policy id {policy_id!r}: must be P- and a number, such as P-7")
    text = text.strip()
    if not text:
        raise UserError(f"policy {policy_id}: the text is empty; write one sentence that names its window")
    if len(text) > MAX_TEXT_CHARACTERS:
        raise UserError(f"policy {policy_id}: the text has {len(text)} characters; at most {MAX_TEXT_CHARACTERS} fit")
    for place, character in enumerate(text):
        if unicodedata.category(character) in _UNPRINTABLE:
            raise UserError(
                f"policy {policy_id}: character {place + 1} (U+{ord(character):04X}) cannot be seen; remove it"
            )
    if window_days(text) is None:
        raise UserError(
            f'policy {policy_id}: the text must say "within N days" exactly once; nothing can be decided '
            "without a window"
        )
    return int(match[1]), text


def _chain(digest: str, policy: Policy) -> str:
    content = json.dumps([digest, policy.policy_id, policy.version, policy.text])
    return hashlib.sha256(content.encode()).hexdigest()


def _line(policy: Policy, digest: str) -> bytes:
    record = {
        "policy_id": policy.policy_id,
        "version": policy.version,
        "text": policy.text,
        "recorded_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "digest": digest,
    }
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _sync_folder(folder: Path) -> None:
    """Make a new file's name durable, not only its content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
