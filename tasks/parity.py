"""Parity as a stage: the same prompts through every form of a release, and what differs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, get_args

from prefect import task

from twinloop.common.errors import UserError
from twinloop.common.files import file_digest
from twinloop.evaluation.parity_report import FORMS, LLAMA_CPP, REFERENCE
from twinloop.models.config import Precision
from twinloop.registry.artifact import Artifact, content_digest
from twinloop.tasks.context import Context, OnProgress, Report
from twinloop.tasks.measure import Workload, choose_cases
from twinloop.tasks.recipe import EvaluateSettings
from twinloop.training.runtime import Runtime

if TYPE_CHECKING:
    from twinloop.evaluation.parity import Form
    from twinloop.evaluation.parity_report import ParityReport

PARITY_REPORT = "parity.json"
COMPARED_CASES = 32


class Stored(Protocol):
    """A directory whose every byte was verified: an artifact, or a registered version."""

    @property
    def path(self) -> Path: ...
    @property
    def digest(self) -> str: ...


@dataclass(frozen=True)
class Release:
    """What there is of a release. model: the last checkpoint. exported: by precision."""

    model: Stored
    exported: Mapping[Precision, Stored]

    def forms(self, wanted: Iterable[str]) -> tuple[str, ...]:
        """Names of its own forms, and of those that are wanted besides."""
        from twinloop.models.directory import is_adapted

        merged = ["merged"] if is_adapted(self.model.path) else []
        return in_order([*merged, *self.exported, *wanted])


def in_order(forms: Iterable[str]) -> tuple[str, ...]:
    """The reference, and forms of these names, each once. Raises UserError for a name that no form has."""
    named = {REFERENCE, *forms}
    if unknown := sorted(named - set(FORMS)):
        raise UserError(f"{unknown[0]}: no form has this name; there are: {', '.join(FORMS)}")
    return tuple(name for name in FORMS if name in named)


def parity_stage(
    context: Context,
    settings: EvaluateSettings,
    runtime: Runtime,
    *,
    data: Artifact,
    release: Release,
    forms: Iterable[str],
) -> Artifact:
    """parity.json. forms: names of those that are compared with the network; what is not there is made from it.

    Raises UserError for a name that no form has.
    """
    names = in_order(forms)

    def work(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        import torch

        torch.set_num_threads(runtime.threads)
        workload = Workload(context.domain, settings, data.path, limit=COMPARED_CASES)
        with tempfile.TemporaryDirectory(prefix="forms-", dir=keep) as folder:
            found = compare_forms(FormMaker(release, Path(folder), runtime.threads), workload, names, report.moved)
        missing = {name: why.replace(f"{context.project}/", "") for name, why in found.missing.items()}
        found = found.model_copy(update={"missing": missing})
        (out / PARITY_REPORT).write_text(found.to_json())
        return {"compared_cases": len(found.cases), "compared_forms": len(found.forms), **found.metrics()}

    stored = {REFERENCE: release.model} | {f"exported-{name}": each for name, each in release.exported.items()}
    return context.run(
        "parity",
        work,
        settings={
            "forms": list(names),
            "cases": COMPARED_CASES,
            "max_new_tokens": settings.max_new_tokens,
            "threads": runtime.threads,
            "device": runtime.device,
            **({"llama_cpp": _llama_cpp_here()} if LLAMA_CPP in names else {}),
        },
        inputs={"data": data} | {n: each if isinstance(each, Artifact) else each.digest for n, each in stored.items()},
        modules=("twinloop.tasks.parity", "twinloop.tasks.forms", "twinloop.tasks.llama_cpp"),
        uses_domain=True,
    )


parity = task(name="parity", persist_result=False)(parity_stage)


def _llama_cpp_here() -> str:
    """Its digest, empty where it is not on the path: another build of it may answer differently."""
    from twinloop.tasks.llama_cpp import SERVER

    found = shutil.which(SERVER)
    return file_digest(Path(found)) if found else ""


def compare_forms(
    maker: FormMaker, workload: Workload, forms: Sequence[str], on_progress: OnProgress = lambda done, total: None
) -> ParityReport:
    """Compare now. A form that cannot be made or read is missing, with the reason.

    Raises UserError where there are no cases, or the network itself cannot be read, and FormError.
    """
    from twinloop.evaluation.cases import read_cases
    from twinloop.evaluation.parity import FormError, Reference, cases_digest
    from twinloop.evaluation.parity_report import ParityReport
    from twinloop.records.validated import read_records

    domain = workload.domain
    cases = read_cases(choose_cases(read_records(workload.data, "cases"), domain, workload.limit), domain)
    if not cases:
        raise UserError("cases: there are none to compare forms on; add some to the data")
    reference = Reference(maker.make(REFERENCE), cases, domain, workload.settings.max_new_tokens)
    found, missing = [reference.parity()], {}
    others = [name for name in forms if name != REFERENCE]
    for done, name in enumerate(others):
        on_progress(done, len(others))
        try:
            with closing(maker.make(name)) as form:
                found.append(reference.compare(form))
        except FormError as error:
            raise UserError(f"parity: {error}") from None
        except UserError as error:
            missing[name] = str(error).replace(str(maker.folder), name)
    return ParityReport(
        cases=tuple(case.case_id for case in cases),
        cases_digest=cases_digest(cases),
        forms=tuple(found),
        missing=missing,
    )


@dataclass(frozen=True)
class FormMaker:
    """Forms by name, each made when it is asked for, so that one at a time is in memory. folder: for what is exported
    only to be compared."""

    release: Release
    folder: Path
    threads: int

    def make(self, name: str) -> Form:
        """Raises UserError for a form that this release has not and that cannot be made of it."""
        by_name: dict[str, Callable[[], Form]] = {
            REFERENCE: self._network,
            "merged": self._merged,
            "gguf": self._gguf,
            LLAMA_CPP: self._llama_cpp,
        }
        by_name |= {precision: lambda each=precision: self._exported(each) for precision in get_args(Precision)}
        return by_name[name]()

    def _network(self) -> Form:
        from twinloop.models.directory import is_adapted
        from twinloop.tasks.forms import NetworkForm, adapted_network
        from twinloop.training.weights import load_decoder

        model = self.release.model
        loaded = load_decoder(model.path)
        network = adapted_network(model.path) if is_adapted(model.path) else loaded
        return NetworkForm(REFERENCE, model.path, model.digest, network, threads=self.threads, proposer=loaded)

    def _merged(self) -> Form:
        from twinloop.models.directory import is_adapted
        from twinloop.tasks.forms import NetworkForm
        from twinloop.training.weights import load_decoder

        model = self.release.model
        if not is_adapted(model.path):
            raise UserError("this release has no adapter to merge; every form of it is of the network itself")
        return NetworkForm("merged", model.path, model.digest, load_decoder(model.path), threads=self.threads)

    def _gguf(self) -> Form:
        from twinloop.tasks.forms import NetworkForm, describe_gguf, gguf_network

        path, directory = self._gguf_file(), self.folder / "gguf"
        network = gguf_network(describe_gguf(path, directory))
        return NetworkForm("gguf", directory, file_digest(path), network, threads=self.threads)

    def _llama_cpp(self) -> Form:
        from twinloop.tasks.forms import describe_gguf
        from twinloop.tasks.llama_cpp import LlamaCppForm, find_server

        server = find_server()
        path, directory = self._gguf_file(), self.folder / "gguf"
        describe_gguf(path, directory)
        return LlamaCppForm(directory, file_digest(path), server, path, threads=self.threads)

    def _gguf_file(self) -> Path:
        """The model as `twinloop export` writes it. Raises UserError where llama.cpp has no such tokenizer."""
        from twinloop.models.directory import load_config
        from twinloop.models.gguf_vocabulary import read_vocabulary
        from twinloop.models.gguf_writer import write_gguf

        path, model = self.folder / "model.gguf", self.release.model.path
        if not path.exists():
            vocabulary = read_vocabulary(model, load_config(model).vocab_size)
            write_gguf(model, path, vocabulary, type="f16", name="compared")
        return path

    def _exported(self, precision: Precision) -> Form:
        from twinloop.models.directory import load_config
        from twinloop.models.exported import export_model
        from twinloop.tasks.forms import ExportedForm

        if stored := self.release.exported.get(precision):
            return ExportedForm(precision, stored.path, stored.digest, threads=self.threads)
        path, model = self.folder / precision, self.release.model.path
        export_model(model, path, precision=precision, max_length=load_config(model).max_position_embeddings)
        return ExportedForm(precision, path, content_digest(path), threads=self.threads)


def read_parity(artifact: Artifact) -> ParityReport:
    from twinloop.evaluation.parity_report import ParityReport

    return ParityReport.model_validate_json((artifact.path / PARITY_REPORT).read_bytes())
