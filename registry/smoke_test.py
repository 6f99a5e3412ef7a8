"""The smoke test: weights answer the domain's example, through the service that would serve them.

What they answer may be escalated: that is for the gate to judge. Here it is enough that the model was asked, and wrote.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from twinloop.common.errors import UserError
from twinloop.domains.domain import Domain, Message
from twinloop.domains.examples import example_messages, example_request, scored_example
from twinloop.models.config import kind_of
from twinloop.models.label_tokenizer import load_answering
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.decisions import DecisionResponse, DecisionService, ModelInfo
from twinloop.serving.engine import Engine
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.serving.engine.scheduler import Scheduler
from twinloop.serving.errors import describe_validation, field_descriptions
from twinloop.serving.generation import TextStream
from twinloop.serving.knowledge.documents import DocumentStore
from twinloop.serving.metrics import CHAT, CLASSIFY, DECISIONS

GREETING_TOKENS = 16


@dataclass(frozen=True)
class SmokeTest:
    """What was asked, and what came: a decision, or the text of a chat."""

    request: Mapping[str, Any]
    decision: DecisionResponse | None
    text: str

    def __str__(self) -> str:
        return f"{json.dumps(dict(self.request), ensure_ascii=False)}: {self.text}"


def example_call(domain: Domain, labels: Sequence[str] = ()) -> tuple[str, dict[str, Any]]:
    """The route and the body with which a server of this domain is asked for an answer. labels: of the model's head."""
    if kind_of(labels) == "reward":
        return CLASSIFY, {"input": scored_example(domain)}
    if labels and domain.request is None:
        return CLASSIFY, {"input": example_messages(domain)}
    if domain.request is None:
        return CHAT, example_request(domain) | {"max_tokens": GREETING_TOKENS}
    return DECISIONS, example_request(domain)


def smoke_test(exported: Path, domain: Domain) -> SmokeTest:
    """Load an exported model and let it answer. Raises UserError, or whatever breaks, if it does not."""
    return smoke_test_engine(Engine.load(exported, slots=1), load_answering(exported), domain, exported)


def smoke_test_engine(engine: Engine, tokenizer: ChatTokenizer, domain: Domain, exported: Path) -> SmokeTest:
    """As `smoke_test`, with an engine that nobody else uses yet."""
    scheduler = Scheduler(engine)
    try:
        if tokenizer.kind == "reward":
            return _score(scheduler, tokenizer, scored_example(domain), exported)
        if domain.request is None:
            return _chat(scheduler, tokenizer, example_messages(domain), exported)
        return _decide(scheduler, tokenizer, domain, exported)
    finally:
        scheduler.close()


def _decide(scheduler: Scheduler, tokenizer: ChatTokenizer, domain: Domain, exported: Path) -> SmokeTest:
    assert domain.request is not None
    example = example_request(domain)
    try:
        request = domain.request.model_validate_json(json.dumps(example))
    except ValidationError as error:
        problem, _ = describe_validation(error.errors(), field_descriptions(domain.request))
        raise UserError(f"domain {domain.name}: its example is no request ({problem}); set `example`") from None
    with tempfile.TemporaryDirectory() as folder:
        documents = DocumentStore(Path(folder) / "documents.db", domain.check_document)
        documents.seed(domain.example_documents)
        model = ModelInfo(name="smoke test", version="", digest="")
        response = DecisionService(scheduler, tokenizer, documents, model, domain).decide(request)
        documents.close()
    reasons = "; ".join(f"{reason.predicate}: {reason.reason}" for reason in response.reasons)
    if response.timings.ttft_ms is None or any(reason.predicate == "generation" for reason in response.reasons):
        raise UserError(f"{exported}: it loads and answers nothing ({reasons})")
    passed = f"{json.dumps(response.decision, ensure_ascii=False)}, all checks passed"
    return SmokeTest(example, response, f"escalated: {reasons}" if response.escalated else passed)


def _score(scheduler: Scheduler, tokenizer: ChatTokenizer, messages: list[Message], exported: Path) -> SmokeTest:
    tokens = tokenizer.encode_answered(messages)
    if len(tokens) >= scheduler.max_length:
        raise UserError(f"{exported}: it loads and answers nothing (its example has more tokens than it can read)")
    score = float(scheduler.submit(tokens, SamplingParams(max_tokens=1)).prompt_logits()[0])
    if not math.isfinite(score):
        raise UserError(f"{exported}: it loads and gives no score")
    return SmokeTest({"messages": messages}, None, f"score {score:.4g}")


def _chat(scheduler: Scheduler, tokenizer: ChatTokenizer, messages: list[Message], exported: Path) -> SmokeTest:
    prompt = tokenizer.encode_prompt(messages)
    available = scheduler.max_length - len(prompt)
    if available < 1:
        raise UserError(f"{exported}: it loads and answers nothing (its example has more tokens than it can read)")
    params = SamplingParams(max_tokens=min(GREETING_TOKENS, available), stop=tokenizer.stop_ids)
    text = TextStream(scheduler.submit(prompt, params), tokenizer, started=time.perf_counter())
    answer = "".join(text)
    if not text.completion_tokens:
        raise UserError(f"{exported}: it loads and answers nothing")
    return SmokeTest({"messages": messages}, None, json.dumps(answer, ensure_ascii=False))
