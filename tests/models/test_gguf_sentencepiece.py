"""A SentencePiece tokenizer in a GGUF file: scores by which llama.cpp merges as the tokenizer does, or none."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from twinloop.models.gguf_vocabulary import Reading, find_reading

TEXTS = [
    "the other order arrived  damaged 12 days ago",
    "then there   are  30 days",
    "bananas, bananas and anchovies",
] * 4
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPACES = normalizers.Replace(" ", "▁")


def sentencepiece(prefix: bool) -> Tokenizer:
    """As converters write one: every pair of tokens that spells a token is a merge, in the order of the tokens."""
    trained = Tokenizer(models.BPE())
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), SPACES]) if prefix else SPACES
    trained.normalizer = normalizer
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=90, show_progress=False))
    learned = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *(token for token in learned if len(token) > 1)]
    tokens += [token for token in learned if len(token) == 1]
    ids = {token: id for id, token in enumerate(tokens)}
    merges = [
        (token[:cut], token[cut:])
        for token in tokens
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizer
    if not prefix:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return tokenizer


def as_llama_cpp(text: str, ids: Mapping[str, int], reading: Reading) -> list[int]:
    """llama.cpp's SentencePiece (src/llama-vocab.cpp): the best pair first, the leftmost of equals, then bytes."""
    symbols = list((" " * reading.space_prefix + text).replace(" ", "▁"))
    while True:
        pairs = [
            (-reading.scores[pair], at)
            for at in range(len(symbols) - 1)
            if (pair := symbols[at] + symbols[at + 1]) in ids
        ]
        if not pairs:
            break
        _, at = min(pairs)
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
    found: list[int] = []
    for symbol in symbols:
        found += [ids[symbol]] if symbol in ids else [ids[BYTES[byte]] for byte in symbol.encode()]
    return found


@pytest.mark.parametrize("prefix", [False, True])
def test_merging_the_best_score_first_gives_the_same_tokens(prefix: bool) -> None:
    tokenizer = sentencepiece(prefix)
    reading = find_reading(json.loads(tokenizer.to_str()))
    assert reading is not None
    assert (reading.model, reading.space_prefix) == ("llama", prefix)
    draw = random.Random(0)
    pieces = ["the ", "other", "ban", "ana", " ", "  ", "n", "days", "7", "ö", "😀", "\n", "<0x0A>", "▁"]
    texts = [*TEXTS, *("".join(draw.choices(pieces, k=12)) for _ in range(200))]
    for text in texts:
        assert as_llama_cpp(text, tokenizer.get_vocab(), reading) == tokenizer.encode(text).ids, text


def changed(**parts: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(sentencepiece(prefix=False).to_str())
    return content | {"model": content["model"] | parts}


def test_merges_that_no_scores_can_say_are_refused() -> None:
    merges = changed()["model"]["merges"]
    assert find_reading(changed()) is not None
    assert find_reading(changed(merges=merges[:-1])) is None  # a pair that llama.cpp would merge
    several = next(at for at in range(1, len(merges)) if "".join(merges[at]) == "".join(merges[at - 1]))
    assert find_reading(changed(merges=[*merges[:several], *merges[several + 1 :], merges[several]])) is None
    assert find_reading(changed(ignore_merges=True)) is None


def test_spaces_that_llama_cpp_would_put_elsewhere_are_refused() -> None:
    always = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
    assert find_reading(changed() | {"normalizer": None, "pre_tokenizer": always}) is None
    assert find_reading(changed() | {"normalizer": None}) is None
