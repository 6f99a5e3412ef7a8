"""How an answer is drawn, as one value."""

from __future__ import annotations

from dataclasses import dataclass

from twinloop.common.errors import UserError
from twinloop.serving.engine.sampling.bounds import bounded, check_bounds
from twinloop.serving.engine.sampling.constraint import Constraint
from twinloop.serving.engine.sampling.cuts import Cuts
from twinloop.serving.engine.sampling.edits import Edits

GREEDY_BELOW = 1e-6
"""A temperature at which logits that float32 can hardly tell apart are as good as far apart: it is taken as 0."""

MAX_TOP_LOGPROBS = 20
"""As OpenAI's."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams(Cuts, Edits):
    """How one answer is drawn; `Edits` and `Cuts` describe the parameters that change its distribution.

    temperature 0, or one below GREEDY_BELOW, takes the likeliest token after the edits, whatever the cuts. An answer
    ends with a token of `stop` (which is its last) or after max_tokens. Without a seed every answer is another one. A
    constraint leaves only those tokens to the draw with which the answer keeps its form; `stop` then names the token
    with which that form ends. top_logprobs: report with each token the model's own log-probability of it, before edits,
    temperature and cuts, and those of so many of the likeliest ones; None: report nothing.
    """

    max_tokens: int = bounded(256, lambda count: count >= 1, "at least 1")
    temperature: float = bounded(0.0, lambda value: 0 <= value <= 100, "between 0 and 100")
    stop: tuple[int, ...] = ()
    seed: int | None = None
    constraint: Constraint | None = None
    top_logprobs: int | None = bounded(
        None, lambda count: count is None or 0 <= count <= MAX_TOP_LOGPROBS, f"between 0 and {MAX_TOP_LOGPROBS}"
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.min_tokens and self.constraint is not None:
            raise UserError("sampling: min_tokens has no effect on an answer with a constraint, whose form ends it")
        if self.temperature < GREEDY_BELOW:
            object.__setattr__(self, "temperature", 0.0)
