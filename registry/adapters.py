"""Registered versions that can be asked beside a served model: adapters on the very base that it serves."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from twinloop.common.errors import UserError
from twinloop.common.files import file_digest
from twinloop.domains.loader import LoadedDomain
from twinloop.models.adapter import Adapter
from twinloop.models.directory import load_config
from twinloop.models.exported import describe_exported, read_own_adapter
from twinloop.models.tokenizer_files import SETTINGS
from twinloop.models.vocabulary import TOKENIZER
from twinloop.registry.fingerprint import module_fingerprint
from twinloop.registry.gates import read_gate, require_ship
from twinloop.registry.snapshot import Served, Snapshot, Version, registered_models
from twinloop.registry.status import VersionStatus
from twinloop.registry.versions import CHECKPOINTS, Registry
from twinloop.serving.decisions import ModelInfo
from twinloop.serving.named import NamedVersion, NotServedError

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
"""Reading the registry from the project's own database takes 2 ms for each of its models."""
ASK_EVERY_S = 10.0
"""Asking an MLflow server takes longer, and others ask it too."""


def measured_with_other_code(version: Version, loaded: LoadedDomain) -> bool:
    """Whether the domain's code, as this process loaded it, is not the code that the version was measured with."""
    loaded_code = module_fingerprint(loaded.found)  # first called at the start: later the files may have changed
    return version.domain_fingerprint not in (None, loaded_code)


class RegisteredAdapters:
    """A `serving.named.AdapterSource`: the versions of all registered models of the project that the gate has let
    through, for the same domain, exported with adapters from the same base, with the same tokenizer and template."""

    def __init__(self, registry: Registry, served: Served, loaded: LoadedDomain):
        """served: the version whose base is served. loaded: its domain."""
        self._mlruns, self._served, self._loaded = registry.mlruns, served, loaded
        self._exported, self._files = describe_exported(served.path), _tokenizer(served.path)
        self._every_s = LOOK_EVERY_S if self._mlruns.local_database else ASK_EVERY_S
        self._reading = threading.Lock()
        self._read_again_at = 0.0
        self._snapshots: Mapping[str, Snapshot] = {}  # none until the first reading
        self._exports: dict[str, str | None] = {}  # by the digest of a version, what is wrong with its export here

    def listed(self) -> Sequence[NamedVersion]:
        return [
            _named(version)
            for _, snapshot in sorted(self._now().items(), key=lambda item: item[0] != self._served.name)
            for version in sorted(snapshot.versions.values(), key=lambda each: -each.version)
            if self._problem(version) is None
        ]

    def find(self, name: str) -> NamedVersion:
        version = self._version(name)
        if problem := self._problem(version):
            raise NotServedError(f"{version} {problem}")
        return _named(version)

    def read(self, version: NamedVersion) -> Adapter:
        registry = Registry(self._mlruns, version.model.name)
        found = registry.version(int(version.model.version))
        if found.digest != version.model.digest:
            raise UserError(f"{found}: it was deleted and registered anew in MLflow just now; ask again")
        require_ship(found, read_gate(registry, found))
        verified = registry.verify(found)
        if problem := self._export_problem(verified):  # as it is now, whatever was read before
            raise UserError(f"{found} {problem}")
        return read_own_adapter(verified.path, load_config(verified.path))

    def _version(self, name: str) -> Version:
        """By model and number or alias. Raises NotServedError."""
        model, _, which = name.rpartition(":")
        snapshot = self._now().get(model)
        if snapshot is None:
            raise NotServedError(f"{self._served.name!r} is, and `{self._served.name}:v7` names a version on its base")
        by_number = {str(version.version): version for version in snapshot.versions.values()}
        version = by_number.get(which.removeprefix("v")) or snapshot.alias(which)
        if version is None:
            raise NotServedError(f"{model} has no version {which}")
        return version

    def _now(self) -> Mapping[str, Snapshot]:
        """By the registered model, as it was within the last seconds, or when it could last be read."""
        # Nobody waits for a reading who can have the one before: where MLflow's server is away, it takes a minute.
        if self._reading.acquire(blocking=not self._snapshots):
            try:
                if time.monotonic() >= self._read_again_at:
                    self._read_registry()
            finally:
                self._reading.release()
        return self._snapshots

    def _read_registry(self) -> None:
        try:
            names = [name for name in registered_models(self._mlruns) if not name.endswith(CHECKPOINTS)]
            self._snapshots = {name: Registry(self._mlruns, name).snapshot() for name in names}
        except Exception as error:  # whatever it is: what can be asked goes on
            if not self._snapshots:
                raise
            log.warning("the registry cannot be read, and requests may name the versions of before: %s", error)
        self._read_again_at = time.monotonic() + self._every_s

    def _problem(self, version: Version) -> str | None:
        """Why requests cannot have it, in words for clients; None where they can."""
        if not version.servable:
            return "is no exported model that may be served"
        if version.tags.get("domain") != self._served.domain:
            return "is for another domain"
        if measured_with_other_code(version, self._loaded):
            return "was measured with other code of its domain than this server has loaded"
        if VersionStatus.of(version).gate != "SHIP":
            return "was not let through by its gate"
        if version.digest not in self._exports:
            self._exports[version.digest] = self._export_problem(version)
        return self._exports[version.digest]

    def _export_problem(self, version: Version) -> str | None:
        try:
            exported, files = describe_exported(version.path), _tokenizer(version.path)
        except (UserError, OSError):
            return "is corrupt"
        if not exported.takes_adapters:
            return "was exported with its adapter merged, if it has one"
        if not exported.has_base_of(self._exported):
            return f"has another base than {self._served}, or was exported in another way"
        return None if files == self._files else f"has another tokenizer or chat template than {self._served}"


def _named(version: Version) -> NamedVersion:
    model = ModelInfo(name=version.name, version=str(version.version), digest=version.digest)
    return NamedVersion(f"{version.name}:v{version.version}", model)


def _tokenizer(exported: Path) -> list[str]:
    """Digests of the files that say how texts and chats become tokens."""
    return [file_digest(exported / name) for name in (TOKENIZER, SETTINGS)]
