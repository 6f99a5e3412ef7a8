"""What a model is for: the contract between a task and the lifecycle.

A task is one Python module that defines `domain`, an instance of a subclass of `Domain`. Every part has a default; a
stage that needs a part which the domain lacks fails before anything runs. Nothing outside of this package knows more
of a task than what is defined here. Importing a domain must be quick, and needs neither torch nor polars: what does
(`record_types`, a split key's expression, `generate`) is a function that imports it when it is called.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, Field, ValidationError
from pydantic_core import to_json

from twinloop.common.errors import UserError, one_line
from twinloop.domains.judging import (
    GOLDEN,
    HELD_OUT,
    STANDARD_KINDS,
    CaseKind,
    Judged,
    Metric,
    Predicate,
    Statistic,
    Verdict,
)
from twinloop.domains.owners import FORMAT

if TYPE_CHECKING:
    import polars as pl

    from twinloop.domains.record_types import RecordType

__all__ = [
    "GOLDEN",
    "HELD_OUT",
    "MAX_MESSAGES",
    "STANDARD_KINDS",
    "CaseKind",
    "Derived",
    "Document",
    "Domain",
    "Judged",
    "Message",
    "Metric",
    "Predicate",
    "SplitKey",
    "Statistic",
    "Text",
    "Verdict",
    "chosen_split_keys",
    "domain_code",
    "explained",
    "validate_fields",
]
"""Tasks import the whole contract from here."""


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a NUL character")
    return text


Text = Annotated[str, AfterValidator(_without_nul), Field(json_schema_extra={"pattern": r"^[^\u0000]*$"})]
"""A field of a request that holds text, by the rule of the data's texts: no NUL character."""

MAX_MESSAGES = 256
"""Of a chat, in the data and in a request."""

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}."""


@dataclass(frozen=True)
class SplitKey:
    """Something that training and held-out rows may not share.

    title: how a leak is reported, such as "order". keys(record, held_out): the expression for the keys of a row of the
    record type of that name (a string, or a list of strings); None where its rows have none. in_corpus: whether a
    document of the corpus leaks where it names a held-out key as a word of its own.
    """

    title: str
    keys: Callable[[str, bool], pl.Expr | None]
    in_corpus: bool = False


@dataclass(frozen=True)
class Derived:
    """How records are made where there is no file of them, from the rows that people have.

    source: the record type of these rows. make(row, line): the record for a row, and the line of its file that it
    is on.
    """

    source: str
    make: Callable[[Mapping[str, Any], int], Mapping[str, Any]]


@dataclass(frozen=True)
class Document:
    """One version of one document of evidence, as it was retrieved."""

    document_id: str
    text: str
    version: int = 1


class Domain:
    """A task. Subclass it in a module of your own and end the module with `domain = MyDomain()`.

    Attributes are what a class body may set. `name` is for messages.

    The domain's fingerprint, by which stages know that it changed, is over its Python code and what that imports. Files
    that the module reads when it is imported, such as a list of labels, are not part of it, and a change of them makes
    nothing anew: put such data into the module.
    """

    name: str = "domain"

    @property
    def description(self) -> str:
        """What a model of it is for, shown to whoever asks a server: the first paragraph of the class's docstring, or
        the text that the class sets in its place."""
        own = [each for each in type(self).__mro__ if issubclass(each, Domain) and each is not Domain]
        text = next((each.__doc__ for each in own if each.__doc__), "")
        return " ".join(inspect.cleandoc(text).partition("\n\n")[0].split())

    # --- data -----------------------------------------------------------------------------------------------------

    facts: type[BaseModel] | None = None
    """The form of `facts` in prompts and cases: what is trusted about a case. None: this domain has no facts."""
    expected: type[BaseModel] | None = None
    """The form of `expected` in cases. None: anything."""
    params: type[BaseModel] | None = None
    """Settings of `generate`, the section `generate` of params.yaml. None: the data are files, not generated."""

    def record_types(self) -> Mapping[str, RecordType]:
        """What a row of each data file must be, by name; the standard forms, with this domain's facts."""
        from twinloop.domains.record_types import standard_record_types

        return standard_record_types(self)

    def split_keys(self) -> Mapping[str, SplitKey]:
        """What training and held-out rows may not share, besides their text; a recipe chooses among them by name."""
        return {}

    def derived(self) -> Mapping[str, Derived]:
        """The record types that validation makes from rows of another where the data hold no file of them."""
        return {}

    def generate(self, params: Any, out: Path) -> Mapping[str, int]:
        """Write the data files into `out` from `params`; returns the records of each file."""
        raise NotImplementedError(f"{self.name} generates no data")

    # --- judging --------------------------------------------------------------------------------------------------

    predicates: Mapping[str, Predicate] = {"parsed": Predicate("answer has its form", FORMAT)}
    """The checks of a verdict, in the order in which they are shown."""
    case_kinds: Mapping[str, CaseKind] = STANDARD_KINDS
    metrics: Mapping[str, Metric] = {}
    labels: Sequence[str] = ()
    """What `gold` is one of, where each answer is a label: what `method: classify` tells apart."""

    def read_facts(self, record: Mapping[str, Any]) -> Any:
        """What is trusted about a record (a row of prompts or cases), as `verify` takes it."""
        return validate_fields(self.facts, record["facts"]) if self.facts else record.get("facts")

    def verify(self, output: str, facts: Any) -> Verdict:
        """Judge an answer by what is trusted: gives the rewards of RL and judges cases."""
        raise NotImplementedError(f"{self.name} has no verifier")

    def measure(self, judged: Sequence[Judged]) -> Mapping[str, float]:
        """The values of those `metrics` that no Statistic defines, from all cases. One that cannot be computed is left
        out, and then blocks."""
        return {}

    def reference(self, expected: Mapping[str, Any]) -> str | None:
        """The reference answer of a case; None: it has none. `bleu`, `chrf` and `exact_match` compare with it, and its
        perplexity and bits per byte are measured as `answer_perplexity` and `answer_bits_per_byte`."""
        return None

    def report(self, judged: Sequence[Judged]) -> Mapping[str, Any]:
        """What else people want to see of all cases, as JSON: a confusion matrix. No gate rule looks at it."""
        return {}

    def gold(self, facts: Any) -> str:
        """The right answer to a case: what the audit expects the verifier to accept."""
        raise NotImplementedError(f"{self.name} has no gold answers")

    def wrong(self, gold: str, facts: Any) -> Iterable[tuple[str, str]]:
        """(name, output) of wrong answers and of exploits: the audit expects each to get the reward 0."""
        raise NotImplementedError(f"{self.name} has no wrong answers to audit its verifier with")

    # --- serving --------------------------------------------------------------------------------------------------

    request: type[BaseModel] | None = None
    """The body of `POST /v1/decisions`. None: the domain makes no decisions, and only chat is served."""
    example: Mapping[str, Any] = {}
    """A request that shows what one looks like: the console starts with it, and a model must answer it to be served."""
    example_documents: Sequence[Document] = ()
    """Documents under which `example` can be answered."""
    passages: int = 0
    """How many documents are retrieved for a prompt."""
    max_answer_tokens: int = 256
    chat: bool = False
    """Whether a domain that makes decisions serves `/v1/chat/completions` too: only a model that was trained on chat
    answers it sensibly."""
    symptoms: Sequence[str] = ()
    """Words of this domain that name a field or a document in the report of a failure, as regular expressions; see
    `evaluation.router`."""
    actions: Sequence[str] = ()
    """Words, likewise, that name what an answer may claim to have been done, such as a refund."""

    def query(self, request: Any) -> str | None:
        """What is searched for among the documents, from trusted fields only. None: nothing is."""
        return None

    def build_prompt(self, request: Any, passages: Sequence[Document]) -> list[Message]:
        """The chat messages that ask for the answer: one function for training data, evaluation and serving."""
        raise NotImplementedError(f"{self.name} builds no prompts")

    def text_prompt(self, text: str) -> list[Message]:
        """The chat messages that ask which label a text has, for `POST /v1/classify`. May raise pydantic's
        ValidationError for what is no text of the domain."""
        return [{"role": "user", "content": text}]

    def request_of(self, prompt: Sequence[Message], facts: Any) -> tuple[Any, Sequence[Document]] | None:
        """The request and the passages that a prompt of the data was made from, so that validation can build it again
        and compare; None: that cannot be said. facts: of its row, or None. May raise pydantic's ValidationError for
        what is no request."""
        return None

    def precheck(self, request: Any, passages: Sequence[Document]) -> Mapping[str, str]:
        """Reasons, by check, for which the model need not even be asked; none: it is."""
        return {}

    def check(self, output: str, request: Any, passages: Sequence[Document]) -> Verdict:
        """Judge an answer by what the server knows; one that does not pass is not returned to anybody."""
        raise NotImplementedError(f"{self.name} checks no answers")

    def answer_schema(self) -> Mapping[str, Any] | None:
        """The JSON schema of `Verdict.output`, for the API's description. None: not stated."""
        return None

    def answer_form(self) -> Mapping[str, Any] | None:
        """The form that the text of a decision keeps to while it is written, as one of vLLM's `structured_outputs`:
        `{"json": SCHEMA}`, `{"regex": …}`, `{"choice": […]}` or `{"grammar": LARK}`. Decisions are served so, and cases
        are measured so; training and other runtimes know nothing of it. None: any text.
        """
        return None

    def outcome(self, output: Any) -> str:
        """The short name under which an answer is counted in the metrics."""
        return "answered"

    document_patterns: Mapping[str, str] = {}
    """What `check_document` asks of a `document_id`, as a regular expression, for the API's description."""

    def check_document(self, document_id: str, text: str) -> str | None:
        """Why a document may not enter, in words for whoever sent it; None: it may. One rule for data and server."""
        return None

    # --- what there is --------------------------------------------------------------------------------------------

    def has(self, part: str) -> bool:
        """Whether the domain defines this part itself, such as `verify`, `gold` or `generate`."""
        return getattr(type(self), part) is not getattr(Domain, part)

    @property
    def serves_chat(self) -> bool:
        """Whether `/v1/chat/completions` is served."""
        return self.chat or self.request is None

    @property
    def critical(self) -> tuple[str, ...]:
        """The predicates of which no violation is allowed."""
        return tuple(name for name, predicate in self.predicates.items() if predicate.critical)


@contextmanager
def domain_code(domain: Domain, method: str, about: str = "all cases") -> Iterator[None]:
    """What a method of a domain raises, as a UserError. about: what it is called for, such as "case 7"."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever the user's own code raises
        raise UserError(
            f"domain {domain.name}: {method} raised {type(error).__name__} on {about}: {one_line(error)}; "
            "correct it in the domain's module"
        ) from error


TEXT = "text"
"""The split key that every domain has: documents and prompts, whatever their letter case and white space."""


def chosen_split_keys(domain: Domain, names: Sequence[str]) -> dict[str, SplitKey | None]:
    """The split keys of these names; None means the text. Raises UserError for a name that is no split key."""
    own = domain.split_keys()
    known = [TEXT, *own]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known to domain {domain.name}: {', '.join(known)}"
            raise UserError(f"validate.split_keys: {name!r} is no split key; {hint}")
    return {name: own.get(name) for name in names}


def validate_fields(model: type[BaseModel], fields: Mapping[str, Any]) -> BaseModel:
    """The model of a row's fields as they come from columns, where a field that was left out is None.

    Validated as JSON, also in strict models: a list may become a tuple, a text an enum. Raises ValidationError.
    """
    return model.model_validate_json(to_json(_without_defaults(model, fields)))


def explained(error: ValidationError, place: str = "") -> str:
    """The first of a row's problems, by the dotted name of its field. place: what the fields are in, such as facts."""
    problem = error.errors()[0]
    name = ".".join([*([place] if place else []), *map(str, problem["loc"])])
    return f"{name}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _without_defaults(model: type[BaseModel], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without those that are None because they have a default and were left out."""
    known = model.model_fields
    return {
        name: _inner_without_defaults(known[name].annotation, value) if name in known else value
        for name, value in fields.items()
        if value is not None or name not in known or known[name].is_required()
    }


def _inner_without_defaults(annotation: Any, value: Any) -> Any:
    if isinstance(value, list):
        inner = [each for each in get_args(annotation) if each is not type(None)]
        return [_inner_without_defaults(inner[0] if inner else None, item) for item in value]
    models = [each for each in (annotation, *get_args(annotation)) if isinstance(each, type)]
    for each in models:
        if isinstance(value, dict) and issubclass(each, BaseModel):
            return _without_defaults(each, value)
    return value
