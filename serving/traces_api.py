"""Traces over HTTP: a list of recent answers to choose from, filtered, and the whole trace of one."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from itertools import islice
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, ConfigDict, ValidationError

from twinloop.serving.decisions import DecisionTrace, ModelInfo, Reason, Timings
from twinloop.serving.described import Guard, errors
from twinloop.serving.errors import ApiError
from twinloop.serving.traces import TRACE_ID, TraceStore

SEARCHED_TRACES = 10_000
"""So many of the newest ones are looked at: a question for rare answers must not read every file."""
MAX_LISTED = 200
TraceId = Annotated[str, Path(json_schema_extra={"pattern": f"^{TRACE_ID.pattern}$"})]  # any other is a 404 too
NOT_A_FILTER = {422: "A filter is none that is known here; `param` names it"}


class RecentAnswer(BaseModel):
    """One answer, as it is listed: without the documents, the prompt's length and what the model wrote."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    trace_id: str
    time: datetime
    request: dict[str, Any]
    decision: Any
    escalated: bool
    reasons: list[Reason]
    model: ModelInfo
    timings: Timings


class RecentAnswers(BaseModel):
    """The newest first. `searched`: how many were looked at; `complete`: no older ones are kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    answers: list[RecentAnswer]
    searched: int
    complete: bool


def traces_router(traces: TraceStore | None, guard: Guard) -> APIRouter:
    """`GET /v1/traces` and `/v1/traces/{trace_id}`, for administrators only: a trace holds a customer's words."""
    router = APIRouter(dependencies=guard.dependencies)

    @router.get("/v1/traces", responses=errors(422, *guard.statuses, words=NOT_A_FILTER))
    def recent(
        limit: Annotated[int, Query(ge=1, le=MAX_LISTED, description="how many are listed at most")] = 50,
        escalated: Annotated[bool | None, Query(description="only those that are, or are not, escalated")] = None,
        check: Annotated[str | None, Query(max_length=100, description="a check that failed")] = None,
        text: Annotated[
            str | None, Query(max_length=200, description="in the request, the answer or the trace's id, in any case")
        ] = None,
    ) -> RecentAnswers:
        kept = traces.newest() if traces is not None else iter(())
        words = text.casefold() if text else ""
        answers: list[RecentAnswer] = []
        searched = 0
        for trace in islice(kept, SEARCHED_TRACES):
            searched += 1
            # The words first: what does not hold them need not be validated.
            answer = _listed(trace) if _holds(trace, words) else None
            if answer is None or not _fits(answer, escalated, check):
                continue
            answers.append(answer)
            if len(answers) == limit:
                break
        return RecentAnswers(answers=answers, searched=searched, complete=next(kept, None) is None)

    @router.get(
        "/v1/traces/{trace_id}",
        response_model=None,
        responses={**errors(404, *guard.statuses), 200: {"model": DecisionTrace}},
    )
    def trace(trace_id: TraceId) -> dict[str, Any]:
        found = traces.get(trace_id) if traces is not None else None
        if found is None:
            raise ApiError(404, "no trace of that id is kept", param="trace_id")
        return found

    return router


def _listed(trace: Mapping[str, Any]) -> RecentAnswer | None:
    """None for a line that an earlier version wrote in another form."""
    try:
        return RecentAnswer.model_validate(trace)
    except ValidationError:
        return None


def _fits(answer: RecentAnswer, escalated: bool | None, check: str | None) -> bool:
    wanted = escalated is None or answer.escalated is escalated
    return wanted and (not check or any(reason.predicate == check for reason in answer.reasons))


def _holds(trace: Mapping[str, Any], words: str) -> bool:
    """words: casefolded; none are held by every trace."""
    return not words or any(
        _is_in(words, trace.get(name)) for name in ("trace_id", "request", "output_text", "decision")
    )


def _is_in(words: str, value: Any) -> bool:
    """Whether any text of the value holds the words, at any depth."""
    if isinstance(value, str):
        return words in value.casefold()
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return False
    return any(_is_in(words, inner) for inner in value)
