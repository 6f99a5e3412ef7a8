"""Content-addressed stage artifacts: the same inputs give the same directory, and nothing is ever half-written.

    artifacts/<stage>/<key>/            the finished artifact, with its manifest.json
    artifacts/<stage>/.work/<key>/      what the stage needs to go on after a crash (training checkpoints)
    artifacts/<stage>/.new/<key>/       the output while it is made; renamed whole into its place
    artifacts/<stage>/.lock/<key>       held by the process that builds this key

The key is a hash of what goes in: stage, settings, the content digests of the inputs, the code's fingerprint. An
artifact is trusted only after every byte of it has been hashed again: there are no timestamps, and no "probably".
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from twinloop.common.files import file_digest, fsync, write_whole

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
CHECKSUM = "seal"  # the key in manifests that are already written
CLOCK = "clock.json"
KEY_CHARS = 24  # 96 bits: short enough to read, long enough never to collide
# A working directory is worth keeping while somebody may still come back to its run.
ABANDONED_AFTER_S = 14 * 24 * 3600

Build: TypeAlias = Callable[[Path, Path], dict[str, Any]]


class Input(BaseModel):
    """One thing that an artifact was made from. `stage` and `key` are None for what lies outside the store."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    stage: str | None = None
    key: str | None = None


class Manifest(BaseModel):
    """What an artifact is and what it was made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    key: str
    settings: dict[str, Any]
    inputs: dict[str, Input]
    code: str
    files: dict[str, str]
    digest: str
    metrics: dict[str, Any]
    seconds: float
    created: str

    def to_json(self) -> bytes:
        """The file's bytes: the fields, and a checksum over them, so that a changed manifest is noticed too."""
        fields = self.model_dump(mode="json")
        return (json.dumps(fields | {CHECKSUM: _digest(fields)}, indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Raises ValueError where the file is not a manifest that matches its checksum, OSError where it is missing."""
        fields = json.loads(path.read_bytes())
        if not isinstance(fields, dict) or fields.pop(CHECKSUM, None) != _digest(fields):
            raise ValueError("the manifest does not match its own checksum")
        return cls.model_validate(fields)


@dataclass(frozen=True)
class Artifact:
    """A finished directory in the store."""

    path: Path
    manifest: Manifest
    reused: bool = field(default=False, compare=False)

    @property
    def stage(self) -> str:
        return self.manifest.stage

    @property
    def key(self) -> str:
        return self.manifest.key

    @property
    def digest(self) -> str:
        """Hash of the content: file names and bytes, not how or when they came to be."""
        return self.manifest.digest

    @property
    def metrics(self) -> dict[str, Any]:
        return self.manifest.metrics


class ArtifactStore:
    """The artifacts under one root. Safe for several processes: two of them never build one key at a time."""

    def __init__(self, root: Path):
        self.root = Path(root)

    def run(
        self,
        stage: str,
        *,
        settings: BaseModel | Mapping[str, Any],
        inputs: Mapping[str, Artifact | str],
        code: str,
        build: Build,
    ) -> Artifact:
        """The artifact of `stage` for these inputs: found and verified, or built now.

        inputs: other artifacts, or the digest of something outside the store. code: see `registry.fingerprint`.
        build(out, work): fills `out`, returns metrics for the manifest; `work` is kept when the process dies, and is
        there again when the same key is built next. The manifest's seconds count what went into it before.
        """
        plain = settings.model_dump(mode="json") if isinstance(settings, BaseModel) else dict(settings)
        sources = {name: _as_input(value) for name, value in sorted(inputs.items())}
        key = artifact_key(stage, plain, {name: source.digest for name, source in sources.items()}, code)
        with self._lock(stage, key):
            if found := self._verified(stage, key):
                self._clear(stage, key)
                return found
            self._sweep(stage)
            out, work = self._folder(stage, ".new") / key, self._folder(stage, ".work") / key
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            work.mkdir(parents=True, exist_ok=True)
            before = _spent(work)
            started = time.perf_counter()
            metrics = build(out, work)
            seconds = before + time.perf_counter() - started
            files = hash_files(out)
            manifest = Manifest(
                stage=stage,
                key=key,
                settings=plain,
                inputs=sources,
                code=code,
                files=files,
                digest=_digest(files),
                metrics=metrics,
                seconds=round(seconds, 3),
                created=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            (out / MANIFEST).write_bytes(manifest.to_json())
            final = self._place(out, self.root / stage / key)
            shutil.rmtree(work)
            return Artifact(final, manifest)

    def _verified(self, stage: str, key: str) -> Artifact | None:
        path = self.root / stage / key
        if not path.exists():
            return None
        try:
            manifest = Manifest.read(path / MANIFEST)
        except (OSError, ValueError, ValidationError):
            problem: str | None = f"{MANIFEST} is missing or changed"
        else:
            problem = integrity_error(path, manifest)
            if problem is None and manifest.key == key:
                return Artifact(path, manifest, reused=True)
        log.warning("%s/%s: %s; building it again", stage, key, problem or "holds another key's artifact")
        return None

    def _folder(self, stage: str, name: str) -> Path:
        folder = self.root / stage / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextmanager
    def _lock(self, stage: str, key: str) -> Iterator[None]:
        # Held by the kernel, so that it ends with its process however that dies.
        lock = FileLock(self._folder(stage, ".lock") / key)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            log.warning("%s/%s: another process is building it; waiting", stage, key)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _place(self, new: Path, final: Path) -> Path:
        """Make `new` durable, then visible at `final` in one step; a corrupt predecessor is removed."""
        for path in [*_walk(new), *(p for p in new.rglob("*") if p.is_dir()), new]:
            fsync(path)
        if final.exists():
            replaced = self._folder(final.parent.name, ".new") / f"{final.name}.corrupt"
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        new.rename(final)
        fsync(final.parent)
        shutil.rmtree(final.parent / ".new" / f"{final.name}.corrupt", ignore_errors=True)
        return final

    def _clear(self, stage: str, key: str) -> None:
        """Remove what a process that died just after it had placed this artifact left behind."""
        for leftover in (f".new/{key}", f".new/{key}.corrupt", f".work/{key}"):
            shutil.rmtree(self.root / stage / leftover, ignore_errors=True)

    def _sweep(self, stage: str) -> None:
        """Remove what processes that died left behind: unfinished outputs at once, their checkpoints when old."""
        for kind in (".new", ".work"):
            for leftover in self._folder(stage, kind).iterdir():
                if kind == ".work" and _newest(leftover) > time.time() - ABANDONED_AFTER_S:
                    continue
                lock = FileLock(self._folder(stage, ".lock") / leftover.name.removesuffix(".corrupt"))
                try:
                    with lock.acquire(blocking=False):
                        shutil.rmtree(leftover, ignore_errors=True)
                except Timeout:
                    continue  # in use by another process


def artifact_key(stage: str, settings: Mapping[str, Any], input_digests: Mapping[str, str], code: str) -> str:
    """The name of what this stage makes from exactly this."""
    fields = {"stage": stage, "settings": dict(settings), "inputs": dict(input_digests), "code": code}
    return _digest(fields)[:KEY_CHARS]


def hash_files(folder: Path) -> dict[str, str]:
    """sha256 of every file under `folder` but its manifest, by relative path. Raises OSError."""
    paths = [path for path in _walk(folder) if path != folder / MANIFEST]
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing and reading release the interpreter's lock
        return dict(
            zip([path.relative_to(folder).as_posix() for path in paths], pool.map(file_digest, paths), strict=True)
        )


def content_digest(folder: Path) -> str:
    """The digest that an artifact of these files has. Raises OSError."""
    return _digest(hash_files(folder))


def integrity_error(path: Path, manifest: Manifest) -> str | None:
    """What differs from the manifest, in words; None if every byte is as it was written. Reads every byte."""
    try:
        found = hash_files(path)
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    for name, digest in manifest.files.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != digest:
            return f"{name} differs from what was written"
    extra = sorted(set(found) - set(manifest.files))
    return f"{extra[0]} was added later" if extra else None


def _as_input(value: Artifact | str) -> Input:
    if isinstance(value, str):
        return Input(digest=value)
    return Input(digest=value.digest, stage=value.stage, key=value.key)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _walk(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _newest(folder: Path) -> float:
    try:
        return max(path.stat().st_mtime for path in [folder, *folder.rglob("*")])
    except FileNotFoundError:  # its owner is running: a newer checkpoint replaced it
        return time.time()


def _spent(work: Path) -> float:
    """Seconds that went into what processes before this one left in `work`, up to its newest file."""
    clock = work / CLOCK
    before = 0.0
    if clock.exists():
        with suppress(ValueError, KeyError, TypeError):  # torn by a power cut: a time for the table, nothing more
            begun = json.loads(clock.read_text())
            before = begun["before"] + max(0.0, _newest(work) - begun["since"])
    write_whole(clock, json.dumps({"before": before, "since": time.time()}).encode())
    return before
