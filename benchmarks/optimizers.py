"""Muon beside AdamW by the clock: the recipe's stages with each, and what the network then does on held-out cases.

    python -m benchmarks.optimizers [recipes/returns.yaml] [--device cuda] [--scale 1.0]

Both train all stages in full, one after the other, on data of --scale times the size of params.yaml's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl

from benchmarks.table import Row, percent, show
from benchmarks.workload import Workload, arguments, make_data, prepare
from twinloop.models.decoder import Decoder
from twinloop.models.directory import save_model
from twinloop.models.exported import export_model
from twinloop.records.validated import write_records
from twinloop.serving.engine import Engine
from twinloop.tasks import measure
from twinloop.tasks.recipe import load_recipe
from twinloop.training.loop import run_training
from twinloop.training.weights import get_weights


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="of the data set")
    options = parser.parse_args()
    with TemporaryDirectory(prefix="twinloop-bench-") as folder:
        data = make_data(Path(folder) / "raw", options.scale)
        for name in ("cases", "corpus_heldout"):
            write_records(pl.read_ndjson(data / f"{name}.jsonl", infer_schema_length=None), data, name)
        show(compare(prepare(load_recipe(options.recipe), options.device, data)))


def compare(workload: Workload) -> Iterator[Row]:
    for optimizer in ("adamw", "muon"):
        network, seconds = workload.new_network(), 0.0
        for stage in workload.recipe.train:
            settings = stage.settings.model_copy(update={"optimizer": optimizer})
            objective, batches = workload.build(replace(stage, settings=settings), network)
            result = run_training(
                network, objective, batches, settings, checkpoint_dir=None, device=workload.runtime.device
            )
            seconds += result.seconds.total
            found = quality(workload, network)
            after = f"{optimizer}, after {stage.name}"
            yield Row("training so far", after, f"{seconds:,.1f}", "s")
            yield Row("· held-out texts", after, f"{found['bits_per_byte']:.4f}", "bits a byte")
            yield Row("· cases passed", after, percent(found["pass_rate"]), "%")


def quality(workload: Workload, network: Decoder) -> dict[str, Any]:
    """As a recipe's run measures a stage."""
    settings = workload.recipe.evaluate
    with TemporaryDirectory() as folder:
        model, exported = Path(folder) / "model", Path(folder) / "exported"
        save_model(model, network.config, get_weights(network), workload.tokenizer)
        length = network.config.max_position_embeddings
        export_model(model, exported, precision=workload.runtime.precision, max_length=length)
        engine = Engine.load(exported, slots=settings.slots, threads=workload.runtime.threads)
        held_out = measure.Workload(workload.domain, settings, workload.data, limit=settings.stage_cases)
        _, metrics = measure.measure_engine(engine, workload.tokenizer, held_out, lambda *_: None)
    return metrics


if __name__ == "__main__":
    main()
