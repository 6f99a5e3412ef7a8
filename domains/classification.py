"""One label for a text: e-mails by department, reviews by sentiment, tickets by urgency.

A project's domain file is a few lines:

    from twinloop.domains.classification import Classification

    domain = Classification(labels=["billing", "delivery", "technical", "account"])

The data are the rows that people have, {"text", "label"}: `classification` for training, `classification_heldout` for
cases. Demonstrations, prompts of RL and cases are made from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from twinloop.common.errors import UserError
from twinloop.domains.domain import (
    Derived,
    Document,
    Domain,
    Judged,
    Message,
    Metric,
    Predicate,
    Text,
    Verdict,
    explained,
)
from twinloop.domains.examples import example_request
from twinloop.domains.metrics import calibration_error, confusion_matrix, macro_f1_of, mean
from twinloop.domains.owners import FORMAT, TRAINING

if TYPE_CHECKING:
    from twinloop.domains.record_types import RecordType

NEEDS = (
    "it needs your labels: write `domain = Classification(labels=[...])` in a file of yours, and name that, such as "
    "./tickets.py (`twinloop init` makes one)"
)
"""The error for a recipe that names this module itself."""

MAX_TEXT_CHARACTERS = 4000
"""Of a request: a longer text fits no small model's context, and would be refused there with a less clear reason."""

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)


class TextRequest(BaseModel):
    """The body of a request for a label."""

    model_config = _STRICT

    text: Text = Field(min_length=1, max_length=MAX_TEXT_CHARACTERS, description="the text, untrusted input")


def _pairs(case: Judged) -> list[tuple[str, str | None]]:
    """The right label and the answered one, of every answer."""
    return [(case.facts.label, verdict.output) for verdict in case.verdicts]


def _share_right(case: Judged) -> float:
    pairs = _pairs(case)
    return sum(right == said for right, said in pairs) / len(pairs)


class Classification(Domain):
    """Texts and their labels. An answer is right only when it is the label, and nothing else."""

    name = "classification"
    predicates: Mapping[str, Predicate] = {
        "parsed": Predicate("one label", FORMAT, meaning="the answer is one of the labels, and nothing else"),
        "label": Predicate("right label", TRAINING, meaning="it is the label of the text"),
    }
    metrics: Mapping[str, Metric] = {
        "accuracy": Metric("accuracy", share=True, of=mean(_share_right)),
        "macro_f1": Metric("macro F1", share=True, of=macro_f1_of(_pairs)),
        "calibration_error": calibration_error(),
    }
    request = TextRequest

    def __init__(self, labels: Sequence[str], *, instruction: str | None = None, example: str | None = None) -> None:
        """labels: what the model may answer. instruction: the system message; by default it lists the labels.

        example: a text that shows what one looks like, and that the model must be able to label before it is served.
        Raises UserError for labels that cannot be distinguished.
        """
        self.labels = tuple(labels)
        if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels):
            raise UserError(f"classification: labels {list(self.labels)}: give at least two, each once")
        if wrong := [label for label in self.labels if not label or label != label.strip()]:
            raise UserError(f"classification: label {wrong[0]!r} is empty or has spaces around it")
        self.instruction = instruction or f"answer with one label: {', '.join(self.labels)}"
        self.example = {} if example is None else {"text": example}
        label: Any = Literal[self.labels]
        self.facts = create_model("LabelFacts", __config__=_STRICT, label=(label, ...))
        self.max_answer_tokens = 16 + max(len(label.encode()) for label in self.labels)

    # --- data

    def record_types(self) -> Mapping[str, RecordType]:
        from twinloop.domains.record_types import classification

        # the leakage check looks at what is made from it
        example = {**example_request(self), "label": self.labels[0]}
        own = replace(classification(self.labels), split=None, examine=self._examine, example=example)
        held_out = replace(own, name="classification_heldout", about="As classification, held out to measure on.")
        return {**super().record_types(), own.name: own, held_out.name: held_out}

    def derived(self) -> Mapping[str, Derived]:
        return {
            "chat": Derived("classification", self._demonstration),
            "prompts": Derived("classification", self._prompt),
            "cases": Derived("classification_heldout", self._case),
        }

    def _examine(self, row: Mapping[str, Any]) -> str | None:
        """A text that the server would refuse."""
        try:
            self.request_of_row(row)
        except ValidationError as error:
            return explained(error)
        return None

    def request_of_row(self, row: Mapping[str, Any]) -> Any:
        """The request for a row of the data; override it where yours has other fields."""
        return self.request(text=row["text"])

    def _demonstration(self, row: Mapping[str, Any], line: int) -> dict[str, Any]:
        prompt = self._prompt(row, line)
        answer = {"role": "assistant", "content": row["label"]}
        return {"messages": [*prompt["prompt"], answer], "facts": prompt["facts"]}

    def _prompt(self, row: Mapping[str, Any], line: int) -> dict[str, Any]:
        return {"prompt": self.build_prompt(self.request_of_row(row), ()), "facts": {"label": row["label"]}}

    def _case(self, row: Mapping[str, Any], line: int) -> dict[str, Any]:
        case = {"case_id": f"held-out-{line}", "kind": "held_out", "pair_id": None}
        return {**case, **self._prompt(row, line)}

    def _messages(self, text: str) -> list[Message]:
        return [{"role": "system", "content": self.instruction}, {"role": "user", "content": text}]

    # --- judging

    def verify(self, output: str, facts: Any) -> Verdict:
        """facts: `label`, the right one."""
        if output not in self.labels:
            checks = {"parsed": False, "label": False}
            return Verdict.unparsed(checks, f"not one of the labels {', '.join(self.labels)}")
        right = output == facts.label
        reasons = {} if right else {"label": f"the label is {facts.label}, not {output}"}
        return Verdict.of({"parsed": True, "label": right}, output=output, reasons=reasons)

    def report(self, judged: Sequence[Judged]) -> Mapping[str, Any]:
        """By the right label: `confusion`, how often each label was answered, and `no_label`, how often none was."""
        matrix = confusion_matrix([pair for case in judged for pair in _pairs(case)])
        rows = {label: matrix.get(label, {}) for label in self.labels}
        return {
            "confusion": {label: {answer: row.get(answer, 0) for answer in self.labels} for label, row in rows.items()},
            "no_label": {label: row.get(None, 0) for label, row in rows.items()},
        }

    def gold(self, facts: Any) -> str:
        label: str = facts.label
        return label

    def wrong(self, gold: str, facts: Any) -> Iterable[tuple[str, str]]:
        for label in self.labels:
            if label != gold:
                yield "other label", label
        tried = {
            "another case": [gold.upper(), gold.lower(), gold.title()],
            "label and text": [f"{gold}.", f"{gold} is the label", f"label: {gold}", f"the text is about {gold}"],
            "white space around": [f" {gold}", f"{gold}\n"],
            "label twice": [f"{gold} {gold}", f"{gold}\n{gold}"],
            "label in JSON": [f'{{"label": "{gold}"}}', f'"{gold}"'],
            "part of the label": [gold[:-1]],
            "empty": ["", " ", "\n"],
            "all labels": [", ".join(self.labels), "\n".join(self.labels), " ".join(self.labels)],
            "right label first": [", ".join([gold, *(label for label in self.labels if label != gold)])],
            "instruction repeated": [self.instruction],
        }
        for name, outputs in tried.items():
            yield from ((name, output) for output in outputs if output != gold)

    # --- serving

    def build_prompt(self, request: TextRequest, passages: Sequence[Document]) -> list[Message]:
        return self._messages(request.text)

    def text_prompt(self, text: str) -> list[Message]:
        return self.build_prompt(self.request_of_row({"text": text}), ())

    def request_of(self, prompt: Sequence[Message], facts: Any) -> tuple[TextRequest, Sequence[Document]]:
        return TextRequest(text=prompt[-1]["content"]), ()

    def check(self, output: str, request: TextRequest, passages: Sequence[Document]) -> Verdict:
        """Whether it is a label: which one is right, the server does not know."""
        if output not in self.labels:
            return Verdict.unparsed({"parsed": False}, f"not one of the labels {', '.join(self.labels)}")
        return Verdict.of({"parsed": True}, output=output)

    def answer_schema(self) -> Mapping[str, Any]:
        return {"type": "string", "enum": list(self.labels)}

    def answer_form(self) -> Mapping[str, Any]:
        return {"choice": list(self.labels)}

    def outcome(self, output: str) -> str:
        return output
