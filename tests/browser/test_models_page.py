"""The context lens, and a model that is typed."""

import shutil
from pathlib import Path

import pytest
from playwright.sync_api import expect

from llava_app.checkpoints import DEMO
from tests.browser.conftest import Visit

pytestmark = pytest.mark.browser


def test_the_lens_shows_what_a_picture_takes_and_where_the_parameters_are(visit: Visit) -> None:
    page = visit.tab()
    page.get_by_role("tab", name="Measure").click()
    page.get_by_role("button", name="Context lens").click()
    page.locator("#lens-show").click()
    expect(page.locator("#lens-chart")).to_contain_text("1,752")
    expect(page.locator("#lens-parts")).to_contain_text("language model")
    page.get_by_label("Size of the picture").fill("12")
    page.locator("#lens-show").click()
    expect(page.locator("#lens-chart")).to_contain_text("12 is no size")


def test_a_folder_that_is_typed_answers(visit: Visit, tmp_path: Path) -> None:
    shutil.copytree(DEMO / "memeworld", tmp_path / "typed", ignore=shutil.ignore_patterns("card.json"))
    page = visit.tab()
    page.get_by_role("button", name="Settings").click()
    box = page.get_by_label("Another model")
    box.fill("nobody has this")
    box.press("Enter")
    expect(page.get_by_text("There is no model “nobody has this”")).to_be_visible()
    box.fill(str(tmp_path / "typed"))
    box.press("Enter")
    expect(page.locator("#status")).to_contain_text("used as its own files say")
    expect(box).to_have_value("")
    page.locator("#box textarea").fill("Hello")
    page.locator("#box textarea").press("Enter")
    expect(page.locator("#conversation")).to_contain_text("tokens/s")
