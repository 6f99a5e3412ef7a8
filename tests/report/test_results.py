"""What DVC itself shows of the results of a lifecycle."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from stories import measured, stage, story

from twinloop.registry.tracking import code_version
from twinloop.report.results import write_results


def run(project: Path, *command: str) -> str:
    return subprocess.run(command, cwd=project, check=True, capture_output=True, text=True).stdout


def dvc(project: Path, *arguments: str) -> Any:
    return json.loads(run(project, sys.executable, "-m", "dvc", *arguments, "--json"))


def commit(project: Path) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false")
    run(project, "git", "add", "-A")
    run(project, "git", *identity, "commit", "-q", "-m", "state")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with the results of one lifecycle in git."""
    run(tmp_path, "git", "init", "-q")
    run(tmp_path, sys.executable, "-m", "dvc", "init", "-q")
    (tmp_path / "recipe.yaml").write_text("name: returns\n")
    (tmp_path / "dvc.yaml").write_text("stages: {copy: {cmd: cp recipe.yaml made, deps: [recipe.yaml], outs: [made]}}")
    write_results(tmp_path, story())
    commit(tmp_path)
    return tmp_path


def test_metrics_are_shown_and_compared_with_what_was_committed(project: Path) -> None:
    shown = dvc(project, "metrics", "show")[""]["data"]["results/returns/metrics.json"]["data"]
    assert shown["stages"]["dpo"] == {"pass_rate": 0.45, "bits_per_byte": 1.25}
    assert (shown["decision"], shown["kind"], shown["gate"]["memory_gib"]) == ("BLOCK", {"held_out": 0.5}, 0.1)
    assert shown["parity"]["int8/tokens"] == 0.985
    better = (*story().stages[:-2], stage("evaluate", "export", measured=measured(19)), story().stages[-1])
    write_results(project, story(stages=better))
    changed = dvc(project, "metrics", "diff")["results/returns/metrics.json"]
    assert changed["pass_rate"] == {"old": 0.5, "new": 0.95, "diff": pytest.approx(0.45)}


def test_plots_show_each_stages_curves_and_rates(project: Path) -> None:
    shown = dvc(project, "plots", "show")
    assert shown.get("errors", []) == []
    named = {name.partition("::")[2] or name for name in shown["data"]}
    assert {"dpo loss", "dpo margin", "sft loss", "pass rate by stage", "pass rate by predicate", "outcomes"} <= named
    [margin] = [plots for name, plots in shown["data"].items() if name.endswith("dpo margin")]
    assert [row["margin"] for row in margin[0]["content"]["data"]["values"]] == ["0.0", "1.0", "2.0"]


def test_new_results_are_no_change_of_the_code_and_none_that_dvc_repro_makes(project: Path) -> None:
    before = code_version(project)
    assert not before.dirty
    write_results(project, story(stages=(stage("evaluate", measured=measured(1)),)))
    assert run(project, "git", "status", "--porcelain", "results") != ""
    assert code_version(project) == before
    (project / "recipe.yaml").write_text("name: other\n")
    assert code_version(project).dirty
    written = {path: path.stat().st_mtime_ns for path in project.glob("results/**/*")}
    run(project, sys.executable, "-m", "dvc", "repro", "-q")
    assert {path: path.stat().st_mtime_ns for path in project.glob("results/**/*")} == written


def test_the_curves_of_a_stage_that_is_no_more_are_gone(project: Path) -> None:
    write_results(project, story(stages=(stage("evaluate", measured=measured(1)),)))
    assert sorted(path.name for path in (project / "results" / "returns" / "plots").rglob("*.csv")) == [
        "outcomes.csv", "rates_by_kind.csv", "rates_by_predicate.csv", "rates_by_stage.csv",
    ]  # fmt: skip
