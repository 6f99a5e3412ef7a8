"""`twinloop plan`: the steps and tokens of each stage are those of the run, and a busy machine is reported."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from silent import Silent

from twinloop.common.strict_yaml import parse_yaml
from twinloop.domains.returns import domain
from twinloop.domains.returns.case_maker import GeneratorParams
from twinloop.domains.returns.generator import generate
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.records.dataset import DataVersion
from twinloop.records.validated import read_records
from twinloop.registry.artifact import Artifact
from twinloop.tasks.base import base_stage
from twinloop.tasks.base_settings import NewBase
from twinloop.tasks.base_source import resolve_base
from twinloop.tasks.context import Context
from twinloop.tasks.other_processes import OtherProcesses
from twinloop.tasks.plan import SAMPLE, AnswerLength, Plan, StagePlan, make_plan
from twinloop.tasks.prepare import validate_stage
from twinloop.tasks.recipe import Recipe, load_recipe
from twinloop.tasks.tokenize import tokenize_stage
from twinloop.training.weights import load_decoder

PROJECT = Path(__file__).parents[2]


class Watched(Silent):
    """Notes which stages were finished."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def finished(self, stage: str, *, seconds: float | None, name: str) -> None:
        self.done.append(stage)


RECIPE = load_recipe(PROJECT / "recipes" / "tiny.yaml")


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    folder = tmp_path_factory.mktemp("plan")
    sizes = {name: 20 for name, field in GeneratorParams.model_fields.items() if field.is_required()}
    generate(GeneratorParams(**sizes | {"chat": 3 * SAMPLE, "preferences": 100}), folder / "data")
    return Context.of(folder, PROJECT / "recipes" / "tiny.yaml", RECIPE, Watched()).on_data("0" * 32)


@pytest.fixture(scope="module")
def data(context: Context) -> Artifact:
    version = DataVersion("0" * 32, context.project / "data")
    return validate_stage(context, RECIPE.validate_, needed=RECIPE.record_types, data=version)


@pytest.fixture(scope="module")
def plan(context: Context, data: Artifact) -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("twinloop.tasks.plan.PROBE_S", 0.0)  # steps and tokens are tested, not their seconds
        return make_plan(context, RECIPE, resolve_base(RECIPE, context.project), RECIPE.runtime(), data=data)


def base_of(recipe: Recipe, context: Context, data: Artifact) -> Path:
    """The directory of the base, as the plan made it."""
    assert isinstance(recipe.base, NewBase)
    records = [stage.method.records for stage in recipe.train]
    tokenizer = tokenize_stage(context, recipe.base.vocab_size, records=records, data=data)
    return base_stage(context, recipe.base, seed=recipe.seed, tokenizer=tokenizer).path


def real_steps(recipe: Recipe, context: Context, data: Artifact, name: str) -> int:
    stage = next(stage for stage in recipe.train if stage.name == name)
    base = base_of(recipe, context, data)
    tokenizer = ChatTokenizer.load(base)
    records = list(read_records(data.path, stage.method.records))
    _, batches = stage.method.build(records, load_decoder(base), tokenizer, stage.settings, recipe.runtime(), domain)
    return batches.total_steps


@pytest.mark.parametrize("name", ["pretrain", "sft", "dpo", "grpo"])
def test_steps_are_those_of_the_run_also_where_only_a_sample_was_built(
    context: Context, data: Artifact, plan: Plan, name: str
) -> None:
    planned = next(stage for stage in plan.stages if stage.name == name)
    assert planned.steps == pytest.approx(real_steps(RECIPE, context, data, name), rel=0.03)
    assert planned.tokens > 0
    assert planned.seconds > 0


def test_rollouts_of_the_untrained_network_are_trained_on(plan: Plan) -> None:
    """It gets no reward yet; the trained one gets some, and what is trained on that is the larger part of a step."""
    grpo = next(stage for stage in plan.stages if stage.name == "grpo")
    assert grpo.tokens > 1000


THINKING = """
from twinloop.domains.returns.domain import Returns


class Thinking(Returns):
    \"\"\"The decision is the last line of an answer, whatever is said before it.\"\"\"

    def verify(self, output, facts):
        return super().verify(output.rpartition("\\n")[2], facts)


domain = Thinking()
"""


def test_answers_of_rl_are_as_long_as_the_gold_ones_or_else_as_they_may_be(
    context: Context, data: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How long right answers are is not known where the verifier pays for more than the gold answer."""
    monkeypatch.setattr("twinloop.tasks.plan.PROBE_S", 0.0)
    (context.project / "thinking.py").write_text(THINKING)
    fields = parse_yaml((PROJECT / "recipes" / "tiny.yaml").read_text())
    rl = {**fields["train"][-1], "max_new_tokens": 200}

    def recipe_with(name: str) -> Recipe:
        path = context.project / "rl.yaml"
        path.write_text(json.dumps(fields | {"domain": name, "train": [rl]}))
        return load_recipe(path, context.project)

    def plan_of(recipe: Recipe) -> StagePlan:
        planned = Context.of(context.project, context.project / "rl.yaml", recipe, Silent()).on_data("0" * 32)
        [grpo] = make_plan(planned, recipe, resolve_base(recipe, planned.project), recipe.runtime(), data=data).stages
        return grpo

    recipe = recipe_with("returns")
    fixed, thinking = plan_of(recipe), plan_of(recipe_with("./thinking.py"))
    tokenizer = ChatTokenizer.load(base_of(recipe, context, data))
    facts = [domain.read_facts(record) for record in read_records(data.path, "prompts")]
    longest = max(len(tokenizer.encode_answer(domain.gold(each))) for each in facts)
    assert fixed.answers == AnswerLength(longest, is_bound=False)
    assert thinking.answers == AnswerLength(200, is_bound=True)
    answers, rest = divmod(thinking.tokens - fixed.tokens, 200 - longest)
    assert answers > 0
    assert rest == 0, "every answer has all the tokens that it may"


def test_a_reward_model_is_in_memory_while_the_network_is_trained_by_it(
    context: Context, data: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twinloop.tasks.plan.PROBE_S", 0.0)
    fields = parse_yaml((PROJECT / "recipes" / "tiny.yaml").read_text())
    rl = fields["train"][-1]
    head = {"method": "reward", "learning_rate": 1e-3, "batch_tokens": 512, "seq_len": 512}
    fields["train"] = [head, {**rl, "rewards": [{"model": "reward"}]}]
    path = context.project / "judged.yaml"
    path.write_text(json.dumps(fields))
    recipe = load_recipe(path, context.project)
    reward, grpo = make_plan(context, recipe, resolve_base(recipe, context.project), recipe.runtime(), data=data).stages
    assert reward.memory.reward_models_bytes == 0
    assert grpo.memory.reward_models_bytes > 0.9 * grpo.memory.weights_bytes


def test_a_stage_that_takes_more_memory_than_is_available_is_reported_before_it_is_tried(
    context: Context, data: Artifact, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("twinloop.tasks.plan.PROBE_S", 0.0)
    sft = RECIPE.model_copy(update={"train": RECIPE.train[1:2]})
    base = resolve_base(sft, context.project)
    for free, reported in ((2**40, []), (2**20, ["sft takes about "])):
        monkeypatch.setattr("twinloop.tasks.plan.available_bytes", lambda free=free: free)
        caplog.clear()
        make_plan(context, sft, base, sft.runtime(), data=data)
        said = [record.getMessage() for record in caplog.records if "available" in record.getMessage()]
        assert [message[:16] for message in said] == reported


def test_what_the_plan_needs_is_kept_for_the_run(context: Context, plan: Plan) -> None:
    assert {path.name for path in (context.project / "artifacts").iterdir()} >= {"validate", "tokenize", "base"}
    assert not (context.project / "artifacts" / "pretrain").exists()


def test_other_processes_are_noticed() -> None:
    """Whatever else the machine does, a child's own time on the cores is part of it."""
    others, before = OtherProcesses(), time.perf_counter()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"], check=True)
    assert others.cores() > 0.45 / (time.perf_counter() - before)
