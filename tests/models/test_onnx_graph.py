"""The ONNX graph says what the network says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from twinloop.common.errors import UserError
from twinloop.models.config import DecoderConfig
from twinloop.models.decoder import Decoder
from twinloop.models.directory import save_model
from twinloop.models.exported import export_model, read_exported
from twinloop.models.memory import serving_memory
from twinloop.models.onnx_quantize import choose_block_size, quantize_blocks, quantize_four_bit_blocks, takes_four_bits
from twinloop.models.rope import Rope
from twinloop.serving.engine import Engine

BASE = DecoderConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
)
SHAPES = {
    "llama": {},
    "untied": {"tie_word_embeddings": False},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    "wide heads": {"head_dim": 32, "num_key_value_heads": 1},
    "odd width": {"hidden_size": 72, "intermediate_size": 100},
    "windows, no positions": {"family": "smollm3", "windows": (9, None), "rotary_layers": (True, False)},
    "biases": {"family": "llama", "attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
    "gemma3": {
        "family": "gemma3_text",
        "activation": "gelu_tanh",
        "norm_plus_one": True,
        "post_norms": True,
        "qk_norm": True,
        "embedding_scale": 8.0,
        "query_scale": 0.2,
        "logit_softcap": 30.0,
        "windows": (9, None),
        "window_rope": Rope(theta=100.0),
    },
}
MAX_LENGTH = 64


def network(**changes: object) -> Decoder:
    """A random network whose biases and norms are random too, so that none of them can be forgotten."""
    torch.manual_seed(0)
    model = Decoder(BASE.model_copy(update=changes)).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
        elif "embed" in name:
            parameter.mul_(10)
    return model


def export(model: Decoder, folder: Path, precision: str) -> Path:
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    save_model(folder / "model", model.config, tensors)
    export_model(folder / "model", folder / precision, precision=precision, max_length=MAX_LENGTH)
    return folder / precision


def forced_logits(model: Decoder, tokens: np.ndarray) -> np.ndarray:
    positions = torch.arange(len(tokens))[None]
    return model.logits(model.hidden(torch.from_numpy(tokens)[None], positions))[0].numpy()


def some_tokens(count: int = 50) -> np.ndarray:
    return np.random.default_rng(1).integers(0, BASE.vocab_size, count)


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_fp32_logits_equal_the_networks_by_teacher_forcing(changes, tmp_path):
    model = network(**changes)
    engine = Engine.load(export(model, tmp_path, "fp32"), slots=1)
    expected = forced_logits(model, some_tokens())
    assert expected.std() > 0.2
    np.testing.assert_allclose(engine.score(some_tokens()), expected, atol=1e-4)


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_the_engine_follows_weights_that_it_is_bound_to(changes):
    model = network(**changes)
    weights = {name: ort.OrtValue.from_dlpack(tensor) for name, tensor in model.state_dict().items()}
    engine = Engine.from_weights(model.config, weights, max_length=MAX_LENGTH, slots=1, threads=1)
    np.testing.assert_allclose(engine.score(some_tokens()), forced_logits(model, some_tokens()), atol=1e-4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05)
    np.testing.assert_allclose(engine.score(some_tokens()), forced_logits(model, some_tokens()), atol=1e-4)


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_int8_logits_stay_within_five_percent_of_the_networks(changes, tmp_path):
    """Root mean square of the error against the spread of the logits: weights and activations have 255 steps each."""
    model = network(**changes)
    engine = Engine.load(export(model, tmp_path, "int8"), slots=1)
    expected = forced_logits(model, some_tokens())
    error = np.sqrt(np.mean((engine.score(some_tokens()) - expected) ** 2))
    assert error < 0.05 * expected.std()


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_int4_computes_with_the_weights_that_its_blocks_stand_for(changes, tmp_path):
    """Against the network with those weights nothing but eight bits, of the others and of activations, differs."""
    model = network(**changes)
    engine = Engine.load(export(model, tmp_path, "int4"), slots=1)
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and takes_four_bits(name):
            weight.copy_(torch.from_numpy(four_bits(weight.numpy())))
    expected = forced_logits(model, some_tokens())
    error = np.sqrt(np.mean((engine.score(some_tokens()) - expected) ** 2))
    assert error < 0.05 * expected.std()


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_table_is_stored_in_eight_bits_and_once_where_it_is_tied(tied: bool, precision: str, tmp_path) -> None:
    exported = onnx.load(export(network(tie_word_embeddings=tied), tmp_path, precision) / "model.onnx")
    of_tokens = {each.name: each for each in exported.graph.initializer if each.dims[0] == BASE.vocab_size}
    tables = [name for name, each in of_tokens.items() if each.data_type == onnx.TensorProto.UINT8]
    values, scales = BASE.vocab_size * BASE.hidden_size, 4 * BASE.vocab_size * BASE.hidden_size // 64
    assert sum(len(each.raw_data) for each in of_tokens.values()) == (1 if tied else 2) * (values + scales)
    readers = [node.op_type for node in exported.graph.node for name in node.input if name in tables]
    assert sorted(readers) == ["GatherBlockQuantized", "MatMulNBits"]


def four_bits(weight: np.ndarray) -> np.ndarray:
    """The weight that its four-bit blocks stand for, by the operator's definition."""
    blocks = quantize_four_bit_blocks(weight)
    assert blocks.zero_points is not None
    steps, zeros = (np.stack([x & 15, x >> 4], -1).reshape(len(x), -1) for x in (blocks.values, blocks.zero_points))
    steps = steps.reshape(len(weight), -1, blocks.block_size).astype(np.float32)
    restored = (steps - zeros[:, : steps.shape[1], None]) * blocks.scales[..., None]
    return restored.reshape(len(weight), -1)[:, : weight.shape[1]]


def test_four_bit_blocks_are_closer_than_one_symmetric_grid():
    rng = np.random.default_rng(0)
    for weight in (rng.standard_normal((64, 100)), rng.random((64, 100)) + 1, np.zeros((2, 32))):
        weight = weight.astype(np.float32)
        scale = np.abs(np.pad(weight, ((0, 0), (0, -weight.shape[1] % 32))).reshape(len(weight), -1, 32)).max(-1) / 7
        scale = np.repeat(scale, 32, axis=1)[:, : weight.shape[1]]
        symmetric = np.rint(weight / np.where(scale == 0, 1, scale)) * scale
        error, plain = (np.square(each - weight).sum() for each in (four_bits(weight), symmetric))
        assert error <= 0.75 * plain


def test_blocks_reproduce_a_weight_within_half_a_step():
    weight = np.random.default_rng(0).standard_normal((5, 100)).astype(np.float32)
    weight[2] = 0
    blocks = quantize_blocks(weight)
    restored = (blocks.values.astype(np.float32) - 128) * blocks.scales[..., None]
    error = np.abs(restored.reshape(5, -1)[:, :100] - weight).reshape(5, -1)
    assert (error <= np.repeat(blocks.scales, blocks.block_size, axis=1)[:, :100] / 2 + 1e-6).all()


def test_the_block_fits_the_width():
    assert [choose_block_size(width) for width in (128, 64, 96, 576, 100)] == [64, 64, 32, 64, 64]


def test_an_exported_model_is_written_whole_and_says_what_it_is(tmp_path):
    exported_dir = export(network(), tmp_path, "fp32")
    exported, config = read_exported(exported_dir)
    assert (exported.precision, exported.max_length, config) == ("fp32", MAX_LENGTH, BASE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp32", "model"]
    with pytest.raises(UserError, match="not empty"):
        export_model(tmp_path / "model", exported_dir, precision="fp32", max_length=MAX_LENGTH)


def test_the_same_model_gives_the_same_bytes(tmp_path):
    first = read_exported(export(network(), tmp_path / "a", "int8"))[0]
    assert read_exported(export(network(), tmp_path / "b", "int8"))[0].files == first.files


@pytest.mark.parametrize("file", ["model.onnx", "model.onnx.data"])
def test_one_changed_byte_is_noticed(file, tmp_path):
    exported_dir = export(network(), tmp_path, "fp32")
    content = bytearray((exported_dir / file).read_bytes())
    content[len(content) // 2] ^= 1
    (exported_dir / file).write_bytes(content)
    with pytest.raises(UserError, match=f"{file} differs.*export it again"):
        Engine.load(exported_dir)


def test_what_is_no_exported_model_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no exported model"):
        Engine.load(tmp_path)
    exported_dir = export(network(), tmp_path, "fp32")
    (exported_dir / "model.onnx.data").unlink()
    with pytest.raises(UserError, match=r"model\.onnx\.data is missing"):
        Engine.load(exported_dir)
    entries = json.loads((exported_dir / "bundle.json").read_text())
    (exported_dir / "bundle.json").write_text(json.dumps(entries | {"precision": "int3"}))
    with pytest.raises(UserError, match=r"bundle\.json: precision"):
        Engine.load(exported_dir)
    (exported_dir / "bundle.json").write_text("{")
    with pytest.raises(UserError, match=r"bundle\.json: the file"):
        Engine.load(exported_dir)


def test_an_impossible_export_is_refused(tmp_path):
    model_dir = tmp_path / "model"
    save_model(model_dir, BASE, {name: tensor.numpy() for name, tensor in network().state_dict().items()})
    with pytest.raises(UserError, match="precision 'int3' is not one of"):
        export_model(model_dir, tmp_path / "out", precision="int3", max_length=8)  # type: ignore[arg-type]
    weights = {name: tensor.numpy() for name, tensor in network().state_dict().items()}
    lacking = {name: array for name, array in weights.items() if name != "model.layers.1.mlp.up_proj.weight"}
    save_model(tmp_path / "lacking", BASE, lacking)
    with pytest.raises(
        UserError, match=r"layers\.1\.mlp\.up_proj\.weight has shape none, config\.json wants \(160, 64\)"
    ):
        export_model(tmp_path / "lacking", tmp_path / "out", precision="fp32", max_length=8)
    # A bias that the network has not: ignored, the exported model would answer otherwise than the checkpoint.
    save_model(tmp_path / "biased", BASE, weights | {"model.layers.0.self_attn.o_proj.bias": np.ones(64, np.float32)})
    with pytest.raises(UserError, match=r"o_proj\.bias has shape \(64,\), config\.json wants none"):
        export_model(tmp_path / "biased", tmp_path / "out", precision="fp32", max_length=8)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="max_length 4096"):
        export_model(model_dir, tmp_path / "out", precision="fp32", max_length=4096)


def test_what_does_not_fit_into_memory_is_refused_with_numbers(tmp_path, monkeypatch):
    exported_dir = export(network(), tmp_path, "int8")
    plan = serving_memory(BASE, precision="int8", slots=4, max_length=MAX_LENGTH)
    monkeypatch.setattr("twinloop.serving.engine.runner.available_bytes", lambda: plan.total_bytes)
    assert Engine.load(exported_dir, slots=4).slots == 4
    sizes = r"needs 0\.\d MiB of memory \(weights 0\.1, scales 0\.0, kv cache 0\.2, runtime 0\.\d\), and 0\.\d MiB are"
    with pytest.raises(UserError, match=rf"int8 \(int8, slots 5, max_length 64\) {sizes} available; take fewer slots"):
        Engine.load(exported_dir, slots=5)
    monkeypatch.undo()
    with pytest.raises(UserError, match="slots 1,000,000,000, max_length 64"):  # nothing was allocated
        Engine.load(exported_dir, slots=10**9)


def test_a_precision_names_the_provider_it_needs(tmp_path):
    exported_dir = export(network(), tmp_path, "fp32")
    with pytest.raises(UserError, match="fp32 does not run on cuda; export the model as fp16 or bf16"):
        Engine.load(exported_dir, provider="cuda")
    with pytest.raises(UserError, match="provider 'tpu'"):
        Engine.load(exported_dir, provider="tpu")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="bf16"):
        Engine.load(export(network(), tmp_path / "b", "bf16"), provider="cpu")
