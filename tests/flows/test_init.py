"""`twinloop init` writes a project that runs as it is, here and where only the wheel is installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from small_project import PACKAGES, PROJECT, environment, twinloop

from twinloop.common.errors import UserError
from twinloop.common.strict_yaml import parse_yaml
from twinloop.domains.loader import load_domain
from twinloop.evaluation.gate import load_rules
from twinloop.flows.init import KINDS, init_project
from twinloop.tasks.recipe import default_recipe, load_recipe

MINUTES = 60


@pytest.mark.parametrize("domain", KINDS)
def test_it_writes_a_project_whose_parts_fit_together(domain: str, tmp_path: Path) -> None:
    project = tmp_path / "My e-mails"
    assert init_project(project, domain) == "my-e-mails"
    path = default_recipe(project)
    assert path == project / "recipes" / "my-e-mails.yaml"
    recipe = load_recipe(path, project)
    assert recipe.name == "my-e-mails"
    task = load_domain(recipe.domain, project).domain
    assert "define" not in task.description, "what the model is for, not how to change it"
    assert recipe.gate.rules == "recipes/my-e-mails-gate.yaml"
    assert "`" not in task.description, "what the model is for, not how to change the file"
    load_rules(project / recipe.gate.rules, task)
    assert set(recipe.validate_.split_keys) <= {"text", "order_id"}  # what natural data can keep disjoint
    assert task.params is not None
    params = parse_yaml((project / "params.yaml").read_text())["generate"]
    task.params.model_validate(params)
    deployed = parse_yaml((project / "prefect.yaml").read_text())
    assert deployed["name"] == "my-e-mails"
    assert len((project / "README.md").read_text().splitlines()) <= 12
    assert "$" not in (project / "README.md").read_text()
    if file := KINDS[domain].file:
        stages = (project / "dvc.yaml").read_text()
        assert parse_yaml(stages)["stages"]["generate"]["deps"] == [file]
        assert "where the domain imports modules beside it, add each" in stages
    ignored = subprocess.run(
        ["git", "status", "--short", "--untracked-files=all"], cwd=project, capture_output=True, text=True, check=True
    )
    assert "?? .dvc/config" in ignored.stdout
    written = {str(each.relative_to(project)) for each in project.rglob("*") if ".git/" not in f"{each}/"}
    assert {"recipes/my-e-mails-gate.yaml", "dvc.yaml", ".gitignore", ".dvcignore"} <= written


@pytest.mark.parametrize("domain", [name for name, kind in KINDS.items() if kind.file])
def test_the_example_data_is_a_function_of_its_seed(domain: str, tmp_path: Path) -> None:
    init_project(tmp_path / "project", domain)
    task = load_domain(f"./{KINDS[domain].file}", tmp_path / "project").domain
    assert task.params is not None
    params = task.params.model_validate({"training": 30, "held_out": 10})
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        task.generate(params, tmp_path / name)
    files = sorted((tmp_path / "a").iterdir())
    assert [file.read_bytes() for file in files] == [(tmp_path / "b" / file.name).read_bytes() for file in files]
    assert sum(len(file.read_text().splitlines()) for file in files) == 40


def test_a_name_keeps_its_letters_without_their_accents(tmp_path: Path) -> None:
    assert init_project(tmp_path / "Tickëts für uns", "returns") == "tickets-fur-uns"


def test_it_refuses_what_it_would_overwrite_and_what_it_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        init_project(tmp_path, "chat")
    with pytest.raises(UserError, match="not an empty folder"):
        init_project(tmp_path / "notes.txt", "chat")
    with pytest.raises(UserError, match=r"notes.txt/new: cannot be made \(Not a directory\); name another folder"):
        init_project(tmp_path / "notes.txt" / "new", "chat")
    with pytest.raises(UserError, match="choose one of classification, chat, reasoning, returns"):
        init_project(tmp_path / "new", "chess")
    with pytest.raises(UserError, match="gives no name"):
        init_project(tmp_path / "---", "chat")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_command_says_in_one_line_what_it_refuses(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    refused = twinloop(tmp_path, "init", ".")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    made = twinloop(tmp_path, "init", "mails", "--domain", "classification")
    assert made.returncode == 0, made.stderr
    assert "twinloop run" in made.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment in which the wheel is installed, and which sees this one's other packages."""
    folder = tmp_path_factory.mktemp("installed")
    # a copy: the build leaves files beside its source, and would take up what an earlier one left
    source = folder / "source"
    for name in PACKAGES:
        shutil.copytree(PROJECT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PROJECT / "recipes", source / "recipes")
    for name in ("pyproject.toml", "README.md", "params.yaml", "prefect.yaml"):
        shutil.copy(PROJECT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", "."]
    subprocess.run([*build, "./source"], cwd=folder, check=True, timeout=300)
    [wheel] = folder.glob("twinloop-*.whl")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    # the packages alone: a line that begins with `import` would bring the editable installation with it
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--ignore-installed"]
    subprocess.run([*install, "--prefix", str(folder / "venv"), str(wheel)], check=True, timeout=300)
    where = subprocess.run(
        [python, "-c", "import twinloop.common.errors as e; print(e.__file__)"],
        cwd=folder, env=_environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert str(site) in where.stdout
    return folder / "venv" / "bin"


def _environment() -> dict[str, str]:
    """Without a path that would find this repository."""
    return {name: value for name, value in environment().items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "2"}


@pytest.mark.slow
def test_the_wheel_claims_no_name_but_its_own(installed: Path) -> None:
    names = ["models", "tasks", "common", "flows", "records", "domains"]
    script = f"import importlib.util as u; print([n for n in {names} if u.find_spec(n)])"
    found = subprocess.run(
        [installed / "python", "-c", script], cwd="/", env=_environment(), capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("domain", [name for name, kind in KINDS.items() if kind.file])
def test_a_project_made_by_the_wheel_ships_and_answers(domain: str, installed: Path, tmp_path: Path) -> None:
    def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [installed / "python", "-m", "twinloop.flows.cli", *arguments],
            cwd=folder,
            env=_environment() | {"PATH": f"{installed}{os.pathsep}{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=9 * MINUTES,
            check=False,
        )

    made = command(tmp_path, "init", "mine", "--domain", domain)
    assert made.returncode == 0, made.stderr
    run = command(tmp_path / "mine", "run")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "gate: SHIP" in run.stdout
    assert re.search(r"over HTTP", run.stdout)
    status = json.loads(command(tmp_path / "mine", "status", "--json").stdout)
    assert status["champion"]["gate"] == "SHIP"
