"""What the form of an answer asks of its draw; `serving.engine.grammar` makes constraints of JSON Schemas."""

from __future__ import annotations

from typing import Protocol

import numpy as np

# What eight bits of a constraint add to eight logits. Over 150,000 of them a look-up takes 30 us, where choosing by a
# boolean mask takes 60 to 700.
_BIAS_OF_BYTE = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0, -np.inf
).astype(np.float32)


class ConstraintError(Exception):
    """An answer cannot be held to its constraint any further; the message says why, in one line."""


class Constraint(Protocol):
    """What an answer must look like. It does not change, and any number of answers may share it."""

    def start(self) -> ConstraintState:
        """The state of a new answer."""


class ConstraintState(Protocol):
    """How far one answer has come."""

    def allowed(self) -> np.ndarray:
        """Which tokens may be next, at least one: uint8 [about V / 8], of which bit i of byte j is token 8 * j + i.

        Tokens beyond its end may not. A stop token may exactly where the answer may end. Valid until the next call.
        Raises ConstraintError.
        """

    def forced(self) -> list[int]:
        """Usual tokens of the text that must come next, as far as there is one only; others may spell it too."""

    def accept(self, token: int) -> None:
        """The answer goes on with this one of the allowed tokens."""


def masked(logits_V: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """A copy in which the tokens that may not be next have no probability. allowed: bits, see `ConstraintState`."""
    bias_V = _BIAS_OF_BYTE.take(allowed, axis=0).reshape(-1)[: len(logits_V)]
    masked_V = np.full(len(logits_V), -np.inf, np.float32)
    np.add(logits_V[: len(bias_V)], bias_V, out=masked_V[: len(bias_V)])
    return masked_V
