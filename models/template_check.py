"""Whether conversations will be trained as they will be asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from twinloop.common.errors import UserError
from twinloop.models.jinja_template import Message
from twinloop.models.tokenizer import ChatTokenizer


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
    content = messages[-1]["content"]
    answer = tokenizer.encode_answer(content)
    if whole[: len(prompt)] != prompt:
        return whole, "the prompt's tokens are not a prefix of the conversation's"
    if not content.strip() and answer == tokenizer.encode_answer(""):
        return whole, "the answer is empty: all targets are masked"
    if whole[len(prompt) : len(prompt) + len(answer)] != answer:
        return whole, "the answer and its stop token do not follow the prompt as they would be trained"
    return whole, None
