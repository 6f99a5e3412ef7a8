"""Asking from the console, in a real browser: its form is the domain's request, and answers are shown as text."""

from __future__ import annotations

from chromium import needs_chromium
from consoles import Chat, Tickets, Untold, console
from served import DAMAGED, GOOD, ScriptedScheduler, make_app, running

from twinloop.domains.returns.domain import domain as returns

pytestmark = needs_chromium


def rows(page, selector: str) -> dict[str, str]:
    """A list of names and what they are."""
    names, values = (page.locator(f"{selector} {tag}").all_inner_texts() for tag in ("dt", "dd"))
    return dict(zip(names, values, strict=True))


def test_the_form_of_returns_is_made_from_its_request_and_shows_decision_evidence_and_checks(
    browser, tmp_path, tokenizer
):
    with console(browser, tmp_path, tokenizer, returns, GOOD) as (page, sent):
        names = ("order_id", "message")
        tags = {name: page.locator(f"[name={name}]").evaluate("node => node.tagName") for name in names}
        assert tags == {"order_id": "INPUT", "message": "TEXTAREA"}  # by what their patterns allow
        page.click("#decide")
        page.wait_for_selector("#decision")
        assert sent == [returns.example]
        decision = rows(page, "#decision")
        assert (decision["eligible"], decision["policy_id"], decision["days"]) == ("true", "P-7", "12")
        assert page.inner_text("mark") == DAMAGED
        assert page.inner_text("#passages .badge") == "cited"
        assert page.locator("[aria-label=Checks] li").count() == len(returns.predicates)
        assert page.locator("[aria-label=Checks] .bad").count() == 0
        page.uncheck("[name=damage_confirmed]")
        page.fill("[name=days_since_delivery]", "45")
        page.click("#decide")
        page.wait_for_selector(".verdict.wait")
        failed = page.locator("[aria-label=Checks] li:has(.bad)").all_inner_texts()
        assert any("eligible failed" in text and "does not follow from the policy" in text for text in failed)
        assert any("days failed" in text for text in failed)
        assert "policy passed" in page.inner_text("[aria-label=Checks]")
        assert sent[-1]["order"]["damage_confirmed"] is False
        assert sent[-1]["order"]["days_since_delivery"] == 45
        page.click("#example")
        assert page.input_value("[name=days_since_delivery]") == "12"


def test_every_kind_of_field_is_sent_as_its_type_and_answers_are_text(browser, tmp_path, tokenizer):
    script = "<i>account</i>\n<img src=x>\nline 3"
    with console(browser, tmp_path, tokenizer, Tickets(), script) as (page, sent):
        page.click("#decide")
        page.wait_for_selector(".verdict.good")
        assert sent == [Tickets.example | {"urgent": False}]
        assert page.inner_text(".verdict") == script  # its line breaks too
        assert page.locator("#answer img").count() == 0
        assert page.locator("[name=tier] option").all_inner_texts() == ["free", "paid"]
        assert page.locator("[name=text]").evaluate("node => node.tagName") == "TEXTAREA"
        assert not page.is_visible("#tab_documents")
        assert "Retrieval" not in page.inner_text("#answer")
        page.fill("[name=score]", "0.5")
        page.select_option("[name=channel]", "")
        page.check("[name=urgent]")
        page.click("#decide")
        page.wait_for_selector("#decide:enabled")
        assert (sent[-1]["score"], sent[-1]["urgent"], "channel" in sent[-1]) == (0.5, True, False)
        page.fill("[name=tags]", "no list")
        page.click("#decide")
        page.wait_for_selector("#decided.bad:has-text('tags: not JSON')")


def test_of_an_answer_without_form_only_that_is_said(browser, tmp_path, tokenizer):
    with console(browser, tmp_path, tokenizer, Tickets(), "nonsense") as (page, _):
        page.click("#decide")
        page.wait_for_selector(".verdict.wait")
        said = page.locator("[aria-label=Checks] li").all_inner_texts()
        assert "one label failed" in said[0]
        assert "does not begin with <" in said[0]
        assert "a polite label not judged" in said[1]


def test_a_domain_without_an_example_has_an_empty_form_and_its_refusal_leaves_no_answer(browser, tmp_path, tokenizer):
    with console(browser, tmp_path, tokenizer, Untold(), "<i>") as (page, sent):
        assert page.input_value("[name=subject]") == ""
        assert not page.is_visible("#example")
        page.click("#decide")  # the browser asks for the required fields first
        assert sent == []
        for name, value in (("subject", "s"), ("text", " "), ("since_year", "2019")):
            page.fill(f"[name={name}]", value)
        page.select_option("[name=tier]", "free")
        page.fill("[name=tags]", "[1]")
        page.click("#decide")
        page.wait_for_selector("#decided.bad:has-text('tags.0')")
        assert page.inner_text("#answer") == ""


def test_a_chat_is_shown_while_it_is_written_and_can_be_stopped(browser, tmp_path, tokenizer):
    script = "<b>hello</b> " + "damaged items reported within 30 days are eligible. " * 20
    with console(browser, tmp_path, tokenizer, Chat(), script, delay_s=0.03) as (page, sent):
        assert not page.is_visible("#case")
        assert not page.is_visible("#tab_answers")
        page.fill("#said", "hi")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("#stop")
        page.wait_for_selector(".said.assistant:has-text('<b>hello</b>')")
        assert page.get_attribute("#conversation", "aria-busy") == "true"
        page.click("#stop")
        page.wait_for_selector("#chatted:has-text('Stopped')")
        written = page.inner_text(".said.assistant .text")
        assert 0 < len(written) < len(script)
        assert sent[0]["stream"] is True
        page.fill("#said", "go on")
        page.click("#say")
        page.wait_for_selector("#stop")
        assert [message["content"] for message in sent[1]["messages"]] == ["hi", written, "go on"]
        page.click("#fresh")
        page.wait_for_selector("#say:enabled")
        assert page.locator(".said").count() == 0


def test_a_chat_that_is_refused_leaves_what_was_typed(browser, tmp_path, tokenizer):
    with console(browser, tmp_path, tokenizer, Chat(), "hello") as (page, _):
        page.fill("#said", "hi " * 3000)
        page.click("#say")
        page.wait_for_selector("#chatted.bad:has-text('tokens')")
        assert page.input_value("#said").startswith("hi hi")
        assert page.locator(".said").count() == 0
        page.fill("#said", "hi")
        page.click("#say")
        page.wait_for_selector("#chatted:has-text('tokens in')")
        assert page.locator(".said").all_inner_texts() == ["You\nhi", "Model\nhello"]


def test_the_page_needs_nothing_from_elsewhere(tmp_path, tokenizer):
    with running(make_app(tmp_path, ScriptedScheduler(tokenizer), tokenizer, domain=Tickets())) as client:
        page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "https://" not in page.text
    assert page.text.count("http://") == page.text.count("http://www.w3.org/2000/svg") == 1  # a name, not an address
    assert page.text.count("</script>") == 2  # the example's own ends nothing
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
