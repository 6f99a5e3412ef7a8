"""The console in a real Chromium, over servers of domains that have what it shows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from served import MODEL, ScriptedScheduler, make_app, running

from twinloop.domains.domain import Domain, Predicate, Verdict
from twinloop.domains.owners import FORMAT, TRAINING
from twinloop.serving.versions_api import (
    Gate,
    GateReason,
    Move,
    Moved,
    MoveRefusedError,
    Origin,
    RuleResult,
    VersionDetail,
    VersionSummary,
)

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class Channel(StrEnum):
    EMAIL = "email"
    PHONE = "phone"


class Sender(BaseModel):
    tier: Literal["free", "paid"]
    since_year: int = Field(ge=2000, le=2100)


class Ticket(BaseModel):
    model_config = ConfigDict(extra="forbid")

    subject: str = Field(max_length=60, description="one line")
    text: str
    sender: Sender
    urgent: bool = False
    score: float | None = None
    channel: Channel | None = None
    tags: list[str] = []


class Tickets(Domain):
    """A label for a ticket; its request has every kind of field."""

    name = "tickets"
    request = Ticket
    predicates: ClassVar = {"parsed": Predicate("one label", FORMAT), "polite": Predicate("a polite label", TRAINING)}
    example: ClassVar = {
        "subject": "no login",
        "text": "i cannot log in </script><b>today</b>",
        "sender": {"tier": "paid", "since_year": 2019},
        "channel": "phone",
        "tags": ["a"],
    }

    def build_prompt(self, request: Any, passages: Any) -> list[dict[str, str]]:
        return [{"role": "user", "content": request.text}]

    def check(self, output: str, request: Any, passages: Any) -> Verdict:
        parsed = output.startswith("<")
        if not parsed:
            return Verdict.unparsed({"parsed": False, "polite": False}, "does not begin with <")
        return Verdict.of({"parsed": True, "polite": True}, output=output)


class Untold(Tickets):
    """Without an example."""

    example: ClassVar = {}


class Chat(Domain):
    name = "chat"
    chat = True


class Registered:
    """A registry in memory: version 3, which serves, the candidate 4, and 5, which its gate blocks."""

    def __init__(self) -> None:
        self.champions = [1, 2, 3]
        self.digests = [MODEL.digest if each == int(MODEL.version) else f"{each}" * 64 for each in range(1, 6)]
        self.done: list[Move] = []
        self.refusal: str | None = None

    def versions(self) -> Sequence[VersionSummary]:
        return [self._summary(number) for number in range(1, 6)]

    def version(self, number: int) -> VersionDetail | None:
        if number > 5:
            return None
        blocked = number == 5
        rule = RuleResult(
            rule="held_out_pass_rate", outcome="block" if blocked else "pass", measured=0.9 if blocked else 0.97,
            bound="at least", limit=0.95, detail="<i>983</i> of 1000",
        )  # fmt: skip
        why = GateReason(rule="held_out_pass_rate", reason="held-out quality below its limit", owner="SFT data")
        gate = Gate(
            decision="BLOCK" if blocked else "SHIP", when=NOW, digest="e" * 64, rules=[rule], reasons=[why] * blocked
        )
        origins = [Origin(kind="dataset", name="data.dvc", digest="f" * 64)]
        return VersionDetail(**dict(self._summary(number)), gate_report=None if number == 1 else gate, origins=origins)

    def moves(self) -> Sequence[Move]:
        return self.done

    def promote(self, number: int, by: str) -> Moved:
        if self.refusal:
            raise MoveRefusedError(self.refusal)
        self.champions.append(number)
        return self._moved("promote", self.champions[-2], by, None)

    def roll_back(self, by: str) -> Moved:
        if len(self.champions) < 3:  # the next way back must be there too
            raise MoveRefusedError("there was no champion before this one")
        left = self.champions.pop()
        return self._moved("rollback", left, by, "it answers <b>7</b>")

    def _moved(self, action: Literal["promote", "rollback"], left: int, by: str, answer: str | None) -> Moved:
        fields: dict[str, Any] = {"action": action, "from_version": left, "to_version": self.champions[-1]}
        fields |= {"who": f"ada@box {by}", "when": NOW, "gate_digest": None}
        self.done.append(Move(**fields))
        return Moved(**fields, smoke_test=answer, finished_later=False)

    def _summary(self, number: int) -> VersionSummary:
        named = {4: "candidate", self.champions[-2]: "previous", self.champions[-1]: "champion"}
        aliases = [named[number]] if number in named else []
        servable = number > 1
        gate = ("BLOCK" if number == 5 else "SHIP") if servable else None
        fields = {"version": number, "stage": "export" if servable else "sft", "digest": self.digests[number - 1]}
        return VersionSummary.model_validate(fields | {"servable": servable, "aliases": aliases, "gate": gate})


@contextmanager
def console(
    browser: Any, folder: Path, tokenizer: Any, domain: Domain, script: str, *, width: int = 1300, **settings: Any
) -> Iterator[tuple[Any, list[Any]]]:
    """The page of a server of this domain, and the bodies that it sends. What its script raises, or what its policy
    refuses, fails the test."""
    scheduler = ScriptedScheduler(tokenizer, script, delay_s=settings.pop("delay_s", 0.0))
    with running(make_app(folder, scheduler, tokenizer, domain=domain, **settings)) as client:
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(15_000)
        sent: list[Any] = []
        raised: list[str] = []
        page.on("request", lambda request: sent.append(json.loads(request.post_data)) if request.post_data else None)
        page.on("pageerror", lambda error: raised.append(str(error)))
        page.on("console", lambda said: raised.append(said.text) if "Content Security Policy" in said.text else None)
        page.goto(str(client.base_url))
        yield page, sent
        page.close()
        assert raised == []
