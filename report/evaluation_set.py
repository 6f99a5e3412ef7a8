"""The evaluation set as a dataset of MLflow: what its own evaluations and reviews of traces start from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinloop.records.validated import read_records
from twinloop.registry.tracking import Mlruns, Tracker

if TYPE_CHECKING:
    from mlflow.genai.datasets import EvaluationDataset

DIGITS = 12
"""Of the digest of the data, in the name."""


def log_evaluation_set(tracker: Tracker, data: Path, digest: str) -> None:
    """Make the cases of the validated data a dataset, once for each version of the data, and an input of the run."""
    from mlflow.entities import DatasetInput, InputTag

    mlruns, model = tracker.mlruns, tracker.execution.recipe
    dataset = evaluation_set(mlruns, model, digest, _records(read_records(data, "cases")))
    context = InputTag("mlflow.data.context", "evaluation")
    mlruns.client.log_inputs(tracker.run_id, [DatasetInput(dataset._to_mlflow_entity(), [context])])


def evaluation_set(mlruns: Mlruns, model: str, digest: str, records: list[dict[str, Any]]) -> EvaluationDataset:
    """The dataset of this name, with these records in it; digest: of the data that they come from."""
    client, experiment = mlruns.client, mlruns.experiment_id(model)
    name = f"{model} cases {digest[:DIGITS]}"
    with mlruns.lock("evaluation-set"):
        found = client.search_datasets(filter_string=f"name = '{name}'", max_results=1)
        dataset = found[0] if found else client.create_dataset(name, experiment, {"data.dvc": digest})
        held = json.loads(dataset.profile or "{}").get("num_records", 0)
        if held != len({json.dumps(record["inputs"], sort_keys=True) for record in records}):
            # `dataset.merge_records` takes the process's global tracking URI (3.17).
            client._tracking_client.store.upsert_dataset_records(dataset.dataset_id, records)
            dataset = client.get_dataset(dataset.dataset_id)
    return dataset


def _records(cases: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "inputs": {"messages": list(case["prompt"])},
            "expectations": dict(case.get("expected") or {}) or {"facts": case.get("facts")},
            "tags": {"case_id": case["case_id"], "kind": case["kind"]},
        }
        for case in cases
    ]
