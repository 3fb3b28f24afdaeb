"""What a person sees and what a keyboard or a screen reader finds, in every tab."""

import re
from collections.abc import Callable

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.browser.conftest import SCREENSHOTS, Visit
from tests.browser.test_chat_page import answers, ask, attach, choose, finished, png

pytestmark = pytest.mark.browser

TABS = ("Chat", "Compare", "Train", "Data", "Measure")
# What axe says of Gradio's own markup, which nothing of ours can change: rule, where, and why.
OF_GRADIO = [
    ("aria-required-children", ".examples", "the Chatbot's list of examples holds buttons, no list items"),
    ("aria-prohibited-attr", "[data-testid=user], [data-testid=bot]", "a message is a div with a name, without a role"),
    ("aria-prohibited-attr", ".empty", "what is empty is a div with a name, without a role"),
]
FOCUS = """() => {
    const element = document.activeElement, box = element.getBoundingClientRect();
    let around = element;
    while (around && getComputedStyle(around).outlineStyle === "none") around = around.parentElement;
    return {
        name: element.ariaLabel || element.placeholder || element.textContent.trim(),
        shown: around !== null && box.width > 0 && box.right > 0 && box.bottom > 0,
    };
}"""
SQUASHED = """() => [...document.querySelectorAll("main .block")]
    .filter((block) => block.checkVisibility() && getComputedStyle(block).overflowY === "hidden")
    .filter((block) => block.scrollHeight > block.clientHeight + 4)
    .map((block) => `${block.id || block.textContent.trim().slice(0, 40)}: ${block.clientHeight} px high`)"""


def show(page: Page, tab: str) -> None:
    page.get_by_role("tab", name=tab).click()
    expect(page.get_by_role("tab", name=tab)).to_have_attribute("aria-selected", "true")


def violations(page: Page) -> list[str]:
    """What axe calls serious or critical, but for what is Gradio's."""
    found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    return [
        f"{rule['id']}: {node['html'][:300]}"
        for rule in found
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
        if not _is_of_gradio(page, rule["id"], node["target"][0])
    ]


def _is_of_gradio(page: Page, rule: str, target: str) -> bool:
    places = [place for named, place, _ in OF_GRADIO if named == rule]
    return any(page.locator(target).first.evaluate("(element, place) => element.matches(place)", at) for at in places)


def _empty(page: Page) -> None:
    pass


def _settings(page: Page) -> None:
    attach(page, ("meme.png", png("orange")))
    ask(page, "What is it?")
    page.locator("#settings button").first.click()
    expect(page.locator("#context .bar")).to_be_visible()


def _picture(page: Page) -> None:
    page.keyboard.press("Escape")
    expect(page.locator("#context .bar")).not_to_be_visible()
    page.locator("#conversation .pictures button").click()
    expect(page.locator("dialog.sheet .sees")).to_be_visible()


def _panel(page: Page) -> None:
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Conversations").click()
    expect(page.locator("#listing")).to_be_visible()
    page.wait_for_timeout(400)  # it slides in


def _train(page: Page) -> None:
    show(page, "Train")
    page.locator("#train-own > button").click()
    expect(page.locator("#train-look")).to_be_visible()


def _compare(page: Page) -> None:
    page.get_by_role("button", name="Conversations").click()
    show(page, "Compare")


STATES: dict[str, Callable[[Page], None]] = {
    "empty": _empty,
    "settings": _settings,
    "picture": _picture,
    "panel": _panel,
    "compare": _compare,
    "train": _train,
    "data": lambda page: show(page, "Data"),
    "measure": lambda page: show(page, "Measure"),
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_in_any_tab(visit: Visit, scheme: str) -> None:
    page = visit.context.new_page()
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.goto(visit.address)
    page.locator("#status .ready").wait_for()
    found = {}
    for name, reach in STATES.items():
        reach(page)
        page.screenshot(path=SCREENSHOTS / f"{name}-{scheme}.png")
        found[name] = violations(page)
    assert not any(found.values()), found


@pytest.mark.parametrize(("width", "height"), [(1440, 900), (1024, 768), (390, 844)])
def test_every_tab_fits_the_window_and_nothing_in_it_is_squashed(visit: Visit, width: int, height: int) -> None:
    page = visit.tab()
    page.set_viewport_size({"width": width, "height": height})
    for tab in TABS:
        show(page, tab)
        page.screenshot(path=SCREENSHOTS / f"{tab.lower()}-{width}.png")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, tab
        assert page.evaluate(SQUASHED) == [], tab


def test_the_keyboard_reaches_everything_in_the_order_of_the_page_and_shows_where_it_is(visit: Visit) -> None:
    page = visit.tab()
    page.get_by_role("combobox", name="Model").focus()
    reached = []
    while not reached or reached[-1] != "New chat":
        assert len(reached) < 60, reached
        focus = page.evaluate(FOCUS)
        assert focus["shown"], focus
        reached.append(focus["name"])
        page.keyboard.press("Tab")
    first_example = next(name for name in reached if name.startswith("Select example 1"))
    order = ["Model", *TABS, "Conversations", "Details", first_example, "Explain the joke", "Upload a file"]
    order += ["Ask about a picture …", "Submit"]
    assert [name for name in reached if name in order] == order
    assert any(name.startswith("Settings") for name in reached)
    assert "Export" not in reached  # the panel is closed


def test_the_keyboard_alone_asks_stops_and_opens_the_settings(visit: Visit) -> None:
    page = visit.tab()
    choose(page, "Endless")
    page.locator("#settings button").first.click()
    page.get_by_label("number input for Longest answer").fill("2048")
    page.keyboard.press("Tab")
    page.locator("#settings button").first.click()
    expect(page.get_by_label("Seed")).not_to_be_visible()
    page.locator("#box textarea").focus()
    page.keyboard.type("Tell me more.")
    page.keyboard.press("Enter")
    expect(answers(page).last).to_have_text(re.compile(r"^\s*[a-p]{2}"))
    page.locator("#box textarea").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className").startswith("stop-button")
    page.keyboard.press("Enter")
    finished(page, 1)
    page.locator("#settings button").first.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Seed")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_label("Seed")).not_to_be_visible()


def test_neither_the_settings_nor_the_first_answer_move_the_box_or_what_was_said(visit: Visit) -> None:
    page = visit.tab()
    box = page.locator("#box .input-wrapper")
    before = box.bounding_box()
    ask(page, "First?")
    assert box.bounding_box() == before
    said = answers(page).first.bounding_box()
    page.locator("#settings button").first.click()
    expect(page.get_by_label("Seed")).to_be_visible()
    assert (box.bounding_box(), answers(page).first.bounding_box()) == (before, said)


def test_the_first_visit_loads_less_than_two_megabytes_of_ours(visit: Visit) -> None:
    page = visit.context.new_page()
    sizes: dict[str, int] = {}
    page.on("requestfinished", lambda request: sizes.update({request.url: request.sizes()["responseBodySize"]}))
    page.goto(visit.address)
    page.locator("#status .ready").wait_for()
    expect(page.locator("#conversation .example-image-container img").last).to_be_visible()
    ours = {url: size for url, size in sizes.items() if "/assets/" not in url and "/static/" not in url}
    assert any(url.endswith(".png") for url in ours), sizes
    assert sum(ours.values()) < 2_000_000, ours
