"""What the rows of this domain's files must be, besides the standard forms: their facts, answers and expectations.

`audit_target` judges the answer of a demonstration by its shape alone: whether the decision is right is for the
verifier to decide, since demonstrations may be imperfect and are meant to be measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import polars as pl

from twinloop.common.strict_json import NotJSONError, parse_json
from twinloop.domains.domain import Domain
from twinloop.domains.record_types import RecordType, Rules, standard_record_types
from twinloop.domains.returns.policies import WINDOW, window_days
from twinloop.domains.returns.prompt import CONFIRMATION_NEEDED, Order
from twinloop.domains.returns.verifier import FIELDS

TARGET_FIELDS = ("eligible", "policy_id", "evidence")
"""What an answer must have to be learned from; the verifier asks for more."""

ORDER = pl.Struct(
    {"order_id": pl.String, "reason": pl.String, "damage_confirmed": pl.Boolean, "days_since_delivery": pl.Int64}
)
POLICY = pl.Struct({"policy_id": pl.String, "text": pl.String, "window_days": pl.Int64})
PASSAGES = pl.List(pl.Struct({"policy_id": pl.String, "text": pl.String}))
FACTS = pl.Struct({"order": ORDER, "policy": POLICY, "passages": PASSAGES})
EXPECTED = pl.Struct({"eligible": pl.Boolean, "policy_id": pl.String})

WITH_FACTS = frozenset({"chat", "preferences", "prompts", "cases"})

OPTIONAL = frozenset({"facts.policy.window_days"})
"""Nested fields that may be null: a policy may name no window."""


# --- the answer's shape


@dataclass(frozen=True)
class TargetVerdict:
    """Whether a target can be learned from, and what it lacks. `wrong` names what is there but of another type."""

    verdict: Literal["keep", "reject"]
    missing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def reason(self) -> str:
        lacking = [f"no {name}" for name in self.missing]
        return f"the answer has {', '.join([*lacking, *self.wrong])}" if self.verdict == "reject" else ""


def audit_target(target: Mapping[str, Any]) -> TargetVerdict:
    """Judge a decision by its shape: the keys of TARGET_FIELDS must be there, each of its own type."""
    missing = [name for name in TARGET_FIELDS if name not in target]
    wrong = [
        f"{name} of type {type(target[name]).__name__}, not {kind.__name__}"
        for name, kind in FIELDS.items()
        if name in target and type(target[name]) is not kind
    ]
    return TargetVerdict("reject" if missing or wrong else "keep", missing, wrong)


def audit_answer(text: str) -> TargetVerdict:
    """`audit_target` of an answer as it is written: it must be one JSON object in which no key appears twice."""
    try:
        target = parse_json(text)
    except NotJSONError:
        target = None
    if not isinstance(target, dict):
        return TargetVerdict("reject", list(TARGET_FIELDS), ["something else than one JSON object"])
    return audit_target(target)


# --- rules: polars expressions with one boolean a row, where null counts as false

_ORDER, _POLICY = pl.col("facts").struct.field("order"), pl.col("facts").struct.field("policy")
_PASSAGES = pl.col("facts").struct.field("passages")
_ORDER_RULES = Order.model_json_schema()["properties"]


def _fact_rules(*, optional: bool) -> Rules:
    cited = pl.concat_str(_POLICY.struct.field("policy_id"), pl.lit("\n"), _POLICY.struct.field("text"))
    retrieved = pl.concat_str(
        pl.element().struct.field("policy_id"), pl.lit("\n"), pl.element().struct.field("text"), ignore_nulls=True
    )
    rules = {
        "facts has an order_id that is no order's": _ORDER.struct.field("order_id").str.contains(
            _ORDER_RULES["order_id"]["pattern"]
        ),
        "facts has a reason that is not one lower-case word": _ORDER.struct.field("reason").str.contains(
            _ORDER_RULES["reason"]["pattern"]
        )
        & (_ORDER.struct.field("reason").str.len_chars() <= _ORDER_RULES["reason"]["maxLength"]),
        "facts has days_since_delivery out of range": _ORDER.struct.field("days_since_delivery").is_between(
            _ORDER_RULES["days_since_delivery"]["minimum"], _ORDER_RULES["days_since_delivery"]["maximum"]
        ),
        "facts has a policy that is not among its passages": _PASSAGES.list.eval(retrieved).list.contains(cited),
        "facts has a window_days that its policy's text does not say": _POLICY.struct.field("window_days").eq_missing(
            window_of(_POLICY.struct.field("text"))
        ),
    }
    return {reason: rule | pl.col("facts").is_null() for reason, rule in rules.items()} if optional else rules


def _judgeable_rules() -> Rules:
    """Facts by which answers are rewarded or judged: under a policy without a window none would be right."""
    window = window_of(_POLICY.struct.field("text"))
    return {"facts has a policy that names no window": window.is_not_null(), **_fact_rules(optional=False)}


def window_of(text: pl.Expr) -> pl.Expr:
    """`policies.window_days` over a column."""
    number = text.str.extract(WINDOW).cast(pl.Int64, strict=False)
    return pl.when(text.str.count_matches(WINDOW) == 1).then(number)


def _verdict_rules() -> Rules:
    confirmed = _ORDER.struct.field("damage_confirmed") | ~_ORDER.struct.field("reason").is_in(CONFIRMATION_NEEDED)
    inside = _ORDER.struct.field("days_since_delivery") <= _POLICY.struct.field("window_days")
    expected = pl.col("expected").struct
    return {
        "expected.policy_id is not the policy of its facts": expected.field("policy_id")
        == _POLICY.struct.field("policy_id"),
        "expected.eligible does not follow from its facts": expected.field("eligible")
        == (confirmed & inside.fill_null(value=False)),
    }


# --- one record type a file


def record_types(domain: Domain) -> dict[str, RecordType]:
    """The standard forms, with facts, and expectations that follow from them."""

    def with_facts(record: RecordType, rules: Rules) -> RecordType:
        return replace(
            record,
            columns={**record.columns, "facts": FACTS},
            rules=record.rules | rules,
            optional_fields=OPTIONAL,
            example={"facts": facts},
        )

    facts = _example_facts(domain)
    standard = standard_record_types(domain)
    chat, preferences, cases = (standard[name] for name in ("chat", "preferences", "cases"))
    cases = with_facts(cases, _judgeable_rules() | _verdict_rules())
    return {
        **standard,
        "chat": replace(
            with_facts(chat, _fact_rules(optional=True)),
            optional=chat.optional | {"facts"},
            examine=lambda row: audit_answer(row["messages"][-1]["content"]).reason or None,
        ),
        "preferences": replace(
            with_facts(preferences, _fact_rules(optional=True)), optional=preferences.optional | {"facts"}
        ),
        "prompts": with_facts(standard["prompts"], _judgeable_rules()),
        "cases": replace(
            cases,
            columns={**cases.columns, "expected": EXPECTED},
            example={"facts": facts, "expected": {"eligible": True, "policy_id": facts["policy"]["policy_id"]}},
        ),
    }


def _example_facts(domain: Domain) -> dict[str, Any]:
    """Those of the domain's example, whose order its first document decides."""
    passages = [{"policy_id": each.document_id, "text": each.text} for each in domain.example_documents]
    policy = {**passages[0], "window_days": window_days(passages[0]["text"])}
    return {"order": dict(domain.example["order"]), "policy": policy, "passages": passages}


# --- what training and held-out rows may not share


def order_keys(record: str, held_out: bool) -> pl.Expr | None:
    """The order of a row."""
    del held_out
    return _ORDER.struct.field("order_id") if record in WITH_FACTS else None


def policy_keys(record: str, held_out: bool) -> pl.Expr | None:
    """The policies of a row: all passages to train on, but of a held-out row the one that applies.

    A distractor of a held-out row may be a policy that training knows.
    """
    if record not in WITH_FACTS:
        return None
    cited = _POLICY.struct.field("policy_id")
    if held_out:
        return cited
    passages = _PASSAGES.list.eval(pl.element().struct.field("policy_id"))
    return pl.concat_list(cited, passages).list.unique(maintain_order=True)


def window_and_days_keys(record: str, held_out: bool) -> pl.Expr | None:
    """The days that a row's policy grants, with the days since delivery."""
    del held_out
    if record not in WITH_FACTS:
        return None
    window, days = _POLICY.struct.field("window_days"), _ORDER.struct.field("days_since_delivery")
    return pl.concat_str(window, pl.lit(" days of window and day "), days)


SPLIT_KEYS = {"order_id": order_keys, "policy_id": policy_keys, "window_and_days": window_and_days_keys}
