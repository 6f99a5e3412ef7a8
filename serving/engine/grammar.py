"""Constraints on an answer's text: which tokens may come next, so that it follows a JSON Schema or grammar to its end.

llguidance keeps the state and computes the sets, from the bytes of every token. Only the tokens of plain text are ever
allowed, the special ones that a grammar names, and the stop token where the text may end.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.engine.sampling import ConstraintError

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
"""The schema of any JSON object."""

# To compile an ordinary schema takes less than a millisecond. What costs are the states of a lexer, which stay with its
# grammar: 0.6 kB each as measured, so at most 30 MB a grammar. A bounded string needs one a character.
_GRAMMARS_KEPT = 16
# The fuel bounds what a step may cost everybody beside it: of a regular expression with large counts it was seconds.
_LIMITS = LLParserLimits(
    max_lexer_states=50_000, initial_lexer_fuel=200_000, step_lexer_fuel=1_000_000, verbose_errors=False
)
# A model that likes blanks must come to an end of them; this many indent seven levels by two.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,16}"
_OWN_OPTIONS = "x-guidance"
"""A key with which a schema would set llguidance's options: it is not part of JSON Schema."""
_SCHEMAS_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_NO_SCHEMAS = frozenset({"enum", "const", "default", "examples"})
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "const", "enum")
_LARGEST_EXACT = 2**53
"""llguidance (1.9) holds numbers as floats: larger ones it would enforce wrongly, and some, such as an integer of at
most -(2**63 - 2), end the process."""
_MESSAGE_CHARACTERS = 300
_OUT_OF_FUEL = (
    *("fuel exhausted", "lexer precomputation failed", "lexer error: too many expressions"),
    "doesn't satisfy the grammar",  # of a token that it allowed, where fuel ended within the token
)
"""In which words llguidance (1.9) says so, to who sets its limits."""

# llguidance (1.9) compiles by recursion, through the rules and definitions that name each other too, and a stack that
# is too small ends the process. Of all that was tried objects within objects take most: 11 kB for 17 characters, which
# are 260 MB for the longest text.
_MOST_CHARACTERS = 400_000
_STACK_BYTES = 512 << 20
_CLIENTS_CHARACTERS = 8000
"""Of a regular expression or a grammar that a client wrote: to read it takes a time that grows with the square."""
_stack_size_changes = threading.Lock()
_OWN_DIRECTIVES = re.compile(r"%\s*(json|llguidance)")
"""Of Lark: what would pass by the checks of schemas here."""


class GrammarError(ConstraintError):
    """A grammar that cannot be compiled, or not be followed any further; the message says why, in one line."""


class Grammar:
    """A compiled grammar: a constraint that any number of answers may share, from any thread."""

    def __init__(self, tokenizer: LLTokenizer, text: str):
        """text: a grammar in llguidance's own form. Raises GrammarError for one that it cannot compile."""
        if len(text) > _MOST_CHARACTERS:
            raise GrammarError(f"has {len(text):,} characters, and may have {_MOST_CHARACTERS:,}")
        self._tokenizer, self._text = tokenizer, text
        self._compiled = self._compile()
        if self._compiled.is_error():
            raise GrammarError(_one_line(self._compiled.get_error()))

    def start(self) -> GrammarState:
        return GrammarState(self, self.matcher(), self._tokenizer.vocab_size)

    def matcher(self) -> LLMatcher:
        """A matcher that has seen no token. It shares the states of its lexer with earlier ones, and the limit on them:
        so it may fail where one of its own would not."""
        return self._compiled.deep_copy()

    def takes(self, text: str) -> bool:
        """Whether this is a whole text that follows it."""
        tokens = [*self._tokenizer.tokenize_str(text), self._tokenizer.eos_token]
        return bool(self.matcher().validate_tokens(tokens) == len(tokens))

    def forget(self) -> None:
        """Let later matchers share nothing with earlier ones."""
        self._compiled = self._compile()

    def _compile(self) -> LLMatcher:
        return _on_large_stack(lambda: LLMatcher(self._tokenizer, self._text, log_level=0, limits=_LIMITS))


class GrammarState:
    """How far one answer has come. One thread at a time."""

    def __init__(self, grammar: Grammar, matcher: LLMatcher, vocab_size: int):
        self._grammar, self._matcher = grammar, matcher
        self._tokens: list[int] = []
        self._bits = allocate_token_bitmask(1, vocab_size)

    def allowed(self) -> np.ndarray:
        """As `ConstraintState.allowed`. Raises GrammarError when the answer needs more than the limits allow."""
        if not self._fill():
            # What this answer needs decides whether it fails, and not what others have needed before it.
            self._grammar.forget()
            self._matcher = self._grammar.matcher()
            self._matcher.consume_tokens(self._tokens)
            if not self._fill():
                raise GrammarError(_one_line(self._matcher.get_error()))
        return self._bits.view(np.uint8)[0]

    def forced(self) -> list[int]:
        """As `ConstraintState.forced`."""
        tokens: list[int] = self._matcher.compute_ff_tokens()
        return tokens

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)  # where it fails, `allowed` says so
        self._tokens.append(token)

    def _fill(self) -> bool:
        fill_next_token_bitmask(self._matcher, self._bits)
        return not self._matcher.is_error()


class Grammars:
    """Makes the grammars of one tokenizer, and keeps those used last. Safe for many threads."""

    def __init__(self, tokenizer: ChatTokenizer):
        self._chat_tokenizer = tokenizer
        self._compile = lru_cache(maxsize=_GRAMMARS_KEPT)(self._compile_text)

    def json_schema(self, schema: Mapping[str, Any]) -> Grammar:
        """What follows a JSON Schema (draft 2020-12), its properties in the schema's order.

        Raises GrammarError for a schema that cannot be enforced as a whole: no keyword of it is passed over. Keys that
        it does not name may come twice in an object; readers of JSON keep the last.
        """
        own = _without_options(schema)
        _check_numbers(own)
        try:
            text = LLMatcher.grammar_from_json_schema(_as_json(own), overrides={"whitespace_pattern": _WHITESPACE})
        except ValueError as error:
            raise GrammarError(_one_line(str(error))) from None
        grammar = self._compile(text)
        _check_counts(own)
        return grammar

    def lark(self, text: str) -> Grammar:
        """What follows a grammar in llguidance's form of Lark. Raises GrammarError for one that it cannot compile."""
        return self._compile(LLMatcher.grammar_from_lark(text))

    def clients_lark(self, text: str) -> Grammar:
        """`lark`, of a text that a client sent: a schema in it is refused, since it would not be checked."""
        if (found := _OWN_DIRECTIVES.search(text)) is not None:
            raise GrammarError(f"has {found[0]}, which is not taken in a grammar, nor as a literal of one")
        return self._of_client(text, LLMatcher.grammar_from_lark)

    def regex(self, pattern: str) -> Grammar:
        """What a regular expression matches as a whole, in the syntax of Rust's `regex`: no look-around, no
        back-references. Raises GrammarError for one that it cannot compile."""
        return self._of_client(pattern, LLMatcher.grammar_from_regex)

    def choice(self, texts: Sequence[str]) -> Grammar:
        """One of these texts. Raises GrammarError where they are too long together."""
        return self.lark("start: TEXT\nTEXT: " + " | ".join(map(_quoted, texts)))

    def _of_client(self, text: str, read: Callable[[str], str]) -> Grammar:
        """Whose first step is tried, so that one which costs too much is refused before anything is generated."""
        if len(text) > _CLIENTS_CHARACTERS:
            raise GrammarError(f"has {len(text):,} characters, and may have {_CLIENTS_CHARACTERS:,}")
        grammar = self._compile(read(text))
        grammar.start().allowed()
        return grammar

    def literal(self, text: str) -> str:
        """A text in a Lark grammar, in which what spells a special token is that token."""
        parts = self._special_pattern.split(text)
        return " ".join(
            f"<[{self._special_ids[part]}]>" if part in self._special_ids else _quoted(part) for part in parts if part
        )

    def starts_special(self, text: str) -> bool:
        """Whether a text begins with a special token."""
        return self._special_pattern.match(text) is not None

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        tokenizer = self._chat_tokenizer
        return {tokenizer.token_bytes[id].decode(): id for id in tokenizer.special_ids}

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        by_length = sorted(self._special_ids, key=len, reverse=True)
        return re.compile("(" + ("|".join(map(re.escape, by_length)) or "(?!)") + ")")

    def _compile_text(self, text: str) -> Grammar:
        return Grammar(self._tokenizer, text)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        """Made with the first grammar: a second's work where the vocabulary is large."""
        return LLTokenizer(TokenizerWrapper(_Tokens(self._chat_tokenizer)), slices=LLTokenizer.json_slices())


def json_rule(schema: Mapping[str, Any]) -> str:
    """What follows a schema, as `Grammars.json_schema` says, as a part of a Lark grammar. Raises GrammarError for one
    that cannot be enforced, and `Grammars.lark` for others."""
    _check_numbers(schema)
    _check_counts(schema)
    return "%json " + _as_json(_without_options(schema) | {_OWN_OPTIONS: {"whitespace_pattern": _WHITESPACE}})


def _on_large_stack(work: Callable[[], LLMatcher]) -> LLMatcher:
    done: list[LLMatcher] = []
    with _stack_size_changes:  # of this process; a thread that is started beside it only reserves more
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread = threading.Thread(target=lambda: done.append(work()), name="grammar")
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    return done[0]


def _as_json(schema: Mapping[str, Any]) -> str:
    try:
        return json.dumps(schema)
    except RecursionError:
        raise GrammarError("nested too deeply") from None


def _without_options(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key != _OWN_OPTIONS}


class _Tokens:
    """A tokenizer in the form that llguidance reads."""

    bos_token_id = None

    def __init__(self, tokenizer: ChatTokenizer):
        self.eos_token_id = tokenizer.stop_id
        self.tokens = list(tokenizer.token_bytes)
        self.special_token_ids = sorted(tokenizer.special_ids)
        self._encode = tokenizer.encode_continuation
        self._id_of_byte = {token[0]: id for id, token in enumerate(self.tokens) if len(token) == 1}

    def __call__(self, text: str) -> list[int]:
        """The usual tokens of a text, which are those that the model knows, where a grammar leaves one text only."""
        ids, wanted = self._encode(text), text.encode()
        if b"".join(self.tokens[id] for id in ids) == wanted:
            return ids
        return [self._id_of_byte[byte] for byte in wanted]  # some tokenizers normalise what they encode


def _quoted(text: str) -> str:
    """A text as a literal of Lark."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _one_line(message: str) -> str:
    """What llguidance says, without what it says to its authors."""
    if message.startswith("panic:"):
        return "is too large"
    if any(words in message for words in _OUT_OF_FUEL):
        return "takes too much computation to follow; use smaller counts"
    return " ".join(message.replace("<non-verbose/>", "").split())[:_MESSAGE_CHARACTERS]


def _check_counts(schema: Mapping[str, Any]) -> None:
    if any(_counts_keys(each) for each in _subschemas(schema)):
        raise GrammarError('Unimplemented keys: ["minProperties"] above the number of required properties')


def _counts_keys(schema: Mapping[str, Any]) -> bool:
    """Whether an object with a key that came twice could have too few, which llguidance does not see."""
    least, required = schema.get("minProperties"), schema.get("required")
    named = len(required) if isinstance(required, list) else 0
    return isinstance(least, int | float) and least > max(1, named)


def _check_numbers(schema: Mapping[str, Any]) -> None:
    for each in _subschemas(schema):
        for key in _NUMBERS:
            if key in each and any(abs(number) > _LARGEST_EXACT for number in _numbers(each[key])):
                raise GrammarError(f'Unimplemented: a number beyond {_LARGEST_EXACT} in "{key}"')


def _numbers(value: Any) -> Iterator[int | float]:
    """All of a JSON value."""
    waiting = [value]  # and no recursion: a schema may be nested deeply
    while waiting:
        each = waiting.pop()
        if isinstance(each, int | float):
            yield each
        elif isinstance(each, Mapping | list):
            waiting += each.values() if isinstance(each, Mapping) else each


def _subschemas(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A schema and those within it, in any order."""
    waiting = [schema]
    while waiting:
        schema = waiting.pop()
        yield schema
        for key, value in schema.items():
            if key in _NO_SCHEMAS:
                continue
            inside = value.values() if key in _SCHEMAS_BY_NAME and isinstance(value, Mapping) else value
            several = [inside] if isinstance(inside, Mapping) else inside if isinstance(inside, Iterable) else ()
            waiting += [each for each in several if isinstance(each, Mapping)]
