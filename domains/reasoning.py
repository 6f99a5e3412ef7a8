"""Questions with a worked answer that ends in one value: sums, unit conversions, word problems.

The last line of an answer is `answer: 42`. Only this value is judged: how it was reached is the model's affair, which
is what RL needs to find ways of its own. `domain: reasoning` is ready to use; subclass `Reasoning` for another final
line or another way of comparing values.

The data are rows {"question", "steps", "answer"}: `reasoning` for training, `reasoning_heldout` for cases. For a
`generate` of your own, `gym_problems` gives the problems of any task of reasoning-gym.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from twinloop.common.errors import UserError, one_line
from twinloop.domains.domain import (
    Derived,
    Document,
    Domain,
    Judged,
    Message,
    Metric,
    Predicate,
    Statistic,
    Text,
    Verdict,
    explained,
)
from twinloop.domains.metrics import pass_at
from twinloop.domains.owners import FORMAT, TRAINING

if TYPE_CHECKING:
    from twinloop.domains.record_types import RecordType

MAX_QUESTION_CHARACTERS = 4000
MAX_GYM_DRAWS = 10
"""Problems that are drawn for one that is wanted, where a task repeats itself."""
GYM_SEEDS = 10**8
"""How far seeds lie apart: its problem i of seed s is its problem i - 1 of seed s + 1."""
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


class Question(BaseModel):
    """The body of a request for a worked answer."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    question: Text = Field(min_length=1, max_length=MAX_QUESTION_CHARACTERS, description="untrusted input")


class Solution(BaseModel):
    """What is trusted about a question: its right value. The question itself is what the audit makes exploits from."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    question: str = Field(description="as in the prompt", examples=["2 + 3 = ?"])
    answer: str = Field(description="the right value", examples=["5"])


def thinking(kind: str | None = None) -> Metric:
    """Mean words that an answer says before its last line, of cases of one kind or of all."""

    def terms(case: Judged) -> Mapping[Any, float] | None:
        if kind not in (None, case.kind):
            return None
        return {"words": len(case.greedy.rpartition("\n")[0].split()), "cases": 1}

    title = "words of thinking" if kind is None else f"words of thinking, {kind}"
    return Metric(title, "at most", of=Statistic(terms, lambda sums: sums["words"] / sums["cases"]))


class Reasoning(Domain):
    """Worked answers whose last line holds the value."""

    name = "reasoning"
    facts = Solution
    predicates: Mapping[str, Predicate] = {
        "parsed": Predicate("one final value", FORMAT, meaning="the answer ends with one value in the wanted form"),
        "value": Predicate("right value", TRAINING, meaning="it is the expected value"),
    }
    metrics: Mapping[str, Metric] = {**{f"pass_at_{k}": pass_at(k) for k in (1, 4)}, "thinking": thinking()}
    request = Question
    max_answer_tokens = 256

    final = "answer:"
    """What the last line of an answer begins with."""
    example: Mapping[str, Any] = {"question": "2 + 3 = ?"}

    # --- data

    def record_types(self) -> Mapping[str, RecordType]:
        import polars as pl

        from twinloop.domains.record_types import RecordType, text_rules

        own = RecordType(
            "reasoning",
            {"question": pl.String(), "steps": pl.String(), "answer": pl.String()},
            text_rules("question") | text_rules("answer"),
            optional=frozenset({"steps"}),
            identity=("question",),
            examine=self._examine,
            split=None,  # the leakage check looks at what is made from it
            about="Questions with their right value, and how it is reached.",
            meanings={
                "question": "as it will be sent to the server",
                "steps": f"what an answer says before `{self.final} VALUE`",
                "answer": "the right value",
            },
            example={"question": "2 + 3 + 4 = ?", "steps": "2 + 3 = 5\n5 + 4 = 9", "answer": "9"},
        )
        held_out = replace(
            own,
            name="reasoning_heldout",
            columns={**own.columns, "kind": pl.String()},
            optional=own.optional | {"kind"},
            about="As reasoning, held out to measure on.",
            meanings={**own.meanings, "kind": "the kind of case, such as how hard it is; by default `held_out`"},
            example={**own.example, "kind": "held_out"},
        )
        return {**super().record_types(), own.name: own, held_out.name: held_out}

    def _examine(self, row: Mapping[str, Any]) -> str | None:
        """A question that the server would refuse; a demonstration that the verifier would not pay, which teaches the
        wrong thing."""
        try:
            self.request_of_row(row)
        except ValidationError as error:
            return explained(error)
        answer = self._worked(row)
        verdict = self.verify(answer, Solution(question=row["question"], answer=row["answer"]))
        return None if verdict.passed else f"steps and answer: {'; '.join(verdict.reasons.values())}"

    def derived(self) -> Mapping[str, Derived]:
        return {
            "chat": Derived("reasoning", self._demonstration),
            "prompts": Derived("reasoning", self._prompt),
            "cases": Derived("reasoning_heldout", self._case),
        }

    def _worked(self, row: Mapping[str, Any]) -> str:
        return "\n".join([*filter(None, [row.get("steps")]), f"{self.final} {row['answer']}"])

    def _demonstration(self, row: Mapping[str, Any], line: int) -> dict[str, Any]:
        prompt = self._prompt(row, line)
        answer = {"role": "assistant", "content": self._worked(row)}
        return {"messages": [*prompt["prompt"], answer], "facts": prompt["facts"]}

    def _prompt(self, row: Mapping[str, Any], line: int) -> dict[str, Any]:
        facts = {"question": row["question"], "answer": row["answer"]}
        return {"prompt": self.build_prompt(self.request_of_row(row), ()), "facts": facts}

    def request_of_row(self, row: Mapping[str, Any]) -> Any:
        """The request for a row of the data; override it where yours has other fields."""
        return self.request(question=row["question"])

    def _case(self, row: Mapping[str, Any], line: int) -> dict[str, Any]:
        case = {"case_id": f"held-out-{line}", "kind": row.get("kind") or "held_out", "pair_id": None}
        return {**case, **self._prompt(row, line)}

    def _messages(self, question: str) -> list[Message]:
        return [{"role": "user", "content": question}]

    # --- judging

    def value(self, output: str) -> str | None:
        """The final value of an answer: that of its last line, where no other line states one."""
        *before, last = output.split("\n")
        if not last.startswith(self.final) or any(self.final in line for line in before):
            return None
        value = last.removeprefix(self.final)
        # "answer: 42" and no second value, sentence or unit behind it: one space, then the value
        return value[1:] if value[:1] == " " and value.strip() == value[1:] and value.strip() else None

    def same(self, value: str, right: str) -> bool:
        """Whether a value is the right one: as numbers where both are, so that 42.0 is 42."""
        numbers = [_number(value), _number(right)]
        return value == right if None in numbers else numbers[0] == numbers[1]

    def verify(self, output: str, facts: Solution) -> Verdict:
        value = self.value(output)
        if value is None:
            return Verdict.unparsed({"parsed": False, "value": False}, f"does not end with one `{self.final} VALUE`")
        right = self.same(value, facts.answer)
        reasons = {} if right else {"value": f"the value is {facts.answer}, not {value}"}
        return Verdict.of({"parsed": True, "value": right}, output=self._output(output, value), reasons=reasons)

    def gold(self, facts: Solution) -> str:
        return f"{self.final} {facts.answer}"

    def wrong(self, gold: str, facts: Solution) -> Iterable[tuple[str, str]]:
        right, final = facts.answer, self.final
        others = [number for number in dict.fromkeys(NUMBER.findall(facts.question)) if not self.same(number, right)]
        for number in others:
            yield "a number of the question", f"{final} {number}"
        if (value := _number(right)) is not None:
            for other in (value + 1, value - 1, value * 10, -value):
                if other != value:
                    yield "another value", f"{final} {other}"
        for other in [*others[:2], "0" if not self.same("0", right) else "1"]:
            yield "several final values", f"{final} {other}\n{gold}"
            yield "several final values", f"{gold}\n{final} {other}"
            yield "several values in one line", f"{final} {right} {other}"
            yield "several values in one line", f"{final} {right} or {other}"
            yield "several values in one line", f"{final} {other}, {right}"
        tried = {
            "all numbers": [f"{final} {' '.join([*others, right])}"] if others else [],
            "value inside text": [f"the value is {right}", f"{final} it is {right}", f"so {final} {right}"],
            "text behind the value": [f"{gold} apples", f"{gold}\nI am sure.", f"{gold}."],
            "value alone": [right],
            "no value": [final, f"{final} ", f"{final} ?"],
            "value twice": [f"{gold}\n{gold}"],
            "another form": [gold.upper(), f"{final}{right}", f" {gold}", f"{gold}\n"],
            "empty": ["", "\n"],
            "question repeated": [facts.question, f"{final} {facts.question}"],
        }
        for name, outputs in tried.items():
            yield from ((name, output) for output in outputs if output != gold)

    # --- serving

    def build_prompt(self, request: Question, passages: Sequence[Document]) -> list[Message]:
        return self._messages(request.question)

    def request_of(self, prompt: Sequence[Message], facts: Any) -> tuple[Question, Sequence[Document]]:
        return Question(question=prompt[-1]["content"]), ()

    def check(self, output: str, request: Question, passages: Sequence[Document]) -> Verdict:
        """Whether it ends in one value: which one is right, the server does not know."""
        value = self.value(output)
        if value is None:
            return Verdict.unparsed({"parsed": False}, f"does not end with one `{self.final} VALUE`")
        return Verdict.of({"parsed": True}, output=self._output(output, value))

    def _output(self, output: str, value: str) -> dict[str, str]:
        return {"answer": value, "steps": output.rpartition("\n")[0]}

    def answer_schema(self) -> Mapping[str, Any]:
        text = {"type": "string"}
        return {"type": "object", "properties": {"answer": text, "steps": text}, "required": ["answer", "steps"]}


def gym_problems(task: str, seed: int, count: int, **settings: Any) -> list[Mapping[str, Any]]:
    """So many problems of a task of reasoning-gym, no question twice: {"question", "answer", "metadata"}.

    task: as its gallery names it, such as chain_sum. settings: of this task, such as max_terms=4. Raises UserError
    where it is not installed, does not know the task or a setting, or has too few different problems.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError(
            f"reasoning-gym, which makes the problems: {one_line(error)}; Twinloop's extra installs it: "
            "`.venv/bin/pip install -e '.[reasoning]'`"
        ) from None
    drawn = count * MAX_GYM_DRAWS
    try:
        problems = reasoning_gym.create_dataset(task, seed=seed * GYM_SEEDS, size=drawn, **settings)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"reasoning-gym: {task}: {one_line(error)}") from None
    found: dict[str, Mapping[str, Any]] = {}
    for index in range(drawn):
        if len(found) == count:
            break
        problem = problems[index]
        found.setdefault(problem["question"], problem)
    if len(found) < count:
        raise UserError(f"reasoning-gym: {task}: {len(found)} different problems in {drawn}; {count} are wanted")
    return list(found.values())


def _number(text: str) -> Decimal | None:
    """None for what is no plain number: 1e3, inf and 1_000 are text."""
    if not NUMBER.fullmatch(text):
        return None
    try:
        return Decimal(text)
    except InvalidOperation:
        return None


domain = Reasoning()
