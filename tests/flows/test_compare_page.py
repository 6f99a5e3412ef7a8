"""Judging in a real browser: two answers, blind, every click on disk at once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SERVER = """
import sys
from pathlib import Path

from twinloop.domains.chat import domain
from twinloop.evaluation.cases import read_cases
from twinloop.evaluation.comparison import Comparison, Contestant, Judging
from twinloop.evaluation.judgements import Judgements
from twinloop.flows.compare_page import judge_on_page

case = {"kind": "reference", "expected": {"answer": None}}
rows = [{"case_id": f"{n}", "prompt": [{"role": "user", "content": f"question <b>{n}</b>"}], **case} for n in range(5)]
cases = read_cases(rows, domain)
models = [Contestant(name, name, {f"{n}": f"<i>{said} {n}</i>" for n in range(5)}) for name, said in
          (("secret-one", "yes"), ("secret-two", "no"))]
with Judgements.opened(Path(sys.argv[1]), "ada") as kept:
    judging = Judging(Comparison(cases, models), kept)
    judge_on_page(judging, 0)
    print(judging.left)
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(tmp_path / "kept.jsonl")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    address = process.stdout.readline().split()[4]
    yield process, address
    process.kill()
    process.wait()


def chosen(path: Path) -> list[Any]:
    return [json.loads(line)["chosen"] for line in path.read_text().splitlines()]


def progress(page: Page, text: str) -> None:
    page.get_by_role("status").get_by_text(text).wait_for()


def test_answers_are_judged_blind_by_clicks_and_keys_and_each_is_kept_at_once(
    server: tuple[subprocess.Popen[str], str], browser: Browser, tmp_path: Path
) -> None:
    process, address = server
    page = browser.new_page(viewport={"width": 400, "height": 800})
    page.set_default_timeout(15_000)
    raised: list[str] = []
    page.on("pageerror", lambda error: raised.append(str(error)))
    page.on("console", lambda said: raised.append(said.text) if "Content Security Policy" in said.text else None)
    page.goto(address)
    progress(page, "0 judged now, 5 left")
    answers = [page.inner_text("#left"), page.inner_text("#right")]
    assert sorted(answer[3:5] for answer in answers) == ["no", "ye"]
    assert page.locator("i, b").count() == 0, "what a model says is text"
    assert "secret" not in page.content()
    assert page.evaluate("document.documentElement.scrollWidth") <= 400

    page.get_by_role("button", name="This one (1)").click()
    progress(page, "1 judged now, 4 left")
    assert len(chosen(tmp_path / "kept.jsonl")) == 1
    asked = page.inner_text("#prompt")
    page.keyboard.press("t")
    progress(page, "2 judged now, 3 left")
    assert chosen(tmp_path / "kept.jsonl")[1:] == ["tie"]
    page.keyboard.press("u")
    progress(page, "1 judged now, 4 left")
    assert page.inner_text("#prompt") == asked
    assert chosen(tmp_path / "kept.jsonl")[1:] == ["tie", None]
    page.get_by_role("button", name="Later (s)").click()
    page.wait_for_function("asked => document.querySelector('#prompt').innerText !== asked", arg=asked)
    for judged in range(2, 6):
        page.keyboard.press("2")
        progress(page, f"{judged} judged now, {5 - judged} left")
    assert page.get_by_text("Every pair of answers is judged").is_visible()
    page.get_by_role("button", name="Finish").click()
    page.get_by_text("the ratings are in the terminal").last.wait_for()
    assert process.communicate(timeout=30)[0] == "0\n"
    assert process.returncode == 0
    assert raised == []
    page.close()


def test_nobody_else_reads_or_judges(server: tuple[subprocess.Popen[str], str], tmp_path: Path) -> None:
    _, address = server
    asked = httpx.get(f"{address}next").json()["question"]["id"]
    said = {"question": asked, "said": "left"}
    assert httpx.get(f"{address.rsplit('/', 2)[0]}/guess/next").status_code == 404
    assert httpx.get(f"{address}next", headers={"host": "evil.example"}).status_code == 403
    assert httpx.post(f"{address}say", json=said, headers={"origin": "https://evil.example"}).status_code == 403
    assert httpx.post(f"{address}say", json=said | {"said": "both"}).status_code == 422
    assert chosen(tmp_path / "kept.jsonl") == []
    for _ in range(2):  # a click that comes twice
        assert httpx.post(f"{address}say", json=said).json()["judged"] == 1
    assert len(chosen(tmp_path / "kept.jsonl")) == 1
