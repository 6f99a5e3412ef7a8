"""The load as JSON, for the console's charts: counters since the start, from which a reader makes rates, and what is
so now. For monitoring there is `/metrics`."""

from __future__ import annotations

import time

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from twinloop.serving.metrics import Metrics
from twinloop.serving.model_manager import ModelManager


class Load(BaseModel):
    """Counters are since the server's start.

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


def load_router(manager: ModelManager, metrics: Metrics) -> APIRouter:
    """`GET /v1/load`."""
    router = APIRouter()

    @router.get("/v1/load")
    def load() -> Load:
        scheduler = manager.service.scheduler
        now, totals, counted = scheduler.metrics(), manager.totals(), metrics.counted()
        return Load(
            clock_s=round(time.monotonic(), 3),
            requests=counted.requests,
            refused=counted.refused,
            first_tokens=counted.first_tokens,
            first_token_s=counted.first_token_s,
            prompt_tokens=totals.prompt_tokens,
            completion_tokens=totals.completion_tokens,
            tokens_per_s=now.tokens_per_s,
            queued=now.queued,
            active=now.active,
            capacity=scheduler.capacity,
            slots=now.slots,
        )

    return router
