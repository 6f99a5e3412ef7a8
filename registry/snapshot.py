"""What MLflow holds about a registered model at one moment: its versions, aliases and tags.

Reading MLflow's SQLite file takes 2 ms, its client 2.2 s and 190 MB, which `status` and `serve` would pay at each
start: another database or a server is asked by the client. Neither torch nor MLflow is imported here.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from twinloop.common.errors import UserError
from twinloop.records import DATA_FILE
from twinloop.registry.database import BUSY_FOR_S, holds_records, is_locked, locked_error
from twinloop.registry.tracking import Mlruns

PREFIX = "twinloop."
SHORT = 12  # characters of a digest that a person reads
DOMAIN_FINGERPRINT = "domain_fingerprint"
"""Tag of a version: the code of its domain when it was last measured, as `registry.fingerprint` names it."""
DOCUMENTS_DIGEST = "documents_digest"
"""Tag of a version: `contents_digest` of the documents that it was trained and last measured with."""


class VersionName(NamedTuple):
    """A version of a registered model, such as returns-checkpoints/4."""

    model: str
    number: int

    @classmethod
    def parse(cls, text: str) -> VersionName | None:
        """What `str` wrote; None for anything else."""
        model, _, number = text.rpartition("/")
        return cls(model, int(number)) if model and number.isdecimal() else None

    def __str__(self) -> str:
        return f"{self.model}/{self.number}"


@dataclass(frozen=True)
class Version:
    """One version of a registered model. Its files have not been looked at."""

    name: str
    version: int
    path: Path
    run_id: str | None
    tags: Mapping[str, str] = field(repr=False)  # without the prefix "twinloop."
    source: str = field(default="", repr=False)
    """Where MLflow's own clients look for its files."""

    @property
    def stage(self) -> str:
        return self.tags.get("stage", "unknown stage")

    @property
    def digest(self) -> str:
        """Digest of the content, as its manifest had it when it was registered."""
        return self.tags.get("manifest_digest", "")

    @property
    def exported(self) -> bool:
        """Whether it is an exported model, which was made from a checkpoint."""
        return self.stage == "export"

    @property
    def servable(self) -> bool:
        """Whether it is an exported model that may be promoted."""
        return self.tags.get("servable") == "true"

    @property
    def domain(self) -> str:
        """What the model is for, as its recipe names it. Raises UserError for a version without that tag."""
        if "domain" not in self.tags:
            raise UserError(
                f"{self}: the registry does not name its domain; set its tag {PREFIX}domain in MLflow to "
                "what the recipe names, such as returns"
            )
        return self.tags["domain"]

    @property
    def dataset(self) -> str:
        """The file that versions the data that it was made from, relative to the project."""
        return self.tags.get("dataset", DATA_FILE)

    @property
    def domain_fingerprint(self) -> str | None:
        """Of the domain's code that it was last measured with; None where that was not recorded."""
        return self.tags.get(DOMAIN_FINGERPRINT) or None

    @property
    def parent(self) -> VersionName | None:
        """What it was made from; None for the first. (`parent_version`: as it was tagged while checkpoints were
        versions of the same model.)"""
        before = self.tags.get("parent_version", "")
        return VersionName.parse(self.tags.get("parent", "")) or VersionName.parse(f"{self.name}/{before}")

    def __str__(self) -> str:
        return f"{self.name} version {self.version}"


class Served(Version):
    """A version whose every byte was verified just now."""


@dataclass(frozen=True)
class Snapshot:
    """What MLflow holds about one registered model at one moment.

    An alias may name a version that is not among `versions`: somebody registered it by other means. `exists` is false
    where MLflow has no registered model of that name.
    """

    versions: dict[int, Version]
    aliases: dict[str, int]
    tags: dict[str, str]
    exists: bool = False

    def alias(self, alias: str) -> Version | None:
        return self.versions.get(self.aliases[alias]) if alias in self.aliases else None


class _Row(NamedTuple):
    """A version as MLflow has it."""

    number: int
    run_id: str | None
    source: str | None
    tags: Mapping[str, str]


def read_snapshot(mlruns: Mlruns, name: str) -> Snapshot:
    """All versions, aliases and tags of a registered model, as they are now."""
    if mlruns.local_database:
        if not mlruns.database.exists():
            return Snapshot({}, {}, {})
        # Another MLflow may have another schema, and an empty one may be half-made: the client handles both.
        try:
            if holds_records(mlruns.database):
                return _read_database(mlruns, name)
        except sqlite3.Error as error:
            if is_locked(error):
                raise locked_error(mlruns.database) from error
    return _ask_client(mlruns, name)


def registered_models(mlruns: Mlruns) -> list[str]:
    """The names of all registered models."""
    if mlruns.local_database:
        if not mlruns.database.exists():
            return []
        try:
            if holds_records(mlruns.database):
                uri = f"{mlruns.database.as_uri()}?mode=ro"
                with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_FOR_S)) as database:
                    return [name for (name,) in database.execute("SELECT name FROM registered_models ORDER BY name")]
        except sqlite3.Error as error:
            if is_locked(error):
                raise locked_error(mlruns.database) from error
    names: list[str] = []
    token: str | None = None
    while True:
        page = mlruns.client.search_registered_models(max_results=1000, page_token=token)
        names += [model.name for model in page]
        if not (token := page.token):
            return sorted(names)


def _read_database(mlruns: Mlruns, name: str) -> Snapshot:
    uri = f"{mlruns.database.as_uri()}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_FOR_S)) as database:
        database.execute("BEGIN")  # one moment for all five
        # After a model was renamed, rows of its aliases and tags may be left under the old name.
        if not database.execute("SELECT 1 FROM registered_models WHERE name = ?", (name,)).fetchone():
            return Snapshot({}, {}, {})
        rows = database.execute(
            "SELECT version, run_id, source FROM model_versions WHERE name = ? AND current_stage != 'Deleted_Internal'",
            (name,),
        ).fetchall()
        version_tags: dict[int, dict[str, str]] = {}
        for number, key, value in database.execute(
            "SELECT version, key, value FROM model_version_tags WHERE name = ?", (name,)
        ):
            version_tags.setdefault(number, {})[key] = value
        aliases = database.execute(
            "SELECT alias, version FROM registered_model_aliases WHERE name = ?", (name,)
        ).fetchall()
        tags = database.execute("SELECT key, value FROM registered_model_tags WHERE name = ?", (name,)).fetchall()
    found = (_Row(number, run, source, version_tags.get(number, {})) for number, run, source in rows)
    return _snapshot(mlruns, name, found, dict(aliases), dict(tags))


def _ask_client(mlruns: Mlruns, name: str) -> Snapshot:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

    client = mlruns.client
    try:
        model = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            return Snapshot({}, {}, {})
        raise
    rows: list[_Row] = []
    token: str | None = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", max_results=1000, page_token=token)
        rows += [_Row(int(found.version), found.run_id, found.source, found.tags) for found in page]
        if not (token := page.token):
            break
    return _snapshot(mlruns, name, iter(rows), {k: int(v) for k, v in model.aliases.items()}, model.tags)


def _snapshot(
    mlruns: Mlruns, name: str, rows: Iterator[_Row], aliases: dict[str, int], tags: Mapping[str, str]
) -> Snapshot:
    versions = {}
    for row in rows:
        own = _unprefixed(row.tags)
        if "path" in own:  # else somebody registered it by other means: no version of ours
            path = mlruns.root / own["path"]
            versions[row.number] = Version(name, row.number, path, row.run_id, own, row.source or "")
    return Snapshot(dict(sorted(versions.items())), aliases, _unprefixed(tags), exists=True)


def _unprefixed(tags: Mapping[str, str]) -> dict[str, str]:
    return {key.removeprefix(PREFIX): value for key, value in tags.items() if key.startswith(PREFIX)}
