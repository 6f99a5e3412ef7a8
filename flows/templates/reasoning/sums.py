"""The task: questions whose worked answers end with `answer: VALUE`, and example data.

Your own data are two files in data/, made the version with `dvc add data`: reasoning.jsonl and
reasoning_heldout.jsonl, one {"question": …, "steps": …, "answer": …} a line. From then on nothing is generated, and
everything about example data below may go.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from twinloop.domains.reasoning import Reasoning


class Params(BaseModel):
    """The section `generate` of params.yaml."""

    model_config = ConfigDict(extra="forbid")

    seed: int = 1
    training: int = Field(8000, ge=1)
    held_out: int = Field(400, ge=1)


class Sums(Reasoning):
    """Small word problems, worked out step by step.

    To compare values in another way, such as with a tolerance, define `same` here. The first paragraph is what the
    server and the reports say that the model is for.
    """

    params = Params
    max_answer_tokens = 64
    example: Mapping[str, str] = {"question": "ann has 7 pens. ann finds 5 pens and loses 3 pens. how many pens?"}

    def generate(self, params: Params, out: Path) -> Mapping[str, int]:
        """Write both files: questions without repetition, so that no held-out one is known from training."""
        random_ = random.Random(params.seed)
        problems: dict[str, dict[str, str]] = {}
        while len(problems) < params.training + params.held_out:
            problem = write_problem(random_)
            problems[problem["question"]] = problem
        rows = list(problems.values())
        files = {"reasoning": rows[: params.training], "reasoning_heldout": rows[params.training :]}
        for name, some in files.items():
            lines = (json.dumps(row) + "\n" for row in some)
            (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        return {name: len(some) for name, some in files.items()}


domain = Sums()


# --- example data: replace it by your own

NAMES = ["ann", "ben", "cleo", "dan", "eva", "finn", "gina", "hugo"]
THINGS = ["pens", "apples", "books", "coins", "cards", "shells"]
MORE = ["finds", "buys", "gets"]
LESS = ["loses", "sells", "gives away"]
LARGEST = 30


def write_problem(random_: random.Random) -> dict[str, str]:
    """Two or three changes of a number of things, from 0 to LARGEST all the way."""
    name, things = random_.choice(NAMES), random_.choice(THINGS)
    value = random_.randint(1, 12)
    changes, steps = [], []
    start = value
    for _ in range(random_.choice([2, 3])):
        amount = random_.randint(1, 9)
        adds = value < amount or (value + amount <= LARGEST and random_.random() < 0.5)
        before, value = value, value + amount if adds else value - amount
        changes.append(f"{random_.choice(MORE if adds else LESS)} {amount} {things}")
        steps.append(f"{before} {'+' if adds else '-'} {amount} = {value}")
    told = f"{', '.join(changes[:-1])} and {changes[-1]}"
    question = f"{name} has {start} {things}. {name} {told}. how many {things}?"
    return {"question": question, "steps": "\n".join(steps), "answer": str(value)}
