"""What several models answer to the same cases, for people or the verifier to prefer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinloop.common.errors import UserError
from twinloop.models.config import DecoderConfig
from twinloop.registry.artifact import Artifact, content_digest
from twinloop.registry.versions import Registry
from twinloop.tasks.context import Context, Report
from twinloop.tasks.measure import choose_cases, export_in
from twinloop.tasks.recipe import EvaluateSettings
from twinloop.training.runtime import Runtime

if TYPE_CHECKING:
    from twinloop.evaluation.cases import Case

ANSWERS = "answers.json"


@dataclass(frozen=True)
class Compared:
    """A model to ask. exported: whether it is a graph that the engine runs as it is, or weights to be exported."""

    name: str
    path: Path
    digest: str
    exported: bool


def find_models(context: Context, named: Sequence[str]) -> list[Compared]:
    """Versions of the model by number or alias, and model directories, verified.

    Raises UserError for what is neither, for fewer than two, and where two of them are the same bytes.
    """
    if len(named) < 2:
        raise UserError("compare: name two models or more: versions by number or alias, or model directories")
    found = [_find(context, name) for name in named]
    for place, model in enumerate(found):
        for other in found[:place]:
            if other.digest == model.digest:
                raise UserError(f"compare: {other.name} and {model.name} are the same model; name others")
    return found


def _find(context: Context, name: str) -> Compared:
    from twinloop.models.directory import load_config
    from twinloop.models.exported import EXPORT_FILE

    path = Path(name).expanduser()
    registry = Registry(context.mlruns, context.recipe)
    if not name.isdecimal() and path.exists():
        if (path / EXPORT_FILE).exists():
            _check_answers(name, load_config(path))
            return Compared(name, path, content_digest(path), exported=True)
        from twinloop.models.source import open_source

        source = open_source(path)
        _check_answers(name, source.config)
        return Compared(name, path, source.digest(), exported=False)
    if "/" in name:
        raise UserError(f"compare: {name}: no such directory")
    version = registry.named(name)
    title = str(version) if name.isdecimal() else f"{version} ({name})"
    verified = registry.verify(version)
    _check_answers(title, load_config(verified.path))
    return Compared(title, verified.path, version.digest, exported=version.exported)


def _check_answers(name: str, config: DecoderConfig) -> None:
    if config.kind == "reward":
        raise UserError(f"compare: {name} is a reward model, which scores answers and gives none; name others")


def read_compared_cases(context: Context, data: Artifact, limit: int | None) -> list[Case]:
    """The cases that are answered: all, or about `limit`, the same ones each time. Raises UserError for none."""
    from twinloop.evaluation.cases import read_cases
    from twinloop.records.validated import read_records

    cases = read_cases(choose_cases(read_records(data.path, "cases"), context.domain, limit), context.domain)
    if not cases:
        raise UserError("compare: there are no cases to answer; add some to the data, or raise --cases")
    return cases


def answers_stage(
    context: Context,
    settings: EvaluateSettings,
    runtime: Runtime,
    *,
    model: Compared,
    cases: Sequence[Case],
) -> dict[str, str]:
    """The greedy answer of a model to each case, by its id. What it answered before is not asked again."""
    from twinloop.serving.answer_form import stated_form

    form = stated_form(context.domain)

    def work(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        from twinloop.evaluation.cases import BATCH
        from twinloop.models.label_tokenizer import load_answering
        from twinloop.serving.answer_form import form_grammar
        from twinloop.serving.engine import Engine
        from twinloop.serving.engine.sampling import SamplingParams

        exported = model.path if model.exported else _export(model, keep, runtime)
        tokenizer = load_answering(exported)
        engine = Engine.load(exported, slots=settings.slots, threads=runtime.threads)
        grammar = form_grammar(form, tokenizer)
        greedy = SamplingParams(max_tokens=settings.max_new_tokens, stop=tokenizer.stop_ids, constraint=grammar)
        answers: dict[str, str] = {}
        for start in range(0, len(cases), BATCH):
            batch = cases[start : start + BATCH]
            completions = engine.generate([tokenizer.encode_prompt(case.prompt) for case in batch], greedy)
            for case, completion in zip(batch, completions, strict=True):
                answers[case.case_id] = tokenizer.decode(completion.tokens)
            report.moved(len(answers), len(cases))
        (out / ANSWERS).write_text(json.dumps(answers, indent=1) + "\n")
        return {"answers": len(answers)}

    artifact = context.run(
        "answers",
        work,
        settings={
            "prompts": _digest_of_prompts(cases),
            "form": form,
            "max_new_tokens": settings.max_new_tokens,
            "slots": settings.slots,
            "threads": runtime.threads,
            "precision": runtime.precision,
        },
        inputs={"model": model.digest},
        modules=("twinloop.tasks.compare",),
        label=f"answers {model.name}",
    )
    answers: dict[str, str] = json.loads((artifact.path / ANSWERS).read_bytes())
    return answers


def _digest_of_prompts(cases: Sequence[Case]) -> str:
    return hashlib.sha256(json.dumps([(case.case_id, case.prompt) for case in cases]).encode()).hexdigest()


def _export(model: Compared, keep: Path, runtime: Runtime) -> Path:
    """Weights, of whatever form, as a graph."""
    from twinloop.models.directory import save_model
    from twinloop.models.source import open_source
    from twinloop.tasks.base_source import DEFAULT_MAX_LENGTH

    source = open_source(model.path)
    length = min(source.config.max_position_embeddings, DEFAULT_MAX_LENGTH)
    config = source.config.model_copy(update={"max_position_embeddings": length})
    save_model(keep / "model", config, source.load_weights(), source.load_tokenizer())
    return export_in(keep, keep / "model", runtime)
