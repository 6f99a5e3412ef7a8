"""What does not fit is reported before anything is trained, by file and line."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from twinloop.common.errors import UserError
from twinloop.domains.returns import domain
from twinloop.domains.returns.case_maker import GeneratorParams
from twinloop.domains.returns.generator import generate
from twinloop.models.new_tokenizer import train_tokenizer
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.records.validated import read_records
from twinloop.records.validation import validate
from twinloop.tasks.check import check_form, check_lengths, check_stages, measure_lengths, measure_records
from twinloop.tasks.recipe import Recipe, TrainStage, ValidateSettings, load_recipe
from twinloop.training.method import load_method

RECIPE = load_recipe(Path(__file__).parents[2] / "recipes" / "tiny.yaml")
METHODS = {stage.method.name: stage.method for stage in RECIPE.train}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records that passed validation; of the prompts the third was broken and the fifth is the longest."""
    folder = tmp_path_factory.mktemp("lengths")
    sizes = {name: 20 for name, field in GeneratorParams.model_fields.items() if field.is_required()}
    generate(GeneratorParams(**sizes), folder / "data")
    path = folder / "data" / "prompts.jsonl"
    rows = path.read_text().splitlines()
    rows[2] = "{"
    longest = json.loads(rows[4])
    longest["prompt"][0]["content"] += " please" * 200
    rows[4] = json.dumps(longest)
    path.write_text("\n".join(rows) + "\n")
    validate(folder / "data", folder / "validated", ValidateSettings(max_quarantined=0.5), domain, RECIPE.record_types)
    return folder / "validated"


@pytest.fixture(scope="module")
def tokenizer(data: Path) -> ChatTokenizer:
    return train_tokenizer((record["text"] for record in read_records(data, "corpus")), 512)


@pytest.fixture(scope="module")
def longest(data: Path, tokenizer: ChatTokenizer) -> dict[str, Any]:
    return measure_lengths(list(METHODS.values()), tokenizer, data)


def key(name: str) -> str:
    """Under which the lengths of a method, or of the cases, are kept."""
    return METHODS[name].found.name if name in METHODS else name


def recipe(*, max_length: int = 4096, evaluated: int = 96, **stages: dict[str, int]) -> Recipe:
    """The recipe with limits above every record, but for what is changed."""
    changed = [
        replace(stage, settings=stage.settings.model_copy(update={"seq_len": 4096, **stages.get(stage.name, {})}))
        for stage in RECIPE.train
    ]
    update = {
        "base": RECIPE.base.model_copy(update={"max_length": max_length}),
        "evaluate": RECIPE.evaluate.model_copy(update={"max_new_tokens": evaluated}),
        "train": tuple(changed),
    }
    return RECIPE.model_copy(update=update)


def check(limited: Recipe, longest: dict[str, Any]) -> None:
    assert limited.base.max_length
    check_lengths(limited, longest, max_length=limited.base.max_length)


def test_a_form_that_does_not_allow_the_right_answer_is_reported_before_training(data, tokenizer, monkeypatch) -> None:
    check_form(domain, tokenizer, data)
    monkeypatch.setattr(type(domain), "answer_form", lambda self: {"regex": r"\{[^}]*\} and no more"})
    first = next(iter(read_records(data, "cases")))["case_id"]
    with pytest.raises(UserError, match=f"answer_form does not allow .* the right answer to case {first}; correct"):
        check_form(domain, tokenizer, data)


@pytest.mark.parametrize(
    ("method", "kind", "limited", "setting"),
    [
        ("sft", "packed", lambda n: recipe(sft={"seq_len": n}), "train[1].seq_len of sft is {n}, and {base}"),
        ("dpo", "packed", lambda n: recipe(dpo={"seq_len": n}), "train[2].seq_len of dpo is {n}, and {base}"),
        (
            "grpo",
            "path",
            lambda n: recipe(grpo={"max_new_tokens": 4096 - n}),
            "{base}, of which train[3].max_new_tokens of grpo takes {rest}",
        ),
        (
            "cases",
            "path",
            lambda n: recipe(evaluated=4096 - n),
            "{base}, of which evaluate.max_new_tokens takes {rest}",
        ),
    ],
)
def test_a_record_fits_to_the_last_token_or_stops_the_run(longest, method: str, kind: str, limited, setting) -> None:
    found = longest[key(method)][kind]
    needed = found["tokens"]
    check(limited(needed), longest)
    with pytest.raises(UserError) as raised:
        check(limited(needed - 1), longest)
    message = str(raised.value)
    settings = setting.format(n=needed - 1, rest=4096 - needed + 1, base="base.max_length is 4096")
    assert message == (
        f"data/{found['file']} line {found['line']}: a record of {needed} tokens, the longest that does not fit: "
        f"{settings}; shorten it, or raise the setting that is too small"
    )
    assert "\n" not in message


def test_the_line_is_that_of_the_users_file_where_rows_before_it_were_quarantined(longest) -> None:
    found = longest[key("grpo")]["path"]
    assert (found["file"], found["line"]) == ("prompts.jsonl", 5)


def test_one_side_of_a_pair_must_fit_the_network_however_long_a_row_is(longest) -> None:
    side = longest[key("dpo")]["path"]["tokens"]
    assert side < longest[key("dpo")]["packed"]["tokens"]
    with pytest.raises(UserError, match=r"base\.max_length is \d+, and train\[2\]\.seq_len of dpo is 4096"):
        check(recipe(max_length=side - 1), longest | {key("sft"): {}, key("grpo"): {}})


def test_of_all_records_that_do_not_fit_the_longest_is_named(longest) -> None:
    """Not that of the first stage."""
    lengths = {name: longest[key(name)]["packed" if name in ("sft", "dpo") else "path"] for name in ("sft", "dpo")}
    assert lengths["sft"]["tokens"] < lengths["dpo"]["tokens"]
    dpo, limited = lengths["dpo"], recipe(sft={"seq_len": 32}, dpo={"seq_len": 32})
    where = re.escape(f"{dpo['file']} line {dpo['line']}: a record of {dpo['tokens']} tokens")
    for dataset, folder in ((".", "data"), ("mine", "mine/data")):
        with pytest.raises(UserError, match=f"^{folder}/{where}"):
            check(limited.model_copy(update={"data": dataset}), longest)


def test_a_case_that_the_chat_template_refuses_is_named_by_its_line(
    data: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: ChatTokenizer, messages: Any) -> list[int]:
        raise UserError("chat template: conversation roles must alternate")

    monkeypatch.setattr(ChatTokenizer, "encode_prompt", refuse)
    with pytest.raises(
        UserError, match=r"^mine/data/cases\.jsonl line 1: chat template: conversation roles must alternate$"
    ):
        measure_lengths([], tokenizer, data, "mine/data")


def test_a_prompt_that_the_chat_template_refuses_is_named_by_its_line(
    data: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = ChatTokenizer.encode_prompt

    def refuse(self: ChatTokenizer, messages: Any) -> list[int]:
        if "please please" in messages[0]["content"]:
            raise UserError("chat template: too polite")
        return encode(self, messages)

    monkeypatch.setattr(ChatTokenizer, "encode_prompt", refuse)
    with pytest.raises(UserError) as raised:
        measure_records(METHODS["grpo"], tokenizer, data, "mine/data")
    assert str(raised.value) == (
        "mine/data/prompts.jsonl line 5: chat template: too polite; the template refuses 1 of 19"
    )


@pytest.mark.parametrize(
    ("of", "said"),
    [
        (domain, "the domain returns has no labels; derive it from Classification"),
        (SimpleNamespace(name="mails", labels=("late", "lately")), "late and lately begin with the same token"),
    ],
)
def test_a_stage_that_no_records_could_train_is_refused_before_those_before_it(
    tokenizer: ChatTokenizer, of: Any, said: str
) -> None:
    method = load_method("classify", Path.cwd())
    settings = method.settings.model_validate({"batch_tokens": 512, "learning_rate": 1e-3, "head": "words"})
    stage = TrainStage("classify", method, settings, "train[4]", {})
    with pytest.raises(UserError, match=rf"^train\[4\]: .*{said}"):
        check_stages(RECIPE.model_copy(update={"train": (*RECIPE.train, stage)}), tokenizer, of)
    check_stages(RECIPE, tokenizer, of)


def test_a_document_of_any_length_fits(longest) -> None:
    assert key("pretrain") not in longest


@pytest.mark.parametrize("name", list(METHODS))
def test_the_records_of_every_method_pass_the_chat_template(name: str, data: Path, tokenizer: ChatTokenizer) -> None:
    measure_records(METHODS[name], tokenizer, data)


def test_an_answer_that_would_be_trained_wrongly_is_reported_by_line(
    data: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template that puts something between an answer and its stop token."""
    encode = ChatTokenizer.encode_answer
    monkeypatch.setattr(ChatTokenizer, "encode_answer", lambda self, text: [7, *encode(self, text)])
    with pytest.raises(UserError, match=r"^mine/data/preferences\.jsonl line 1: the answer and its stop token do "):
        measure_records(METHODS["dpo"], tokenizer, data, "mine/data")


def test_two_methods_of_the_same_file_name_have_their_own_lengths(
    data: Path, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    methods = []
    for folder, tokens in (("first", 7), ("second", 9)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.py").write_text(
            "from twinloop.training.forms import Lengths\nfrom twinloop.training.methods.sft import *\n"
            f"def lengths(record, tokenizer):\n    return Lengths(packed={tokens}, path={tokens})\n"
        )
        methods.append(load_method(f"./{folder}/own.py", tmp_path))
    longest = measure_lengths(methods, tokenizer, data)
    assert [longest[method.found.name]["packed"]["tokens"] for method in methods] == [7, 9]
