"""Sums of three to six numbers, from the task chain_sum of reasoning-gym, worked out one number at a time.

Demonstrations are imperfect: most state the value alone, the others show every step. SFT learns both; RL finds out,
from the final value only, which of them a small network needs.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from twinloop.domains.domain import CaseKind, Metric
from twinloop.domains.reasoning import Reasoning, gym_problems, thinking

TERMS = (3, 4, 5, 6)


class Params(BaseModel):
    """The section `generate` of params.yaml."""

    model_config = ConfigDict(extra="forbid")

    seed: int = 1
    training: int = Field(ge=1)
    held_out: int = Field(ge=1)
    worked: float = Field(ge=0, le=1)
    """Share of the demonstrations that show their steps."""


class ChainSums(Reasoning):
    """Sums of three to six numbers of one digit, worked out step by step."""

    name = "chain_sums"
    params = Params
    case_kinds: Mapping[str, CaseKind] = {f"terms_{n}": CaseKind(f"sums of {n} numbers") for n in TERMS}
    metrics: Mapping[str, Metric] = {f"thinking_{n}": thinking(f"terms_{n}") for n in TERMS}
    max_answer_tokens = 64
    example: Mapping[str, str] = {"question": "4 + 7 - 6 + 8 = ?"}

    def generate(self, params: Params, out: Path) -> Mapping[str, int]:
        """Write both files; no question is in them twice."""
        random_ = random.Random(params.seed)
        count = params.held_out + params.training
        asked = {"min_terms": TERMS[0], "max_terms": TERMS[-1], "min_digits": 1, "max_digits": 1}
        problems = gym_problems("chain_sum", params.seed, count, **asked)
        files: dict[str, list[dict[str, str]]] = {"reasoning": [], "reasoning_heldout": []}
        for index, problem in enumerate(problems):
            about = problem["metadata"]
            # the sentence around it in the problem's own question is the same in all
            row = {"question": f"{about['expression']} = ?", "answer": problem["answer"]}
            if index < params.held_out:
                files["reasoning_heldout"].append({"kind": f"terms_{about['num_terms']}", **row})
            else:
                shown = random_.random() < params.worked
                files["reasoning"].append(row | ({"steps": steps(about["expression"])} if shown else {}))
        for name, rows in files.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        return {name: len(rows) for name, rows in files.items()}


def steps(expression: str) -> str:
    """A line for each number that is added or taken away: "4 + 3 - 9" gives "4 + 3 = 7" and "7 - 9 = -2"."""
    first, *others = expression.split()
    value, lines = int(first), []
    for sign, number in zip(others[::2], others[1::2], strict=True):
        before = value
        value += int(number) if sign == "+" else -int(number)
        lines.append(f"{before} {sign} {number} = {value}")
    return "\n".join(lines)


domain = ChainSums()
