"""Commands about releases: what is served, checked, promoted, rolled back, and what a recipe would take."""

from __future__ import annotations

from pathlib import Path

from tasks.registry import Registry
from tasks.tracking import Mlruns


def show_status(project: Path, model: str, *, as_json: bool) -> int:
    from tasks.status import status

    found = status(Registry(Mlruns(project / "mlruns"), model))
    print(found.to_json() if as_json else found.to_text())
    return 0


def promote_version(project: Path, model: str, version: int) -> int:
    from tasks.promote import promote
    from tasks.register import who

    done = promote(Registry(Mlruns(project / "mlruns"), model), version, who=who())
    print(f"{model} version {done.to_version} is the champion (gate report {done.gate_digest})")
    return 0


def roll_back(project: Path, model: str) -> int:
    from tasks.champion import prove_answers
    from tasks.promote import rollback
    from tasks.register import who

    done = rollback(Registry(Mlruns(project / "mlruns"), model), who(), prove_answers)
    print(f"{model} version {done.to_version} is the champion again, after version {done.from_version}")
    return 0
