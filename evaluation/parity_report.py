"""What was measured of the forms of a release, as it is kept and as the gate reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

REFERENCE, LLAMA_CPP = "network", "llama.cpp"
FORMS = (REFERENCE, "merged", "fp32", "fp16", "bf16", "int8", "int4", "gguf", LLAMA_CPP)
"""Names of forms: the trained network, with its adapter beside it where it has one; with the adapter merged into it;
exported (ONNX) in each precision; and as GGUF, by our own reader and by llama.cpp."""


@dataclass(frozen=True)
class Limited:
    """A field of FormParity that a gate may limit. title: of its column. bound, allowed: of a limit. reason: why a form
    beyond it blocks."""

    title: str
    bound: Literal["at least", "at most"]
    allowed: Literal["share", "count", "positive"]
    reason: str


LIMITED: Mapping[str, Limited] = {
    "tokens": Limited("tokens alike", "at least", "share", "this form chooses other tokens than the network"),
    "logit_gap": Limited("logit gap", "at most", "positive", "this form computes other logits than the network"),
    "verdict_changes": Limited("verdicts changed", "at most", "count", "answers of this form get another verdict"),
    "prompt_changes": Limited(
        "prompts changed", "at most", "count", "this form's tokenizer or template writes other tokens"
    ),
    "stop_changes": Limited(
        "stop token changed", "at most", "count", "this form's stop token is not the one that was trained"
    ),
    "stopped": Limited("ended", "at least", "share", "answers of this form do not end with its stop token"),
}
"""By the name of the field."""


def show_field(field: str, value: float) -> str:
    """A measured field as people read it."""
    allowed = LIMITED[field].allowed
    if allowed == "share":
        return f"{100 * value:.2f}".removesuffix(".00") + "%"
    return f"{value:.2g}" if allowed == "positive" else f"{value:.0f}"


class FormParity(BaseModel):
    """One form against the reference. None: not measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    form: str
    digest: str
    reference: bool = False
    tokens: float | None
    """Share of the reference's greedy tokens that it would choose too."""
    compared: int
    """Tokens of the reference's answers."""
    logit_gap: float | None
    """Largest difference of any logit, all at once or step by step."""
    verdict_changes: int | None
    """Prompts whose answer passes by one of the two and not by the other. None: nothing judges answers."""
    prompt_changes: int
    """Prompts whose token ids, alone or with their answer, are others by this form's tokenizer and template."""
    stop_changes: int
    """Files of the form that name another stop token than the one that was trained."""
    stopped: float
    """Share of its answers that ended with a stop token of its own."""
    problems: dict[str, tuple[str, ...]] = {}
    """What differs, in words: the first of each field that counts something."""


class ParityReport(BaseModel):
    """Every form that was compared, the reference first. missing: why, of each form that could not be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cases: tuple[str, ...]
    """Their ids."""
    cases_digest: str
    forms: tuple[FormParity, ...]
    missing: dict[str, str] = {}

    def of(self, name: str) -> FormParity | None:
        return next((form for form in self.forms if form.form == name), None)

    def metrics(self) -> dict[str, float]:
        """By form and by what was measured, such as int8/tokens."""
        return {
            f"{form.form}/{name}": float(value)
            for form in self.forms
            for name in LIMITED
            if (value := getattr(form, name)) is not None
        }

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"
