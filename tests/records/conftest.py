"""Generated data to validate, and a project whose data set is built."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from projects import commit, git, tickets
from validating import LENIENT, PARAMS, RECORD_TYPES

from twinloop.domains.returns import domain
from twinloop.domains.returns.generator import generate
from twinloop.records.dataset import build_data
from twinloop.records.validation import ValidationReport, validate
from twinloop.tasks.recipe import ValidateSettings


@pytest.fixture(scope="session")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    generate(PARAMS, folder)
    return folder


@pytest.fixture
def data(generated: Path, tmp_path: Path) -> Path:
    return shutil.copytree(generated, tmp_path / "data")


@pytest.fixture
def check(data: Path, tmp_path: Path) -> Callable[..., ValidationReport]:
    """Validates the folder `data` into `out`."""

    def run(settings: ValidateSettings = LENIENT) -> ValidationReport:
        return validate(data, tmp_path / "out", settings, domain, RECORD_TYPES)

    return run


@pytest.fixture
def quarantined(tmp_path: Path) -> Callable[[str], list[dict[str, Any]]]:
    def read(name: str) -> list[dict[str, Any]]:
        path = tmp_path / "out" / "quarantine" / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return read


@pytest.fixture(scope="session", autouse=True)
def _own_site_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["DVC_SITE_CACHE_DIR"] = str(tmp_path_factory.mktemp("dvc-site"))


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's project in a git repository, its data built and committed."""
    project = tickets(tmp_path_factory.mktemp("built"))
    git(project, "init", "-q")
    build_data(project)
    commit(project)
    return project


@pytest.fixture
def project(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "project")
