"""The data set of this project, and of a project of a user's own, under a real DVC."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import polars as pl
import pytest
import zc.lockfile

from twinloop.common.errors import UserError
from twinloop.common.strict_yaml import parse_yaml
from twinloop.domains.domain import Domain
from twinloop.records.dataset import DataVersion, build_data, check_data, is_current, staleness
from twinloop.records.validation import validate
from twinloop.tasks.recipe import ValidateSettings

PROJECT = Path(__file__).parents[2]
FILES = (".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore", "dvc.yaml", "params.yaml")
LOCKED = ("dvc.lock", "data.dvc", "data_summary.json")
PACKAGES = ("common", "domains", "models", "records")

TICKETS = {
    "tickets.py": """
        import json, random
        from pydantic import BaseModel, ConfigDict, Field
        from twinloop.domains.domain import Domain
        from words import WORDS

        class Params(BaseModel):
            model_config = ConfigDict(extra="forbid")
            seed: int = 1
            documents: int = Field(ge=1)

        class Tickets(Domain):
            params = Params

            def generate(self, params, out):
                rng = random.Random(params.seed)
                for name in ("corpus", "corpus_heldout"):
                    with (out / f"{name}.jsonl").open("w") as file:
                        for _ in range(params.documents):
                            file.write(json.dumps({"text": " ".join(rng.choices(WORDS, k=40))}) + "\\n")
                return {"corpus": params.documents, "corpus_heldout": params.documents}

        domain = Tickets()
    """,
    "words.py": """
        WORDS = [f"word{number}" for number in range(1000)]
    """,
    "count.py": """
        from pathlib import Path

        lines = {path.name: path.read_text().count("\\n") for path in sorted(Path("data").iterdir())}
        Path("counts.json").write_text(repr(lines).replace("'", '"'))
    """,
    "dvc.yaml": """
        stages:
          generate:
            cmd: python -m twinloop.domains.generate ./tickets.py
            deps: [tickets.py, words.py]
            params: [generate]
            outs: [raw]
          count:
            cmd: python count.py
            deps: [data, count.py]
            metrics: [{counts.json: {cache: false}}]
    """,
    "params.yaml": """
        generate: {documents: 30}
    """,
    "data.dvc": """
        deps: [{path: raw}]
        outs: [{path: data}]
    """,
    ".gitignore": """
        /raw
        /data
        /data.aside
        /validated
        __pycache__
    """,
}


def tickets(to: Path, *left_out: str) -> Path:
    """A project of a user's own, as it is written: nothing is built, and DVC and git do not know it."""
    for name, text in TICKETS.items():
        if name not in left_out:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / name).write_text(textwrap.dedent(text).lstrip())
    return to


def clone(to: Path) -> Path:
    """This project as it stands, in a git repository of its own."""
    for name in (*FILES, *LOCKED):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, to / name)
    for name in PACKAGES:
        shutil.copytree(PROJECT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
    git(to, "init", "-q")
    commit(to)
    return to


def git(project: Path, *command: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, *command], cwd=project, check=True, capture_output=True, text=True).stdout


def commit(project: Path) -> None:
    git(project, "add", "-A")
    git(project, "commit", "-q", "-m", "state")


def dvc(project: Path, *command: str) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([sys.executable, "-m", "dvc", *command], cwd=project, env=environment, check=True)


def contents(project: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((project / "data").iterdir())}


def set_params(project: Path, **changes: object) -> None:
    path = project / "params.yaml"
    params = parse_yaml(path.read_text())
    params["generate"] |= changes
    path.write_text(json.dumps(params))


@pytest.fixture(scope="session", autouse=True)
def _own_site_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["DVC_SITE_CACHE_DIR"] = str(tmp_path_factory.mktemp("dvc-site"))


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's project in a git repository, its data built and committed."""
    project = tickets(tmp_path_factory.mktemp("built"))
    git(project, "init", "-q")
    build_data(project)
    commit(project)
    return project


@pytest.fixture
def project(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "project")


def test_a_fresh_clone_rebuilds_the_committed_data_bit_for_bit_and_leaves_git_clean(tmp_path: Path) -> None:
    fresh = clone(tmp_path)
    version = build_data(fresh)
    assert git(fresh, "status", "--porcelain") == ""
    assert version.md5 == parse_yaml((PROJECT / "data.dvc").read_text())["outs"][0]["md5"]


def test_dvc_repro_alone_does_the_same(project: Path) -> None:
    before = contents(project)
    for name in ("data", "raw", ".dvc/cache"):
        shutil.rmtree(project / name)
    dvc(project, "repro", "-q")
    assert contents(project) == before
    assert git(project, "status", "--porcelain") == ""
    assert is_current(project)


def test_data_that_is_current_is_recognised_at_once_and_without_dvc(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twinloop.records.dataset._dvc", lambda *_: pytest.fail("DVC was started"))
    started = time.perf_counter()
    version = build_data(project)
    assert time.perf_counter() - started < 1
    assert version == check_data(project)
    assert version.path == project / "data"


def test_a_changed_setting_makes_a_new_version(project: Path) -> None:
    before = check_data(project)
    set_params(project, seed=2)
    assert staleness(project) == "older than `generate` in params.yaml"
    after = build_data(project)
    assert after.md5 != before.md5
    assert "data.dvc" in git(project, "status", "--porcelain")


def test_changed_code_of_the_generator_is_noticed_and_equal_data_stay_the_same_version(project: Path) -> None:
    before = check_data(project)
    with (project / "words.py").open("a") as file:
        file.write("# a remark\n")
    assert staleness(project) == "older than words.py"
    assert build_data(project).md5 == before.md5
    assert is_current(project)


def flip_a_byte(path: Path) -> None:
    """As a failing disk does it: the times of the file stay what they were."""
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda p: flip_a_byte(p / "data/corpus.jsonl"), "changed since it was made"),
        (lambda p: (p / "data/corpus_heldout.jsonl").unlink(), "changed since it was made"),
        (lambda p: (p / "data/more.jsonl").write_text("{}\n"), "changed since it was made"),
        (lambda p: shutil.rmtree(p / "data"), "missing"),
        (lambda p: (p / "counts.json").unlink(), "without its counts.json"),
        (lambda p: (p / "dvc.lock").unlink(), "without dvc.lock"),
    ],
    ids=["flipped byte", "file gone", "file too many", "folder gone", "summary gone", "lock gone"],
)
def test_damage_is_noticed_and_repaired(project: Path, damage, told: str) -> None:
    before = contents(project)
    damage(project)
    assert staleness(project) == told
    with pytest.raises(UserError, match=f"{told}; `twinloop data build`"):
        check_data(project)
    build_data(project)
    assert contents(project) == before
    assert git(project, "status", "--porcelain") == ""


def test_what_only_lay_in_generated_data_is_moved_aside_and_not_lost(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = contents(project)
    for name in ("corpus.jsonl", "more/notes.txt"):
        (project / "data" / name).parent.mkdir(exist_ok=True)
        (project / "data" / name).write_text("a week of somebody's work\n")
    build_data(project)
    assert contents(project) == before
    [aside] = (project / "data.aside").iterdir()
    for name in ("corpus.jsonl", "more/notes.txt"):
        assert (aside / name).read_text() == "a week of somebody's work\n"
    [warning] = caplog.messages
    assert "corpus.jsonl, more/notes.txt" in warning
    assert str(aside.relative_to(project)) in warning
    assert "dvc add data" in warning
    assert git(project, "status", "--porcelain") == ""


def test_generated_data_of_another_version_is_replaced_without_a_word(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = contents(project)
    set_params(project, seed=2)
    build_data(project)
    git(project, "checkout", "-q", "--", ".")  # data/ is still the other version's; DVC's cache has it
    build_data(project)
    assert contents(project) == before
    assert not (project / "data.aside").exists()
    assert caplog.messages == []


def to_parquet(project: Path) -> None:
    for path in (project / "data").glob("*.jsonl"):
        pl.read_ndjson(path, infer_schema_length=None).write_parquet(path.with_suffix(".parquet"))
        path.unlink()


def as_the_users_own(project: Path, *, fresh: bool) -> DataVersion:
    """Make what lies in data/ the version; `fresh`: with a data.dvc that never was an import."""
    if fresh:
        (project / "data.dvc").unlink()
    dvc(project, "add", "-q", "data")
    return build_data(project)


@pytest.mark.parametrize("fresh", [False, True], ids=["over the import", "instead of it"])
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_users_own_data_is_the_version_and_is_never_built_over(project: Path, form: str, fresh: bool) -> None:
    generated = check_data(project)
    (project / "data" / "corpus.jsonl").write_text('{"text": "our own words."}\n')
    if form == "parquet":
        to_parquet(project)
    mine = contents(project)
    version = as_the_users_own(project, fresh=fresh)
    assert version.md5 != generated.md5
    report = validate(version.path, project / "validated", ValidateSettings(), Domain(), {"corpus"})
    assert report.files["corpus"].kept == 1

    set_params(project, seed=2)  # the generator's, which makes this data no longer
    assert build_data(project) == check_data(project) == version

    flip_a_byte(project / "data" / f"corpus.{form}")
    changed = contents(project)
    for refuse in (build_data, check_data):
        with pytest.raises(
            UserError, match=r"data: changed.*`dvc add data`.*`rm -r data && dvc checkout data`"
        ) as raised:
            refuse(project)
        assert "\n" not in str(raised.value)
    assert contents(project) == changed
    shutil.rmtree(project / "data")
    dvc(project, "checkout", "-q", "data")
    assert contents(project) == mine
    assert build_data(project) == version

    shutil.rmtree(project / "data")
    with pytest.raises(UserError, match=r"data: missing.*`dvc pull data`"):
        build_data(project)


def test_without_data_dvc_nothing_is_built_over_what_lies_there(project: Path) -> None:
    (project / "data.dvc").unlink()
    before = contents(project)
    with pytest.raises(UserError, match=r"data\.dvc: no such file; `git checkout data\.dvc`.*`dvc add data`"):
        build_data(project)
    assert contents(project) == before


def test_a_spoilt_cache_is_not_believed(project: Path) -> None:
    """DVC alone would restore the spoilt files, and call them up to date."""
    before = contents(project)
    for path in (project / ".dvc/cache/files/md5").rglob("*"):
        if path.is_file() and path.suffix != ".dir":
            flip_a_byte(path)
    for name in ("data", "raw"):
        shutil.rmtree(project / name)
    build_data(project)
    assert contents(project) == before


@pytest.mark.parametrize(
    "left_behind",
    ["{", '{"write": {"raw": {"pid": 99999999, "cmd": "dvc repro"}}}'],
    ids=["cut off", "dead process"],
)
def test_lock_files_of_killed_processes_stop_nothing(project: Path, left_behind: str) -> None:
    shutil.rmtree(project / "data")
    (project / ".dvc/tmp/rwlock").write_text(left_behind)
    build_data(project)
    assert is_current(project)


def test_a_build_waits_for_another_dvc_command(project: Path) -> None:
    shutil.rmtree(project / "data")
    held = zc.lockfile.LockFile(str(project / ".dvc/tmp/lock"))
    threading.Timer(4.0, held.close).start()  # DVC itself gives up after 3 s
    build_data(project)
    assert is_current(project)


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
    assert is_current(project)


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
    ("changes", "told"),
    [
        ({"documents": 0}, "generate.documents: input should be greater than or equal to 1"),
        ({"documents": "many"}, "generate.documents: input should be a valid integer"),
        ({"dokuments": 3}, "generate.dokuments: extra inputs are not permitted"),
    ],
)
def test_a_wrong_setting_is_told_in_one_line(project: Path, changes: dict[str, object], told: str) -> None:
    set_params(project, **changes)
    with pytest.raises(UserError, match=told) as raised:
        build_data(project)
    assert "\n" not in str(raised.value)


def test_a_generator_that_fails_is_told_in_one_line(project: Path) -> None:
    path = project / "tickets.py"
    path.write_text(path.read_text().replace("rng = ", "raise RuntimeError('the shop is closed')\n        rng = "))
    with pytest.raises(UserError, match="RuntimeError: the shop is closed") as raised:
        build_data(project)
    assert "\n" not in str(raised.value)
    assert "Traceback" in (project / ".dvc/tmp/repro.log").read_text()


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
    assert is_current(project)


def test_a_project_whose_stages_do_not_read_data_is_built(tmp_path: Path) -> None:
    """`dvc repro` alone would make raw/ and leave data/ out."""
    project = tickets(tmp_path)
    stages = parse_yaml((project / "dvc.yaml").read_text())
    del stages["stages"]["count"]
    (project / "dvc.yaml").write_text(json.dumps(stages))
    build_data(project)
    assert is_current(project)
    set_params(project, seed=2)
    assert build_data(project) == check_data(project)


@pytest.mark.parametrize("with_git", [False, True])
def test_files_of_a_project_without_a_stage_become_the_version(with_git: bool, tmp_path: Path) -> None:
    project = tickets(tmp_path, "dvc.yaml", "data.dvc")
    if with_git:
        git(project, "init", "-q")
    (project / "data").mkdir()
    (project / "data/corpus.jsonl").write_text('{"text": "our own words."}\n')
    mine = contents(project)
    with pytest.raises(UserError, match=r"data\.dvc: no such file; .*`dvc add data`"):
        check_data(project)
    version = build_data(project)
    assert contents(project) == mine
    assert build_data(project) == check_data(project) == version


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
        local = {Path(f).resolve().relative_to(PROJECT).as_posix() for f in loaded.stdout.splitlines() if is_ours(f)}
        assert {name for name in local if not name.endswith("__init__.py")} <= set(stages[stage]["deps"])


def is_ours(file: str) -> bool:
    return bool(file) and any(Path(file).resolve().is_relative_to(PROJECT / package) for package in PACKAGES)
