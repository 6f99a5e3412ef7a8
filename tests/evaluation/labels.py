"""A second, small domain: one label for a text. What a task of one's own looks like to evaluation and gate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from twinloop.domains.domain import STANDARD_KINDS, CaseKind, Domain, Judged, Metric, Predicate, Verdict
from twinloop.domains.metrics import accuracy, confusion_matrix, macro_f1, pass_at_k
from twinloop.domains.owners import FORMAT, RELEASE, TRAINING

KNOWN = ("billing", "delivery", "spam")


class Labels(Domain):
    """Facts are the right label."""

    name = "labels"
    predicates: Mapping[str, Predicate] = {
        "parsed": Predicate("one label", FORMAT),
        "label": Predicate("right label", TRAINING),
        "keeps_customers": Predicate("no customer called spam", RELEASE, critical=True, reason="a customer is lost"),
    }
    case_kinds: Mapping[str, CaseKind] = {**STANDARD_KINDS, "twins": CaseKind("near twins", pairs=True)}
    metrics: Mapping[str, Metric] = {
        "accuracy": Metric("accuracy", share=True),
        "macro_f1": Metric("macro F1"),
        "pass_at_2": Metric("pass@2"),
        "bias": Metric("bias towards one label", bound="at most"),
    }

    def verify(self, output: str, facts: str) -> Verdict:
        kept = facts == "spam" or output != "spam"
        if output not in KNOWN:
            return Verdict.unparsed({"parsed": False, "label": False, "keeps_customers": kept}, "no known label")
        return Verdict.of({"parsed": True, "label": output == facts, "keeps_customers": kept}, output=output)

    def measure(self, judged: Sequence[Judged]) -> Mapping[str, float]:
        matrix = confusion_matrix([(case.facts, case.verdicts[0].output) for case in judged])
        measured = {"accuracy": accuracy(matrix), "macro_f1": macro_f1(matrix)}
        if all(len(case.verdicts) > 1 for case in judged):
            passed = [[verdict.passed for verdict in case.verdicts] for case in judged]
            measured["pass_at_2"] = sum(pass_at_k(len(one), sum(one), 2) for one in passed) / len(passed)
        return measured

    def reference(self, expected: Mapping[str, Any]) -> str | None:
        return expected.get("answer")

    def gold(self, facts: str) -> str:
        return facts

    def wrong(self, gold: str, facts: str) -> Iterable[tuple[str, str]]:
        yield from (("other label", label) for label in KNOWN if label != gold)
        yield "empty", ""


domain = Labels()
