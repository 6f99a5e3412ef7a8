"""The registry over HTTP: which versions there are, what their gates said, and the moves of the champion.

This package knows no registry: whoever starts the server hands in an object that has one (`Releases`). Reading is for
everybody who reaches the server; moving the champion, and who moved it, is for administrators.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Annotated, Literal, Protocol, TypeVar

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel, ConfigDict

from twinloop.serving.described import Guard, errors
from twinloop.serving.errors import ApiError
from twinloop.serving.model_manager import ModelManager
from twinloop.serving.work import run_detached

log = logging.getLogger(__name__)

T = TypeVar("T")
Alias = Literal["champion", "previous", "candidate"]
Decision = Literal["SHIP", "BLOCK"]
Number = Annotated[int, Path(ge=1, le=2**31 - 1, description="a version of the served model")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class VersionSummary(_Frozen):
    """One version. `servable`: it is an exported model, which may be promoted. `gate`: None where none judged it."""

    version: int
    stage: str
    digest: str
    servable: bool
    aliases: list[Alias]
    gate: Decision | None


class Versions(_Frozen):
    """All versions of the served model, the newest first. `served`: the one that answers now."""

    model: str
    served: int
    served_is_champion: bool
    versions: list[VersionSummary]


class RuleResult(_Frozen):
    """One rule of the gate. `measured` is None where nothing was measured."""

    rule: str
    outcome: Literal["pass", "block", "skipped"]
    measured: float | None
    bound: Literal["at least", "at most"]
    limit: float
    detail: str


class GateReason(_Frozen):
    """Why the gate says BLOCK, and the layer that owns it."""

    rule: str
    reason: str
    owner: str


class Gate(_Frozen):
    """The last report on a version. `problem`: why the report cannot be shown, in words; then it has no rules."""

    decision: Decision
    when: datetime
    digest: str
    rules: list[RuleResult]
    reasons: list[GateReason]
    problem: str | None = None


class Origin(_Frozen):
    """One step from the version back to what it was made from."""

    kind: str
    name: str
    digest: str


class VersionDetail(VersionSummary):
    """One version with its last gate report and what it was made from."""

    gate_report: Gate | None
    origins: list[Origin]


class Move(_Frozen):
    """One finished move of the champion, as the ledger has it: to a version, or None where it was taken away."""

    action: Literal["promote", "rollback", "adopt"]
    from_version: int | None
    to_version: int | None
    who: str
    when: datetime
    gate_digest: str | None


class Moved(Move):
    """`smoke_test`: what the version answered before it became the champion again; None for a promotion.
    `finished_later`: the move had been begun by a process that died, and was finished now."""

    smoke_test: str | None
    finished_later: bool


class Moves(_Frozen):
    """Every move of the champion, the newest first."""

    moves: list[Move]


class MoveRefusedError(Exception):
    """The champion is not moved, for a reason that is written for administrators."""


class Releases(Protocol):
    """The registry of the served model. Methods may raise what its tools raise; safe for many threads."""

    def versions(self) -> Sequence[VersionSummary]:
        """All versions, in any order."""

    def version(self, number: int) -> VersionDetail | None:
        """One of them; None where there is none of that number."""

    def moves(self) -> Sequence[Move]:
        """The champion's moves, oldest first."""

    def promote(self, number: int, by: str) -> Moved:
        """Make a version the champion by the rules of the registry. by: for the ledger, by which way it was asked for.
        Raises MoveRefusedError."""

    def roll_back(self, by: str) -> Moved:
        """Make the previous champion the champion again. Raises as `promote`."""


NO_REGISTRY = "this server was started without a registry: `twinloop status`, `promote` and `rollback` are there"
UNREADABLE = "the registry cannot be read now; the server's log gives the reason"
UNMOVED = "the champion was not moved; the server's log gives the reason, and `twinloop status` what is so now"
WORDS = {
    404: "No such version, or a server without a registry",
    409: "The registry refuses it, such as a version that its gate blocks; the message says why",
    422: "This is no number of a version",
    503: "The registry cannot be read or moved now, or the server is stopping",
}


class _Registry:
    """The registry, if there is one, with its errors as this interface's; it moves the champion once at a time."""

    def __init__(self, releases: Releases | None):
        self._releases = releases
        self._moving = threading.Lock()

    def read(self, read: Callable[[Releases], T]) -> T:
        """What `read` returns. Raises ApiError where the registry cannot be read, whatever its tools raise."""
        releases = self._open()
        try:
            return read(releases)
        except Exception:
            log.exception("the registry cannot be read")
            raise ApiError(503, UNREADABLE) from None

    def version(self, number: int) -> VersionDetail:
        found = self.read(lambda releases: releases.version(number))
        if found is None:
            raise ApiError(404, f"version {number} is not in the registry", param="version")
        return found

    def promote(self, number: int, by: str) -> Moved:
        self.version(number)
        return self._move(lambda releases: releases.promote(number, by))

    def roll_back(self, by: str) -> Moved:
        return self._move(lambda releases: releases.roll_back(by))

    def _move(self, work: Callable[[Releases], Moved]) -> Moved:
        releases = self._open()
        if not self._moving.acquire(blocking=False):
            raise ApiError(409, "another move of the champion is under way; try again when it has ended")
        try:
            return work(releases)
        except MoveRefusedError as error:
            raise ApiError(409, str(error)) from None
        except Exception:
            log.exception("the champion was not moved")
            raise ApiError(503, UNMOVED) from None
        finally:
            self._moving.release()

    def _open(self) -> Releases:
        if self._releases is None:
            raise ApiError(404, NO_REGISTRY)
        return self._releases


def versions_router(manager: ModelManager, releases: Releases | None, guard: Guard) -> APIRouter:
    """`GET /v1/versions`, `/v1/versions/{version}` and `/v1/moves`, `POST …/promote` and `/v1/rollback`.

    guard: of the last three. Without `releases` every route answers 404.
    """
    router, registry = APIRouter(), _Registry(releases)
    refusals = guard.statuses

    @router.get("/v1/versions", responses=errors(404, words=WORDS))
    def every_version() -> Versions:
        found = sorted(registry.read(lambda releases: releases.versions()), key=lambda each: -each.version)
        model = manager.service.model
        served = (int(model.version), model.digest)  # a model deleted in MLflow and made again counts from 1
        is_champion = any("champion" in each.aliases and (each.version, each.digest) == served for each in found)
        return Versions(model=model.name, served=served[0], served_is_champion=is_champion, versions=found)

    @router.get("/v1/versions/{version}", responses=errors(404, 422, words=WORDS))
    def one_version(version: Number) -> VersionDetail:
        return registry.version(version)

    @router.get("/v1/moves", responses=errors(404, *refusals, words=WORDS), dependencies=guard.dependencies)
    def every_move() -> Moves:
        return Moves(moves=[*reversed(registry.read(lambda releases: releases.moves()))])

    # A server that is stopped does not wait for a move: its process ends it.
    @router.post(
        "/v1/versions/{version}/promote",
        responses=errors(404, 409, 422, *refusals, words=WORDS),
        dependencies=guard.dependencies,
    )
    async def promote_version(version: Number, request: Request) -> Moved:
        return await run_detached(registry.promote, version, _asked_by(request))

    @router.post("/v1/rollback", responses=errors(404, 409, *refusals, words=WORDS), dependencies=guard.dependencies)
    async def roll_back_champion(request: Request) -> Moved:
        return await run_detached(registry.roll_back, _asked_by(request))

    return router


def _asked_by(request: Request) -> str:
    """For the ledger: by which way a move was asked for."""
    return f"over HTTP from {request.client.host if request.client else 'an unknown address'}"
