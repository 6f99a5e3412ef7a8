"""Projects with a data set under a real DVC: this one, and one of a user's own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

from twinloop.common.strict_yaml import parse_yaml

PROJECT = Path(__file__).parents[2]
FILES = (".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore", "dvc.yaml", "params.yaml")
LOCKED = ("dvc.lock", "data.dvc", "data_summary.json")
PACKAGES = ("common", "domains", "models", "records")
TICKETS = {
    "tickets.py": """
        import json, random
        from pydantic import BaseModel, ConfigDict, Field
        from twinloop.domains.domain import Domain
        from words import WORDS

        class Params(BaseModel):
            model_config = ConfigDict(extra="forbid")
            seed: int = 1
            documents: int = Field(ge=1)

        class Tickets(Domain):
            params = Params

            def generate(self, params, out):
                rng = random.Random(params.seed)
                for name in ("corpus", "corpus_heldout"):
                    with (out / f"{name}.jsonl").open("w") as file:
                        for _ in range(params.documents):
                            file.write(json.dumps({"text": " ".join(rng.choices(WORDS, k=40))}) + "\\n")
                return {"corpus": params.documents, "corpus_heldout": params.documents}

        domain = Tickets()
    """,
    "words.py": """
        WORDS = [f"word{number}" for number in range(1000)]
    """,
    "count.py": """
        from pathlib import Path

        lines = {path.name: path.read_text().count("\\n") for path in sorted(Path("data").iterdir())}
        Path("counts.json").write_text(repr(lines).replace("'", '"'))
    """,
    "dvc.yaml": """
        stages:
          generate:
            cmd: python -m twinloop.domains.generate ./tickets.py
            deps: [tickets.py, words.py]
            params: [generate]
            outs: [raw]
          count:
            cmd: python count.py
            deps: [data, count.py]
            metrics: [{counts.json: {cache: false}}]
    """,
    "params.yaml": """
        generate: {documents: 30}
    """,
    ".gitignore": """
        /raw
        /data
        /data.aside
        /validated
        __pycache__
    """,
}


def tickets(to: Path, *left_out: str) -> Path:
    """A project of a user's own, as it is written: nothing is built, and DVC and git do not know it."""
    for name, text in TICKETS.items():
        if name not in left_out:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / name).write_text(textwrap.dedent(text).lstrip())
    return to


def clone(to: Path) -> Path:
    """A copy of this project, in a git repository of its own."""
    for name in (*FILES, *LOCKED):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, to / name)
    for name in PACKAGES:
        shutil.copytree(PROJECT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
    git(to, "init", "-q")
    commit(to)
    return to


def git(project: Path, *command: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, *command], cwd=project, check=True, capture_output=True, text=True).stdout


def commit(project: Path) -> None:
    git(project, "add", "-A")
    git(project, "commit", "-q", "-m", "state")


def dvc(project: Path, *command: str) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([sys.executable, "-m", "dvc", *command], cwd=project, env=environment, check=True)


def contents(project: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((project / "data").iterdir())}


def set_params(project: Path, **changes: object) -> None:
    path = project / "params.yaml"
    params = parse_yaml(path.read_text())
    params["generate"] |= changes
    path.write_text(json.dumps(params))
