"""Promotion and rollback: the only code that moves `champion` and `previous`.

Under one lock for the whole project, in this order: check, write the intent, move the aliases, write the commit. A
process that dies in between leaves either nothing but a note, or an intent that the next promotion or rollback carries
out (its checks had passed) before its own work. At every moment `champion` names a whole, verified bundle.

There is no force. A version is promoted on a gate report that says SHIP for its very digest, and a version that was
rolled back needs a new report: the old one has been refuted by production.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from filelock import Timeout
from pydantic import BaseModel, ConfigDict

from models.errors import UserError
from tasks.ledger import Contents, Entry, Ledger, pile
from tasks.registry import CANDIDATE, CHAMPION, PREVIOUS, Registry, Snapshot, Version
from tasks.tracking import Mlruns

# A rollback loads its target under the lock; a big bundle takes its time.
LOCK_TIMEOUT_S = 600.0
LEDGER_HEAD = "ledger_head"  # tag of the registered model


class GateEvidence(BaseModel):
    """What a gate said about one bundle: the decision, the bundle's content digest, and the report in full."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    decision: Literal["SHIP", "BLOCK"]
    manifest_digest: str
    report: dict[str, Any]

    def content(self) -> bytes:
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1).encode() + b"\n"

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.content()).hexdigest()


@dataclass(frozen=True)
class Promotion:
    """One finished move of the champion."""

    action: Literal["promote", "rollback", "adopt"]
    model: str
    from_version: int | None
    to_version: int
    who: str
    when: str
    gate_digest: str | None
    manifest_digest: str

    @classmethod
    def of(cls, entry: Entry) -> Promotion:
        return cls(**{name: getattr(entry, name) for name in cls.__dataclass_fields__})


def open_ledger(mlruns: Mlruns) -> Ledger:
    """The project's ledger, `mlruns/promotions.jsonl`."""
    return Ledger(mlruns.root / "promotions.jsonl")


def record_gate(registry: Registry, version: Version, evidence: GateEvidence) -> str:
    """Keep a gate's report, SHIP or BLOCK, and name it in the version's tags. Gives its digest.

    The report lies in `mlruns/gates/` under its own digest, so that it cannot change unnoticed.
    """
    path = _gate_file(registry, evidence.digest)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")
        new.write_bytes(evidence.content())
        new.replace(path)
    if version.tags.get("gate_digest") != evidence.digest:
        when = datetime.now(UTC).isoformat()
        tags = {"gate_digest": evidence.digest, "gate_decision": evidence.decision, "gate_when": when}
        registry.tag(version, tags)
    return evidence.digest


def read_gate(registry: Registry, version: Version) -> GateEvidence | None:
    """The latest gate report of a version, None if it never stood before one. Raises UserError if it was changed."""
    if not (digest := version.tags.get("gate_digest")):
        return None
    path = _gate_file(registry, digest)
    try:
        content = path.read_bytes()
    except OSError:
        content = b""
    if hashlib.sha256(content).hexdigest() != digest:
        raise UserError(f"{path}: the gate report of {version} is missing or changed; run the gate again")
    return GateEvidence.model_validate_json(content)


def promote(registry: Registry, version: int, gate: GateEvidence | None = None, *, who: str) -> Promotion:
    """Make a version the champion; the champion becomes `previous`. Promoting the champion again changes nothing.

    gate: the report to promote on; without one, the last that was recorded for the version. Raises UserError, and
    moves nothing, if it does not say SHIP for this version's digest, if the version is no bundle or damaged, or if it
    was rolled back on this same report.
    """
    target = registry.version(version)
    if gate:
        record_gate(registry, target, gate)
    with _settled(registry, who) as (ledger, contents):
        target = registry.version(version)
        evidence = _ship(target, gate or read_gate(registry, target))
        champions = contents.champions(registry.name)
        history = contents.settled(registry.name)
        if champions[-1:] == [version]:
            return Promotion.of(history[-1])
        _not_refuted(target, evidence, history)
        registry.verify(target)
        intent, _ = ledger.append(
            "intent",
            action="promote",
            model=registry.name,
            from_version=champions[-1] if champions else None,
            to_version=version,
            who=who,
            manifest_digest=target.digest,
            gate_digest=evidence.digest,
        )
        return _carry_out(registry, ledger, intent)


def rollback(registry: Registry, who: str, prove: Callable[[Path], None], *, to: int | None = None) -> Promotion:
    """Make the previous champion the champion again, after it has shown that it loads and answers.

    prove(bundle): loads the bundle and lets it answer; raises if it does not. to: an earlier champion instead.
    Rolled back twice, it goes back two champions. Raises UserError, and moves nothing, if there is no way back, if
    the target's bytes are not as they were registered, or if `prove` raised.
    """
    with _settled(registry, who) as (ledger, contents):
        champions = contents.champions(registry.name)
        if len(champions) < 2:
            raise UserError(f"{registry.name}: nothing to roll back to, there was no champion before this one")
        *earlier, champion = champions
        if to is not None and to not in earlier:
            known = ", ".join(str(number) for number in earlier)
            raise UserError(f"{registry.name}: version {to} was no champion before version {champion} (those: {known})")
        target = registry.version(earlier[-1] if to is None else to)
        served = registry.verify(target)
        try:
            prove(served.path)
        except Exception as error:
            raise UserError(
                f"{target}: not rolled back to, it does not load and answer ({type(error).__name__}: {error}); "
                f"version {champion} stays champion"
            ) from error
        intent, _ = ledger.append(
            "intent",
            action="rollback",
            model=registry.name,
            from_version=champion,
            to_version=target.version,
            who=who,
            manifest_digest=target.digest,
            gate_digest=target.tags.get("gate_digest"),
        )
        return _carry_out(registry, ledger, intent)


def recover(registry: Registry, who: str) -> None:
    """Finish what a process that died had begun, if it had. `promote` and `rollback` do this first by themselves."""
    with _settled(registry, who):
        pass


def history(registry: Registry) -> list[Promotion]:
    """Every move of this model's champion, oldest first. Raises UserError if the ledger was changed."""
    head = registry.snapshot().tags.get(LEDGER_HEAD)
    return [Promotion.of(entry) for entry in open_ledger(registry.mlruns).read(head=head).settled(registry.name)]


@contextmanager
def _settled(registry: Registry, who: str) -> Iterator[tuple[Ledger, Contents]]:
    """Hold the promotion lock, with nothing pending, and a ledger that says what the aliases say."""
    lock = registry.mlruns.lock("promotions")
    try:
        lock.acquire(timeout=LOCK_TIMEOUT_S)
    except Timeout as error:
        raise UserError(
            f"{lock.lock_file}: another promotion has held this lock for {LOCK_TIMEOUT_S:.0f} s; see what it waits for"
        ) from error
    try:
        ledger = open_ledger(registry.mlruns)
        ledger.read(head=registry.snapshot().tags.get(LEDGER_HEAD))
        ledger.mend()
        if pending := ledger.read().pending():
            _finish(Registry(registry.mlruns, pending.model), ledger, pending)
        _adopt(registry, ledger, who)
        yield ledger, ledger.read()
    finally:
        lock.release()


def _carry_out(registry: Registry, ledger: Ledger, intent: Entry, *, note: str | None = None) -> Promotion:
    """Move the aliases as the intent says, and write that it is done. May be repeated from any point."""
    champions = pile([*ledger.read().settled(registry.name), intent])
    registry.move(_aliases(champions, registry.snapshot()))
    _, head = ledger.end(intent, "commit", note=note)
    registry.tag_model(LEDGER_HEAD, head)
    return Promotion.of(intent)


def _finish(registry: Registry, ledger: Ledger, intent: Entry) -> None:
    """Carry out an intent whose process died. Its checks had passed; only its target's bytes may have changed since."""
    try:
        registry.verify(registry.version(intent.to_version))
    except UserError as error:
        registry.move(_aliases(ledger.read().champions(registry.name), registry.snapshot()))
        ledger.end(intent, "abort", note=f"interrupted, and then: {error}")
    else:
        _carry_out(registry, ledger, intent, note="interrupted, finished later")


def _adopt(registry: Registry, ledger: Ledger, who: str) -> None:
    """Write down champions that the ledger does not know: somebody moved an alias in MLflow, or the ledger is new."""
    snapshot, contents = registry.snapshot(), ledger.read()
    known = contents.champions(registry.name)
    champion = snapshot.aliases.get(CHAMPION)
    if champion is None or known[-1:] == [champion]:
        return
    lost = snapshot.tags.get(LEDGER_HEAD)
    note = "the alias was moved outside of the ledger"
    if lost and lost not in contents.digests:
        note = f"the ledger that ended with {lost} is not here"
    found = [champion] if known or PREVIOUS not in snapshot.aliases else [snapshot.aliases[PREVIOUS], champion]
    for version in found:
        entry = snapshot.versions.get(version)
        _, head = ledger.append(
            "adopt",
            action="adopt",
            model=registry.name,
            from_version=known[-1] if known else None,
            to_version=version,
            who=who,
            manifest_digest=entry.digest if entry else "",
            note=note,
        )
        known.append(version)
    registry.tag_model(LEDGER_HEAD, head)


def _aliases(champions: list[int], snapshot: Snapshot) -> dict[str, int | None]:
    """The aliases that are not where these champions want them, in the order in which to move them."""
    champion = champions[-1] if champions else None
    wanted: dict[str, int | None] = {PREVIOUS: champions[-2] if len(champions) > 1 else None}
    wanted[CHAMPION] = champion
    if snapshot.aliases.get(CANDIDATE) == champion:
        wanted[CANDIDATE] = None
    return {alias: version for alias, version in wanted.items() if snapshot.aliases.get(alias) != version}


def _ship(version: Version, evidence: GateEvidence | None) -> GateEvidence:
    """The evidence, if it lets this very version through. Raises UserError if it does not."""
    if not version.servable:
        raise UserError(f"{version}: a {version.stage} checkpoint is not served; promote an exported bundle")
    if evidence is None:
        raise UserError(f"{version}: not promoted, it stood before no gate; run `twinloop gate`")
    if evidence.manifest_digest != version.digest:
        raise UserError(
            f"{version}: not promoted, the gate report is about {evidence.manifest_digest[:12]} "
            f"and this version is {version.digest[:12]}; run `twinloop gate` on it"
        )
    if evidence.decision != "SHIP":
        raise UserError(
            f"{version}: not promoted, its gate says {evidence.decision}; `twinloop status` gives the reasons"
        )
    return evidence


def _not_refuted(version: Version, evidence: GateEvidence, settled: list[Entry]) -> None:
    """Raise UserError if the version was rolled back after this same report had let it through.

    Without this, the next scheduled run would find its old SHIP and undo the rollback.
    """
    let_through = {e.gate_digest for e in settled if e.action == "promote" and e.to_version == version.version}
    rolled_back = next(
        (e for e in reversed(settled) if e.action == "rollback" and e.from_version == version.version), None
    )
    if rolled_back and evidence.digest in let_through:
        raise UserError(
            f"{version}: not promoted, {rolled_back.who} rolled it back on {rolled_back.when} after this same gate "
            "report; run `twinloop gate` again with a rule that sees what went wrong"
        )


def _gate_file(registry: Registry, digest: str) -> Path:
    return registry.mlruns.root / "gates" / f"{digest}.json"
