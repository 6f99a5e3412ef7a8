"""Adapters on disk are PEFT's: it reads ours, we read its own, and what is more than A and B is refused by name."""

import json
import os

import numpy as np
import pytest
import torch

from twinloop.common.errors import UserError
from twinloop.models.adapter import read_adapter, save_adapter
from twinloop.models.adapter_form import AdapterForm
from twinloop.models.config import DecoderConfig
from twinloop.models.directory import load_config, load_tensors, save_adapted, save_model
from twinloop.models.exported import export_model
from twinloop.training.adapters import adapter_of, attach_adapter, trained_tensors
from twinloop.training.weights import get_weights, load_decoder, new_decoder

CONFIG = DecoderConfig(
    vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, attention_bias=True,
)  # fmt: skip
TOKENS = torch.arange(3, 40)[None]
FORMS = {
    "all linear": AdapterForm(4, 16.0),
    "rank-stabilised": AdapterForm(9, 6.0, rank_stabilised=True),
    "two targets": AdapterForm(3, 1.5, targets=("q_proj", "down_proj")),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    save_model(directory, CONFIG, get_weights(new_decoder(CONFIG, seed=0)))
    (directory / "manifest.json").write_text("of the artifact, not of the model")
    return directory


def trained(base, form, *, seed=1):
    """A network whose adapter has moved."""
    model = load_decoder(base)
    attach_adapter(model, form, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in trained_tensors(model).values():
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    return model


def logits_of(model):
    with torch.no_grad():
        return model.logits(model.hidden(TOKENS, torch.arange(TOKENS.shape[1])[None]))


def their_base(directory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def their_logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def in_peft(base, adapter):
    from peft import PeftModel

    return their_logits(PeftModel.from_pretrained(their_base(base), adapter))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_our_adapter_has_the_same_logits_in_peft(tmp_path, base, form):
    model = trained(base, form)
    save_adapter(tmp_path, adapter_of(model), base=str(base))
    torch.testing.assert_close(in_peft(base, tmp_path), logits_of(model), atol=1e-5, rtol=0)
    assert (in_peft(base, tmp_path) - their_logits(their_base(base))).abs().max() > 0.05


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["v_proj", "gate_proj"], "use_rslora": True},
        {
            "target_modules": ["q_proj", "o_proj"],
            "rank_pattern": {"q_proj": 7},
            "alpha_pattern": {r"0\.self_attn.*": 3},
        },
    ],
    ids=["all linear", "rank-stabilised", "patterns"],
)
def test_an_adapter_that_peft_made_has_its_logits_here(tmp_path, base, settings):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    theirs = get_peft_model(their_base(base), LoraConfig(r=5, lora_alpha=11, init_lora_weights=False, **settings))
    theirs.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path, CONFIG)
    ours = load_decoder(base)
    merged = adapter.merge(load_tensors(base))
    ours.load_state_dict({name: torch.from_numpy(array) for name, array in merged.items()})
    torch.testing.assert_close(logits_of(ours), their_logits(theirs), atol=1e-5, rtol=0)


def test_stages_on_each_other_are_one_adapter_of_the_first_base(tmp_path, base):
    """As PEFT sees it, and as every later stage loads it."""
    one, two = tmp_path / "one", tmp_path / "two"
    save_adapted(one, base, adapter_of(trained(base, FORMS["two targets"])), skip="manifest.json")
    second = trained(one, FORMS["rank-stabilised"], seed=2)
    save_adapted(two, one, adapter_of(second), skip="manifest.json")
    torch.testing.assert_close(logits_of(load_decoder(two)), logits_of(second), atol=1e-5, rtol=0)
    torch.testing.assert_close(in_peft(two / "base", two / "adapter"), logits_of(second), atol=1e-5, rtol=0)
    fields = json.loads((two / "adapter" / "adapter_config.json").read_text())
    assert fields["r"] == fields["lora_alpha"] == 9
    assert set(fields["rank_pattern"].values()) == {12}


def test_an_adapted_directory_is_read_as_the_whole_model_and_takes_the_space_of_its_adapter(tmp_path, base):
    directory = tmp_path / "adapted"
    model = trained(base, FORMS["all linear"])
    save_adapted(directory, base, adapter_of(model), skip="manifest.json")
    assert load_config(directory) == CONFIG
    assert os.path.samefile(directory / "base" / "model.safetensors", base / "model.safetensors")
    assert not list(directory.rglob("manifest.json"))
    assert not (directory / "model.safetensors").exists()
    merged = get_weights(model)
    assert all(np.array_equal(array, merged[name]) for name, array in load_tensors(directory).items())
    export_model(directory, tmp_path / "exported", precision="fp32", max_length=64)
    from twinloop.serving.engine import Engine

    scored = Engine.load(tmp_path / "exported").score(TOKENS[0].tolist())
    torch.testing.assert_close(torch.from_numpy(scored), logits_of(model)[0], atol=1e-4, rtol=0)


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path, base):
    save_adapter(tmp_path, adapter_of(trained(base, FORMS["all linear"])), base=str(base))
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, r"use_dora True \(DoRA\) is not supported"),
        ({"bias": "lora_only"}, r"bias 'lora_only' \(trained biases\) is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\]"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changed the base too"),
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported; only LORA is"),
        ({"r": 8}, "has rank 4, adapter_config.json says 8"),
        ({"lora_alpha": None}, "lora_alpha is None; it must be a number more than 0"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern.q_proj is 'x'"),
        ({"rank_pattern": [4]}, r"rank_pattern is \[4\], not an object with numbers by layer"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern: '\(' is not a pattern"),
    ],
)
def test_more_than_a_and_b_is_refused_by_name(saved, change, message):
    path = saved / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message) as refused:
        read_adapter(saved, CONFIG)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"hidden_size": 48}, "the base's is .*; the adapter is of another base"),
        ({"num_hidden_layers": 1}, "model.layers.1.* is no linear layer of the base; the adapter is of another one"),
    ],
)
def test_an_adapter_of_another_base_is_refused(saved, other, message):
    with pytest.raises(UserError, match=message) as refused:
        read_adapter(saved, CONFIG.model_copy(update=other))
    assert "\n" not in str(refused.value)


def test_damaged_missing_and_pickled_weights_are_refused(saved):
    weights = saved / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[:-5], b"", b"x" * 100):
        weights.write_bytes(content)
        with pytest.raises(UserError, match="corrupt weights"):
            read_adapter(saved, CONFIG)
    weights.unlink()
    (saved / "adapter_model.bin").write_bytes(whole)
    with pytest.raises(UserError, match=r"adapter_model.bin is pickled and not read"):
        read_adapter(saved, CONFIG)
    (saved / "adapter_config.json").write_text("[")
    with pytest.raises(UserError, match="not valid JSON"):
        read_adapter(saved, CONFIG)


def test_half_a_pair_is_refused(saved):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(saved / "adapter_model.safetensors")
    tensors.pop("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight")
    save_file(tensors, saved / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"model.layers.0.mlp.up_proj: A and B of shapes \[\(4, 64\), None\]"):
        read_adapter(saved, CONFIG)
