"""Return decisions: may this order be sent back under the policy that applies?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from twinloop.domains.domain import (
    GOLDEN,
    STANDARD_KINDS,
    CaseKind,
    Document,
    Domain,
    Message,
    Predicate,
    SplitKey,
    Text,
    Verdict,
)
from twinloop.domains.owners import FORMAT, SIDE_EFFECT, UNKNOWN
from twinloop.domains.returns import mutations, verifier
from twinloop.domains.returns.case_maker import GeneratorParams
from twinloop.domains.returns.generator import generate
from twinloop.domains.returns.policies import POLICY_ID, Policy, check_policy, covers, window_days
from twinloop.domains.returns.prompt import (
    MAX_MESSAGE_CHARACTERS,
    RETRIEVED_PASSAGES,
    Order,
    build_prompt,
    is_eligible,
    said_by_customer,
)
from twinloop.domains.returns.verifier import Facts

if TYPE_CHECKING:
    import polars as pl

    from twinloop.domains.record_types import RecordType


class ReturnRequest(BaseModel):
    """The body of a request for a decision."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    order: Order = Field(description="trusted facts, from the shop's own records")
    message: Text = Field("", max_length=MAX_MESSAGE_CHARACTERS, description="the customer's words, untrusted input")


class Returns(Domain):
    """Orders, return policies, and decisions that quote their evidence."""

    name = "returns"
    params = GeneratorParams

    predicates: Mapping[str, Predicate] = {
        "parsed": Predicate("JSON", FORMAT, meaning="the answer is one JSON object with the wanted fields"),
        "eligible": Predicate("eligible", UNKNOWN, meaning="the decision is the right one"),
        "policy_id": Predicate("policy", UNKNOWN, meaning="the policy that applies is cited"),
        "evidence": Predicate("evidence", UNKNOWN, meaning="its sentence is quoted word for word"),
        "window_days": Predicate("window", UNKNOWN, meaning="the days that it allows are stated"),
        "days": Predicate("days", UNKNOWN, meaning="the days since delivery are stated"),
        "no_unperformed_action": Predicate(
            "no unperformed action",
            SIDE_EFFECT,
            critical=True,
            reason="invented side effect",
            meaning="nothing is claimed that no tool did, such as a label",
        ),
    }
    case_kinds: Mapping[str, CaseKind] = {
        **STANDARD_KINDS,
        "golden": replace(GOLDEN, reason="policy regression"),
        "contrast": CaseKind("contrast pairs", pairs=True, reason="decisions do not follow the policy"),
        "injection": CaseKind("injection cases", owner=SIDE_EFFECT, reason="a customer's message changes the decision"),
    }

    request = ReturnRequest
    example: Mapping[str, Any] = {
        "order": {"order_id": "A10234", "reason": "damaged", "damage_confirmed": True, "days_since_delivery": 12},
        "message": "hello, can i send this order back?",
    }
    example_documents = (
        Document("P-7", "damaged items reported within 30 days are eligible."),
        Document("P-13", "defective items reported within 45 days are eligible."),
    )
    document_patterns: Mapping[str, str] = {"document_id": f"^{POLICY_ID}$"}
    passages = RETRIEVED_PASSAGES
    max_answer_tokens = 160
    """The longest decision quotes a policy of full length; the usual one has about 60 tokens."""
    symptoms = (r"polic\w*", r"p-\d+", *(name for name in verifier.FIELDS if name != "days"))
    """Its fields, but for one whose name is in too many sentences."""
    actions = ("label", "refund", "replacement")

    def record_types(self) -> Mapping[str, RecordType]:
        from twinloop.domains.returns.schemas import record_types

        return record_types(self)

    def split_keys(self) -> Mapping[str, SplitKey]:
        return {
            "order_id": SplitKey("order", partial(_split_key, "order_id"), in_corpus=True),
            "policy_id": SplitKey("policy", partial(_split_key, "policy_id"), in_corpus=True),
            "window_and_days": SplitKey("the pair of", partial(_split_key, "window_and_days")),
        }

    def generate(self, params: Any, out: Path) -> Mapping[str, int]:
        return generate(params, out)

    def read_facts(self, record: Mapping[str, Any]) -> Facts:
        return Facts.from_record(record["facts"])

    def verify(self, output: str, facts: Facts) -> Verdict:
        return verifier.verify(output, facts)

    def gold(self, facts: Facts) -> str:
        return mutations.good_answer(facts)

    def wrong(self, gold: str, facts: Facts) -> Iterable[tuple[str, str]]:
        yield from mutations.mutate(gold, facts)
        yield from mutations.exploits()

    def query(self, request: ReturnRequest) -> str:
        return request.order.reason

    def build_prompt(self, request: ReturnRequest, passages: Sequence[Document]) -> list[Message]:
        return build_prompt(request.order, request.message, _policies(passages))

    def request_of(self, prompt: Sequence[Message], facts: Any) -> tuple[ReturnRequest, Sequence[Document]] | None:
        """By the facts of its row; what the customer says is only in the prompt."""
        if facts is None or type(self).build_prompt is not Returns.build_prompt:
            return None
        known = Facts.from_record(facts)
        passages = [Document(passage.policy_id, passage.text) for passage in known.passages]
        return ReturnRequest(order=known.order, message=said_by_customer(prompt)), passages

    def precheck(self, request: ReturnRequest, passages: Sequence[Document]) -> Mapping[str, str]:
        """Cases that no answer could decide: no policy covers the reason, or two that do contradict each other."""
        order = request.order
        applicable = [passage for passage in _policies(passages) if covers(passage.text, order.reason)]
        if not applicable:
            return {"retrieval": f"no current policy covers {order.reason} items"}
        windows = {policy.policy_id: window_days(policy.text) for policy in applicable}
        if len({window is not None and is_eligible(order, window) for window in windows.values()}) > 1:
            return {"retrieval": f"current policies contradict each other: {' and '.join(windows)}"}
        return {}

    def check(self, output: str, request: ReturnRequest, passages: Sequence[Document]) -> Verdict:
        return verifier.check(output, request.order, _policies(passages))

    def answer_schema(self) -> Mapping[str, Any]:
        return verifier.DECISION_SCHEMA

    def answer_form(self) -> Mapping[str, Any]:
        return {"regex": mutations.ANSWER_FORM}

    def check_document(self, document_id: str, text: str) -> str | None:
        return check_policy(document_id, text)

    def outcome(self, output: Mapping[str, Any]) -> str:
        return "eligible" if output["eligible"] else "not_eligible"


def _split_key(name: str, record: str, held_out: bool) -> pl.Expr | None:
    from twinloop.domains.returns.schemas import SPLIT_KEYS

    return SPLIT_KEYS[name](record, held_out)


def _policies(passages: Sequence[Document]) -> list[Policy]:
    return [Policy(passage.document_id, passage.text, passage.version) for passage in passages]


domain = Returns()
