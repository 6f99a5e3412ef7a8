"""The champion moves on proof, one move at a time, whatever happens in between; and every move can be told later."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Literal

import pytest

from evaluation.gate import GateReport, Reason
from models.errors import UserError
from tasks import ledger as ledger_module
from tasks import promote as promote_module
from tasks.artifact import Artifact
from tasks.ledger import Ledger
from tasks.promote import LEDGER_HEAD, Promotion, open_ledger, promote, record_gate, rollback
from tasks.registry import Lineage, Registry, Version
from tasks.status import status
from tasks.tracking import Mlruns

Bundle = Callable[[str], Version]
Make = Callable[..., Artifact]

# Fresh processes, as in life, but MLflow is imported once for all of them.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["mlflow.store.tracking.sqlalchemy_store", "tasks.promote"])


def ship(version: Version, decision: Literal["SHIP", "BLOCK"] = "SHIP", rules: str = "r1") -> GateReport:
    reason = Reason(rule="golden_pass_rate", reason="policy regression", owner="SFT data", measured=0.9, limit=1.0)
    reasons = () if decision == "SHIP" else (reason,)
    return GateReport(decision=decision, reasons=reasons, checks=(), candidate=version.digest, rules_digest=rules)


def loads(path: Path) -> None:
    assert (path / "model.onnx").exists()


def champions(registry: Registry) -> dict[str, int]:
    return registry.snapshot().aliases


def lines(registry: Registry) -> list[bytes]:
    return open_ledger(registry.mlruns).path.read_bytes().splitlines()


def history(registry: Registry) -> list[Promotion]:
    """Every move of the champion, oldest first."""
    head = registry.snapshot().tags.get(LEDGER_HEAD)
    return [Promotion.of(entry) for entry in open_ledger(registry.mlruns).read(head=head).settled(registry.name)]


def settle(registry: Registry) -> None:
    """What every promotion and rollback does first: finish what a dead process had begun."""
    with promote_module._settled(registry, "ada"):
        pass


def consistent(registry: Registry) -> None:
    """The ledger is whole, nothing is pending, and it says what the aliases say."""
    contents = open_ledger(registry.mlruns).read(head=registry.snapshot().tags["ledger_head"])
    assert contents.pending() is None
    assert not contents.torn
    known = contents.champions(registry.name)
    aliases = champions(registry)
    assert known[-1:] == [aliases["champion"]]
    assert known[-2:-1] == ([aliases["previous"]] if "previous" in aliases else [])
    assert registry.resolve("champion")


def test_promotion_moves_champion_to_previous_and_candidate_to_champion(registry: Registry, bundle: Bundle) -> None:
    first = bundle("w1")
    promote(registry, first.version, ship(first), who="ada")
    assert champions(registry) == {"champion": 1}
    second = bundle("w2")
    assert champions(registry) == {"champion": 1, "candidate": 2}
    moved = promote(registry, second.version, ship(second), who="bob")
    assert champions(registry) == {"champion": 2, "previous": 1}
    assert (moved.action, moved.from_version, moved.to_version, moved.who) == ("promote", 1, 2, "bob")
    assert moved.manifest_digest == second.digest
    assert moved.gate_digest == ship(second).digest()
    assert history(registry)[1] == moved
    consistent(registry)


def test_promoting_the_champion_again_changes_nothing(registry: Registry, bundle: Bundle) -> None:
    version = bundle("w1")
    first = promote(registry, version.version, ship(version), who="ada")
    before = lines(registry)
    assert promote(registry, version.version, ship(version), who="bob") == first
    assert lines(registry) == before
    assert bundle("w1").version == 1
    assert champions(registry) == {"champion": 1}  # registered again, it is not its own candidate


def test_a_later_check_of_the_champion_is_not_covered_by_its_old_report(registry: Registry, bundle: Bundle) -> None:
    version = bundle("w1")
    promote(registry, version.version, ship(version), who="ada")
    record_gate(registry, registry.version(1), ship(version, "BLOCK"))  # the hourly check
    promote(registry, version.version, ship(version), who="the schedule")  # the nightly run: everything is cached
    seen = status(registry)
    assert seen.champion
    assert seen.champion.gate == "BLOCK"


@pytest.mark.parametrize(
    ("evidence", "message"),
    [
        (lambda own, other: ship(own, "BLOCK"), "its gate says BLOCK"),
        (lambda own, other: ship(other), "the gate report is about"),
        (lambda own, other: None, "it stood before no gate"),
    ],
)
def test_nothing_is_promoted_without_ship_for_its_very_digest(
    registry: Registry, bundle: Bundle, evidence: Callable[..., GateReport | None], message: str
) -> None:
    other, own = bundle("w1"), bundle("w2")
    with pytest.raises(UserError, match=message):
        promote(registry, own.version, evidence(own, other), who="ada")
    assert champions(registry) == {"candidate": 2}
    assert not open_ledger(registry.mlruns).path.exists()


def test_a_recording_killed_between_its_tags_is_made_good_by_the_next(
    registry: Registry, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = bundle("w1")
    record_gate(registry, version, ship(version, "BLOCK"))
    set_tag, written = registry.mlruns.client.set_model_version_tag, 0

    def dying(name: str, number: str, key: str, value: str) -> None:
        nonlocal written
        if written == 2:
            raise KeyboardInterrupt
        written += 1
        set_tag(name, number, key, value)

    with monkeypatch.context() as patch:
        patch.setattr(registry.mlruns.client, "set_model_version_tag", dying)
        with pytest.raises(KeyboardInterrupt):
            record_gate(registry, registry.version(1), ship(version))
    assert written == 2
    record_gate(registry, registry.version(1), ship(version))
    tags = registry.version(1).tags
    assert (tags["gate_decision"], tags["gate_digest"]) == ("SHIP", ship(version).digest())


def test_a_first_recording_killed_between_its_tags_is_no_gate_yet(registry: Registry, bundle: Bundle) -> None:
    registry.tag(bundle("w1"), {"gate_decision": "SHIP", "gate_when": "2026-01-01"})
    seen = status(registry)
    assert seen.last_gate is None
    assert seen.candidate
    assert seen.candidate.gate is None


def test_a_gate_that_blocks_while_a_promotion_waits_is_seen_by_it(
    registry: Registry, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = bundle("w1")
    record_gate(registry, version, ship(version))
    settled = promote_module._settled

    def after_a_wait(registry: Registry, who: str) -> object:
        record_gate(registry, registry.version(1), ship(version, "BLOCK"))
        return settled(registry, who)

    monkeypatch.setattr(promote_module, "_settled", after_a_wait)
    with pytest.raises(UserError, match="its gate says BLOCK"):
        promote(registry, 1, who="ada", by_hand=True)


def test_a_changed_gate_report_is_refused(registry: Registry, bundle: Bundle) -> None:
    version = bundle("w1")
    with pytest.raises(UserError, match="BLOCK"):
        promote(registry, version.version, ship(version, "BLOCK"), who="ada")
    report = next((registry.mlruns.root / "gates").iterdir())
    report.write_text(report.read_text().replace("BLOCK", "SHIP").replace("policy regression", "fine"))
    with pytest.raises(UserError, match="missing or changed; run the gate again"):
        promote(registry, version.version, who="ada")


def test_a_checkpoint_is_not_promoted(registry: Registry, make: Make, lineage: Lineage) -> None:
    version = registry.register(make("sft").path, lineage)
    with pytest.raises(UserError, match="a sft checkpoint is not served"):
        promote(registry, version.version, ship(version), who="ada")


def test_a_damaged_bundle_is_not_promoted(registry: Registry, bundle: Bundle) -> None:
    version = bundle("w1")
    (version.path / "model.onnx").write_text("w9")
    with pytest.raises(UserError, match="differs from what was written"):
        promote(registry, version.version, ship(version), who="ada")
    assert "champion" not in champions(registry)


@pytest.fixture
def three(registry: Registry, bundle: Bundle) -> list[Version]:
    """Three champions, one after the other."""
    versions = [bundle(weights) for weights in ("w1", "w2", "w3")]
    for version in versions:
        promote(registry, version.version, ship(version), who="ada")
    return versions


def test_rollback_proves_its_target_and_goes_back_one_champion_each_time(
    registry: Registry, three: list[Version]
) -> None:
    proven: list[Path] = []
    moved = rollback(registry, "bob", proven.append)
    assert proven == [three[1].path]
    assert (moved.action, moved.from_version, moved.to_version) == ("rollback", 3, 2)
    assert champions(registry) == {"champion": 2, "previous": 1}
    rollback(registry, "bob", proven.append)
    assert champions(registry) == {"champion": 1}
    with pytest.raises(UserError, match="nothing to roll back to"):
        rollback(registry, "bob", proven.append)
    assert [move.action for move in history(registry)] == ["promote"] * 3 + ["rollback"] * 2
    consistent(registry)


def test_a_failing_proof_moves_nothing(registry: Registry, three: list[Version]) -> None:
    def fails(path: Path) -> None:
        raise RuntimeError("answered nonsense")

    before = lines(registry), champions(registry)
    with pytest.raises(UserError, match=r"does not load and answer .*answered nonsense.*version 3 stays champion"):
        rollback(registry, "bob", fails)
    assert (lines(registry), champions(registry)) == before


def test_a_damaged_target_is_not_rolled_back_to(registry: Registry, three: list[Version]) -> None:
    (three[1].path / "model.onnx").write_text("w9")
    with pytest.raises(UserError, match="differs from what was written"):
        rollback(registry, "bob", loads)
    assert champions(registry) == {"champion": 3, "previous": 2}


def test_what_was_rolled_back_needs_a_person_and_a_new_gate_report(registry: Registry, three: list[Version]) -> None:
    rollback(registry, "bob", loads)
    with pytest.raises(UserError, match=r"version 3: not promoted, bob took it back on"):
        promote(registry, 3, ship(three[2], rules="r2"), who="the schedule")  # made and judged again, as each night
    with pytest.raises(UserError, match="after this same gate report"):
        promote(registry, 3, ship(three[2]), who="ada", by_hand=True)
    promote(registry, 3, ship(three[2], rules="r2"), who="ada", by_hand=True)
    assert champions(registry) == {"champion": 3, "previous": 2}


def test_what_was_superseded_may_come_back_by_itself(registry: Registry, three: list[Version]) -> None:
    promote(registry, 1, ship(three[0]), who="the schedule")  # the recipe was changed back
    assert champions(registry) == {"champion": 1, "previous": 3}


# --- processes -------------------------------------------------------------------------------------------------------


def _promote(root: Path, number: int, barrier: Barrier) -> None:
    registry = Registry(Mlruns(root), "returns")
    evidence = ship(registry.version(number))
    barrier.wait()
    promote(registry, number, evidence, who=f"process {number}")


def test_processes_that_promote_at_once_take_turns(registry: Registry, bundle: Bundle) -> None:
    versions = [bundle(f"w{number}") for number in range(1, 5)]
    barrier = processes.Barrier(len(versions))
    started = [
        processes.Process(target=_promote, args=(registry.mlruns.root, version.version, barrier))
        for version in versions
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0] * 4
    moves = history(registry)
    assert sorted(move.to_version for move in moves) == [1, 2, 3, 4]
    assert [move.from_version for move in moves] == [None, *(move.to_version for move in moves[:-1])]
    consistent(registry)


POINTS = ["nothing", "half an intent", "intent", "first alias", "second alias", "half a commit", "commit"]
MOVES = [(action, point) for action in ("promote", "rollback") for point in POINTS] + [("promote", "third alias")]


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _move_and_die(root: Path, action: str, point: str) -> None:
    """Promote version 2, or roll back from it, and be killed right after `point`."""
    registry = Registry(Mlruns(root), "returns")
    append, appended = ledger_module._append, 0
    client = registry.mlruns.client
    moved = {name: getattr(client, name) for name in ("set_registered_model_alias", "delete_registered_model_alias")}
    moves = 0

    def dying_append(path: Path, line: bytes) -> None:
        nonlocal appended
        appended += 1
        half, whole = (("half an intent", "intent"), ("half a commit", "commit"))[appended - 1]
        if point == "nothing":
            _die()
        append(path, line[: len(line) // 2] if point == half else line)
        if point in (half, whole):
            _die()

    def dying_move(name: str) -> Callable[..., None]:
        def move(*arguments: str) -> None:
            nonlocal moves
            moved[name](*arguments)
            moves += 1
            if point == ("first alias", "second alias", "third alias")[moves - 1]:
                _die()

        return move

    ledger_module._append = dying_append
    for name in moved:
        setattr(client, name, dying_move(name))
    if action == "promote":
        promote(registry, 2, ship(registry.version(2)), who="the dead")
    else:
        rollback(registry, "the dead", loads)


@pytest.mark.parametrize(("action", "point"), MOVES)
def test_a_killed_move_is_finished_or_never_happened(
    registry: Registry, bundle: Bundle, action: str, point: str
) -> None:
    for weights in ("w1", "w2"):
        version = bundle(weights)
        if weights == "w1" or action == "rollback":
            promote(registry, version.version, ship(version), who="ada")
    before, after = (1, 2) if action == "promote" else (2, 1)
    process = processes.Process(target=_move_and_die, args=(registry.mlruns.root, action, point))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL

    assert registry.resolve("champion").version in (before, after)  # somebody is served at every moment
    seen = status(registry)
    assert bool(seen.warnings) == (point not in ("nothing", "commit"))

    settle(registry)
    consistent(registry)
    happened = point not in ("nothing", "half an intent")
    assert champions(registry)["champion"] == (after if happened else before)
    assert [move.who for move in history(registry)].count("the dead") == int(happened)
    assert status(registry).warnings == []


def test_an_interrupted_promotion_to_a_bundle_damaged_since_is_given_up(registry: Registry, bundle: Bundle) -> None:
    first = bundle("w1")
    promote(registry, first.version, ship(first), who="ada")
    second = bundle("w2")
    process = processes.Process(target=_move_and_die, args=(registry.mlruns.root, "promote", "second alias"))
    process.start()
    process.join(60)
    (second.path / "model.onnx").write_text("w9")
    settle(registry)
    assert champions(registry)["champion"] == 1
    assert "previous" not in champions(registry)
    assert [move.to_version for move in history(registry)] == [1]
    assert open_ledger(registry.mlruns).read().entries[-1].event == "abort"


# --- the ledger ------------------------------------------------------------------------------------------------------


def _edit_middle(found: list[bytes]) -> list[bytes]:
    return [found[0].replace(b'"ada"', b'"eve"'), *found[1:]]


def _edit_last(found: list[bytes]) -> list[bytes]:
    return [*found[:-1], found[-1].replace(b'"ada"', b'"eve"')]


@pytest.mark.parametrize(
    "forge",
    [
        _edit_middle,
        _edit_last,
        lambda found: found[:-2],  # the last promotion never happened
        lambda found: [*found[:2], *found[4:]],
        lambda found: [*found[:-1], b"{}"],
        lambda found: [found[1], found[0], *found[2:]],
    ],
)
def test_a_changed_ledger_is_noticed_and_stops_promotions(
    registry: Registry, three: list[Version], bundle: Bundle, forge: Callable[[list[bytes]], list[bytes]]
) -> None:
    path = open_ledger(registry.mlruns).path
    path.write_bytes(b"".join(line + b"\n" for line in forge(lines(registry))))
    with pytest.raises(UserError, match=r"promotions\.jsonl: line"):
        history(registry)
    with pytest.raises(UserError, match="keep the file as evidence"):
        rollback(registry, "bob", loads)
    assert "promotions.jsonl: line" in status(registry).warnings[0]

    path.rename(path.with_name("evidence.jsonl"))
    assert "the ledger is gone" in " ".join(status(registry).warnings)
    rollback(registry, "bob", loads)
    assert champions(registry)["champion"] == 2
    assert [move.action for move in history(registry)] == ["adopt", "adopt", "rollback"]
    consistent(registry)


def test_an_alias_moved_by_hand_is_written_down(registry: Registry, three: list[Version], bundle: Bundle) -> None:
    registry.mlruns.client.set_registered_model_alias("returns", "champion", "1")
    assert "moved outside of the ledger" in status(registry).warnings[0]
    fourth = bundle("w4")
    promote(registry, fourth.version, ship(fourth), who="ada")
    assert [(move.action, move.from_version, move.to_version) for move in history(registry)[3:]] == [
        ("adopt", 3, 1),
        ("promote", 1, 4),
    ]
    consistent(registry)


def test_each_line_says_who_moved_what_and_on_which_proof(registry: Registry, three: list[Version]) -> None:
    found = [json.loads(line) for line in lines(registry)]
    assert [entry["event"] for entry in found] == ["intent", "commit"] * 3
    last = found[-1]
    assert (last["from"], last["to"], last["who"], last["action"]) == (2, 3, "ada", "promote")
    assert last["gate_digest"] == ship(three[2]).digest()
    assert last["manifest_digest"] == three[2].digest
    assert len({entry["chain"] for entry in found}) == 6


def test_two_models_share_one_ledger(registry: Registry, three: list[Version], make: Make, lineage: Lineage) -> None:
    other = Registry(registry.mlruns, "support")
    version = other.register(make("export", "s1").path, lineage, servable=True)
    promote(other, version.version, ship(version), who="ada")
    assert [move.to_version for move in history(other)] == [1]
    assert len(history(registry)) == 3
    consistent(other)
    consistent(registry)


def test_status_tells_the_whole_story(registry: Registry, three: list[Version], bundle: Bundle) -> None:
    blocked = bundle("w4")
    with pytest.raises(UserError):
        promote(registry, blocked.version, ship(blocked, "BLOCK"), who="ada")
    seen = status(registry)
    assert (seen.champion.version, seen.candidate.version, seen.previous.version) == (3, 4, 2)  # type: ignore[union-attr]
    assert seen.last_gate
    assert (seen.last_gate.version, seen.last_gate.decision) == (4, "BLOCK")
    assert [origin.kind for origin in seen.origins] == ["export", "dataset", "recipe", "code"]
    assert seen.warnings == []
    plain = json.loads(seen.to_json())
    assert plain["champion"]["digest"] == three[2].digest
    text = seen.to_text()
    assert "champion   version 3" in text
    assert "policy regression (owner: SFT data)" in text


def test_status_of_an_empty_project(tmp_path: Path) -> None:
    seen = status(Registry(Mlruns(tmp_path / "mlruns"), "returns"))
    assert seen.champion is None
    assert not (tmp_path / "mlruns").exists()
    assert "champion   none" in seen.to_text()


def test_a_full_disk_leaves_a_line_that_can_be_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path / "promotions.jsonl")
    add = {"action": "promote", "model": "returns", "to_version": 1, "who": "ada", "manifest_digest": "d"}
    ledger.append("intent", **add)  # type: ignore[arg-type]
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:40]))
        with pytest.raises(OSError, match="the disk is full"):
            ledger.append("commit", of=1, **add)  # type: ignore[arg-type]
    assert len(ledger.read().torn) == 40
    ledger.mend()
    assert ledger.append("commit", of=1, **add)[0].sequence == 2  # type: ignore[arg-type]
    assert (tmp_path / "promotions.jsonl.torn").read_bytes()[:1] == b"{"
