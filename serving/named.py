"""The models that a request can name: the one that answers by itself, and versions that are adapters on its base."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from twinloop.common.errors import UserError
from twinloop.models.adapter import Adapter
from twinloop.serving.decisions import DecisionService, ModelInfo
from twinloop.serving.engine.adapters import LoadedAdapter
from twinloop.serving.errors import SOON, ApiError

log = logging.getLogger(__name__)

READERS = 2
"""Versions that are read and hashed at the same time."""
AGAIN_AFTER_S = 5.0
"""A version that could not be read is hashed again at each try."""


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
        self._reading = threading.Semaphore(READERS)
        self._holding = threading.Lock()
        self._lock = threading.Lock()
        self._loads: dict[NamedVersion, Future[LoadedAdapter]] = {}  # under way
        self._failed: dict[NamedVersion, float] = {}  # could not be read, and until when it is not tried again
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
        with self._lock:
            load = self._loads.get(version)
            if mine := load is None:
                load = self._loads[version] = Future()
        assert load is not None
        if mine:  # the others await what comes of it
            try:
                load.set_result(self._held(version) or self._load(version))
            except BaseException as error:
                load.set_exception(error)
            finally:
                with self._lock:
                    del self._loads[version]
        return load.result()

    def _held(self, version: NamedVersion) -> LoadedAdapter | None:
        model, adapter = self._loaded.get(version.id, (None, None))
        # By its content too: a model deleted in MLflow and made again counts from 1.
        return adapter if model == version.model and adapter in self._service.scheduler.adapters.held else None

    def _load(self, version: NamedVersion) -> LoadedAdapter:
        adapter = self._read(version)
        with self._holding:  # one after the other: each may make space for itself
            return self._hold(version, adapter)

    def _read(self, version: NamedVersion) -> Adapter:
        words = f"model: {version.id} does not load; the server's log gives the reason"
        if time.monotonic() < self._failed.get(version, 0.0):
            raise ApiError(503, words, headers=SOON)
        try:
            with self._reading:
                adapter = self._source.read(version)
        except UserError as error:
            log.error("%s is not loaded: %s", version.id, error)
            now = time.monotonic()
            with self._lock:
                failed = {each: until for each, until in self._failed.items() if until > now}
                self._failed = failed | {version: now + AGAIN_AFTER_S}
            raise ApiError(503, words, headers=SOON) from None
        return adapter

    def _hold(self, version: NamedVersion, adapter: Adapter) -> LoadedAdapter:
        adapters = self._service.scheduler.adapters
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


def is_served(model: ModelInfo, name: str | None) -> bool:
    """Whether a request that says this name wants the served model."""
    return name in (None, model.name, f"{model.name}:v{model.version}", f"{model.name}:{model.version}")


def find_named(service: DecisionService, others: NamedModels | None, name: str | None) -> NamedVersion | None:
    """The version that a request names; None for the served model, which also has its version's name. Raises ApiError
    for any other name.

    others: of the served model, where it takes adapters.
    """
    model = service.model
    if is_served(model, name):
        return None
    assert name is not None
    try:
        if others is not None:
            return others.find(name)
        reason = f"{model.name!r} is"
    except NotServedError as error:
        reason = str(error)
    raise ApiError(404, f"model: {name!r} is not served here; {reason}", code="model_not_found", param="model")
