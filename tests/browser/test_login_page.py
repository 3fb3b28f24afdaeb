"""Signing in on a Space, from the button to the answer and out again, in a browser."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from llava_app.ui.login import FAILED, FIRST
from tests.browser.conftest import SCREENSHOTS
from tests.browser.test_chat_page import answers, ask
from tests.browser.test_looks import violations
from tests.openai_server import openai_server
from tests.openid_provider import Provider, openid_provider
from tests.serving import PATIENCE, serving

pytestmark = pytest.mark.browser

WINDOWS = {"desktop": {"width": 1280, "height": 860}, "phone": {"width": 390, "height": 844}}
BUTTON = "Sign in with Hugging Face"


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    with openid_provider() as provider:
        provider.name = "ada-lovelace-of-the-analytical-engine"
        yield provider


@pytest.fixture(scope="module")
def members(provider: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a Space with `hf_oauth: true` answers."""
    folder = tmp_path_factory.mktemp("members")
    environment = {"SPACE_ID": "somebody/llava", "SYSTEM": "spaces"} | provider.environment
    with openai_server(["Fine."]) as server:
        flags = ("--host", "127.0.0.1", "--server", server, "--model", "scripted", "--runs", str(folder))
        with serving(*flags, log=folder / "app.log", environment=environment) as address:
            yield address


def shoot(page: Page, name: str) -> None:
    """A picture of the page as it is, for people to look at; nothing in it may be too wide or hard to use."""
    page.screenshot(path=SCREENSHOTS / f"{name}.png")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), name
    assert violations(page) == []


@pytest.mark.parametrize(("window", "scheme"), [("desktop", "light"), ("phone", "dark")])
def test_sign_in_ask_and_sign_out(browser: Browser, members: str, window: str, scheme: str) -> None:
    context = browser.new_context(viewport=WINDOWS[window], color_scheme=scheme)
    context.set_default_timeout(PATIENCE * 1000)
    page = context.new_page()
    page.goto(members)
    shoot(page, f"sign-in-{window}-{scheme}")
    page.get_by_role("link", name=BUTTON).click()
    page.get_by_role("link", name="Cancel").click()
    expect(page.get_by_role("alert")).to_have_text(FAILED)
    shoot(page, f"sign-in-failed-{window}-{scheme}")
    page.get_by_role("link", name=BUTTON).click()
    page.get_by_role("link", name="Authorize").click()
    page.locator("#status .ready").wait_for()
    expect(page.locator("#account")).to_have_text("Sign out ada-lovelace-of-the-analytical-engine")
    expect(page.locator("#account")).to_be_in_viewport(ratio=1)
    ask(page, "What?")
    expect(answers(page).last).to_contain_text("Fine.")
    expect(page.get_by_role("button", name="Good answer")).not_to_be_visible()  # nothing is kept here
    shoot(page, f"signed-in-{window}-{scheme}")
    page.locator("#account").click()
    expect(page.get_by_role("link", name=BUTTON)).to_be_visible()
    context.close()


def test_a_login_that_ended_takes_nothing_away(browser: Browser, members: str) -> None:
    context = browser.new_context(viewport=WINDOWS["desktop"])
    context.set_default_timeout(PATIENCE * 1000)
    page = context.new_page()
    sign_in(page, members)
    ask(page, "First?")
    context.clear_cookies()
    page.locator("#box textarea").fill("Second?")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    expect(page.get_by_text(FIRST).nth(1)).to_be_attached()
    expect(page.get_by_text(FIRST).filter(visible=True)).to_have_count(1)
    page.screenshot(path=SCREENSHOTS / "login-ended.png")
    expect(page.locator("#box textarea")).to_have_value("Second?")
    expect(page.locator("#conversation .error")).not_to_be_visible()
    sign_in(context.new_page(), members)
    page.bring_to_front()
    page.locator("#box textarea").press("Enter")
    expect(answers(page)).to_have_count(2)
    context.close()


def sign_in(page: Page, address: str) -> None:
    page.goto(address)
    page.get_by_role("link", name=BUTTON).click()
    page.get_by_role("link", name="Authorize").click()
    page.locator("#status .ready").wait_for()
