"""The task: its labels, how it is asked and judged, and example data.

Change LABELS and the data, and it sorts something else. Your own data are two files in data/, made the version with
`dvc add data`: classification.jsonl and classification_heldout.jsonl, one {"text": …, "label": …} a line. From then on
nothing is generated, and everything below `domain` may go.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from twinloop.domains.classification import Classification

LABELS = ["billing", "delivery", "technical", "account"]


class Params(BaseModel):
    """The section `generate` of params.yaml."""

    model_config = ConfigDict(extra="forbid")

    seed: int = 1
    training: int = Field(1500, ge=1)
    held_out: int = Field(400, ge=1)


class Tickets(Classification):
    """E-mails to a shop, sorted by the department that answers them.

    To judge answers in another way, define `verify` here; to ask in another way, `build_prompt`. The first paragraph is
    what the server and the reports say that the model is for.
    """

    params = Params

    def generate(self, params: Params, out: Path) -> Mapping[str, int]:
        """Write both files: e-mails without repetition, so that no held-out one is known from training."""
        random_ = random.Random(params.seed)
        emails: dict[str, str] = {}
        while len(emails) < params.training + params.held_out:
            label = random_.choice(LABELS)
            emails[write_email(label, random_)] = label
        rows = [{"text": text, "label": label} for text, label in emails.items()]
        files = {
            "classification": rows[: params.training],
            "classification_heldout": rows[params.training :],
        }
        for name, some in files.items():
            lines = (json.dumps(row) + "\n" for row in some)
            (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        return {name: len(some) for name, some in files.items()}


domain = Tickets(LABELS, example="hello, i was charged twice for the lamp. please help me.")


# --- example data: replace it by your own

REQUESTS = {
    "billing": [
        "the invoice of {when} is wrong, please correct it.",
        "i was charged twice for {item}.",
        "when do i get my money back for {item}?",
        "please send me a receipt for {item}.",
        "my credit card was charged {when}, but i bought nothing.",
        "the discount is missing on the invoice for {item}.",
    ],
    "delivery": [
        "my parcel with {item} has not arrived.",
        "the courier left {item} at the wrong address {when}.",
        "the tracking page shows nothing since {when}.",
        "can you ship {item} to another address?",
        "when will {item} be delivered?",
        "the box was open when {item} came {when}.",
    ],
    "technical": [
        "{item} does not turn on any more.",
        "the app crashes when i connect {item}.",
        "{item} shows an error since the update of {when}.",
        "how do i reset {item}?",
        "{item} loses the wifi connection again and again.",
        "the screen of {item} stays black since {when}.",
    ],
    "account": [
        "i cannot log in since {when}.",
        "please delete my profile and all my data.",
        "how do i change my e-mail address?",
        "the link to reset my password has expired {when}.",
        "somebody else seems to use my login since {when}.",
        "i want to change the name on my profile.",
    ],
}
SETTLED = {
    "billing": ["the refund for {item} came {when}, thank you.", "i have paid the invoice for {item}."],
    "delivery": ["{item} was delivered {when}, thank you.", "the parcel came {when} in one piece."],
    "technical": ["{item} works well since the update.", "the app is much faster since {when}."],
    "account": ["my new password works, thank you.", "i could log in again {when}."],
}
ITEMS = ["the lamp", "the speaker", "my camera", "the router", "the coffee machine", "the headset", "the printer"]
WHEN = ["monday", "tuesday", "last week", "yesterday", "the third of may", "last month", "this morning"]
GREETINGS = ["hello,", "good morning,", "dear team,", "hi,", "to whom it may concern,"]
CLOSINGS = ["thanks", "best regards", "please help me", "many thanks, sam", "regards, robin", "greetings, kim"]


def write_email(label: str, random_: random.Random) -> str:
    """An e-mail that asks for one thing, often beside a remark about something that is settled."""
    sentences = [random_.choice(REQUESTS[label])]
    if random_.random() < 0.7:
        settled = random_.choice(SETTLED[random_.choice(LABELS)])
        sentences.insert(random_.randrange(2), settled)
    filled = [each.format(item=random_.choice(ITEMS), when=random_.choice(WHEN)) for each in sentences]
    return " ".join([random_.choice(GREETINGS), *filled, random_.choice(CLOSINGS)])
