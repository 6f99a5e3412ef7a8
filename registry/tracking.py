"""MLflow runs: one a lifecycle, and nested under it one for each stage that it executed; one experiment a recipe.

MLflow's database and artifacts live together in the project's `mlruns/`. A run records what was executed (stage, key,
settings), on what (dataset digest, parent keys), by which code (commit, and whether it had uncommitted changes) and how
it went. A skipped stage opens no run: its artifact names the one that made it, and so does the lifecycle's story.

Left out on purpose: MLflow's fluent API (`mlflow.start_run` and its globals), so that stages may run in threads;
autologging; artifacts of stages, because the artifact store has them. `mlflow` is imported by `Mlruns.client`, not
here: it costs 1.3 s and 190 MB, and 0.9 s more at its first use.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias, cast

from filelock import FileLock
from pydantic import BaseModel

from twinloop.common.errors import is_disk_full, one_line
from twinloop.records import DATA_FILE
from twinloop.registry.liveness import HOST, alive_lock, mark_killed, release, seen_alive
from twinloop.registry.mlflow_database import prepare_mlflow_database, quiet_mlflow
from twinloop.registry.whole_calls import WholeCalls

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)

Settings: TypeAlias = BaseModel | Mapping[str, Any]

FLUSH_EVERY_S = 10.0
RETRY_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0)
SOON = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""When MLflow's client gives up on a server: after 5 s where nobody answers, a minute where nothing comes. By itself it
takes 4 minutes and 14 (3.17); what must not fail so soon is tried again by us."""
# MLflow's own limits for one request (mlflow.utils.validation).
METRICS_PER_BATCH = 1000
PARAMETERS_PER_BATCH = 100
PARAMETER_CHARS = 6000
RESUMES = "twinloop.resumes"
"""Tag of a run: the one, killed, whose work it goes on with."""
NO_COMMIT = "no commit"
RESULTS = "results"
"""Folder of the project that lifecycles write, and that people commit."""


class Mlruns:
    """Where MLflow keeps its records for this project: `mlruns/mlflow.db` and `mlruns/artifacts/`.

    MLFLOW_TRACKING_URI names another database (Postgres, say) or an MLflow server. The files stay in `mlruns/`, so
    every machine that tracks or serves must see that folder at the same path.
    """

    def __init__(self, root: Path):
        self.root = Path(root).resolve()

    @cached_property
    def uri(self) -> str:
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.database}"

    @property
    def database(self) -> Path:
        return self.root / "mlflow.db"

    @property
    def local_database(self) -> bool:
        """Whether `database` is what MLflow uses."""
        return self.uri == f"sqlite:///{self.database}"

    @cached_property
    def client(self) -> MlflowClient:
        """MLflow's client; the database is made at the first use (about 1 s)."""
        if self.local_database:
            self.prepare_database()
        from mlflow.tracking import MlflowClient

        quiet_mlflow()
        for name, value in SOON.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # it would, at the end of every run
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # also for a file that lies beside it
        # Two processes that both find nothing would both write what MLflow starts with, and one would fail.
        with self.lock("database"):
            client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
        # An HTTP server ends its transactions by itself, and may be waited for a minute: that is left at once.
        return client if self.uri.startswith("http") else cast("MlflowClient", WholeCalls(client))

    def prepare_database(self) -> None:
        """Make or upgrade `database` for this MLflow. Before anything opens it. Raises UserError where it cannot."""
        with self.lock("database"):
            prepare_mlflow_database(self.database)

    def lock(self, name: str) -> FileLock:
        """A lock among processes. The kernel holds it, so that it ends with its process however that dies."""
        folder = self.root / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / name)

    def experiment_id(self, name: str) -> str:
        """The experiment of that name, made where there is none.

        MLflow stores artifact locations absolute. After the project was moved, the old experiment would write into the
        old place: it keeps its runs under a name that shows it, and a new one takes over. So it does for one that was
        deleted in MLflow: that stays deleted.
        """
        location = (self.root / "artifacts" / name).as_uri()
        with self.lock("experiment"):
            if found := self.client.get_experiment_by_name(name):
                deleted = found.lifecycle_stage != "active"
                if found.artifact_location == location and not deleted:
                    return str(found.experiment_id)
                old = found.artifact_location.removesuffix(f"/artifacts/{name}")
                why = "deleted" if deleted else f"in {old}"
                if deleted:  # it holds the name, and only an active one can be renamed
                    self.client.restore_experiment(found.experiment_id)
                self.client.rename_experiment(found.experiment_id, f"{name} ({why} until {int(time.time())})")
                if deleted:
                    self.client.delete_experiment(found.experiment_id)
            return str(self.client.create_experiment(name, artifact_location=location))


@dataclass(frozen=True)
class CodeVersion:
    """The git commit of the code; `commit` is None outside a repository. `dirty`: tracked files differ."""

    commit: str | None
    dirty: bool = False

    @classmethod
    def parse(cls, text: str) -> CodeVersion:
        """What `str` wrote."""
        commit = text.removesuffix("+dirty")
        return cls(None if commit == NO_COMMIT else commit, dirty=text.endswith("+dirty"))

    def __str__(self) -> str:
        return (self.commit or NO_COMMIT) + ("+dirty" if self.dirty else "")


@dataclass(frozen=True)
class Execution:
    """What one run of a stage, or of a whole lifecycle, is, known before it starts.

    name: of the run; by default the stage's. lifecycle: the run that it is a part of.
    """

    recipe: str
    stage: str
    key: str
    settings: Settings
    name: str | None = None
    lifecycle: str | None = None
    recipe_path: Path | None = None
    parents: Mapping[str, str] = field(default_factory=dict)  # stage -> key of each input artifact
    dataset: str = DATA_FILE
    """What versions the data, relative to the project."""
    dataset_digest: str | None = None
    code: CodeVersion = CodeVersion(None)

    def tags(self) -> dict[str, str]:
        parents = {f"twinloop.parent.{stage}": key for stage, key in self.parents.items()}
        commit = {"mlflow.source.git.commit": self.code.commit} if self.code.commit else {}
        nested = {"mlflow.parentRunId": self.lifecycle} if self.lifecycle else {}
        return {
            "mlflow.user": user(),
            "mlflow.source.name": str(self.recipe_path or self.recipe),
            "mlflow.source.type": "LOCAL",
            "twinloop.stage": self.stage,
            "twinloop.key": self.key,
            "twinloop.recipe": self.recipe,
            "twinloop.recipe_path": str(self.recipe_path or ""),
            "twinloop.commit": str(self.code),
            HOST: socket.gethostname(),
            **commit,
            **nested,
            **parents,
        }


class Tracker:
    """One MLflow run, open from `with` to its end.

        with Tracker(mlruns, execution) as run:
            run.log({"loss": 2.1}, step=10)
        run.output(manifest_digest)  # once the artifact is in its place

    The run ends FINISHED, or FAILED where the body raises, or KILLED on Ctrl-C and SIGTERM (an exception of Prefect's
    that is no Exception). A process that dies without a word leaves its run RUNNING; the next `Tracker` of the same
    recipe on this machine marks it KILLED.

    Metrics are buffered: one write to SQLite costs about 4 ms however many metrics it holds. A database that is
    briefly unavailable delays them and never stops the stage.
    """

    def __init__(self, mlruns: Mlruns, execution: Execution, *, flush_every_s: float = FLUSH_EVERY_S):
        self.mlruns = mlruns
        self.execution = execution
        self.run_id = ""
        self._flush_every_s = flush_every_s
        self._buffer: list[Metric] = []
        self._flushed = time.monotonic()

    def __enter__(self) -> Self:
        client, execution = self.mlruns.client, self.execution
        experiment_id = self.mlruns.experiment_id(execution.recipe)
        with self.mlruns.lock("runs"):  # so that nobody sees this run before it is marked alive
            killed = mark_killed(self.mlruns, experiment_id)
            tags = execution.tags()
            if resumed := next((run for run in killed if run.data.tags.get("twinloop.key") == execution.key), None):
                tags[RESUMES] = resumed.info.run_id
            name = execution.name or execution.stage
            self.run_id = client.create_run(experiment_id, tags=tags, run_name=name).info.run_id
            self._alive = alive_lock(self.mlruns, self.run_id)
            self._alive.acquire()
        try:
            self._log_parameters()
            if execution.dataset_digest:
                self.dataset(execution.dataset_digest)
        except BaseException:
            self._end("FAILED")
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            try:
                _patiently(self.flush)
            except BaseException:
                self._end("FAILED")
                raise
            self._end("FINISHED")
            return
        # The stage's own error is what the user must see: trouble in recording it is only logged.
        with self._trouble_logged():
            self.flush()
            self.mlruns.client.set_tag(self.run_id, "twinloop.error", f"{type(error).__name__}: {error}"[:1000])
        with self._trouble_logged():
            self._end("FAILED" if isinstance(error, Exception) else "KILLED")

    @contextmanager
    def _trouble_logged(self) -> Iterator[None]:
        try:
            yield
        except Exception as trouble:
            if not is_disk_full(trouble):  # that ends the run, and is reported once
                log.warning("MLflow could not record how %s ended: %s", self.execution.stage, one_line(trouble))

    def log(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Keep these values, and write what is kept every `flush_every_s`. Costs microseconds between the writes."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._buffer.extend(Metric(name, float(value), now_ms, step) for name, value in metrics.items())
        if time.monotonic() - self._flushed >= self._flush_every_s:
            try:
                self.flush()
            except Exception as trouble:  # kept in the buffer; the next flush tries again
                log.warning("MLflow is not reachable, metrics of %s wait: %s", self.execution.stage, one_line(trouble))

    def flush(self) -> None:
        """Write every buffered metric now. Raises what MLflow raises; nothing is lost from the buffer then."""
        self._flushed = time.monotonic()
        while self._buffer:
            batch = self._buffer[:METRICS_PER_BATCH]
            self.mlruns.client.log_batch(self.run_id, metrics=batch)
            del self._buffer[: len(batch)]
        for run_id in filter(None, (self.run_id, self.execution.lifecycle)):
            seen_alive(self.mlruns, run_id)

    def output(self, manifest_digest: str) -> None:
        """Record which artifact this run made."""
        self.tag({"twinloop.manifest_digest": manifest_digest})

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run, which may have ended."""
        for name, value in tags.items():
            _patiently(partial(self.mlruns.client.set_tag, self.run_id, name, value))

    def dataset(self, digest: str) -> None:
        """Record which version of the data the run reads, as MLflow's own dataset input."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        # What a MetaDataset becomes in the database, without the download source that it asks for.
        path = self.execution.dataset
        dataset = Dataset(name=path, digest=digest, source_type="dvc", source=json.dumps({"path": path}))
        tag = InputTag("mlflow.data.context", self.execution.stage)
        self.mlruns.client.log_inputs(self.run_id, [DatasetInput(dataset, [tag])])

    def _log_parameters(self) -> None:
        from mlflow.entities import Param

        flat = flatten(self.execution.settings)
        parameters = [Param(name, value[:PARAMETER_CHARS]) for name, value in flat.items()]
        for start in range(0, len(parameters), PARAMETERS_PER_BATCH):
            self.mlruns.client.log_batch(self.run_id, params=parameters[start : start + PARAMETERS_PER_BATCH])

    def _end(self, status: str) -> None:
        try:
            _patiently(lambda: self.mlruns.client.set_terminated(self.run_id, status))
        finally:
            release(self._alive)


def code_of_run(mlruns: Mlruns, run_id: str) -> CodeVersion | None:
    """The code that a run executed; None where MLflow does not know the run (its database was lost, for example)."""
    from mlflow.exceptions import MlflowException

    try:
        commit = mlruns.client.get_run(run_id).data.tags.get("twinloop.commit")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return CodeVersion.parse(commit) if commit else None


def user() -> str:
    """The name of whoever runs this process."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return "unknown"


def flatten(settings: Settings) -> dict[str, str]:
    """Settings as MLflow's parameters: nested names joined by dots, values as text."""
    plain = settings.model_dump(mode="json") if isinstance(settings, BaseModel) else settings
    return dict(_flat(plain, ""))


def code_version(project: Path, *needed: Path) -> CodeVersion:
    """The commit that `project` is at. Of the files that git does not know only `needed` make it dirty: outputs lie
    among the others. The results of earlier lifecycles are no code."""
    try:
        commit = _git(project, "rev-parse", "HEAD")
        code = ("--", ":(top)", f":(exclude){RESULTS}")
        changed = _git(project, "status", "--porcelain", "--untracked-files=no", *code)
        if needed:
            changed += _git(project, "status", "--porcelain", "--untracked-files=all", "--", *map(str, needed))
    except (OSError, subprocess.SubprocessError):
        return CodeVersion(None)
    return CodeVersion(commit, dirty=bool(changed))


def _flat(settings: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


def _patiently(write: Callable[[], object]) -> None:
    """Try for half a minute: hours of training are not to fail because a database was busy at their end."""
    for pause_s in RETRY_PAUSES_S:
        try:
            write()
            return
        except Exception as trouble:
            if is_disk_full(trouble):  # waiting frees no space
                raise
            log.warning("MLflow is not reachable, trying again in %s s: %s", pause_s, one_line(trouble))
            time.sleep(pause_s)
    write()


def _git(project: Path, *arguments: str) -> str:
    command = ["git", "-C", str(project), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()
