"""What does not fit is told before anything is trained, by file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from twinloop.common.errors import UserError
from twinloop.domains.returns import domain
from twinloop.domains.returns.generator import GeneratorParams, generate
from twinloop.models.tokenizer import train_tokenizer
from twinloop.records.validated import read_records
from twinloop.records.validation import validate
from twinloop.registry.artifact import Artifact, ArtifactStore
from twinloop.tasks.lengths import check_lengths, measure_lengths
from twinloop.tasks.recipe import Recipe, ValidateSettings, load_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "tiny.yaml"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records let in by validation, in which the third of prompts is broken and the fifth is the longest."""
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
    validate(folder / "data", folder / "validated", ValidateSettings(max_quarantined=0.5), domain, {"prompts"})
    return folder / "validated"


@pytest.fixture(scope="module")
def tokenizer(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """As the stage leaves it, as far as lengths go."""
    learned = train_tokenizer((record["text"] for record in read_records(data, "corpus")), 512)
    store = ArtifactStore(tmp_path_factory.mktemp("artifacts"))

    def build(out: Path, work: Path) -> dict[str, object]:
        return {"longest": measure_lengths(learned, data)}

    return store.run("tokenize", settings={}, inputs={}, code="", build=build)


def recipe(**sections: dict[str, int]) -> Recipe:
    roomy = load_recipe(RECIPE).model_copy(
        update={"model": load_recipe(RECIPE).model.model_copy(update={"max_length": 4096})}
    )
    return roomy.model_copy(
        update={name: getattr(roomy, name).model_copy(update=changes) for name, changes in sections.items()}
    )


def longest(tokenizer: Artifact, kind: str) -> int:
    tokens: int = tokenizer.metrics["longest"][kind]["tokens"]
    return tokens


@pytest.mark.parametrize(
    ("kind", "sections", "said"),
    [
        ("example", lambda n: {"sft": {"row_length": n}}, "sft.row_length"),
        ("pair", lambda n: {"dpo": {"row_length": n}}, "prompt and both answers"),
        ("rl_prompt", lambda n: {"rlvr": {"max_new_tokens": 4096 - n}}, "model.max_length less rlvr.max_new_tokens"),
        ("case_prompt", lambda n: {"evaluate": {"max_new_tokens": 4096 - n}}, "less evaluate.max_new_tokens"),
    ],
)
def test_a_record_fits_to_the_last_token_or_stops_the_run(tokenizer: Artifact, kind: str, sections, said: str) -> None:
    needed = longest(tokenizer, kind)
    check_lengths(recipe(**sections(needed)), tokenizer)
    with pytest.raises(UserError, match=said) as raised:
        check_lengths(recipe(**sections(needed - 1)), tokenizer)
    found = tokenizer.metrics["longest"][kind]
    assert str(raised.value).startswith(f"data/{found['file']} line {found['line']}: ")
    assert f"of {needed} tokens" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_line_is_that_of_the_users_file_where_rows_before_it_were_set_aside(tokenizer: Artifact) -> None:
    found = tokenizer.metrics["longest"]["rl_prompt"]
    assert (found["file"], found["line"]) == ("prompts.jsonl", 5)


def test_one_side_of_a_pair_must_fit_the_network_however_long_a_row_is(tokenizer: Artifact) -> None:
    side = longest(tokenizer, "pair_side")
    assert side < longest(tokenizer, "pair")
    with pytest.raises(UserError, match=r"(example|answer) of \d+ tokens, and .*model\.max_length"):
        check_lengths(recipe(model={"max_length": side - 1}, dpo={"row_length": 4096}), tokenizer)
