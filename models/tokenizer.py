"""A model's tokenizer and chat template, as training, evaluation and serving share them.

Two kinds of text enter here and never mix. The template's own text may hold special tokens; content (a corpus line, a
customer's message, an answer) is always plain: no text in it becomes a special id, nor, unless it is the assistant's,
another token that the template writes. A conversation is encoded as one text, as `transformers` encodes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer

from twinloop.common.errors import UserError
from twinloop.models.chat_template import ChatTemplate, Rendered, Token, Turn
from twinloop.models.config import Kind, kind_of
from twinloop.models.decoder_stream import DecoderStream
from twinloop.models.jinja_template import JinjaTemplate, Message
from twinloop.models.template_pins import TemplatePins
from twinloop.models.tokenizer_files import (
    SETTINGS,
    extra_special_tokens,
    limited,
    named_tokens,
    read_settings,
    read_stop_ids,
    settings_template,
    token_text,
    without_unused_tokens,
)
from twinloop.models.vocabulary import TOKENIZER, Vocabulary, parsed, read_source

Said = tuple[tuple[str, str], ...]
"""Roles and contents of messages, as what can be looked up."""


class ChatTokenizer:
    """A tokenizer and its chat template. Thread-safe: nothing in it changes after construction.

    eos_id: of the token that ends a text. bos_id, pad_id: where there is none of these, `eos_id`.
    labels: what answers are, where the network has a head for them (`models.label_tokenizer`).
    """

    labels: tuple[str, ...] = ()

    def __init__(
        self,
        tokenizer: Tokenizer | str,
        settings: Mapping[str, Any],
        *,
        stop_ids: Sequence[int] = (),
        where: str = TOKENIZER,
    ):
        """tokenizer: or the content of tokenizer.json. settings: the content of tokenizer_config.json.

        stop_ids: with which the model ends its answers, as its generation_config.json has them, besides `eos_token`.
        Raises UserError for a tokenizer that loses text or has no `eos_token`, and for settings without a template.
        """
        self._source = tokenizer if isinstance(tokenizer, str) else tokenizer.to_str(pretty=True)
        self._settings, self._stop_ids, self._where = dict(settings), tuple(stop_ids), where
        data, tokens = parsed(self._source, where), named_tokens(settings)
        template = JinjaTemplate(settings.get("chat_template"), tokens=tokens)
        self._vocabulary = Vocabulary(
            data,
            named=[*tokens.values(), *extra_special_tokens(settings)],
            named_ids=frozenset(stop_ids),
            written=template.written,
            where=where,
        )
        self._template = ChatTemplate(
            template,
            added=self._vocabulary.added,
            special=self._vocabulary.special_ids.keys(),
            markers=self._vocabulary.markers,
        )
        self.eos_id = self._named_id("eos_token", default=next(iter(stop_ids), None))
        # Qwen has no BOS and many have no PAD: both then are the token that ends a text, as those models were trained.
        self.bos_id = self._named_id("bos_token", default=self.eos_id)
        self.pad_id = self._named_id("pad_token", default=self.eos_id)
        special_ids = self._vocabulary.special_ids
        self._stops = {token: id for token, id in special_ids.items() if id == self.eos_id or id in stop_ids}

    @classmethod
    def load(cls, directory: Path | str, *, rows: int | None = None) -> Self:
        """Read the tokenizer of a model directory. Raises UserError where a file is missing or broken.
        rows: of the embedding; special tokens beyond them are left out where nothing needs them."""
        directory = Path(directory)
        settings, path, stop_ids = read_settings(directory), directory / TOKENIZER, read_stop_ids(directory)
        source = read_source(path)
        if rows is not None:
            source, settings = without_unused_tokens(source, settings, rows, stop_ids, where=str(path))
        return cls(source, settings, stop_ids=stop_ids, where=str(path))

    def save(self, directory: Path | str, *, max_length: int | None = None, pad_id: int | None = None) -> None:
        """Write tokenizer.json and tokenizer_config.json, as `transformers.AutoTokenizer` reads them.

        max_length: of the model beside it, in tokens; the settings' own stays where it is smaller. pad_id: of the token
        that fills a batch, where it is not the settings'.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / TOKENIZER).write_bytes(self._source.encode())
        settings = self._settings if max_length is None else limited(self._settings, max_length)
        padding = {} if pad_id in (None, self.pad_id) else {"pad_token": self.token_bytes[pad_id].decode()}
        text = json.dumps(settings | padding, indent=2, ensure_ascii=False) + "\n"
        (directory / SETTINGS).write_text(text, encoding="utf-8")

    @property
    def kind(self) -> Kind:
        """What its network gives."""
        return kind_of(self.labels)

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding needs, and may have more of: one more than the largest id."""
        return len(self._vocabulary.bytes_of)

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """Jinja by name; `default` is always there."""
        return self._template.sources

    def pinned(self, pins: TemplatePins) -> Self:
        """The same with its templates pinned; itself where there is nothing to pin in them."""
        sources = {name: pins.applied(text) for name, text in self.chat_templates.items()}
        if sources == self.chat_templates:
            return self
        settings = self._settings | {"chat_template": settings_template(sources)}
        return type(self)(self._source, settings, stop_ids=self._stop_ids, where=self._where)

    @property
    def token_bytes(self) -> Sequence[bytes]:
        """What each id means, by id: UTF-8, maybe a part of a character only. Empty for an id of no token."""
        return self._vocabulary.bytes_of

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that only the template can produce."""
        return frozenset(self._vocabulary.special_ids.values())

    @cached_property
    def stop_id(self) -> int:
        """Of the token that the template puts after an answer; `eos_id` where that is no stop token."""
        try:
            return self.encode_answer("answer")[-1]
        except UserError:
            return self.eos_id

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """All that end an answer, `stop_id` first."""
        return (self.stop_id, *sorted(set(self._stops.values()) - {self.stop_id}))

    def encode(self, text: str) -> list[int]:
        """Plain text to ids, none of them special, nor of a plain token that begins or ends messages in the template.
        Lone surrogates, which no UTF-8 can hold, become U+FFFD."""
        return self._vocabulary.encode(self._plain(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode` for each text, on all cores."""
        return self._vocabulary.encode_batch([self._plain(text) for text in texts])

    def encode_continuation(self, text: str) -> list[int]:
        """As `encode`, for text that goes on after other text: SentencePiece's tokenizers put no space before it."""
        return self._vocabulary.encode_continuation(self._plain(text))

    def encode_text(self, text: str) -> list[int]:
        """A text that is no chat, with what the model's texts begin with: as tokenizer.json has it, else BOS, as in
        `encode_document`."""
        first = self._vocabulary.first_ids
        return [*((self.bos_id,) if first is None else first), *self.encode(text)]

    def decode_all(self, ids: Sequence[int]) -> str:
        """Ids to text, in which every special token is shown by its name."""
        stream = self.decoder_stream()
        return stream.push_bytes(b"".join(map(self.token_bytes.__getitem__, ids))) + stream.finish()

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text. A stop token at the end is not shown; any other special token is, by its name."""
        return self.decode_all(ids[:-1] if len(ids) and ids[-1] in self._stops.values() else ids)

    def decoder_stream(self, *, continues: bool = False) -> DecoderStream:
        """A decoder that takes one id at a time and gives text as soon as its characters are whole.

        continues: after other text, as `encode_continuation` encodes it: a space at the beginning is the text's own.
        """
        stops, drops = frozenset(self._stops.values()), self._vocabulary.drops_first_space and not continues
        return DecoderStream(self.token_bytes, stops, drops_first_space=drops)

    def encode_document(self, text: str) -> list[int]:
        """A pretraining document: BOS, text, the token that ends it."""
        return [self.bos_id, *self.encode(text), self.eos_id]

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """BOS, the messages, then the header after which the assistant answers. Raises UserError, see `render`."""
        return self._encode(self._lately_asked(_said(_checked(messages))))

    def encode_answer(self, text: str) -> list[int]:
        """What the assistant has to produce: text and stop token, with what the template writes around the text.

        Raises UserError for a template that would train something else than it asks for.
        """
        return self._answer(self._turn([*self._question, {"role": "assistant", "content": text}]))

    def encode_sampled(self, text: str) -> list[int]:
        """As `encode_answer`, for text that a model has written: the template may be unable to follow it, since some
        split answers at words such as `</think>`. It is then the text itself and the stop token."""
        try:
            return self.encode_answer(text)
        except UserError:
            return [*self.encode_continuation(text), self.stop_id]

    def encode_conversation(self, messages: Sequence[Message]) -> list[int]:
        """The whole conversation. Begins with encode_prompt(messages[:-1]) + encode_answer(its last content) where the
        last is the assistant's. Raises UserError as these do."""
        checked = _checked(messages)
        if not checked or checked[-1]["role"] != "assistant":
            return self._encode(self._template.trace(checked, add_generation_prompt=False))
        turn = self._turn(checked)
        after = self._encode(turn.whole, turn.stop)[1:]
        return [*self._encode(turn.whole, 0, turn.begin), *self._answer(turn), *after]

    def encode_answered(self, messages: Sequence[Message]) -> list[int]:
        """A prompt with its answer, the last message, up to the stop token: what a reward model scores, so the answer
        is encoded as `encode_sampled` does it.

        Raises UserError as `encode_prompt`, and where the last message is not the assistant's.
        """
        if len(messages) < 2 or messages[-1].get("role") != "assistant":
            raise UserError("messages: the last one must be the assistant's answer that is scored")
        return [*self.encode_prompt(messages[:-1]), *self.encode_sampled(messages[-1]["content"])]

    def encode_turns(self, messages: Sequence[Message]) -> list[TrainedTurns]:
        """The assistant's answers with what each was asked with: in one sequence where the template leaves a
        conversation as it was when it goes on, else in several (thinking blocks that are dropped from earlier answers).

        The last answer is always there, in the first sequence. Not there are earlier ones that are empty or that the
        template would not train as it asks for them, and one before any question. Raises UserError as `encode_answer`.
        """
        found: list[TrainedTurns] = []
        checked = _checked(messages)
        for index in reversed(range(len(checked))):
            if checked[index]["role"] != "assistant" or (found and not (index and checked[index]["content"])):
                continue
            try:
                turn = self._turn(checked[: index + 1])
            except UserError:
                if not found:
                    raise
                continue
            prompt = self._encode(turn.whole, 0, turn.begin)
            ids = [*prompt, *self._answer(turn)]
            answer = range(len(prompt), len(ids))
            same = next((at for at, longer in enumerate(found) if longer.ids[: len(ids)] == ids), None)
            if same is None:
                found.append(TrainedTurns(ids, (answer,)))
            else:
                found[same] = TrainedTurns(found[same].ids, (answer, *found[same].answers))
        return found

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as one string, for people to read; encode it with `encode_prompt`, never from here.

        Raises UserError for an unknown role, or a message that is not {"role": str, "content": str}.
        """
        return self._template.render(_checked(messages), add_generation_prompt=add_generation_prompt)

    def render_marked(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str:
        """A prompt of messages in the template's own form, not looked at here. Raises UserError, see `render`.

        tools: those that the model may call, in the template's own form too.
        """
        return self._template.render([dict(message) for message in messages], add_generation_prompt=True, tools=tools)

    def encode_marked(
        self,
        messages: Sequence[Mapping[str, Any]],
        texts: Sequence[str],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """A prompt, as `render_marked` takes it: the messages' content is text, and in all else `mark(i)` is the place
        of texts[i]. Raises UserError, see `render`."""
        clean = [{**message, "content": valid_unicode(message["content"])} for message in messages]
        rendered = self._template.trace(clean, add_generation_prompt=True, tools=tools)
        return self._encode(rendered.with_texts([valid_unicode(text) for text in texts]))

    @cached_property
    def _question(self) -> list[dict[str, str]]:
        """Messages that an answer may follow. Some templates take none without a system's message."""
        question = [{"role": "user", "content": "question"}]
        try:
            self.render(question)
        except UserError:
            return [{"role": "system", "content": "system"}, *question]
        return question

    def _turn(self, messages: Sequence[Message]) -> Turn:
        return self._lately_answered(_said(_checked(messages)))

    @cached_property
    def _lately_asked(self) -> Callable[[Said], Rendered]:
        """A prompt in the template. Remembers a few: both answers of a pair have the same."""
        return lru_cache(maxsize=4)(lambda said: self._template.trace(_messages(said), add_generation_prompt=True))

    @cached_property
    def _lately_answered(self) -> Callable[[Said], Turn]:
        """An answered conversation in the template. Remembers a few: who checks a record also measures it."""
        return lru_cache(maxsize=4)(lambda said: self._template.turn(_messages(said), self._stops))

    def _answer(self, turn: Turn) -> list[int]:
        """Ids of an answer, as they follow those of its prompt: no token of it is merged with one of the prompt's."""
        header = 0
        for token in self._template.specials(turn.whole.shadow, 0, turn.begin):
            header = token.start  # text begins anew at a special token, so what is before it has no influence
        answer = self._private(turn.whole, turn.begin, turn.end)
        before = self._private(turn.whole, header, turn.begin)
        prompt, both = self._vocabulary.encode(before), self._vocabulary.encode(before + answer)
        if both[: len(prompt)] == prompt:
            return both[len(prompt) :]
        return self._vocabulary.encode_continuation(answer)

    def _encode(self, rendered: Rendered, start: int = 0, end: int | None = None) -> list[int]:
        return self._vocabulary.encode(self._private(rendered, start, end))

    def _plain(self, text: str) -> str:
        """A text of no conversation, with private names for the tokens that an answer may hold."""
        text = valid_unicode(text)
        return self._with_names(text, self._template.said_tokens(text), 0, None)

    def _private(self, rendered: Rendered, start: int, end: int | None) -> str:
        """The text of a rendered conversation, with private names for its tokens."""
        return self._with_names(rendered.text, self._template.tokens(rendered, start, end), start, end)

    def _with_names(self, text: str, tokens: Iterable[Token], start: int, end: int | None) -> str:
        pieces: list[str] = []
        for token in tokens:
            pieces += [text[start : token.start], self._vocabulary.private_names[token.text]]
            start = token.end
        return "".join([*pieces, text[start:end]])

    def _named_id(self, name: str, default: int | None = None) -> int:
        text = token_text(self._settings.get(name))
        id = default if text is None else self._vocabulary.id_of(text)
        if id is None:
            raise UserError(f"tokenizer_config.json: {name} {text!r} is not a token of tokenizer.json")
        return id


@dataclass(frozen=True)
class TrainedTurns:
    """A sequence of ids, and where in it the assistant's answers are, their stop tokens included."""

    ids: list[int]
    answers: tuple[range, ...]


def _said(checked: Sequence[dict[str, str]]) -> Said:
    return tuple((message["role"], message["content"]) for message in checked)


def _messages(said: Said) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in said]


def _checked(messages: Sequence[Message]) -> list[dict[str, str]]:
    """The messages' roles and contents. Raises UserError for one that has not both."""
    checked = []
    for index, message in enumerate(messages):
        fields = [message.get(name) for name in ("role", "content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(field, str) for field in fields):
            raise UserError(f'messages[{index}]: a message needs "role" and "content", both text')
        checked.append({"role": message["role"], "content": valid_unicode(message["content"])})
    return checked


def valid_unicode(text: str) -> str:
    """The text itself, unless it holds surrogates (JSON's \\ud800): pairs are joined, lone ones become U+FFFD."""
    if not isinstance(text, str):
        raise TypeError(f"text must be str, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
