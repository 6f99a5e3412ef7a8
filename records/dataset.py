"""The data set and its version: `dvc repro`, and a check that is quick enough to run before every pipeline.

DVC owns the data: dvc.yaml says how it is made, data.dvc which version this commit stands for. Asking DVC whether
anything changed costs 0.6 s, and it trusts times of modification; here each file is hashed, which takes 0.1 s for
30 MB, and also finds the byte that changed behind DVC's back.

Data is generated where data.dvc says that data/ is a copy of a folder that a stage makes, and that is built again
whenever it is not as it should be. Anything else (`dvc add data`, an import) is the user's own: it is checked, and
never touched. Nor is a file lost that somebody put among generated data: what DVC could not give back is moved aside.
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

import yaml
from filelock import FileLock, Timeout
from pydantic import ValidationError

from twinloop.common.errors import UserError

log = logging.getLogger(__name__)

DATA_DIR = "data"
ASIDE = "data.aside"
GENERATOR = "twinloop.domains.returns.generator"
BUSY = re.compile(r"is busy|Unable to acquire lock", re.IGNORECASE)
UNREADABLE = (yaml.YAMLError, KeyError, TypeError, IndexError, AttributeError, UnicodeDecodeError)
BROKEN_LOCK_FILE = re.compile(r"RWLock-file .* (is corrupted|format error)|JSON structure is corrupted", re.IGNORECASE)


@dataclass(frozen=True)
class DataVersion:
    """Which data a run reads. `md5` is DVC's digest of the whole folder, as it stands in data.dvc."""

    md5: str
    path: Path


def check_data(project: Path) -> DataVersion:
    """The version of the data in `project`, every file of it hashed.

    Raises UserError where the data is missing or is not what data.dvc, dvc.lock, params.yaml and the code say.
    """
    if problem := staleness(project):
        remedy = "`twinloop data build` makes it anew" if _is_generated(project) else _own_remedy(problem)
        raise UserError(f"{project / DATA_DIR}: {problem}; {remedy}")
    return _version(project)


def is_current(project: Path) -> bool:
    """Whether `build_data` would find nothing to do. 0.1 s for 30 MB; DVC is not started."""
    return staleness(project) is None


def build_data(project: Path, *, wait_s: float = 600.0) -> DataVersion:
    """Bring data/ to the version that params.yaml and the generator's code stand for, by `dvc repro`.

    Two builds at once wait for each other, at most `wait_s`, and so does one for a DVC command that someone else runs.
    What a killed build left behind is cleared away. Raises UserError when it cannot be built, and for a user's own data
    that is not what data.dvc says: that is left as it is.
    """
    if is_current(project):
        return _version(project)
    if not (project / "dvc.yaml").is_file():
        raise UserError(f"{project}: no dvc.yaml here; run this in the project's folder, or name it")
    if not _is_generated(project):
        return check_data(project)
    _check_params(project)
    tmp = project / ".dvc" / "tmp"
    tmp.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_s
    try:
        with FileLock(tmp / "twinloop-data.lock", timeout=wait_s):
            if is_current(project):
                return _version(project)
            cache = _cache_dir(project)
            _set_aside(project, cache)
            _repro(project, deadline)
            if staleness(project):
                # DVC believes in its cache; where a cached file is spoilt, only making it again helps
                _drop_spoilt(project, cache)
                _repro(project, deadline, "--force")
                if problem := staleness(project):
                    raise UserError(f"{project / DATA_DIR}: still {problem}; does its code change meanwhile?")
    except Timeout:
        raise UserError(f"{project / DATA_DIR}: another build holds it; try again when it has ended") from None
    return _version(project)


def staleness(project: Path) -> str | None:
    """Why the data is not what the project says, in a few words; None when it is."""
    try:
        recorded, digests = _recorded(project), _Digests(project)
        if recorded.source and (problem := _outdated(project, recorded, digests)):
            return problem
        if digests.of(DATA_DIR) != recorded.md5:
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
    """What data.dvc says. `source` is the generated folder that data/ is a copy of; None for a user's own data."""

    md5: str
    source: str | None


def _recorded(project: Path) -> _Recorded:
    content = _yaml(project / "data.dvc")
    md5: str = content["outs"][0]["md5"]
    source: dict[str, Any] = (content.get("deps") or [{}])[0]
    # `dvc add` over an import leaves its `deps` where they were (3.67): a copy has the digest of what it copies
    copied = source.get("md5") == md5 and source["path"] in _made_by_stages(project)
    return _Recorded(md5, source["path"] if copied else None)


def _made_by_stages(project: Path) -> set[str]:
    if not (project / "dvc.yaml").is_file():
        return set()
    outs = [out for stage in _yaml(project / "dvc.yaml")["stages"].values() for out in stage.get("outs", [])]
    return {out if isinstance(out, str) else next(iter(out)) for out in outs}


def _is_generated(project: Path) -> bool:
    """Raises UserError where data.dvc does not say."""
    path = project / "data.dvc"
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
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def _version(project: Path) -> DataVersion:
    return DataVersion(md5=_recorded(project).md5, path=project / DATA_DIR)


def _check_params(project: Path) -> None:
    """Tell a mistake in params.yaml in one line, before DVC wraps it in fifty."""
    if GENERATOR not in (project / "dvc.yaml").read_text(encoding="utf-8"):
        return  # the user's own program fills the folder, with settings of its own
    from twinloop.domains.returns.generator import GeneratorParams  # only where there is something to build

    path = project / "params.yaml"
    try:
        GeneratorParams(**_yaml(path)["generate"])
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(["generate", *map(str, problem["loc"])])
        raise UserError(f"{path}: {key}: {problem['msg'][0].lower()}{problem['msg'][1:]}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; it holds the settings of the data set") from None
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a mapping with a section `generate` ({' '.join(str(error).split())})") from None


def _repro(project: Path, deadline: float, *options: str) -> None:
    """Run `dvc repro` until it is neither busy nor stopped by a lock file that a killed process left half-written."""
    pause_s = 0.2
    while True:
        done = _dvc(project, "repro", *options)
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
    """Run a DVC command. What it says on stderr is in `stdout` too."""
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
    """One line out of what a failed `dvc repro` printed; all of it is kept beside DVC's own temporary files."""
    log = project / ".dvc" / "tmp" / "repro.log"
    log.write_text(output, encoding="utf-8")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    before = next((lines[i - 1] for i, line in enumerate(lines) if line.startswith("ERROR: ") and i), "")
    told = f"{before} ({errors[0]})" if errors and "failed to" in errors[0] and before else "".join(errors[:1])
    return f"the data cannot be built: {told or 'dvc repro failed'}; all that it said is in {log}"


def _cache_dir(project: Path) -> Path:
    """Where DVC keeps files by their md5: a team may share one cache."""
    told = _dvc(project, "cache", "dir")
    folder = told.stdout.strip() if told.returncode == 0 else ""
    return (project / (folder or ".dvc/cache")) / "files" / "md5"


def _set_aside(project: Path, cache: Path) -> None:
    """Move each file of data/ that DVC could not give back to a folder of its own: it may be somebody's work."""
    data, digests = project / DATA_DIR, _Digests(project)
    if digests.of(DATA_DIR) in (None, _recorded(project).md5):
        return
    foreign = [path for path in data.rglob("*") if path.is_file() and not _is_kept(_md5(path), cache)]
    if not foreign:
        return
    aside = project / ASIDE / f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%S.%f}"
    for path in foreign:
        place = aside / path.relative_to(data)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, place)
    names = ", ".join(sorted(path.relative_to(data).as_posix() for path in foreign))
    log.warning(
        "%s/ is generated, and %s differed from what was made: moved to %s; if it is your own data, put it back and "
        "run `dvc add data`",
        *(DATA_DIR, names, aside.relative_to(project)),
    )


def _is_kept(md5: str, cache: Path) -> bool:
    kept = cache / md5[:2] / md5[2:]
    return kept.is_file() and _md5(kept) == md5


def _drop_spoilt(project: Path, cache: Path) -> None:
    """Take away data/, raw/ and each cached file whose content is not what its name says."""
    for name in (DATA_DIR, "raw"):
        shutil.rmtree(project / name, ignore_errors=True)
    for path in _cached(cache):
        if _md5(path) != path.parent.name + path.name.removesuffix(".dir"):
            path.unlink()


def _cached(root: Path) -> Iterator[Path]:
    for folder in root.glob("??"):
        yield from (path for path in folder.iterdir() if path.is_file())
