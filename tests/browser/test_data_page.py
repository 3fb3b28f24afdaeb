import re

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Visit

pytestmark = pytest.mark.browser


def test_dialogues_are_written_looked_through_and_exported(visit: Visit) -> None:
    page = visit.tab()
    page.get_by_role("tab", name="Data").click()
    page.get_by_label("Draw pictures of the built-in world").fill("2")
    page.get_by_role("button", name="Write", exact=True).click()
    expect(page.locator("#data-status")).to_contain_text("Kept 2 conversation, 2 detail.")
    heading = page.locator("#data-heading")
    expect(heading).to_contain_text("1 of 4: memeworld-000000/conversation, kept")
    expect(page.locator("#dialogue")).to_contain_text(re.compile(r"There is|No, there|Yes, there|The \w+ "))
    page.get_by_role("button", name="Reject", exact=True).click()
    expect(heading).to_contain_text("2 of 4")
    page.get_by_role("button", name="Export", exact=True).click()
    expect(heading).to_contain_text("records.json is ready: 3 kept, 1 refused; reviewed: 1 rejected.")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download records.json").click()
    assert download.value.suggested_filename == "records.json"
    page.get_by_role("tab", name="Chat").click()
    expect(page.locator("#box textarea")).to_be_visible()
