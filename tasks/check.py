"""Whether every record can be trained on: its tokens under the chat template, and their number, before any training.

A record that does not fit would stop a later stage after hours, or be answered half. Lengths are measured once a
tokenizer and compared with the recipe's limits each time, so a changed limit measures nothing again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task
from pydantic import BaseModel, ConfigDict

from twinloop.common.errors import UserError
from twinloop.domains.domain import Domain, domain_code
from twinloop.records import DATA_DIR
from twinloop.registry.artifact import Artifact
from twinloop.tasks.context import Context, Report
from twinloop.tasks.recipe import Recipe
from twinloop.training.method import Method

if TYPE_CHECKING:
    from twinloop.models.jinja_template import Message
    from twinloop.models.tokenizer import ChatTokenizer
    from twinloop.training.forms import Lengths

LENGTHS = "lengths.json"
CASES = "cases"
CASES_IN_FORM = 200
"""Whose right answers are compared with the domain's form, at every run: a tenth of a second."""


class Longest(BaseModel):
    """The longest record of one kind. `line` is that of the user's file (a row, in Parquet)."""

    model_config = ConfigDict(frozen=True)

    tokens: int
    file: str
    line: int


@task(name="check", persist_result=False)
def check_records(context: Context, recipe: Recipe, *, data: Artifact, model: Artifact) -> Artifact:
    """The lengths of records under the tokenizer of `model`, in `metrics`.

    Raises UserError for a stage that its method cannot train whatever the records are, for an `answer_form` of the
    domain that cannot be kept to or does not allow the right answer, and for the first record that the chat template
    would train wrongly, or that is longer than the recipe allows.
    """
    from twinloop.models.directory import load_config
    from twinloop.models.tokenizer import ChatTokenizer

    tokenizer = ChatTokenizer.load(model.path)
    check_stages(recipe, tokenizer, context.domain)
    check_form(context.domain, tokenizer, data.path)
    methods = list(dict.fromkeys(stage.method for stage in recipe.train))

    def work(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        longest = measure_lengths(methods, tokenizer, data.path, recipe.data_dir)
        (out / LENGTHS).write_text(json.dumps(longest, indent=1) + "\n")
        return {"longest": longest}

    checked = context.run(
        "check",
        work,
        settings={"methods": [method.reading for method in methods]},
        inputs={"data": data, "model": model},
        modules=("twinloop.tasks.check", "twinloop.training.forms"),
        found=[method.found for method in methods],
    )
    check_lengths(recipe, checked.metrics["longest"], max_length=load_config(model.path).max_position_embeddings)
    return checked


def check_stages(recipe: Recipe, tokenizer: ChatTokenizer, domain: Domain) -> None:
    """Raises UserError as the stages' methods do, see `Method.check`."""
    for stage in recipe.train:
        try:
            stage.method.check(stage.settings, tokenizer, domain)
        except UserError as error:
            raise UserError(f"{stage.place}: {error}") from None


def check_form(domain: Domain, tokenizer: ChatTokenizer, data: Path) -> None:
    """Raises UserError for an `answer_form` that cannot be kept to, or does not allow the right answer to a case.

    data: the directory of a validate artifact.
    """
    from twinloop.evaluation.cases import facts_of
    from twinloop.records.validated import read_records
    from twinloop.serving.answer_form import form_grammar, stated_form

    grammar = form_grammar(stated_form(domain), tokenizer)
    if grammar is None or not domain.has("gold"):
        return
    for case in islice(read_records(data, CASES), CASES_IN_FORM):
        facts, about = facts_of(domain, case), f"case {case['case_id']}"
        with domain_code(domain, "gold", about):
            gold = domain.gold(facts)
        if not grammar.takes(gold):
            raise UserError(
                f"domain {domain.name}: answer_form does not allow {gold!r}, the right answer to {about}; correct it "
                "in the domain's module"
            )


def measure_lengths(
    methods: Sequence[Method], tokenizer: ChatTokenizer, data: Path, folder: str = DATA_DIR
) -> dict[str, Any]:
    """`Longest` as plain values: by a method's `reading`, its `packed` and `path`; of cases, the prompts' `path`.

    data: the directory of a validate artifact. folder: of the user's files. Raises UserError as `measure_records`, and
    for a case whose prompt the chat template refuses: the server would too.
    """
    from twinloop.records.validated import read_records, source_line

    measured = {method.reading: measure_records(method, tokenizer, data, folder) for method in methods}
    prompts = []
    for row, case in enumerate(read_records(data, CASES)):
        try:
            prompts.append(len(tokenizer.encode_prompt(case["prompt"])))
        except UserError as error:
            file, line = source_line(data, CASES, row)
            raise UserError(f"{folder}/{file} line {line}: {error}") from None
    found = {reading: kinds for reading, kinds in measured.items() if kinds}
    return found | {CASES: {"path": _longest(data, CASES, prompts)}}


def measure_records(
    method: Method, tokenizer: ChatTokenizer, data: Path, folder: str = DATA_DIR
) -> dict[str, dict[str, Any]]:
    """`Longest` of a method's records, `packed` and `path`, as plain values; none where documents are cut into rows.

    Raises UserError where the stop token of an answer would not be trained, where the tokens of its prompt do not begin
    those of the conversation, or where the chat template refuses a prompt.
    """
    from twinloop.models.template_check import check_template
    from twinloop.records.validated import read_records, source_line

    rows: list[int] = []
    lengths: list[Lengths | None] = []
    refused: dict[int, UserError] = {}

    def conversations() -> Iterator[Sequence[Message]]:
        for row, record in enumerate(read_records(data, method.records)):
            for conversation in method.conversations(record):
                rows.append(row)
                yield conversation
            # When its conversations are checked, since the tokenizer remembers what it has just encoded.
            try:
                lengths.append(method.lengths(record, tokenizer))
            except UserError as error:
                lengths.append(None)
                refused[row] = error

    checked = check_template(tokenizer, conversations())
    if not checked.passed:
        first = checked.problems[0]
        file, line = source_line(data, method.records, rows[first.index])
        raise UserError(
            f"{folder}/{file} line {line}: {first.problem}; {len(checked.problems)} of {checked.examples} would be "
            "trained wrongly"
        )
    for row, error in refused.items():
        file, line = source_line(data, method.records, row)
        raise UserError(f"{folder}/{file} line {line}: {error}; the template refuses {len(refused)} of {len(lengths)}")
    tokens = {kind: [getattr(each, kind) if each else 0 for each in lengths] for kind in ("packed", "path")}
    return {kind: _longest(data, method.records, each) for kind, each in tokens.items() if any(each)}


def _longest(data: Path, name: str, tokens: Sequence[int]) -> dict[str, Any]:
    from twinloop.records.validated import source_line

    index = max(range(len(tokens)), key=lambda index: tokens[index])
    file, line = source_line(data, name, index)
    return Longest(tokens=tokens[index], file=file, line=line).model_dump()


def check_lengths(recipe: Recipe, longest: Mapping[str, Mapping[str, Any]], *, max_length: int) -> None:
    """Raises UserError for the longest record that does not fit. longest: as `measure_lengths` returns it. max_length:
    tokens that the model takes."""
    too_long = [each for each in _limits(recipe, longest, max_length) if each.record.tokens > each.tokens]
    if too_long:
        worst = max(too_long, key=lambda each: each.record.tokens)
        record = worst.record
        raise UserError(
            f"{recipe.data_dir}/{record.file} line {record.line}: a record of {record.tokens} tokens, the longest that "
            f"does not fit: {worst.settings}; shorten it, or raise the setting that is too small"
        )


@dataclass(frozen=True)
class _Limit:
    """The longest record of one kind, how many tokens it may have, and the settings that say so."""

    record: Longest
    tokens: int
    settings: str


def _limits(recipe: Recipe, longest: Mapping[str, Mapping[str, Any]], positions: int) -> Iterator[_Limit]:
    base = f"base.max_length is {positions}"
    for stage in recipe.train:
        measured, settings = longest.get(stage.method.reading, {}), stage.settings
        seq_len: int | None = getattr(settings, "seq_len", None)
        row = f"{stage.place}.seq_len of {stage.name} is {seq_len}"
        if "packed" in measured and seq_len is not None:
            yield _Limit(Longest.model_validate(measured["packed"]), seq_len, f"{row}, and {base}")
        if "path" in measured:
            record, sampled = Longest.model_validate(measured["path"]), settings.answer_tokens()
            other = f", and {row}" if seq_len is not None else ""
            takes = f", of which {stage.place}.max_new_tokens of {stage.name} takes {sampled}" if sampled else other
            yield _Limit(record, positions - sampled, base + takes)
    sampled = recipe.answer_tokens
    takes = f"{base}, of which evaluate.max_new_tokens takes {sampled}"
    yield _Limit(Longest.model_validate(longest[CASES]["path"]), positions - sampled, takes)
