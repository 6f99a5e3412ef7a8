"""What a GGUF file holds is read as it was meant: every type of block, every family's names, the permuted rows."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import FAMILIES, SIZES, TOKENIZER, config_of, random_weights, write_gguf

from twinloop.models.directory import load_config, load_tensors, save_model
from twinloop.models.family import find_family, read_config
from twinloop.models.gguf_model import LLAMA3_SCALING
from twinloop.models.source import open_source
from twinloop.training.weights import load_decoder

WIDE = config_of("llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_family_is_found_by_its_name(tmp_path: Path, family: str) -> None:
    for tied in (True, False):
        config = config_of(family, tie_word_embeddings=tied)
        weights = random_weights(config)
        source = open_source(write_gguf(tmp_path / "small.gguf", family, config, weights))
        assert source.config == config
        read = source.load_weights()
        assert read.keys() == weights.keys()
        for name, array in weights.items():
            np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize(("family", "type"), [("llama", "Q8_0"), ("qwen2", "Q4_1"), ("qwen3", "F16")])
def test_logits_are_those_of_transformers_own_reader(tmp_path: Path, family: str, type: str) -> None:
    from transformers import AutoModelForCausalLM

    # transformers 5.23 takes Qwen 3's heads to be 128 wide, whatever the file says.
    config = config_of(family, tie_word_embeddings=family != "qwen2", head_dim=128 if family == "qwen3" else 16)
    path = write_gguf(tmp_path / "small.gguf", family, config, random_weights(config), type=type)
    source = open_source(path)
    assert source.form == type
    assert source.license == "mit"
    save_model(tmp_path / "ours", source.config, source.load_weights(), source.load_tokenizer())
    ours = load_decoder(tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    tokens = torch.tensor([[1, 7, 40, 200, 7, 255, 12]])
    with torch.no_grad():
        found = ours.logits(ours.hidden(tokens, torch.arange(7)[None]))
        expected = theirs(tokens).logits
    assert (found - expected).abs().max() < 1e-4
    assert expected.abs().max() > 1


@pytest.mark.parametrize("type", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_a_type_of_blocks_is_within_its_own_step_of_what_was_written(tmp_path: Path, type: str) -> None:
    weights = random_weights(WIDE)
    path = write_gguf(tmp_path / "small.gguf", "llama", WIDE, weights, type=type)
    read = open_source(path).load_weights()
    name = "model.layers.0.mlp.down_proj.weight"
    step = {"F32": 0, "F16": 1e-3, "BF16": 8e-3, "Q8_0": 0.01, "Q4_0": 0.13, "Q4_1": 0.09, "Q5_0": 0.07, "Q5_1": 0.05}
    gap = np.abs(read[name] - weights[name]).max()
    assert gap <= step[type]
    assert (gap == 0) == (type == "F32")
    assert read[name].dtype == np.float32


def q4_k(block: bytes) -> list[float]:
    """A block of 256 values, as ggml documents it: d, dmin, eight scales and minima of 6 bits, quants of 4."""
    d, dmin = struct.unpack("<ee", block[:4])
    packed, quants = block[4:16], block[16:]
    values = []
    for group in range(8):
        if group < 4:
            scale, least = packed[group] & 63, packed[group + 4] & 63
        else:
            scale = (packed[group + 4] & 15) | (packed[group - 4] >> 6 << 4)
            least = (packed[group + 4] >> 4) | (packed[group] >> 6 << 4)
        for byte in quants[group // 2 * 32 : group // 2 * 32 + 32]:
            values.append(d * scale * (byte >> 4 if group % 2 else byte & 15) - dmin * least)
    return values


def q6_k(block: bytes) -> list[float]:
    """The same of Q6_K: the lower 4 bits, the upper 2, sixteen scales, d."""
    low, high, scales = block[:128], block[128:192], struct.unpack("16b", block[192:208])
    (d,) = struct.unpack("<e", block[208:])
    values = []
    for index in range(256):
        half, within = divmod(index, 128)
        quarter, place = divmod(within, 32)
        byte = low[half * 64 + place + 32 * (quarter % 2)]
        upper = high[half * 32 + place] >> 2 * quarter & 3
        values.append(d * scales[index // 16] * (((byte >> 4 if quarter > 1 else byte & 15) | upper << 4) - 32))
    return values


@pytest.mark.parametrize(("type", "size", "at", "by_hand"), [("Q4_K", 144, (0, 2), q4_k), ("Q6_K", 210, (208,), q6_k)])
def test_k_quants_are_read_by_their_definition(
    tmp_path: Path, type: str, size: int, at: tuple[int, ...], by_hand
) -> None:
    raw = np.random.default_rng(0).integers(0, 256, (256, size), dtype=np.uint8)
    for offset in at:
        raw[:, offset : offset + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    name = "blk.0.ffn_up.weight"
    path = write_gguf(tmp_path / "k.gguf", "llama", WIDE, random_weights(WIDE), tensors={name: (raw, type)})
    read = open_source(path).load_weights()["model.layers.0.mlp.up_proj.weight"]
    expected = np.array([by_hand(row.tobytes()) for row in raw])
    np.testing.assert_allclose(read, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected).max() > 1


def test_more_rows_than_are_dequantised_at_once(tmp_path: Path) -> None:
    config = config_of("llama", vocab_size=2500)
    weights = random_weights(config)
    path = write_gguf(tmp_path / "tall.gguf", "llama", config, weights, type="Q8_0")
    name = "model.embed_tokens.weight"
    expected = gguf.quants.dequantize(
        gguf.quants.quantize(weights[name], gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0
    )
    np.testing.assert_array_equal(open_source(path).load_weights()[name], expected)


def test_the_model_directory_keeps_the_sources_shape_tokenizer_and_template(tmp_path: Path) -> None:
    config = config_of("qwen3", rms_norm_eps=1e-6, rope_theta=1_000_000.0)
    source = open_source(write_gguf(tmp_path / "small.gguf", "qwen3", config, random_weights(config), type="F16"))
    save_model(tmp_path / "out", source.config, source.load_weights(), source.load_tokenizer())
    assert load_config(tmp_path / "out") == config
    assert load_tensors(tmp_path / "out").keys() == random_weights(config).keys()
    messages = [{"role": "user", "content": "the other order <|end|>"}]
    assert source.load_tokenizer().render(messages) == TOKENIZER.render(messages)


OTHERS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "smollm3": {"num_hidden_layers": 4},
    "gemma3_text": {"num_hidden_layers": 6, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 9},
}


@pytest.mark.parametrize("family", OTHERS)
def test_a_family_comes_back_from_the_form_that_it_states(tmp_path: Path, family: str) -> None:
    """That others read the form as we write it is tested with the families."""
    config = read_config({"model_type": family, **SIZES, "tie_word_embeddings": True, **OTHERS[family]})
    weights, form = random_weights(config), find_family(family).GGUF
    metadata = {f"{form.architecture}.{key}": value for key, value in form.metadata(config).items()}
    tensors = {each.name: (each.to_gguf(weights[name]), "F32") for name, each in form.tensors(config).items()}
    path = write_gguf(tmp_path / "m.gguf", form.architecture, config, {}, metadata=metadata, tensors=tensors)
    source = open_source(path)
    same = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "family": None}
    assert source.config.model_copy(update=same) == config.model_copy(update=same)
    for name, array in source.load_weights().items():
        np.testing.assert_allclose(array, weights[name], atol=1e-6)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rotary_scaling_of_llama_3_is_known_by_its_factors(tmp_path: Path, factor: float) -> None:
    """The file has no more of it than what each frequency is divided by; these are transformers' own."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {**LLAMA3_SCALING, "factor": factor, "rope_theta": 500_000.0}
    theirs = LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    plain = 500_000.0 ** (-np.arange(8) / 8)
    factors = (plain / scaled.numpy()).astype(np.float32)
    config = config_of("llama", rope_theta=500_000.0)
    path = write_gguf(
        tmp_path / "l3.gguf", "llama", config, random_weights(config), tensors={"rope_freqs.weight": (factors, "F32")}
    )
    found = open_source(path).config.rope_scaling
    assert found is not None
    assert (found.kind, found.factor) == ("llama3", factor)
