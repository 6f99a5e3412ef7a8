"""How many tokens a model takes is in the tokenizer's files, where clients and `transformers` look for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from twinloop.models.config import DecoderConfig
from twinloop.models.decoder import Decoder
from twinloop.models.directory import save_model
from twinloop.models.exported import export_model
from twinloop.models.new_tokenizer import train_tokenizer
from twinloop.models.tokenizer import ChatTokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    tokenizer = train_tokenizer(["a few words of text"] * 4, 300)
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=128,
    )  # fmt: skip
    tensors = {name: tensor.detach().numpy() for name, tensor in Decoder(config).state_dict().items()}
    save_model(folder, config, tensors, tokenizer)
    return folder


def limit_of(folder: Path) -> int:
    limit: int = AutoTokenizer.from_pretrained(folder).model_max_length
    return limit


def test_a_checkpoint_names_the_positions_of_its_network(checkpoint: Path) -> None:
    assert limit_of(checkpoint) == 128


def test_an_exported_model_names_what_a_slot_holds(checkpoint: Path, tmp_path: Path) -> None:
    export_model(checkpoint, tmp_path / "exported", precision="fp32", max_length=96)
    assert limit_of(tmp_path / "exported") == 96
    messages = [{"role": "user", "content": "a few words"}]
    served, trained = (ChatTokenizer.load(each) for each in (tmp_path / "exported", checkpoint))
    assert served.encode_prompt(messages) == trained.encode_prompt(messages)


@pytest.mark.parametrize(
    ("own", "saved", "limit"), [(64, 64, 64), (10**30, 128, 96), (131072, 128, 96), (None, 128, 96)]
)
def test_a_limit_of_an_imported_tokenizer_is_kept_where_it_is_smaller(
    checkpoint: Path, tmp_path: Path, own: int | None, saved: int, limit: int
) -> None:
    source = tmp_path / "imported"
    source.mkdir()
    for file in checkpoint.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    settings = json.loads((source / "tokenizer_config.json").read_text()) | {"model_max_length": own}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    ChatTokenizer.load(source).save(source, max_length=128)
    assert json.loads((source / "tokenizer_config.json").read_text())["model_max_length"] == saved
    export_model(source, tmp_path / "exported", precision="fp32", max_length=96)
    assert limit_of(tmp_path / "exported") == limit
