"""The report: one page that needs nothing else, in a real browser, and the model card."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from stories import FAILURE, story

from twinloop.report.files import write_report
from twinloop.report.kept import kept_figures
from twinloop.report.pages import model_card

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SMALLEST_TEXT = "Math.min(...[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height))"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shown = story()
    project = tmp_path_factory.mktemp("project")
    html, card = write_report(project, shown, kept_figures(project, shown))
    assert (html.name, card.name) == ("returns-7.html", "returns-7.md")
    return html


class Elements(HTMLParser):
    """The names and the addresses in a page."""

    def __init__(self, text: str):
        super().__init__()
        self.names: set[str] = set()
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.loaded += [
            value or "" for name, value in attributes if name == "src" or (tag == "link" and name == "href")
        ]


def test_the_page_loads_nothing_and_runs_nothing(page: Path) -> None:
    elements = Elements(page.read_text())
    assert "script" not in elements.names, "an answer of a model is text, whatever it says"
    assert [address for address in elements.loaded if not address.startswith("data:")] == []
    assert "svg" in elements.names


def test_the_page_tells_what_is_asked_of_a_release(page: Path) -> None:
    text = re.sub(r"<[^>]+>", " ", page.read_text())
    for said in (
        "returns version 7",
        "BLOCK",
        "Return decisions.",
        "Look at SFT data: quality below its limit (held_out_pass_rate).",
        "45.0% (25.8–65.8)",
        "1.250 (1.200–1.312)",
        "sft",
        "(verified)",
        "8,000",
        "twinloop serve --model returns",
        "base.depth: 4",
        "&lt;script&gt;alert(1)&lt;/script&gt;",
        "it&#39;\\&#39;&#39;s broken",
        "d41d8cd9.dir",
        "case flip-9 fails",
        "98.50%",
        "not compared: there is &lt;no&gt; file",
    ):
        assert said in text, said


def test_the_card_is_a_table_that_no_cell_breaks() -> None:
    card = model_card(story())
    tables = [line for line in card.splitlines() if line.startswith("|")]
    widths = {line.split("|")[1]: line.replace("\\|", "").count("|") for line in tables}
    assert widths[" sft "] == widths[" stage "] == widths[" gate "]
    assert widths[" int8 "] == widths[" form "]
    assert "| int8 | 98.50% | 0.5 | 1 | 0 | 0 | 100% | digest of  |" in card
    assert "| SFT data | 1 | held-2 | eligible |" in card
    assert "Gate: **BLOCK**" in card


def test_metrics_are_shown_with_their_intervals_after_every_stage(page: Path) -> None:
    text = " ".join(re.sub(r"<[^>]+>", " ", page.read_text()).split())
    assert "metric [95% interval] sft dpo evaluate macro F1 0.25 [0.125, 0.75] 0.45 [0.125, 0.75]" in text
    assert "own &lt;metric&gt; 3 3 3" in text
    assert "never measured" not in text
    assert "| macro F1 | 0.25 [0.125, 0.75] | 0.45 [0.125, 0.75] | 0.5 [0.125, 0.75] |" in model_card(story())


def test_a_model_that_chats_is_asked_for_chat() -> None:
    asked = {"messages": [{"role": "user", "content": "hello"}]}
    chat = story().task.model_copy(update={"route": "v1/chat/completions", "example": asked})
    commands = model_card(story(task=chat)).partition("## How to serve it")[2]
    assert "http://127.0.0.1:8080/v1/chat/completions" in commands
    assert '{"model": "returns", "messages": [' in commands


def test_a_domain_without_a_verifier_has_a_report_too(tmp_path: Path) -> None:
    shown = story(stages=story().stages[:1], failures=(), outcomes={}, confidences=())
    [html, card] = write_report(tmp_path, shown, kept_figures(tmp_path, shown))
    assert "no answer was judged" in html.read_text()
    assert "no answer was judged" in card.read_text()


@pytest.mark.parametrize("width", [1300, 400])
def test_the_page_is_read_on_a_screen_and_on_a_telephone_by_day_and_by_night(
    page: Path, browser: Browser, width: int
) -> None:
    grounds = set()
    for scheme in ("light", "dark"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
        tab = context.new_page()
        asked: list[str] = []
        tab.on("request", lambda request, asked=asked: asked.append(request.url))
        tab.goto(page.as_uri())
        assert asked == [page.as_uri()]
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, "nothing is cut off at the side"
        grounds.add(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
        heights = tab.evaluate(
            "[...document.querySelectorAll('figure svg text')].map(t => t.getBoundingClientRect().height)"
        )
        assert min(heights) > 7
        tab.get_by_text(FAILURE.case_id).click()
        assert tab.get_by_text(FAILURE.output).is_visible()
        context.close()
    assert len(grounds) == 2
