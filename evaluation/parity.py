"""Does every form of a release give the same answers? The same prompts, through one form after another.

The reference is the trained network. Of every other form it is measured, on the reference's own greedy answers, how far
its logits are from the reference's and how many of the tokens it would have chosen too (teacher forcing: one token that
differs does not make all behind it incomparable); and, end to end, with its own tokenizer, template and stop token,
whether what it answers gets another verdict.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from twinloop.common.errors import UserError
from twinloop.domains.domain import Domain, Message
from twinloop.evaluation.cases import Case, verdict_of
from twinloop.evaluation.parity_report import FormParity
from twinloop.models.label_tokenizer import load_answering
from twinloop.models.template_check import check_template
from twinloop.models.tokenizer_files import SETTINGS, stop_ids_by_file

ANSWER = "answer"
MOST_PROBLEMS = 3
"""Of one form and kind, in words: the rest is counted."""
TIE = 1e-3
"""Two tokens whose logits are closer than this in the reference are as good as each other: another order of summing up
may choose either."""

Logits: TypeAlias = Callable[[Sequence[int]], np.ndarray]
"""float32 [L, V] of tokens [L]."""


class FormError(UserError):
    """What runs a form ended, or does not answer: nothing is known of the form, so nothing of it is recorded."""


class Form:
    """One form of a release: what answers, with the tokenizer files that belong to it."""

    def __init__(self, name: str, directory: Path, digest: str):
        """directory: holds its tokenizer and configuration. digest: of the content of its files."""
        self.name, self.digest = name, digest
        self.tokenizer = load_answering(directory)
        named = {name: frozenset(ids) for name, ids in sorted(stop_ids_by_file(directory).items())}
        self.stop_ids = {SETTINGS: frozenset((self.tokenizer.eos_id,)), **named}

    def logits(self, tokens: Sequence[int]) -> np.ndarray | None:
        """float32 [L, V] of tokens [L], all at once. None where it does not tell them."""
        raise NotImplementedError

    def stepped_logits(self, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray | None:
        """float32 [T, V]: what each of the tokens [T] of the answer is chosen by, the prompt read and then a step a
        token. None where it keeps no cache."""
        return None

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """What is read before an answer. Raises UserError where its template refuses the messages, and FormError."""
        return self.tokenizer.encode_prompt(messages)

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """Greedy answers, each with its stop token where it ended with that."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back what outlives this object."""


@dataclass(frozen=True)
class Exchange:
    """A prompt and the reference's greedy answer to it."""

    prompt: list[int]
    answer: list[int]

    @property
    def text(self) -> list[int]:
        return [*self.prompt, *self.answer]

    @property
    def choices(self) -> slice:
        """Positions of the text from whose logits the answer's tokens are chosen."""
        return slice(len(self.prompt) - 1, len(self.prompt) + len(self.answer) - 1)


@dataclass(frozen=True)
class Agreement:
    """tokens: greedy ones that were compared. alike: those that are chosen too, of the tokenizer's. padding: those for
    which a row of the vocabulary that is no token has a higher logit. logit_gap: the largest difference of any logit,
    infinite where one is no number."""

    tokens: int
    alike: int
    padding: int
    logit_gap: float


def greedy_exchanges(form: Form, prompts: Sequence[Sequence[Message]], max_tokens: int) -> list[Exchange]:
    """Each prompt with the form's answer of at most so many tokens."""
    encoded = [form.tokenizer.encode_prompt(prompt) for prompt in prompts]
    answers = form.generate(encoded, max_tokens)
    return [Exchange(prompt, answer) for prompt, answer in zip(encoded, answers, strict=True)]


def compare_exchanges(
    reference: Logits, found: Logits, exchanges: Iterable[Exchange], *, vocab_size: int, name: str
) -> Agreement:
    """Compare along the reference's answers. vocab_size: of the tokenizer. Raises UserError for another network."""
    tokens, alike, padding, gap = 0, 0, 0, 0.0
    for exchange in exchanges:
        expected_LV, found_LV = reference(exchange.text), found(exchange.text)
        tokens += len(exchange.answer)
        alike += _alike(exchange, expected_LV, found_LV, vocab_size)
        padding += int((found_LV[exchange.choices].argmax(axis=-1) >= vocab_size).sum())
        gap = max(gap, _gap(name, found_LV, expected_LV))
    return Agreement(tokens, alike, padding, gap)


def cases_digest(cases: Iterable[Case]) -> str:
    """Of the cases that were compared, in their order."""
    return hashlib.sha256("".join(case.digest for case in cases).encode()).hexdigest()


class Reference:
    """The trained network's answers to the cases, with which every form is compared."""

    def __init__(self, form: Form, cases: Sequence[Case], domain: Domain, max_tokens: int):
        """max_tokens: of an answer, of every form. Raises UserError where a prompt is too long to be answered."""
        self.form, self._cases, self._domain, self._max_tokens = form, cases, domain, max_tokens
        self._exchanges = greedy_exchanges(form, [case.prompt for case in cases], max_tokens)
        self._passed = self._verdicts([exchange.answer for exchange in self._exchanges], form)

    def parity(self) -> FormParity:
        """The reference's own row: how its answers end, and whether its template lets its stop token be trained."""
        stop = list(self._stop_changes(self.form))
        report = check_template(self.form.tokenizer, self._conversations())
        stop += [f"case {self._cases[one.index].case_id}: {one.problem}" for one in report.problems]
        return FormParity(
            form=self.form.name,
            digest=self.form.digest,
            reference=True,
            tokens=1.0,
            compared=self._tokens,
            logit_gap=0.0,
            verdict_changes=0 if self._passed is not None else None,
            prompt_changes=0,
            stop_changes=len(stop),
            stopped=_stopped(self.form, [exchange.answer for exchange in self._exchanges]),
            problems=_first_of(stop_changes=stop),
        )

    def compare(self, form: Form) -> FormParity:
        """What differs in that form."""
        agreed, gap = self._forced(form)
        broken = ["some of its logits are no numbers"] if gap == math.inf else []
        prompts, changed = self._own_prompts(form)
        answers = form.generate(prompts, self._max_tokens)
        judged = self._changed_verdicts(form, answers)
        stop = list(self._stop_changes(form))
        return FormParity(
            form=form.name,
            digest=form.digest,
            tokens=agreed,
            compared=self._tokens,
            logit_gap=None if broken else gap,
            verdict_changes=None if judged is None else len(judged),
            prompt_changes=len(changed),
            stop_changes=len(stop),
            stopped=_stopped(form, answers),
            problems=_first_of(
                logit_gap=broken, verdict_changes=judged or [], prompt_changes=changed, stop_changes=stop
            ),
        )

    @property
    def _tokens(self) -> int:
        return sum(len(exchange.answer) for exchange in self._exchanges)

    def _conversations(self) -> list[list[Message]]:
        """Each case with an answer, the same for all: what templates do with it is looked at, not what models say."""
        return [[*case.prompt, {"role": "assistant", "content": ANSWER}] for case in self._cases]

    def _forced(self, form: Form) -> tuple[float | None, float | None]:
        """(share of tokens alike, largest difference of a logit), along the reference's answers."""
        alike, gap, known = 0, 0.0, True
        for exchange in self._exchanges:
            found_LV = form.logits(exchange.text)
            if found_LV is None:
                alike += _same_start(form.generate([exchange.prompt], len(exchange.answer))[0], exchange.answer)
                known = False
                continue
            expected_LV = self.form.logits(exchange.text)
            assert expected_LV is not None, "the reference tells its logits"
            gap = max(gap, _gap(form.name, found_LV, expected_LV))
            stepped_TV = form.stepped_logits(exchange.prompt, exchange.answer)
            if stepped_TV is not None:
                gap = max(gap, _gap(form.name, stepped_TV, expected_LV[exchange.choices]))
            alike += _alike(exchange, expected_LV, found_LV, self.form.tokenizer.vocab_size)
        return alike / self._tokens, gap if known else None

    def _own_prompts(self, form: Form) -> tuple[list[list[int]], list[str]]:
        """Each case as the form's own tokenizer and template write it, and what of it differs, a line a case."""
        prompts, changed = [], []
        for case, exchange, messages in zip(self._cases, self._exchanges, self._conversations(), strict=True):
            prompt = exchange.prompt
            expected = self.form.tokenizer.encode_conversation(messages)
            try:
                own = form.prompt_ids(case.prompt)
                whole = form.tokenizer.encode_conversation(messages)
                differs = _first_difference("prompt", own, prompt) or _first_difference("answer", whole, expected)
            except FormError:
                raise
            except UserError as error:
                own, differs = prompt, str(error)
            prompts.append(own)
            if differs:
                changed.append(f"case {case.case_id}: {differs}")
        return prompts, changed

    def _verdicts(self, answers: Sequence[Sequence[int]], form: Form) -> list[bool] | None:
        if not self._domain.has("verify"):
            return None
        texts = map(form.tokenizer.decode, answers)
        return [verdict_of(self._domain, text, case).passed for text, case in zip(texts, self._cases, strict=True)]

    def _changed_verdicts(self, form: Form, answers: Sequence[Sequence[int]]) -> list[str] | None:
        passed = self._verdicts(answers, form)
        if passed is None or self._passed is None:
            return None
        words = {True: "passes", False: "fails"}
        return [
            f"case {case.case_id} {words[now]}, and by the reference it {words[before]}"
            for case, now, before in zip(self._cases, passed, self._passed, strict=True)
            if now != before
        ]

    def _stop_changes(self, form: Form) -> Iterator[str]:
        """Files that do not name the stop tokens that they name for the reference."""
        trained = self.form.tokenizer.stop_id
        for file in dict.fromkeys([*self.form.stop_ids, *form.stop_ids]):
            ids, expected = form.stop_ids.get(file), self.form.stop_ids.get(file)
            if ids is None:
                yield f"{file}: no stop token, and {trained} was trained"
            elif ids != expected if expected else trained not in ids:
                named = " and ".join(map(str, sorted(ids)))
                yield f"{file}: stop token {named}, and {trained} was trained"


def _first_of(**problems: Sequence[str]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(found[:MOST_PROBLEMS]) for name, found in problems.items() if found}


def _stopped(form: Form, answers: Sequence[Sequence[int]]) -> float:
    return sum(bool(answer) and answer[-1] in form.tokenizer.stop_ids for answer in answers) / max(1, len(answers))


def _alike(exchange: Exchange, expected_LV: np.ndarray, found_LV: np.ndarray, vocab_size: int) -> int:
    """Tokens of the answer that are chosen by the logits found too, or another one as good."""
    expected_TV, found_TV = (each_LV[exchange.choices, :vocab_size] for each_LV in (expected_LV, found_LV))
    best_T = found_TV.argmax(axis=-1)
    behind_T = expected_TV.max(axis=-1) - expected_TV[np.arange(len(best_T)), best_T]
    return int((behind_T <= TIE).sum())


def _gap(name: str, found: np.ndarray, expected: np.ndarray) -> float:
    """Infinite where one of the logits found is no number. Raises UserError for those of another network."""
    if found.shape != expected.shape:
        shapes = " and ".join("x".join(map(str, each.shape)) for each in (found, expected))
        raise UserError(f"{name}: logits of {shapes}: it is not of this network")
    gap = float(np.abs(found - expected).max())
    return gap if math.isfinite(gap) else math.inf


def _same_start(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(left), len(right)))


def _first_difference(what: str, own: Sequence[int], other: Sequence[int]) -> str | None:
    if list(own) == list(other):
        return None
    at = _same_start(own, other)
    ids = [str(tokens[at]) if at < len(tokens) else "the end" for tokens in (own, other)]
    return f"{what}: token {at} is {ids[0]}, by the reference {ids[1]}"
