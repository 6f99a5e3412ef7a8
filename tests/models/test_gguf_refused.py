"""A GGUF file that cannot be a base is refused in one line, however it is broken."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import config_of, random_weights, write_gguf

from twinloop.common.errors import UserError
from twinloop.models.gguf_file import GGUFFile
from twinloop.models.source import open_source

CONFIG = config_of("llama")
WEIGHTS = random_weights(CONFIG)


def write(path: Path, **changes: Any) -> Path:
    return write_gguf(path / "small.gguf", "llama", CONFIG, WEIGHTS, **changes)


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as raised:
        open_source(path)
    message = str(raised.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(str(path))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metadata": {"general.architecture": "mamba"}}, ": general.architecture 'mamba' is not one of gemma3"),
        ({"metadata": {"split.count": 3}}, ": one of 3 parts; join them with `llama-gguf-split --merge`"),
        ({"metadata": {"llama.block_count": None}}, ": no llama.block_count in its metadata"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "rotary scaling"),
        ({"metadata": {"llama.attention.head_count": 3}}, "num_attention_heads (3) must be a multiple"),
        ({"metadata": {"llama.block_count": 4_000_000_000}}, "as config.json: num_hidden_layers: Input should be"),
        ({"metadata": {"llama.block_count": 3}}, ": model.layers.2.input_layernorm.weight has shape none"),
        ({"metadata": {"tokenizer.chat_template": None}}, "chat_template"),
        ({"metadata": {"tokenizer.ggml.model": "t5"}}, ": tokenizer.ggml.model 't5' is not read"),
        ({"metadata": {"tokenizer.ggml.pre": "chatglm-bpe"}}, ": tokenizer.ggml.pre 'chatglm-bpe' is not one of gpt-2"),
        ({"metadata": {"tokenizer.ggml.tokens": None}}, ": no tokenizer.ggml.tokens in its metadata"),
        ({"metadata": {"tokenizer.ggml.merges": None}}, ": no tokenizer.ggml.merges in its metadata"),
        ({"metadata": {"tokenizer.ggml.merges": ["q z"]}}, ": its tokenizer does not fit together"),
        ({"metadata": {"tokenizer.ggml.merges": ["q"]}}, ": tokenizer.ggml.merges are not all of two tokens"),
        ({"metadata": {"tokenizer.ggml.token_type": [1, 3]}}, ": tokenizer.ggml.token_type has 2 numbers for"),
        ({"metadata": {"tokenizer.ggml.token_type": 3}}, ": tokenizer.ggml.token_type has 0 numbers for 270 tokens"),
        ({"metadata": {"tokenizer.ggml.eos_token_id": 9999}}, ": tokenizer.ggml.eos_token_id 9999 is none of the 270"),
        ({"metadata": {"tokenizer.ggml.model": "llama"}}, ": the tokenizer has no token for byte 0"),
        ({"tensors": {"token_embd.weight": None}}, ": token_embd.weight is missing"),
        ({"tensors": {"blk.1.ffn_up.weight": None}}, ": model.layers.1.mlp.up_proj.weight has shape none"),
        ({"tensors": {"blk.0.attn_qkv.weight": (np.ones((4, 64), np.float32), "F32")}}, ": blk.0.attn_qkv.weight has"),
        ({"tensors": {"output_norm.weight": (np.ones(32, np.float32), "F32")}}, ": model.norm.weight has shape (32,)"),
        ({"tensors": {"rope_freqs.weight": (np.full(8, 3, np.float32), "F32")}}, "only that is read"),
        (
            {"tensors": {"blk.0.ffn_up.weight": (np.zeros((96, 84), np.uint8), "Q2_K")}},
            ": blk.0.ffn_up.weight is of type Q2_K; these are read: F32, F16, BF16, Q8_0",
        ),
        (
            {"tensors": {"token_embd.weight": (WEIGHTS["model.embed_tokens.weight"][:200], "F32")}},
            ": the tokenizer has ids up to 269, but the embedding has 200 rows",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_a_base_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert said in refusal(write(tmp_path, **changes))


def test_a_file_that_was_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    whole = path.read_bytes()
    header = min(tensor.start for tensor in GGUFFile(path).tensors.values())
    for length in [4, 5, 20, 23, 30, *range(100, header, header // 37), header]:
        path.write_bytes(whole[:length])
        assert "cut off" in refusal(path), length
    path.write_bytes(whole[:-64])
    assert "cut off: 64 bytes of output_norm.weight are missing; fetch it again" in refusal(path)
    path.write_bytes(b"")
    assert "cannot be read as a GGUF file" in refusal(path)


def test_bytes_that_were_changed_in_the_header_end_in_no_foreign_exception(tmp_path: Path) -> None:
    path = write(tmp_path)
    whole = path.read_bytes()
    header = min(tensor.start for tensor in GGUFFile(path).tensors.values())
    random = np.random.default_rng(0)
    accepted = 0
    for _ in range(150):
        spoilt = bytearray(whole)
        for at in random.integers(4, header, 1):
            spoilt[at] = random.integers(0, 256)
        path.write_bytes(spoilt)
        with suppress(UserError):
            open_source(path)
            accepted += 1
    assert 0 < accepted < 150


@pytest.mark.parametrize("version", [1, 4, struct.unpack(">I", struct.pack("<I", 3))[0]])
def test_other_versions_and_byte_orders_are_refused(tmp_path: Path, version: int) -> None:
    path = write(tmp_path)
    path.write_bytes(b"GGUF" + struct.pack("<I", version) + path.read_bytes()[8:])
    assert f": GGUF version {version}; versions 2 and 3 in little-endian order are read" in refusal(path)
