"""The registry for the HTTP interface: read in the server, moved by a process of its own.

    python -m twinloop.flows.releases --project DIR --model NAME --who WHO (--promote VERSION | --roll-back)

Reading takes milliseconds of the project's own database, without MLflow. A move needs MLflow's client, 2 s and 190 MB
that the server would keep until its end, and a rollback loads a second model for its smoke test: in another process
neither slows down an answer, and memory is given back. It is the same code as that of `twinloop promote` and
`twinloop rollback`, and killed in the middle it leaves what they leave: a move that the next command finishes.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from twinloop.common.errors import UserError
from twinloop.flows.edge import MISTAKE, run_command
from twinloop.flows.environment import prepare_environment
from twinloop.registry.gates import read_gate
from twinloop.registry.ledger import who
from twinloop.registry.promotion import LOCK_TIMEOUT_S, Promotion, open_ledger, promote, rollback
from twinloop.registry.snapshot import Served, Snapshot, Version
from twinloop.registry.status import VersionStatus, origins
from twinloop.registry.versions import Registry
from twinloop.serving.versions_api import (
    Alias,
    Gate,
    GateReason,
    Move,
    Moved,
    MoveRefusedError,
    Origin,
    RuleResult,
    VersionDetail,
    VersionSummary,
)

log = logging.getLogger(__name__)

MOVED_WITHIN_S = LOCK_TIMEOUT_S + 600.0
"""A move that is killed waits for the next command, so it first gets the time to wait for another one's lock, and then
to hash and load what may be a big model."""


class ProjectReleases:
    """The registered model `name` of a project, as `serving.versions_api.Releases` wants it."""

    def __init__(self, project: Path, name: str):
        self._project = project
        self._registry = Registry.of(project, name)

    def versions(self) -> Sequence[VersionSummary]:
        snapshot = self._registry.snapshot()
        return [_summary(version, snapshot) for version in snapshot.versions.values()]

    def version(self, number: int) -> VersionDetail | None:
        snapshot = self._registry.snapshot()
        version = snapshot.versions.get(number)
        if version is None:
            return None
        chain = origins(self._registry.lineage(version))
        return VersionDetail(
            **dict(_summary(version, snapshot)),
            gate_report=_gate(self._registry, version),
            # A recipe is named as `twinloop run` was given it; nobody here reads where on this machine it lies.
            origins=[Origin(kind=each.kind, name=self._without_place(each.name), digest=each.digest) for each in chain],
        )

    def _without_place(self, name: str) -> str:
        path = Path(name)
        if not path.is_absolute():
            return name
        return str(path.relative_to(self._project)) if path.is_relative_to(self._project) else path.name

    def moves(self) -> Sequence[Move]:
        committed = open_ledger(self._registry.mlruns).read().committed(self._registry.name)
        return [_move(Promotion.of(entry)) for entry in committed]

    def promote(self, number: int, by: str) -> Moved:
        return self._move(by, "--promote", str(number))

    def roll_back(self, by: str) -> Moved:
        return self._move(by, "--roll-back")

    def _move(self, by: str, *what: str) -> Moved:
        """Let a process of its own do it. Raises MoveRefusedError for what an administrator can correct."""
        command = [sys.executable, "-m", "twinloop.flows.releases", "--project", str(self._project)]
        command += ["--model", self._registry.name, "--who", f"{who()} {by}", *what]
        done = subprocess.run(
            command,
            cwd=self._project,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=MOVED_WITHIN_S,
            start_new_session=True,  # Ctrl-C is for the server: a move that has begun comes to its end
        )
        if done.returncode == 0:
            return Moved.model_validate_json(done.stdout)
        *said, last = done.stderr.strip().splitlines() or [f"exit code {done.returncode}, and not a word"]
        log.warning("%s: %s", " ".join(what), "\n".join([*said, last]))
        if done.returncode == MISTAKE:
            # Over HTTP nobody reads where on this machine the project lies.
            raise MoveRefusedError(last.removeprefix("twinloop: ").replace(f"{self._project}/", ""))
        raise UserError(last)


def _summary(version: Version, snapshot: Snapshot) -> VersionSummary:
    names = [alias for alias in get_args(Alias) if snapshot.aliases.get(alias) == version.version]
    return VersionSummary(
        version=version.version,
        stage=version.stage,
        digest=version.digest,
        servable=version.servable,
        aliases=names,
        gate=VersionStatus.of(version).gate,  # type: ignore[arg-type]  # pydantic checks it
    )


def _gate(registry: Registry, version: Version) -> Gate | None:
    if "gate_digest" not in version.tags:
        return None
    known = {"decision": version.tags["gate_decision"], "when": version.tags["gate_when"]}
    known["digest"] = version.tags["gate_digest"]
    try:
        report = read_gate(registry, version)
    except UserError as error:
        log.warning("%s", error)
        problem = "the report is missing or was changed; run the gate again"
        return Gate.model_validate(known | {"rules": [], "reasons": [], "problem": problem})
    assert report is not None  # it has the tag
    rules = [RuleResult.model_validate(check.model_dump()) for check in report.checks]
    reasons = [GateReason(rule=each.rule, reason=each.reason, owner=each.owner) for each in report.reasons]
    return Gate.model_validate(known | {"rules": rules, "reasons": reasons})


def _move(promotion: Promotion) -> Move:
    fields = asdict(promotion)
    return Move.model_validate({name: fields[name] for name in Move.model_fields})


def smoke_test_for_rollback(project: Path, show: Callable[[str], None]) -> Callable[[Served], None]:
    """The test that a rollback's target must pass, for its own domain. show: takes what it answered."""
    from twinloop.registry.champion import load_served_domain
    from twinloop.registry.smoke_test import smoke_test

    return lambda version: show(str(smoke_test(version.path, load_served_domain(version, project).domain)))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m twinloop.flows.releases")
    parser.add_argument("--project", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--who", required=True)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--promote", type=int, metavar="VERSION")
    what.add_argument("--roll-back", action="store_true")
    arguments = parser.parse_args()
    project = arguments.project.resolve()
    prepare_environment(project)
    registry = Registry.of(project, arguments.model)
    answers: list[str] = []
    if arguments.roll_back:
        done = rollback(registry, arguments.who, smoke_test_for_rollback(project, answers.append))
    else:
        done = promote(registry, arguments.promote, who=arguments.who, manual=True)
    smoke_test = answers[0] if answers else None
    moved = Moved(**dict(_move(done)), smoke_test=smoke_test, finished_later=done.finished_later)
    print(moved.model_dump_json())
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
