"""A release whose forms do not answer alike is blocked, by the form and the limit that it breaks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from labelling import ANSWERS, RUNTIME, SETTINGS, compared, edit, exported, stored

from twinloop.common.errors import UserError
from twinloop.evaluation.case_report import CaseReport
from twinloop.evaluation.gate import GateReport, load_rules
from twinloop.models.adapter import Adapter
from twinloop.models.adapter_form import linear_layers
from twinloop.models.directory import load_config, load_tensors, save_adapted, save_model
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.registry.artifact import MANIFEST, Artifact
from twinloop.tasks.baseline import Baseline
from twinloop.tasks.context import Context
from twinloop.tasks.gate import gate_stage, read_gate_report
from twinloop.tasks.measure import write_cases
from twinloop.tasks.parity import Release, parity_stage, read_parity


def with_tensors(
    context: Context, model: Artifact, fault: str, change: Callable[[dict[str, np.ndarray]], None]
) -> Artifact:
    """The model with other tensors, exported."""

    def write(out: Path) -> None:
        shutil.copytree(model.path, out, dirs_exist_ok=True)
        tensors = load_tensors(model.path)
        change(tensors)
        save_model(out, load_config(model.path), tensors)

    return exported(context, stored(context, "faulty", {"fault": fault}, write))


def with_files(context: Context, model: Artifact, fault: str, change: Callable[[Path], None]) -> Artifact:
    """The exported model with another file beside its graph."""
    right = exported(context, model)

    def write(out: Path) -> dict[str, Any]:
        shutil.copytree(right.path, out, dirs_exist_ok=True)
        change(out)
        return right.metrics

    return stored(context, "faulty-export", {"fault": fault}, write)


def judged(context: Context, data: Artifact, model: Artifact, served: Artifact, *others: Artifact) -> GateReport:
    """What the gate says of a release of these."""
    rules = load_rules(context.project / "gate.yaml", context.domain)
    release = Release(model, {each.metrics["precision"]: each for each in (served, *others)})
    parity = parity_stage(context, SETTINGS, RUNTIME, data=data, release=release, forms=release.forms(rules.forms))

    def write(out: Path) -> dict[str, Any]:
        nothing: dict[str, Any] = {"by_kind": {}, "pairs": {}, "by_predicate": {}, "violations": {}, "measured": {}}
        empty = {"results": (), "failures": (), "unparsed": 0, "truncated": 0, "cases_digest": ""}
        write_cases(out, CaseReport(overall={"successes": 0, "total": 0}, **nothing, **empty))
        return {"p95_ttft_ms": 1.0, "memory_gib": 0.1}

    evaluation = stored(context, "evaluate", {}, write)
    return read_gate_report(
        gate_stage(
            context, rules, exported=served, evaluation=evaluation, parity=parity, champion=None,
            baseline=Baseline(),
        )
    )  # fmt: skip


def blocked(report: GateReport) -> dict[str, str]:
    """The lines of the rules that block, by their names."""
    lines = [line.split(maxsplit=2) for line in report.text().splitlines() if line.startswith("  BLOCK")]
    return {name: rest for _, name, rest in lines}


def test_forms_that_answer_alike_ship(context: Context, data: Artifact, model: Artifact) -> None:
    report = judged(context, data, model, exported(context, model), exported(context, model, "int8"))
    assert report.decision == "SHIP", report.text()
    assert len(report.checks) == 10


def test_a_changed_template_blocks(context: Context, data: Artifact, model: Artifact) -> None:
    def change(out: Path) -> None:
        path = out / "tokenizer_config.json"
        template = json.loads(path.read_text())["chat_template"]
        edit(path, chat_template=template.replace("+ '<|end|>'", "+ ' <|end|>'"))

    report = judged(context, data, model, with_files(context, model, "template", change))
    assert report.decision == "BLOCK"
    found = blocked(report)["parity.fp32.prompt_changes"]
    assert found.startswith("5  at most 0  case late: prompt: token ")
    assert "look at ONNX export: this form's tokenizer or template writes other tokens" in report.text()


def test_another_stop_token_blocks(context: Context, data: Artifact, model: Artifact) -> None:
    tokenizer = ChatTokenizer.load(model.path)
    stop = tokenizer.stop_id

    def change(out: Path) -> None:
        edit(out / "tokenizer_config.json", eos_token="<|user|>")

    report = judged(context, data, model, with_files(context, model, "stop token", change))
    assert report.decision == "BLOCK"
    found = blocked(report)["parity.fp32.stop_changes"]
    assert found.startswith("1  at most 0  tokenizer_config.json: stop token ")
    assert f"and {stop} was trained" in found


def test_a_stop_token_is_looked_for_in_every_file_that_names_one(
    context: Context, data: Artifact, model: Artifact, tmp_path: Path
) -> None:
    tokenizer = ChatTokenizer.load(model.path)
    copy = shutil.copytree(exported(context, model).path, tmp_path / "copy")
    edit(copy / "config.json", eos_token_id=tokenizer.pad_id)
    edit(copy / "generation_config.json", eos_token_id=[tokenizer.stop_id, tokenizer.pad_id])
    release = Release(model, {"fp32": Copied(copy, "another")})
    found = compared(context, data, release, "fp32").of("fp32")
    assert found is not None
    assert found.stop_changes == 2
    assert [problem.split(":")[0] for problem in found.problems["stop_changes"]] == [
        "config.json", "generation_config.json",
    ]  # fmt: skip
    (copy / "generation_config.json").unlink()
    found = compared(context, data, release, "fp32").of("fp32")
    assert found is not None
    assert found.problems["stop_changes"][1].startswith("generation_config.json: no stop token, and ")


@dataclass(frozen=True)
class Copied:
    """A directory that is no artifact."""

    path: Path
    digest: str


def test_a_merge_at_twice_its_scale_blocks(context: Context, data: Artifact, model: Artifact) -> None:
    """The trained network is base + delta; the form has base + 2 * delta."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(0, 0.3, shape).astype(np.float32) for shape in ((2, 32), (32, 2)))

    def twice(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.0.self_attn.q_proj.weight"] += b @ a

    assert_tensors_block(context, data, model, "merge", twice)


def test_permuted_rotary_rows_block(context: Context, data: Artifact, model: Artifact) -> None:
    """Rows of queries and keys in the order of pairs (i, i + 1), as GGUF's Llama has them."""

    def permute(tensors: dict[str, np.ndarray]) -> None:
        for kind in "qk":
            name = f"model.layers.1.self_attn.{kind}_proj.weight"
            tensors[name] = tensors[name].reshape(2, 2, 8, 32).swapaxes(1, 2).reshape(32, 32)

    assert_tensors_block(context, data, model, "rotary", permute)


def test_a_transposed_tensor_blocks(context: Context, data: Artifact, model: Artifact) -> None:
    def transpose(tensors: dict[str, np.ndarray]) -> None:
        name = "model.layers.0.self_attn.o_proj.weight"
        tensors[name] = tensors[name].T

    assert_tensors_block(context, data, model, "transposed", transpose)


def assert_tensors_block(
    context: Context, data: Artifact, model: Artifact, fault: str, change: Callable[[dict[str, np.ndarray]], None]
) -> None:
    report = judged(context, data, model, with_tensors(context, model, fault, change))
    assert report.decision == "BLOCK"
    found = blocked(report)
    assert "at most 0.05" in found["parity.fp32.logit_gap"]
    assert "at most 0.05" in found["parity_logit_gap"]
    assert not {name for name in found if "prompt" in name or "stop_" in name}
    assert (
        "look at ONNX export: this form computes other logits than the network (parity.fp32.logit_gap)" in report.text()
    )


def test_a_form_that_cannot_be_compared_blocks_with_the_reason(
    context: Context, data: Artifact, model: Artifact
) -> None:
    def cut(out: Path) -> None:
        path = out / "model.onnx.data"
        path.write_bytes(path.read_bytes()[:-8])

    report = judged(context, data, model, with_files(context, model, "cut", cut))
    assert report.decision == "BLOCK"
    assert "not measured: " in blocked(report)["parity.fp32.tokens"]
    assert "corrupt" in blocked(report)["parity.fp32.tokens"]


def test_what_a_release_has_not_is_made_of_its_network_and_reported(
    context: Context, data: Artifact, model: Artifact
) -> None:
    release = Release(model, {"fp32": exported(context, model)})
    forms = release.forms(["int4", "fp16"])
    found = read_parity(parity_stage(context, SETTINGS, RUNTIME, data=data, release=release, forms=forms))
    assert [form.form for form in found.forms] == ["network", "fp32", "int4"]
    assert "CUDA" in found.missing["fp16"]
    network, fp32, int4 = found.forms
    assert (network.reference, network.digest, fp32.digest) == (True, model.digest, release.exported["fp32"].digest)
    assert len(int4.digest) == 64
    assert (fp32.tokens, fp32.verdict_changes, fp32.stopped) == (1.0, 0, 1.0)
    assert fp32.logit_gap is not None
    assert int4.logit_gap is not None
    assert 0 < fp32.logit_gap < 1e-3 < int4.logit_gap
    assert set(found.cases) == set(ANSWERS)
    with pytest.raises(UserError, match=r"int3: no form has this name; there are: network, .*int8"):
        release.forms(["int3"])


def test_the_same_bytes_are_compared_once_by_the_same_tools(
    context: Context, data: Artifact, model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reused(*forms: str, **changes: object) -> bool:
        runtime, release = RUNTIME.model_copy(update=changes), Release(model, {})
        return parity_stage(context, SETTINGS, runtime, data=data, release=release, forms=forms).reused

    assert [reused(), reused(), reused(device="cuda")] == [False, True, False]
    monkeypatch.setenv("PATH", str(tmp_path))
    (server := tmp_path / "llama-server").touch(0o755)
    assert [reused("llama.cpp"), reused("llama.cpp")] == [False, True]
    server.write_text("a newer one")
    assert not reused("llama.cpp")


def adapted(context: Context, model: Artifact, **changes: object) -> Artifact:
    """The model with an adapter that was trained on top of it; some fields of its adapter_config.json changed."""
    network, rng = load_config(model.path), np.random.default_rng(0)
    factors = {
        name: (
            rng.normal(0, 0.2, (2, shape[1])).astype(np.float32),
            rng.normal(0, 0.2, (shape[0], 2)).astype(np.float32),
        )
        for name, shape in linear_layers(network).items()
    }

    def write(out: Path) -> None:
        save_adapted(out, model.path, Adapter(factors, alpha=2.0), skip=MANIFEST)
        edit(out / "adapter" / "adapter_config.json", **changes)

    return stored(context, "adapted", {"changes": str(changes)}, write)


def test_an_adapter_merged_at_twice_its_scale_blocks(context: Context, data: Artifact, model: Artifact) -> None:
    trained, twice = adapted(context, model), adapted(context, model, lora_alpha=4.0)
    release = Release(trained, {"fp32": exported(context, trained)})
    forms = release.forms(())
    assert forms == ("network", "merged", "fp32")
    found = read_parity(parity_stage(context, SETTINGS, RUNTIME, data=data, release=release, forms=forms))
    for form in found.forms:
        assert form.tokens == 1.0
        assert form.logit_gap is not None
        assert form.logit_gap < 1e-3
    report = judged(context, data, trained, exported(context, twice))
    assert report.decision == "BLOCK"
    assert "at most 0.05" in blocked(report)["parity.fp32.logit_gap"]
