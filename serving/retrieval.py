"""The policies in force: an append-only, versioned file that any process may read while another one writes it.

One JSON line a version. A line counts once its newline is on the disk; a writer that was killed leaves at most a tail
without one, which readers skip and the next writer cuts off. Every line carries the digest of the whole history up to
it, so a damaged line is noticed, and a trace's index digest names the exact policies that an answer was given under.
The digest does not depend on when a policy was put: a second checksum, over digest and time of every line so far, does.
Lines of before it was there have none, and stay valid as long as no line that has one came earlier.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from twinloop.common.errors import UserError
from twinloop.common.files import write_all, write_whole
from twinloop.domains.returns.policies import Policy, check_policy
from twinloop.serving.bm25 import Bm25

EMPTY_DIGEST = hashlib.sha256(b"").hexdigest()

Policies = list[Policy]

_POLICY_ID = re.compile(r"P-([0-9]{1,9})")


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
    checksum: str = EMPTY_DIGEST
    has_checksums: bool = False
    lines: int = 0
    read_bytes: int = 0
    stamp: tuple[int, int, int] = (0, 0, 0)


class PolicyIndexError(UserError):
    """The index cannot be read or written. `reason` says why without naming a place on this machine."""

    def __init__(self, path: Path, reason: str, advice: str):
        super().__init__(f"{path}: {reason}; {advice}")
        self.reason = f"the policy index: {reason}"


class PolicyError(UserError):
    """A policy's id or text that no decision could be based on."""


class _DamagedLineError(Exception):
    """A line of the index does not say what was once written there."""


class PolicyIndex:
    """The policies in the file at `path`. Safe for many threads and many processes at once.

    Every method sees what other processes have put before it was called. A missing file is an empty index. Methods
    raise PolicyIndexError where the file cannot be read or a line of it is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._lock = threading.Lock()
        self._state = _State()

    def put(self, policy_id: str, text: str) -> Policy:
        """Make a text the policy's newest version and return it; it is on the disk when this returns.

        The text that is in force already keeps its version. Raises PolicyError for an id or a text that no decision
        could be based on, and PolicyIndexError, with the index as it was, where the disk does not take the line.
        """
        number, text = checked(policy_id, text)
        with self._lock, self._writing():
            self._refresh(alone=True)
            versions = self._state.versions.get(number, [])
            if versions and versions[-1].text == text:
                return versions[-1]
            policy = Policy(policy_id, text, version=len(versions) + 1)
            line, _, _ = _line(policy, self._state.digest, self._state.checksum)
            if self.path.exists():
                self._append(line)
            else:
                self._install(line)
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
            digest, checksum, lines = EMPTY_DIGEST, EMPTY_DIGEST, []
            for policy in new:
                line, digest, checksum = _line(policy, digest, checksum)
                lines.append(line)
            self._install(b"".join(lines))
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
            advice = "restore the file from a copy, or delete that line and all that follow it"
            raise PolicyIndexError(self.path, str(error), advice) from None
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
            raise PolicyIndexError(self.path, reason, "see to its permissions") from None

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
            # A file that changed and did not grow was cut, perhaps by a writer whose disk failed.
            if status.st_ino != self._state.stamp[0] or status.st_size <= self._state.read_bytes:
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
            digest = _chain(state.digest, policy.policy_id, policy.version, policy.text)
            checksum = _chain(state.checksum, digest, record.get("recorded_at"))
            wanted = {"digest": digest, "checksum": checksum}
            if "checksum" not in record and not state.has_checksums:
                del wanted["checksum"]
            intact = {name: record.get(name) for name in wanted} == wanted
        except (ValueError, KeyError, TypeError, RecursionError):
            intact = False
        if not intact:
            raise _DamagedLineError(f"line {state.lines} is damaged")
        state.versions.setdefault(number, []).append(policy)
        state.ranking.put(number, policy.text)
        state.digest, state.checksum, state.has_checksums = digest, checksum, "checksum" in record

    def _append(self, line: bytes) -> None:
        """Write one line after the last complete one. The caller holds the file lock and has just refreshed."""
        end = self._state.read_bytes
        try:
            descriptor = os.open(self.path, os.O_RDWR)
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            os.ftruncate(descriptor, end)
            os.lseek(descriptor, end, os.SEEK_SET)
            write_all(descriptor, line)
            os.fsync(descriptor)
        except OSError as error:
            # A line without its end counts for nothing, but one that was not synced may be whole.
            with suppress(OSError):
                os.ftruncate(descriptor, end)
            raise self._unwritable(error) from None
        finally:
            os.close(descriptor)

    def _install(self, content: bytes) -> None:
        """Make the file, which has no complete line yet, hold this content: all of it or nothing."""
        try:
            write_whole(self.path, content)
        except OSError as error:
            with suppress(OSError):  # without a line, a file that is missing says the same
                self.path.unlink(missing_ok=True)
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> PolicyIndexError:
        reason = f"cannot be written ({error.strerror}), nothing was changed"
        return PolicyIndexError(self.path, reason, "make room or see to its permissions, then try again")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the lock that keeps other processes from writing; the kernel lets it go when a process dies."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = open(self.path.with_name(f"{self.path.name}.lock"), "ab")  # noqa: SIM115 (closed below)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            reason = f"cannot be locked ({error.strerror})"
            raise PolicyIndexError(self.path, reason, "see to the permissions of its folder") from None
        with lock:
            yield


def checked(policy_id: str, text: str) -> tuple[int, str]:
    """The policy's number and its text without white space around it.

    Raises PolicyError where no decision could be based on the policy.
    """
    if problem := check_policy(policy_id, text):
        raise PolicyError(f"policy {policy_id!r}: {problem}")
    return int(policy_id.removeprefix("P-")), text.strip()


def _chain(digest: str, *content: object) -> str:
    return hashlib.sha256(json.dumps([digest, *content]).encode()).hexdigest()


def _line(policy: Policy, digest: str, checksum: str) -> tuple[bytes, str, str]:
    """The line of a policy, and the digest and the checksum of the history up to it, from those before."""
    recorded_at = datetime.now(UTC).isoformat(timespec="seconds")
    digest = _chain(digest, policy.policy_id, policy.version, policy.text)
    checksum = _chain(checksum, digest, recorded_at)
    record = {
        "policy_id": policy.policy_id,
        "version": policy.version,
        "text": policy.text,
        "recorded_at": recorded_at,
        "digest": digest,
        "checksum": checksum,
    }
    return json.dumps(record, ensure_ascii=False).encode() + b"\n", digest, checksum
