"""The files of a registered version, in MLflow's own place for them: a logged model of the recipe's experiment.

    mlruns/artifacts/<recipe>/models/<model id>/artifacts/
        MLmodel, input_example.json   how MLflow's own clients load it
        model/                        the artifact with its manifest: what is served, every byte of it hashed

An **exported model that may be served is copied** into it. A hard link would share its bytes with `artifacts/`:
whatever overwrites a file there would break the champion as well, and the way back with it. A **checkpoint is
hard-linked** (copied where the file system cannot). It costs no space while `artifacts/` holds the stage, and survives
its cleaning. It is for lineage and for going on from, not for serving; when its bytes were corrupted and the stage was
built again, registering replaces them.

The version in the registry comes last: what has a version is whole.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinloop.common.errors import one_line
from twinloop.registry.snapshot import PREFIX, VersionName
from twinloop.registry.tracking import Mlruns

log = logging.getLogger(__name__)

MODEL_FOLDER = "model"
UNFINISHED = f"{PREFIX}unfinished"
"""Tag of a logged model while its version is not made."""


@dataclass(frozen=True)
class NewModel:
    """A logged model that has no version yet. location: of its folder, as MLflow names it."""

    model_id: str
    folder: Path
    location: str
    run_id: str | None


@contextmanager
def new_model(mlruns: Mlruns, experiment: str, *, name: str, run_id: str | None) -> Iterator[NewModel]:
    """Make a logged model whose folder the body fills; gone again where that fails. Under the experiment's lock."""
    client = mlruns.client
    # log_model_artifacts would copy always, and register_model wants an MLmodel file.
    experiment_id = mlruns.experiment_id(experiment)
    _clear_unfinished(mlruns, experiment, experiment_id)
    made = client.create_logged_model(experiment_id, name=name, source_run_id=run_id, tags={UNFINISHED: "true"})
    model = NewModel(made.model_id, _folder(mlruns, experiment, made.model_id), made.artifact_location, run_id)
    try:
        model.folder.mkdir(parents=True)
        yield model
    except OSError:
        shutil.rmtree(model.folder.parent, ignore_errors=True)
        client.delete_logged_model(model.model_id)
        raise
    client.finalize_logged_model(model.model_id, "READY")


def finished(mlruns: Mlruns, model: NewModel, version: VersionName, metrics: Mapping[str, Any]) -> None:
    """Link a logged model with its version, and give it the numbers of what it holds."""
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException
    from mlflow.utils.time import get_current_time_millis

    link = json.dumps([{"name": version.model, "version": version.number}])
    mlruns.client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": link, UNFINISHED: "false"})
    if model.run_id is None:
        return
    now_ms = get_current_time_millis()
    numbers = [
        Metric(name, float(value), now_ms, 0, model_id=model.model_id)
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    try:
        mlruns.client.log_batch(model.run_id, metrics=numbers)
    except MlflowException as error:  # the run was deleted in MLflow
        log.warning("%s: its run takes no metrics of the model: %s", version, one_line(error))


def _clear_unfinished(mlruns: Mlruns, experiment: str, experiment_id: str) -> None:
    """Remove what a process left that was killed while it registered, files and all."""
    client = mlruns.client
    for model in client.search_logged_models([experiment_id], filter_string=f"tags.`{UNFINISHED}` = 'true'"):
        # Of whatever registered model: it may have been renamed since.
        if client.search_model_versions(f"source_path = '{model.artifact_location}'", max_results=1):
            client.set_logged_model_tags(model.model_id, {UNFINISHED: "false"})
        else:
            shutil.rmtree(_folder(mlruns, experiment, model.model_id).parent, ignore_errors=True)
            client.delete_logged_model(model.model_id)


def _folder(mlruns: Mlruns, experiment: str, model_id: str) -> Path:
    """Where MLflow expects the files of a logged model."""
    return mlruns.root / "artifacts" / experiment / "models" / model_id / "artifacts"
