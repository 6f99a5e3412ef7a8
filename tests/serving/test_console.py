"""The console page in a real browser: its form is the domain's request, and what comes back is shown as text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field
from served import DAMAGED, GOOD, ScriptedScheduler, make_app, running, small_tokenizer

from twinloop.domains.domain import Domain, Verdict
from twinloop.domains.returns.domain import domain as returns

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no {CHROMIUM}: Debian's package `chromium`")


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
        return Verdict.of({"parsed": output.startswith("<")}, output=output)


class Chat(Domain):
    name = "chat"
    chat = True


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return small_tokenizer()


@contextmanager
def console(browser: Any, folder: Path, tokenizer: Any, domain: Domain, script: str) -> Iterator[tuple[Any, list[Any]]]:
    """The page of a server of this domain, and the bodies that it sends. What its script raises fails the test."""
    with running(make_app(folder, ScriptedScheduler(tokenizer, script), tokenizer, domain=domain)) as client:
        page = browser.new_page()
        sent: list[Any] = []
        raised: list[str] = []
        page.on("request", lambda request: sent.append(json.loads(request.post_data)) if request.post_data else None)
        page.on("pageerror", lambda error: raised.append(str(error)))
        page.goto(str(client.base_url))
        yield page, sent
        page.close()
        assert raised == []


def test_the_form_of_returns_is_made_from_its_request_and_shows_the_decision(browser, tmp_path, tokenizer):
    with console(browser, tmp_path, tokenizer, returns, GOOD) as (page, sent):
        page.click("#ask")
        page.wait_for_selector("#decision")
        assert sent == [returns.example]
        rows = dict(row.split("\t") for row in page.inner_text("#decision").splitlines())
        assert (rows["eligible"], rows["policy_id"], rows["days"]) == ("true", "P-7", "12")
        assert page.inner_text("mark") == DAMAGED
        assert "P-12" in page.inner_text("#documents")
        page.uncheck("[name=damage_confirmed]")
        page.fill("[name=days_since_delivery]", "45")
        page.click("#ask")
        page.wait_for_selector(".verdict.wait")
        assert "does not follow from the policy" in page.inner_text("#answer")
        assert sent[-1]["order"]["damage_confirmed"] is False
        assert sent[-1]["order"]["days_since_delivery"] == 45


def test_a_document_is_put_from_the_page(browser, tmp_path, tokenizer):
    with console(browser, tmp_path, tokenizer, returns, GOOD) as (page, _):
        page.fill("#document_text", "damaged items reported within 7 days are eligible.")
        page.click("#document button")
        page.wait_for_selector("#saved:has-text('P-7 is now at version 2')")
        page.fill("#document_text", "whenever you like")
        page.click("#document button")
        page.wait_for_selector("#saved:has-text('within N days')")


def test_every_kind_of_field_is_sent_as_its_type_and_answers_are_text(browser, tmp_path, tokenizer):
    with console(browser, tmp_path, tokenizer, Tickets(), "<i>account</i>") as (page, sent):
        page.click("#ask")
        page.wait_for_selector(".verdict.good")
        assert sent == [Tickets.example | {"urgent": False}]
        assert page.inner_text(".verdict") == "<i>account</i>"
        assert page.locator("[name=tier] option").all_inner_texts() == ["free", "paid"]
        assert page.locator("[name=text]").evaluate("node => node.tagName") == "TEXTAREA"
        assert not page.is_visible("#documents")
        page.fill("[name=score]", "0.5")
        page.select_option("[name=channel]", "")
        page.check("[name=urgent]")
        page.click("#ask")
        page.wait_for_selector("#ask:enabled")
        assert (sent[-1]["score"], sent[-1]["urgent"], "channel" in sent[-1]) == (0.5, True, False)


def test_a_domain_that_chats_has_a_field_for_it_and_no_form(browser, tmp_path, tokenizer):
    with console(browser, tmp_path, tokenizer, Chat(), "<b>hello</b>") as (page, sent):
        page.fill("#said", "hi")
        page.click("#say")
        page.wait_for_selector("#reply:has-text('<b>hello</b>')")
        assert sent[0]["messages"] == [{"role": "user", "content": "hi"}]
        assert not page.is_visible("#case")


def test_the_page_needs_nothing_from_elsewhere(tmp_path, tokenizer):
    with running(make_app(tmp_path, ScriptedScheduler(tokenizer), tokenizer, domain=Tickets())) as client:
        page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert page.text.count("</script>") == 2  # the example's own ends nothing
    assert "default-src 'none'" in page.headers["content-security-policy"]
