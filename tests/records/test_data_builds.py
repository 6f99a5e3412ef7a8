"""Builds of a data set: interrupted, at the same time, with wrong settings, and the first one of a project."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import zc.lockfile
from projects import PACKAGES, PROJECT, contents, dvc, git, set_params, tickets

from twinloop.common.errors import UserError
from twinloop.common.strict_yaml import parse_yaml
from twinloop.records.dataset import build_data, check_data, current_version


@pytest.mark.parametrize(
    "left_behind",
    ["{", '{"write": {"raw": {"pid": 99999999, "cmd": "dvc repro"}}}'],
    ids=["cut off", "dead process"],
)
def test_lock_files_of_killed_processes_stop_nothing(project: Path, left_behind: str) -> None:
    shutil.rmtree(project / "data")
    (project / ".dvc/tmp/rwlock").write_text(left_behind)
    build_data(project)
    assert current_version(project)


def test_a_build_waits_for_another_dvc_command(project: Path) -> None:
    shutil.rmtree(project / "data")
    held = zc.lockfile.LockFile(str(project / ".dvc/tmp/lock"))
    threading.Timer(4.0, held.close).start()  # DVC itself gives up after 3 s
    build_data(project)
    assert current_version(project)


def test_a_build_gives_up_on_a_dvc_command_that_does_not_end(project: Path) -> None:
    shutil.rmtree(project / "data")
    held = zc.lockfile.LockFile(str(project / ".dvc/tmp/lock"))
    try:
        with pytest.raises(UserError, match="another DVC command keeps the data busy"):
            build_data(project, wait_s=1)
    finally:
        held.close()


def start_build(project: Path) -> subprocess.Popen[bytes]:
    code = (
        "import sys; from pathlib import Path; from twinloop.records.dataset import build_data\n"
        "build_data(Path(sys.argv[1]))"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(project)], cwd=project, start_new_session=True)


def test_two_builds_at_once_both_succeed(project: Path) -> None:
    shutil.rmtree(project / "data")
    builds = [start_build(project) for _ in range(2)]
    assert [build.wait(120) for build in builds] == [0, 0]
    assert current_version(project)


@pytest.mark.parametrize("sign", ["raw", "data", pytest.param(".dvc/cache/files", marks=pytest.mark.slow)])
def test_a_killed_build_is_taken_up(project: Path, sign: str) -> None:
    before = contents(project)
    for name in ("data", "raw", ".dvc/cache"):
        shutil.rmtree(project / name)
    build = start_build(project)
    while not (project / sign).exists():
        assert build.poll() is None, "over before it could be killed"
        time.sleep(0.001)
    os.killpg(build.pid, signal.SIGKILL)
    assert build.wait() == -signal.SIGKILL
    build_data(project)
    assert contents(project) == before
    assert git(project, "status", "--porcelain") == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"documents": 0}, "generate.documents: input should be greater than or equal to 1"),
        ({"documents": "many"}, "generate.documents: input should be a valid integer"),
        ({"dokuments": 3}, "generate.dokuments: extra inputs are not permitted"),
    ],
)
def test_a_wrong_setting_is_reported_in_one_line(project: Path, changes: dict[str, object], message: str) -> None:
    set_params(project, **changes)
    with pytest.raises(UserError, match=message) as raised:
        build_data(project)
    assert "\n" not in str(raised.value)


def test_a_generator_that_fails_is_reported_in_one_line(project: Path) -> None:
    path = project / "tickets.py"
    path.write_text(path.read_text().replace("rng = ", "raise RuntimeError('the shop is closed')\n        rng = "))
    with pytest.raises(UserError, match="RuntimeError: the shop is closed") as raised:
        build_data(project)
    assert "\n" not in str(raised.value)
    assert "Traceback" in (project / ".dvc/tmp/repro.log").read_text()


def test_what_a_generator_says_itself_is_reported_as_it_is(project: Path) -> None:
    path = project / "tickets.py"
    said = "from twinloop.common.errors import UserError\n        raise UserError('the shop: closed')\n        rng = "
    path.write_text(path.read_text().replace("rng = ", said))
    with pytest.raises(UserError, match="error: the shop: closed ") as raised:
        build_data(project)
    assert "UserError" not in str(raised.value)
    assert "Traceback" not in (project / ".dvc/tmp/repro.log").read_text()


@pytest.mark.parametrize(
    "broken", ["raise RuntimeError('closed')", "domain = None", "def"], ids=["fails", "none", "syntax"]
)
def test_a_domain_that_cannot_be_loaded_is_reported_before_anything_runs(broken: str, tmp_path: Path) -> None:
    tickets(tmp_path)
    (tmp_path / "tickets.py").write_text(broken)
    with pytest.raises(UserError, match=r"domain: \./tickets\.py") as raised:
        build_data(tmp_path)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / ".dvc").exists()


def test_a_stage_that_generates_for_a_domain_without_a_generator_is_reported(tmp_path: Path) -> None:
    tickets(tmp_path)
    source = "from twinloop.domains.domain import Domain\ndomain = Domain()\n"
    (tmp_path / "tickets.py").write_text(source)
    with pytest.raises(UserError, match=r"\./tickets\.py has no `generate`"):
        build_data(tmp_path)


@pytest.mark.parametrize("known_to", ["nobody", "git", "git above", "dvc"])
def test_a_project_that_was_never_built_is_built(known_to: str, tmp_path: Path) -> None:
    project = tickets(tmp_path / "project")
    if known_to.startswith("git"):
        git(tmp_path if known_to == "git above" else project, "init", "-q")
    if known_to == "dvc":
        (project / ".dvc").mkdir()
        (project / ".dvc/config").write_text("[core]\n    analytics = false\n")
    version = build_data(project)
    assert sorted(contents(project)) == ["corpus.jsonl", "corpus_heldout.jsonl"]
    assert check_data(project) == version
    assert current_version(project)


def test_a_project_whose_stages_do_not_read_data_is_built(tmp_path: Path) -> None:
    """`dvc repro` alone would make raw/ and leave data/ out."""
    project = tickets(tmp_path)
    stages = parse_yaml((project / "dvc.yaml").read_text())
    del stages["stages"]["count"]
    (project / "dvc.yaml").write_text(json.dumps(stages))
    build_data(project)
    assert current_version(project)
    set_params(project, seed=2)
    assert build_data(project) == check_data(project)


@pytest.mark.parametrize("with_git", [False, True])
def test_files_of_a_project_without_a_stage_become_the_version(with_git: bool, tmp_path: Path) -> None:
    project = tickets(tmp_path, "dvc.yaml")
    if with_git:
        git(project, "init", "-q")
    (project / "data").mkdir()
    (project / "data/corpus.jsonl").write_text('{"text": "our own words."}\n')
    mine = contents(project)
    with pytest.raises(UserError, match=r"data\.dvc: no such file, so data/ has no version; `dvc add data`"):
        check_data(project)
    version = build_data(project)
    assert contents(project) == mine
    assert build_data(project) == check_data(project) == version


def test_own_files_of_a_new_project_are_restored_by_dvc_as_a_folder(tmp_path: Path) -> None:
    project = tickets(tmp_path)  # with a stage that would make data, of which nothing was made
    git(project, "init", "-q")
    (project / "data").mkdir()
    (project / "data/corpus.jsonl").write_text('{"text": "our own words."}\n')
    dvc(project, "init", "-q")
    dvc(project, "add", "-q", "data")
    shutil.rmtree(project / "data")
    dvc(project, "checkout", "-q", "data")
    assert (project / "data/corpus.jsonl").read_text() == '{"text": "our own words."}\n'
    assert build_data(project) == check_data(project)
    assert (project / "data/corpus.jsonl").read_text() == '{"text": "our own words."}\n'


def test_outside_a_project_there_is_nothing_to_build(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no dvc\.yaml here"):
        build_data(tmp_path)
    assert not list(tmp_path.iterdir())


def test_dvc_knows_every_file_that_makes_the_data() -> None:
    stages = parse_yaml((PROJECT / "dvc.yaml").read_text())["stages"]
    for stage, module in {
        "generate": "twinloop.domains.generate, twinloop.domains.returns",
        "summarise": "twinloop.domains.returns.summary",
    }.items():
        code = f"import sys, {module}\nfor m in [*sys.modules.values()]: print(getattr(m, '__file__', None) or '')"
        loaded = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
        local = {Path(f).relative_to(PROJECT).as_posix() for f in loaded.stdout.splitlines() if is_ours(f)}
        assert {name for name in local if not name.endswith("__init__.py")} <= set(stages[stage]["deps"])


def is_ours(file: str) -> bool:
    return bool(file) and any(Path(file).is_relative_to(PROJECT / package) for package in PACKAGES)


def test_a_folder_of_the_project_can_hold_a_data_set_of_its_own(project: Path) -> None:
    """With settings and a version of its own, in the project's DVC repository."""
    before = current_version(project)
    more = project / "datasets" / "more"
    more.mkdir(parents=True)
    shutil.copy(project / "words.py", more)
    shutil.copy(project / "tickets.py", more)
    (more / "params.yaml").write_text("generate: {documents: 3}")
    (more / "dvc.yaml").write_text(
        "stages:\n  generate:\n    cmd: python -m twinloop.domains.generate ./tickets.py\n"
        "    deps: [tickets.py, words.py]\n    params: [generate]\n    outs: [raw]\n"
    )
    made = build_data(more)
    assert made.path == more / "data"
    assert len((made.path / "corpus.jsonl").read_text().splitlines()) == 3
    assert check_data(more) == current_version(more) == made
    assert not (more / ".dvc").exists()
    assert current_version(project) == before
    set_params(more, documents=4)
    assert current_version(more) is None
    assert current_version(project) == before
