"""The promotion ledger: what was in production, since when, and who promoted it. JSON lines, only ever appended to.

One promotion is two lines. The intent is on disk before an alias moves, the commit after the last one has moved; an
intent without an end means that a process died in between, and names what to finish. Each line holds the sha256 of the
line before it, so a changed, removed or inserted line breaks the chain at the next one. The last line has no next: the
digest of each model's last finished line is kept in MLflow too (`Ledger.read(head=...)`).

A line cut off by a crash is no integrity error: it is moved to `<ledger>.torn`, and what it was to record is worked
out again from the line before.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from twinloop.common.errors import UserError
from twinloop.common.files import fsync, write_all
from twinloop.registry.tracking import user

GENESIS = "0" * 64

Action = Literal["promote", "rollback", "adopt"]
ENDS = ("commit", "adopt")


class Entry(BaseModel):
    """One line.

    event: `intent` (about to move), `commit` (moved), `abort` (given up, nothing moved), `adopt` (reconciled: the
    aliases were elsewhere than this ledger had left them). commit and abort name their intent in `of`. Only an `adopt`
    may lack `to`: there was no champion any more.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sequence: int
    event: Literal["intent", "commit", "abort", "adopt"]
    action: Action
    model: str
    from_version: int | None = Field(default=None, alias="from")
    to_version: int | None = Field(default=None, alias="to")
    who: str
    when: str
    manifest_digest: str
    gate_digest: str | None = None
    of: int | None = None
    note: str | None = None
    chain: str

    def line(self) -> bytes:
        return self.model_dump_json(by_alias=True, exclude_none=True).encode()


class Champion(NamedTuple):
    """A version, and the digest of its content: a number alone may name other bytes, once a model was deleted in MLflow
    and made again."""

    version: int
    digest: str


class Champions(NamedTuple):
    """The champion, None where there is none, and the ones before it that a rollback may go back to, oldest first."""

    current: Champion | None = None
    earlier: tuple[Champion, ...] = ()


@dataclass(frozen=True)
class Contents:
    """The ledger as read: its entries, each line's digest, and the bytes of a last line that was cut off."""

    entries: tuple[Entry, ...]
    digests: tuple[str, ...]
    torn: bytes = b""

    @property
    def head(self) -> str:
        return self.digests[-1] if self.digests else GENESIS

    def pending(self) -> Entry | None:
        """The intent that has no end, if there is one."""
        last = self.entries[-1] if self.entries else None
        return last if last and last.event == "intent" else None

    def committed(self, model: str) -> list[Entry]:
        """What really happened to this model, oldest first: intents that were committed, and reconciliations."""
        done = {entry.of for entry in self.entries if entry.event == "commit"}
        of_model = [entry for entry in self.entries if entry.model == model]
        return [e for e in of_model if e.event == "adopt" or (e.event == "intent" and e.sequence in done)]

    def ends(self, model: str) -> list[str]:
        """The digest of each line that ended a move of this model, oldest first."""
        lines = zip(self.entries, self.digests, strict=True)
        return [digest for entry, digest in lines if entry.model == model and entry.event in ENDS]

    def champions(self, model: str) -> Champions:
        """The champions as this ledger left them. What exists of them now, only MLflow knows."""
        return champions_after(self.committed(model))


class Ledger:
    """The file. Reading needs no lock; whoever appends must hold the promotion lock."""

    def __init__(self, path: Path):
        self.path = path

    def read(self, *, head: str | None = None) -> Contents:
        """Read and check every line. head: a digest that must be among the lines', as MLflow remembers it.

        Raises UserError if the chain is broken or ends before `head`.
        """
        raw = self.path.read_bytes() if self.path.exists() else b""
        *lines, torn = raw.split(b"\n")
        entries: list[Entry] = []
        digests: list[str] = []
        for number, line in enumerate(lines, start=1):
            try:
                entry = Entry.model_validate_json(line)
            except ValidationError:
                if number == len(lines) and not torn:  # after a power cut a last line may hold anything
                    torn = line + b"\n"
                    break
                raise self._integrity_error(number, "is not a ledger entry") from None
            if entry.chain != (digests[-1] if digests else GENESIS) or entry.sequence != number:
                raise self._integrity_error(number, "does not follow from the line before it, one of them was changed")
            entries.append(entry)
            digests.append(hashlib.sha256(line).hexdigest())
        reconciled = any(head in (entry.note or "") for entry in entries) if head else True
        if head and entries and head not in digests and not reconciled:
            raise self._integrity_error(
                len(entries), "is not where MLflow remembers the ledger's end, it was changed or cut"
            )
        return Contents(tuple(entries), tuple(digests), torn)

    def repair(self) -> None:
        """Move a cut-off last line away, so that the next line starts on its own."""
        contents = self.read()
        if not contents.torn:
            return
        _append(self.path.with_name(f"{self.path.name}.torn"), contents.torn + b"\n")
        with self.path.open("r+b") as file:
            file.truncate(self.path.stat().st_size - len(contents.torn))
            os.fsync(file.fileno())

    def append(
        self,
        event: Literal["intent", "commit", "abort", "adopt"],
        *,
        action: Action,
        model: str,
        to_version: int | None,
        who: str,
        manifest_digest: str,
        from_version: int | None = None,
        gate_digest: str | None = None,
        of: int | None = None,
        note: str | None = None,
    ) -> tuple[Entry, str]:
        """Write one line; it is on disk when this returns. Gives the entry and its digest."""
        contents = self.read()
        fields = {
            "sequence": len(contents.entries) + 1,
            "event": event,
            "action": action,
            "model": model,
            "from": from_version,
            "to": to_version,
            "who": who,
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "manifest_digest": manifest_digest,
            "gate_digest": gate_digest,
            "of": of,
            "note": note,
            "chain": contents.head,
        }
        entry = Entry.model_validate(fields)
        _append(self.path, entry.line() + b"\n")
        return entry, hashlib.sha256(entry.line()).hexdigest()

    def end(self, intent: Entry, event: Literal["commit", "abort"], *, note: str | None = None) -> tuple[Entry, str]:
        """Write how an intent ended."""
        return self.append(
            event,
            action=intent.action,
            model=intent.model,
            from_version=intent.from_version,
            to_version=intent.to_version,
            who=intent.who,
            manifest_digest=intent.manifest_digest,
            gate_digest=intent.gate_digest,
            of=intent.sequence,
            note=note,
        )

    def _integrity_error(self, number: int, what: str) -> UserError:
        return UserError(
            f"{self.path}: line {number} {what}; keep the file as evidence, move it away, "
            "and the next promotion or rollback starts a new ledger from the current aliases"
        )


def who() -> str:
    """Who moves the champion, for an entry: the user and the machine."""
    return f"{user()}@{socket.gethostname()}"


def champions_after(committed: Iterable[Entry]) -> Champions:
    """The champions that these entries leave: a promotion pushes, a rollback pops."""
    current, earlier = Champions()
    for entry in committed:
        if entry.to_version is None:  # it was taken away: nothing serves, and it is no way back
            current = None
            continue
        target = Champion(entry.to_version, entry.manifest_digest)
        if entry.action == "rollback":
            while target in earlier:
                earlier = earlier[:-1]
        elif current not in (None, target):
            earlier = (*earlier, current)
        current = target
    return Champions(current, earlier)


def _append(path: Path, line: bytes) -> None:
    new = not path.exists()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        write_all(descriptor, line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if new:
        fsync(path.parent)
