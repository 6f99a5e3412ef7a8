"""Before anything is trained it is known which limits of forms this run cannot measure."""

from __future__ import annotations

from pathlib import Path

import pytest

from twinloop.common.errors import UserError
from twinloop.domains.chat import domain as chat
from twinloop.evaluation.gate import GateRules
from twinloop.tasks.outlook import foresee_forms
from twinloop.tasks.recipe import Recipe, load_recipe
from twinloop.training.runtime import Runtime

RECIPES = Path(__file__).parents[2] / "recipes"
CPU = Runtime(seed=1, threads=1, device="cpu")


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe(RECIPES / "tiny.yaml")


def limits(*forms: str) -> GateRules:
    return GateRules({f"parity.{form}.stop_changes": 0 for form in forms}, chat, "gate.yaml")


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ("merged", "the last stage of training keeps no adapter to merge"),
        ("fp16", "only CUDA runs it, and this run is on CPU"),
        ("llama.cpp", "llama-server is not on the path"),
    ],
)
def test_a_form_that_cannot_be_compared_here_is_refused(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, form: str, reason: str
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError) as raised:
        foresee_forms(recipe, CPU, limits("fp32", form))
    assert str(raised.value) == f"gate.yaml: no model can pass: parity.{form}: {reason}"


def test_an_exported_form_without_limits_is_reported(recipe: Recipe, caplog: pytest.LogCaptureFixture) -> None:
    foresee_forms(recipe, CPU, limits("fp32", "int8", "gguf"))
    assert caplog.messages == []
    foresee_forms(recipe, CPU, limits("int8"))
    assert caplog.messages == ["gate.yaml: no limits under `parity` for fp32: nothing blocks what differs in it"]


def test_the_recipe_with_adapters_fits_its_rules(caplog: pytest.LogCaptureFixture) -> None:
    foresee_forms(load_recipe(RECIPES / "smollm2.yaml"), CPU, limits("merged", "int8", "gguf"))
    assert caplog.messages == []
