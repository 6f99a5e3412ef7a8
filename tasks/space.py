"""How much a run of a recipe writes, before it does: what a full disk needs to have free."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from twinloop.models.config import DecoderConfig
from twinloop.models.memory import serving_memory
from twinloop.records import DATA_DIR
from twinloop.tasks.recipe import Recipe

CHECKPOINT_VALUES = 3
"""A parameter in a checkpoint: itself and, by the larger optimizer, two moments."""
CHECKPOINTS = 2
"""The newest one, and the next one while it is written."""
BESIDES = 64 * 2**20
"""The databases of MLflow and Prefect, figures, reports and traces of one run."""


def run_bytes(recipe: Recipe, network: DecoderConfig, project: Path, *, read: Iterable[DecoderConfig] = ()) -> int:
    """About the most that a run adds to the project's folder once its data is there: validated data, a model a stage,
    checkpoints of the running one, each exported model as an artifact and in the registry, and the records of it.

    network: of the base. read: the other models that stages read."""
    parameters = network.num_parameters
    imported = 4 * sum(each.num_parameters for each in read)
    adapters = [stage.settings.lora.form.num_parameters(network) for stage in recipe.train if stage.settings.lora]
    kept = [stage.settings.lora is None or stage.settings.lora.merge for stage in recipe.train]
    # Adapters of stages after each other become one, so each may hold all before it; their base is hard-linked.
    models = 4 * (parameters * (kept.count(True) + 1) + sum(adapters) * kept.count(False))
    trained = max([parameters] if len(adapters) < len(recipe.train) else adapters, default=0)
    checkpoints = 4 * trained * CHECKPOINT_VALUES * CHECKPOINTS
    exported = 0
    for precision in recipe.export.on(recipe.runtime().device):
        memory = serving_memory(network, precision=precision, slots=1, max_length=network.max_position_embeddings)
        exported += 2 * (memory.weights_bytes + memory.scales_bytes)
    data = sum(path.stat().st_size for path in (project / recipe.data / DATA_DIR).rglob("*") if path.is_file())
    return models + imported + checkpoints + exported + data + BESIDES
