"""The vocabulary of a tokenizer.json: text to ids of which none is special, and what each id means in bytes.

A special token takes part in encoding under a private name that no text can know, in the same place and with the same
rules as in `transformers` (what it strips, where text begins anew after it). Its own spelling is plain text. So does an
added token that is not special but that the chat template writes, a marker.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from twinloop.common.errors import UserError, one_line

TOKENIZER = "tokenizer.json"

BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
"""A token that means a byte, in tokenizers with byte fallback."""
_VISIBLE = re.compile(r'[^\s"\\\x00-\x1f]')
_PRIVATE_PLANE, _PRIVATE_CHARACTERS = 0x100000, 0xFFFE
_NAME_LENGTH = 6  # characters that are drawn: 96 bits, so no text holds a name


class Vocabulary:
    """Encodes as `transformers` does with add_special_tokens=False. Thread-safe; nothing in it changes.

    bytes_of: what each id means, by id: UTF-8, maybe a part of a character only; empty for an id of no token.
    special_ids: id by token, of special tokens. markers: added tokens that are not special and that the chat template
    writes. private_names: what to write in a text for each of both. added: all added tokens, plain ones too.
    drops_first_space: decoding leaves out one space at the beginning, which encoding had put there.
    first_ids: what comes before a text with add_special_tokens=True; None where tokenizer.json has no post-processor.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        *,
        named: Iterable[str] = (),
        named_ids: Collection[int] = (),
        written: Callable[[Collection[str]], Collection[str]],
        where: str,
    ):
        """data: the content of tokenizer.json, as `parsed` gives it. named, named_ids: tokens that are special wherever
        they are listed. written: gives those of some tokens that the chat template writes.

        Raises UserError for what is no tokenizer, and for one that would lose text.
        """
        _refuse_lossy(data, where)
        specials = _specials(data, set(named), named_ids)
        if blank := [token for token in specials if not _VISIBLE.search(token)]:
            raise UserError(f"{where}: the special token {blank[0]!r} has no visible character: any text may hold it")
        if pieces := _pieces_of_text(data, specials, where):
            raise UserError(
                f"{where}: the special token {min(pieces)!r} is a piece of ordinary text, which would be lost; "
                "name another token in tokenizer_config.json, such as its eos_token"
            )
        self.added = frozenset(token["content"] for token in data["added_tokens"])
        plain = {token for token in self.added if _VISIBLE.search(token)} - {*specials}
        self.markers = written(plain - _pieces_of_text(data, plain, where))
        nonce = "".join(chr(_PRIVATE_PLANE + secrets.randbelow(_PRIVATE_CHARACTERS)) for _ in range(_NAME_LENGTH))
        self.private_names: Mapping[str, str] = {
            token: nonce + chr(_PRIVATE_PLANE + index) for index, token in enumerate([*specials, *sorted(self.markers)])
        }
        self._tokenizer = _built(_with_private_names(data, self.private_names), where)
        token_of = {name: token for token, name in self.private_names.items()}
        self._token_of, self._missed = token_of, self._missed_names(data["added_tokens"])
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.special_ids: Mapping[str, int] = {token: ids[self.private_names[token]] for token in specials}
        self.first_ids = _first_ids(data)
        steps = list(_steps(data["decoder"]))
        named_ids_of = {token_of.get(token, token): id for token, id in ids.items()}
        self.bytes_of: Sequence[bytes] = _token_bytes(named_ids_of, steps, self.added)
        self.drops_first_space = any(
            (step["type"] == "Strip" and step["start"] > 0)
            or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
            for step in steps
        )

    def id_of(self, token: Any) -> int | None:
        """None for what is no token, such as a number in a settings file."""
        if not isinstance(token, str):
            return None
        id: int | None = self._tokenizer.token_to_id(self.private_names.get(token, token))
        return id

    def encode(self, text: str) -> list[int]:
        """text: valid Unicode, with private names for special tokens and markers."""
        return list(self._lately_encoded(text))

    @cached_property
    def _lately_encoded(self) -> Callable[[str], tuple[int, ...]]:
        """Remembers a few texts: what looks at a conversation in several ways encodes the same prompt and header."""

        @lru_cache(maxsize=16)
        def encoded(text: str) -> tuple[int, ...]:
            return tuple(self._tokenizer.encode(self._spelled_where_missed(text), add_special_tokens=False).ids)

        return encoded

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        texts = [self._spelled_where_missed(text) for text in texts]
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_continuation(self, text: str) -> list[int]:
        """As `encode`, for text that goes on after other text: no space is put before it."""
        return self._continued.encode(text, add_special_tokens=False).ids

    def _missed_names(self, entries: Sequence[Mapping[str, Any]]) -> re.Pattern[str] | None:
        """Where `tokenizers` overlooks tokens: one that it looks for in normalised text has the space in front that
        an old form of Llama's normalizer puts there, so it is found after a space, and where text begins anew: after
        a token that is looked for before."""
        normalizer = self._tokenizer.normalizer
        names = [self.private_names.get(each["content"], "") for each in entries if each.get("normalized")]
        changed = [name for name in names if name and normalizer and normalizer.normalize_str(name) != name]
        ends = "".join(name[-1] for name in self.private_names.values() if name not in changed)
        return re.compile(f"(?<=[^ {ends}])(?:{'|'.join(changed)})") if changed else None

    def _spelled_where_missed(self, text: str) -> str:
        return self._missed.sub(lambda match: self._token_of[match[0]], text) if self._missed else text

    @cached_property
    def _continued(self) -> Tokenizer:
        data = json.loads(self._tokenizer.to_str())
        parts = {name: _without_prefix(data[name]) for name in ("normalizer", "pre_tokenizer")}
        changed = any(data[name] != part for name, part in parts.items())
        return _built(data | parts, TOKENIZER) if changed else self._tokenizer


def read_vocab_size(directory: Path) -> int | None:
    """Rows that the tokenizer of a model directory needs of an embedding, also of one that cannot chat; None: it has
    no tokenizer. Raises UserError where it is broken."""
    path = directory / TOKENIZER
    return _size(_built(parsed(read_source(path), str(path)), str(path)).get_vocab()) if path.exists() else None


def read_source(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{error.filename}: no tokenizer to read here ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not a tokenizer ({error})") from error


def parsed(source: str, where: str) -> dict[str, Any]:
    """The content of tokenizer.json. Raises UserError for what is none."""
    try:
        data = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a tokenizer ({error})") from error
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise UserError(f"{where}: not a tokenizer (it has no model)")
    whole: dict[str, Any] = {"added_tokens": [], "decoder": None} | data
    entries = whole["added_tokens"]
    if not isinstance(entries, list) or not all(isinstance(each, dict) and _is_added(each) for each in entries):
        raise UserError(f"{where}: not a tokenizer (its added_tokens are none)")
    vocabulary = data["model"].get("vocab")
    if isinstance(vocabulary, dict) and not all(type(id) is int for id in vocabulary.values()):
        raise UserError(f"{where}: not a tokenizer (its vocabulary has ids that are no whole numbers)")
    if not isinstance(data["model"].get("unk_token"), str | None):
        raise UserError(f"{where}: not a tokenizer (its unk_token is no text)")
    return whole


def _is_added(entry: Mapping[str, Any]) -> bool:
    fields = [entry.get(name) for name in ("id", "content", "special")]
    return [type(each) for each in fields] == [int, str, bool]


def _built(data: Mapping[str, Any], where: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(json.dumps(data, ensure_ascii=False))
    except BaseException as error:  # the library raises bare Exception, and where it has a bug no Exception at all
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{where}: not a tokenizer ({one_line(error)})") from error


def _size(ids: Mapping[str, int]) -> int:
    return max(ids.values(), default=-1) + 1


def _first_ids(data: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The ids that the post-processor of a tokenizer.json puts before a text."""
    whole = data.get("post_processor")
    if not isinstance(whole, dict):
        return None
    found: list[int] = []
    for step in whole.get("processors", [whole]):
        for piece in step.get("single", ()) if step.get("type") == "TemplateProcessing" else ():
            if "Sequence" in piece:
                break
            found += step["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return tuple(found)


def _refuse_lossy(data: Mapping[str, Any], where: str) -> None:
    """Raise UserError unless any text can be encoded, and decoded from the bytes of its tokens."""
    kind = data["model"].get("type", "BPE")
    if kind != "BPE":
        raise UserError(f"{where}: model {kind} is not supported; byte-level BPE and BPE with byte fallback are")
    vocabulary, merges = data["model"].get("vocab"), data["model"].get("merges", [])
    if not isinstance(vocabulary, dict) or not isinstance(merges, list):
        raise UserError(f"{where}: not a tokenizer (its model has no vocabulary, or no merges)")
    try:
        steps = {step["type"] for step in _steps(data["decoder"])}
        replaced = {kind for step in _steps(data["decoder"]) for kind, _ in step.get("pattern", {}).items()}
    except (LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{where}: not a tokenizer (its decoder is none)") from None
    if "ByteLevel" in steps:
        return
    if not steps or not steps <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        names = ", ".join(sorted(steps)) or "none"
        raise UserError(
            f"{where}: the decoder ({names}) is neither byte-level nor SentencePiece's, so text would be lost"
        )
    if replaced - {"String"}:
        raise UserError(f"{where}: the decoder replaces what fits a regular expression, which is not supported")
    if not data["model"].get("byte_fallback"):
        raise UserError(f"{where}: BPE without byte_fallback loses text that it has no token for")


def _specials(data: Mapping[str, Any], named: Collection[str], named_ids: Collection[int]) -> list[str]:
    """Tokens that are special: by their own entry, or because something names them. Each gets an entry."""
    entries, vocabulary = data["added_tokens"], data["model"]["vocab"]
    known = {entry["content"] for entry in entries}
    of_ids = {entry["content"] for entry in entries if entry["id"] in named_ids}
    of_ids |= {token for token, id in vocabulary.items() if id in named_ids} if named_ids else set()
    wanted = {*named, *of_ids}
    for token in sorted(wanted - known):
        if token in vocabulary:
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            entries.append({"id": vocabulary[token], "content": token, **flags})
    return [entry["content"] for entry in entries if entry["special"] or entry["content"] in wanted]


def _pieces_of_text(data: Mapping[str, Any], tokens: Collection[str], where: str) -> set[str]:
    """Those of `tokens` without which other text could not be encoded, such as "!" for padding."""
    try:
        merged = {piece for merge in data["model"].get("merges", ()) for piece in merged_pair(merge)}
    except (ValueError, TypeError):
        raise UserError(f"{where}: not a tokenizer (its merges are not all of two tokens)") from None
    alphabet = _byte_alphabet()
    return {token for token in tokens if token in merged or token in alphabet or BYTE_TOKEN.fullmatch(token)}


def _with_private_names(data: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The tokenizer in which each special token has another spelling, and nothing cuts, fills or adds to a text."""
    model = dict(data["model"])
    model["vocab"] = {names.get(token, token): id for token, id in model["vocab"].items()}
    model["merges"] = [merge for merge in model.get("merges", ()) if "".join(merged_pair(merge)) not in names]
    model["unk_token"] = names.get(unknown := model.get("unk_token") or "", unknown or None)
    added = [entry | {"content": names.get(entry["content"], entry["content"])} for entry in data["added_tokens"]]
    unused = {"truncation": None, "padding": None, "post_processor": None}
    return {**data, **unused, "added_tokens": added, "model": model}


def merged_pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """A merge is a pair, or in older files a text with a space between the two."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _without_prefix(part: Any) -> Any:
    """A normalizer or pre-tokenizer that puts no space before a text."""
    if part is None or part["type"] == "Prepend":
        return None
    for key in ("normalizers", "pretokenizers"):
        if key in part:
            return part | {key: [kept for each in part[key] if (kept := _without_prefix(each)) is not None]}
    if part["type"] == "Metaspace":
        return part | {"prepend_scheme": "never"}
    return part | {"add_prefix_space": False} if part["type"] == "ByteLevel" else part


def _steps(decoder: Mapping[str, Any] | None) -> Iterable[Mapping[str, Any]]:
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for each in decoder["decoders"]:
            yield from _steps(each)
    else:
        yield decoder


def _token_bytes(ids: Mapping[str, int], steps: Sequence[Mapping[str, Any]], added: Collection[str]) -> list[bytes]:
    """What each id means, by id."""
    table = [b""] * _size(ids)
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        byte_of = _byte_alphabet()
        for token, id in ids.items():
            plain = token in added or not byte_of.keys() >= set(token)
            table[id] = token.encode() if plain else bytes(byte_of[character] for character in token)
        return table
    spaces = {step.get("replacement", "▁"): " " for step in steps if step["type"] == "Metaspace"}
    spaces |= {step["pattern"]["String"]: step["content"] for step in steps if step["type"] == "Replace"}
    for token, id in ids.items():
        byte = BYTE_TOKEN.fullmatch(token) if "ByteFallback" in kinds else None
        text = token
        for old, new in spaces.items():
            text = text.replace(old, new)
        table[id] = bytes([int(byte[1], 16)]) if byte else text.encode()
    return table


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: unprintable bytes are written as characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    byte_of = {chr(byte): byte for byte in printable}
    return byte_of | {chr(0x100 + n): byte for n, byte in enumerate(b for b in range(256) if b not in printable)}
