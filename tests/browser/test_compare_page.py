import re

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Visit
from tests.serving import ROOT

pytestmark = pytest.mark.browser

JOKE = "The caption says a big dog. The picture shows a car, and that is the joke."


def ask(page: Page, question: str) -> None:
    page.locator("#compare-box textarea").fill(question)
    over = page.locator(".versus .foot:not(.waiting)")
    before = over.count()
    page.locator("#compare-box textarea").press("Enter")
    expect(over).to_have_count(before + 2)
    expect(page.locator("#compare-box .submit-button")).to_be_visible()


def test_base_and_tuned_answer_side_by_side_and_a_blind_vote_is_counted(visit: Visit) -> None:
    page = visit.tab()
    page.get_by_role("tab", name="Compare").click()
    page.locator("#compare-tuned").click()
    expect(page.locator("#compare-left input")).to_have_value("memeworld-base")
    expect(page.locator("#compare-right input")).to_have_value("memeworld")
    page.get_by_label("Blind").check()
    page.get_by_label("number input for Variety").fill("0")
    page.locator("#compare-box input[type=file]").set_input_files(ROOT / "examples" / "memes" / "big-dog.png")
    expect(page.locator("#compare-box .thumbnail-item")).to_have_count(1)
    ask(page, "What is the joke?")
    expect(page.locator(".versus .bot-row", has_text=JOKE)).to_have_count(1)
    expect(page.locator(".versus .pictures img")).to_have_count(2)
    expect(page.locator("#compare-line")).to_have_text(re.compile("names are shown once you have voted"))
    assert "memeworld" not in page.locator("#compare-windows").inner_text()
    tuned_is_left = JOKE in page.locator("#compare-left-window").inner_text()
    page.get_by_role("button", name="Left is better" if tuned_is_left else "Right is better").click()
    expect(page.locator("#compare-line")).to_have_text(re.compile(r"memeworld 1\b"))
    winner = page.locator("#compare-left-window" if tuned_is_left else "#compare-right-window")
    expect(winner.get_by_text("memeworld", exact=True)).to_be_visible()
    page.get_by_role("tab", name="Chat").click()
    expect(page.locator("#box textarea")).to_be_visible()
