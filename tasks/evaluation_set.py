"""The cases as an evaluation dataset of MLflow, linked from the run that was measured on them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from twinloop.common.errors import one_line
from twinloop.registry.artifact import Artifact
from twinloop.tasks.context import Context
from twinloop.tasks.measure import choose_cases

if TYPE_CHECKING:
    from mlflow.entities import EvaluationDataset

log = logging.getLogger(__name__)

CASES_FILE = "cases.parquet"
MAX_RECORDS = 5000
"""MLflow 3.17.2 looks each record up before it writes it: 2,400 take 1.2 s of CPU on SQLite, 4 s on a busy machine."""


def publish_cases(context: Context, *, data: Artifact, evaluation: Artifact) -> None:
    """Make the dataset, once for the same cases, and link it from the evaluation's run. data: what was validated.

    For reading only: what MLflow refuses is logged, and stops nothing.
    """
    try:
        experiment = context.mlruns.experiment_id(context.recipe)
        dataset = _dataset(context, data, experiment)
        _link(context, dataset, evaluation.metrics["mlflow_run_id"])
    except Exception as error:  # whatever it is: the gate does not depend on it
        log.warning("the cases are not an evaluation dataset in MLflow: %s", one_line(error))


def _dataset(context: Context, data: Artifact, experiment: str) -> EvaluationDataset:
    from mlflow.tracking._tracking_service.utils import _get_store

    from twinloop.records.validated import read_records

    client = context.mlruns.client
    digest = data.manifest.files[CASES_FILE]
    name = f"{context.recipe} cases {digest[:12]}"
    found = client.search_datasets([experiment], f"name = '{name}'", max_results=1)
    if not found and (found := client.search_datasets(filter_string=f"name = '{name}'", max_results=1)):
        # The project was moved, and has another experiment.
        client.add_dataset_to_experiments(found[0].dataset_id, [experiment])
    dataset = found[0] if found else None
    if dataset is not None and (dataset.tags or {}).get("twinloop.complete") == "true":
        return dataset
    if dataset is None:
        tags = {"twinloop.cases_digest": digest, "twinloop.dataset_digest": context.dataset_digest or ""}
        dataset = client.create_dataset(name, experiment_id=experiment, tags=tags)
    cases = choose_cases(read_records(data.path, "cases"), context.domain, MAX_RECORDS)
    # dataset.merge_records would write into MLflow's global store, not into ours (3.17.2).
    records = [_record(case) for case in cases]
    _get_store(context.mlruns.uri).upsert_dataset_records(dataset.dataset_id, records)
    client.set_dataset_tags(dataset.dataset_id, {"twinloop.complete": "true"})  # killed before, it is filled again
    return client.get_dataset(dataset.dataset_id)


def _record(case: Mapping[str, Any]) -> dict[str, Any]:
    expected = {name: value for name, value in (case.get("expected") or {}).items() if value is not None}
    facts = {"facts": case["facts"]} if case.get("facts") is not None else {}
    tags = {name: str(case[name]) for name in ("kind", "pair_id") if case.get(name)}
    return {
        "inputs": {"case_id": case["case_id"], "messages": case["prompt"]},
        "expectations": {**expected, **facts},
        "tags": tags,
    }


def _link(context: Context, dataset: EvaluationDataset, run_id: str) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    client = context.mlruns.client
    inputs = client.get_run(run_id).inputs
    if inputs and any(each.dataset.name == dataset.name for each in inputs.dataset_inputs):
        return
    tag = InputTag("mlflow.data.context", "evaluation")
    # What dataset._to_mlflow_entity() makes, which would read every record from the global store (3.17.2).
    entity = Dataset(
        name=dataset.name,
        digest=dataset.digest,
        source_type="mlflow_evaluation_dataset",
        source=json.dumps({"dataset_id": dataset.dataset_id}),
        schema=dataset.schema,
        profile=dataset.profile,
    )
    client.log_inputs(run_id, [DatasetInput(entity, [tag])])
