"""The data set and its version: `dvc repro`, and a check that is quick enough to run before every pipeline.

DVC owns the data: dvc.yaml says how it is made, data.dvc which version this commit stands for. Asking DVC whether
anything changed costs 0.6 s, and it trusts times of modification; here each file is hashed, which takes 0.1 s for
30 MB, and also finds the byte that changed behind DVC's back.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from pydantic import ValidationError

from models.errors import UserError

DATA_DIR = "data"
BUSY = re.compile(r"is busy|Unable to acquire lock", re.IGNORECASE)
BROKEN_LOCK_FILE = re.compile(r"RWLock-file .* (is corrupted|format error)|JSON structure is corrupted", re.IGNORECASE)


@dataclass(frozen=True)
class DataVersion:
    """Which data a run reads. `md5` is DVC's digest of the whole folder, as it stands in data.dvc."""

    md5: str
    path: Path
    commit: str | None
    """Git commit that is checked out; `+changes` follows it where files differ from it. None outside git."""


def check_data(project: Path) -> DataVersion:
    """The version of the data in `project`, every file of it hashed.

    Raises UserError where the data is missing or is not what data.dvc, dvc.lock, params.yaml and the code say.
    """
    if problem := staleness(project):
        raise UserError(f"{project / DATA_DIR}: {problem}; `twinloop data build` makes it anew")
    return _version(project)


def is_current(project: Path) -> bool:
    """Whether `build_data` would find nothing to do. 0.1 s for 30 MB; DVC is not started."""
    return staleness(project) is None


def build_data(project: Path, *, wait_s: float = 600.0) -> DataVersion:
    """Bring data/ to the version that params.yaml and the generator's code stand for, by `dvc repro`.

    Two builds at once wait for each other, at most `wait_s`, and so does one for a DVC command that someone else runs.
    What a killed build left behind is cleared away. Raises UserError when it cannot be built.
    """
    if is_current(project):
        return _version(project)
    if not (project / "dvc.yaml").is_file():
        raise UserError(f"{project}: no dvc.yaml here; run this in the project's folder, or name it")
    _check_params(project / "params.yaml")
    tmp = project / ".dvc" / "tmp"
    tmp.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_s
    try:
        with FileLock(tmp / "twinloop-data.lock", timeout=wait_s):
            if is_current(project):
                return _version(project)
            _repro(project, deadline)
            if staleness(project):
                # DVC believes in its cache; where a cached file is spoilt, only making it again helps
                _drop_spoilt(project)
                _repro(project, deadline, "--force")
                if problem := staleness(project):
                    raise UserError(f"{project / DATA_DIR}: still {problem}; does its code change meanwhile?")
    except Timeout:
        raise UserError(f"{project / DATA_DIR}: another build holds it; try again when it has ended") from None
    return _version(project)


def staleness(project: Path) -> str | None:
    """Why the data is not what the project says, in a few words; None when it is."""
    try:
        stages = _yaml(project / "dvc.yaml")["stages"]
        locked_stages = _yaml(project / "dvc.lock")["stages"]
        imported = _yaml(project / "data.dvc")
        source, version = imported["deps"][0], imported["outs"][0]
        digests = _Digests(project)
        made: dict[str, str] = {}
        for name, stage in stages.items():
            locked = locked_stages.get(name)
            if locked is None or locked["cmd"] != stage["cmd"]:
                return f"older than stage {name} of dvc.yaml"
            recorded = {dep["path"]: dep["md5"] for dep in locked.get("deps", [])}
            if set(recorded) != set(stage.get("deps", [])):
                return f"older than stage {name} of dvc.yaml"
            for path, md5 in recorded.items():
                if path != version["path"] and digests.of(path) != md5:
                    return f"older than {path}"
            for key in stage.get("params", []):
                if _yaml(project / "params.yaml").get(key) != locked["params"]["params.yaml"].get(key):
                    return f"older than `{key}` in params.yaml"
            made |= {out["path"]: out["md5"] for out in locked["outs"]}
        if made.get(source["path"]) != source["md5"] or source["md5"] != version["md5"]:
            return "older than dvc.lock"
        if digests.of(version["path"]) != version["md5"]:
            return "missing" if not (project / version["path"]).is_dir() else "changed since it was made"
        for path, md5 in made.items():
            if path != source["path"] and digests.of(path) != md5:
                return f"without its {path}"
    except FileNotFoundError as error:
        return f"without {Path(error.filename).name}"
    except (yaml.YAMLError, KeyError, TypeError, IndexError, AttributeError, UnicodeDecodeError):
        return "described by a dvc.yaml, dvc.lock, data.dvc or params.yaml that cannot be read"
    return None


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
    md5 = _yaml(project / "data.dvc")["outs"][0]["md5"]
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+changes"]
    try:
        told = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=30, check=False)
        commit = told.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    return DataVersion(md5=md5, path=project / DATA_DIR, commit=commit)


def _check_params(path: Path) -> None:
    """Tell a mistake in params.yaml in one line, before DVC wraps it in fifty."""
    from domains.returns.generator import GeneratorParams  # only where there is something to build

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
    bin_dir = str(Path(sys.executable).parent)
    environment = os.environ | {
        "DVC_NO_ANALYTICS": "1",
        "PATH": os.pathsep.join([bin_dir, os.environ.get("PATH", os.defpath)]),
    }
    pause_s = 0.2
    while True:
        done = subprocess.run(
            [sys.executable, "-m", "dvc", "repro", *options],
            cwd=project,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
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


def _explain(project: Path, output: str) -> str:
    """One line out of what a failed `dvc repro` printed; all of it is kept beside DVC's own temporary files."""
    log = project / ".dvc" / "tmp" / "repro.log"
    log.write_text(output, encoding="utf-8")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    before = next((lines[i - 1] for i, line in enumerate(lines) if line.startswith("ERROR: ") and i), "")
    told = f"{before} ({errors[0]})" if errors and "failed to" in errors[0] and before else "".join(errors[:1])
    return f"the data cannot be built: {told or 'dvc repro failed'}; all that it said is in {log}"


def _drop_spoilt(project: Path) -> None:
    """Take away data/, raw/ and each cached file whose content is not what its name says."""
    for name in (DATA_DIR, "raw"):
        shutil.rmtree(project / name, ignore_errors=True)
    for path in _cached(project / ".dvc" / "cache" / "files" / "md5"):
        if _md5(path) != path.parent.name + path.name.removesuffix(".dir"):
            path.unlink()


def _cached(root: Path) -> Iterator[Path]:
    for folder in root.glob("??"):
        yield from (path for path in folder.iterdir() if path.is_file())
