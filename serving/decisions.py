"""One decision: find the documents, ask the model, check its answer, and return it or escalate.

Nothing that the model writes is returned before the domain's own checks have passed. Whatever goes wrong on the way
ends in the same place: `decision` is null, and the answer gives the reason and the layer that owns it.
"""

from __future__ import annotations

import copy
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic_core import to_json

from twinloop.domains.domain import Document, Domain, Verdict
from twinloop.domains.owners import FORMAT, LATENCY, RETRIEVAL
from twinloop.models.config import Kind
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.answer_form import form_grammar, stated_form
from twinloop.serving.engine.adapters import LoadedAdapter
from twinloop.serving.engine.grammar import Grammars
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.serving.engine.scheduler import Place, QueueFullError, Scheduler
from twinloop.serving.generation import GivenUpError, TextStream
from twinloop.serving.knowledge.documents import DocumentStore, DocumentStoreError, SearchResult
from twinloop.serving.tools import ToolSupport
from twinloop.serving.traces import TraceStore

log = logging.getLogger(__name__)

OWNERS = {"retrieval": RETRIEVAL, "prompt": FORMAT, "generation": LATENCY, "check": LATENCY}
"""Who owns what fails before and around the domain's own predicates."""


ESCALATED = "escalated"
"""The outcome of a request without a decision."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelInfo(_Frozen):
    """Which weights answer. `digest` is that of the served exported model's content."""

    name: str
    version: str
    digest: str


class Passage(_Frozen):
    """A document as it appears in answers."""

    document_id: str
    version: int
    text: str

    @classmethod
    def of(cls, document: Document) -> Passage:
        return cls(document_id=document.document_id, version=document.version, text=document.text)


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
    """The answer to `POST /v1/decisions`. Either there is a decision, in the domain's own form, or it is escalated.

    checks: the domain's own, of what the model wrote, and whether each holds; none where the model was not asked.
    """

    decision: Any
    escalated: bool
    reasons: list[Reason]
    checks: dict[str, bool]
    passages: list[Passage]
    model: ModelInfo
    timings: Timings
    trace_id: str


class DecisionTrace(_Frozen):
    """All that an answer was made from. `trace_id` comes first: the trace store finds lines by it.

    index_digest is that of the documents; None where none were searched.
    """

    trace_id: str
    time: str
    request: dict[str, Any]
    passages: list[Passage]
    index_digest: str | None
    prompt_tokens: int
    completion_tokens: int
    output_text: str | None
    checks: dict[str, bool]
    decision: Any
    escalated: bool
    reasons: list[Reason]
    model: ModelInfo
    timings: Timings


@dataclass(frozen=True)
class _Review:
    """What came of asking the model."""

    output_text: str | None
    verdict: Verdict | None
    failures: Mapping[str, str]


class PendingDecision:
    """A request whose prompt waits in the scheduler's queue, or that is escalated already."""

    def __init__(self, service: DecisionService, request: BaseModel, started: float, priority: int):
        self._service, self._request = service, request
        self._started, self._priority = started, priority
        self._found: SearchResult | None = None
        self._retrieval_s = 0.0
        self._prompt_tokens = 0
        self._text: TextStream | None = None
        self._failures: Mapping[str, str] = {}
        self.outcome = ESCALATED
        """The name under which it is counted, once it is finished: the domain's own for its decision."""

    @property
    def texts(self) -> list[TextStream]:
        """What the model was asked for: one text, or none."""
        return [] if self._text is None else [self._text]

    def cancel(self) -> None:
        """Stop generating: nobody waits for the answer any more. May be called from any thread."""
        if self._text is not None:
            self._text.cancel()

    def finish(self) -> DecisionResponse:
        """Wait for the model's answer, check it, keep the trace, and respond."""
        review = self._review()
        service = self._service
        reasons = [
            Reason(predicate=name, reason=words, owner=service.owner(name)) for name, words in review.failures.items()
        ]
        decision = review.verdict.output if review.verdict is not None and not reasons else None
        text = self._text
        timings = Timings(
            retrieval_ms=_milliseconds(self._retrieval_s),
            queue_ms=_milliseconds(text.timings.queue_s) if text and text.timings.queue_s is not None else None,
            ttft_ms=_milliseconds(text.ttft_s) if text and text.ttft_s is not None else None,
            total_ms=_milliseconds(time.perf_counter() - self._started),
        )
        response = DecisionResponse(
            decision=decision,
            escalated=decision is None,
            reasons=reasons,
            checks=dict(review.verdict.checks) if review.verdict is not None else {},
            passages=[Passage.of(document) for document in self._passages],
            model=service.model,
            timings=timings,
            trace_id=uuid.uuid4().hex,
        )
        if service.traces is not None:
            service.traces.record(response.trace_id, self._trace(response, review))
        return response

    @property
    def _passages(self) -> list[Document]:
        return self._found.documents if self._found is not None else []

    def _review(self) -> _Review:
        if self._failures or self._text is None:
            return _Review(None, None, self._failures)
        try:
            self._text.wait()
            output = "".join(self._text)
        except GivenUpError as error:
            return _Review(None, None, {"generation": str(error)})
        except Exception as error:  # one broken request must not look like a decision, whatever broke it
            log.exception("generation failed")
            return _Review(None, None, {"generation": f"the model could not answer ({type(error).__name__})"})
        try:
            domain = self._service.domain
            verdict = domain.check(output, self._request, self._passages)
            failures = self._service.failures(verdict)
            if not failures:
                to_json(verdict.output)  # raises for a decision that cannot be sent
                self.outcome = domain.outcome(verdict.output)
            return _Review(output, verdict, failures)
        except Exception as error:  # an answer that could not be checked is not returned
            log.exception("check failed")
            return _Review(output, None, {"check": f"the answer could not be checked ({type(error).__name__})"})

    def _trace(self, response: DecisionResponse, review: _Review) -> DecisionTrace:
        return DecisionTrace(
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
            request=self._request.model_dump(mode="json"),
            index_digest=self._found.digest if self._found is not None else None,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._text.completion_tokens if self._text is not None else 0,
            output_text=review.output_text,
            **{name: getattr(response, name) for name in DecisionResponse.model_fields},
        )

    def begin(self) -> None:
        """Retrieve, and hand the prompt to the scheduler, unless something already speaks against asking."""
        with self._service.reserve() as place:  # a request that must be refused costs no more than this
            self._prepare(place)

    def _prepare(self, place: Place) -> None:
        try:
            self._retrieve()
            self._failures = self._service.domain.precheck(self._request, self._passages)
            if not self._failures:
                self._ask(place)
        except QueueFullError:
            raise
        except DocumentStoreError as error:
            log.error("%s", error)
            self._failures = {"retrieval": error.reason}
        except Exception as error:  # as in _review
            log.exception("the model could not be asked")
            self._failures = {"generation": f"the model could not be asked ({type(error).__name__})"}

    def _retrieve(self) -> None:
        service = self._service
        query = service.domain.query(self._request)
        if query is not None and service.domain.passages:
            try:
                self._found = service.documents.find(query, service.domain.passages)
            finally:
                self._retrieval_s = time.perf_counter() - self._started

    def _ask(self, place: Place) -> None:
        service, domain = self._service, self._service.domain
        prompt = service.tokenizer.encode_prompt(domain.build_prompt(self._request, self._passages))
        self._prompt_tokens = len(prompt)
        available = service.scheduler.max_length - len(prompt)
        if available < 1:
            limit = service.scheduler.max_length
            words = f"the request has {len(prompt)} tokens, too many for this model to read (at most {limit - 1})"
            self._failures = {"prompt": words}
            return
        params = SamplingParams(
            max_tokens=min(domain.max_answer_tokens, available),
            stop=service.tokenizer.stop_ids,
            constraint=service.answer_grammar,
        )
        (stream,) = place.submit(prompt, params, priority=self._priority)
        self._text = TextStream(stream, service.tokenizer, started=self._started)


class DecisionService:
    """Answers requests of one domain with one frozen model. Safe for many threads."""

    def __init__(
        self,
        scheduler: Scheduler,
        tokenizer: ChatTokenizer,
        documents: DocumentStore,
        model: ModelInfo,
        domain: Domain,
        traces: TraceStore | None = None,
        measured_documents: str | None = None,
    ):
        """measured_documents: `contents_digest` of those that the model was evaluated with; None: it is not known.

        Raises UserError for a domain whose `answer_form` cannot be kept to.
        """
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.grammars = Grammars(tokenizer)
        self.answer_grammar = form_grammar(stated_form(domain), tokenizer, self.grammars)
        self.tool_support = ToolSupport(tokenizer)
        self.documents = documents
        self.model = model
        self.domain = domain
        self.traces = traces
        self.measured_documents = measured_documents
        self.id = model.name
        """What requests call it, and answers and metrics too."""
        self._load_adapter: Callable[[], LoadedAdapter | None] = lambda: None  # the model's own, where it has one

    @property
    def kind(self) -> Kind:
        """What the model gives."""
        return self.tokenizer.kind

    def with_adapter(self, id: str, model: ModelInfo, load: Callable[[], LoadedAdapter]) -> DecisionService:
        """The same service with another adapter on the same base: the model that requests call `id`.

        load: is asked for it by each request that takes places, so that one that was refused before loads nothing.
        """
        named = copy.copy(self)
        named.id, named.model, named._load_adapter = id, model, load
        return named

    def reserve(self, answers: int = 1) -> Place:
        """Places in the queue, as `Scheduler.reserve`, for answers of this model; its adapter is loaded once they are
        taken. Raises as that and as what loads it."""
        with ExitStack() as stack:
            place = stack.enter_context(self.scheduler.reserve(answers))
            place.use(self._load_adapter())
            stack.pop_all()
        return place

    @property
    def documents_differ(self) -> bool:
        """Whether answers are given from other documents than the model was evaluated with. Raises
        DocumentStoreError."""
        known = self.measured_documents
        return known is not None and self.documents.contents() != known

    def decide(self, request: BaseModel) -> DecisionResponse:
        """Decide one case, or escalate it. request: of the domain's own model.

        Raises QueueFullError when the scheduler takes no more.
        """
        return self.begin(request).finish()

    def begin(self, request: BaseModel, *, priority: int = 0) -> PendingDecision:
        """Retrieve and queue a case; `finish()` waits for its answer, `cancel()` gives it up. priority: of those that
        wait, the lowest is next. Raises like `decide`."""
        pending = PendingDecision(self, request, time.perf_counter(), priority)
        pending.begin()
        return pending

    def failures(self, verdict: Verdict) -> dict[str, str]:
        """Why an answer may not be returned, by check; empty where it passed."""
        if verdict.passed and verdict.output is not None:
            return {}
        failed = verdict.failed if verdict.parsed else ("parsed",)  # of an answer without form nothing else is said
        titles = {name: predicate.title for name, predicate in self.domain.predicates.items()}
        reasons = {name: f"{titles.get(name, name)}: does not hold" for name in failed} | {**verdict.reasons}
        return reasons or {"check": "the answer did not pass the domain's check"}

    def owner(self, check: str) -> str:
        """The layer that owns a failed check."""
        predicate = self.domain.predicates.get(check)
        return (predicate.owner if predicate is not None else OWNERS.get(check, LATENCY)).name


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
