"""How a return case is put to the model: one function for training, evaluation and serving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field

from twinloop.domains.returns.policies import Policy

REASONS = ("damaged", "defective", "late", "wrong", "unwanted", "incomplete")

CONFIRMATION_NEEDED = frozenset({"damaged"})
"""Reasons that count only once the damage is confirmed."""

RETRIEVED_PASSAGES = 2
"""How many policies a prompt carries; the data and the server agree on it."""

MAX_MESSAGE_CHARACTERS = 400

CUSTOMER = "customer: "


class Order(BaseModel):
    """Trusted facts of an order: they come from the shop's own records, never from the customer."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    order_id: str = Field(pattern=r"^[A-Z]\d{4,6}$", description="one capital letter and 4 to 6 digits, such as A10234")
    reason: str = Field(pattern=r"^[a-z]+$", max_length=30, description="one lower-case word, such as damaged")
    damage_confirmed: bool
    days_since_delivery: int = Field(ge=0, le=999)


def order_line(order: Order) -> str:
    """The trusted facts as a prompt states them."""
    confirmed = "yes" if order.damage_confirmed else "no"
    return (
        f"order: {order.order_id} | reason: {order.reason} | damage confirmed: {confirmed} "
        f"| days: {order.days_since_delivery}"
    )


def build_prompt(order: Order, message: str, passages: Sequence[Policy]) -> list[dict[str, str]]:
    """Chat messages that ask for a decision.

    The customer's words come first and the trusted facts last, beside the answer. Policy texts are put in lower case,
    and every reason is followed by a space, so that a word is the same token wherever it stands. A policy's id
    follows its text, in the order in which the answer quotes them. Whatever the customer writes stays on one line.
    """
    said = " ".join(message.split())[:MAX_MESSAGE_CHARACTERS]
    lines = [f"{CUSTOMER}{said}"]
    lines += [f"policy: {passage.text.lower()} ({passage.policy_id})" for passage in passages]
    lines.append(order_line(order))
    return [{"role": "user", "content": "\n".join(lines)}]


def said_by_customer(prompt: Sequence[Mapping[str, str]]) -> str:
    """The customer's words in a prompt that `build_prompt` made."""
    return prompt[-1]["content"].split("\n", 1)[0].removeprefix(CUSTOMER)


def is_eligible(order: Order, window: int) -> bool:
    """The rule: inside the window, its last day included, and confirmed where the reason needs it."""
    confirmed = order.damage_confirmed or order.reason not in CONFIRMATION_NEEDED
    return confirmed and order.days_since_delivery <= window
