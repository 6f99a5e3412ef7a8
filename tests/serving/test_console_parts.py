"""The console's other parts in a real browser: documents, versions, recent answers and load, by mouse and keyboard."""

from __future__ import annotations

import pytest
from chromium import needs_chromium
from consoles import Chat, Registered, Tickets, console
from served import DAMAGED, GOOD

from twinloop.domains.domain import Domain
from twinloop.domains.returns.domain import Returns

pytestmark = needs_chromium

PARTS = ["Ask", "Documents", "Versions", "Recent answers", "Live load"]


class AnyText(Returns):
    """Its documents may hold anything."""

    def check_document(self, document_id, text):
        return None


# --- documents


def test_documents_are_found_compared_and_changed(browser, tmp_path, tokenizer):
    with console(browser, tmp_path, tokenizer, AnyText(), GOOD) as (page, _):
        page.click("#tab_documents")
        page.wait_for_selector("#listed:has-text('3 of 3 documents')")
        page.fill("#wanted", "DAMAGED")
        page.wait_for_selector("#listed:has-text('1 of 3')")
        page.click("#document_list button")
        page.wait_for_selector("#document_text:has-text('30 days')")
        assert not page.is_visible("#compare")
        new = "damaged items <b>within</b> 7 days.\nAsk first."
        page.fill("#edit_text", new)
        page.click("#edit .main")
        page.wait_for_selector("#saved.good:has-text('P-7 is now at version 2')")
        assert page.inner_text("#document_text") == new  # as text, with its line break
        assert page.locator("#history li").count() == 2
        before = page.locator("#diff > :not(ins)").all_text_contents()
        after = page.locator("#diff > :not(del)").all_text_contents()
        assert ("".join(before), "".join(after)) == (DAMAGED, new)
        page.select_option("#older", "2")
        page.wait_for_selector("#compared:has-text('No difference')")


def test_what_a_domain_refuses_is_said_and_a_new_document_is_added(browser, tmp_path, tokenizer):
    with console(browser, tmp_path, tokenizer, Returns(), GOOD) as (page, _):
        page.click("#tab_documents")
        page.fill("#edit_id", "P-9")
        page.fill("#edit_text", "whenever you like")
        page.click("#edit .main")
        page.wait_for_selector("#saved.bad:has-text('within N days')")
        page.fill("#edit_text", "defective items reported within 9 days are eligible.")
        page.click("#edit .main")
        page.wait_for_selector("#saved.good:has-text('P-9 is now at version 1')")
        page.wait_for_selector("#listed:has-text('4 of 4')")


# --- the administrator


def test_without_the_token_parts_say_so_and_take_it(browser, tmp_path, tokenizer):
    settings = {"admin_token": "s3cret", "releases": Registered()}
    with console(browser, tmp_path, tokenizer, Returns(), GOOD, **settings) as (page, _):
        page.click("#tab_versions")
        page.wait_for_selector("#version_list li")
        assert not page.is_visible("#roll_back")
        page.click("#tab_answers")
        page.click("#answers .needs button")
        page.fill("#token", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#token_wrong:has-text('not the token')")
        page.fill("#token", "s3cret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#found:has-text('answers among')")
        assert page.locator(".needs:visible").count() == 0
        assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
        page.click("#administrator")
        page.wait_for_selector("#answers .needs")


def test_where_nobody_is_an_administrator_the_page_says_why(browser, tmp_path, tokenizer):
    with console(browser, tmp_path, tokenizer, Returns(), GOOD, local_admin=False) as (page, _):
        page.click("#tab_answers")
        page.wait_for_selector("#answers .needs:has-text('TWINLOOP_ADMIN_TOKEN')")
        assert not page.is_visible("#administrator")


# --- versions


def test_versions_show_their_gates_and_are_promoted_and_rolled_back_once_confirmed(browser, tmp_path, tokenizer):
    registered = Registered()
    with console(browser, tmp_path, tokenizer, Returns(), GOOD, releases=registered) as (page, _):
        page.click("#tab_versions")
        page.wait_for_selector("#in_service:has-text('Version 3 answers. It is the champion.')")
        listed = page.locator("#version_list li").all_inner_texts()
        assert [text.split("\n")[0] for text in listed] == ["Version 5", "Version 4", "Version 3", "Version 2"]
        assert "answers" in listed[2]
        assert "champion" in listed[2]
        page.check("#checkpoints")
        assert page.locator("#version_list li").count() == 5
        page.click("#version_list button:has-text('Version 5')")
        page.wait_for_selector("#version_detail:has-text('held-out quality below its limit; look at: SFT data')")
        assert "0.9, must be at least 0.95" in page.inner_text("#version_detail")
        assert "<i>983</i> of 1000" in page.inner_text("#version_detail")
        assert not page.is_visible("#promote")
        page.click("#version_list button:has-text('Version 4')")
        page.click("#promote")
        page.click("#confirm_no")
        assert registered.done == []
        registered.refusal = "version 4: its files are <b>gone</b>"
        page.click("#promote")
        page.click("#confirm_yes")
        page.wait_for_selector("#moved.bad:has-text('its files are <b>gone</b>')")
        registered.refusal = None
        page.click("#promote")
        page.click("#confirm_yes")
        page.wait_for_selector("#moved.good:has-text('Version 4 is the champion')")
        page.wait_for_selector("#in_service:has-text('Version 3 answers. The champion is version 4.')")
        registered.champions = [2, 3]
        page.wait_for_selector("#in_service:has-text('It is the champion.')")  # it is looked at until it answers
        page.wait_for_selector("#moves:has-text('Promoted to version 4 from version 3, by ada@box over HTTP from 127')")


def test_a_rollback_shows_what_the_version_answered(browser, tmp_path, tokenizer):
    registered = Registered()
    registered.champions = [3, 4]
    with console(browser, tmp_path, tokenizer, Returns(), GOOD, releases=registered) as (page, _):
        page.click("#tab_versions")
        page.click("#roll_back:has-text('Roll back to version 3')")
        registered.champions = [2, 3, 4]
        page.click("#confirm_yes")
        page.wait_for_selector("#moved.good:has-text('Version 3 is the champion')")
        assert "it answers <b>7</b>" in page.inner_text("#moved")
        page.wait_for_selector("#in_service:has-text('Version 3 answers. It is the champion.')")


@pytest.mark.parametrize(
    ("domain", "parts"), [(Tickets(), [PARTS[0], PARTS[3], PARTS[4]]), (Chat(), [PARTS[0], PARTS[4]])]
)
def test_parts_that_a_server_lacks_are_not_shown(browser, tmp_path, tokenizer, domain: Domain, parts: list[str]):
    with console(browser, tmp_path, tokenizer, domain, "<i>") as (page, _):
        assert page.locator("[role=tab]:visible").all_inner_texts() == parts


# --- recent answers


def test_recent_answers_are_filtered_and_opened(browser, tmp_path, tokenizer):
    with console(browser, tmp_path, tokenizer, Returns(), GOOD) as (page, _):
        for days, message in ((12, "first <b>bold</b>"), (45, "second")):
            page.fill("[name=days_since_delivery]", str(days))
            page.fill("[name=message]", message)
            page.click("#decide")
            page.wait_for_selector("#decide:enabled")
        page.click("#answer button:has-text('trace')")
        page.wait_for_selector("#trace_content:has-text('What the model wrote')")
        assert page.evaluate("document.activeElement.id") == "trace_title"
        assert '"message": "second"' in page.inner_text("#trace_content")
        page.wait_for_selector("#found:has-text('2 answers among all 2')")
        page.select_option("#outcome", "false")
        page.wait_for_selector("#found:has-text('1 answer among')")
        assert "first <b>bold</b>" in page.inner_text("#answer_list")
        page.select_option("#outcome", "")
        page.select_option("#failed", "days")
        page.wait_for_selector("#answer_list:has-text('none, failed: eligible, days')")
        page.fill("#text", "FIRST")
        page.keyboard.press("Enter")
        page.wait_for_selector("#found:has-text('0 answers')")


# --- load


@pytest.mark.slow
def test_the_load_is_read_only_while_it_is_shown(browser, tmp_path, tokenizer):
    with console(browser, tmp_path, tokenizer, Tickets(), "<i>") as (page, _):
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url) if request.url.endswith("/v1/load") else None)
        page.click("#decide")
        page.wait_for_timeout(2500)
        assert asked == []
        page.click("#tab_load")
        page.wait_for_selector(".chart .line", state="attached")
        assert page.locator(".chart").count() == 4
        assert "1 since the start, 0 refused" in page.inner_text(".chart >> nth=0")
        label = page.get_attribute(".chart svg >> nth=0", "aria-label")
        assert label.startswith("Requests, a second: now 0")
        page.click("#tab_ask")
        seen = len(asked)
        page.wait_for_timeout(2500)
        assert len(asked) == seen


# --- keyboard and screen


def test_tabs_are_reached_by_arrow_keys_and_by_their_address(browser, tmp_path, tokenizer):
    with console(browser, tmp_path, tokenizer, Returns(), GOOD, releases=Registered()) as (page, _):
        page.focus("#tab_ask")
        for name in (*PARTS[1:], PARTS[0]):
            page.keyboard.press("ArrowRight")
            assert page.inner_text("[role=tab][aria-selected=true]") == name
            assert page.evaluate("document.activeElement.textContent") == name
            assert page.locator("[role=tabpanel]:visible").count() == 1
        page.keyboard.press("End")
        assert page.url.endswith("#load")
        page.keyboard.press("Home")
        page.goto(page.url.replace("#ask", "#versions"))
        page.wait_for_selector("#versions:visible")


def test_a_version_is_promoted_by_keyboard_alone(browser, tmp_path, tokenizer):
    registered = Registered()
    with console(browser, tmp_path, tokenizer, Returns(), GOOD, releases=registered) as (page, _):
        page.focus("#tab_versions")
        page.keyboard.press("Enter")
        page.focus("#version_list button:has-text('Version 4')")
        page.keyboard.press("Enter")
        page.wait_for_selector("#promote")
        assert page.evaluate("document.activeElement.id") == "version_title"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "promote"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "confirm_no"  # a hasty Enter promotes nothing
        page.keyboard.press("Escape")
        assert registered.done == []
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_selector("#moved.good")
        registered.champions = [2, 3]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_part_fits_a_narrow_screen_with_labels_and_contrast(browser, tmp_path, tokenizer, scheme):
    with console(browser, tmp_path, tokenizer, Returns(), GOOD, width=400, releases=Registered()) as (page, _):
        page.emulate_media(color_scheme=scheme)
        page.click("#decide")
        page.wait_for_selector("#decision")
        for part in ("ask", "documents", "versions", "answers", "load"):
            page.click(f"#tab_{part}")
            if part in ("documents", "versions", "answers"):
                page.click(f"#{part} .list button")
                page.wait_for_selector(
                    {"documents": "#history li", "versions": "#version_detail dl"}.get(part, "#trace dl")
                )
            assert page.evaluate("document.documentElement.scrollWidth") <= 400, part
            assert page.evaluate(UNREADABLE) == [], part
            assert page.evaluate(UNNAMED) == [], part


UNREADABLE = """() => {
  const light = color => {
    const [r, g, b] = color.match(/[0-9.]+/g).slice(0, 3).map(Number).map(c => c / 255)
      .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const opaque = color => !color.startsWith('rgba') || color.endsWith(', 1)');
  const behind = node => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor;
      if (opaque(color) && color !== 'rgba(0, 0, 0, 0)') return color;
    }
  };
  const found = [];
  for (const node of document.querySelectorAll('body *')) {
    const own = [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
    if (!own || !node.checkVisibility() || node.disabled) continue;
    const style = getComputedStyle(node), [a, b] = [light(style.color), light(behind(node))].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize);
    if ((a + 0.05) / (b + 0.05) < 4.5 || size < 12) found.push([node.textContent.slice(0, 40), style.color, size]);
  }
  return found;
}"""
"""The texts of the page that are smaller than 12 pixels or have less contrast than WCAG's AA asks."""

UNNAMED = """() => [...document.querySelectorAll('input, select, textarea, button, [role=img]')]
  .filter(node => node.checkVisibility())
  .filter(node => !(node.labels?.length || node.textContent.trim() || node.getAttribute('aria-label')))
  .map(node => node.outerHTML)"""
"""The controls without a name."""
