"""Mistakes of the command's user: one line, exit code 2, before anything has run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from small_project import RECIPE, make_ready_project, twinloop, write_recipe

from twinloop.flows.keys import project_keys


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ready_project(tmp_path_factory.mktemp("project"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "recipes/nothing.yaml"], "recipes/nothing.yaml: no such file"),
        (["run", "recipes/lenient.yaml"], "golden_pass_rate: unknown key"),
        (["runn"], "No such command 'runn'"),
        (["serve", "--port", "99999"], "--port"),
        (["serve", "--port", "http"], "--port"),
        (["serve", "--deadline", "0"], "--deadline"),
        (["serve", "--workers", "0"], "--workers"),
        (["keys", "create", "a b"], "'a b': not a name for a key"),
        (["keys", "create", "shop", "--requests", "0"], "--requests"),
        (["keys", "revoke", "shop"], "shop: no such key; there are: none"),
        (["serve"], "no champion"),
        (["decide", "--json", "{}"], "no champion"),
        (["promote", "seven"], "'version': Input should be a valid integer"),
        (["promote", "7"], "no version 7"),
        (["plan", "--budget", "soon"], "budget: 'soon': give time (2h, 90min), FLOPs (3e15) or tokens (5M)"),
        (["plan", "--run-tokens", "2M"], "plan: --run-tokens is for the small runs of --budget; name a budget too"),
        (["plan", "--budget", "2h", "--run-tokens", "2h"], "run-tokens: '2h': give a number of tokens"),
        (["parity", "champion"], "no champion"),
        (["parity", "champion", "--model", "nope"], "nope: no recipe in "),
        (["rollback"], "nothing to roll back to"),
        (["export", "7", "--to", "onnx", "out"], "'onnx' is not one of huggingface, gguf, genai, peft"),
        (["documents", "put", "seven", "within 7 days", "--model", "small"], "document 'seven': the id must be P-"),
        (["documents", "put", "P-7", "whenever you like", "--model", "small"], "within N days"),
        (
            ["documents", "put", "P-7", "within 7 days", "--model", "nothing"],
            "nothing: no such model; there are: small",
        ),
        (["status", "--model", "nope"], "nope: no such model; there are: small"),
        (["rollback", "--model", "nope"], "nope: no such model; there are: small"),
        (["documents", "history", "P-9", "--model", "small"], "document 'P-9': is not there"),
        (["data", "check"], "twinloop data build"),
        (["data", "schema", "chats"], "chats: domain returns has no such record type; did you mean chat?"),
        (["data", "schema", "--domain", "chess"], "chess"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(project: Path, arguments: list[str], said: str) -> None:
    done = twinloop(project, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_documents_are_put_listed_and_kept(project: Path) -> None:
    for days in (30, 7):
        text = f"damaged items reported within {days} days are eligible."
        put = twinloop(project, "documents", "put", "P-7", text, "--model", "small")
        assert put.returncode == 0, put.stderr
    assert "P-7      v2    damaged items reported within 7" in twinloop(project, *LIST).stdout
    history = twinloop(project, "documents", "history", "P-7", "--model", "small").stdout.splitlines()
    assert [line.split()[0] for line in history] == ["v1", "v2"]
    assert [path.name for path in (project / "state" / "documents").iterdir()] == ["small.db"]


def test_keys_are_made_listed_and_revoked(tmp_path: Path) -> None:
    project = make_ready_project(tmp_path)
    assert "whoever reaches a server may ask it" in twinloop(project, "keys", "list").stderr
    made = twinloop(project, "keys", "create", "shop", "--requests", "60", "--tokens", "20000")
    assert made.returncode == 0, made.stderr
    (key,) = made.stdout.splitlines()
    assert "answer nobody without a key" in made.stderr
    assert project_keys(project).find(key.encode()).name == "shop"
    listed = twinloop(project, "keys", "list")
    assert listed.stdout.startswith("shop ")
    assert listed.stdout.endswith("  60 requests, 20000 tokens a minute\n")
    assert key not in listed.stdout + (project / "state" / "api_keys.json").read_text()
    assert "nobody but the administrator's token may ask now" in twinloop(project, "keys", "revoke", "shop").stdout
    assert project_keys(project).find(key.encode()) is None
    assert "nobody may ask" in twinloop(project, "keys", "list").stderr


LIST = ("documents", "list", "--model", "small")


def test_outside_a_project_it_says_where_to_go(tmp_path: Path) -> None:
    done = twinloop(tmp_path, "status")
    assert done.returncode == 2
    assert "not inside a Twinloop project" in done.stderr
    assert "or name a domain, such as --domain returns" in twinloop(tmp_path, "data", "schema").stderr


def test_without_a_model_status_says_none(project: Path) -> None:
    done = twinloop(project, "status")
    assert done.returncode == 0
    assert "champion   none" in done.stdout


@pytest.mark.slow
def test_plan_builds_the_data_and_takes_a_few_steps_of_each_stage(project: Path) -> None:
    write_recipe(project)
    done = twinloop(project, "plan", "recipes/small.yaml")
    assert done.returncode == 0, done.stderr
    for stage in ("pretrain", "sft", "dpo", "grpo", "fp32", "int8"):
        assert stage in done.stdout
    assert str(RECIPE["name"]) in done.stdout
    assert (project / "data").is_dir()


def test_the_forms_of_the_data_are_shown_with_a_whole_row(project: Path, tmp_path: Path) -> None:
    own = twinloop(project, "data", "schema", "preferences")
    assert own.returncode == 0, own.stderr
    assert own.stdout.startswith("preferences: Two answers to a prompt, of which the first is better.\n")
    assert "facts.policy.window_days" in own.stdout
    row = json.loads(next(line for line in own.stdout.splitlines() if line.startswith("{")))
    assert '\nconversational: {"chosen": [{"role": "user", ' in own.stdout
    assert row["prompt"][0]["content"].startswith("customer: hello")
    outside = twinloop(tmp_path, "data", "schema", "--domain", "classification")
    assert outside.returncode == 0, outside.stderr
    assert "label  text  yes     one of billing, delivery, technical, account" in outside.stdout
    assert "Made from classification_heldout where there is no file of it." in outside.stdout


def test_data_is_built_and_then_checked(tmp_path: Path) -> None:
    project = make_ready_project(tmp_path)
    built = twinloop(project, "data", "build")
    assert built.returncode == 0, built.stderr
    checked = twinloop(project, "data", "check")
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout == built.stdout.rstrip("\n") + ", as in data.dvc\n"


def test_gate_says_that_there_is_nothing_to_judge_before_it_builds_data(tmp_path: Path) -> None:
    project = make_ready_project(tmp_path)  # `plan` builds the data of the one that the other tests share
    done = twinloop(project, "gate", "recipes/small.yaml")
    assert done.returncode == 2
    assert "no candidate and no champion to judge" in done.stderr
    assert not (project / "data").exists()


def test_the_version_is_that_of_the_package_and_of_its_checkout(project: Path) -> None:
    from importlib.metadata import version

    done = twinloop(project, "--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"twinloop {version('twinloop')}")


def test_the_commit_of_a_checkout_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from twinloop.flows import version

    project = make_ready_project(tmp_path)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=project, capture_output=True, text=True, check=True
    ).stdout.strip()
    monkeypatch.setattr(version, "__file__", str(project / "flows" / "version.py"))
    assert version.version_text().endswith(f"(commit {commit})")
    (project / "params.yaml").write_text("{}")
    assert version.version_text().endswith(f"(commit {commit}, with uncommitted changes)")
