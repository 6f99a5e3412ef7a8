"""A GGUF file that is written by a family's form is read alike by others: by `gguf`'s tables, and by `transformers`."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from family_cases import VOCABULARY, build

import twinloop.models.families
from twinloop.common.errors import UserError
from twinloop.common.modules import modules_in
from twinloop.models.config import DecoderConfig
from twinloop.models.family import find_family, find_gguf_family, read_config, write_config
from twinloop.models.gguf_file import GGUFFile
from twinloop.models.gguf_form import GGUFForm
from twinloop.training.weights import get_weights, load_decoder

FAMILIES = modules_in(twinloop.models.families)
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
NO_WINDOW = {"sliding_window": None}
WRITTEN = {
    "llama": transformers.LlamaConfig(**SIZES),
    "mistral": transformers.MistralConfig(**SIZES, **NO_WINDOW),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen3": transformers.Qwen3Config(**{**SIZES, "head_dim": 128}),  # transformers does not look for another
    "smollm3": transformers.SmolLM3Config(**{**SIZES, "num_hidden_layers": 4}),
    # llama.cpp and transformers take the head's width for the scale, and five windows to each layer without
    "gemma3_text": transformers.Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 6, "head_dim": 256}, sliding_window=9
    ),
}


def form_of(config: DecoderConfig) -> GGUFForm:
    form: GGUFForm = find_family(config.model_type).GGUF
    return form


def write_gguf(config: DecoderConfig, weights: dict[str, np.ndarray], path: Path) -> None:
    form = form_of(config)
    writer = gguf.GGUFWriter(path, form.architecture)
    for key, value in form.metadata(config).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{form.architecture}.{key}", value)
    for name, tensor in form.tensors(config).items():
        writer.add_tensor(tensor.name, np.ascontiguousarray(tensor.to_gguf(weights[name])))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "smollm3"])
@torch.no_grad()
def test_transformers_reads_what_the_form_writes(family, tmp_path):
    """It has a reader of its own for these families (5.23 has none for smollm3)."""
    theirs = build(WRITTEN[family], seed=0)
    theirs.save_pretrained(tmp_path)
    ours = load_decoder(tmp_path)
    write_gguf(
        ours.config, get_weights(ours), tmp_path / "mistral.gguf" if family == "mistral" else tmp_path / "m.gguf"
    )
    file = next(tmp_path.glob("*.gguf")).name
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file, dtype=torch.float32)
    tokens = torch.randint(3, VOCABULARY, (1, 30), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits, atol=1e-4, rtol=0)
    form = form_of(ours.config)
    stored = GGUFFile(tmp_path / file).metadata.items()
    metadata = {key.removeprefix(f"{form.architecture}."): value for key, value in stored}
    written = write_config(ours.config)
    assert form.fields(metadata) == {name: written[name] for name in form.fields(metadata)}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_names_are_those_of_ggufs_tables(family):
    config = read_config(WRITTEN[family].to_dict())
    form = form_of(config)
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == form.architecture)
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tensors = form.tensors(config)
    assert {name: tensor.name for name, tensor in tensors.items()} == {
        name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in tensors
    }
    known = {value.replace("{arch}", form.architecture) for value in _values(gguf.Keys)}
    assert {f"{form.architecture}.{key}" for key in form.metadata(config)} <= known


def _values(keys: type) -> set[str]:
    found: set[str] = set()
    for value in vars(keys).values():
        found |= _values(value) if isinstance(value, type) else {value} if isinstance(value, str) else set()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_reads_back(family):
    config = read_config(WRITTEN[family].to_dict())
    form = form_of(config)
    known = {"tie_word_embeddings": config.tie_word_embeddings, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    known |= {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    assert read_config({"model_type": family, **NO_WINDOW, **known, **form.fields(form.metadata(config))}) == config
    rng = np.random.default_rng(0)
    for tensor in form.tensors(config).values():
        values = rng.normal(size=tensor.shape).astype(np.float32)
        stored = tensor.to_gguf(values)
        assert stored.shape == values.shape
        np.testing.assert_allclose(tensor.from_gguf(stored), values, atol=1e-6)


def test_a_files_architecture_names_the_family():
    found = {name: find_gguf_family(name).ARCHITECTURE for name in ("llama", "qwen2", "qwen3", "smollm3", "gemma3")}
    assert found == {
        "llama": "LlamaForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "smollm3": "SmolLM3ForCausalLM",
        "gemma3": "Gemma3ForCausalLM",
    }
    with pytest.raises(UserError, match=r"'gpt2' is not one of gemma3, llama, qwen2, qwen3, smollm3"):
        find_gguf_family("gpt2")


def test_a_bias_keeps_to_the_rows_of_its_matrix():
    config = read_config({**WRITTEN["llama"].to_dict(), "attention_bias": True})
    tensors = form_of(config).tensors(config)
    for kind, rows in (("q", 64), ("k", 32), ("v", 32)):
        order = np.arange(rows, dtype=np.float32)
        name = f"model.layers.0.self_attn.{kind}_proj"
        matrix = tensors[f"{name}.weight"].to_gguf(np.tile(order[:, None], (1, 64)))
        assert (tensors[f"{name}.bias"].to_gguf(order) == matrix[:, 0]).all()
        assert (matrix[:3, 0].tolist() == [0, 1, 2]) == (kind == "v")


def test_rotary_scaling_is_written_as_llama_cpp_reads_it():
    config = read_config({**WRITTEN["llama"].to_dict(), "rope_parameters": None, "rope_theta": 5e5, **LLAMA_3})
    form = form_of(config)
    freqs = form.rope_freqs(config)
    assert freqs is not None
    assert (freqs[0], freqs[-1]) == (1.0, 8.0)
    assert "rope.scaling.type" not in form.metadata(config)
    linear = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}
    config = read_config({**WRITTEN["llama"].to_dict(), **linear})
    assert form.rope_freqs(config) is None
    metadata = form.metadata(config)
    assert (metadata["rope.scaling.type"], metadata["rope.scaling.factor"]) == ("linear", 4.0)
    assert form.fields(metadata)["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


LLAMA_3 = {
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
}


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("llama", {"hidden_act": "gelu_pytorch_tanh"}, "no gelu_tanh for llama"),
        ("mistral", {"sliding_window": 9}, "no sliding windows for mistral"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0, "layer_types": None},
            "no sli",
        ),
        ("qwen2", {"rope_parameters": None, **LLAMA_3}, "no llama3 rotary scaling for qwen2"),
        ("qwen3", {"attention_bias": True}, "no biases in a qwen3"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, "only with every fourth layer without rotary positions"),
        ("gemma3_text", {"layer_types": ["sliding_attention"] * 6}, "only with every sixth layer without a window"),
        ("gemma3_text", {"query_pre_attn_scalar": 100}, "only by their head's width"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "only without soft-capping"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(family, change, reason):
    config = read_config({**WRITTEN[family].to_dict(), **change})
    with pytest.raises(UserError, match=rf"^gguf: llama\.cpp .*{reason}.*export the model as a Hugging Face directory"):
        form_of(config).tensors(config)
