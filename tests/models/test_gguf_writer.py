"""A GGUF file holds the network and its tokenizer: read back by `transformers`, and by the `gguf` package."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from known_tokenizer import CONVERSATION, SPLITTING, TEXTS, known_tokenizer, make_model
from safetensors.torch import load_file, save_file

from twinloop.common.errors import UserError
from twinloop.models.decoder import Decoder
from twinloop.models.gguf_file import GGUFFile
from twinloop.models.gguf_model import load_network
from twinloop.models.gguf_vocabulary import Reading, find_reading, read_vocabulary
from twinloop.models.gguf_writer import write_gguf
from twinloop.models.new_tokenizer import train_tokenizer
from twinloop.models.source import open_source
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.training.weights import set_weights

FAMILIES: dict[str, dict[str, object]] = {
    "llama": {"rope_theta": 50_000.0},
    "llama, tied": {"tie_word_embeddings": True, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 128},  # transformers 5.23 takes its default where the file says another one
}  # fmt: skip
TOKENS = torch.randint(0, 300, (1, 33), generator=torch.Generator().manual_seed(2))


def written(folder: Path, type: str = "f32", **changes: object) -> tuple[Decoder, Path]:
    network = make_model(folder / "model", known_tokenizer(), **changes)
    path = folder / "model.gguf"
    vocabulary = read_vocabulary(folder / "model", network.config.vocab_size)
    write_gguf(folder / "model", path, vocabulary, type=type, name="small 1")  # type: ignore[arg-type]
    return network, path


@torch.no_grad()
def logits_of(network: Decoder) -> torch.Tensor:
    return network.logits(network.hidden(TOKENS, torch.arange(TOKENS.shape[1])[None]))


def fields(path: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_same_network(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    network, path = written(tmp_path, **FAMILIES[family])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    with torch.no_grad():
        found = theirs(TOKENS).logits
    torch.testing.assert_close(found, logits_of(network), atol=2e-4, rtol=1e-4)
    weights = dict(theirs.state_dict())
    assert all(torch.equal(weights[name], tensor) for name, tensor in network.state_dict().items())


def test_transformers_reads_the_same_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    _, path = written(tmp_path)
    ours, theirs = known_tokenizer(), AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in (*TEXTS, "  12  times\n\n", "<think> it's"):
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert theirs.chat_template
    rendered = theirs.apply_chat_template(CONVERSATION, add_generation_prompt=True, return_dict=False)
    assert list(rendered) == ours.encode_prompt(CONVERSATION)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.stop_id)


@pytest.mark.parametrize(("type", "bits"), [("f16", 11), ("bf16", 8), ("q8_0", 7), ("q4_0", 3)])
def test_other_types_are_the_weights_within_their_rounding(tmp_path: Path, type: str, bits: int) -> None:
    network, path = written(tmp_path, type)
    config = network.config
    read = load_network(GGUFFile(path), config)
    for name, tensor in network.state_dict().items():
        # A scale is shared by 32 neighbours; the embedding keeps 8 bits beside layers of 4.
        blocks = tensor.numpy().reshape(-1, 32)
        steps = 7 if bits == 3 and ("embed" in name or "lm_head" in name) else bits
        allowed = np.abs(blocks).max(axis=1, keepdims=True) * 2.0**-steps
        assert (np.abs(read[name].reshape(-1, 32) - blocks) <= allowed).all(), name
    again = Decoder(config).eval()
    set_weights(again, read, where=str(path))
    assert (logits_of(again) - logits_of(network)).abs().max() < 2 ** (6 - bits)
    assert fields(path)["general.file_type"] == {"f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2}[type]
    stored = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors}
    assert stored["blk.0.attn_norm.weight"] == gguf.GGMLQuantizationType.F32


def test_the_metadata_are_all_that_llama_cpp_asks_for(tmp_path: Path) -> None:
    network, path = written(tmp_path, padding=5)
    config, ours, found = network.config, known_tokenizer(), fields(path)
    expected = {
        "general.architecture": "llama",
        "general.name": "small 1",
        "llama.context_length": 256,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": ours.bos_id,
        "tokenizer.ggml.eos_token_id": ours.stop_id,
        "tokenizer.ggml.eot_token_id": ours.stop_id,
        "tokenizer.ggml.padding_token_id": ours.pad_id,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {name: found[name] for name in expected} == expected
    types = found["tokenizer.ggml.token_type"]
    assert isinstance(types, list)
    assert len(types) == config.vocab_size
    assert [types[id] for id in sorted(ours.special_ids)] == [gguf.TokenType.CONTROL] * 2
    assert types[-6:] == [gguf.TokenType.USER_DEFINED, *[gguf.TokenType.UNUSED] * 5]
    assert types.count(gguf.TokenType.NORMAL) == len(types) - 8


def test_all_that_end_an_answer_come_back_up_to_the_three_that_a_file_names(tmp_path: Path) -> None:
    """Llama 3.1's models have three: the end of a text, of a message and of a turn, which is their `eos_token`."""
    folder = tmp_path / "model"
    rows = make_model(folder, known_tokenizer()).config.vocab_size
    for stops in ([1], [1, 0], [1, 0, rows - 1]):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
        vocabulary = read_vocabulary(folder, rows)
        write_gguf(folder, tmp_path / "m.gguf", vocabulary, type="f16", name="small 1")
        assert open_source(tmp_path / "m.gguf").load_tokenizer().stop_ids == tuple(stops)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1, rows - 2, rows - 1]}))
    with pytest.raises(UserError, match="a file names at most 3 tokens that end an answer, and this model has 4"):
        read_vocabulary(folder, rows)


@pytest.mark.parametrize("name", SPLITTING)
def test_a_splitting_that_llama_cpp_knows_has_its_name(tmp_path: Path, name: str) -> None:
    known_tokenizer(name).save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    assert find_reading(content) == Reading("gpt2", name)
    assert find_reading(content | {"normalizer": {"type": "NFC"}}) == Reading("gpt2", name)
    assert find_reading(content | {"normalizer": {"type": "Lowercase"}}) is None
    assert find_reading(content | {"pre_tokenizer": None}) is None
    other = content["model"] | {"ignore_merges": not content["model"]["ignore_merges"]}
    # Llama 3's without whole words has a name of its own there.
    assert find_reading(content | {"model": other}) == (Reading("gpt2", "smaug-bpe") if name == "llama-bpe" else None)
    stripping = [each | {"rstrip": True} for each in content["added_tokens"]]
    assert find_reading(content | {"added_tokens": stripping}) is None
    first, *rest = content["pre_tokenizer"]["pretokenizers"]
    prefixed = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    for changed in ([first, first, *rest], [prefixed], [first, *rest, {"type": "Punctuation", "behavior": "Isolated"}]):
        sequence = {"type": "Sequence", "pretokenizers": changed}
        assert find_reading(content | {"pre_tokenizer": sequence}) is None


def test_our_own_splitting_is_refused(tmp_path: Path) -> None:
    network = make_model(tmp_path / "model", train_tokenizer(TEXTS, 300))
    with pytest.raises(UserError, match=r"llama\.cpp cannot split text as this tokenizer does"):
        read_vocabulary(tmp_path / "model", network.config.vocab_size)


def test_what_a_file_cannot_hold_is_refused_in_one_line(tmp_path: Path) -> None:
    network, path = written(tmp_path)
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, weights)
    vocabulary = read_vocabulary(tmp_path / "model", network.config.vocab_size)
    with pytest.raises(UserError, match=r"mlp\.up_proj\.weight has values that float16 cannot hold; use --type bf16"):
        write_gguf(tmp_path / "model", path, vocabulary, type="f16", name="small")
    with pytest.raises(UserError, match=r"tokenizer\.json: it has the id \d+, but the embedding has 300 rows"):
        read_vocabulary(tmp_path / "model", 300)


def test_every_stop_token_comes_back(tmp_path: Path) -> None:
    network, _ = written(tmp_path)
    ours, folder = known_tokenizer(), tmp_path / "model"
    others = sorted(ours.special_ids - {ours.stop_id})[:1]
    stops = json.dumps({"eos_token_id": [ours.stop_id, *others]})
    (folder / "generation_config.json").write_text(stops)
    vocabulary = read_vocabulary(folder, network.config.vocab_size)
    write_gguf(folder, tmp_path / "model.gguf", vocabulary, type="f16", name="small")
    read = open_source(tmp_path / "model.gguf").load_tokenizer()
    assert read.stop_ids == ChatTokenizer.load(folder).stop_ids == (ours.stop_id, *others)
    assert read.eos_id == ChatTokenizer.load(folder).eos_id


def test_templates_in_files_of_their_own_are_written_and_read_too(tmp_path: Path) -> None:
    network, _ = written(tmp_path)
    folder = tmp_path / "model"
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").write_text(settings.pop("chat_template"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    vocabulary = read_vocabulary(folder, network.config.vocab_size)
    assert vocabulary.chat_templates["default"] == (folder / "chat_template.jinja").read_text()
    assert ChatTokenizer.load(folder).encode_prompt(CONVERSATION) == known_tokenizer().encode_prompt(CONVERSATION)
    write_gguf(folder, tmp_path / "model.gguf", vocabulary, type="f16", name="small")
    assert open_source(tmp_path / "model.gguf").load_tokenizer().chat_templates == vocabulary.chat_templates
