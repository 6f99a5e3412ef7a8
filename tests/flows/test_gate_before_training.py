"""A gate that no model could pass stops a run before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_project import LENIENT, make_ready_project, twinloop


@pytest.mark.slow
def test_too_few_cases_for_a_limit_are_told_once_the_data_are_validated(tmp_path: Path) -> None:
    project = make_ready_project(tmp_path)
    (project / "recipes" / "lenient.yaml").write_text(json.dumps(LENIENT | {"held_out_pass_rate": 0.95}))
    run = twinloop(project, "run", "recipes/small.yaml")
    assert run.returncode == 2
    assert (
        "recipes/lenient.yaml: no model can pass: held_out_pass_rate: 20 cases of kind held_out, all right, reach "
        "0.839, and the limit is 0.95; 73 or more are needed" in run.stderr
    )
    assert "Traceback" not in run.stdout + run.stderr
    assert "✓ validate" in run.stdout
    assert "tokenize" not in run.stdout
    assert not (project / "artifacts" / "tokenize").exists()
