"""The data set of recipes/reasoning.yaml: steps that are right, and questions that are held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from twinloop.common.errors import UserError
from twinloop.domains.loader import load_domain
from twinloop.domains.reasoning import Solution, gym_problems
from twinloop.evaluation.audit import audit_verifier

PROJECT = Path(__file__).parents[2]
FOUND = load_domain("./examples/chain_sums/chain_sums.py", PROJECT)
DOMAIN, MODULE = FOUND.domain, FOUND.found.module


def generated(folder: Path, seed: int) -> dict[str, list[dict[str, Any]]]:
    folder.mkdir()
    DOMAIN.generate(MODULE.Params(seed=seed, training=300, held_out=80, worked=0.5), folder)
    return {path.stem: [json.loads(line) for line in path.open()] for path in folder.glob("*.jsonl")}


@pytest.mark.parametrize(
    ("expression", "steps"), [("4 + 3 - 9", "4 + 3 = 7\n7 - 9 = -2"), ("0 - 5 + 6", "0 - 5 = -5\n-5 + 6 = 1")]
)
def test_each_number_has_a_step_that_goes_on_from_the_last(expression: str, steps: str) -> None:
    assert MODULE.steps(expression) == steps


def test_the_verifier_pays_for_the_value_of_a_sum_alone() -> None:
    report = audit_verifier(DOMAIN, [Solution(question=f"{a} - 7 + {a} =", answer=str(2 * a - 7)) for a in range(10)])
    assert report.passed, report.summary


def test_problems_are_the_same_from_one_seed_and_none_is_in_training_and_held_out(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    rows, other = generated(tmp_path / "first", 1), generated(tmp_path / "other", 2)
    assert rows == generated(tmp_path / "again", 1) != other
    questions = [row["question"] for some in rows.values() for row in some]
    assert len(set(questions)) == len(questions) == 380
    assert {row["kind"] for row in rows["reasoning_heldout"]} == set(DOMAIN.case_kinds)


def test_some_demonstrations_are_worked_out_and_all_are_right(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    rows = generated(tmp_path / "rows", 1)["reasoning"]
    assert 0.4 < sum("steps" in row for row in rows) / len(rows) < 0.6
    examine = DOMAIN.record_types()["reasoning"].examine
    assert examine is not None
    assert [row for row in rows if examine(row)] == []
    assert all(row["steps"].endswith(f"= {row['answer']}") for row in rows if "steps" in row)


def test_a_task_or_a_setting_that_is_not_known_is_one_line() -> None:
    pytest.importorskip("reasoning_gym")
    for task, settings in {"chain_sums": {}, "chain_sum": {"terms": 3}}.items():
        with pytest.raises(UserError, match=f"^reasoning-gym: {task}: "):
            gym_problems(task, seed=1, count=1, **settings)
    with pytest.raises(UserError, match="different problems in 100000; 10000 are wanted"):
        gym_problems("chain_sum", seed=1, count=10000, min_terms=2, max_terms=2, min_digits=1, max_digits=1)
