"""Byte-level BPE with one token a digit, and the one chat template that training, evaluation and serving share.

Two kinds of text enter here and never mix. The template's own text may hold special tokens; content (a corpus line, a
customer's message, an answer) is always plain: no text in it can become a special id. So a conversation is
never rendered to one string and encoded; the template is encoded around places where plain content goes.
"""

from __future__ import annotations

import codecs
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from twinloop.common.errors import UserError
from twinloop.models.chat_template import MARK, compile_template, mark

Message = Mapping[str, str]

PAD, BOS, SYSTEM, USER, ASSISTANT, END = (
    "<|pad|>", "<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
)  # fmt: skip
SPECIAL_TOKENS = (PAD, BOS, SYSTEM, USER, ASSISTANT, END)
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256

# The space is attached to the end of a word, so "damaged" is one token in every position; each digit is its own token,
# because comparison of numbers generalises over digits and not over whole numbers. So is each space beyond the first
# before a number: right-aligned numbers then have as many tokens each.
PRE_TOKENS = r"[A-Za-z_]+ ?|\d|(?<= ) (?= *\d)|[^A-Za-z_\d]+? (?= +\d)|[^A-Za-z_\d]+"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role ' + message['role'] | string + ' is not one of system, user, assistant') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

TOKENIZER = "tokenizer.json"

# Merges of a small vocabulary no longer change long before this; of a larger corpus a sample is taken.
TRAINING_CHARACTERS = 16_000_000


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> ChatTokenizer:
    """Learn merges from `texts`; the same texts give the same tokenizer, byte for byte.

    A corpus that has too little repetition gives fewer than `vocab_size` tokens: read the result's own `vocab_size`.
    Raises UserError when there is no text, or a vocabulary too small for the 256 bytes and the special tokens.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"tokenizer: vocab_size {vocab_size} is too small; the 256 bytes alone need {MIN_VOCAB_SIZE}")
    sample = _sample([clean for text in texts if (clean := _valid_unicode(text))])
    if not sample:
        raise UserError("tokenizer: the corpus holds no text to train on; give at least one non-empty record")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    return ChatTokenizer(tokenizer, settings)


class ChatTokenizer:
    """A `tokenizers` tokenizer and its chat template. Thread-safe: nothing in it changes after construction."""

    def __init__(self, tokenizer: Tokenizer, settings: Mapping[str, Any]):
        """`settings` is the content of tokenizer_config.json. Raises UserError for one that cannot chat."""
        if not isinstance(tokenizer.decoder, decoders.ByteLevel):
            raise UserError("tokenizer.json: the decoder is not ByteLevel; only byte-level tokenizers are lossless")
        # Not kept in tokenizer.json, so set here always: text that spells a special token is encoded as text.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._settings = dict(settings)
        self._special_ids = {
            token.content: id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }
        by_length = sorted(self._special_ids, key=len, reverse=True)
        self._special_pattern = re.compile("(" + ("|".join(map(re.escape, by_length)) or "(?!)") + ")")
        self._bytes_of = _token_bytes(tokenizer)
        self._template = compile_template(settings.get("chat_template"))
        self.stop_id = self._named_id("eos_token")
        # Qwen has no BOS and many have no PAD: both then are the stop token, as those models were trained.
        self.bos_id = self._named_id("bos_token", default=self.stop_id)
        self.pad_id = self._named_id("pad_token", default=self.stop_id)
        self._skeleton = lru_cache(maxsize=256)(self._build_skeleton)

    @classmethod
    def load(cls, directory: Path | str) -> ChatTokenizer:
        """Read tokenizer.json and tokenizer_config.json. Raises UserError when one is missing or broken."""
        directory = Path(directory)
        try:
            settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
            if "chat_template" not in settings and (directory / "chat_template.jinja").exists():
                settings["chat_template"] = (directory / "chat_template.jinja").read_text(encoding="utf-8")
        except OSError as error:
            raise _no_tokenizer(error) from error
        except ValueError as error:
            raise UserError(f"{directory / 'tokenizer_config.json'}: not valid JSON ({error})") from error
        return cls(_read_tokenizer(directory / TOKENIZER), settings)

    def save(self, directory: Path | str, *, max_length: int | None = None) -> None:
        """Write tokenizer.json and tokenizer_config.json, as `transformers.AutoTokenizer` reads them.

        max_length: of the model beside it, in tokens, where the settings do not say so already.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / TOKENIZER).write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")
        limit = {} if max_length is None else {"model_max_length": max_length}
        text = json.dumps(limit | self._settings, indent=2, ensure_ascii=False) + "\n"
        (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding needs, and may have more of: one more than the largest id."""
        return len(self._bytes_of)

    @property
    def token_bytes(self) -> Sequence[bytes]:
        """What each id means, by id: UTF-8, maybe a part of a character only. Empty for an id of no token."""
        return self._bytes_of

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that only the template can produce."""
        return frozenset(self._special_ids.values())

    def encode(self, text: str) -> list[int]:
        """Plain text to ids, none of them special. Lone surrogates, which no UTF-8 can hold, become U+FFFD."""
        return self._tokenizer.encode(_valid_unicode(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode` for each text, on all cores."""
        clean = [_valid_unicode(text) for text in texts]
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(clean, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text. A stop token at the end is not shown; any other special token is, by its name."""
        if len(ids) and ids[-1] == self.stop_id:
            ids = ids[:-1]
        return b"".join(map(self._bytes_of.__getitem__, ids)).decode("utf-8", errors="replace")

    def decoder_stream(self) -> DecoderStream:
        """A decoder that takes one id at a time and gives text as soon as its characters are whole."""
        return DecoderStream(self._bytes_of, self.stop_id)

    def encode_document(self, text: str) -> list[int]:
        """A pretraining document: BOS, text, stop token."""
        return [self.bos_id, *self.encode(text), self.stop_id]

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """BOS, the messages, then the header after which the assistant answers. Raises UserError, see `render`."""
        return self._encode_messages(messages, add_generation_prompt=True)

    def encode_answer(self, text: str) -> list[int]:
        """What the assistant has to produce: text and stop token."""
        return [*self.encode(text), self.stop_id]

    def encode_conversation(self, messages: Sequence[Message]) -> list[int]:
        """The whole conversation. Begins with encode_prompt(messages[:-1]) + encode_answer(its last content)."""
        return self._encode_messages(messages, add_generation_prompt=False)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as one string, for people to read; encode it with `encode_prompt`, never from here.

        Raises UserError for an unknown role, or a message that is not {"role": str, "content": str}.
        """
        for index, message in enumerate(messages):
            fields = [message.get(name) for name in ("role", "content")] if isinstance(message, Mapping) else [None]
            if not all(isinstance(field, str) for field in fields):
                raise UserError(f'messages[{index}]: a message needs "role" and "content", both text')
        return self._render([dict(message) for message in messages], add_generation_prompt)

    def _render(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        tokens = {name: _token_text(self._settings.get(name)) or "" for name in ("bos_token", "eos_token", "pad_token")}
        try:
            return self._template.render(
                messages=messages, tools=tools, add_generation_prompt=add_generation_prompt, **tokens
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:  # of its expressions too
            raise UserError(f"chat template: {error}") from error

    def render_marked(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str:
        """A prompt of messages in the template's own form, not looked at here. Raises UserError, see `render`.

        tools: those that the model may call, in the template's own form too.
        """
        return self._render([dict(message) for message in messages], add_generation_prompt=True, tools=tools)

    def encode_marked(
        self,
        messages: Sequence[Mapping[str, Any]],
        texts: Sequence[str],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """A prompt, as `render_marked` takes it, in which `mark(i)` is the place of texts[i].

        What is between two special tokens is encoded as one text, as a model with tools was trained.
        """
        pieces = MARK.split(self.render_marked(messages, tools))
        ids: list[int] = []
        run = ""
        for position, piece in enumerate(pieces):  # the template's text, and between it index and form of a text
            if position % 3 == 1:
                text = texts[int(piece)]
                run += json.dumps(text, ensure_ascii=False)[1:-1] if pieces[position + 1] else text
            elif position % 3 == 0:
                head, *rest = self._special_pattern.split(piece)
                run += head
                for special, text in zip(rest[::2], rest[1::2], strict=True):
                    ids += [*self.encode(run), self._special_ids[special]]
                    run = text
        return ids + self.encode(run)

    def _encode_messages(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
        try:
            contents = [message["content"] for message in messages]
            skeleton = self._skeleton(tuple(message["role"] for message in messages), add_generation_prompt)
            encoded = [self.encode(content) for content in contents]
        except (KeyError, TypeError, AttributeError):
            self.render(messages)  # names the message that is broken
            raise
        ids: list[int] = []
        for part in skeleton:
            ids.extend(encoded[part] if isinstance(part, int) else part)
        return ids

    def _build_skeleton(self, roles: tuple[str, ...], add_generation_prompt: bool) -> list[tuple[int, ...] | int]:
        """The template for these roles: ids of its own text, and the index of each message between them."""
        # Content is not in the string that is split, so nothing in it can look like one of these marks.
        marked = [{"role": role, "content": mark(index)} for index, role in enumerate(roles)]
        pieces = MARK.split(self._render(marked, add_generation_prompt))
        skeleton: list[tuple[int, ...] | int] = [tuple(self._encode_template(pieces[0]))]
        for index, template in zip(pieces[1::3], pieces[3::3], strict=True):
            skeleton += [int(index), tuple(self._encode_template(template))]
        return skeleton

    def _encode_template(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in self._special_pattern.split(text):
            ids.extend([self._special_ids[piece]] if piece in self._special_ids else self.encode(piece))
        return ids

    def _named_id(self, name: str, default: int | None = None) -> int:
        text = _token_text(self._settings.get(name))
        id = default if text is None else self._tokenizer.token_to_id(text)
        if id is None:
            raise UserError(f"tokenizer_config.json: {name} {text!r} is not a token of tokenizer.json")
        return id


class DecoderStream:
    """Incremental decoding: the pushed texts and `finish()` together are what `decode` of the same answer gives."""

    def __init__(self, bytes_of: Sequence[bytes], stop_id: int):
        self._bytes_of = bytes_of
        self._stop_id = stop_id
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """Text that is certain after this token; empty while a character is unfinished, and for the stop token."""
        return "" if id == self._stop_id else self._decoder.decode(self._bytes_of[id])

    def finish(self) -> str:
        """What an unfinished character at the end is shown as (U+FFFD), or nothing."""
        return self._decoder.decode(b"", final=True)


@dataclass(frozen=True)
class TemplateProblem:
    """One example that would be trained wrongly: its index, and why."""

    index: int
    problem: str


@dataclass(frozen=True)
class TemplateReport:
    """What `check_template` saw."""

    examples: int
    problems: tuple[TemplateProblem, ...]

    @property
    def passed(self) -> bool:
        return not self.problems


def check_template(
    tokenizer: ChatTokenizer, examples: Iterable[Sequence[Message]], *, max_length: int | None = None
) -> TemplateReport:
    """Check that conversations which end in an assistant's message will be trained as they will be asked.

    For each: the prompt's tokens begin the conversation's tokens; what follows them is the answer and the stop token;
    the answer has tokens of its own to learn; nothing is longer than `max_length` tokens, so nothing is cut.
    """
    count = 0
    problems: list[TemplateProblem] = []
    for index, messages in enumerate(examples):
        count += 1
        try:
            whole, problem = _check_example(tokenizer, messages)
        except UserError as error:
            whole, problem = [], str(error)
        if problem is None and max_length is not None and len(whole) > max_length:
            problem = f"{len(whole)} tokens, longer than {max_length}: it would be cut"
        if problem is not None:
            problems.append(TemplateProblem(index, problem))
    return TemplateReport(count, tuple(problems))


def _check_example(tokenizer: ChatTokenizer, messages: Sequence[Message]) -> tuple[list[int], str | None]:
    whole = tokenizer.encode_conversation(messages)
    if not messages or messages[-1]["role"] != "assistant":
        return whole, "the last message is not the assistant's: nothing to learn"
    prompt = tokenizer.encode_prompt(messages[:-1])
    answer = tokenizer.encode_answer(messages[-1]["content"])
    if whole[: len(prompt)] != prompt:
        return whole, "the prompt's tokens are not a prefix of the conversation's"
    if len(answer) == 1:
        return whole, "the answer is empty: all targets are masked"
    if whole[len(prompt) : len(prompt) + len(answer)] != answer:
        return whole, "the answer and its stop token do not follow the prompt: the stop token would not be trained"
    return whole, None


def read_vocab_size(directory: Path) -> int | None:
    """`ChatTokenizer.vocab_size` of the tokenizer in a model directory, also of one that cannot chat; None: it has
    none. Raises UserError where it is broken."""
    path = directory / TOKENIZER
    return _vocab_size(_read_tokenizer(path)) if path.exists() else None


def _read_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _no_tokenizer(error) from error
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: not a tokenizer ({error})") from error


def _no_tokenizer(error: OSError) -> UserError:
    return UserError(f"{error.filename}: no tokenizer to read here ({error.strerror})")


def _vocab_size(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _valid_unicode(text: str) -> str:
    """The text itself, unless it holds surrogates (JSON's \\ud800): pairs are joined, lone ones become U+FFFD."""
    if not isinstance(text, str):
        raise TypeError(f"text must be str, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _sample(texts: list[str]) -> list[str]:
    """About TRAINING_CHARACTERS of the corpus, from all over it and the same ones each time."""
    share = TRAINING_CHARACTERS / max(1, sum(map(len, texts)))
    return texts if share >= 1 else random.Random(0).sample(texts, max(1, round(share * len(texts))))


def _token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """What each id means, by id. GPT-2's byte alphabet writes unprintable bytes as characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(0x100 + n): byte for n, byte in enumerate(b for b in range(256) if b not in printable)}
    added = tokenizer.get_added_tokens_decoder()
    table = [b""] * _vocab_size(tokenizer)
    for token, id in tokenizer.get_vocab(with_added_tokens=True).items():
        table[id] = token.encode() if id in added else bytes(byte_of[character] for character in token)
    return table


def _token_text(value: Any) -> str | None:
    """A token in tokenizer_config.json is text, or an object with `content`."""
    return value.get("content") if isinstance(value, Mapping) else value
