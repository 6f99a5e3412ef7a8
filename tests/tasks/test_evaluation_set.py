"""The cases are an evaluation dataset in MLflow, made once and linked from the run that was measured on them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from contexts import silent_context

from twinloop.registry.artifact import Artifact
from twinloop.registry.tracking import Mlruns
from twinloop.tasks.context import Context, Report
from twinloop.tasks.evaluation_set import publish_cases

CASES = [
    {
        "case_id": f"c{number}",
        "kind": "golden" if number < 2 else "held_out",
        "prompt": [{"role": "user", "content": "the same words"}],
        "facts": {"days": number},
        "expected": {"eligible": number < 2, "policy_id": None},
    }
    for number in range(4)
]


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return silent_context(tmp_path, "returns", recipe_path=Path("recipes/returns.yaml"))


def stage(context: Context, name: str) -> Artifact:
    def work(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        pl.DataFrame(CASES).write_parquet(out / "cases.parquet")
        return {}

    return context.run(name, work, settings={}, inputs={}, modules=("twinloop.records.validated",))


def test_cases_become_a_dataset_once_and_the_evaluation_names_it(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data, evaluation = stage(context, "validate"), stage(context, "evaluate")
    publish_cases(context, data=data, evaluation=evaluation)
    publish_cases(context, data=data, evaluation=evaluation)
    assert not (tmp_path / "mlflow.db").exists()  # of MLflow's own default
    client = context.mlruns.client
    (found,) = client.search_datasets(experiment_ids=[context.mlruns.experiment_id("returns")])
    assert found.name == f"returns cases {data.manifest.files['cases.parquet'][:12]}"
    assert found.tags["twinloop.dataset_digest"] == "d41d8.dir"
    linked = client.get_run(evaluation.metrics["mlflow_run_id"]).inputs.dataset_inputs
    assert [each.dataset.name for each in linked if each.dataset.source_type != "dvc"] == [found.name]
    import mlflow

    mlflow.set_tracking_uri(context.mlruns.uri)
    try:
        records = client.get_dataset(found.dataset_id).to_df()
    finally:
        mlflow.set_tracking_uri(None)
    assert len(records) == 4  # also of cases with the same prompt
    first = next(row for row in records.to_dict("records") if row["inputs"]["case_id"] == "c0")
    assert first["expectations"] == {"eligible": True, "facts": {"days": 0}}
    assert first["inputs"]["messages"] == CASES[0]["prompt"]


def test_a_dataset_that_cannot_be_made_stops_nothing(context: Context, caplog: pytest.LogCaptureFixture) -> None:
    data, evaluation = stage(context, "validate"), stage(context, "evaluate")
    shutil.rmtree(data.path)
    publish_cases(context, data=data, evaluation=evaluation)
    assert "the cases are not an evaluation dataset in MLflow" in caplog.text
    assert Mlruns(context.project / "mlruns").client.get_run(evaluation.metrics["mlflow_run_id"])
