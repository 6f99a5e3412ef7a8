"""The tokenizer and chat template that a GGUF file's metadata describe: tokenizer.json and its settings."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from twinloop.common.errors import UserError, one_line

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
"""`tokenizer.ggml.token_type`."""
_PADDING = re.compile(r"\[PAD\d+\]")
"""What converters call rows of the embedding that no token has."""
_TEMPLATE = "tokenizer.chat_template"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_PLAIN = re.compile(r"[^\s:$]+")
"""A token that can be in the pattern of a post-processor."""

NUMBERS = r"\p{N}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEFAULT = "default"
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "gpt-2": (GPT2,),
    "smollm": (NUMBERS, GPT2),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_LLAMA3.replace("{1,3}", ""),),
    # As llama.cpp splits where a file names none: marks alone, then as GPT-2, then digits by threes.
    DEFAULT: (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
"""By `tokenizer.ggml.pre`: patterns that a text is split by, one after the other, before its bytes are merged."""
_NORMALISED = ("qwen2",)
"""Those that compose characters first (NFC)."""
WHOLE_WORDS = ("llama-bpe",)
"""Those in which a word that is a token is one, whatever its merges say."""

SPACE = "▁"
ALPHABET = frozenset(pre_tokenizers.ByteLevel.alphabet())
"""Characters of byte-level BPE, one a byte."""


def read_tokenizer(metadata: Mapping[str, Any], where: str) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer, and what tokenizer_config.json says of it, the chat template included where there is one.

    Raises UserError, which begins with `where`, for a kind of tokenizer that is not read, and where a part is missing.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = _texts(metadata, "tokenizer.ggml.tokens", where)
    types = _each_has(tokens, metadata, "tokenizer.ggml.token_type", where, default=_NORMAL)
    used = [not (type == _UNUSED and _PADDING.fullmatch(token)) for token, type in zip(tokens, types, strict=True)]
    vocabulary = {token: id for id, token in enumerate(tokens) if used[id]}
    added = {
        token: AddedToken(token, special=type == _CONTROL, normalized=False)
        for token, type in zip(tokens, types, strict=True)
        if type in (_CONTROL, _USER_DEFINED)
    }
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, vocabulary, added.keys(), where)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, tokens, vocabulary, where)
    else:
        raise UserError(
            f"{where}: tokenizer.ggml.model {kind!r} is not read; gpt2 (BPE of bytes) and llama (BPE with byte "
            "fallback) are"
        )
    tokenizer.add_tokens([token for text, token in added.items() if tokenizer.token_to_id(text) is not None])
    settings = _settings(metadata, tokens, where)
    bos = settings.get("bos_token", "")
    if metadata.get("tokenizer.ggml.add_bos_token", kind == "llama") and _PLAIN.fullmatch(bos):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokens.index(bos))]
        )
    return tokenizer, settings


def read_stop_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """What ends an answer: the end of a turn, of a message (a call of a tool), or of a text, as a file names them."""
    named = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eot", "eom", "eos"))
    return tuple(dict.fromkeys(id for id in named if isinstance(id, int)))


def _byte_level(
    metadata: Mapping[str, Any], vocabulary: dict[str, int], added: Collection[str], where: str
) -> Tokenizer:
    """added: tokens that are found in a text before it is split."""
    pre = metadata.get("tokenizer.ggml.pre", DEFAULT)
    if pre not in PRE_TOKENIZERS:
        raise UserError(f"{where}: tokenizer.ggml.pre {pre!r} is not one of {', '.join(PRE_TOKENIZERS)}")
    merges = [tuple(merge.split(" ")) for merge in _texts(metadata, "tokenizer.ggml.merges", where)]
    if any(len(merge) != 2 for merge in merges):
        raise UserError(f"{where}: tokenizer.ggml.merges are not all of two tokens: the file is corrupt")
    spelled = {
        token if token in added or ALPHABET.issuperset(token) else _spelled(token): id
        for token, id in vocabulary.items()
    }
    tokenizer = Tokenizer(_bpe(where, vocab=spelled, merges=merges, ignore_merges=pre in WHOLE_WORDS))
    if pre in _NORMALISED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in PRE_TOKENIZERS[pre]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _spelled(token: str) -> str:
    """In the characters that mean bytes, where a file has it in its own."""
    ((spelled, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(token)
    return spelled


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], vocabulary: dict[str, int], where: str
) -> Tokenizer:
    """BPE whose merges follow from the scores of the pieces; bytes that no piece has are tokens of their own."""
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary]
    if missing:
        raise UserError(
            f"{where}: the tokenizer has no token for byte {missing[0]}; only one with byte fallback is read"
        )
    scores = _each_has(tokens, metadata, "tokenizer.ggml.scores", where)
    gemma = str(metadata.get("general.architecture")).startswith("gemma")
    if gemma:
        # Gemma's runs of spaces are written as such, and its scores are not the order of its merges; its ids are.
        vocabulary = {SPACE * len(token) if not token.strip(" ") else token: id for token, id in vocabulary.items()}
        scores = [-float(id) for id in range(len(tokens))]
    unknown = _named(metadata, "unknown_token_id", tokens, where)
    tokenizer = Tokenizer(
        _bpe(
            where,
            vocab=vocabulary,
            merges=_merges(vocabulary, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if gemma or not metadata.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        end = []
    else:  # as SentencePiece does it, also where a text begins with a space of its own
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
        end = [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *end]
    )
    return tokenizer


def _merges(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every pair of pieces that is a piece, the best score first (SentencePiece merges by the score of the whole)."""
    found = []
    for piece, id in vocabulary.items():
        if _BYTE.fullmatch(piece):  # only ever means a byte, however a text spells it
            continue
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        halves = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        halves.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(scores[id], pair) for pair in halves]
    found.sort(key=lambda each: (-each[0], -len(each[1][0]), -len(each[1][1])))  # alike: the longer first half first
    return [pair for _, pair in found]


def _bpe(where: str, **parts: Any) -> models.BPE:
    try:
        return models.BPE(**parts)
    except Exception as error:  # the library raises bare Exception: a merge of what is no token
        raise UserError(
            f"{where}: its tokenizer does not fit together ({one_line(error)}): the file is corrupt"
        ) from None


def _settings(metadata: Mapping[str, Any], tokens: Sequence[str], where: str) -> dict[str, Any]:
    keys = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "pad_token": "padding_token_id",
        "unk_token": "unknown_token_id",
    }
    named = {name: _named(metadata, key, tokens, where) for name, key in keys.items()}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {name: token for name, token in named.items() if token is not None}
    template = metadata.get(_TEMPLATE)
    others = {
        key.removeprefix(f"{_TEMPLATE}."): text for key, text in metadata.items() if key.startswith(f"{_TEMPLATE}.")
    }
    if others:
        template = [{"name": name, "template": text} for name, text in {"default": template, **others}.items()]
    return settings if template is None else settings | {"chat_template": template}


def _named(metadata: Mapping[str, Any], key: str, tokens: Sequence[str], where: str) -> str | None:
    id = metadata.get(f"tokenizer.ggml.{key}")
    if id is None:
        return None
    if not isinstance(id, int) or not 0 <= id < len(tokens):
        raise UserError(f"{where}: tokenizer.ggml.{key} {id!r} is none of the {len(tokens)} tokens")
    return tokens[id]


def _each_has(
    tokens: Sequence[str], metadata: Mapping[str, Any], key: str, where: str, default: float | None = None
) -> list[float]:
    """A number for each token."""
    found = metadata.get(key, None if default is None else [default] * len(tokens))
    if not isinstance(found, list) or not all(isinstance(each, (int, float)) for each in found):
        found = []
    if len(found) != len(tokens):
        raise UserError(f"{where}: {key} has {len(found)} numbers for {len(tokens)} tokens: the file is corrupt")
    return found


def _texts(metadata: Mapping[str, Any], key: str, where: str) -> list[str]:
    found = metadata.get(key)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise UserError(f"{where}: no {key} in its metadata; only a file with its tokenizer can be a base")
    return found
