"""A tokenizer as a GGUF file names it: tokens with their types, and how text becomes tokens.

llama.cpp knows two kinds. Of byte-level BPE (`gpt2`) it takes the merges, but not the regular expressions that text is
split by: it knows a list of names, `tokenizer.ggml.pre`, and has the splitting of each in its code. Of SentencePiece's
BPE (`llama`) it takes no merges: the two neighbours are merged that give the token of the best score. A tokenizer that
is neither would get other ids there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from gguf import TokenType

from twinloop.common.errors import UserError
from twinloop.models.gguf_tokenizer import DEFAULT, GPT2, NUMBERS, PRE_TOKENIZERS, WHOLE_WORDS
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.models.vocabulary import TOKENIZER

_Step: TypeAlias = tuple[str, Any]
"""One step of splitting: a regular expression whose matches are pieces of their own, or whatever else it is."""

_KNOWN = {(patterns, name in WHOLE_WORDS): name for name, patterns in PRE_TOKENIZERS.items() if name != DEFAULT}
"""Names of `tokenizer.ggml.pre`, by the splitting of each and whether a piece that is a token skips the merges."""

_BYTE = re.compile("<0x[0-9A-F]{2}>")
_NFC = {"type": "NFC"}
_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PREFIX = {"type": "Prepend", "prepend": "▁"}
_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
# SentencePiece's tokenizers as converters write them, Gemma's first and Llama 2's last: normalizer and pre-tokenizer,
# and whether a space is put before a text. The pre-tokenizer finds no space any more.
_SPACES: list[tuple[tuple[Any, Any], bool]] = [
    ((_SPACE, _SPLIT), False),
    ((_SPACE, None), False),
    (({"type": "Sequence", "normalizers": [_SPACE]}, None), False),
    (({"type": "Sequence", "normalizers": [_PREFIX, _SPACE]}, None), True),
]

NORMALISES = "text that is not in Unicode's form NFC is normalised by the model's own tokenizer, but not by llama.cpp"


@dataclass(frozen=True)
class Reading:
    """How llama.cpp makes tokens of a text.

    model: `gpt2` or `llama`. pre: the name of the splitting. scores: of each token that is merged, the best the
    highest. space_prefix: whether a space is put before a text, and behind each special token.
    """

    model: Literal["gpt2", "llama"]
    pre: str
    scores: Mapping[str, float] = field(default_factory=dict)
    space_prefix: bool = False


@dataclass(frozen=True)
class GGUFVocabulary:
    """What `tokenizer.ggml.*` holds. tokens, types: one for each row of the embedding.

    reading: how text becomes tokens. note: what differs in rare texts, or nothing. stop_ids: with the token that ends a
    turn first.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    reading: Reading
    note: str
    bos_id: int
    eos_id: int
    stop_ids: tuple[int, ...]
    pad_id: int
    unknown_id: int | None
    chat_templates: Mapping[str, str]


def read_vocabulary(directory: Path, rows: int) -> GGUFVocabulary:
    """The vocabulary of a model directory. rows: of the embedding, which may have more than the tokenizer has tokens.

    Raises UserError for a tokenizer that llama.cpp does not have, or that has more tokens than rows.
    """
    tokenizer = ChatTokenizer.load(directory)
    content = json.loads((directory / TOKENIZER).read_text(encoding="utf-8"))
    model = content["model"]
    if model.get("type") != "BPE":
        raise UserError(f"{directory / TOKENIZER}: a GGUF file holds BPE, not a {model.get('type')} model")
    added = {each["id"]: each for each in content.get("added_tokens") or ()}
    named = {id: token for token, id in model["vocab"].items()} | {id: each["content"] for id, each in added.items()}
    if max(named) >= rows:
        raise UserError(f"{directory / TOKENIZER}: it has the id {max(named)}, but the embedding has {rows} rows")
    reading = find_reading(content)
    if reading is None:
        raise UserError(
            "gguf: llama.cpp cannot split text as this tokenizer does, and would read other tokens; a file is written "
            "of a base with a tokenizer that llama.cpp knows, and of this one a Hugging Face directory or genai's"
        )
    unknown = model.get("unk_token")
    return GGUFVocabulary(
        tokens=[named.get(id, f"[PAD{id}]") for id in range(rows)],
        types=[_type(id, named, added) for id in range(rows)],
        merges=[" ".join(_pair(merge)) for merge in model["merges"]],
        reading=reading,
        note=NORMALISES if content.get("normalizer") == _NFC else "",
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        stop_ids=tokenizer.stop_ids,
        pad_id=tokenizer.pad_id,
        unknown_id=None if unknown is None else model["vocab"].get(unknown),
        chat_templates=tokenizer.chat_templates,
    )


def find_reading(content: Mapping[str, Any]) -> Reading | None:
    """How llama.cpp makes the same tokens of any text; None where it does not.

    content: of tokenizer.json. Unicode's form NFC is the one normalisation that is taken for none.
    """
    model, normalizer = content["model"], content.get("normalizer")
    added = content.get("added_tokens") or ()
    if any(each[flag] for each in added for flag in ("lstrip", "rstrip", "single_word")):
        return None
    if any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout")):
        return None
    if model.get("byte_fallback"):
        return None if any(each["normalized"] for each in added) else _sentencepiece(content)
    if normalizer not in (None, _NFC):
        return None
    steps = [step for each in _flat(content.get("pre_tokenizer")) for step in _steps(each)]
    patterns = tuple(pattern for kind, pattern in steps[:-1] if kind == "Split")
    if len(patterns) + 1 != len(steps) or steps[-1] != _BYTES:
        return None
    pre = _KNOWN.get((patterns, bool(model.get("ignore_merges"))))
    return None if pre is None else Reading("gpt2", pre)


def _sentencepiece(content: Mapping[str, Any]) -> Reading | None:
    model = content["model"]
    way = (content.get("normalizer"), content.get("pre_tokenizer"))
    prefix = next((prefix for known, prefix in _SPACES if known == way), None)
    scores = _scores(model["vocab"], [_pair(merge) for merge in model["merges"]])
    if prefix is None or scores is None or model.get("ignore_merges"):
        return None
    return Reading("llama", DEFAULT, scores, space_prefix=prefix)


def _scores(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> dict[str, float] | None:
    """A score for each merged token, by which merging the best first is following the merges; None where there is none.

    That is so where all merges into one token follow each other, and every pair of tokens that spells a token is one.
    """
    scores: dict[str, float] = {}
    last = ""
    for left, right in merges:
        if (merged := left + right) != last:
            if merged in scores:
                return None
            scores[merged] = -float(len(scores))
            last = merged
    known = set(merges)
    for token in vocabulary:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary and (left, right) not in known:
                return None
    return scores


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _flat(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] != "Sequence":
        return [pre_tokenizer]
    return [inner for each in pre_tokenizer["pretokenizers"] for inner in _flat(each)]


_BYTES: _Step = ("ByteLevel", None)


def _steps(each: Mapping[str, Any]) -> list[_Step]:
    """One kind of pre-tokenizer, as regular expressions where it splits by one."""
    kind = each["type"]
    if kind == "ByteLevel" and not each["add_prefix_space"]:
        return [("Split", GPT2), _BYTES] if each.get("use_regex", True) else [_BYTES]
    if kind == "Digits" and each["individual_digits"]:
        return [("Split", NUMBERS)]
    if kind == "Split" and each["behavior"] == "Isolated" and not each["invert"] and "Regex" in each["pattern"]:
        return [(kind, each["pattern"]["Regex"])]
    return [("other", None)]


def _type(id: int, named: Mapping[int, str], added: Mapping[int, Mapping[str, Any]]) -> int:
    if id in added and (added[id]["special"] or "▁" not in named[id]):  # runs of spaces: others would show their ▁
        return TokenType.CONTROL if added[id]["special"] else TokenType.USER_DEFINED
    if id not in named:
        return TokenType.UNUSED
    return TokenType.BYTE if _BYTE.fullmatch(named[id]) else TokenType.NORMAL
