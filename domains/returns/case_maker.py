"""Draws cases of the domain from a seed: from what training may see, or from what is held out."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from twinloop.domains.returns.phrasings import PHRASINGS, TAILS, TONES, VERBS
from twinloop.domains.returns.policies import Policy, window_days
from twinloop.domains.returns.prompt import CONFIRMATION_NEEDED, REASONS, RETRIEVED_PASSAGES, Order
from twinloop.domains.returns.verifier import Facts


class GeneratorParams(BaseModel):
    """`generate:` in params.yaml. Counts are records."""

    model_config = ConfigDict(extra="forbid")

    seed: int = 1
    exercises: int = Field(ge=1, description="ledgers alone, to train on before the corpus")
    corpus_cases: int = Field(ge=1, description="archived cases in the corpus")
    corpus_ledgers: int = Field(ge=1, description="lines of many short verdicts")
    corpus_indexes: int = Field(ge=1, description="pages that say which policy answers which reason")
    corpus_repeats: int = Field(ge=1, description="documents that repeat a span of their own")
    heldout_documents: int = Field(ge=1)
    chat: int = Field(ge=1)
    preferences: int = Field(ge=1)
    prompts: int = Field(ge=1)
    held_out_cases: int = Field(ge=1)
    contrast_pairs: int = Field(ge=1)
    injection_cases: int = Field(ge=1)
    smallest_window: int = Field(1, ge=1)
    largest_window: int = Field(365, le=999)
    largest_days: int = Field(400, le=999, description="since delivery")
    phrasing: Literal["house_style", "free"] = "house_style"


ORDINARY_WINDOWS = (7, 14, 30, 60, 90, 180, 365)
"""What most shops grant."""

EDGE_DAYS = 5
"""Half of the held-out cases lie within so many days of the window's edge."""

NEAR_DAYS = (1, 7, 30)
"""Two thirds of what trains lies near the edge, within so many days of it, each as often: what is decided right a day
from the edge but seldom seen ten days from it is guessed there."""

GOLDEN_PAIRS = (
    *((30, 12), (30, 45), (7, 12)),
    *((60, 45), (60, 75), (90, 75), (90, 120), (180, 150), (180, 200), (365, 340), (365, 380)),
)
"""(window, days) of the golden cases: no training record uses them."""


def is_held_out_policy(policy_id: str) -> bool:
    """P-1, P-7, P-13, …: ids that only held-out cases cite."""
    return int(policy_id.removeprefix("P-")) % 6 == 1


def is_held_out_order(order_id: str) -> bool:
    """A10234 and every other id whose number leaves 4 when divided by 5."""
    return int(order_id[1:]) % 5 == 4 or order_id.startswith("A1023")


def is_held_out_pair(window: int, days: int) -> bool:
    """About one (window, days) pair in seven, near and far from the edge alike, and the golden ones."""
    return (window * 31 + days * 17) % 7 == 3 or (window, days) in GOLDEN_PAIRS


def is_held_out_phrasing(choice: Sequence[int]) -> bool:
    """One policy sentence in five: `choice` holds the positions of its form, noun, verb and tail."""
    return sum(weight * index for weight, index in zip((1, 2, 3, 1), choice, strict=True)) % 5 == 3


def granted(policy: Policy) -> int:
    """The days that a policy of ours grants: each of them names a window."""
    window = window_days(policy.text)
    assert window is not None
    return window


class CaseMaker:
    """Draws cases, either only from what training may see or only from what is held out."""

    def __init__(self, rng: random.Random, params: GeneratorParams, *, held_out: bool):
        self.rng, self.params, self.held_out = rng, params, held_out
        self.policy_ids = [f"P-{n}" for n in range(1, 100) if is_held_out_policy(f"P-{n}") == held_out]
        self.id_weights = [4 if len(policy_id) == len("P-7") else 1 for policy_id in self.policy_ids]
        self.phrasing = PHRASINGS[params.phrasing]
        parts = (self.phrasing.sentences, self.phrasing.nouns, VERBS, TAILS)
        self.choices = [
            choice
            for choice in itertools.product(*(range(len(part)) for part in parts))
            if is_held_out_phrasing(choice) == held_out
        ]

    def ids_of_policies(self, count: int) -> list[str]:
        """Different ones. In training about every fourth has one digit: drawn evenly, these few are the last to be
        learned, and the golden cases cite one of them (P-7)."""
        if self.held_out:
            return self.rng.sample(self.policy_ids, count)
        ids: list[str] = []
        while len(ids) < count:
            (policy_id,) = self.rng.choices(self.policy_ids, self.id_weights)
            if policy_id not in ids:
                ids.append(policy_id)
        return ids

    def order_id(self) -> str:
        while True:
            order_id = f"{self.rng.choice('ABCDEFGH')}{self.rng.randrange(10000, 100000)}"
            if is_held_out_order(order_id) == self.held_out:
                return order_id

    def window(self) -> int:
        """Most of them any up to the largest, the rest ordinary or of any length alike.

        More of the ordinary ones, and their verdicts are learned by heart: days held out are then decided badly.
        """
        smallest, largest = self.params.smallest_window, self.params.largest_window
        roll = self.rng.random()
        if roll < 0.15:
            return self.rng.choice([window for window in ORDINARY_WINDOWS if smallest <= window <= largest])
        if roll < 0.35:
            return int(math.exp(self.rng.uniform(math.log(smallest), math.log(largest + 1))))
        return self.rng.randint(smallest, largest)

    def pair(self) -> tuple[int, int]:
        """A window, and days since delivery."""
        while True:
            window = self.window()
            if (days := self.days(window)) is not None:
                return window, days

    def days(self, window: int) -> int | None:
        """Days since delivery: some near the window's edge, of the others half up to twice the window, half anywhere.

        None where the draw is not allowed.
        """
        near = 0.5 if self.held_out else 2 / 3
        roll = self.rng.random()
        if roll < near:
            within = EDGE_DAYS if self.held_out else self.rng.choice(NEAR_DAYS)
            days = window + self.rng.randint(-within, within)
        elif roll < (1 + near) / 2:
            days = self.rng.randint(0, 2 * window)
        else:
            days = self.rng.randint(0, self.params.largest_days)
        allowed = 0 <= days <= self.params.largest_days and is_held_out_pair(window, days) == self.held_out
        return days if allowed else None

    def order(self, reason: str, window: int) -> Order:
        """An order with this reason, to be decided under a policy of this window."""
        while (days := self.days(window)) is None:
            pass
        confirmed = self.rng.random() < (0.5 if reason in CONFIRMATION_NEEDED else 0.3)
        return Order(order_id=self.order_id(), reason=reason, damage_confirmed=confirmed, days_since_delivery=days)

    def policy_text(self, reason: str, window: int, end: str | None = None) -> str:
        """end: what stands where the verb and the words after the days do; None: these."""
        sentence, noun, verb, tail = self.rng.choice(self.choices)
        says, follows = (VERBS[verb], TAILS[tail]) if end is None else (end, "")
        return self.phrasing.sentences[sentence].format(
            reason=reason, noun=self.phrasing.nouns[noun], verb=says, window=window, tail=follows
        )

    def policies(self, reason: str, window: int) -> tuple[Policy, tuple[Policy, ...]]:
        """The policy that applies, and all passages in the order in which they were retrieved."""
        others = self.rng.sample([r for r in REASONS if r != reason], RETRIEVED_PASSAGES - 1)
        ids = self.ids_of_policies(RETRIEVED_PASSAGES)
        windows = [window, *(self.window() for _ in others)]
        passages = [
            Policy(policy_id, self.policy_text(of, days))
            for policy_id, of, days in zip(ids, [reason, *others], windows, strict=True)
        ]
        applies = passages[0]
        self.rng.shuffle(passages)
        return applies, tuple(passages)

    def reason(self, weight: int = 3) -> str:
        """Those that need a confirmation `weight` times as often as each other."""
        return self.rng.choices(REASONS, [weight if reason in CONFIRMATION_NEEDED else 1 for reason in REASONS])[0]

    def facts(self) -> Facts:
        window = self.window()
        reason = self.reason()
        policy, passages = self.policies(reason, window)
        return Facts(self.order(reason, window), policy, passages)

    def message(self, order: Order, tones: Sequence[str] | None = None) -> tuple[str, str]:
        """(name of the tone, what the customer says)."""
        choices = [tone for tone in TONES if tones is None or tone.name in tones]
        tone = self.rng.choices(choices, [t.weight for t in choices])[0]
        phrasing = self.rng.choice(tone.held_out if self.held_out else tone.phrasings)
        lie = self.rng.randint(1, max(2, order.days_since_delivery))
        return tone.name, phrasing.format(order_id=order.order_id, lie=lie)
