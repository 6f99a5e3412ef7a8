"""Mistakes of the command's user: one line, exit code 2, before anything has run."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_project import RECIPE, make_project, twinloop, write_recipe


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "recipes/nothing.yaml"], "recipes/nothing.yaml: no such file"),
        (["run", "recipes/lenient.yaml"], "golden_pass_rate: unknown key"),
        (["runn"], "No such command 'runn'"),
        (["serve", "--port", "99999"], "--port"),
        (["serve", "--port", "http"], "--port"),
        (["serve"], "no champion"),
        (["decide", "--order-id", "A10234"], "--reason"),
        (["decide", "--order-id", "10234", "--reason", "damaged", "--days", "1"], "--order-id '10234'"),
        (["decide", "--order-id", "A10234", "--reason", "damaged", "--days", "-1"], "--days -1"),
        (["promote", "seven"], "'version': Input should be a valid integer"),
        (["promote", "7"], "no version 7"),
        (["rollback"], "nothing to roll back to"),
        (["policies", "put", "seven", "within 7 days"], "P-"),
        (["policies", "put", "P-7", "whenever you like"], "within N days"),
        (["data", "check"], "twinloop data build"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(project: Path, arguments: list[str], said: str) -> None:
    done = twinloop(project, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_outside_a_project_it_says_where_to_go(tmp_path: Path) -> None:
    done = twinloop(tmp_path, "status")
    assert done.returncode == 2
    assert "not inside a Twinloop project" in done.stderr


def test_without_a_model_status_says_none(project: Path) -> None:
    done = twinloop(project, "status")
    assert done.returncode == 0
    assert "champion   none" in done.stdout


def test_plan_needs_no_data(project: Path) -> None:
    write_recipe(project)
    done = twinloop(project, "plan", "recipes/small.yaml")
    assert done.returncode == 0, done.stderr
    for stage in ("pretrain", "sft", "dpo", "grpo", "fp32", "int8"):
        assert stage in done.stdout
    assert str(RECIPE["name"]) in done.stdout


def test_data_is_built_and_then_checked(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    built = twinloop(project, "data", "build")
    assert built.returncode == 0, built.stderr
    checked = twinloop(project, "data", "check")
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout == built.stdout.rstrip("\n") + ", as data.dvc says\n"


def test_gate_says_that_there_is_nothing_to_judge_before_it_builds_data(project: Path) -> None:
    write_recipe(project)
    done = twinloop(project, "gate", "recipes/small.yaml")
    assert done.returncode == 2
    assert "no candidate and no champion to judge" in done.stderr
    assert not (project / "data").exists()
