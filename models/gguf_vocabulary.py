"""A tokenizer as a GGUF file names it: tokens with their types, merges, and the name of how text is split.

llama.cpp does not read the regular expressions of a tokenizer.json. It knows a list of names, `tokenizer.ggml.pre`, and
has the splitting of each in its code. A tokenizer that splits text in none of these ways would get other ids there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

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

UNKNOWN_PRE = "twinloop"
"""Where no name fits. llama.cpp refuses a file with a name that it does not know, and so cannot read text wrongly."""

NORMALISES = "text that is not in Unicode's form NFC is normalised by the model's own tokenizer, but not by llama.cpp"


@dataclass(frozen=True)
class Vocabulary:
    """What `tokenizer.ggml.*` holds. tokens, types: one for each row of the embedding.

    pre: how text is split, None where llama.cpp has no name for it. note: what differs in rare texts, or nothing.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str | None
    note: str
    bos_id: int
    stop_id: int
    pad_id: int
    unknown_id: int | None
    chat_template: str


def read_vocabulary(directory: Path, rows: int) -> Vocabulary:
    """The vocabulary of a model directory. rows: of the embedding, which may have more than the tokenizer has tokens.

    Raises UserError for a tokenizer that is no byte-level BPE, or has more tokens than rows.
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
    return Vocabulary(
        tokens=[named.get(id, f"[PAD{id}]") for id in range(rows)],
        types=[_type(id, named, added) for id in range(rows)],
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        pre=pre_tokenizer_name(content),
        note=NORMALISES if content.get("normalizer") else "",
        bos_id=tokenizer.bos_id,
        stop_id=tokenizer.stop_id,
        pad_id=tokenizer.pad_id,
        unknown_id=None if unknown is None else model["vocab"].get(unknown),
        chat_template=settings.get("chat_template") or (directory / "chat_template.jinja").read_text(encoding="utf-8"),
    )


def pre_tokenizer_name(content: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of how this tokenizer.json splits text; None where it has none.

    content: of the file. Unicode's form NFC is the one normalisation that is taken for none.
    """
    model, normalizer = content["model"], content.get("normalizer")
    plain = not any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"))
    if not plain or (normalizer is not None and normalizer != {"type": "NFC"}):
        return None
    steps = [step for each in _flat(content.get("pre_tokenizer")) for step in _steps(each)]
    patterns = tuple(pattern for kind, pattern in steps[:-1] if kind == "Split")
    if len(patterns) + 1 != len(steps) or steps[-1] != _BYTES:
        return None
    return _KNOWN.get((patterns, bool(model.get("ignore_merges"))))


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
    if id in added:
        return TokenType.CONTROL if added[id]["special"] else TokenType.USER_DEFINED
    return TokenType.NORMAL if id in named else TokenType.UNUSED
