"""What a question can be made of beside files: the camera and clips; all models at a glance; the whole copied."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Visit
from tests.browser.test_chat_page import ask, attach, png, questions, thumbnails
from tests.family_models import next_config, write_family_model
from tests.test_video import film

pytestmark = pytest.mark.browser


def test_the_camera_and_a_clip_are_asked_about_and_all_is_copied(visit: Visit) -> None:
    visit.context.grant_permissions(["camera", "clipboard-read", "clipboard-write"])
    page = visit.tab()
    page.locator("#camera-open").click()
    page.get_by_role("button", name="Take it").click()
    expect(thumbnails(page)).to_have_count(1)
    expect(page.locator("#camera dialog")).to_be_hidden()
    ask(page, "Who is *there*?")
    expect(questions(page).locator(".pictures img")).to_have_count(1)

    attach(page, ("film.mp4", film("mp4", frames=12)))
    assert "frames as separate pictures" in ask(page, "What happens?")
    questions(page).last.locator("[data-act=view]").click()
    sheet = page.locator("dialog.wide")
    expect(sheet).to_contain_text(re.compile(r"\d frames of 112 × 112 pixels, \d+ visual tokens. It was not trained"))
    expect(sheet.locator(".sees small").first).to_have_text(re.compile(r"^\d\.\d s$"))
    sheet.get_by_role("button", name="Close").click()

    page.locator("#copy-all").click()
    expect(page.locator("#copy-all.done")).to_be_visible()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert re.fullmatch(r"Question: Who is \*there\*\?\n\nAnswer: .+\n\nQuestion: What happens\?\n\nAnswer: .+", copied)


@pytest.fixture
def tiled(runs: Path, tmp_path: Path) -> Iterator[None]:
    """A model that cuts pictures into tiles, in the list while the test runs."""
    write_family_model(tmp_path / "tiled", next_config())
    shutil.move(tmp_path / "tiled", runs / "tiled")
    yield
    shutil.rmtree(runs / "tiled")


@pytest.mark.usefixtures("tiled")
def test_all_models_are_listed_with_what_they_need_and_tiles_are_shown_as_tiles(visit: Visit) -> None:
    page = visit.tab()
    page.locator("#all-models").click()
    listed = page.locator("dialog.wide table")
    expect(listed.get_by_role("row", name="LLaVA-1.5-7B")).to_contain_text(
        re.compile(r"GB free, in .*14.1 GB to downl")
    )
    listed.get_by_role("button", name="Use llava_next").click()
    expect(page.locator("#model input")).to_have_value(re.compile("^llava_next"))
    page.locator("#status .ready summary").click()
    expect(page.locator("#status dl")).to_contain_text("LLaVA-1.6, tiles")
    attach(page, ("wide.png", png("orange", (112, 56))))
    ask(page, "What is it?")
    questions(page).locator("[data-act=view]").click()
    sheet = page.locator("dialog.wide")
    expect(sheet).to_contain_text("an overview and 2 tiles of 28 × 28 pixels")
    expect(sheet.locator(".sees .grid img")).to_have_count(2)
