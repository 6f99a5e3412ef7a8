"""The proof that weights answer: the example order, decided through the service that would serve it.

What it answers may be escalated: that is for the gate to judge. Here it is enough that the model was asked, and spoke.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from twinloop.common.errors import UserError
from twinloop.domains.returns.policies import Policy
from twinloop.domains.returns.prompt import Order
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.decisions import DecisionResponse, DecisionService, ModelInfo
from twinloop.serving.engine import Engine
from twinloop.serving.engine.scheduler import Scheduler
from twinloop.serving.retrieval import PolicyIndex
from twinloop.serving.returns import RETURNS

EXAMPLE_ORDER: dict[str, Any] = {
    "order_id": "A10234",
    "reason": "damaged",
    "damage_confirmed": True,
    "days_since_delivery": 12,
}
EXAMPLE_MESSAGE = "hello, can i send this order back?"
EXAMPLE_POLICIES = (
    Policy("P-7", "damaged items reported within 30 days are eligible."),
    Policy("P-13", "defective items reported within 45 days are eligible."),
)


def prove_answers(bundle: Path) -> DecisionResponse:
    """Load a bundle and let it answer. Raises UserError, or whatever breaks, if it does not."""
    return prove(Engine.load(bundle, slots=1), ChatTokenizer.load(bundle), bundle)


def prove(engine: Engine, tokenizer: ChatTokenizer, bundle: Path) -> DecisionResponse:
    """As `prove_answers`, with an engine that nobody else uses yet."""
    scheduler = Scheduler(engine)
    try:
        with tempfile.TemporaryDirectory() as folder:
            index = PolicyIndex(Path(folder) / "policies.jsonl")
            index.seed(EXAMPLE_POLICIES)
            model = ModelInfo(name="proof", version="", digest="")
            service = DecisionService(scheduler, tokenizer, index, model, RETURNS)
            response = service.decide(Order(**EXAMPLE_ORDER), EXAMPLE_MESSAGE)
    finally:
        scheduler.close()
    if response.timings.ttft_ms is None or any(reason.predicate == "generation" for reason in response.reasons):
        told = "; ".join(reason.reason for reason in response.reasons)
        raise UserError(f"{bundle}: it loads and answers nothing ({told})")
    return response
