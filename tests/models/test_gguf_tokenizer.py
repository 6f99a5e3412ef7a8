"""The tokenizer of a GGUF file gives the ids that its model was trained with: those of transformers' own reader."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from gguf_files import TOKENIZER, config_of, random_weights, vocabulary, write_gguf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from twinloop.models.directory import save_model
from twinloop.models.gguf_file import GGUFFile
from twinloop.models.gguf_tokenizer import read_tokenizer
from twinloop.models.source import open_source
from twinloop.models.tokenizer import ChatTokenizer

TEXTS = [
    "Hello  world\n\n\t 12345 it's we'll DON'T, the order.",
    "   leading and trailing   ",
    "ÀÉ a\u0301 漢字 🙂🙂 \u200b x=1.5e-10 \r\n\r\n end",
    "١٢٣ ½ ² 2024-01-01 a1b2c3",
    "<0x41> </s> ▁ the ▁order",
    "the " * 20,
    "",
]
CONFIG = config_of("llama")
CHAT = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CORPUS = [*TEXTS, "the order of the other customer is 12345, 678 and 9"] * 3


def theirs(path: Path) -> Tokenizer:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer, get_gguf_tokenizer

    architecture, tokenizer, _ = get_gguf_tokenizer(str(path))
    return convert_gguf_tokenizer(architecture, tokenizer)[0]


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def write(folder: Path, metadata: dict[str, Any], architecture: str = "llama") -> Path:
    changed = metadata | {"general.architecture": architecture}
    return write_gguf(folder / "small.gguf", "llama", CONFIG, random_weights(CONFIG), metadata=changed)


def byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    """Trained on the texts, so that it matters where they are split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|im_end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def gpt2() -> dict[str, Any]:
    """Metadata of a vocabulary in which words are not split at all: merges go as far as the pre-tokenizer lets them."""
    whole = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    names = {id: token for token, id in whole.get_vocab().items()}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [names[id] for id in range(len(names))],
        "tokenizer.ggml.token_type": [3 if id == 0 else 1 for id in range(len(names))],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in json.loads(whole.to_str())["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
    }


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
def test_byte_level_ids_are_those_of_transformers(tmp_path: Path, gpt2: dict[str, Any], pre: str) -> None:
    path = write(tmp_path, gpt2 | {"tokenizer.ggml.pre": pre})
    found, _ = read_tokenizer(GGUFFile(path).metadata, "here")
    expected = theirs(path)
    if pre == "qwen2":  # transformers 5.23 forgets Qwen's normaliser where it reads a GGUF file
        expected.normalizer = found.normalizer
    for text in TEXTS:
        assert ids(found, text) == ids(expected, text), text
        composed = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
        assert found.decode(ids(found, text), skip_special_tokens=False) == composed


def test_smollms_digits_are_apart_as_in_its_tokenizer_json(gpt2: dict[str, Any]) -> None:
    found, _ = read_tokenizer(gpt2 | {"tokenizer.ggml.pre": "smollm"}, "here")
    published = Tokenizer.from_str(found.to_str())
    published.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in TEXTS:
        assert ids(found, text) == ids(published, text), text
    whole, _ = read_tokenizer(gpt2 | {"tokenizer.ggml.pre": "gpt-2"}, "here")
    assert ids(found, "12345") != ids(whole, "12345")


def test_where_a_file_names_no_pre_tokenizer_marks_and_digits_are_split_as_llama_cpp_does(gpt2: dict[str, Any]) -> None:
    found, _ = read_tokenizer(gpt2, "here")
    pieces = [piece for piece, _ in found.pre_tokenizer.pre_tokenize_str("it's $12345, ok")]
    assert pieces == ["it", "'", "s", "Ġ", "$", "123", "45", ",", "Ġok"]


@pytest.fixture(scope="module")
def llama() -> dict[str, Any]:
    """Metadata of a SentencePiece vocabulary: merges are scores, bytes have tokens of their own."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    pieces.train_from_iterator(
        [text for text in CORPUS if "<0x" not in text], trainers.BpeTrainer(vocab_size=200, show_progress=False)
    )
    vocabulary = pieces.get_vocab()
    learned = sorted((piece for piece in vocabulary if len(piece) > 1), key=lambda piece: vocabulary[piece])
    characters = sorted(piece for piece in vocabulary if (len(piece) == 1 and piece.isascii()) or piece == "▁")
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *learned, *characters, "[PAD0]"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(id) for id in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(learned) + len(characters)), 5],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
    }


def test_sentencepiece_ids_are_those_of_transformers(tmp_path: Path, llama: dict[str, Any]) -> None:
    path = write(tmp_path, llama)
    found, settings = read_tokenizer(GGUFFile(path).metadata, "here")
    expected = theirs(path)
    found.encode_special_tokens = expected.encode_special_tokens = True  # as content is encoded
    for text in TEXTS:
        # Where a text begins with a space, transformers 5.23 leaves out the one that SentencePiece puts before it.
        assert ids(found, text) == ids(expected, f" {text}" if text.startswith(" ") else text), text
        assert found.decode(ids(found, text), skip_special_tokens=False) == text.replace("▁", " ")
    assert found.encode("the").ids[0] == 1
    assert settings["unk_token"] == "<unk>"
    assert "[PAD0]" not in found.get_vocab()


def test_gemmas_merges_follow_its_ids_and_its_runs_of_spaces_are_tokens(tmp_path: Path, llama: dict[str, Any]) -> None:
    tokens = [*llama["tokenizer.ggml.tokens"][:-1], "  ", "    "]
    changed = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0 if len(token) > 3 else -1.0 for token in tokens],
        "tokenizer.ggml.token_type": [*llama["tokenizer.ggml.token_type"][:-1], 4, 4],
    }
    path = write(tmp_path, llama | changed, architecture="gemma3")
    found, _ = read_tokenizer(GGUFFile(path).metadata, "here")
    expected = theirs(path)
    for text in [*TEXTS, "a    b  c"]:
        assert ids(found, text) == ids(expected, text), text
    assert tokens.index("    ") in ids(found, "a    b")
    assert found.get_vocab_size() == len(tokens)


def test_ids_of_a_trained_tokenizer_come_back(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "small.gguf", "llama", CONFIG, random_weights(CONFIG))
    read = open_source(path).load_tokenizer()
    assert read.vocab_size == TOKENIZER.vocab_size
    messages = [{"role": "system", "content": "the"}, {"role": "user", "content": "<|end|> order"}]
    assert read.encode_prompt(messages) == TOKENIZER.encode_prompt(messages)
    assert (read.bos_id, read.stop_id, read.pad_id) == (TOKENIZER.bos_id, TOKENIZER.stop_id, TOKENIZER.pad_id)


def test_a_chat_stops_at_the_end_of_a_turn_where_the_file_names_one(tmp_path: Path) -> None:
    named = vocabulary(TOKENIZER) | {
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": TOKENIZER.stop_id,
        "tokenizer.ggml.eom_token_id": 3,
    }
    source = open_source(write(tmp_path, named))
    assert source.config.eos_token_id == TOKENIZER.stop_id
    tokenizer = source.load_tokenizer()
    assert (tokenizer.eos_id, tokenizer.stop_ids) == (1, (TOKENIZER.stop_id, 1, 3))


def test_a_sentencepiece_file_is_a_base(tmp_path: Path, llama: dict[str, Any]) -> None:
    config = CONFIG.model_copy(update={"vocab_size": len(llama["tokenizer.ggml.tokens"])})
    changed = llama | {"tokenizer.chat_template": CHAT, "general.architecture": "llama"}
    path = write_gguf(tmp_path / "small.gguf", "llama", config, random_weights(config), metadata=changed)
    source = open_source(path)
    tokenizer = source.load_tokenizer()
    assert (source.config.bos_token_id, source.config.eos_token_id) == (1, 2)
    assert tokenizer.vocab_size == config.vocab_size - 1  # [PAD0] is no token
    save_model(tmp_path / "out", source.config, source.load_weights(), tokenizer)
    messages = [{"role": "user", "content": "the order 漢 </s>"}]
    prompt = ChatTokenizer.load(tmp_path / "out").encode_prompt(messages)
    assert prompt == tokenizer.encode_prompt(messages)
    assert prompt[0] == 1
    assert 2 not in prompt
