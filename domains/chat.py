"""Chat: messages in, the assistant's next message out.

The data are `chat` rows {"messages"} for training and `chat_heldout` rows for held-out perplexity. Where a `cases` file
is given instead, a case whose `expected` holds an `answer` passes only when the model answers exactly that; one with a
`reference` is for perplexity, BLEU and chrF. `domain: chat` is ready to use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from twinloop.domains.domain import STANDARD_KINDS, CaseKind, Derived, Domain, Metric, Predicate, Verdict
from twinloop.domains.metrics import bleu, chrf, exact_match
from twinloop.domains.owners import FORMAT, TRAINING

if TYPE_CHECKING:
    from twinloop.domains.record_types import RecordType


class Expected(BaseModel):
    """answer: what must be answered, word for word. reference: one good answer of many."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    answer: str | None = Field(None, description="word for word", examples=["A ticket costs 12 euros."])
    reference: str | None = Field(None, description="one good answer of many, for perplexity, BLEU and chrF")


class Chat(Domain):
    """An assistant that is only asked through `/v1/chat/completions`: it makes no decisions."""

    name = "chat"
    expected = Expected
    predicates: Mapping[str, Predicate] = {
        "parsed": Predicate("answered", FORMAT, meaning="the answer is not empty"),
        "answer": Predicate("expected answer", TRAINING, meaning="it is the expected one, where the case names one"),
    }
    case_kinds: Mapping[str, CaseKind] = {
        **STANDARD_KINDS,
        "reference": CaseKind("held-out conversations, each answered", owner=FORMAT, reason="answers nothing"),
    }
    metrics: Mapping[str, Metric] = {"exact_match": exact_match(), "bleu": bleu(), "chrf": chrf()}
    chat = True

    def record_types(self) -> Mapping[str, RecordType]:
        types = super().record_types()
        about = "Conversations held out to measure on: each answer is the reference of a case."
        return {**types, "chat_heldout": replace(types["chat"], name="chat_heldout", split=None, about=about)}

    def derived(self) -> Mapping[str, Derived]:
        return {"cases": Derived("chat_heldout", self._case)}

    def _case(self, row: Mapping[str, Any], line: int) -> dict[str, Any]:
        *prompt, answer = row["messages"]
        expected = {"answer": None, "reference": answer["content"]}
        return {
            "case_id": f"held-out-{line}",
            "kind": "reference",
            "pair_id": None,
            "prompt": prompt,
            "expected": expected,
        }

    def read_facts(self, record: Mapping[str, Any]) -> str | None:
        """The expected answer of a case; None where any will do."""
        return Expected.model_validate(record["expected"]).answer

    def reference(self, expected: Mapping[str, Any]) -> str | None:
        return expected.get("reference") or expected.get("answer")

    def verify(self, output: str, facts: str | None) -> Verdict:
        """White space around an answer does not matter."""
        said = output.strip()
        if not said:
            return Verdict.unparsed({"parsed": False, "answer": False}, "answered nothing")
        right = facts is None or said == facts.strip()
        reasons = {} if right else {"answer": f"expected {facts!r}"}
        return Verdict.of({"parsed": True, "answer": right}, output=said, reasons=reasons)


domain = Chat()
