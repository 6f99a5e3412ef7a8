"""In a model's place: one that writes what a test wants, as far as its constraint lets it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from served import ScriptedPlace, ScriptedStream
from tokenizers import Tokenizer

from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.engine.counts import SchedulerMetrics, Totals
from twinloop.serving.engine.sampling import SamplingParams


class Wish:
    """A model in a scheduler's place: it writes what it is told to, as far as its constraint lets it, and then what the
    constraint allows, at random. Where the wish has no place, it goes on as the constraint says."""

    max_length = 4096
    capacity = 4
    running = True
    full = False
    queued = active = 0

    def __init__(self, folder: Path):
        """folder: of its tokenizer."""
        self.wish = ""
        self.prompts: list[list[int]] = []
        self.tokenizer = ChatTokenizer.load(folder)
        self._by_name = Tokenizer.from_file(str(folder / "tokenizer.json"))  # special tokens too

    def metrics(self) -> SchedulerMetrics:
        return SchedulerMetrics(0, 0, slots=1, tokens_per_s=0.0, totals=Totals(), cache_used=0.0)

    def reserve(self, answers: int = 1, adapter: object = None) -> ScriptedPlace:
        return ScriptedPlace(self, answers)

    def submit(self, prompt: list[int], params: SamplingParams) -> ScriptedStream:
        self.prompts.append(list(prompt))
        stop = self.tokenizer.stop_id
        wished, random = (
            self._by_name.encode(self.wish, add_special_tokens=False).ids,
            np.random.default_rng(params.seed),
        )
        state = params.constraint.start() if params.constraint is not None else None
        tokens: list[int] = []
        while len(tokens) < params.max_tokens and stop not in tokens:
            wish = wished.pop(0) if wished else stop
            if state is not None:
                allowed = np.flatnonzero(np.unpackbits(state.allowed(), bitorder="little"))
                if wish not in allowed:
                    wished, wish = [], int(random.choice(allowed))
                state.accept(wish)
            tokens.append(wish)
        return ScriptedStream(prompt, params, tokens, 0.0, "stop" if stop in tokens else "length")
