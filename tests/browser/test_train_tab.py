import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from finetune.memeworld.dataset import make_dataset
from llava_app.jobs import Jobs
from tests.browser.conftest import Visit
from tests.serving import serving

pytestmark = pytest.mark.browser

PATIENCE = 240_000  # ms; a training process imports for many seconds on a busy machine


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small part of the built-in world."""
    return make_dataset(tmp_path_factory.mktemp("drawn"), pictures=40, texts=0, processes=1).align


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Path]:
    """An empty folder; afterwards nothing runs in it."""
    yield tmp_path / "runs"
    for job in Jobs(tmp_path / "runs").all():
        job.stop()


@pytest.fixture
def address(browser: Browser, runs: Path, tmp_path: Path) -> Iterator[str]:
    with serving("--runs", str(runs), "--model", "memeworld", log=tmp_path / "app.log") as address:
        yield address


def open_tab(page: Page) -> None:
    page.get_by_role("tab", name="Train").click()
    expect(page.locator("#train-line")).not_to_be_empty()


def fill(page: Page, **values: str) -> None:
    for name, value in values.items():
        page.locator(f"#train-{name} :is(input, textarea)").first.fill(value)


def says(page: Page, text: str) -> None:
    expect(page.locator("#train-line")).to_contain_text(re.compile(text), timeout=PATIENCE)


def test_a_run_is_looked_at_started_watched_after_a_reload_stopped_resumed_and_talked_to(
    visit: Visit, drawn: Path, runs: Path
) -> None:
    page = visit.tab()
    open_tab(page)
    page.locator("#train-own > button").click()
    page.locator("#train-recipe input").click()
    page.get_by_role("option", name=re.compile("^memeworld_align")).click()
    for field, value in (("learning_rate", "0.002"), ("epochs", "1"), ("global_batch", "64"), ("micro_batch", "64")):
        expect(page.locator(f"#train-{field} input")).to_have_value(value)  # the recipe's
    fill(page, name="mine", data=str(drawn), global_batch="4", micro_batch="4", more="save_every=4")
    fill(page, max_steps="2000", epochs="1000")
    command = page.locator("#train-command")
    expect(command).to_contain_text("python -m finetune align --name=mine")
    for change in ("global_batch=4", "micro_batch=4", "max_steps=2000", "epochs=1000"):
        expect(command).to_contain_text(change)

    page.locator("#train-look").click()
    says(page, "This is the data")
    expect(page.locator("#train-told textarea")).to_have_value(re.compile("40 records: 40 good, 0 refused"))
    expect(page.locator("#train-pictures img").first).to_be_visible()
    fill(page, more="save_every")
    page.locator("#train-plan").click()  # a plan that can be made takes a process; Start makes one as well
    says(page, "'save_every' is not a change to a recipe")
    fill(page, more="save_every=4")
    expect(command).to_contain_text("save_every=4")

    page.locator("#train-start").click()
    says(page, r"Step [1-9]\d* of 2,000, loss [\d.]+, [\d,]+ tokens/s")
    page.reload()
    open_tab(page)
    says(page, "mine: Step")
    expect(page.locator("#train-answers")).to_contain_text("after step 0")
    expect(page.locator("#train-loss").locator("canvas, svg.marks").first).to_be_visible()
    page.locator("#train-stop").click()
    says(page, "It was stopped")
    taken = max(int(state.name.removeprefix("step-")) for state in (runs / "mine" / "state").glob("step-*"))
    recipe = runs / "mine" / "recipe.yaml"  # a shorter run, so that its end is seen
    recipe.write_text(recipe.read_text().replace("max_steps: 2000", f"max_steps: {taken + 2}"))
    page.locator("#train-resume").click()
    says(page, f"Step {taken + 2:,} of {taken + 2:,}.*It is trained")
    expect(page.locator("#train-log textarea")).to_have_value(re.compile("finished and in the page's model list"))

    page.locator("#train-chat").click()
    expect(page.locator("#model input")).to_have_value(re.compile("^mine"))
    expect(page.locator("#box")).to_be_visible()
    assert (runs / "mine" / "card.json").exists()
