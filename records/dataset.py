"""The data set and its version: `dvc repro`, and a check that is quick enough to run before every pipeline.

DVC owns the data: dvc.yaml defines how it is made, data.dvc which version belongs to this commit. Asking DVC whether
anything changed costs 0.6 s, and it trusts times of modification; here each file is hashed, which takes 0.1 s for
30 MB, and also finds the byte that changed behind DVC's back.

Data is generated where, by data.dvc, data/ is a copy of a folder that a stage makes, and that is built again
whenever it is not as it should be. Anything else (`dvc add data`, an import) is the user's own: it is checked, and
never touched. Files that a project without a stage has in data/ become its version at the first build. Nor is a file
lost that somebody put among generated data: what DVC could not give back is moved to data.aside/.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from twinloop.common.errors import UserError
from twinloop.common.files import write_whole
from twinloop.common.strict_yaml import NotYAMLError, parse_yaml
from twinloop.domains import generate

log = logging.getLogger(__name__)

DATA_DIR = "data"
ASIDE = "data.aside"
GENERATED_DIR = "raw"
IMPORT = b"deps:\n- path: raw\nouts:\n- path: data\n"
"""data.dvc of generated data before it is first built: data/ becomes a copy of raw/."""
REPRO = ("repro", "dvc.yaml", "data.dvc")
"""`dvc repro` alone leaves data.dvc out where no stage reads data/."""
BUSY = re.compile(r"is busy|Unable to acquire lock", re.IGNORECASE)
UNREADABLE = (NotYAMLError, KeyError, TypeError, IndexError, AttributeError, UnicodeDecodeError)
BROKEN_LOCK_FILE = re.compile(r"RWLock-file .* (is corrupted|format error)|JSON structure is corrupted", re.IGNORECASE)


@dataclass(frozen=True)
class DataVersion:
    """Which data a run reads. `md5` is DVC's digest of the whole folder, as recorded in data.dvc."""

    md5: str
    path: Path


def check_data(project: Path) -> DataVersion:
    """The version of the data in `project`, every file of it hashed.

    Raises UserError where the data is missing or does not match data.dvc, dvc.lock, params.yaml and the code.
    """
    if problem := staleness(project):
        remedy = "`twinloop data build` makes it anew" if _is_generated(project) else _own_remedy(problem)
        raise UserError(f"{project / DATA_DIR}: {problem}; {remedy}")
    return _version(project)


def is_current(project: Path) -> bool:
    """Whether `build_data` would find nothing to do. 0.1 s for 30 MB; DVC is not started."""
    return staleness(project) is None


def build_data(project: Path, *, wait_s: float = 600.0) -> DataVersion:
    """Bring data/ to the version of params.yaml and the generator's code, by `dvc repro`.

    Where no stage makes data and there is no data.dvc, what is in data/ becomes the version, by `dvc add`. A project
    that is no DVC repository becomes one, with or without git.

    Two builds at once wait for each other, at most `wait_s`, and so does one for a DVC command that someone else runs.
    What a killed build left behind is cleared away. Raises UserError when it cannot be built, and for a user's own data
    that does not match data.dvc: that is left as it is.
    """
    if is_current(project):
        return _version(project)
    if _is_unbuilt(project):
        write_whole(project / "data.dvc", IMPORT)
    own = _is_new(project)
    if not own and not (project / "dvc.yaml").is_file() and not (project / "data.dvc").is_file():
        raise UserError(f"{project}: no dvc.yaml here; run this in the project's folder, or name it")
    if not own and not _is_generated(project):
        return check_data(project)
    if not own:
        _check_params(project)
    _make_repository(project)
    tmp = project / ".dvc" / "tmp"
    tmp.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_s
    try:
        with FileLock(tmp / "twinloop-data.lock", timeout=wait_s):
            if is_current(project):
                return _version(project)
            if own:
                _run(project, deadline, "add", DATA_DIR)
                return _version(project)
            cache = _cache_dir(project)
            _move_foreign_files(project, cache)
            _run(project, deadline, *REPRO)
            if staleness(project):
                # DVC believes in its cache; where a cached file is spoilt, only making it again helps
                _drop_spoilt(project, cache)
                _run(project, deadline, *REPRO, "--force")
                if problem := staleness(project):
                    raise UserError(f"{project / DATA_DIR}: still {problem}; does its code change meanwhile?")
    except Timeout:
        raise UserError(f"{project / DATA_DIR}: another build holds it; try again when it has ended") from None
    return _version(project)


def staleness(project: Path) -> str | None:
    """Why the data is not the project's version, in a few words; None when it is."""
    try:
        recorded, digests = _recorded(project), _Digests(project)
        if recorded.source and (problem := _outdated(project, recorded, digests)):
            return problem
        if recorded.md5 is None or digests.of(DATA_DIR) != recorded.md5:
            return "missing" if not (project / DATA_DIR).is_dir() else "changed since it was made"
        if not recorded.source:
            return None
        for stage in _yaml(project / "dvc.lock")["stages"].values():
            for out in stage["outs"]:
                if out["path"] != recorded.source and digests.of(out["path"]) != out["md5"]:
                    return f"without its {out['path']}"
    except FileNotFoundError as error:
        return f"without {Path(error.filename).name}"
    except UNREADABLE:
        return "described by a dvc.yaml, dvc.lock, data.dvc or params.yaml that cannot be read"
    return None


@dataclass(frozen=True)
class _Recorded:
    """What data.dvc records. `source` is the generated folder that data/ is a copy of; None for a user's own data.

    Generated data that was never built has no md5.
    """

    md5: str | None
    source: str | None


def _recorded(project: Path) -> _Recorded:
    content = _yaml(project / "data.dvc")
    source: dict[str, Any] = (content.get("deps") or [{}])[0]
    # `dvc add` over an import leaves its `deps` where they were (3.67): a copy has the digest of what it copies
    copied = source.get("path") in _made_by_stages(project) and source.get("md5") == content["outs"][0].get("md5")
    return _Recorded(source.get("md5"), source["path"]) if copied else _Recorded(content["outs"][0]["md5"], None)


def _made_by_stages(project: Path) -> set[str]:
    if not (project / "dvc.yaml").is_file():
        return set()
    outs = [out for stage in _yaml(project / "dvc.yaml")["stages"].values() for out in stage.get("outs", [])]
    return {out if isinstance(out, str) else next(iter(out)) for out in outs}


def _is_unbuilt(project: Path) -> bool:
    """Whether a stage makes the data, and nothing was made or put there yet.

    Such a project has no data.dvc: `dvc add` over one without a digest makes a version that DVC restores as a file
    (3.67).
    """
    if (project / "data.dvc").exists() or any(path.is_file() for path in (project / DATA_DIR).rglob("*")):
        return False
    try:
        return GENERATED_DIR in _made_by_stages(project)
    except UNREADABLE:
        return False


def _is_generated(project: Path) -> bool:
    """Raises UserError where data.dvc does not name it."""
    path = project / "data.dvc"
    if _is_unbuilt(project):
        return True
    try:
        return _recorded(project).source is not None
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; `git checkout data.dvc` gives the generated data, and `dvc add data` makes what "
            f"lies in {DATA_DIR}/ your own"
        ) from None
    except UNREADABLE:
        raise UserError(f"{path}: not a DVC file with one output; `git checkout data.dvc`, or `dvc add data`") from None


def _own_remedy(problem: str) -> str:
    if problem == "missing":
        return "it is your own: `dvc checkout data` gives it back from DVC's cache, `dvc pull data` from your remote"
    # DVC trusts times of modification: over a byte that a disk changed, `checkout` alone would do nothing
    return "it is your own: `dvc add data` makes it the version, `rm -r data && dvc checkout data` goes back"


def _outdated(project: Path, recorded: _Recorded, digests: _Digests) -> str | None:
    """Which setting, code or stage has changed since generated data was made, in a few words."""
    locked_stages = _yaml(project / "dvc.lock")["stages"]
    made: dict[str, str] = {}
    for name, stage in _yaml(project / "dvc.yaml")["stages"].items():
        locked = locked_stages.get(name)
        if locked is None or locked["cmd"] != stage["cmd"]:
            return f"older than stage {name} of dvc.yaml"
        deps = {dep["path"]: dep["md5"] for dep in locked.get("deps", [])}
        if set(deps) != set(stage.get("deps", [])):
            return f"older than stage {name} of dvc.yaml"
        for path, md5 in deps.items():
            if path != DATA_DIR and digests.of(path) != md5:
                return f"older than {path}"
        for key in stage.get("params", []):
            if _yaml(project / "params.yaml").get(key) != locked["params"]["params.yaml"].get(key):
                return f"older than `{key}` in params.yaml"
        made |= {out["path"]: out["md5"] for out in locked["outs"]}
    return None if made.get(recorded.source or "") == recorded.md5 else "older than dvc.lock"


class _Digests:
    """md5 of files and folders as DVC 3 writes them."""

    def __init__(self, project: Path):
        self.project = project

    def of(self, path: str) -> str | None:
        """None where there is nothing."""
        place = self.project / path
        if place.is_dir():
            return f"{hashlib.md5(_listing(place), usedforsecurity=False).hexdigest()}.dir"
        return _md5(place) if place.is_file() else None


def _listing(folder: Path) -> bytes:
    """What DVC hashes for a folder: the md5 of each file, in the order of their paths."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    with ThreadPoolExecutor(4) as pool:
        hashed = dict(zip(files, pool.map(_md5, files.values()), strict=True))
    return json.dumps([{"md5": hashed[name], "relpath": name} for name in sorted(hashed)], sort_keys=True).encode()


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _yaml(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = parse_yaml(path.read_text(encoding="utf-8"))
    return content


def _version(project: Path) -> DataVersion:
    md5 = _recorded(project).md5
    assert md5 is not None, "only data that was built has a version"
    return DataVersion(md5, project / DATA_DIR)


def _check_params(project: Path) -> None:
    """Report a mistake in the domain or in params.yaml in one line, before DVC wraps it in fifty."""
    for stage in _yaml(project / "dvc.yaml")["stages"].values():
        # any other command is the user's own program, with settings of its own
        if isinstance(stage["cmd"], str) and (arguments := generate.arguments_of(stage["cmd"])):
            generate.check(arguments, project)


def _make_repository(project: Path) -> None:
    """Make the project a DVC repository where it is none. Without git above it, DVC works without git."""
    in_git = any((folder / ".git").exists() for folder in (project, *project.parents))
    if not (project / ".dvc" / "config").is_file():
        below = [] if (project / ".git").exists() else ["--subdir"]
        command = ["init", "-q", *(below if in_git else ["--no-scm"])]
    elif not in_git and "no_scm" not in (project / ".dvc" / "config").read_text(encoding="utf-8"):
        command = ["config", "--local", "core.no_scm", "true"]
    else:
        return
    done = _dvc(project, *command)
    if done.returncode:
        raise UserError(f"{project}: no DVC repository, and `dvc init` fails: {' '.join(done.stdout.split())}")


def _is_new(project: Path) -> bool:
    """Whether data/ holds a user's own files, of which no version was made yet."""
    if (project / "data.dvc").exists() or not any(path.is_file() for path in (project / DATA_DIR).rglob("*")):
        return False
    try:
        return not _made_by_stages(project)
    except UNREADABLE:
        return False


def _run(project: Path, deadline: float, *command: str) -> None:
    """Run DVC until it is neither busy nor stopped by a lock file that a killed process left half-written."""
    pause_s = 0.2
    while True:
        done = _dvc(project, *command)
        if done.returncode == 0:
            return
        if BROKEN_LOCK_FILE.search(done.stdout):
            (project / ".dvc" / "tmp" / "rwlock").unlink(missing_ok=True)
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
    log = project / ".dvc" / "tmp" / "repro.log"
    log.write_text(output, encoding="utf-8")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    before = next((lines[i - 1] for i, line in enumerate(lines) if line.startswith("ERROR: ") and i), "")
    why = f"{before} ({errors[0]})" if errors and "failed to" in errors[0] and before else "".join(errors[:1])
    return f"the data cannot be built: {why or 'DVC failed'}; its whole output is in {log}"


def _cache_dir(project: Path) -> Path:
    """Where DVC keeps files by their md5: a team may share one cache."""
    found = _dvc(project, "cache", "dir")
    folder = found.stdout.strip() if found.returncode == 0 else ""
    return (project / (folder or ".dvc/cache")) / "files" / "md5"


def _move_foreign_files(project: Path, cache: Path) -> None:
    """Move each file of data/ that DVC could not give back to a folder of its own: it may be somebody's work."""
    data, digests = project / DATA_DIR, _Digests(project)
    if digests.of(DATA_DIR) in (None, _recorded(project).md5):
        return
    foreign = [path for path in data.rglob("*") if path.is_file() and not _is_kept(_md5(path), cache)]
    if not foreign:
        return
    kept = project / ASIDE / f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%S.%f}"
    for path in foreign:
        place = kept / path.relative_to(data)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, place)
    names = ", ".join(sorted(path.relative_to(data).as_posix() for path in foreign))
    log.warning(
        "%s/ is generated, and %s differed from what was made: moved to %s; if it is your own data, put it back and "
        "run `dvc add data`",
        *(DATA_DIR, names, kept.relative_to(project)),
    )


def _is_kept(md5: str, cache: Path) -> bool:
    kept = cache / md5[:2] / md5[2:]
    return kept.is_file() and _md5(kept) == md5


def _drop_spoilt(project: Path, cache: Path) -> None:
    """Take away data/, raw/ and each cached file whose content does not match its name."""
    for name in (DATA_DIR, "raw"):
        shutil.rmtree(project / name, ignore_errors=True)
    for path in _cached(cache):
        if _md5(path) != path.parent.name + path.name.removesuffix(".dir"):
            path.unlink()


def _cached(root: Path) -> Iterator[Path]:
    for folder in root.glob("??"):
        yield from (path for path in folder.iterdir() if path.is_file())
