"""A stage that names other records than its method's own learns from these."""

from __future__ import annotations

import json
from pathlib import Path

from silent import Silent
from small_models import TEXT, write_model

from twinloop.records.dataset import DataVersion
from twinloop.registry.artifact import Artifact
from twinloop.tasks.base_source import resolve_models
from twinloop.tasks.context import Context
from twinloop.tasks.imported_base import import_stage
from twinloop.tasks.prepare import validate_stage
from twinloop.tasks.recipe import load_recipe
from twinloop.tasks.train import train
from twinloop.training.runtime import Runtime

PRETRAIN = {"method": "pretrain", "learning_rate": 0.01, "batch_tokens": 128, "seq_len": 64, "tokens": 1280}
FILES = {"corpus": "return it", "exercises": "which one", "corpus_heldout": "held out"}


def trained(project: Path, *, files: dict[str, str], **stage: str) -> Artifact:
    """By one stage of pretraining. files: the words of each data file's documents."""
    (project / "data").mkdir(parents=True)
    for name, words in files.items():
        rows = [{"text": f"{words}: {TEXT} {number}"} for number in range(12)]
        (project / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_model(project / "models" / "student", seed=1)
    base, evaluate = {"path": "models/student"}, {"max_new_tokens": 16}
    fields = {"name": "small", "domain": "chat", "base": base, "evaluate": evaluate, "train": [PRETRAIN | stage]}
    path = project / "recipe.yaml"
    path.write_text(json.dumps(fields))
    recipe = load_recipe(path, project)
    context = Context.of(project, path, recipe, Silent()).on_data("0" * 32)
    needed = [name for name in recipe.record_types if name != "cases"]
    data = validate_stage(context, recipe.validate_, needed=needed, data=DataVersion("0" * 32, project / "data"))
    start = import_stage(context, resolve_models(recipe, project)[0])
    runtime = Runtime(seed=1, threads=1)
    return train.fn(context, recipe.train[0], runtime, data=data, model=start, audit=None, named={})


def test_the_weights_are_those_of_the_named_records(tmp_path: Path) -> None:
    swapped = FILES | {"corpus": FILES["exercises"], "exercises": FILES["corpus"]}
    named = trained(tmp_path / "named", files=FILES, records="exercises")
    own = trained(tmp_path / "own", files=swapped)
    other = trained(tmp_path / "other", files=FILES)
    assert named.manifest.settings["records"] == "exercises"
    assert named.digest == own.digest
    assert named.digest != other.digest
