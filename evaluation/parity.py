"""Does every form of a release give the same answers? The same prompts, through one form after another.

The reference is the trained network. Of every other form it is measured, on the reference's own greedy answers, how far
its logits are from the reference's and how many of the tokens it would have chosen too (teacher forcing: one token that
differs does not make all behind it incomparable); and, end to end, with its own tokenizer, template and stop token,
whether what it answers gets another verdict.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from twinloop.common.errors import UserError
from twinloop.domains.domain import Domain, Message
from twinloop.evaluation.cases import Case, verdict_of
from twinloop.evaluation.parity_report import FormParity
from twinloop.models.template_check import check_template
from twinloop.models.tokenizer import ChatTokenizer

ANSWER = "answer"
MOST_PROBLEMS = 3
"""Of one form and kind, in words: the rest is counted."""


class Form:
    """One form of a release: what answers, with the tokenizer files that belong to it."""

    def __init__(self, name: str, directory: Path, digest: str):
        """directory: holds its tokenizer and configuration. digest: of the content of its files."""
        self.name, self.digest = name, digest
        self.tokenizer = ChatTokenizer.load(directory)
        self.stop_ids = read_stop_ids(directory, self.tokenizer)

    def logits(self, tokens: Sequence[int]) -> np.ndarray | None:
        """float32 [L, V] of tokens [L], all at once. None where it does not tell them."""
        raise NotImplementedError

    def stepped_logits(self, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray | None:
        """float32 [T, V]: what each of the tokens [T] of the answer is chosen by, the prompt read and then a step a
        token. None where it keeps no cache."""
        return None

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """What is read before an answer. Raises UserError where its template refuses the messages."""
        return self.tokenizer.encode_prompt(messages)

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """Greedy answers, each with its stop token where it ended with that."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back what outlives this object."""


def read_stop_ids(directory: Path, tokenizer: ChatTokenizer) -> dict[str, frozenset[int]]:
    """The stop tokens that each file of a directory names, by the file: clients read one or the other.

    Raises UserError where a file is no JSON object.
    """
    found = {"tokenizer_config.json": frozenset((tokenizer.eos_id,))}
    for name in ("config.json", "generation_config.json"):
        path = directory / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_bytes())
            named = content.get("eos_token_id")
        except (ValueError, AttributeError):
            raise UserError(f"{path}: not a JSON object; export the model again") from None
        if named is not None:
            found[name] = frozenset(named if isinstance(named, list) else (named,))
    return found


def cases_digest(cases: Iterable[Case]) -> str:
    """Of the cases that were compared, in their order."""
    return hashlib.sha256("".join(case.digest for case in cases).encode()).hexdigest()


class Reference:
    """The trained network's answers to the cases, with which every form is compared."""

    def __init__(self, form: Form, cases: Sequence[Case], domain: Domain, max_tokens: int):
        """max_tokens: of an answer, of every form. Raises UserError where a prompt is too long to be answered."""
        self.form, self._cases, self._domain, self._max_tokens = form, cases, domain, max_tokens
        self._prompts = [form.tokenizer.encode_prompt(case.prompt) for case in cases]
        self._answers = form.generate(self._prompts, max_tokens)
        self._passed = self._verdicts([form.tokenizer.decode(answer) for answer in self._answers])

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
            stopped=_stopped(self.form, self._answers),
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
        return sum(map(len, self._answers))

    def _conversations(self) -> list[list[Message]]:
        """Each case with an answer, the same for all: what templates do with it is looked at, not what models say."""
        return [[*case.prompt, {"role": "assistant", "content": ANSWER}] for case in self._cases]

    def _forced(self, form: Form) -> tuple[float | None, float | None]:
        """(share of tokens alike, largest difference of a logit), along the reference's answers."""
        agreed, gap, known = 0, 0.0, True
        vocab_size = self.form.tokenizer.vocab_size
        for prompt, answer in zip(self._prompts, self._answers, strict=True):
            tokens = [*prompt, *answer]
            found_LV = form.logits(tokens)
            if found_LV is None:
                agreed += _same_start(form.generate([prompt], len(answer))[0], answer)
                known = False
                continue
            expected_LV = self.form.logits(tokens)
            assert expected_LV is not None, "the reference tells its logits"
            gap = max(gap, _gap(form, found_LV, expected_LV))
            scored = slice(len(prompt) - 1, len(tokens) - 1)
            stepped_TV = form.stepped_logits(prompt, answer)
            if stepped_TV is not None:
                gap = max(gap, _gap(form, stepped_TV, expected_LV[scored]))
            agreed += int((found_LV[scored, :vocab_size].argmax(axis=-1) == np.array(answer)).sum())
        return agreed / self._tokens, gap if known else None

    def _own_prompts(self, form: Form) -> tuple[list[list[int]], list[str]]:
        """Each case as the form's own tokenizer and template write it, and what of it differs, a line a case."""
        prompts, changed = [], []
        for case, prompt, messages in zip(self._cases, self._prompts, self._conversations(), strict=True):
            expected = self.form.tokenizer.encode_conversation(messages)
            try:
                own = form.prompt_ids(case.prompt)
                whole = form.tokenizer.encode_conversation(messages)
                differs = _first_difference("prompt", own, prompt) or _first_difference("answer", whole, expected)
            except UserError as error:
                own, differs = prompt, str(error)
            prompts.append(own)
            if differs:
                changed.append(f"case {case.case_id}: {differs}")
        return prompts, changed

    def _verdicts(self, texts: Sequence[str]) -> list[bool] | None:
        if not self._domain.has("verify"):
            return None
        return [verdict_of(self._domain, text, case).passed for text, case in zip(texts, self._cases, strict=True)]

    def _changed_verdicts(self, form: Form, answers: Sequence[Sequence[int]]) -> list[str] | None:
        passed = self._verdicts([form.tokenizer.decode(answer) for answer in answers])
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
        for file, ids in form.stop_ids.items():
            expected = self.form.stop_ids.get(file)
            if ids != expected if expected else trained not in ids:
                named = " and ".join(map(str, sorted(ids)))
                yield f"{file}: stop token {named}, and {trained} was trained"


def _first_of(**problems: Sequence[str]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(found[:MOST_PROBLEMS]) for name, found in problems.items() if found}


def _stopped(form: Form, answers: Sequence[Sequence[int]]) -> float:
    return sum(bool(answer) and answer[-1] in form.tokenizer.stop_ids for answer in answers) / max(1, len(answers))


def _gap(form: Form, found: np.ndarray, expected: np.ndarray) -> float:
    """Infinite where one of the logits found is no number. Raises UserError for those of another network."""
    if found.shape != expected.shape:
        shapes = " and ".join("x".join(map(str, each.shape)) for each in (found, expected))
        raise UserError(f"{form.name}: logits of {shapes}: it is not of this network")
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
