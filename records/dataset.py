"""The data set and its version: `dvc repro`, and a check that is quick enough to run before every pipeline.

DVC owns the data: dvc.yaml defines how it is made, data.dvc which version belongs to this commit. What it has recorded
is read by DVC itself (`records.dvc_project`), in 0.4 s for 30 MB, every byte hashed.

Data is generated where, by data.dvc, data/ is a copy of a folder that a stage makes, or where a stage makes data/
itself; that is built again whenever it is not as it should be. Anything else (`dvc add data`, an import) is the user's
own: it is checked, and never touched. Files that a project without a stage has in data/ become its version at the first
build. Nor is a file lost that somebody put among generated data: what DVC could not give back is moved to data.aside/.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from twinloop.common.errors import UserError
from twinloop.common.files import write_whole
from twinloop.domains import generate
from twinloop.records import DATA_DIR, DATA_FILE
from twinloop.records.dvc_project import PIPELINE, DvcProject, open_project

log = logging.getLogger(__name__)

ASIDE = "data.aside"
GENERATED_DIR = "raw"
IMPORT = b"deps:\n- path: raw\nouts:\n- path: data\n"
"""data.dvc of generated data before it is first built: data/ becomes a copy of raw/."""
BUSY = re.compile(r"is busy|Unable to acquire lock", re.IGNORECASE)
BROKEN_LOCK_FILE = re.compile(r"RWLock-file .* (is corrupted|format error)|JSON structure is corrupted", re.IGNORECASE)


@dataclass(frozen=True)
class DataVersion:
    """Which data a run reads. `md5` is DVC's digest of the whole folder, as recorded in data.dvc."""

    md5: str
    path: Path


def check_data(project: Path) -> DataVersion:
    """The version of the data in `project`, every file of it hashed.

    Raises UserError where the data is missing or does not match data.dvc, dvc.lock, the parameters and the code.
    """
    with open_project(project) as dvc:
        if (problem := dvc.problem()) is None:
            return _version(dvc)
        remedy = "`twinloop data build` makes it anew" if _is_generated(dvc) else _own_remedy(dvc, problem)
    raise UserError(f"{project / DATA_DIR}: {problem}; {remedy}")


def current_version(project: Path) -> DataVersion | None:
    """The version that is there and needs no build, every file hashed; None: `build_data` has something to do, or to
    report. No DVC command is started."""
    try:
        with open_project(project) as dvc:
            return _version(dvc) if dvc.problem() is None else None
    except UserError:
        return None


def staleness(project: Path) -> str | None:
    """Why the data is not the project's version, in a few words; None when it is."""
    try:
        with open_project(project) as dvc:
            return dvc.problem()
    except UserError as error:
        return str(error)


def build_data(project: Path, *, wait_s: float = 600.0) -> DataVersion:
    """Bring data/ to the version of params.yaml and the generator's code, by `dvc repro`.

    Where no stage makes data and there is no data.dvc, what is in data/ becomes the version, by `dvc add`. A project
    that is no DVC repository becomes one, with or without git.

    Two builds at once wait for each other, at most `wait_s`, and so does one for a DVC command that someone else runs.
    What a killed build left behind is cleared away. Raises UserError when it cannot be built, and for a user's own data
    that does not match data.dvc: that is left as it is.
    """
    if version := current_version(project):
        return version
    if not (project / PIPELINE).is_file() and not (project / DATA_FILE).is_file() and not _files_of(project):
        raise UserError(f"{project}: no dvc.yaml here; name the folder that has one, in a recipe by its setting `data`")
    with open_project(project) as dvc:
        own = _is_new(dvc)
        if not own and not _is_generated(dvc):
            return check_data(project)
        if not own:
            _check_params(dvc)
        unbuilt = _is_unbuilt(dvc)
    if unbuilt:
        write_whole(project / DATA_FILE, IMPORT)
    _make_repository(project)
    tmp = _repository(project) / "tmp"
    tmp.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_s
    try:
        with FileLock(tmp / "twinloop-data.lock", timeout=wait_s):
            if version := current_version(project):
                return version
            if own:
                _run(project, deadline, "add", DATA_DIR)
                return check_data(project)
            # `dvc repro` alone leaves data.dvc out where no stage reads data/
            repro = ("repro", *(name for name in (PIPELINE, DATA_FILE) if (project / name).is_file()))
            with open_project(project) as dvc:
                _move_foreign_files(dvc)
            _run(project, deadline, *repro)
            if staleness(project):
                # DVC believes in its cache; where a cached file is corrupt, only making it again helps
                with open_project(project) as dvc:
                    _drop_corrupt_cache(dvc)
                _run(project, deadline, *repro, "--force")
                if problem := staleness(project):
                    raise UserError(f"{project / DATA_DIR}: still {problem}; does its code change meanwhile?")
    except Timeout:
        raise UserError(f"{project / DATA_DIR}: another build holds it; try again when it has ended") from None
    return check_data(project)


def _version(dvc: DvcProject) -> DataVersion:
    assert dvc.version is not None, "only data that was built has a version"
    return DataVersion(dvc.version, dvc.project / DATA_DIR)


def _files_of(project: Path) -> bool:
    return any(path.is_file() for path in (project / DATA_DIR).rglob("*"))


def _is_unbuilt(dvc: DvcProject) -> bool:
    """Whether a stage makes the data, and nothing was made or put there yet.

    Such a project has no data.dvc: `dvc add` over one without a digest makes a version that DVC restores as a file
    (3.67).
    """
    generates = str(dvc.project / GENERATED_DIR) in dvc.outputs
    return dvc.data is None and not (dvc.project / DATA_FILE).exists() and generates and not _files_of(dvc.project)


def _is_new(dvc: DvcProject) -> bool:
    """Whether data/ holds a user's own files, of which no version was made yet."""
    return not (dvc.project / DATA_FILE).exists() and not dvc.outputs and _files_of(dvc.project)


def _is_generated(dvc: DvcProject) -> bool:
    """Raises UserError where neither data.dvc nor a stage names data/."""
    if dvc.data is not None:
        return dvc.source is not None
    if _is_unbuilt(dvc):
        return True
    path = dvc.project / DATA_FILE
    if path.is_file():
        raise UserError(f"{path}: has no output {DATA_DIR}; `git checkout data.dvc`, or `dvc add data`")
    raise UserError(
        f"{path}: no such file, so {DATA_DIR}/ has no version; `dvc add data` makes what lies there your own, "
        f"and where git has a {DATA_FILE}, `git checkout {DATA_FILE}` goes back to that"
    )


def _own_remedy(dvc: DvcProject, problem: str) -> str:
    if problem == "missing":
        return "it is your own: `dvc checkout data` gives it back from DVC's cache, `dvc pull data` from your remote"
    if corrupt := dvc.corrupted_through_links():
        names = ", ".join(sorted(path.name for path in corrupt))
        return (
            f"it is your own, and {names} was edited through a link into DVC's cache, which no longer has what it was: "
            "`dvc add data` makes the edit the version; only your remote or a backup has the other"
        )
    # DVC trusts times of modification: over a byte that a disk changed, `checkout` alone would do nothing
    return "it is your own: `dvc add data` makes it the version, `rm -r data && dvc checkout data` goes back"


def _check_params(dvc: DvcProject) -> None:
    """Report a mistake in the domain or in params.yaml in one line, before DVC wraps it in fifty."""
    for stage in dvc.stages:
        for command in [stage.cmd] if isinstance(stage.cmd, str) else stage.cmd:
            # any other command is the user's own program, with settings of its own
            if arguments := generate.arguments_of(command):
                generate.check(arguments, dvc.project)


def _make_repository(project: Path) -> None:
    """Make the project a DVC repository where it is none. Without git above it, DVC works without git."""
    in_git = any((folder / ".git").exists() for folder in (project, *project.parents))
    config = _repository(project) / "config"
    if not config.is_file():
        below = [] if (project / ".git").exists() else ["--subdir"]
        command = ["init", "-q", *(below if in_git else ["--no-scm"])]
    elif not in_git and "no_scm" not in config.read_text(encoding="utf-8"):
        command = ["config", "--local", "core.no_scm", "true"]
    else:
        return
    done = _dvc(project, *command)
    if done.returncode:
        raise UserError(f"{project}: no DVC repository, and `dvc init` fails: {' '.join(done.stdout.split())}")


def _repository(project: Path) -> Path:
    """DVC's own folder: that of the repository that the project is in, or is."""
    folders = (folder / ".dvc" for folder in (project, *project.parents))
    return next((folder for folder in folders if (folder / "config").is_file()), project / ".dvc")


def _run(project: Path, deadline: float, *command: str) -> None:
    """Run DVC until it is neither busy nor stopped by a lock file that a killed process left half-written."""
    pause_s = 0.2
    while True:
        done = _dvc(project, *command)
        if done.returncode == 0:
            return
        if BROKEN_LOCK_FILE.search(done.stdout):
            (_repository(project) / "tmp" / "rwlock").unlink(missing_ok=True)
        elif not BUSY.search(done.stdout):
            raise UserError(_explain(project, done.stdout))
        if time.monotonic() > deadline:
            raise UserError(f"{project}: another DVC command keeps the data busy; try again when it has ended")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 2.0)


def _dvc(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a DVC command. Its stderr is in `stdout` too."""
    bin_dir = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": os.pathsep.join([bin_dir, os.environ.get("PATH", os.defpath)])}
    return subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=project,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )


def _explain(project: Path, output: str) -> str:
    """One line out of what DVC printed when it failed; all of it is kept beside DVC's own temporary files."""
    log = _repository(project) / "tmp" / "repro.log"
    log.write_text(output, encoding="utf-8")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    before = next((lines[i - 1] for i, line in enumerate(lines) if line.startswith("ERROR: ") and i), "")
    why = f"{before} ({errors[0]})" if errors and "failed to" in errors[0] and before else "".join(errors[:1])
    return f"the data cannot be built: {why or 'DVC failed'}; its whole output is in {log}"


def _move_foreign_files(dvc: DvcProject) -> None:
    """Move each file of data/ that DVC could not give back to a folder of its own: it may be somebody's work."""
    corrupt, foreign = dvc.corrupted_through_links(), dvc.foreign_files()
    if not foreign:
        return
    data = dvc.project / DATA_DIR
    aside = dvc.project / ASIDE / f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%S.%f}"
    for path in foreign:
        place = aside / path.relative_to(data)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or path.stat().st_nlink > 1:  # a link would show what DVC puts in its place
            shutil.copyfile(path, place)
            path.unlink()
        else:
            shutil.move(path, place)
    names = ", ".join(sorted(path.relative_to(data).as_posix() for path in foreign))
    log.warning(
        "%s/ is generated, and %s differed from what was made: moved to %s; if it is your own data, put it back and "
        "run `dvc add data`",
        *(DATA_DIR, names, aside.relative_to(dvc.project)),
    )
    for path, kept in corrupt.items():
        log.warning("%s was edited through a link, and so in DVC's cache too: it is made anew there", path.name)
        kept.unlink(missing_ok=True)


def _drop_corrupt_cache(dvc: DvcProject) -> None:
    """Take away data/, what it is a copy of, and each cached file whose content does not match its name."""
    for name in (str(dvc.project / DATA_DIR), dvc.source):
        if name:
            shutil.rmtree(name, ignore_errors=True)
    for path in dvc.corrupt_cache_files():
        path.unlink()
