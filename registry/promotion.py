"""Promotion and rollback: the only code that moves `champion` and `previous`.

Under one lock for the whole project, in this order: check, write the intent, move the aliases, write the commit, set
the commit's digest in MLflow. A process that dies in between leaves either nothing but a note, or a move that the next
command carries out (its checks had passed) before its own work. Where that is the very move that the next command asks
for, a rollback repeated by somebody who saw the first one die, it is all that the command does. At every moment
`champion` names a complete, verified exported model.

There is no force. A version is promoted on a gate report that says SHIP for its very digest, and a version that was
rolled back returns only by `twinloop promote`, on a new report: the old one was wrong in production.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from filelock import Timeout

from twinloop.common.errors import UserError
from twinloop.common.files import write_whole
from twinloop.registry.ledger import Contents, Entry, Ledger, champion_stack
from twinloop.registry.tracking import Mlruns
from twinloop.registry.versions import CANDIDATE, CHAMPION, PREVIOUS, Registry, Served, Snapshot, Version

if TYPE_CHECKING:
    from twinloop.evaluation.gate import GateReport  # imported where a report is read

log = logging.getLogger(__name__)

# A rollback loads its target under the lock; a big exported model takes its time.
LOCK_TIMEOUT_S = 600.0
LEDGER_HEAD = "ledger_head"  # tag of the registered model


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
    finished_later: bool = False
    """Whether another process had begun it and died."""

    @classmethod
    def of(cls, entry: Entry, *, finished_later: bool = False) -> Promotion:
        return cls(
            action=entry.action,
            model=entry.model,
            from_version=entry.from_version,
            to_version=entry.to_version,
            who=entry.who,
            when=entry.when,
            gate_digest=entry.gate_digest,
            manifest_digest=entry.manifest_digest,
            finished_later=finished_later,
        )


@dataclass(frozen=True)
class _LockedLedger:
    """The ledger under its lock, with nothing pending. `finished`: a move that had been interrupted until now."""

    ledger: Ledger
    contents: Contents
    finished: Promotion | None


def open_ledger(mlruns: Mlruns) -> Ledger:
    """The project's ledger, `mlruns/promotions.jsonl`."""
    return Ledger(mlruns.root / "promotions.jsonl")


def record_gate(registry: Registry, version: Version, report: GateReport) -> None:
    """Keep a gate's report, SHIP or BLOCK, and name it in the version's tags.

    The report lies in `mlruns/gates/` under its own digest, so that it cannot change unnoticed. Raises UserError for
    a report on something else.
    """
    _is_about(version, report)
    digest = report.digest()
    path = _gate_file(registry, digest)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, report.to_json().encode())
    if version.tags.get("gate_digest") != digest:
        when = datetime.now(UTC).isoformat()
        # The digest last: killed in between, it differs, and the next recording writes all three again.
        registry.tag(version, {"gate_decision": report.decision, "gate_when": when, "gate_digest": digest})


def read_gate(registry: Registry, version: Version) -> GateReport | None:
    """The latest gate report of a version, None if no gate has judged it. Raises UserError if it was changed."""
    from twinloop.evaluation.gate import GateReport

    if not (digest := version.tags.get("gate_digest")):
        return None
    path = _gate_file(registry, digest)
    try:
        report = GateReport.from_json(path.read_bytes())
    except (OSError, ValueError):
        report = None
    if report is None or report.digest() != digest:
        raise UserError(f"{path}: the gate report of {version} is missing or changed; run the gate again")
    return report


def promote(
    registry: Registry, version: int, gate: GateReport | None = None, *, who: str, manual: bool = False
) -> Promotion:
    """Make a version the champion; the champion becomes `previous`. Promoting the champion again changes nothing.

    gate: the report to promote on; without one, the last that was recorded for the version. manual: a person asks
    for this version, not a pipeline that happens to have made it again. Raises UserError, and moves nothing, if the
    report does not say SHIP for this version's digest, if the version is not an exported model or is corrupt, or if it
    was rolled back and not both a person and a new report want it.
    """
    with _locked_ledger(registry, who) as found:
        if found.finished and (found.finished.action, found.finished.to_version) == ("promote", version):
            return found.finished
        target = registry.version(version)  # now, not before the wait: its gate may have been judged again
        champions = found.contents.champions(registry.name)
        committed = found.contents.committed(registry.name)
        if champions[-1:] == [version]:
            # A report by the same rules is not kept: a later check of the champion may say otherwise.
            recorded = read_gate(registry, target)
            if gate and (recorded is None or recorded.rules_digest != gate.rules_digest):
                record_gate(registry, target, gate)
            return Promotion.of(committed[-1])
        if gate:
            record_gate(registry, target, gate)
        report = _ship(target, gate or read_gate(registry, target))
        _not_refuted(target, report, committed, manual=manual)
        registry.verify(target)
        intent, _ = found.ledger.append(
            "intent",
            action="promote",
            model=registry.name,
            from_version=champions[-1] if champions else None,
            to_version=version,
            who=who,
            manifest_digest=target.digest,
            gate_digest=report.digest(),
        )
        return _carry_out(registry, found.ledger, intent)


def rollback(registry: Registry, who: str, smoke_test: Callable[[Served], object]) -> Promotion:
    """Make the previous champion the champion again, after it has shown that it loads and answers.

    smoke_test(version): loads its exported model and lets it answer; raises if it does not. Rolled back twice, it goes
    back two champions; a rollback that was interrupted and is repeated goes back one, and is not tested again. Raises
    UserError, and moves nothing, if there is no way back, if the target's bytes are not as they were registered, or if
    the smoke test raised.
    """
    with _locked_ledger(registry, who) as found:
        if found.finished and found.finished.action == "rollback":
            return found.finished
        champions = found.contents.champions(registry.name)
        if len(champions) < 2:
            raise UserError(f"{registry.name}: nothing to roll back to, there was no champion before this one")
        *earlier, champion = champions
        target = registry.version(earlier[-1])
        served = registry.verify(target)
        try:
            smoke_test(served)
        except Exception as error:
            raise UserError(
                f"{target}: not rolled back to, it does not load and answer ({type(error).__name__}: {error}); "
                f"version {champion} stays champion"
            ) from error
        intent, _ = found.ledger.append(
            "intent",
            action="rollback",
            model=registry.name,
            from_version=champion,
            to_version=target.version,
            who=who,
            manifest_digest=target.digest,
            gate_digest=target.tags.get("gate_digest"),
        )
        return _carry_out(registry, found.ledger, intent)


def finish_interrupted(registry: Registry, who: str) -> Promotion | None:
    """Finish the move in which an earlier process died, if there is one: what is judged next is then judged against
    the champion that serves. Waits for no lock where there is none."""
    contents = open_ledger(registry.mlruns).read()
    if contents.pending() is None and not _is_unreported(registry, contents):
        return None
    with _locked_ledger(registry, who) as found:
        return found.finished


@contextmanager
def _locked_ledger(registry: Registry, who: str) -> Iterator[_LockedLedger]:
    """Hold the promotion lock, with nothing pending, and a ledger that agrees with the aliases."""
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
        ledger.repair()
        finished = None
        if pending := ledger.read().pending():
            finished = _finish(Registry(registry.mlruns, pending.model), ledger, pending)
        if finished is None or finished.model != registry.name:
            finished = _acknowledge(registry, ledger.read())
        _reconcile(registry, ledger, who)
        yield _LockedLedger(ledger, ledger.read(), finished)
    finally:
        lock.release()


def _carry_out(registry: Registry, ledger: Ledger, intent: Entry, *, note: str | None = None) -> Promotion:
    """Move the aliases as the intent demands, and write that it is done. May be repeated from any point."""
    champions = champion_stack([*ledger.read().committed(registry.name), intent])
    registry.move(_aliases(champions, registry.snapshot()))
    _, head = ledger.end(intent, "commit", note=note)
    registry.tag_model(LEDGER_HEAD, head)
    return Promotion.of(intent)


def _finish(registry: Registry, ledger: Ledger, intent: Entry) -> Promotion | None:
    """Carry out an intent whose process died; None where it had to be given up. Its checks had passed; since then its
    target's bytes may have changed, and a gate may have blocked what was to be promoted."""
    move = f"the interrupted {intent.action} to {intent.model} version {intent.to_version}"
    try:
        target = registry.version(intent.to_version)
        registry.verify(target)
        if intent.action == "promote":
            _ship(target, read_gate(registry, target))
    except UserError as error:
        registry.move(_aliases(ledger.read().champions(registry.name), registry.snapshot()))
        ledger.end(intent, "abort", note=f"interrupted, and then: {error}")
        log.warning("%s, begun by %s, was given up: %s", move, intent.who, error)
        return None
    _carry_out(registry, ledger, intent, note="interrupted, finished later")
    log.warning("%s, begun by %s, was finished now", move, intent.who)
    return Promotion.of(intent, finished_later=True)


def _acknowledge(registry: Registry, contents: Contents) -> Promotion | None:
    """The model's last move, where its process died between the commit and its tag in MLflow: it had moved the
    aliases, and whoever asked for it has not heard."""
    if not _is_unreported(registry, contents):
        return None
    last = contents.committed(registry.name)[-1]
    registry.tag_model(LEDGER_HEAD, contents.ends(registry.name)[-1])
    log.warning(
        "the %s to %s version %s, begun by %s, was interrupted when it was done", last.action, last.model,
        last.to_version, last.who,
    )  # fmt: skip
    return Promotion.of(last, finished_later=True)


def _is_unreported(registry: Registry, contents: Contents) -> bool:
    """Whether MLflow knows of the model's last move but one, and serves what the last one had promoted. (After an older
    database was restored it knows of an older move, or serves something else: `_reconcile` writes that down.)"""
    ends = contents.ends(registry.name)
    if not ends:
        return False
    snapshot = registry.snapshot()
    last_but_one = ends[-2] if len(ends) > 1 else None
    if snapshot.tags.get(LEDGER_HEAD) != last_but_one:
        return False
    return snapshot.aliases.get(CHAMPION) == contents.champions(registry.name)[-1]


def _reconcile(registry: Registry, ledger: Ledger, who: str) -> None:
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


def _ship(version: Version, report: GateReport | None) -> GateReport:
    """The report, if it lets this very version through. Raises UserError if it does not."""
    if not version.servable:
        what = "an export of this precision" if version.stage == "export" else f"a {version.stage} checkpoint"
        raise UserError(f"{version}: {what} is not served; `twinloop status` names the candidate")
    if report is None:
        remedy = f"run `twinloop gate --version {version.version}`"
        raise UserError(f"{version}: not promoted, no gate has judged it; {remedy}")
    _is_about(version, report)
    if report.decision != "SHIP":
        raise UserError(
            f"{version}: not promoted, its gate says {report.decision}; `twinloop status` gives the reasons"
        )
    return report


def _is_about(version: Version, report: GateReport) -> None:
    if report.candidate != version.digest:
        raise UserError(
            f"{version}: the gate report is about {report.candidate[:12] or 'nothing named'} and this version "
            f"is {version.digest[:12]}; run `twinloop gate --version {version.version}`"
        )


def _not_refuted(version: Version, report: GateReport, committed: list[Entry], *, manual: bool) -> None:
    """Raise UserError if the version was taken back, unless a person wants it again on a new report.

    Without this, the next scheduled run would find or make its SHIP again, and undo the rollback.
    """
    left = next((entry for entry in reversed(committed) if entry.from_version == version.version), None)
    if left is None or left.action == "promote":
        return
    taken_back = f"{version}: not promoted, {left.who} took it back on {left.when}"
    again = f"run `twinloop gate --version {version.version}`"
    if not manual:
        raise UserError(f"{taken_back}; if it is to come back, {again} and `twinloop promote {version.version}`")
    let_through = {e.gate_digest for e in committed if e.action == "promote" and e.to_version == version.version}
    if report.digest() in let_through:
        raise UserError(f"{taken_back} after this same gate report; {again}, with a rule that detects the cause")


def _gate_file(registry: Registry, digest: str) -> Path:
    return registry.mlruns.root / "gates" / f"{digest}.json"
