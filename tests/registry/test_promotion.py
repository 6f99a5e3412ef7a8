"""The champion moves on a SHIP, one move at a time, whatever happens in between; every move can be read later."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from releases import Export, Make, champions, consistent, history, lines, loads, ship

from twinloop.common.errors import UserError
from twinloop.evaluation.gate import GateReport
from twinloop.registry import promotion as promote_module
from twinloop.registry.gates import read_gate, record_gate
from twinloop.registry.ledger import Ledger
from twinloop.registry.promotion import open_ledger, promote, rollback
from twinloop.registry.snapshot import Served, Version
from twinloop.registry.status import status
from twinloop.registry.tracking import Mlruns
from twinloop.registry.versions import Lineage, Registry


def test_promotion_moves_champion_to_previous_and_candidate_to_champion(registry: Registry, exported: Export) -> None:
    first = exported("w1")
    promote(registry, first.version, ship(first), who="ada")
    assert champions(registry) == {"champion": 1}
    second = exported("w2")
    assert champions(registry) == {"champion": 1, "candidate": 2}
    moved = promote(registry, second.version, ship(second), who="bob")
    assert champions(registry) == {"champion": 2, "previous": 1}
    assert (moved.action, moved.from_version, moved.to_version, moved.who) == ("promote", 1, 2, "bob")
    assert moved.manifest_digest == second.digest
    assert moved.gate_digest == ship(second).digest()
    assert history(registry)[1] == moved
    consistent(registry)


def test_promoting_the_champion_again_changes_nothing(registry: Registry, exported: Export) -> None:
    version = exported("w1")
    first = promote(registry, version.version, ship(version), who="ada")
    before = lines(registry)
    assert promote(registry, version.version, ship(version), who="bob") == first
    assert lines(registry) == before
    assert exported("w1").version == 1
    assert champions(registry) == {"champion": 1}  # registered again, it is not its own candidate


def test_a_later_check_of_the_champion_is_not_covered_by_its_old_report(registry: Registry, exported: Export) -> None:
    version = exported("w1")
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
        (lambda own, other: None, "no gate has judged it"),
    ],
)
def test_nothing_is_promoted_without_ship_for_its_very_digest(
    registry: Registry, exported: Export, evidence: Callable[..., GateReport | None], message: str
) -> None:
    other, own = exported("w1"), exported("w2")
    with pytest.raises(UserError, match=message):
        promote(registry, own.version, evidence(own, other), who="ada")
    assert champions(registry) == {"candidate": 2}
    assert not open_ledger(registry.mlruns).path.exists()


def test_a_recording_killed_between_its_tags_is_made_good_by_the_next(
    registry: Registry, exported: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = exported("w1")
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


def test_a_first_recording_killed_between_its_tags_is_no_gate_yet(registry: Registry, exported: Export) -> None:
    registry.tag(exported("w1"), {"gate_decision": "SHIP", "gate_when": "2026-01-01"})
    seen = status(registry)
    assert seen.last_gate is None
    assert seen.candidate
    assert seen.candidate.gate is None


def test_a_gate_that_blocks_while_a_promotion_waits_is_seen_by_it(
    registry: Registry, exported: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = exported("w1")
    record_gate(registry, version, ship(version))
    locked_ledger = promote_module._locked_ledger

    def after_a_wait(registry: Registry, who: str) -> object:
        record_gate(registry, registry.version(1), ship(version, "BLOCK"))
        return locked_ledger(registry, who)

    monkeypatch.setattr(promote_module, "_locked_ledger", after_a_wait)
    with pytest.raises(UserError, match="its gate says BLOCK"):
        promote(registry, 1, who="ada", manual=True)


def test_a_report_by_other_rules_about_the_champion_replaces_its_last_one(registry: Registry, exported: Export) -> None:
    version = exported("w1")
    promote(registry, 1, ship(version), who="ada")
    stricter = ship(version, "BLOCK").model_copy(update={"rules_digest": "stricter"})
    record_gate(registry, registry.version(1), stricter)
    promote(registry, 1, ship(version), who="ada")
    kept = read_gate(registry, registry.version(1))
    assert kept is not None
    assert kept.decision == "SHIP"
    record_gate(registry, registry.version(1), ship(version, "BLOCK"))  # the hourly check, by the same rules
    promote(registry, 1, ship(version), who="ada")
    kept = read_gate(registry, registry.version(1))
    assert kept is not None
    assert kept.decision == "BLOCK"


def test_a_changed_gate_report_is_refused(registry: Registry, exported: Export) -> None:
    version = exported("w1")
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


def test_a_corrupt_exported_model_is_not_promoted(registry: Registry, exported: Export) -> None:
    version = exported("w1")
    (version.path / "model.onnx").write_text("w9")
    with pytest.raises(UserError, match="differs from what was written"):
        promote(registry, version.version, ship(version), who="ada")
    assert "champion" not in champions(registry)


def test_rollback_tests_its_target_and_goes_back_one_champion_each_time(
    registry: Registry, three: list[Version]
) -> None:
    tested: list[Served] = []
    moved = rollback(registry, "bob", tested.append)
    assert [(served.path, served.domain) for served in tested] == [(three[1].path, "returns")]
    assert (moved.action, moved.from_version, moved.to_version) == ("rollback", 3, 2)
    assert champions(registry) == {"champion": 2, "previous": 1}
    rollback(registry, "bob", tested.append)
    assert champions(registry) == {"champion": 1}
    with pytest.raises(UserError, match="nothing to roll back to"):
        rollback(registry, "bob", tested.append)
    assert [move.action for move in history(registry)] == ["promote"] * 3 + ["rollback"] * 2
    consistent(registry)


def test_a_failing_smoke_test_moves_nothing(registry: Registry, three: list[Version]) -> None:
    def fails(version: Served) -> None:
        raise RuntimeError("answered nonsense")

    before = lines(registry), champions(registry)
    with pytest.raises(UserError, match=r"does not load and answer .*answered nonsense.*version 3 stays champion"):
        rollback(registry, "bob", fails)
    assert (lines(registry), champions(registry)) == before


def test_a_corrupt_target_is_not_rolled_back_to(registry: Registry, three: list[Version]) -> None:
    (three[1].path / "model.onnx").write_text("w9")
    with pytest.raises(UserError, match="differs from what was written"):
        rollback(registry, "bob", loads)
    assert champions(registry) == {"champion": 3, "previous": 2}


def test_what_was_rolled_back_needs_a_person_and_a_new_gate_report(registry: Registry, three: list[Version]) -> None:
    rollback(registry, "bob", loads)
    with pytest.raises(UserError, match=r"version 3: not promoted, bob took it back on"):
        promote(registry, 3, ship(three[2], rules="r2"), who="the schedule")  # made and judged again, as each night
    with pytest.raises(UserError, match="after this same gate report"):
        promote(registry, 3, ship(three[2]), who="ada", manual=True)
    promote(registry, 3, ship(three[2], rules="r2"), who="ada", manual=True)
    assert champions(registry) == {"champion": 3, "previous": 2}


def test_what_was_superseded_may_come_back_by_itself(registry: Registry, three: list[Version]) -> None:
    promote(registry, 1, ship(three[0]), who="the schedule")  # the recipe was changed back
    assert champions(registry) == {"champion": 1, "previous": 3}


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
    registry: Registry, three: list[Version], exported: Export, forge: Callable[[list[bytes]], list[bytes]]
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


def test_an_alias_moved_manually_is_written_down(registry: Registry, three: list[Version], exported: Export) -> None:
    registry.mlruns.client.set_registered_model_alias("returns", "champion", "1")
    assert "moved outside of the ledger" in status(registry).warnings[0]
    fourth = exported("w4")
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


def test_status_reports_everything(registry: Registry, three: list[Version], exported: Export) -> None:
    blocked = exported("w4")
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
    registry.tag(three[2], {"base": "models/small (18,016 parameters, fp32)", "base_digest": "ab" * 32})
    base = next(origin for origin in status(registry).origins if origin.kind == "base")
    assert (base.name, base.digest) == ("models/small (18,016 parameters, fp32)", "ab" * 32)
    text = status(registry).to_text()
    assert re.search(r"^  base       models/small \(18,016 parameters, fp32\) (ab){6}$", text, re.MULTILINE)
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
    write, free = os.write, 40

    def until_full(descriptor: int, content: bytes) -> int:
        nonlocal free
        if not free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(descriptor, content[:free])
        free -= written
        return written

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", until_full)
        with pytest.raises(OSError, match="No space left"):
            ledger.append("commit", of=1, **add)  # type: ignore[arg-type]
    assert len(ledger.read().torn) == 40
    ledger.repair()
    assert ledger.append("commit", of=1, **add)[0].sequence == 2  # type: ignore[arg-type]
    assert (tmp_path / "promotions.jsonl.torn").read_bytes()[:1] == b"{"
