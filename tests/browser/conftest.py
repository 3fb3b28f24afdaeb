"""The real app in a process of its own, and a real Chromium that visits it."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Page,
    Playwright,
    Request,
    expect,
    sync_playwright,
)

from tests.browser.endless import write_endless_model
from tests.serving import PATIENCE, serving

SCREENSHOTS = Path(__file__).parent / "screenshots"  # not in the repository; CI may keep them
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",  # a camera that shows a picture of its own
    "--use-fake-ui-for-media-stream",
]


@pytest.fixture(scope="session")
def playwright() -> Iterator[Playwright]:
    expect.set_options(timeout=PATIENCE * 1000)
    with sync_playwright() as playwright:
        yield playwright


@pytest.fixture(scope="session")
def browser(playwright: Playwright) -> Iterator[Browser]:
    """Chromium; without one the tests are skipped, but fail where CI=true."""
    bundled = playwright.chromium.executable_path
    path = next(filter(None, map(shutil.which, NAMES)), bundled if Path(bundled).exists() else None)
    if path is None:
        reason = (
            f"no Chromium on the PATH (looked for {', '.join(NAMES)}); install one, or run: playwright install chromium"
        )
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of trained models with one in it that never comes to an end."""
    runs = tmp_path_factory.mktemp("runs")
    write_endless_model(runs / "endless")
    return runs


@pytest.fixture(scope="session")
def address(browser: Browser, runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the app answers, started with the built-in model."""
    log = tmp_path_factory.mktemp("log") / "app.log"
    with serving("--runs", str(runs), "--model", "memeworld", log=log) as address:
        yield address


class Visit:
    """One visitor: fresh tabs, and a record of what must not happen in them."""

    def __init__(self, context: BrowserContext, address: str) -> None:
        self.context = context
        self.address = address
        self.complaints: list[str] = []
        context.set_default_timeout(PATIENCE * 1000)
        context.on("request", self._watch_request)
        context.on("console", self._watch_console)
        context.on("weberror", lambda error: self.complaints.append(f"script error: {error.error}"))

    def tab(self) -> Page:
        """The page in a new tab, its model loaded."""
        page = self.context.new_page()
        page.goto(self.address)
        page.locator("#status .ready").wait_for()
        return page

    def _watch_request(self, request: Request) -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.complaints.append(f"request to elsewhere: {request.url}")

    def _watch_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.complaints.append(f"console: {message.text}")


def _keep_pictures(visit: Visit, test: str) -> None:
    """A picture of each open tab as the test left it, for people to look at."""
    for number, page in enumerate(visit.context.pages, start=1):
        page.screenshot(path=SCREENSHOTS / f"{test}-{number}.png")


@pytest.fixture
def visit(browser: Browser, address: str, request: pytest.FixtureRequest) -> Iterator[Visit]:
    """A visitor with a desktop window. Afterwards: nothing was fetched from elsewhere and no error was logged."""
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    visit = Visit(context, address)
    yield visit
    _keep_pictures(visit, request.node.name)
    context.close()
    assert not visit.complaints, "\n".join(visit.complaints)


@pytest.fixture
def phone(browser: Browser, address: str, request: pytest.FixtureRequest) -> Iterator[Visit]:
    """A visitor with a phone, held upright."""
    context = browser.new_context(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    visit = Visit(context, address)
    yield visit
    _keep_pictures(visit, f"{request.node.name}-phone")
    context.close()
    assert not visit.complaints, "\n".join(visit.complaints)
