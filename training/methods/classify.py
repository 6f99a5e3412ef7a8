"""Classification (Radford et al., 2018): a head gives each label a score at the last token of the prompt, and what it
gives to the right label's softmax is raised. The network below it learns too.

`head: labels` starts at 0 for every label. `head: words` starts as the vocabulary's rows of the labels' first tokens,
so that the network begins with what it would answer: for a base that was trained to write labels, or a large one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from twinloop.common.errors import UserError
from twinloop.domains.domain import Domain, domain_code
from twinloop.training.runtime import Runtime
from twinloop.training.settings import HeadSettings

if TYPE_CHECKING:
    from twinloop.models.decoder import Decoder
    from twinloop.models.tokenizer import ChatTokenizer
    from twinloop.training.objectives import ClassifierLoss
    from twinloop.training.stream import BatchStream

RECORDS = "prompts"
HEAD = "labels"
USES_DOMAIN = True
SHOWN = ("accuracy",)


class ClassifySettings(HeadSettings):
    head: Literal["labels", "words"] = "labels"


Settings = ClassifySettings


def check(settings: ClassifySettings, tokenizer: ChatTokenizer, domain: Domain) -> None:
    """Raises UserError where the domain has no labels, and where the first words of two cannot be told apart."""
    if not domain.labels:
        raise UserError(f"the domain {domain.name} has no labels; derive it from Classification")
    if settings.head == "words":
        _first_tokens(domain.labels, tokenizer)


def build(
    records: Iterable[dict[str, Any]],
    model: Decoder,
    tokenizer: ChatTokenizer,
    settings: ClassifySettings,
    runtime: Runtime,
    domain: Domain,
) -> tuple[ClassifierLoss, BatchStream]:
    from twinloop.training.heads import attach_head
    from twinloop.training.objectives import ClassifierLoss
    from twinloop.training.stream import BatchStream
    from twinloop.training.tree import labelled

    check(settings, tokenizer, domain)
    texts = [
        labelled(tokenizer.encode_prompt(record["prompt"]), _label(domain, record, number))
        for number, record in enumerate(records, 1)
    ]
    ends = {int(text.segments[0].tokens[-1]) for text in texts}
    words = _first_tokens(domain.labels, tokenizer) if settings.head == "words" else None
    attach_head(model, domain.labels, tokenizer, ends, words=words)
    batches = BatchStream.of_epochs(texts, settings, seed=runtime.seed)
    return ClassifierLoss(), batches


def _label(domain: Domain, record: dict[str, Any], number: int) -> int:
    with domain_code(domain, "gold", f"prompt {number}"):
        return list(domain.labels).index(domain.gold(domain.read_facts(record)))


def _first_tokens(labels: Sequence[str], tokenizer: ChatTokenizer) -> list[int]:
    """Raises UserError where two labels begin with the same token."""
    found: dict[int, str] = {}
    for label in labels:
        first = tokenizer.encode_answer(label)[0]
        if first in found:
            raise UserError(f"head: words: {found[first]} and {label} begin with the same token; take head: labels")
        found[first] = label
    return list(found)
