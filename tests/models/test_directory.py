"""The model directory is a checkpoint of `transformers`, in both directions."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from twinloop.common.errors import UserError
from twinloop.models.config import DecoderConfig
from twinloop.models.directory import load_config, load_tensors, save_model
from twinloop.training.weights import get_weights, load_decoder, new_decoder

BASE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
FAMILIES = {
    "llama": {},
    "llama untied": {"tie_word_embeddings": False, "rope_theta": 50_000.0},
    "qwen2, biases": {"attention_bias": True},
    "qwen3, normed queries and keys, wide heads": {"qk_norm": True, "head_dim": 32},
}


def trained_looking(config):
    """Norms and biases away from their initial ones and zeros, where a forgotten one would not show."""
    model = new_decoder(config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            elif "embed" in name:
                parameter *= 20
    return model.eval()


def logits_of(model, tokens):
    with torch.no_grad():
        return model.logits(model.hidden(tokens, torch.arange(tokens.shape[1]).expand_as(tokens)))


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_directory_has_the_same_logits_in_transformers(tmp_path, family):
    from transformers import AutoModelForCausalLM

    config = DecoderConfig(**(BASE | FAMILIES[family]))
    model = trained_looking(config)
    save_model(tmp_path, config, get_weights(model))
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = torch.randint(0, 96, (2, 33), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(tokens).logits
    torch.testing.assert_close(logits_of(model, tokens), expected, atol=2e-4, rtol=1e-4)
    assert theirs.generation_config.eos_token_id == config.eos_token_id


@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_that_transformers_saved_loads_with_the_same_logits(tmp_path, family):
    from transformers import AutoModelForCausalLM

    config = DecoderConfig(**(BASE | FAMILIES[family]))
    save_model(tmp_path / "ours", config, get_weights(trained_looking(config)))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")  # in shards, with an index
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    tokens = torch.randint(0, 96, (1, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = theirs(tokens).logits
    torch.testing.assert_close(logits_of(load_decoder(tmp_path / "theirs"), tokens), expected, atol=2e-4, rtol=1e-4)


def test_a_mistral_checkpoint_loads_with_the_same_logits(tmp_path):
    """It has no architecture of its own here: without a window in use it is a Llama."""
    from transformers import MistralConfig, MistralForCausalLM

    sizes = BASE | {"max_position_embeddings": 128, "rope_theta": 50_000.0, "rms_norm_eps": 1e-5}
    torch.manual_seed(0)
    theirs = MistralForCausalLM(MistralConfig(**sizes, sliding_window=128)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter += (0.3 if "norm" in name else 0.1) * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(0, 96, (2, 33), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(tokens).logits
    torch.testing.assert_close(logits_of(load_decoder(tmp_path), tokens), expected, atol=2e-4, rtol=1e-4)


def test_weights_come_back_bit_for_bit(tmp_path):
    config = DecoderConfig(**BASE)
    weights = get_weights(trained_looking(config))
    save_model(tmp_path, config, weights)
    assert load_config(tmp_path) == config
    loaded = load_tensors(tmp_path)
    assert loaded.keys() == weights.keys()
    assert all(np.array_equal(loaded[name], weights[name]) for name in weights)


def test_bf16_checkpoints_of_others_load(tmp_path):
    config = DecoderConfig(**BASE)
    model = trained_looking(config)
    save_model(tmp_path, config, get_weights(model))
    halved = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    save_file(halved, tmp_path / "model.safetensors")
    loaded = load_decoder(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in halved.items())


def test_mistakes_are_one_line_that_names_the_file(tmp_path):
    config = DecoderConfig(**BASE)
    with pytest.raises(UserError, match=r"config.json: no such file"):
        load_config(tmp_path)
    save_model(tmp_path, config, get_weights(trained_looking(config)))
    content = json.loads((tmp_path / "config.json").read_text())

    (tmp_path / "config.json").write_text(json.dumps(content | {"hidden_size": 32}))
    with pytest.raises(UserError, match=r"has shape .* config.json wants"):
        load_decoder(tmp_path)
    for broken in ("{", "[]", json.dumps({key: content[key] for key in content if key != "hidden_size"})):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(UserError, match=r"config.json") as error:
            load_config(tmp_path)
        assert "\n" not in str(error.value)

    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match=r"model.safetensors: corrupt weights"):
        load_tensors(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "weight_map does not map"),
        ("{}", "weight_map does not map"),
        ('{"weight_map": {}}', "weight_map does not map"),
        ('{"weight_map": ["model.safetensors"]}', "weight_map does not map"),
        ('{"weight_map": {"model.norm.weight": 1}}', "weight_map does not map"),
        ('{"weight_map": {"model.norm.weight": ["a"]}}', "weight_map does not map"),
        ('{"weight_map": {"model.norm.weight": "../other/model.safetensors"}}', "weight_map does not map"),
        ('{"weight_map": {"model.norm.weight": "part.safetensors"}}', r"part\.safetensors: no such file"),
    ],
)
def test_a_corrupt_index_is_reported_in_one_line(tmp_path, index, message):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=message) as error:
        load_tensors(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_a_checkpoint_that_lacks_a_tensor_is_reported_in_one_line(tmp_path):
    config = DecoderConfig(**BASE)
    weights = get_weights(trained_looking(config))
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_model(tmp_path, config, weights)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight has shape none, config\.json wants"):
        load_decoder(tmp_path)


def test_weights_of_a_type_that_cannot_be_read_are_reported_in_one_line(tmp_path):
    save_file({"w": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: a type of weights cannot be read .*float8"):
        load_tensors(tmp_path)


def test_reading_and_writing_models_needs_no_torch():
    script = "import twinloop.models.directory, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
