"""Promotions by several processes at once, and moves whose process is killed: finished later, or never happened."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Literal

import pytest
from releases import Export, champions, consistent, history, loads, recover, ship

from twinloop.common.errors import UserError
from twinloop.registry import ledger as ledger_module
from twinloop.registry.artifact import Artifact, ArtifactStore
from twinloop.registry.gates import record_gate
from twinloop.registry.promotion import finish_interrupted, open_ledger, promote, rollback
from twinloop.registry.status import status
from twinloop.registry.tracking import CodeVersion, Mlruns
from twinloop.registry.versions import Lineage, Registry

# Fresh processes, as in life, but MLflow is imported once for all of them.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["mlflow.store.tracking.sqlalchemy_store", "twinloop.registry.promotion"])


def _promote(root: Path, number: int, barrier: Barrier) -> None:
    registry = Registry(Mlruns(root), "returns")
    evidence = ship(registry.version(number))
    barrier.wait()
    promote(registry, number, evidence, who=f"process {number}")


def test_processes_that_promote_at_once_take_turns(registry: Registry, exported: Export) -> None:
    versions = [exported(f"w{number}") for number in range(1, 5)]
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


def _move_and_die(root: Path, action: str, point: str, version: int = 2) -> None:
    """Promote a version, or roll back from the champion, and be killed right after `point`."""
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
        promote(registry, version, ship(registry.version(version)), who="the dead")
    else:
        rollback(registry, "the dead", loads)


@pytest.mark.parametrize(("action", "point"), MOVES)
def test_a_killed_move_is_finished_or_never_happened(
    registry: Registry, exported: Export, action: str, point: str
) -> None:
    for weights in ("w1", "w2"):
        version = exported(weights)
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

    recover(registry)
    consistent(registry)
    happened = point not in ("nothing", "half an intent")
    assert champions(registry)["champion"] == (after if happened else before)
    assert [move.who for move in history(registry)].count("the dead") == int(happened)
    assert status(registry).warnings == []


def test_an_interrupted_promotion_to_a_model_corrupted_since_is_given_up(registry: Registry, exported: Export) -> None:
    first = exported("w1")
    promote(registry, first.version, ship(first), who="ada")
    second = exported("w2")
    process = processes.Process(target=_move_and_die, args=(registry.mlruns.root, "promote", "second alias"))
    process.start()
    process.join(60)
    (second.path / "model.onnx").write_text("w9")
    recover(registry)
    assert champions(registry)["champion"] == 1
    assert "previous" not in champions(registry)
    assert [move.to_version for move in history(registry)] == [1]
    assert open_ledger(registry.mlruns).read().entries[-1].event == "abort"


# --- an interrupted move, and the command after it ------------------------------------------------------------------

BEGUN = [
    (action, point)
    for action, points in {
        "promote": ["intent", "first alias", "second alias", "third alias", "half a commit", "commit"],
        "rollback": ["intent", "first alias", "second alias", "half a commit", "commit"],
    }.items()
    for point in points
]


def manual(version: int) -> Callable[[Registry], object]:
    return lambda registry: promote(registry, version, who="ada", manual=True)


def judged_again_and_manual(version: int) -> Callable[[Registry], object]:
    def command(registry: Registry) -> object:
        target = registry.version(version)
        return promote(registry, version, ship(target, rules="r2"), who="ada", manual=True)

    return command


def roll_back(registry: Registry) -> object:
    return rollback(registry, "ada", loads)


def run_that_makes(version: int, decision: Literal["SHIP", "BLOCK"] = "SHIP") -> Callable[[Registry], object]:
    """What a run does with the registry, at its start and, once its gate has spoken, at its end."""

    def command(registry: Registry) -> object:
        finish_interrupted(registry, "the schedule")
        target = registry.version(version)
        if decision == "BLOCK":
            return record_gate(registry, target, ship(target, "BLOCK"))
        return promote(registry, version, ship(target), who="the schedule")

    return command


def gate_of_the_candidate(registry: Registry) -> object:
    """What `twinloop gate` does with it."""
    finish_interrupted(registry, "ada")
    snapshot = registry.snapshot()
    target = snapshot.alias("candidate") or snapshot.alias("champion")
    assert target
    return record_gate(registry, target, ship(target, "BLOCK"))


# Versions 1, 2 and 3 were champions, 4 is the candidate. Promoting 4, or the rollback to 2, is killed at some point;
# the command after it; the champion that must serve then; and whether the command is refused.
NEXT: list[tuple[str, str, Callable[[Registry], object], int, str | None]] = [
    ("promote", "promote 4", manual(4), 4, None),
    ("promote", "promote 3", judged_again_and_manual(3), 3, None),
    ("promote", "rollback", roll_back, 3, None),
    ("promote", "run that makes 4", run_that_makes(4), 4, None),
    ("promote", "run that makes 4 and blocks it", run_that_makes(4, "BLOCK"), 4, None),
    ("promote", "run that makes 1", run_that_makes(1), 1, None),
    ("promote", "gate", gate_of_the_candidate, 4, None),
    ("rollback", "promote 2", manual(2), 2, None),
    ("rollback", "promote 3", manual(3), 2, "took it back .* after this same gate report"),
    ("rollback", "promote 3, judged again", judged_again_and_manual(3), 3, None),
    ("rollback", "promote 4", judged_again_and_manual(4), 4, None),
    ("rollback", "rollback", roll_back, 2, None),
    ("rollback", "run that makes 3", run_that_makes(3), 2, "took it back"),
    ("rollback", "run that makes 3 and blocks it", run_that_makes(3, "BLOCK"), 2, None),
    ("rollback", "run that makes 4", run_that_makes(4), 4, None),
    ("rollback", "gate", gate_of_the_candidate, 2, None),
]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, migrated_database: Path) -> Callable[[str, str], Path]:
    """A registry in which a move was killed at a point, made once for each."""
    made: dict[tuple[str, str], Path] = {}

    def make_four() -> Path:
        root = tmp_path_factory.mktemp("four")
        (root / "mlruns").mkdir()
        shutil.copy(migrated_database, root / "mlruns" / "mlflow.db")
        registry = Registry(Mlruns(root / "mlruns"), "returns")
        lineage = Lineage(recipe="r", domain="returns", dataset_digest="d", code=CodeVersion("c0ffee"))
        store = ArtifactStore(root / "artifacts")
        for number in range(1, 5):
            weights = f"w{number}"

            def write(out: Path, work: Path, weights: str = weights) -> dict[str, float]:
                (out / "model.onnx").write_text(weights)
                return {}

            made = store.run("export", settings={"weights": weights}, inputs={}, code="code", build=write)
            version = registry.register(made.path, lineage, servable=True)
            record_gate(registry, version, ship(version))
            if number < 4:
                promote(registry, number, who="ada", manual=True)
        return root

    four = make_four()

    def get(action: str, point: str) -> Path:
        if (action, point) not in made:
            root = shutil.copytree(four, tmp_path_factory.mktemp("killed") / "project")
            arguments = (root / "mlruns", action, point, 4)
            process = processes.Process(target=_move_and_die, args=arguments)
            process.start()
            process.join(60)
            assert process.exitcode == -signal.SIGKILL
            made[action, point] = root
        return made[action, point]

    return get


@pytest.mark.parametrize(("action", "point"), BEGUN)
def test_after_an_interrupted_move_each_command_leaves_the_champion_that_it_should(
    action: str, point: str, interrupted: Callable[[str, str], Path], tmp_path: Path
) -> None:
    for begun, name, command, serves, refused in NEXT:
        if begun != action:
            continue
        root = shutil.copytree(interrupted(action, point), tmp_path / name)
        registry = Registry(Mlruns(root / "mlruns"), "returns")
        if refused:
            with pytest.raises(UserError, match=refused):
                command(registry)
        else:
            command(registry)
        assert registry.resolve("champion").version == serves, name
        consistent(registry)


def test_a_rollback_that_was_finished_says_so_and_the_next_one_goes_back_further(
    interrupted: Callable[[str, str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = shutil.copytree(interrupted("rollback", "intent"), tmp_path / "project")
    registry = Registry(Mlruns(root / "mlruns"), "returns")
    finished = rollback(registry, "ada", loads)
    assert (finished.to_version, finished.who, finished.finished_later) == (2, "the dead", True)
    assert "the interrupted rollback to returns version 2, begun by the dead, was finished now" in caplog.text
    further = rollback(registry, "ada", loads)
    assert (further.to_version, further.who, further.finished_later) == (1, "ada", False)


def test_another_models_interrupted_move_does_not_hide_that_a_rollback_was_done(
    interrupted: Callable[[str, str], Path], tmp_path: Path, make: Callable[..., Artifact], lineage: Lineage
) -> None:
    root = shutil.copytree(interrupted("rollback", "commit"), tmp_path / "copy")
    registry, other = (Registry(Mlruns(root / "mlruns"), name) for name in ("returns", "support"))
    version = other.register(make("export", "s1").path, lineage, servable=True)
    open_ledger(registry.mlruns).append(
        "intent", action="promote", model="support", to_version=version.version, who="the dead",
        manifest_digest=version.digest,
    )  # fmt: skip
    repeated = rollback(registry, "ada", loads)
    assert (repeated.to_version, repeated.finished_later) == (2, True)
    assert champions(registry)["champion"] == 2


def test_a_run_hears_of_a_move_that_was_done_and_the_next_rollback_goes_back(
    interrupted: Callable[[str, str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = shutil.copytree(interrupted("rollback", "commit"), tmp_path / "project")
    registry = Registry(Mlruns(root / "mlruns"), "returns")
    finished = finish_interrupted(registry, "the schedule")
    assert finished
    assert (finished.action, finished.to_version) == ("rollback", 2)
    assert "was interrupted when it was done" in caplog.text
    assert rollback(registry, "ada", loads).to_version == 1


def test_a_restored_database_is_no_interrupted_move(interrupted: Callable[[str, str], Path], tmp_path: Path) -> None:
    root = shutil.copytree(interrupted("promote", "intent"), tmp_path / "project")
    registry = Registry(Mlruns(root / "mlruns"), "returns")
    promote(registry, 4, who="ada", manual=True)
    backup = (root / "mlruns" / "mlflow.db").read_bytes()
    rollback(registry, "ada", loads)
    promote(registry, 4, ship(registry.version(4), rules="r2"), who="ada", manual=True)
    (root / "mlruns" / "mlflow.db").write_bytes(backup)
    registry = Registry(Mlruns(root / "mlruns"), "returns")
    assert not rollback(registry, "ada", loads).finished_later
    assert champions(registry)["champion"] == 3


def test_an_interrupted_promotion_of_what_a_gate_blocked_since_is_given_up(
    interrupted: Callable[[str, str], Path], tmp_path: Path
) -> None:
    root = shutil.copytree(interrupted("promote", "second alias"), tmp_path / "project")
    registry = Registry(Mlruns(root / "mlruns"), "returns")
    record_gate(registry, registry.version(4), ship(registry.version(4), "BLOCK"))
    recover(registry)
    assert champions(registry) == {"champion": 3, "previous": 2, "candidate": 4}
