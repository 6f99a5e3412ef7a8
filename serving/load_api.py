"""The load as JSON, for the console's charts: counters since the start, from which a reader makes rates, and what is
so now. For monitoring there is `/metrics`."""

from __future__ import annotations

import time
from dataclasses import asdict

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from twinloop.serving.described import errors
from twinloop.serving.metrics import Metrics


class Load(BaseModel):
    """Counters are since the server's start, and those of all its processes.

    clock_s: of the server, for the time between two readings. requests: asked of the model; refused: those of them that
    got an error. first_tokens: answers that the model began, and first_token_s the time that they took to it, summed.
    tokens_per_s: completion tokens over the last ten seconds. queued, active: requests that wait and that are answered,
    of at most capacity and slots.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    clock_s: float
    requests: int
    refused: int
    first_tokens: int
    first_token_s: float
    prompt_tokens: int
    completion_tokens: int
    tokens_per_s: float
    queued: int
    active: int
    capacity: int
    slots: int


def load_router(metrics: Metrics) -> APIRouter:
    """`GET /v1/load`."""
    router = APIRouter()

    @router.get("/v1/load", responses=errors())
    def load() -> Load:
        return Load(clock_s=round(time.monotonic(), 3), **asdict(metrics.counted()))

    return router
