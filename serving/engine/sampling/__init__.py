"""The choice of the next token, on the host.

Draws are a function of (seed, sequence, position) and of nothing else: who else sits in the batch, and in which slot,
changes no one's tokens.

params       how an answer is drawn, as one value; its fields are those of the two below and a few of its own
edits        what changes logits before the draw: logit_bias, min_tokens, penalties
cuts         which tokens are left to the draw: top_k, top_p, min_p
constraint   what an answer that has a form must look like
draws        the draw itself, of all rows that ask for no more than a temperature at once
answer       the draw of one answer that asks for more

A new parameter is a field of `Edits` or `Cuts` with its bounds, and its use there.

Shapes: letters as in `models.shapes`.
"""

from twinloop.serving.engine.sampling.answer import AnswerSampler, TokenReport, draw, report_token
from twinloop.serving.engine.sampling.constraint import Constraint, ConstraintError, ConstraintState
from twinloop.serving.engine.sampling.draws import choose, uniform_draws
from twinloop.serving.engine.sampling.params import MAX_TOP_LOGPROBS, SamplingParams

__all__ = [
    "MAX_TOP_LOGPROBS",
    "AnswerSampler",
    "Constraint",
    "ConstraintError",
    "ConstraintState",
    "SamplingParams",
    "TokenReport",
    "choose",
    "draw",
    "report_token",
    "uniform_draws",
]
