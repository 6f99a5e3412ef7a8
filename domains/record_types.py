"""What a row of each data file must be: its columns, their types, and the rules that a row must keep.

One `RecordType` a file, each with a pandera schema for polars. The name of a rule is the reason that a user reads
beside a row that breaks it. The standard forms are those that people already have; a domain defines its facts.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import pandera.polars as pa
import polars as pl
from pydantic import BaseModel, ValidationError

from twinloop.common.errors import UserError
from twinloop.common.texts import VISIBLE
from twinloop.domains.documents import refused
from twinloop.domains.domain import MAX_MESSAGES, explained, validate_fields

if TYPE_CHECKING:
    from twinloop.domains.domain import Domain

ROLES = ("system", "user", "assistant")

MAX_CORPUS_CHARACTERS = 1_000_000
MAX_TEXT_CHARACTERS = 100_000
"""Longer ones are mistakes of an export, not texts: no context of ours would hold them."""

MESSAGES = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))

Rules = dict[str, pl.Expr]
"""By the reason that a user reads: an expression with one boolean a row, where null counts as false."""


def text_rules(column: str, limit: int = MAX_TEXT_CHARACTERS) -> Rules:
    text = pl.col(column)
    return {
        f"{column} is empty": text.str.contains(VISIBLE),
        f"{column} is longer than {limit} characters": text.str.len_chars() <= limit,
        f"{column} holds a NUL byte": ~text.str.contains("\0", literal=True),
    }


def message_rules(column: str, *, answered: bool) -> Rules:
    """Rules of a chat: it ends with the assistant's answer, or with the user's turn where the answer is to come."""
    messages, role, content = pl.col(column), pl.element().struct.field("role"), pl.element().struct.field("content")

    def each(rule: pl.Expr) -> pl.Expr:
        return messages.list.eval(rule.fill_null(value=False)).list.all()

    last = messages.list.last().struct.field("role")
    return {
        f"{column} has an unknown role (known: {', '.join(ROLES)})": each(role.is_in(ROLES)),
        f"{column} is without a question": messages.list.len() >= (2 if answered else 1),
        f"{column} has more than {MAX_MESSAGES} messages": messages.list.len() <= MAX_MESSAGES,
        f"{column} does not end with the {'assistant' if answered else 'user'}": last
        == ("assistant" if answered else "user"),
        f"{column} has a message that is empty": each(content.str.contains(VISIBLE)),
        f"{column} has a message longer than {MAX_TEXT_CHARACTERS} characters": each(
            content.str.len_chars() <= MAX_TEXT_CHARACTERS
        ),
        f"{column} has a message with a NUL byte": each(~content.str.contains("\0", literal=True)),
    }


@dataclass(frozen=True)
class RecordType:
    """The rows of `<name>.jsonl` or `<name>.parquet`, and of further files of this name."""

    name: str
    columns: Mapping[str, pl.DataType]
    rules: Rules
    optional: frozenset[str] = frozenset()
    """Columns that may be left out or null."""
    identity: tuple[str, ...] = ()
    """Two rows equal in these are duplicates; empty: equal in all."""
    optional_fields: frozenset[str] = frozenset()
    """Dotted paths of nested fields that may be null, such as facts.policy.window_days."""
    examine: Callable[[Mapping[str, Any]], str | None] | None = None
    """What no expression can state: why a row cannot be used, or None. Asked of rows that keep every rule."""
    split: Literal["train", "held_out"] | None = "train"
    """Rows to train on may share no text and no split key with rows that are held out. None: neither of the two."""
    about: str = ""
    """What the rows are, in a sentence for people."""
    meanings: Mapping[str, str] = field(default_factory=dict)
    """What a column holds, by its name."""
    example: Mapping[str, Any] = field(default_factory=dict)
    """Values of an example row; the others are made from the domain's own example (`records.schema`)."""

    def nullable(self, path: str) -> bool:
        """Whether the field at a dotted path, such as facts.policy.window_days, may be null."""
        return path in self.optional or path in self.optional_fields

    @cached_property
    def model(self) -> pa.DataFrameSchema:
        """The pandera schema. Validate DataFrames with it: of a LazyFrame only the types would be looked at."""
        return pa.DataFrameSchema(
            {
                name: pa.Column(dtype, nullable=name in self.optional, description=self.meanings.get(name))
                for name, dtype in self.columns.items()
            },
            checks=[_check(reason, rule) for reason, rule in self.rules.items()],
            strict=True,
            name=self.name,
            description=self.about,
        )


def _check(reason: str, rule: pl.Expr) -> pa.Check:
    return pa.Check(lambda data: data.lazyframe.select(rule.fill_null(value=False)), name=reason)


# --- facts and other models of a domain as columns


def columns_of(model: type[BaseModel]) -> dict[str, pl.DataType]:
    """The polars type of each field of a pydantic model. Raises UserError for a field that has none."""
    return {name: _dtype(info.annotation, f"{model.__name__}.{name}") for name, info in model.model_fields.items()}


def optional_in(model: type[BaseModel], prefix: str) -> Iterable[str]:
    """Dotted paths, below `prefix`, of the fields that may be null: those with a default, or with None in their type.

    The items of a list go by the path of the list.
    """
    for name, info in model.model_fields.items():
        path = f"{prefix}.{name}"
        if not info.is_required() or type(None) in get_args(info.annotation):
            yield path
        inner = _plain(info.annotation)
        while get_origin(inner) in (list, tuple):
            inner = _plain(get_args(inner)[0])
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from optional_in(inner, path)


def described_in(model: type[BaseModel] | None, prefix: str) -> dict[str, str]:
    """What the fields of a model hold, by dotted path below `prefix`, where `Field(description=…)` says it."""
    found: dict[str, str] = {}
    for name, info in model.model_fields.items() if model else ():
        path, inner = f"{prefix}.{name}", _plain(info.annotation)
        if info.description:
            found[path] = info.description
        while get_origin(inner) in (list, tuple):
            inner = _plain(get_args(inner)[0])
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= described_in(inner, path)
    return found


_SCALARS: Mapping[Any, pl.DataType] = {str: pl.String(), int: pl.Int64(), float: pl.Float64(), bool: pl.Boolean()}


def _dtype(annotation: Any, place: str) -> pl.DataType:
    annotation = _plain(annotation)
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal and len({type(value) for value in arguments}) == 1:
        return _dtype(type(arguments[0]), place)
    if origin is list or (origin is tuple and arguments[1:] == (Ellipsis,)):
        return pl.List(_dtype(arguments[0], place))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return pl.Struct(columns_of(annotation))
    if isinstance(annotation, type) and issubclass(annotation, str):
        return pl.String()
    raise UserError(
        f"{place}: a column cannot hold {annotation}; use str, int, float, bool, a Literal or an enum of texts, a list "
        "or a model of these"
    )


def _plain(annotation: Any) -> Any:
    """A type without its constraints, and without the None that it may be instead."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        some = [each for each in get_args(annotation) if each is not type(None)]
        if len(some) == 1:
            return _plain(some[0])
    return annotation


# --- the standard forms

PROMPT_MEANING = "what is asked, up to the user's turn that is to be answered"
FACTS_MEANING = "what is trusted about the row, by which an answer is judged"


def standard_record_types(domain: Domain) -> dict[str, RecordType]:
    """The forms that people already have, with the facts of a domain: by name, one for each file."""
    chosen_is_rejected = {"chosen and rejected are the same": pl.col("chosen") != pl.col("rejected")}
    facts, fact_fields, facts_hold = _column("facts", domain.facts)
    expected, expected_fields, expectation_holds = _column("expected", domain.expected)
    kinds = tuple(domain.case_kinds)
    about_facts = {"facts": FACTS_MEANING, **described_in(domain.facts, "facts")}
    records = (
        _documents("corpus", "Documents to pretrain on."),
        _documents("exercises", "Documents of one skill, to pretrain on before the corpus."),
        replace(
            _documents("corpus_heldout", "Documents that the loss is measured on, never trained on."), split="held_out"
        ),
        RecordType(
            "chat",
            {"messages": MESSAGES, **facts},
            message_rules("messages", answered=True),
            optional=frozenset(facts),
            optional_fields=fact_fields,
            examine=facts_hold,
            about="Conversations to fine-tune on, which end with an assistant's answer; all its answers are trained.",
            meanings={"messages": f"who says what; a role is one of {', '.join(ROLES)}", **about_facts},
        ),
        RecordType(
            "preferences",
            {"prompt": MESSAGES, "chosen": pl.String(), "rejected": pl.String(), "reason": pl.String(), **facts},
            message_rules("prompt", answered=False)
            | text_rules("chosen")
            | text_rules("rejected")
            | chosen_is_rejected,
            optional=frozenset({"reason", *facts}),
            identity=("prompt", "chosen", "rejected"),
            optional_fields=fact_fields,
            examine=facts_hold,
            about="Two answers to a prompt, of which the first is better.",
            meanings={
                "prompt": PROMPT_MEANING,
                "chosen": "the better answer",
                "rejected": "the worse answer",
                "reason": "why, for people: nothing reads it",
                **about_facts,
            },
        ),
        RecordType(
            "prompts",
            {"prompt": MESSAGES, **facts},
            message_rules("prompt", answered=False),
            optional_fields=fact_fields,
            examine=facts_hold,
            about="Prompts whose answers the domain's verifier judges, for reinforcement learning.",
            meanings={"prompt": PROMPT_MEANING, **about_facts},
        ),
        RecordType(
            "cases",
            {
                "case_id": pl.String(),
                "kind": pl.String(),
                "pair_id": pl.String(),
                "prompt": MESSAGES,
                **facts,
                **expected,
            },
            text_rules("case_id")
            | message_rules("prompt", answered=False)
            | {f"kind is none of {', '.join(kinds)}": pl.col("kind").is_in(kinds)},
            optional=frozenset({"pair_id"}),
            identity=("case_id",),
            optional_fields=fact_fields | expected_fields,
            examine=_first_of(facts_hold, expectation_holds),
            split="held_out",
            about="Cases to evaluate with, never trained on.",
            meanings={
                "case_id": "the name of the case, no other case's",
                "kind": f"one of {', '.join(kinds)}",
                "pair_id": "the same for the two cases of a pair",
                "prompt": PROMPT_MEANING,
                **about_facts,
                "expected": "what a right answer must be",
                **described_in(domain.expected, "expected"),
            },
        ),
        RecordType(
            "documents",
            {"document_id": pl.String(), "text": pl.String(), "version": pl.Int64()},
            text_rules("document_id") | text_rules("text"),
            optional=frozenset({"version"}),
            examine=lambda row: refused(domain, row["document_id"], row["text"]),
            split=None,
            about="Evidence that the server starts with; the rule for one is the server's.",
            meanings={
                "document_id": "the name of the document in answers",
                "text": "all of it",
                "version": "of several rows with one id the highest counts, or else the last",
            },
        ),
    )
    return {record.name: record for record in records}


def _documents(name: str, about: str) -> RecordType:
    rules = text_rules("text", MAX_CORPUS_CHARACTERS)
    return RecordType(name, {"text": pl.String()}, rules, about=about, meanings={"text": "one document"})


def classification(labels: Sequence[str] = ()) -> RecordType:
    """Texts with one label each, for a domain that makes prompts of them. labels: those allowed; empty: any."""
    known = {f"label is none of {', '.join(labels)}": pl.col("label").is_in(labels)} if labels else {}
    return RecordType(
        "classification",
        {"text": pl.String(), "label": pl.String()},
        text_rules("text") | text_rules("label") | known,
        about="Texts with the right label of each.",
        meanings={"text": "as it will be sent to the server", "label": f"one of {', '.join(labels)}" if labels else ""},
    )


Examine = Callable[[Mapping[str, Any]], str | None]


def _column(name: str, model: type[BaseModel] | None) -> tuple[dict[str, pl.DataType], frozenset[str], Examine | None]:
    """The column of a domain's model, the fields in it that may be null, and what a row must keep besides its types."""
    if model is None:
        return {}, frozenset(), None

    def examine(row: Mapping[str, Any]) -> str | None:
        if row[name] is None:
            return None
        try:
            validate_fields(model, row[name])
        except ValidationError as error:
            return explained(error, name)
        return None

    return {name: pl.Struct(columns_of(model))}, frozenset(optional_in(model, name)), examine


def _first_of(*checks: Examine | None) -> Examine | None:
    some = [check for check in checks if check]
    if not some:
        return None
    return lambda row: next((reason for check in some if (reason := check(row))), None)
