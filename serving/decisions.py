"""One decision: find the policies, ask the model, check what it says, and answer or escalate.

Nothing that the model writes is returned before the domain's own checks have passed. Whatever goes wrong on the way
ends in the same place: `decision` is null, and the answer says why and whose it is to mend.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from twinloop.common.errors import UserError
from twinloop.domains.domain import Verdict
from twinloop.domains.returns.policies import Policy
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.serving.engine.scheduler import QueueFullError, Scheduler
from twinloop.serving.generation import GivenUpError, TextStream
from twinloop.serving.retrieval import EMPTY_DIGEST, PolicyIndex, PolicyIndexError, SearchResult
from twinloop.serving.traces import TraceStore

log = logging.getLogger(__name__)

OrderT = TypeVar("OrderT", bound=BaseModel)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelInfo(_Frozen):
    """Which weights answer. `digest` is that of the served bundle's content."""

    name: str
    version: str
    digest: str


class Passage(_Frozen):
    policy_id: str
    version: int
    text: str


class Reason(_Frozen):
    """Why a case was escalated: the check that failed, in plain words, and the layer that owns it."""

    predicate: str
    reason: str
    owner: str


class Timings(_Frozen):
    """Milliseconds. Queue and time to first token are None where the model was not asked."""

    retrieval_ms: float
    queue_ms: float | None
    ttft_ms: float | None
    total_ms: float


class DecisionResponse(_Frozen):
    """The answer to `POST /v1/decisions`. Either there is a decision, or the case is escalated."""

    decision: dict[str, Any] | None
    escalated: bool
    reasons: list[Reason]
    passages: list[Passage]
    model: ModelInfo
    timings: Timings
    trace_id: str


class DecisionTrace(_Frozen):
    """All that an answer was made from. `trace_id` stands first: the trace store finds lines by it."""

    trace_id: str
    time: str
    order: dict[str, Any]
    message: str
    passages: list[Passage]
    index_digest: str
    prompt_tokens: int
    completion_tokens: int
    output_text: str | None
    predicates: dict[str, bool]
    decision: dict[str, Any] | None
    escalated: bool
    reasons: list[Reason]
    model: ModelInfo
    timings: Timings


@dataclass(frozen=True)
class DecisionDomain(Generic[OrderT]):
    """What a domain brings so that its cases can be decided here.

    `query` sees trusted facts only: a customer's words cannot steer retrieval. `precheck` gives the reasons, by
    predicate, for which the model need not even be asked. `owners` says which layer owns a predicate that failed.
    """

    order_model: type[OrderT]
    retrieved_passages: int
    max_message_characters: int
    max_answer_tokens: int
    query: Callable[[OrderT], str]
    precheck: Callable[[OrderT, Sequence[Policy]], Mapping[str, str]]
    build_prompt: Callable[[OrderT, str, Sequence[Policy]], list[dict[str, str]]]
    check: Callable[[str, OrderT, Sequence[Policy]], Verdict]
    owners: Mapping[str, str]


@dataclass(frozen=True)
class _Review:
    """What came of asking the model."""

    output_text: str | None
    verdict: Verdict | None
    failures: Mapping[str, str]


class PendingDecision(Generic[OrderT]):
    """A case whose prompt waits in the scheduler's queue, or that is escalated already."""

    def __init__(self, service: DecisionService[OrderT], order: OrderT, message: str, started: float):
        self._service = service
        self._order = order
        self._message = message
        self._started = started
        self._found = SearchResult([], EMPTY_DIGEST)
        self._retrieval_s = 0.0
        self._prompt_tokens = 0
        self._text: TextStream | None = None
        self._failures: Mapping[str, str] = {}

    def cancel(self) -> None:
        """Stop generating: nobody waits for the answer any more. May be called from any thread."""
        if self._text is not None:
            self._text.cancel()

    def finish(self) -> DecisionResponse:
        """Wait for the model's answer, check it, keep the trace, and respond."""
        review = self._review()
        service = self._service
        reasons = [
            Reason(predicate=name, reason=words, owner=service.domain.owners.get(name, "inference serving"))
            for name, words in review.failures.items()
        ]
        decision = review.verdict.output if review.verdict is not None and not reasons else None
        text = self._text
        timings = Timings(
            retrieval_ms=_milliseconds(self._retrieval_s),
            queue_ms=_milliseconds(text.queue_s) if text and text.queue_s is not None else None,
            ttft_ms=_milliseconds(text.ttft_s) if text and text.ttft_s is not None else None,
            total_ms=_milliseconds(time.perf_counter() - self._started),
        )
        response = DecisionResponse(
            decision=decision,
            escalated=decision is None,
            reasons=reasons,
            passages=[Passage(policy_id=p.policy_id, version=p.version, text=p.text) for p in self._found.passages],
            model=service.model,
            timings=timings,
            trace_id=uuid.uuid4().hex,
        )
        if service.traces is not None:
            service.traces.record(response.trace_id, self._trace(response, review))
        return response

    def _review(self) -> _Review:
        if self._failures or self._text is None:
            return _Review(None, None, self._failures)
        try:
            output = "".join(self._text)
        except GivenUpError as error:
            return _Review(None, None, {"generation": str(error)})
        except Exception as error:  # one broken request must not look like a decision, whatever broke it
            log.exception("generation failed")
            return _Review(None, None, {"generation": f"the model could not answer ({type(error).__name__})"})
        try:
            verdict = self._service.domain.check(output, self._order, self._found.passages)
            return _Review(output, verdict, verdict.reasons)
        except Exception as error:  # an answer that could not be checked is not returned
            log.exception("check failed")
            return _Review(output, None, {"check": f"the answer could not be checked ({type(error).__name__})"})

    def _trace(self, response: DecisionResponse, review: _Review) -> DecisionTrace:
        return DecisionTrace(
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
            order=self._order.model_dump(mode="json"),
            message=self._message,
            index_digest=self._found.index_digest,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._text.completion_tokens if self._text is not None else 0,
            output_text=review.output_text,
            predicates=dict(review.verdict.checks) if review.verdict is not None else {},
            **{name: getattr(response, name) for name in DecisionResponse.model_fields},
        )

    def begin(self) -> None:
        """Retrieve, and hand the prompt to the scheduler, unless something already speaks against asking."""
        service, domain = self._service, self._service.domain
        try:
            self._found = service.index.find(domain.query(self._order), domain.retrieved_passages)
        except PolicyIndexError as error:
            log.error("%s", error)
            self._failures = {"retrieval": error.reason}
            return
        finally:
            self._retrieval_s = time.perf_counter() - self._started
        self._failures = domain.precheck(self._order, self._found.passages)
        if self._failures:
            return
        try:
            self._ask()
        except QueueFullError:
            raise
        except Exception as error:  # as in _review
            log.exception("the model could not be asked")
            self._failures = {"generation": f"the model could not be asked ({type(error).__name__})"}

    def _ask(self) -> None:
        service, domain = self._service, self._service.domain
        prompt = service.tokenizer.encode_prompt(domain.build_prompt(self._order, self._message, self._found.passages))
        self._prompt_tokens = len(prompt)
        room = service.scheduler.max_length - len(prompt)
        if room < 1:
            self._failures = {"prompt": f"the case has {len(prompt)} tokens, too many for this model to read"}
            return
        params = SamplingParams(max_tokens=min(domain.max_answer_tokens, room), stop=(service.tokenizer.stop_id,))
        stream = service.scheduler.submit(prompt, params)
        self._text = TextStream(stream, service.tokenizer, started=self._started)


class DecisionService(Generic[OrderT]):
    """Decides cases of one domain with one frozen model. Safe for many threads."""

    def __init__(
        self,
        scheduler: Scheduler,
        tokenizer: ChatTokenizer,
        index: PolicyIndex,
        model: ModelInfo,
        domain: DecisionDomain[OrderT],
        traces: TraceStore | None = None,
    ):
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.index = index
        self.model = model
        self.domain = domain
        self.traces = traces

    def decide(self, order: OrderT, message: str) -> DecisionResponse:
        """Decide one case, or escalate it.

        Raises UserError for a message that is too long, and QueueFullError when the scheduler takes no more.
        """
        return self.begin(order, message).finish()

    def begin(self, order: OrderT, message: str) -> PendingDecision[OrderT]:
        """Retrieve and queue a case; `finish()` waits for its answer, `cancel()` gives it up. Raises like `decide`."""
        if len(message) > self.domain.max_message_characters:
            raise UserError(
                f"message: has {len(message)} characters; at most {self.domain.max_message_characters} are read"
            )
        pending = PendingDecision(self, order, message, started=time.perf_counter())
        pending.begin()
        return pending


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
