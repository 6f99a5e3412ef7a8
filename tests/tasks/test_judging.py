"""The stages that judge a model take everything from the recipe's domain, and run anew when its verifier changes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from contexts import silent_context

from twinloop.common.errors import UserError
from twinloop.domains.loader import load_domain
from twinloop.domains.returns import domain as returns
from twinloop.evaluation.gate import GateRules
from twinloop.evaluation.metrics import Estimate
from twinloop.models.config import DecoderConfig
from twinloop.models.decoder import Decoder
from twinloop.models.directory import save_model
from twinloop.models.new_tokenizer import train_tokenizer
from twinloop.registry.artifact import Artifact
from twinloop.tasks.audit import audit_stage
from twinloop.tasks.baseline import Baseline
from twinloop.tasks.context import Context
from twinloop.tasks.evaluate import evaluate_stage
from twinloop.tasks.export import export_stage
from twinloop.tasks.gate import gate_stage, read_gate_report
from twinloop.tasks.measure import choose_cases, measure_stage, read_case_report
from twinloop.tasks.parity import Release, parity_stage
from twinloop.tasks.recipe import EvaluateSettings
from twinloop.training.runtime import Runtime

LABELS = Path(__file__).parents[1] / "evaluation" / "labels.py"
SETTINGS = EvaluateSettings(max_new_tokens=8, slots=2, samples=2, stage_cases=2)
RUNTIME = Runtime(seed=1, threads=1, device="cpu")


def with_domain(context: Context, source: str, folder: Path) -> Context:
    folder.mkdir()
    (folder / "labels.py").write_text(source)
    return replace(context, loaded_domain=load_domain("./labels.py", folder))


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    project = tmp_path_factory.mktemp("project")
    context = silent_context(project, "labels")
    return with_domain(context, LABELS.read_text(), project / "own")


def prompt(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def data(context: Context) -> Artifact:
    """Cases and prompts, and no held-out texts."""

    def write(out: Path, keep: Path) -> dict[str, Any]:
        rows = [("a", "golden", "spam"), ("b", "held_out", "billing"), ("c", "held_out", "delivery")]
        cases = [
            {"case_id": name, "kind": kind, "pair_id": None, "prompt": prompt(name), "facts": label,
             "expected": {"answer": label}}
            for name, kind, label in rows
        ]  # fmt: skip
        pl.DataFrame(cases).write_parquet(out / "cases.parquet")
        pl.DataFrame([{"prompt": prompt("a"), "facts": "spam"}]).write_parquet(out / "prompts.parquet")
        return {}

    return context.store.run("data", settings={}, inputs={}, code="", build=write)


@pytest.fixture(scope="module")
def model(context: Context) -> Artifact:
    def write(out: Path, keep: Path) -> dict[str, Any]:
        tokenizer = train_tokenizer(["billing delivery spam"], 270)
        torch.manual_seed(0)
        config = DecoderConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=1, num_key_value_heads=1, head_dim=32, max_position_embeddings=64,
        )  # fmt: skip
        tensors = {name: tensor.detach().numpy() for name, tensor in Decoder(config).state_dict().items()}
        save_model(out, config, tensors, tokenizer)
        return {}

    return context.store.run("sft", settings={}, inputs={}, code="", build=write)


@dataclass(frozen=True)
class Stages:
    """All stages that judge, and the export that they judge."""

    audit: Artifact
    measure: Artifact
    export: Artifact
    parity: Artifact
    evaluate: Artifact
    gate: Artifact

    @classmethod
    def run(cls, context: Context, data: Artifact, model: Artifact) -> Stages:
        measured = measure_stage(context, "sft", SETTINGS, RUNTIME, data=data, model=model)
        exported = export_stage(context, "fp32", 64, model=model)
        release = Release(model, {"fp32": exported})
        compared = parity_stage(context, SETTINGS, RUNTIME, data=data, release=release, forms=release.forms([]))
        evaluation = evaluate_stage(context, SETTINGS, RUNTIME, data=data, exported=exported.path, digest=exported)
        rules = GateRules({"keeps_customers_violations": 0, "accuracy": 0.5, "answer_perplexity": 1000}, context.domain)
        judged = gate_stage(
            context, rules, exported=exported, evaluation=evaluation, parity=compared, champion=None,
            baseline=Baseline(),
        )  # fmt: skip
        return cls(audit_stage(context, data=data), measured, exported, compared, evaluation, judged)

    @property
    def reused(self) -> set[str]:
        return {name for name, artifact in vars(self).items() if artifact.reused}


@pytest.fixture(scope="module")
def stages(context: Context, data: Artifact, model: Artifact) -> Stages:
    return Stages.run(context, data, model)


def test_a_domain_of_ones_own_is_measured_by_its_own_kinds_and_metrics(stages: Stages) -> None:
    assert stages.audit.metrics["refused"] == 3
    report = read_case_report(stages.evaluate)
    assert list(report.by_kind) == ["golden", "held_out"]
    assert report.measured["accuracy"].value == 0.0
    assert "pass_at_2" in report.measured
    metrics = stages.evaluate.metrics
    assert metrics["cases"] == 3
    assert 1 < metrics["answer_perplexity_low"] <= metrics["answer_perplexity"] <= metrics["answer_perplexity_high"]
    assert metrics["answer_bits_per_byte"] > 0
    assert metrics["predicates"].keys() == {"parsed", "label", "keeps_customers"}
    assert stages.measure.metrics["cases"] == 2
    report = read_gate_report(stages.gate)
    assert [(check.rule, check.outcome) for check in report.checks] == [
        ("keeps_customers_violations", "pass"),
        ("answer_perplexity", "pass"),
        ("accuracy", "block"),
    ]


def test_without_held_out_texts_their_loss_is_not_measured(stages: Stages) -> None:
    assert "bits_per_byte" not in stages.measure.metrics


def test_held_out_texts_are_measured_with_their_interval_in_the_files_and_in_mlflow(
    context: Context, data: Artifact, model: Artifact
) -> None:
    def write(out: Path, keep: Path) -> dict[str, Any]:
        shutil.copy(data.path / "cases.parquet", out)
        texts = ["billing delivery spam", "spam", "the delivery of the other customer"]
        pl.DataFrame({"text": texts}).write_parquet(out / "corpus_heldout.parquet")
        return {}

    texts = context.store.run("data", settings={"texts": 3}, inputs={}, code="", build=write)
    made = measure_stage(context, "sft", SETTINGS, RUNTIME, data=texts, model=model)
    kept = read_case_report(made).measured
    logged = context.mlruns.client.get_run(made.metrics["mlflow_run_id"]).data.metrics
    for name in ("bits_per_byte", "perplexity"):
        value, low, high = (made.metrics[each] for each in (name, f"{name}_low", f"{name}_high"))
        assert low < value < high
        assert kept[name] == Estimate(value=value, interval=(low, high))
        assert [logged[each] for each in (name, f"{name}_low", f"{name}_high")] == [value, low, high]


def test_a_changed_verifier_runs_exactly_the_stages_that_judge_anew(
    stages: Stages, context: Context, data: Artifact, model: Artifact, tmp_path: Path
) -> None:
    source = LABELS.read_text()
    same = with_domain(context, source + "# a comment\n", tmp_path / "same")
    assert Stages.run(same, data, model).reused == set(vars(stages))
    changed = with_domain(context, source.replace('"spam")', '"spam", "other")'), tmp_path / "changed")
    assert Stages.run(changed, data, model).reused == {"export"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda source: source.replace('"label": output == facts', '"label": True'), "other label (2)"),
        (lambda source: source.replace("def gold", "def golden").replace("def wrong", "def bad"), "no gold, no wrong"),
    ],
)
def test_a_failed_audit_names_the_domains_file(
    context: Context, data: Artifact, tmp_path: Path, change: Callable[[str], str], said: str
) -> None:
    bad = with_domain(context, change(LABELS.read_text()), tmp_path / "bad")
    with pytest.raises(UserError, match=rf"^{tmp_path}/bad/labels\.py: ") as raised:
        audit_stage(bad, data=data)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
    shutil.rmtree(tmp_path / "bad")


def test_regression_kinds_come_first_and_pairs_stay_whole() -> None:
    records = [{"case_id": f"held-{n}", "kind": "held_out", "pair_id": None} for n in range(10)]
    records += [{"case_id": f"golden-{n}", "kind": "golden", "pair_id": None} for n in range(3)]
    records += [{"case_id": f"{n}{side}", "kind": "contrast", "pair_id": f"p{n}"} for n in range(10) for side in "ab"]
    for limit in range(3, 34):
        chosen = choose_cases(records[::-1], returns, limit)
        assert limit - 1 <= len(chosen) <= limit
        assert {case["kind"] for case in chosen[:3]} == {"golden"}
        pairs = [case["pair_id"] for case in chosen if case["pair_id"]]
        assert all(pairs.count(pair) == 2 for pair in pairs)
        assert {case["case_id"] for case in chosen} == {
            case["case_id"] for case in choose_cases(records, returns, limit)
        }
