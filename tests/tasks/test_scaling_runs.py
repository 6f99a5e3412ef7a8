"""`twinloop plan --budget` on a tiny corpus: small runs, each once, and what follows from them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from silent import Silent

from twinloop.common.errors import UserError
from twinloop.domains.returns.case_maker import GeneratorParams
from twinloop.domains.returns.generator import generate
from twinloop.evaluation.scaling import Choice
from twinloop.flows.scaling import print_plan
from twinloop.models.config import DecoderConfig
from twinloop.records.dataset import DataVersion
from twinloop.tasks.base_settings import NewBase
from twinloop.tasks.context import Context
from twinloop.tasks.prepare import validate_stage
from twinloop.tasks.recipe import Recipe, load_recipe
from twinloop.tasks.scaling import Corpus, Measured, grid, measure_runs, of_depth, open_corpus, pretraining_of
from twinloop.tasks.scaling_plan import Budget, parse_budget, parse_tokens, plan_budget
from twinloop.training.runtime import Runtime

PROJECT = Path(__file__).parents[2]
PRETRAIN = {"method": "pretrain", "tokens": 60_000, "batch_tokens": 64, "seq_len": 64, "learning_rate": 3e-3}
FIELDS: dict[str, Any] = {
    "name": "tiny",
    "domain": "returns",
    "base": {"depth": 2, "hidden_size": 32, "num_attention_heads": 2, "max_length": 128, "vocab_size": 300},
    "evaluate": {"max_new_tokens": 32},
    "train": [PRETRAIN],
}
LONGEST = 10_000
RUNTIME = Runtime(seed=1, threads=1)


def any_amount(run: Measured) -> None:
    """A budget that holds any run."""


def read(folder: Path, **changes: Any) -> Recipe:
    (folder / "recipe.yaml").write_text(json.dumps(FIELDS | changes))
    return load_recipe(folder / "recipe.yaml", folder)


@pytest.fixture(scope="module", autouse=True)
def _short_runs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("twinloop.tasks.scaling.MIN_STEPS", 50)
        yield


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    folder = tmp_path_factory.mktemp("scaling")
    sizes = {name: 40 for name, field in GeneratorParams.model_fields.items() if field.is_required()}
    generate(GeneratorParams(**sizes | {"heldout_documents": 8}), folder / "data")
    recipe = read(folder)
    return Context.of(folder, folder / "recipe.yaml", recipe, Silent()).on_data("0" * 32)


@pytest.fixture(scope="module")
def corpus(context: Context) -> Corpus:
    recipe = read(context.project)
    version = DataVersion("0" * 32, context.project / "data")
    data = validate_stage(context, recipe.validate_, needed=recipe.record_types, data=version)
    return open_corpus(context, recipe, data=data)


@pytest.fixture(scope="module")
def runs(context: Context, corpus: Corpus) -> list[Measured]:
    return measure_runs(context, corpus, RUNTIME, LONGEST, enough=any_amount)


def test_six_runs_of_three_sizes_decay_to_their_own_tokens(runs: list[Measured]) -> None:
    assert sorted({run.depth for run in runs}) == [1, 2, 3]
    assert [sorted(run.tokens for run in runs if run.depth == depth) for depth in (1, 2, 3)] == [
        [pytest.approx(LONGEST / 3, rel=0.1), pytest.approx(LONGEST, rel=0.1)]
    ] * 3
    for depth in (1, 2, 3):
        short, long = sorted((run for run in runs if run.depth == depth), key=lambda run: run.tokens)
        assert long.loss < short.loss < 8
        assert long.seconds > 0


def test_a_second_call_finds_every_run_whatever_its_budget(
    context: Context, corpus: Corpus, runs: list[Measured], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*_: object, **__: object) -> None:
        raise AssertionError("it trains again")

    monkeypatch.setattr("twinloop.training.loop.run_training", train)
    assert measure_runs(context, corpus, RUNTIME, LONGEST, enough=any_amount) == runs


def test_a_stopped_run_goes_on_from_its_checkpoint_to_the_same_loss(context: Context, corpus: Corpus) -> None:
    """Ctrl-C in the last of the runs: what was done is kept."""
    other = Context.of(context.project, Path("recipe.yaml"), corpus.recipe, Silent()).on_data("0" * 32)
    seen: list[int] = []

    class StoppingError(KeyboardInterrupt):
        pass

    class Stopping(Silent):
        def stepped(self, stage: str, done: float, total: float, metrics: object) -> None:
            if stage.startswith("depth 3, 11k") and done == total // 2:
                raise StoppingError

    stopped = replace(other, progress=Stopping(), checkpoint_every_s=0.0)
    with pytest.raises(StoppingError):
        measure_runs(stopped, corpus, RUNTIME, 11_000, enough=any_amount)

    class Watching(Silent):
        def stepped(self, stage: str, done: float, total: float, metrics: object) -> None:
            seen.append(int(done))

    resumed = measure_runs(replace(other, progress=Watching()), corpus, RUNTIME, 11_000, enough=any_amount)
    assert seen, "the last run was not done"
    assert seen[0] > 1, "it began anew"
    assert len(resumed) == 6


@pytest.mark.parametrize("text", ["2h", "3e15", "5M"])
def test_a_plan_has_the_best_choice_the_rule_and_the_recipe(corpus: Corpus, runs: list[Measured], text: str) -> None:
    found = plan_budget(corpus, runs, parse_budget(text))
    best, rule, own = found.choices.values()
    assert best.loss(found.fit.law) <= rule.loss(found.fit.law) or text == "5M"
    assert own.tokens == 60_000
    assert own.size.depth == 2
    if text == "2h":
        assert found.seconds(best) == pytest.approx(7200, rel=1e-6)
    elif text == "3e15":
        assert found.flops(best) == pytest.approx(3e15, rel=1e-6)
    else:
        assert best.tokens == rule.tokens == 5e6
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_plan(found, console)
    shown = console.export_text()
    for said in ("small runs", "loss(N, D) =", "95%: E ", "predicted from the others", f"budget {text}", "20 tokens a"):
        assert said in shown
    assert "times the compute of the largest run" in shown
    assert f"`depth: {best.size.depth}`" in shown


def test_that_the_recipe_spends_more_than_the_budget_is_said_only_where_it_does(
    corpus: Corpus, runs: list[Measured]
) -> None:
    """Of 5M tokens the best network is the one that they are worth; a larger one loses less on as many."""
    found = plan_budget(corpus, runs, parse_budget("5M"))
    size, tokens = found.choices["best"].size, found.choices["best"].tokens
    larger = replace(size, depth=size.depth + 1, parameters=10 * size.parameters)
    for choice, said in (
        (Choice(larger, tokens), "gets a lower loss within the budget, by"),
        (Choice(size, 2 * tokens), "gets a lower loss, by more than the budget holds"),
        (Choice(size, tokens), None),
    ):
        notes = replace(found, choices={**found.choices, "the recipe": choice}).notes()
        assert [said in note for note in notes if "the recipe as it is" in note] == ([True] if said else [])


@pytest.mark.parametrize("text", ["0.001s", "1000000", "1k"])
def test_a_budget_smaller_than_a_run_is_refused_after_the_first(context: Context, corpus: Corpus, text: str) -> None:
    budget, done = parse_budget(text), []

    def enough(run: Measured) -> None:
        done.append(run)
        budget.check_holds(run)

    with pytest.raises(UserError, match="run of a fit already has") as raised:
        measure_runs(context, corpus, RUNTIME, LONGEST, enough=enough)
    assert "\n" not in str(raised.value)
    assert len(done) == 1


@pytest.mark.parametrize(
    ("longest", "said"),
    [(9_000, "fewer than 50 steps of 64; give at least 10k"), (10**9, "too few for runs of 1,000,000,000")],
)
def test_runs_too_short_or_too_long_for_the_corpus_are_refused(corpus: Corpus, longest: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        grid(corpus, longest)


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("2h", "time", 7200.0),
        ("1.5h", "time", 5400.0),
        ("90min", "time", 5400.0),
        ("45 s", "time", 45.0),
        ("2d", "time", 172800.0),
        ("3e15", "flops", 3e15),
        ("5M", "tokens", 5e6),
        ("2.5B", "tokens", 2.5e9),
    ],
)
def test_a_budget_is_time_flops_or_tokens(text: str, kind: str, amount: float) -> None:
    assert parse_budget(text) == Budget(kind, amount, text)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "two hours", "-2h", "0h", "2 weeks", "5m", "1e3e3", "nan", "1e999", "1e25M"])
def test_another_budget_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UserError, match="give time"):
        parse_budget(text)


def test_tokens_of_a_run() -> None:
    assert [parse_tokens(text) for text in ("500k", "2M", "300000")] == [500_000, 2_000_000, 300_000]
    for text in ("2h", "0k", "many", "-1M", "1e999"):
        with pytest.raises(UserError, match="give a number of tokens"):
            parse_tokens(text)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"train": [{"method": "sft", "batch_tokens": 64, "seq_len": 64, "learning_rate": 1e-3}]},
            "no stage pretrains",
        ),
        ({"base": {"path": "models/small"}}, "its base is trained already"),
    ],
)
def test_a_recipe_without_pretraining_of_a_new_network_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        pretraining_of(read(tmp_path, **changes))


def test_another_depth_keeps_the_proportions() -> None:
    def config(base: NewBase) -> DecoderConfig:
        return base.decoder_config(512)

    plain = NewBase(depth=4)
    assert config(of_depth(plain, 20)) == config(NewBase(depth=20))
    default = NewBase(depth=4, num_key_value_heads=4, qk_norm=True)
    assert config(of_depth(default, 4)) == config(default)
    for depth in (1, 2, 3, 8):
        expected = NewBase(depth=depth, num_key_value_heads=depth, qk_norm=True)
        assert config(of_depth(default, depth)) == config(expected)
    wide = config(of_depth(NewBase(depth=2, hidden_size=128, intermediate_size=256), 3))
    assert (wide.hidden_size, wide.intermediate_size, wide.num_hidden_layers) == (192, 384, 3)
    assert wide.num_attention_heads == 2 * wide.num_key_value_heads == 6
    for depth in range(1, 40):
        config(of_depth(NewBase(depth=3, hidden_size=96, num_attention_heads=6, num_key_value_heads=2), depth))
