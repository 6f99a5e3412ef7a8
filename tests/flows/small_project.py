"""A small project of its own, as a user would have it, and the command that runs in it."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinloop.common.strict_yaml import parse_yaml
from twinloop.registry.tracking import Mlruns

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PROJECT = Path(__file__).parents[2]
COPIED = (
    ".gitignore",
    ".dvcignore",
    ".dvc/config",
    ".dvc/.gitignore",
    "dvc.yaml",
    "params.yaml",
    "dvc.lock",
    "data.dvc",
)
PACKAGES = (
    "flows", "report", "tasks", "registry", "training", "evaluation", "serving", "records", "models", "domains",
    "common",
)  # fmt: skip


SIZES = {
    "exercises": 20,
    "corpus_cases": 400,
    "corpus_ledgers": 100,
    "corpus_indexes": 100,
    "corpus_repeats": 100,
    "heldout_documents": 20,
    "chat": 200,
    "preferences": 100,
    "prompts": 60,
    "held_out_cases": 20,
    "contrast_pairs": 5,
    "injection_cases": 10,
}

RECIPE = {
    "name": "small",
    "domain": "returns",
    "threads": 1,
    "device": "cpu",
    "checkpoint_every_s": 0,
    "base": {"depth": 2, "hidden_size": 64, "vocab_size": 400},
    "validate": {"split_keys": ["text", "order_id", "policy_id", "window_and_days"]},
    "evaluate": {"stage_cases": 20, "max_new_tokens": 64},
    "gate": {"rules": "recipes/lenient.yaml"},
}

STAGES = {
    "pretrain": {"tokens": 20_000, "batch_tokens": 1024, "learning_rate": 0.003},
    "sft": {"batch_tokens": 1024, "learning_rate": 0.001},
    "dpo": {"batch_tokens": 1024, "learning_rate": 0.0003},
    "grpo": {"steps": 4, "prompts_per_step": 2, "group_size": 4, "max_new_tokens": 64, "learning_rate": 0.0001},
}
"""Of the recipe's key `train`, by their methods."""

# So small a network learns nothing in so short a time: these rules let it through, with all that is measured in place.
LENIENT = {
    "golden_pass_rate": 0.0,
    "held_out_pass_rate": 0.0,
    "contrast_pass_rate": 0.0,
    "injection_pass_rate": 0.0,
    "champion_net_loss": 1.0,
    "parity_logit_gap": 0.05,
    "parity_token_agreement": 0.99,
    "parity": {
        "fp32": {"logit_gap": 0.05, "tokens": 0.99, "prompt_changes": 0, "stop_changes": 0},
        "int8": {"prompt_changes": 0, "stop_changes": 0},
    },
    "p95_ttft_ms": 60_000,
    "memory_gib": 4,
}


def make_project(folder: Path) -> Path:
    """The code, data settings, a small recipe and its rules, in a git repository."""
    for name in COPIED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, folder / name)
    for package in PACKAGES:  # a copy of its own, so that the code stays what it was from one run to the next
        shutil.copytree(PROJECT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    params = parse_yaml((folder / "params.yaml").read_text())
    params["generate"] |= SIZES
    params["recipe"] = "recipes/small.yaml"
    (folder / "params.yaml").write_text(json.dumps(params))
    (folder / "recipes").mkdir()
    write_recipe(folder)
    (folder / "recipes" / "lenient.yaml").write_text(json.dumps(LENIENT))
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "project"]):
        subprocess.run(["git", *identity, *command], cwd=folder, check=True)
    return folder


def make_ready_project(folder: Path) -> Path:
    """`make_project` with the databases of Prefect and MLflow in it, as an earlier command leaves them: for tests that
    are not about the first one. To make them takes ten seconds."""
    for name, database in {"state/prefect": "prefect.db", "mlruns": "mlflow.db"}.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(_databases() / database, folder / name)
    return make_project(folder)


@cache
def _databases() -> Path:
    """Once a process: the two as the product makes them."""
    folder = Path(tempfile.mkdtemp(prefix="databases-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make = (
        "from pathlib import Path\n"
        "from twinloop.flows.prefect_database import prepare_prefect_database\n"
        "from twinloop.registry.mlflow_database import prepare_mlflow_database\n"
        "prepare_prefect_database()\n"
        "prepare_mlflow_database(Path('mlflow.db'))\n"
    )
    homes = {"PREFECT_HOME": str(folder)}
    subprocess.run([sys.executable, "-c", make], cwd=folder, env=environment() | homes, check=True)
    return folder


def recipe_fields(**changes: dict[str, object]) -> dict[str, object]:
    """The small recipe, with some settings of its sections and stages changed."""
    fields = {
        name: value | changes.get(name, {}) if isinstance(value, dict) else value for name, value in RECIPE.items()
    }
    stages = [{"method": method, **settings, **changes.get(method, {})} for method, settings in STAGES.items()]
    return fields | {"train": stages}


def write_recipe(project: Path, **changes: dict[str, object]) -> Path:
    """The small recipe, some settings changed."""
    path = project / "recipes" / "small.yaml"
    path.write_text(json.dumps(recipe_fields(**changes)))
    return path


def environment() -> dict[str, str]:
    """A shell's, in which neither this project's settings nor a Prefect or MLflow server are named."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_TRACKING"))}
    return kept | {"OMP_NUM_THREADS": "1"}


def start(project: Path, *arguments: str) -> subprocess.Popen[str]:
    """`twinloop`, in a session of its own so that a test may kill it with all that it started."""
    return subprocess.Popen(
        [sys.executable, "-m", "twinloop.flows.cli", *arguments],
        cwd=project,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def twinloop(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a project, and what came of it."""
    process = start(project, *arguments)
    stdout, stderr = process.communicate(timeout=500)
    return subprocess.CompletedProcess(list(arguments), process.returncode, stdout, stderr)


def mlflow(project: Path) -> MlflowClient:
    return Mlruns(project / "mlruns").client


def lifecycle_runs(project: Path) -> list[Run]:
    """MLflow's runs of whole lifecycles, oldest first."""
    client, whole = mlflow(project), "tags.`twinloop.stage` = 'lifecycle'"
    experiments = [each.experiment_id for each in client.search_experiments()]  # a copied project begins a new one
    return list(client.search_runs(experiments, whole, order_by=["attributes.start_time ASC"]))


def table(project: Path, run: Run, name: str) -> list[dict[str, Any]]:
    """A table of a lifecycle, as MLflow reads it."""
    content = json.loads(Path(mlflow(project).download_artifacts(run.info.run_id, f"tables/{name}.json")).read_text())
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]
