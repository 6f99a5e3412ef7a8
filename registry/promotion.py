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
from typing import TYPE_CHECKING, Literal

from filelock import Timeout

from twinloop.common.errors import UserError
from twinloop.registry.cards import describe
from twinloop.registry.gates import read_gate, record_gate, require_ship
from twinloop.registry.ledger import Champion, Champions, Contents, Entry, Ledger, champions_after
from twinloop.registry.reconcile import alias_moves, champion_in_mlflow, ways_back, why_not
from twinloop.registry.snapshot import Served, Version
from twinloop.registry.tracking import Mlruns
from twinloop.registry.versions import CHAMPION, PREVIOUS, Registry

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
    to_version: int | None
    """None: the champion was taken away in MLflow."""
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
        champion = found.contents.champions(registry.name).current
        committed = found.contents.committed(registry.name)
        if _is(champion, target) and target.servable:
            registry.verify(target)
            # A report by the same rules is not kept: a later check of the champion may say otherwise.
            recorded = read_gate(registry, target)
            if gate and (recorded is None or recorded.rules_digest != gate.rules_digest):
                record_gate(registry, target, gate)
            return Promotion.of(committed[-1])
        if gate:
            record_gate(registry, target, gate)
        report = require_ship(target, gate or read_gate(registry, target))
        _not_refuted(target, report, committed, manual=manual)
        registry.verify(target)
        intent, _ = found.ledger.append(
            "intent",
            action="promote",
            model=registry.name,
            from_version=champion.version if champion else None,
            to_version=version,
            who=who,
            manifest_digest=target.digest,
            gate_digest=report.digest(),
        )
        return _carry_out(registry, found.ledger, intent)


def rollback(registry: Registry, who: str, smoke_test: Callable[[Served], object]) -> Promotion:
    """Make the champion before this one the champion again, after it has shown that it loads and answers.

    smoke_test(version): loads its exported model and lets it answer; raises if it does not. Where the champion is gone
    from MLflow, the way back is the same. Rolled back twice, it goes back two champions; a rollback that was
    interrupted and is repeated goes back one, and is not tested again. Raises UserError, and moves nothing, if there is
    no way back, if the target's bytes are not as they were registered, or if the smoke test raised.
    """
    with _locked_ledger(registry, who) as found:
        if found.finished and found.finished.action == "rollback":
            return found.finished
        champion = found.contents.champions(registry.name).current
        target = _target_of_rollback(registry, found.contents)
        served = registry.verify(target)
        try:
            smoke_test(served)
        except Exception as error:
            stays = f"version {champion.version} stays champion" if champion else "there is no champion"
            raise UserError(
                f"{target}: not rolled back to, it does not load and answer ({type(error).__name__}: {error}); {stays}"
            ) from error
        intent, _ = found.ledger.append(
            "intent",
            action="rollback",
            model=registry.name,
            from_version=champion.version if champion else None,
            to_version=target.version,
            who=who,
            manifest_digest=target.digest,
            gate_digest=target.tags.get("gate_digest"),
        )
        return _carry_out(registry, found.ledger, intent)


def _target_of_rollback(registry: Registry, contents: Contents) -> Version:
    """What the alias `previous` names, if it may be served; else the champion before this one that still exists."""
    snapshot, champions = registry.snapshot(), contents.champions(registry.name)
    once = {(entry.to_version, entry.manifest_digest) for entry in contents.committed(registry.name)}
    named = snapshot.alias(PREVIOUS)
    # Of what was never a champion no gate report may have let it through.
    if named and named.servable and (named.version, named.digest) in once and not _is(champions.current, named):
        return named
    if back := ways_back(snapshot, champions):
        return back[0]
    earlier = ", ".join(dict.fromkeys(why_not(snapshot, each) for each in champions.earlier))
    if not snapshot.exists:
        reason = f"MLflow has no registered model {registry.name}"
    elif earlier:
        reason = f"of the champions before this one {earlier}"
    else:
        reason = "there was no champion before this one"
    raise UserError(f"{registry.name}: nothing to roll back to, {reason}")


def _follow_with_previous(registry: Registry, before: Champions, champion: Champion | None) -> None:
    """After the champion was moved in MLflow, a rollback goes to the one that it was moved from, unless somebody has
    moved `previous` too."""
    snapshot = registry.snapshot()
    left = next((version.version for version in ways_back(snapshot, before)), None)
    if champion is None or before.current is None or snapshot.aliases.get(PREVIOUS) != left:
        return
    moves = alias_moves(Champions(champion, (*before.earlier, before.current)), snapshot)
    registry.move({alias: version for alias, version in moves.items() if alias == PREVIOUS})


def _is(champion: Champion | None, version: Version) -> bool:
    return champion == Champion(version.version, version.digest)


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
    champions = champions_after([*ledger.read().committed(registry.name), intent])
    registry.move(alias_moves(champions, registry.snapshot()))
    _, head = ledger.end(intent, "commit", note=note)
    registry.tag_model(LEDGER_HEAD, head)
    describe(registry, ledger.read(), intent.to_version, intent.from_version)
    return Promotion.of(intent)


def _finish(registry: Registry, ledger: Ledger, intent: Entry) -> Promotion | None:
    """Carry out an intent whose process died; None where it had to be given up. Its checks had passed; since then its
    target may have been changed or deleted, a gate may have blocked what was to be promoted, and somebody may have
    moved the champion in MLflow."""
    move = f"the interrupted {intent.action} to {intent.model} version {intent.to_version}"
    try:
        target = registry.version(intent.to_version or 0)
        if target.digest != intent.manifest_digest:
            raise UserError(f"{target}: it is not the one that was meant, the model was made again in MLflow")
        registry.verify(target)
        if intent.action == "promote":
            require_ship(target, read_gate(registry, target))
        champion = registry.snapshot().aliases.get(CHAMPION)
        if champion not in (None, intent.from_version, intent.to_version):
            raise UserError(f"{registry.name}: version {champion} was made the champion in MLflow meanwhile")
    except UserError as error:
        _restore(registry, ledger.read(), intent)
        ledger.end(intent, "abort", note=f"interrupted, and then: {error}")
        log.warning("%s, begun by %s, was given up: %s", move, intent.who, error)
        return None
    _carry_out(registry, ledger, intent, note="interrupted, finished later")
    log.warning("%s, begun by %s, was finished now", move, intent.who)
    return Promotion.of(intent, finished_later=True)


def _restore(registry: Registry, contents: Contents, intent: Entry) -> None:
    """Take back what a move had done that is given up. A champion that is not its own doing stays."""
    snapshot = registry.snapshot()
    if not snapshot.exists:
        return
    champions = contents.champions(registry.name)
    champion = champion_in_mlflow(snapshot)
    if champion is None or champion.version != intent.to_version:
        champions = Champions(champion, champions.earlier)
    moves = alias_moves(champions, snapshot)
    if champion and champions.current == champion:
        moves.pop(CHAMPION, None)  # it may be a version that is none of ours
    registry.move(moves)


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
    if not snapshot.exists or snapshot.tags.get(LEDGER_HEAD) != last_but_one:
        return False
    return champion_in_mlflow(snapshot) == contents.champions(registry.name).current


def _reconcile(registry: Registry, ledger: Ledger, who: str) -> None:
    """Write down what the ledger does not know: somebody moved or removed the champion in MLflow, deleted its version
    or the model, or the ledger is new."""
    snapshot, contents = registry.snapshot(), ledger.read()
    known, actual = contents.champions(registry.name).current, champion_in_mlflow(snapshot)
    if known == actual:
        return
    lost = snapshot.tags.get(LEDGER_HEAD)
    if actual is None:
        note = "the champion was removed in MLflow"
    elif lost and lost not in contents.digests:
        note = f"the ledger that ended with {lost} is not here"
    else:
        note = "the alias was moved outside of the ledger"
    found = [actual]
    previous = snapshot.alias(PREVIOUS)
    if actual and previous and not contents.committed(registry.name):
        found = [Champion(previous.version, previous.digest), actual]
    _follow_with_previous(registry, contents.champions(registry.name), actual)
    for champion in found:
        _, head = ledger.append(
            "adopt",
            action="adopt",
            model=registry.name,
            from_version=known.version if known else None,
            to_version=champion.version if champion else None,
            who=who,
            manifest_digest=champion.digest if champion else "",
            note=note,
        )
        known = champion
    log.warning("%s: %s; the ledger was brought up to date", registry.name, note)
    if snapshot.exists:
        registry.tag_model(LEDGER_HEAD, head)


def _not_refuted(version: Version, report: GateReport, committed: list[Entry], *, manual: bool) -> None:
    """Raise UserError if the version was taken back, unless a person wants it again on a new report.

    Without this, the next scheduled run would find or make its SHIP again, and undo the rollback.
    """
    left = _taken_back(version.digest, committed)
    if left is None:
        return
    by = f"{left.who} took it back" if left.action == "rollback" else "the champion was moved away from it in MLflow"
    taken_back = f"{version}: not promoted, {by} on {left.when}"
    again = f"run `twinloop gate --version {version.version}`"
    if not manual:
        raise UserError(f"{taken_back}; if it is to come back, {again} and `twinloop promote {version.version}`")
    let_through = {e.gate_digest for e in committed if e.action == "promote" and e.manifest_digest == version.digest}
    if report.digest() in let_through:
        raise UserError(f"{taken_back} after this same gate report; {again}, with a rule that detects the cause")


def _taken_back(digest: str, committed: list[Entry]) -> Entry | None:
    """The move that left this content for another one, which no promotion did; None where it came back since. By
    content, not by number: deleted in MLflow and registered again, it has another number. A champion that was only
    removed there was not taken back: nothing else was wanted instead."""
    champion, left = "", None
    for entry in committed:
        if entry.to_version is None:
            continue
        if entry.manifest_digest == digest:
            left = None
        elif champion == digest and entry.action != "promote":
            left = entry
        champion = entry.manifest_digest
    return left
