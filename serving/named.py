"""The models that a request can name: the one that answers by itself, and versions that are adapters on its base."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from twinloop.common.errors import UserError
from twinloop.models.adapter import Adapter
from twinloop.serving.decisions import DecisionService, ModelInfo
from twinloop.serving.engine.adapters import LoadedAdapter
from twinloop.serving.errors import SOON, ApiError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NamedVersion:
    """A version that requests may name. id: its own name, such as returns:v7, whichever name was asked for."""

    id: str
    model: ModelInfo


class NotServedError(Exception):
    """Requests cannot have the model of this name; the reason is for clients."""


class AdapterSource(Protocol):
    """Where the versions on a served model's base are kept. Safe for many threads."""

    def listed(self) -> Sequence[NamedVersion]:
        """All that requests may name, the newest first."""

    def find(self, name: str) -> NamedVersion:
        """By `model:v7`, `model:7` or `model:alias`. Raises NotServedError."""

    def read(self, version: NamedVersion) -> Adapter:
        """Its adapter, verified. Raises UserError."""


class NamedModels:
    """Versions beside a served model. Each is loaded when a request names it; of those that no answer uses, the one
    whose last use is longest ago makes space. Safe for many threads."""

    def __init__(self, service: DecisionService, source: AdapterSource, *, most: int):
        """most: adapters in memory, beside the model's own; at least 1."""
        self._service, self._source, self._most = service, source, most
        self._loading = threading.Lock()
        self._loaded: dict[str, tuple[ModelInfo, LoadedAdapter]] = {}  # by the version's id

    def listed(self) -> list[NamedVersion]:
        """Those that a request may name, beside the served model itself."""
        return [version for version in self._source.listed() if version.model != self._service.model]

    def find(self, name: str) -> NamedVersion | None:
        """What has this name; None for the served model itself. Raises NotServedError."""
        found = self._source.find(name)
        return None if found.model == self._service.model else found

    def service(self, version: NamedVersion) -> DecisionService:
        """What answers for a version. Its `reserve` loads it, and raises ApiError where it does not load, or where
        there is no space for it."""
        return self._service.with_adapter(version.id, version.model, lambda: self._adapter(version))

    def _adapter(self, version: NamedVersion) -> LoadedAdapter:
        if (held := self._held(version)) is not None:
            return held
        with self._loading:
            return self._held(version) or self._load(version)

    def _held(self, version: NamedVersion) -> LoadedAdapter | None:
        model, adapter = self._loaded.get(version.id, (None, None))
        # By its content too: a model deleted in MLflow and made again counts from 1.
        return adapter if model == version.model and adapter in self._service.scheduler.adapters.held else None

    def _load(self, version: NamedVersion) -> LoadedAdapter:
        adapters = self._service.scheduler.adapters
        try:
            adapter = self._source.read(version)
        except UserError as error:
            log.error("%s is not loaded: %s", version.id, error)
            raise ApiError(503, f"model: {version.id} does not load; the server's log gives the reason") from None
        if version.id in self._loaded:
            _, outdated = self._loaded.pop(version.id)
            adapters.drop(outdated)
        while len(adapters.held) >= self._most:
            if adapters.drop_idle() is None:
                words = f"model: {version.id} is not loaded, and {self._most} others are in use; try again soon"
                raise ApiError(429, words, code="queue_full", headers=SOON)
        while True:
            try:
                loaded = adapters.load(version.id, adapter)
                break
            except UserError as error:
                if adapters.drop_idle() is None:
                    log.error("%s", error)
                    words = f"model: there is no memory for {version.id} now; try again soon"
                    raise ApiError(503, words, headers=SOON) from None
        log.info("%s is loaded, of rank %d", version.id, loaded.rank)
        held = {id: (model, each) for id, (model, each) in self._loaded.items() if each in adapters.held}
        self._loaded = held | {version.id: (version.model, loaded)}
        return loaded


def find_named(service: DecisionService, others: NamedModels | None, name: str | None) -> NamedVersion | None:
    """The version that a request names; None for the served model, which also has its version's name. Raises ApiError
    for any other name.

    others: of the served model, where it takes adapters.
    """
    model = service.model
    if name in (None, model.name, f"{model.name}:v{model.version}", f"{model.name}:{model.version}"):
        return None
    assert name is not None
    try:
        if others is not None:
            return others.find(name)
        reason = f"{model.name!r} is"
    except NotServedError as error:
        reason = str(error)
    raise ApiError(404, f"model: {name!r} is not served here; {reason}", code="model_not_found", param="model")
