"""The task: how answers are judged, and example data.

Your own data are files in data/, made the version with `dvc add data`: chat.jsonl with one {"messages": […]} a line,
and cases.jsonl with questions that must be answered word for word. From then on nothing is generated, and everything
about example data below may go; `domain: chat` in the recipe is enough then.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from twinloop.domains.chat import Chat


class Params(BaseModel):
    """The section `generate` of params.yaml."""

    model_config = ConfigDict(extra="forbid")

    seed: int = 1
    training: int = Field(4000, ge=1)
    held_out: int = Field(200, ge=1)


class Assistant(Chat):
    """Answers to the visitors of a museum.

    To judge answers in another way than word for word, define `verify` here. The first paragraph is what the server and
    the reports say that the model is for.
    """

    params = Params
    example: Mapping[str, Any] = {"messages": [{"role": "user", "content": "hello, what does a ticket cost?"}]}

    def generate(self, params: Params, out: Path) -> Mapping[str, int]:
        """Write chat.jsonl and cases.jsonl: questions without repetition, so that no held-out one is known."""
        random_ = random.Random(params.seed)
        conversations: dict[str, list[dict[str, str]]] = {}
        while len(conversations) < params.training + params.held_out:
            messages = write_conversation(random_)
            conversations[json.dumps(messages[:-1])] = messages
        every = list(conversations.values())
        chat = [{"messages": messages} for messages in every[: params.training]]
        cases = [
            {
                "case_id": f"held-out-{number}",
                "kind": "held_out",
                "prompt": prompt,
                "expected": {"answer": answer["content"]},
            }
            for number, (*prompt, answer) in enumerate(every[params.training :])
        ]
        files: dict[str, list[dict[str, Any]]] = {"chat": chat, "cases": cases}
        for name, rows in files.items():
            lines = (json.dumps(row) + "\n" for row in rows)
            (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        return {name: len(rows) for name, rows in files.items()}


domain = Assistant()


# --- example data: replace it by your own

FACTS = [
    (["when are you open", "what are the opening hours", "until when can we come"], "we are open from 10 to 18."),
    (["are you open on mondays", "can we come on a monday"], "no, we are closed on mondays."),
    (["what does a ticket cost", "how much is the entrance", "what is the price"], "a ticket costs 12 euros."),
    (["what do children pay", "how much is it for my daughter"], "children pay 5 euros."),
    (["is there a family ticket", "do families get a discount"], "yes, a family ticket costs 25 euros."),
    (["where can i park", "do you have a car park"], "you can park behind the museum."),
    (["which bus goes to you", "how do i get there by bus"], "take bus 7 to the old bridge."),
    (["may i bring my dog", "are dogs allowed"], "sorry, only guide dogs may come in."),
    (["may i take photos", "are pictures allowed"], "yes, but without a flash."),
    (["is there a cafe", "where can we eat"], "there is a cafe on the first floor."),
    (["do you have a tour", "when does the guided tour start"], "the tour starts at 14."),
    (["can i come with a wheelchair", "is there a lift"], "yes, a lift goes to every floor."),
]
OPENINGS = ["", "hello, ", "hi, ", "good morning, ", "excuse me, ", "we plan a visit, ", "one question: "]
ENDINGS = ["?", " please?", "? thanks", ", please?", "? thank you"]
FOLLOWING = ["", "and ", "ok, and ", "thanks, and ", "good. "]


def write_conversation(random_: random.Random) -> list[dict[str, str]]:
    """One to three questions, each with its answer."""
    messages = []
    for turn, (phrasings, answer) in enumerate(random_.sample(FACTS, random_.choice([1, 2, 3]))):
        opening = random_.choice(FOLLOWING if turn else OPENINGS)
        question = f"{opening}{random_.choice(phrasings)}{random_.choice(ENDINGS)}"
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages
