"""Several models on the same cases: which pairs of answers are to be judged, in what order, and what that comes to."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Literal

import numpy as np

from twinloop.domains.domain import Domain
from twinloop.evaluation.bradley_terry import Ratings, rate
from twinloop.evaluation.cases import Case, verdict_of
from twinloop.evaluation.judgements import Choice, Judgements, Subject, digest

Side = Literal["left", "right", "tie"]
ORDER_SEED = 0
"""The order of the questions: the same when judging goes on another day."""


@dataclass(frozen=True)
class Contestant:
    """A model, and its answer to each case, by its id."""

    name: str
    digest: str
    answers: Mapping[str, str]


@dataclass(frozen=True)
class Question:
    """Two answers to a case, in the order in which they are shown. They do not say whose they are."""

    case: Case
    left: str
    right: str

    @property
    def subject(self) -> Subject:
        return Subject.of(self.case.prompt, self.left, self.right)

    def choice(self, side: Side) -> Choice:
        if side == "tie":
            return "tie"
        chosen = self.left if side == "left" else self.right
        return "first" if digest(chosen) == self.subject.first else "second"


@dataclass(frozen=True)
class Tally:
    """What was judged, each [K, K]: in row i, column j how often i was preferred to j; the others symmetric."""

    preferred: np.ndarray
    ties: np.ndarray
    same: np.ndarray
    """Pairs whose answers are the same text, which nobody needs to judge: they are ties."""
    left: int
    """Judgements that are still to be made."""

    @cached_property
    def ratings(self) -> Ratings:
        return rate(self.preferred, self.ties + self.same)

    @property
    def judged(self) -> int:
        """Pairs of models and cases on which there is a judgement."""
        return round(float(self.preferred.sum() + np.triu(self.ties).sum()))

    @property
    def needed(self) -> int | None:
        """How many more judgements make the order certain at 95%; None: more than can be told."""
        return self.ratings.judgements_needed(self.preferred + self.preferred.T + self.ties)


class Comparison:
    """Cases that all contestants have answered. Case by case, every two of them are a pair."""

    def __init__(self, cases: Sequence[Case], contestants: Sequence[Contestant]):
        self.cases = cases
        self.contestants = contestants

    @cached_property
    def questions(self) -> list[Question]:
        """Each two different answers to a case, once, in an order and on sides that are drawn."""
        found: dict[Subject, Question] = {}
        for case in self.cases:
            for one, other in combinations(self.contestants, 2):
                question = Question(case, one.answers[case.case_id], other.answers[case.case_id])
                if question.left != question.right:
                    found.setdefault(question.subject, question)
        drawn = random.Random(ORDER_SEED)
        subjects = sorted(found)  # by digests, so that the order of the models on the command line changes nothing
        drawn.shuffle(subjects)
        return [self._on_sides(found[subject], drawn.random() < 0.5) for subject in subjects]

    def tally(self, judge: Callable[[Question], Choice | None]) -> Tally:
        """judge: the choice between two answers, or None where there is none yet."""
        size = len(self.contestants)
        preferred, ties, same = (np.zeros((size, size)) for _ in range(3))
        choices = {question.subject: judge(question) for question in self.questions}
        for i, j, case in self._pairs():
            one, other = (self.contestants[index].answers[case.case_id] for index in (i, j))
            if one == other:
                same[[i, j], [j, i]] += 1
                continue
            subject = Subject.of(case.prompt, one, other)
            choice = choices[subject]
            if choice == "tie":
                ties[[i, j], [j, i]] += 1
            elif choice is not None:
                first = i if digest(one) == subject.first else j
                winner = first if choice == "first" else i + j - first
                preferred[winner, i + j - winner] += 1
        return Tally(preferred, ties, same, sum(choice is None for choice in choices.values()))

    def _pairs(self) -> Iterator[tuple[int, int, Case]]:
        for case in self.cases:
            for i, j in combinations(range(len(self.contestants)), 2):
                yield i, j, case

    @staticmethod
    def _on_sides(question: Question, swapped: bool) -> Question:
        one, other = sorted((question.left, question.right), key=digest)
        return Question(question.case, *((other, one) if swapped else (one, other)))


class Judging:
    """A person's way through the questions of a comparison: what comes next, and what was said of it."""

    def __init__(self, comparison: Comparison, kept: Judgements):
        self._comparison = comparison
        self._kept = kept
        self._open = deque(each for each in comparison.questions if kept.chosen(each.subject) is None)
        self._said: list[Question] = []

    @property
    def question(self) -> Question | None:
        """None where nothing is left."""
        return self._open[0] if self._open else None

    @property
    def left(self) -> int:
        return len(self._open)

    @property
    def judged(self) -> int:
        """Questions that were judged since this began."""
        return len(self._said)

    def say(self, side: Side) -> None:
        """Judge the question that is next; on disk when this returns."""
        question = self._open[0]
        self._kept.add(question.subject, question.choice(side))
        self._said.append(self._open.popleft())

    def skip(self) -> None:
        """Ask it again after all others."""
        self._open.rotate(-1)

    def take_back(self) -> bool:
        """Ask what was judged last again; False where nothing was, since this began."""
        if not self._said:
            return False
        question = self._said.pop()
        self._kept.add(question.subject, None)
        self._open.appendleft(question)
        return True

    def tally(self) -> Tally:
        return self._comparison.tally(lambda question: self._kept.chosen(question.subject))


def by_verifier(domain: Domain) -> Callable[[Question], Choice]:
    """The answer with the higher reward is preferred; equal rewards are a tie."""

    def judge(question: Question) -> Choice:
        left, right = (verdict_of(domain, text, question.case).reward for text in (question.left, question.right))
        return question.choice("tie" if left == right else "left" if left > right else "right")

    return judge
