"""What a row of each data file must be: its columns, their types, and the rules that a row must keep.

One `RecordType` a file, each with a pandera schema for polars. The name of a rule is the reason that a user reads
beside a row that breaks it. The standard forms are those that people already have; a domain says what its facts are.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import pandera.polars as pa
import polars as pl
from pydantic import BaseModel

if TYPE_CHECKING:
    from twinloop.domains.domain import Domain

ROLES = ("system", "user", "assistant")

MAX_CORPUS_CHARACTERS = 1_000_000
MAX_TEXT_CHARACTERS = 100_000
"""Longer ones are mistakes of an export, not texts: no context of ours would hold them."""

MESSAGES = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))

Rules = dict[str, pl.Expr]
"""By the reason that a user reads: an expression with one boolean a row, where null stands for false."""


def text_rules(column: str, limit: int = MAX_TEXT_CHARACTERS) -> Rules:
    text = pl.col(column)
    return {
        f"{column} is empty": text.str.contains(r"\S"),
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
        f"{column} does not end with the {'assistant' if answered else 'user'}": last
        == ("assistant" if answered else "user"),
        f"{column} has a message that is empty": each(content.str.contains(r"\S")),
        f"{column} has a message longer than {MAX_TEXT_CHARACTERS} characters": each(
            content.str.len_chars() <= MAX_TEXT_CHARACTERS
        ),
        f"{column} has a message with a NUL byte": each(~content.str.contains("\0", literal=True)),
    }


@dataclass(frozen=True)
class RecordType:
    """The rows of one file: `<name>.jsonl` or `<name>.parquet`."""

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
    """What no expression can say: why a row cannot be used, or None. Asked of rows that keep every rule."""

    def nullable(self, path: str) -> bool:
        """Whether the field at a dotted path, such as facts.policy.window_days, may be null."""
        return path in self.optional or path in self.optional_fields

    @cached_property
    def model(self) -> pa.DataFrameSchema:
        """The pandera schema. Validate DataFrames with it: of a LazyFrame only the types would be looked at."""
        return pa.DataFrameSchema(
            {name: pa.Column(dtype, nullable=name in self.optional) for name, dtype in self.columns.items()},
            checks=[_check(reason, rule) for reason, rule in self.rules.items()],
            strict=True,
            name=self.name,
        )


def _check(reason: str, rule: pl.Expr) -> pa.Check:
    return pa.Check(lambda data: data.lazyframe.select(rule.fill_null(value=False)), name=reason)


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


# --- facts and other models of a domain as columns


def columns_of(model: type[BaseModel]) -> dict[str, pl.DataType]:
    """The polars type of each field of a pydantic model. Raises TypeError for a field that has none."""
    return {name: _dtype(info.annotation, f"{model.__name__}.{name}") for name, info in model.model_fields.items()}


def optional_in(model: type[BaseModel], prefix: str) -> Iterable[str]:
    """Dotted paths, below `prefix`, of the fields that may be null."""
    for name, info in model.model_fields.items():
        path = f"{prefix}.{name}"
        if not info.is_required() or type(None) in get_args(info.annotation):
            yield path
        inner = _without_none(info.annotation)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from optional_in(inner, path)


_PLAIN: Mapping[Any, pl.DataType] = {str: pl.String(), int: pl.Int64(), float: pl.Float64(), bool: pl.Boolean()}


def _dtype(annotation: Any, place: str) -> pl.DataType:
    annotation = _without_none(annotation)
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return _dtype(type(arguments[0]), place)
    if origin in (list, tuple):
        return pl.List(_dtype(arguments[0], place))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return pl.Struct(columns_of(annotation))
    raise TypeError(
        f"{place}: a column cannot hold {annotation}; use str, int, float, bool, a list or a model of these"
    )


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        some = [each for each in get_args(annotation) if each is not type(None)]
        if len(some) == 1:
            return some[0]
    return annotation


# --- the standard forms


def standard_record_types(domain: Domain) -> dict[str, RecordType]:
    """The forms that people already have, with the facts of a domain: by name, one for each file."""
    chosen_is_rejected = {"chosen and rejected are the same": pl.col("chosen") != pl.col("rejected")}
    facts, fact_fields, judgeable = _column("facts", domain.facts)
    expected, expected_fields, _ = _column("expected", domain.expected)
    kinds = tuple(domain.case_kinds)
    records = (
        RecordType("corpus", {"text": pl.String()}, text_rules("text", MAX_CORPUS_CHARACTERS)),
        RecordType("corpus_heldout", {"text": pl.String()}, text_rules("text", MAX_CORPUS_CHARACTERS)),
        RecordType(
            "chat",
            {"messages": MESSAGES, **facts},
            message_rules("messages", answered=True),
            optional=frozenset(facts),
            optional_fields=fact_fields,
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
        ),
        RecordType(
            "prompts",
            {"prompt": MESSAGES, **facts},
            message_rules("prompt", answered=False),
            optional_fields=fact_fields,
            examine=judgeable,
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
            examine=judgeable,
        ),
        RecordType(
            "documents",
            {"document_id": pl.String(), "text": pl.String(), "version": pl.Int64()},
            text_rules("document_id") | text_rules("text"),
            optional=frozenset({"version"}),
            examine=lambda row: domain.check_document(row["document_id"], row["text"]),
        ),
    )
    return {record.name: record for record in records}


def _column(
    name: str, model: type[BaseModel] | None
) -> tuple[dict[str, pl.DataType], frozenset[str], Callable[[Mapping[str, Any]], str | None] | None]:
    """The column of a domain's model, the fields in it that may be null, and what a row must keep besides its types."""
    if model is None:
        return {}, frozenset(), None

    def examine(row: Mapping[str, Any]) -> str | None:
        from pydantic import ValidationError

        try:
            model.model_validate(row[name])
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join([name, *map(str, problem["loc"])])
            return f"{place}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
        return None

    return {name: pl.Struct(columns_of(model))}, frozenset(optional_in(model, name)), examine
