"""What every stage needs besides its own settings: where things are kept, and where progress is reported."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from pydantic import BaseModel

from twinloop.common.errors import UserError
from twinloop.common.modules import FoundModule
from twinloop.domains.domain import Domain, chosen_split_keys
from twinloop.domains.loader import LoadedDomain, load_domain
from twinloop.records import DATA_FILE
from twinloop.registry.artifact import Artifact, ArtifactStore
from twinloop.registry.fingerprint import fingerprint, module_fingerprint
from twinloop.registry.tracking import CodeVersion, Execution, Mlruns, Tracker, code_version
from twinloop.tasks.recipe import Recipe

if TYPE_CHECKING:
    from twinloop.training.loop import StepReport

SPEED = "tokens_per_s"

log = logging.getLogger(__name__)


class Progress(Protocol):
    """Somebody who watches: a terminal, a log, a test."""

    def started(self, stage: str) -> None: ...

    def stepped(self, stage: str, done: float, total: float, metrics: Mapping[str, float]) -> None:
        """`done` of `total` units of work are done; `metrics` are the latest values."""

    def finished(self, stage: str, *, seconds: float | None, name: str) -> None:
        """`seconds` is None where it was already done. `name` identifies the result: a key, a digest, a version."""


@dataclass(frozen=True)
class Report:
    """What a stage calls while it works."""

    stage: str
    progress: Progress
    tracker: Tracker

    def trained(self, names: Sequence[str] = ()) -> Callable[[StepReport], None]:
        """Takes each step of a training: its loss, speed and the metrics `names` are shown, and all kept for MLflow."""

        def on_step(step: StepReport) -> None:
            every = {"loss": step.loss, SPEED: step.tokens_per_s, "learning_rate": step.learning_rate}
            every |= {"grad_norm": step.grad_norm, **step.metrics}
            shown = {name: every[name] for name in ("loss", *names, SPEED) if name in every}
            self.progress.stepped(self.stage, step.step, step.total_steps, shown)
            self.tracker.log(every, step=step.step)

        return on_step

    def moved(self, done: float, total: float) -> None:
        """Shown only."""
        self.progress.stepped(self.stage, done, total, {})


OnProgress: TypeAlias = Callable[[int, int], None]
Work: TypeAlias = Callable[[Path, Path, Report], dict[str, Any]]


@dataclass(frozen=True)
class Context:
    """One execution of one recipe."""

    project: Path
    recipe: str
    recipe_path: Path | None
    loaded_domain: LoadedDomain
    dataset_digest: str | None
    progress: Progress
    code: CodeVersion
    checkpoint_every_s: float
    dataset: str = DATA_FILE
    """The file that versions its data, relative to the project."""
    lifecycle: str | None = None
    """The MLflow run that the stages are nested under."""

    @classmethod
    def of(cls, project: Path, path: Path, recipe: Recipe, progress: Progress) -> Context:
        """An execution that begins now. path: the recipe's file.

        Raises UserError for a domain, a split key, a record type or a folder of data that there is not.
        """
        loaded_domain = load_domain(recipe.domain, project)
        if not (project / recipe.data).is_dir():
            raise UserError(f"{path}: data: {recipe.data}: no such folder in {project}")
        try:
            chosen_split_keys(loaded_domain.domain, recipe.validate_.split_keys)
            for stage in recipe.train:
                stage.check_records(loaded_domain.domain)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        return cls(
            project=project,
            recipe=recipe.name,
            recipe_path=path,
            loaded_domain=loaded_domain,
            dataset_digest=None,
            progress=progress,
            code=code_version(project, path),
            checkpoint_every_s=recipe.checkpoint_every_s,
            dataset=recipe.dataset,
        )

    def on_data(self, digest: str) -> Context:
        """The same, once it is known which data it reads."""
        return replace(self, dataset_digest=digest)

    def within(self, lifecycle: str) -> Context:
        """The same, as a part of this MLflow run."""
        return replace(self, lifecycle=lifecycle)

    @property
    def data_home(self) -> Path:
        """The folder of the file that versions its data."""
        return (self.project / self.dataset).parent

    @property
    def domain(self) -> Domain:
        return self.loaded_domain.domain

    @property
    def store(self) -> ArtifactStore:
        return ArtifactStore(self.project / "artifacts")

    @cached_property
    def mlruns(self) -> Mlruns:
        """One object, since it prepares the database when its client is first asked for."""
        return Mlruns(self.project / "mlruns")

    def run(
        self,
        stage: str,
        work: Work,
        *,
        settings: BaseModel | Mapping[str, Any],
        inputs: Mapping[str, Artifact | str],
        modules: tuple[str, ...],
        found: Sequence[FoundModule] = (),
        uses_domain: bool = False,
        label: str | None = None,
    ) -> Artifact:
        """The stage's artifact: found in the store, or made now under an MLflow run.

        work(out, keep, report): as the store's `build`, with a Report to call while it goes. modules: the code whose
        change makes the artifact anew; so does that of the modules `found`, and with `uses_domain` the domain's. label:
        the stage's name in what is shown.
        """

        made_by: list[Tracker] = []
        named = [*found, *([self.loaded_domain.found] if uses_domain else [])]
        code = ":".join([fingerprint(*modules), *map(module_fingerprint, named)])

        def build(out: Path, keep: Path) -> dict[str, Any]:
            execution = Execution(
                recipe=self.recipe,
                recipe_path=self.recipe_path,
                stage=stage,
                key=out.name,
                settings=settings,
                lifecycle=self.lifecycle,
                parents={name: value.key for name, value in inputs.items() if isinstance(value, Artifact)},
                dataset=self.dataset,
                dataset_digest=self.dataset_digest,
                code=self.code,
            )
            if kept := sorted((keep / "checkpoints").glob("step-*.safetensors")):
                step = int(kept[-1].stem.removeprefix("step-"))
                log.warning(
                    "%s: an earlier run of it was stopped; it goes on from its checkpoint at step %d", stage, step
                )
            with Tracker(self.mlruns, execution) as tracker:
                metrics = work(out, keep, Report(label or stage, self.progress, tracker))
                numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
                tracker.log(numbers)
            made_by.append(tracker)
            return metrics | {"mlflow_run_id": tracker.run_id}

        self.progress.started(label or stage)
        artifact = self.store.run(stage, settings=settings, inputs=inputs, code=code, build=build)
        for tracker in made_by:
            tracker.output(artifact.digest)
        seconds = None if artifact.reused else artifact.manifest.seconds
        self.progress.finished(label or stage, seconds=seconds, name=artifact.key)
        return artifact


def find_project(start: Path | None = None, *, otherwise: str | None = None) -> Path:
    """The project's folder: the nearest one, upwards, that holds params.yaml. Raises UserError where there is none.
    otherwise: what its reader may do instead of going to one."""
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "params.yaml").is_file() and (folder / "recipes").is_dir():
            return folder
    instead = f", or {otherwise}" if otherwise else ""
    raise UserError(
        f"{here}: not inside a Twinloop project (no params.yaml and recipes/ from here up); go there first{instead}"
    )
