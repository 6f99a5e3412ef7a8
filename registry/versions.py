"""The model registry: every stage's checkpoint and exported model as a version of one MLflow registered model.

The same bytes must be loadable for as long as a version is known, so the registry owns its files. They lie in
MLflow's own place for them (`mlruns/artifacts/<recipe>/models/<model id>/artifacts`), and cleaning `artifacts/` does
not touch them:

- an **exported model that may be served is copied**. A hard link would share its bytes with `artifacts/`: whatever
  overwrites a file there would break the champion as well, and the way back with it.
- a **checkpoint is hard-linked** (copied where the file system cannot). It costs no space while `artifacts/` holds the
  stage, and survives its cleaning. It is for lineage and for going on from, not for serving; when its bytes were
  corrupted and the stage was built again, `register` replaces them.

Nothing is served unhashed: `resolve` reads every byte and compares with the manifest and with the digest that MLflow
holds, so that neither a changed file nor a changed manifest is accepted.

Aliases: `candidate` (the newest exported model), `champion` (served), `previous` (where a rollback goes). This module
moves `candidate`; only `registry.promotion` moves the other two. No torch here, and MLflow only for writing: reading
its SQLite file takes 2 ms, its client 2.2 s and 190 MB, which `status` and `serve` would pay at each start.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twinloop.common.errors import UserError
from twinloop.registry.artifact import Manifest
from twinloop.registry.database import BUSY_FOR_S, holds_records, is_locked, locked_error
from twinloop.registry.tracking import CodeVersion, Mlruns
from twinloop.registry.version_files import install, verified_manifest, version_error

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
DOMAIN_FINGERPRINT = "domain_fingerprint"
"""Tag of a version: the code of its domain when it was last measured, as `registry.fingerprint` names it."""
DOCUMENTS_DIGEST = "documents_digest"
"""Tag of a version: `contents_digest` of the documents that it was trained and last measured with."""
_PREFIX = "twinloop."
UNFINISHED = f"{_PREFIX}unfinished"
"""Tag of a logged model while its version is not made."""


@dataclass(frozen=True)
class Lineage:
    """Where a version comes from, beyond what its manifest records."""

    recipe: str  # path of the recipe file, as the user gave it
    domain: str  # as the recipe names it
    dataset_digest: str | None
    code: CodeVersion
    parent_version: int | None = None
    domain_fingerprint: str | None = None  # of the domain's code that it was measured with
    documents_digest: str | None = None  # of the documents that it was measured with; None: it has none


@dataclass(frozen=True)
class Version:
    """One version of the registered model. Its files have not been looked at."""

    name: str
    version: int
    path: Path
    run_id: str | None
    tags: Mapping[str, str] = field(repr=False)  # without the prefix "twinloop."

    @property
    def stage(self) -> str:
        return self.tags["stage"]

    @property
    def digest(self) -> str:
        """Digest of the content, as its manifest had it when it was registered."""
        return self.tags["manifest_digest"]

    @property
    def servable(self) -> bool:
        """Whether it is an exported model, which may be promoted."""
        return self.tags["servable"] == "true"

    @property
    def domain(self) -> str:
        """What the model is for, as its recipe names it. Raises UserError for a version without that tag."""
        return _domain_of(self, self.tags)

    @property
    def domain_fingerprint(self) -> str | None:
        """Of the domain's code that it was last measured with; None where that was not recorded."""
        return self.tags.get(DOMAIN_FINGERPRINT) or None

    @property
    def parent_version(self) -> int | None:
        return int(self.tags["parent_version"]) if self.tags.get("parent_version") else None

    def __str__(self) -> str:
        return f"{self.name} version {self.version}"


@dataclass(frozen=True)
class Served:
    """An exported model whose every byte was verified just now."""

    name: str
    version: int
    path: Path
    digest: str
    tags: Mapping[str, str] = field(repr=False)

    @property
    def domain(self) -> str:
        """As of Version."""
        return _domain_of(self, self.tags)

    @property
    def domain_fingerprint(self) -> str | None:
        """As of Version."""
        return self.tags.get(DOMAIN_FINGERPRINT) or None

    def __str__(self) -> str:
        return f"{self.name} version {self.version}"


@dataclass(frozen=True)
class Snapshot:
    """What MLflow holds about one registered model at one moment."""

    versions: dict[int, Version]
    aliases: dict[str, int]
    tags: dict[str, str]

    def alias(self, alias: str) -> Version | None:
        return self.versions.get(self.aliases[alias]) if alias in self.aliases else None


class Registry:
    """The versions of one model. Its name is the recipe's."""

    def __init__(self, mlruns: Mlruns, name: str):
        self.mlruns = mlruns
        self.name = name

    def register(
        self, artifact: Path, lineage: Lineage, *, run_id: str | None = None, servable: bool = False
    ) -> Version:
        """Make the artifact in this directory a version, or find the version that it is already.

        run_id: the run that made it. servable: it is an exported model; it becomes the `candidate`, unless it is
        the champion. Raises UserError if the directory differs from its manifest. Safe among processes; killed in
        between, it leaves no version, and does its work when called again.
        """
        manifest = verified_manifest(artifact)
        with self.mlruns.lock(f"registry-{self.name}"):
            version = self._known(manifest.digest, lineage.domain, servable)
            if version is None:
                version = self._create(artifact, manifest, lineage, run_id, servable)
            else:
                if version_error(version.path, version.digest):
                    shutil.rmtree(version.path, ignore_errors=True)
                    install(artifact, version.path, copy=servable)
                if measured_again := {k: v for k, v in _measured(lineage).items() if v and version.tags.get(k) != v}:
                    self.tag(version, measured_again)
                    version = self.version(version.version)
            if servable and self.snapshot().aliases.get(CHAMPION) != version.version:
                self.move({CANDIDATE: version.version})
        return version

    def snapshot(self) -> Snapshot:
        """All versions, aliases and tags, as they are now."""
        if self.mlruns.local_database:
            if not self.mlruns.database.exists():
                return Snapshot({}, {}, {})
            # Another MLflow may have another schema, and an empty one may be half-made: the client handles both.
            try:
                if holds_records(self.mlruns.database):
                    return self._read_database()
            except sqlite3.Error as error:
                if is_locked(error):
                    raise locked_error(self.mlruns.database) from error
        return self._ask_client()

    def version(self, number: int) -> Version:
        """Raises UserError where there is no such version."""
        versions = self.snapshot().versions
        if number not in versions:
            known = f"1 to {max(versions)}" if versions else "none yet; `twinloop run` makes them"
            raise UserError(f"{self.name}: no version {number} in the registry (there are: {known})")
        return versions[number]

    def find(self, alias: str) -> Version:
        """The version that the alias names. Raises UserError if there is none."""
        version = self.snapshot().alias(alias)
        if version is None:
            raise UserError(
                f"{self.name}: no {alias} in the registry; `twinloop run` makes one when its gate says SHIP"
            )
        return version

    def resolve(self, alias: str) -> Served:
        """The version that the alias names, every byte of it verified. Raises UserError if there is none, or if it
        is not what was registered.
        """
        return self.verify(self.find(alias))

    def verify(self, version: Version) -> Served:
        """Hash the version's files. Raises UserError if they are not what was registered."""
        if problem := version_error(version.path, version.digest):
            raise UserError(
                f"{version}: {problem} in {version.path}; it is not used. "
                "Restore that folder, or run the recipe again, or `twinloop rollback`"
            )
        return Served(version.name, version.version, version.path, version.digest, version.tags)

    def move(self, aliases: Mapping[str, int | None]) -> None:
        """Point each alias, in this order, at its version; None removes it. Doing it twice is doing it once."""
        client = self.mlruns.client
        for alias, version in aliases.items():
            if version is None:
                client.delete_registered_model_alias(self.name, alias)
            else:
                client.set_registered_model_alias(self.name, alias, str(version))

    def tag(self, version: Version, tags: Mapping[str, str]) -> None:
        """Add to what is known of a version; `tags` without the prefix."""
        for key, value in tags.items():
            self.mlruns.client.set_model_version_tag(self.name, str(version.version), _PREFIX + key, value)

    def tag_model(self, key: str, value: str) -> None:
        """Set a tag of the registered model itself."""
        self.mlruns.client.set_registered_model_tag(self.name, _PREFIX + key, value)

    def lineage(self, version: Version) -> list[Version]:
        """This version and what it was made from, back to the first."""
        versions = self.snapshot().versions
        chain = [version]
        while (parent := versions.get(chain[-1].parent_version or 0)) and parent not in chain:
            chain.append(parent)
        return chain

    def _known(self, digest: str, domain: str, servable: bool) -> Version | None:
        wanted = (digest, domain, servable)
        versions = self.snapshot().versions.values()
        return next((v for v in versions if (v.digest, v.tags.get("domain"), v.servable) == wanted), None)

    def _create(
        self, artifact: Path, manifest: Manifest, lineage: Lineage, run_id: str | None, servable: bool
    ) -> Version:
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

        client = self.mlruns.client
        # log_model_artifacts would copy always, and register_model wants an MLmodel file; so we lay the files where
        # MLflow expects them, and the version comes last: what has a version is whole.
        experiment_id = self.mlruns.experiment_id(self.name)
        self._clear_unfinished(experiment_id)
        model = client.create_logged_model(
            experiment_id, name=manifest.stage, source_run_id=run_id, tags={UNFINISHED: "true"}
        )
        path = self._files_of(model.model_id)
        try:
            install(artifact, path, copy=servable)
        except OSError:
            shutil.rmtree(path.parent, ignore_errors=True)
            client.delete_logged_model(model.model_id)
            raise
        client.finalize_logged_model(model.model_id, "READY")
        try:
            client.create_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise
        # source="models:/<id>" would be looked up in MLflow's global store, not in ours (3.17.2), and so would
        # model_id without a server; a server in turn takes a local path only with its model_id.
        behind_server = self.mlruns.uri.startswith("http")
        made = client.create_model_version(
            self.name,
            source=model.artifact_location,
            run_id=run_id,
            model_id=model.model_id if behind_server else None,
            await_creation_for=0,  # nothing is copied by MLflow
            tags={_PREFIX + key: value for key, value in _tags(manifest, lineage, servable, path, self.mlruns).items()},
        )
        link = json.dumps([{"name": self.name, "version": int(made.version)}])
        client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": link, UNFINISHED: "false"})
        return self.version(int(made.version))

    def _clear_unfinished(self, experiment_id: str) -> None:
        """Remove what a process left that was killed while it registered, files and all. Under the registry's lock."""
        client = self.mlruns.client
        kept = {version.path for version in self.snapshot().versions.values()}
        for model in client.search_logged_models([experiment_id], filter_string=f"tags.`{UNFINISHED}` = 'true'"):
            path = self._files_of(model.model_id)
            if path in kept:  # its version was made, and nothing else was missing
                client.set_logged_model_tags(model.model_id, {UNFINISHED: "false"})
            else:
                shutil.rmtree(path.parent, ignore_errors=True)
                client.delete_logged_model(model.model_id)

    def _files_of(self, model_id: str) -> Path:
        """Where MLflow expects the files of a logged model."""
        return self.mlruns.root / "artifacts" / self.name / "models" / model_id / "artifacts"

    def _read_database(self) -> Snapshot:
        uri = f"{self.mlruns.database.as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_FOR_S)) as database:
            database.execute("BEGIN")  # one moment for all four
            rows = database.execute(
                "SELECT version, run_id FROM model_versions WHERE name = ? AND current_stage != 'Deleted_Internal'",
                (self.name,),
            ).fetchall()
            version_tags: dict[int, dict[str, str]] = {}
            for number, key, value in database.execute(
                "SELECT version, key, value FROM model_version_tags WHERE name = ?", (self.name,)
            ):
                version_tags.setdefault(number, {})[key] = value
            aliases = database.execute(
                "SELECT alias, version FROM registered_model_aliases WHERE name = ?", (self.name,)
            ).fetchall()
            tags = database.execute(
                "SELECT key, value FROM registered_model_tags WHERE name = ?", (self.name,)
            ).fetchall()
        return self._snapshot(((n, run, version_tags.get(n, {})) for n, run in rows), dict(aliases), dict(tags))

    def _ask_client(self) -> Snapshot:
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

        client = self.mlruns.client
        try:
            model = client.get_registered_model(self.name)
        except MlflowException as error:
            if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                return Snapshot({}, {}, {})
            raise
        rows: list[tuple[int, str | None, dict[str, str]]] = []
        token: str | None = None
        while True:
            page = client.search_model_versions(f"name = '{self.name}'", max_results=1000, page_token=token)
            rows += [(int(found.version), found.run_id, found.tags) for found in page]
            if not (token := page.token):
                break
        return self._snapshot(iter(rows), {k: int(v) for k, v in model.aliases.items()}, model.tags)

    def _snapshot(
        self,
        rows: Iterator[tuple[int, str | None, dict[str, str]]],
        aliases: dict[str, int],
        tags: dict[str, str],
    ) -> Snapshot:
        versions = {}
        for number, run_id, raw in rows:
            own = _unprefixed(raw)
            if "path" in own:  # else somebody registered it by other means: no version of ours
                versions[number] = Version(self.name, number, self.mlruns.root / own["path"], run_id, own)
        return Snapshot(dict(sorted(versions.items())), aliases, _unprefixed(tags))


def _domain_of(version: object, tags: Mapping[str, str]) -> str:
    if "domain" not in tags:
        raise UserError(
            f"{version}: the registry does not name its domain; set its tag {_PREFIX}domain in MLflow to "
            "what the recipe names, such as returns"
        )
    return tags["domain"]


def _tags(manifest: Manifest, lineage: Lineage, servable: bool, path: Path, mlruns: Mlruns) -> dict[str, str]:
    numbers = {k: v for k, v in manifest.metrics.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    tags: dict[str, Any] = {
        "stage": manifest.stage,
        "key": manifest.key,
        "manifest_digest": manifest.digest,
        "dataset_digest": lineage.dataset_digest or "",
        "commit": lineage.code,
        "recipe": lineage.recipe,
        "domain": lineage.domain,
        **_measured(lineage),
        "parent_version": lineage.parent_version or "",
        "metrics": json.dumps(numbers),
        "servable": str(servable).lower(),
        "path": path.relative_to(mlruns.root).as_posix(),  # relative: MLflow's own is absolute, and projects move
    }
    return {key: str(value) for key, value in tags.items()}


def _measured(lineage: Lineage) -> dict[str, str]:
    """The tags that name what a version was measured with."""
    return {
        DOMAIN_FINGERPRINT: lineage.domain_fingerprint or "",
        DOCUMENTS_DIGEST: lineage.documents_digest or "",
    }


def _unprefixed(tags: Mapping[str, str]) -> dict[str, str]:
    return {key.removeprefix(_PREFIX): value for key, value in tags.items() if key.startswith(_PREFIX)}
