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
from twinloop.models.tokenizer import TOKENIZER, ChatTokenizer

_Step: TypeAlias = tuple[str, Any]
"""One step of splitting: a regular expression whose matches are pieces of their own, or whatever else it is."""

_NUMBERS = r"\p{N}"
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")

# The names of src/llama-vocab.cpp, with the splitting that its comments take from the tokenizer.json of each. The flag:
# whether a piece that is a token as a whole skips the merges.
_KNOWN: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT_2,), False): "gpt-2",
    ((_NUMBERS, _GPT_2), False): "smollm",
    ((_LLAMA_3,), True): "llama-bpe",
    ((_QWEN_2,), False): "qwen2",
}

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

UNKNOWN_PRE = "twinloop"
"""Where no name fits. llama.cpp refuses a file with a name that it does not know, and so cannot read text wrongly."""

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

    reading: how text becomes tokens, None where llama.cpp has no way that is the same. note: what differs in rare
    texts, or nothing.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    reading: Reading | None
    note: str
    bos_id: int
    stop_id: int
    pad_id: int
    unknown_id: int | None
    chat_template: str


def read_vocabulary(directory: Path, rows: int) -> GGUFVocabulary:
    """The vocabulary of a model directory. rows: of the embedding, which may have more than the tokenizer has tokens.

    Raises UserError for a tokenizer that is no BPE, or has more tokens than rows.
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
    settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    unknown = model.get("unk_token")
    return GGUFVocabulary(
        tokens=[named.get(id, f"[PAD{id}]") for id in range(rows)],
        types=[_type(id, named, added) for id in range(rows)],
        merges=[" ".join(_pair(merge)) for merge in model["merges"]],
        reading=find_reading(content),
        note=NORMALISES if content.get("normalizer") == _NFC else "",
        bos_id=tokenizer.bos_id,
        stop_id=tokenizer.stop_id,
        pad_id=tokenizer.pad_id,
        unknown_id=None if unknown is None else model["vocab"].get(unknown),
        chat_template=_chat_template(directory, settings),
    )


def _chat_template(directory: Path, settings: Mapping[str, Any]) -> str:
    file, stated = directory / "chat_template.jinja", settings.get("chat_template")
    if file.exists():
        return file.read_text(encoding="utf-8")
    if isinstance(stated, list):  # several by name, as some exporters write them
        stated = next((each["template"] for each in stated if each["name"] == "default"), None)
    if not isinstance(stated, str):
        raise UserError(f"{directory}: no chat template, which a GGUF file needs")
    return stated


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
    return Reading("llama", "default", scores, space_prefix=prefix)


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
        return [("Split", _GPT_2), _BYTES] if each.get("use_regex", True) else [_BYTES]
    if kind == "Digits" and each["individual_digits"]:
        return [("Split", _NUMBERS)]
    if kind == "Split" and each["behavior"] == "Isolated" and not each["invert"] and "Regex" in each["pattern"]:
        return [(kind, each["pattern"]["Regex"])]
    return [("other", None)]


def _type(id: int, named: Mapping[int, str], added: Mapping[int, Mapping[str, Any]]) -> int:
    if id in added and (added[id]["special"] or "▁" not in named[id]):  # runs of spaces: others would show their ▁
        return TokenType.CONTROL if added[id]["special"] else TokenType.USER_DEFINED
    if id not in named:
        return TokenType.UNUSED
    return TokenType.BYTE if _BYTE.fullmatch(named[id]) else TokenType.NORMAL
