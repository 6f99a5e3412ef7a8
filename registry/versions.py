"""The model registry: every exported model that may be served is a version of the MLflow registered model `<name>`,
every checkpoint that it was made from a version of `<name>-checkpoints`.

The same bytes must be loadable for as long as a version is known, so the registry owns its files
(`registry.logged_models`), and cleaning `artifacts/` does not touch them. Nothing is served unhashed: `resolve` reads
every byte and compares with the manifest and with the digest that MLflow holds, so that neither a changed file nor a
changed manifest is accepted.

Aliases of `<name>`: `candidate` (the newest exported model), `champion` (served), `previous` (where a rollback goes).
This module moves `candidate`; only `registry.promotion` moves the other two. No torch here, and MLflow only for
writing.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from twinloop.common.errors import UserError
from twinloop.records import DATA_FILE
from twinloop.registry.artifact import Manifest
from twinloop.registry.flavours import MLMODEL, write_flavour
from twinloop.registry.logged_models import MODEL_FOLDER, NewModel, finished, new_model
from twinloop.registry.snapshot import (
    DOCUMENTS_DIGEST,
    DOMAIN_FINGERPRINT,
    PREFIX,
    Served,
    Snapshot,
    Version,
    VersionName,
    read_snapshot,
)
from twinloop.registry.tracking import CodeVersion, Mlruns
from twinloop.registry.version_files import install, verified_manifest, version_error

if TYPE_CHECKING:
    from twinloop.domains.domain import Domain

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
CHECKPOINTS = "-checkpoints"


@dataclass(frozen=True)
class Lineage:
    """Where a version comes from, beyond what its manifest records."""

    recipe: str  # path of the recipe file, as the user gave it
    domain: str  # as the recipe names it
    dataset_digest: str | None
    code: CodeVersion
    parent: VersionName | None = None
    domain_fingerprint: str | None = None  # of the domain's code that it was measured with
    about: Mapping[str, str] = field(default_factory=dict)
    """What people want to read of it in MLflow, short: further tags."""
    dataset: str = DATA_FILE  # what versions its data, relative to the project
    documents_digest: str | None = None  # of the documents that it was measured with; None: it has none


class Registry:
    """The versions of one registered model. Its name is the recipe's, or `<recipe>-checkpoints`."""

    def __init__(self, mlruns: Mlruns, name: str, *, experiment: str | None = None):
        """experiment: MLflow's experiment of the recipe, where its name is not the model's."""
        self.mlruns = mlruns
        self.name = name
        self.experiment = experiment or name

    @classmethod
    def of(cls, project: Path, model: str) -> Registry:
        """The versions of a model of this project."""
        return cls(Mlruns(project / "mlruns"), model)

    @property
    def checkpoints(self) -> Registry:
        """What the versions of this model were made from, and what was made beside them and is not served."""
        return Registry(self.mlruns, f"{self.experiment}{CHECKPOINTS}", experiment=self.experiment)

    def register(
        self,
        artifact: Path,
        lineage: Lineage,
        *,
        run_id: str | None = None,
        servable: bool = False,
        domain: Domain | None = None,
    ) -> Version:
        """Make the artifact in this directory a version, or find the version that it is already.

        run_id: the run that made it. servable: it is an exported model; it becomes the `candidate`, unless it is
        the champion. domain: what its requests are, for MLflow's own clients. Raises UserError if the directory differs
        from its manifest. Safe among processes; killed in between, it leaves no version, and does its work when called
        again.
        """
        manifest = verified_manifest(artifact)
        with self.mlruns.lock(f"registry-{self.experiment}"):
            version = self._known(manifest.digest, lineage.domain, servable)
            if version is None:
                version = self._create(artifact, manifest, lineage, run_id, servable, domain)
            else:
                self._repair(version, artifact, domain)
                changed = {k: v for k, v in _measured(lineage).items() if v and version.tags.get(k) != v}
                if lineage.parent and len(self.lineage(version)) == 1:  # the parent was deleted in MLflow
                    changed["parent"] = str(lineage.parent)
                if changed:
                    self.tag(version, changed)
                    version = self.version(version.version)
            if servable and self.snapshot().aliases.get(CHAMPION) != version.version:
                self.move({CANDIDATE: version.version})
        return version

    def snapshot(self) -> Snapshot:
        """All versions, aliases and tags, as they are now."""
        return read_snapshot(self.mlruns, self.name)

    def version(self, number: int) -> Version:
        """Raises UserError where there is no such version (any more)."""
        snapshot = self.snapshot()
        if number in snapshot.versions:
            return snapshot.versions[number]
        if not snapshot.exists:
            what = f"MLflow has no registered model {self.name}"
            raise UserError(
                f"{self.name}: no version {number}, {what}; `twinloop run` makes it, `twinloop status` more"
            )
        if number < max(snapshot.versions, default=0):
            known = f"it was deleted in MLflow; there are: {ranges(snapshot.versions)}"
        else:
            known = f"there are: {ranges(snapshot.versions)}" if snapshot.versions else "`twinloop run` makes them"
        raise UserError(f"{self.name}: no version {number} in the registry ({known})")

    def find(self, alias: str) -> Version:
        """The version that the alias names. Raises UserError if there is none, or one that Twinloop did not make."""
        snapshot = self.snapshot()
        version = snapshot.alias(alias)
        if version is not None:
            return version
        if alias in snapshot.aliases:
            raise UserError(
                f"{self.name}: the {alias} in MLflow, version {snapshot.aliases[alias]}, was not registered by "
                "Twinloop and is not used; `twinloop rollback` or `twinloop promote` moves the alias"
            )
        gone = ""
        if not snapshot.exists:
            gone = f" (MLflow has no registered model {self.name})"
        elif snapshot.versions:
            gone = f" (its versions are {ranges(snapshot.versions)}; `twinloop status` says what was there)"
        known = alias in (CHAMPION, CANDIDATE, PREVIOUS)
        then = "`twinloop run` makes one when its gate says SHIP" if known else "name a version's number, or champion"
        raise UserError(f"{self.name}: no {alias} in the registry{gone}; {then}")

    def named(self, name: str) -> Version:
        """By its number or an alias, such as 3 or champion. Raises as `version` and `find` do."""
        return self.version(int(name)) if name.isdecimal() else self.find(name)

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
        return Served(**vars(version))

    def move(self, aliases: Mapping[str, int | None]) -> None:
        """Point each alias, in this order, at its version; None removes it. Doing it twice is doing it once.

        Raises UserError where the version or the model was deleted in this moment.
        """
        client = self.mlruns.client
        with self._still_there():
            for alias, version in aliases.items():
                if version is None:
                    client.delete_registered_model_alias(self.name, alias)
                else:
                    client.set_registered_model_alias(self.name, alias, str(version))

    def name_newest(self, alias: str, version: Version) -> None:
        """Point an alias that nothing depends on at a version, unless MLflow accepts no alias of that name (`v1`)."""
        from mlflow.exceptions import MlflowException

        if self.snapshot().aliases.get(alias) == version.version:
            return
        try:
            self.move({alias: version.version})
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise

    def tag(self, version: Version, tags: Mapping[str, str]) -> None:
        """Add to what is known of a version; `tags` without the prefix. Raises like `move`."""
        with self._still_there():
            for key, value in tags.items():
                self.mlruns.client.set_model_version_tag(self.name, str(version.version), PREFIX + key, value)

    def tag_model(self, key: str, value: str) -> None:
        """Set a tag of the registered model itself. Raises like `move`."""
        with self._still_there():
            self.mlruns.client.set_registered_model_tag(self.name, PREFIX + key, value)

    @contextmanager
    def _still_there(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            what = " ".join(error.message.split())
            raise UserError(
                f"{self.name}: it was deleted in MLflow meanwhile ({what}); run the command again"
            ) from None

    def lineage(self, version: Version) -> list[Version]:
        """This version and what it was made from, back to the first that MLflow still has."""
        known = {self.name: self.snapshot().versions}
        chain = [version]
        while parent := chain[-1].parent:
            if parent.model not in known:
                known[parent.model] = read_snapshot(self.mlruns, parent.model).versions
            found = known[parent.model].get(parent.number)
            if found is None or found in chain:
                break
            chain.append(found)
        return chain

    def checkpoint_of(self, version: Version) -> Version | None:
        """The checkpoint that a version was exported from, or that it is; None where it was deleted in MLflow."""
        chain = self.lineage(version)[1:] if version.exported else [version]
        return chain[0] if chain else None

    def _known(self, digest: str, domain: str, servable: bool) -> Version | None:
        wanted = (digest, domain, servable)
        versions = self.snapshot().versions.values()
        return next((v for v in versions if (v.digest, v.tags.get("domain"), v.servable) == wanted), None)

    def _create(
        self,
        artifact: Path,
        manifest: Manifest,
        lineage: Lineage,
        run_id: str | None,
        servable: bool,
        domain: Domain | None,
    ) -> Version:
        with new_model(self.mlruns, self.experiment, name=manifest.stage, run_id=run_id) as model:
            install(artifact, model.folder / MODEL_FOLDER, copy=servable)
            write_flavour(model.folder, self.name, lineage.domain, manifest, domain)
        number = self._create_version(model, _tags(manifest, lineage, servable, model, self.mlruns), run_id)
        finished(self.mlruns, model, VersionName(self.name, number), manifest.metrics)
        return self.version(number)

    def _create_version(self, model: NewModel, tags: Mapping[str, str], run_id: str | None) -> int:
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

        client = self.mlruns.client
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
            source=model.location,
            run_id=run_id,
            model_id=model.model_id if behind_server else None,
            await_creation_for=0,  # nothing is copied by MLflow
            tags={PREFIX + key: value for key, value in tags.items()},
        )
        return int(made.version)

    def _repair(self, version: Version, artifact: Path, domain: Domain | None) -> None:
        """Put the artifact's files in the place of a version's, where these are corrupt or gone."""
        if version_error(version.path, version.digest):
            shutil.rmtree(version.path, ignore_errors=True)
            install(artifact, version.path, copy=version.servable)
        folder = version.path.parent
        if version.path.name == MODEL_FOLDER and not (folder / MLMODEL).exists():
            write_flavour(folder, self.name, version.domain, verified_manifest(version.path), domain)


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in words: 1, 3 to 6."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and found[-1][-1] == number - 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in found)


def _tags(manifest: Manifest, lineage: Lineage, servable: bool, model: NewModel, mlruns: Mlruns) -> dict[str, str]:
    path = model.folder / MODEL_FOLDER
    tags = {
        "stage": manifest.stage,
        "key": manifest.key,
        "manifest_digest": manifest.digest,
        "dataset": lineage.dataset,
        "dataset_digest": lineage.dataset_digest or "",
        "commit": lineage.code,
        "recipe": lineage.recipe,
        "domain": lineage.domain,
        **_measured(lineage),
        "parent": lineage.parent or "",
        "servable": str(servable).lower(),
        "path": path.relative_to(mlruns.root).as_posix(),  # relative: MLflow's own is absolute, and projects move
        **lineage.about,
    }
    return {key: str(value) for key, value in tags.items()}


def _measured(lineage: Lineage) -> dict[str, str]:
    """The tags that name what a version was measured with."""
    return {
        DOMAIN_FINGERPRINT: lineage.domain_fingerprint or "",
        DOCUMENTS_DIGEST: lineage.documents_digest or "",
    }
