"""The cases as a dataset that MLflow itself reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from twinloop.registry.tracking import Execution, Mlruns, Tracker
from twinloop.report.evaluation_set import evaluation_set

DIGEST = "d41d8cd98f00b204.dir"


@pytest.fixture(scope="module")
def mlruns(tmp_path_factory: pytest.TempPathFactory) -> Mlruns:
    return Mlruns(tmp_path_factory.mktemp("project") / "mlruns")


def record(number: int, label: str = "billing") -> dict[str, Any]:
    messages = [{"role": "user", "content": f"text {number}"}]
    tags = {"case_id": f"case-{number}", "kind": "held_out"}
    return {"inputs": {"messages": messages}, "expectations": {"label": label}, "tags": tags}


def test_the_cases_are_a_dataset_of_the_models_experiment_made_once(mlruns: Mlruns) -> None:
    records = [record(number) for number in range(5)]
    made = evaluation_set(mlruns, "tickets", DIGEST, records)
    again = evaluation_set(mlruns, "tickets", DIGEST, records)
    assert (again.dataset_id, again.last_update_time) == (made.dataset_id, made.last_update_time)
    assert made.name == "tickets cases d41d8cd98f00"
    held = mlruns.client.search_datasets(experiment_ids=[mlruns.experiment_id("tickets")])
    assert [dataset.name for dataset in held] == [made.name]
    loaded, _ = mlruns.client._tracking_client.store._load_dataset_records(made.dataset_id)
    assert {each.tags["case_id"]: each.expectations for each in loaded} == {
        f"case-{number}": {"label": "billing"} for number in range(5)
    }


def test_a_dataset_that_was_cut_off_is_filled(mlruns: Mlruns) -> None:
    name, experiment = "mails cases d41d8cd98f00", mlruns.experiment_id("mails")
    empty = mlruns.client.create_dataset(name, experiment)
    filled = evaluation_set(mlruns, "mails", DIGEST, [record(1), record(2), record(2)])
    assert filled.dataset_id == empty.dataset_id
    assert '"num_records": 2' in (filled.profile or "")


def test_a_run_names_it_beside_its_data(mlruns: Mlruns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from twinloop.report import evaluation_set as module

    cases = [{"case_id": "a", "kind": "golden", "prompt": [{"role": "user", "content": "hi"}], "facts": {"n": 1}}]
    monkeypatch.setattr(module, "read_records", lambda data, name: cases)
    with Tracker(mlruns, Execution("greetings", "lifecycle", "lifecycle", {}, dataset_digest=DIGEST)) as tracker:
        module.log_evaluation_set(tracker, tmp_path, DIGEST)
    inputs = mlruns.client.get_run(tracker.run_id).inputs.dataset_inputs
    contexts = {each.dataset.name: each.tags[0].value for each in inputs}
    assert contexts == {"data.dvc": "lifecycle", "greetings cases d41d8cd98f00": "evaluation"}
