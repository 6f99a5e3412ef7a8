"""What DVC knows of a project's data: asked of DVC itself, in this process, because its rules are not ours to copy.

Opening a project takes 0.2 s, and importing DVC 0.15 s once. DVC trusts times of modification; here each file is
hashed anew, so that a byte that changed behind DVC's back is found too. No lock of DVC is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvc_data.hashfile.state import StateNoop

from twinloop.common.errors import UserError, one_line
from twinloop.records import DATA_DIR, DATA_FILE

if TYPE_CHECKING:
    from dvc.output import Output
    from dvc.repo import Repo
    from dvc.stage import PipelineStage
    from dvc_data.hashfile.hash_info import HashInfo

PIPELINE, LOCK = "dvc.yaml", "dvc.lock"
DVC = ("dvc", "dvc_data", "dvc_objects")


@contextmanager
def open_project(project: Path) -> Iterator[DvcProject]:
    """The project as DVC reads it now, also where it is no DVC repository yet.

    Raises UserError, from here and from within the block, with DVC's reason for what it cannot read.
    """
    from dvc.repo import Repo

    logging.getLogger("dvc.progress").setLevel(logging.CRITICAL)  # no bars beside our display
    # Without a repository DVC has no cache, and asks it nevertheless where it would be.
    cache = {} if _is_repository(project) else {"cache": {"dir": str(project / ".dvc" / "cache")}}
    try:
        with Repo(str(project), uninitialized=True, config=cache) as repo:
            yield DvcProject(repo, project)
    except Exception as error:  # those of its parts have no base class in common
        if type(error).__module__.partition(".")[0] not in DVC:
            raise
        raise UserError(f"{project}: DVC cannot read it: {_reason(error)}") from error


class DvcProject:
    """data/, what makes it, and whether both are as DVC has recorded them."""

    def __init__(self, repo: Repo, project: Path):
        from dvc.cachemgr import CacheManager

        repo.state.close()
        repo.state = _HashedOnce()
        repo.cache = CacheManager(repo)  # it has kept the state
        self.repo = repo
        self.project = project
        self.stages: list[PipelineStage] = self._load(PIPELINE)
        """Of dvc.yaml: those of `foreach` and `matrix` one by one."""
        made = [out for stage in (*self._load(DATA_FILE), *self.stages) for out in stage.outs]
        self.data: Output | None = next((out for out in made if out.fs_path == str(project / DATA_DIR)), None)

    @property
    def version(self) -> str | None:
        """DVC's digest of data/ as it is recorded; None where nothing is."""
        return (self.data.hash_info.value or None) if self.data else None

    @property
    def source(self) -> str | None:
        """The path of the output of a stage that data/ is, or is a copy of; None for a user's own data."""
        if self.data is None or self.data.stage in self.stages:
            return self.data.fs_path if self.data else None
        stage = self.data.stage
        if not stage.is_import or stage.frozen:
            return None
        copied = stage.deps[0]
        # `dvc add` over an import leaves its `deps` where they were (3.67): a copy has the digest of what it copies.
        same = copied.hash_info == self.data.hash_info
        return str(copied.fs_path) if same and copied.fs_path in self.outputs else None

    @property
    def outputs(self) -> dict[str, Output]:
        """What the stages of dvc.yaml make, by path."""
        return {out.fs_path: out for stage in self.stages for out in stage.outs}

    def problem(self) -> str | None:
        """Why data/ is not as recorded, or, where stages make it, older than what it is made from; None when it is.

        All stages of dvc.yaml count then, also those that read data/.
        """
        try:
            return self._problem()
        except FileNotFoundError as error:
            return f"without {Path(str(error.filename or error)).name}"

    def _problem(self) -> str | None:
        if self.data is None:
            return f"without {DATA_FILE}"
        if self.source and (found := next(filter(None, map(self._outdated, self.stages)), None)):
            return found
        if not self.data.hash_info or self.data.workspace_status():
            return "changed since it was made" if self.data.exists else "missing"
        if self.source is None:
            return None
        made = self.outputs[self.source]
        if made.hash_info != self.data.hash_info:
            return f"older than {LOCK}"
        read = (dep for stage in self.stages if not stage.frozen for dep in stage.deps)
        if any(dep.fs_path == self.data.fs_path and dep.hash_info != self.data.hash_info for dep in read):
            return f"newer than {LOCK}"
        others = [out for path, out in self.outputs.items() if path not in (self.source, self.data.fs_path)]
        return next((f"without its {self._name(out)}" for out in others if out.workspace_status()), None)

    def _outdated(self, stage: PipelineStage) -> str | None:
        """What of a stage's command, dependencies and parameters has changed since it ran."""
        from dvc.dependency import ParamsDependency

        anew = f"older than stage {stage.name} of {PIPELINE}"
        if not (self.project / LOCK).is_file():
            return f"without {LOCK}"
        if stage.frozen or stage.is_callback:
            return None
        if stage.changed_stage() or any(each.hash_info.value is None for each in (*stage.deps, *stage.outs)):
            return anew
        for dep in stage.deps:
            if dep.fs_path == str(self.project / DATA_DIR):
                continue
            changed: dict[str, Any] = dep.workspace_status()
            if changed and isinstance(dep, ParamsDependency):
                keys = next(iter(changed.values()))
                key = f"`{next(iter(keys))}` in " if isinstance(keys, dict) else ""
                return f"older than {key}{self._name(dep)}"
            if changed:
                return f"older than {self._name(dep)}"
        return None

    def foreign_files(self) -> list[Path]:
        """The files of data/ that DVC could not give back: somebody's work, perhaps."""
        data = self.project / DATA_DIR
        if self.data is None or not data.is_dir():
            return []
        files = [path for path in data.rglob("*") if path.is_file()]
        if self.data.hash_info and not self.data.workspace_status():
            # what .dvcignore names is no part of the version, and would go with the folder
            return [path for path in files if self.repo.dvcignore.is_ignored_file(str(path))]
        return [path for path in files if not self._is_kept(path)]

    def corrupted_through_links(self) -> dict[Path, Path]:
        """Files of data/ that are links to files of DVC's cache which an edit has changed there too, and those."""
        from dvc_data.hashfile.tree import Tree

        data = self.data
        recorded = data.get_obj() if data and data.hash_info else None
        if data is None or not isinstance(recorded, Tree):
            return {}
        cache = self._cache
        places = {Path(data.fs_path, *key): (Path(cache.oid_to_path(kept.value)), kept) for key, _, kept in recorded}
        return {
            path: kept
            for path, (kept, digest) in places.items()
            if path.exists() and kept.exists() and path.samefile(kept) and self._digest(kept) != digest.value
        }

    def corrupt_cache_files(self) -> list[Path]:
        """The files of DVC's cache whose content does not match their name."""
        files = ((oid, Path(self._cache.oid_to_path(oid))) for oid in self._cache.all())
        return [path for oid, path in files if self._digest(path) != oid.removesuffix(".dir")]

    @property
    def _cache(self) -> Any:
        """Where DVC keeps files by the digests that data/ is recorded with: a team may share one."""
        assert self.data is not None
        return self.data.cache

    def _is_kept(self, path: Path) -> bool:
        digest = self._digest(path)
        kept = Path(self._cache.oid_to_path(digest))
        return kept.is_file() and self._digest(kept) == digest

    def _digest(self, path: Path) -> str:
        from dvc_data.hashfile.hash import hash_file

        _, found = hash_file(str(path), self.repo.fs, self._cache.hash_name, self.repo.state)
        return str(found.value)

    def _load(self, name: str) -> list[Any]:
        path = self.project / name
        return self.repo.stage.load_all(str(path)) if path.is_file() else []

    def _name(self, out: Output) -> str:
        path = Path(out.fs_path)
        return str(path.relative_to(self.project)) if path.is_relative_to(self.project) else str(out.def_path)


class _HashedOnce(StateNoop):
    """In the place of DVC's database of known hashes: what was hashed since the project was opened."""

    def __init__(self) -> None:
        self._known: dict[str, HashInfo] = {}

    def save(self, path: str, fs: Any, hash_info: HashInfo, info: Any = None) -> None:
        self._known[path] = hash_info

    def save_many(self, items: Iterable[tuple[str, HashInfo, Any]], fs: Any) -> None:
        self._known |= {path: hash_info for path, hash_info, _ in items}

    def get(self, path: str, fs: Any, info: Any = None) -> tuple[Any, Any]:
        from dvc_data.hashfile.meta import Meta

        known = self._known.get(path)
        return (Meta.from_info(info or fs.info(path), fs.protocol), known) if known else (None, None)

    def get_many(self, items: Iterable[str], fs: Any, infos: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
        for path in items:
            yield (path, *self.get(path, fs, infos.get(path)))


def _is_repository(project: Path) -> bool:
    return any((folder / ".dvc").is_dir() for folder in (project, *project.parents))


def _reason(error: BaseException) -> str:
    """What DVC says, without its way of drawing it."""
    causes = [each for each in (error, error.__cause__) if each is not None and not isinstance(each, UserError)]
    return "; ".join(dict.fromkeys(one_line(each) for each in causes))[:300]
