import base64
import io
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from llava_app.checkpoints import write_card
from tests.browser.conftest import Visit
from tests.fixtures_model import write_tiny_model

pytestmark = pytest.mark.browser

DROP = """([selector, name, type, data]) => {
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([bytes], name, { type }));
    const target = document.querySelector(selector);
    for (const kind of ["dragover", "drop"])
        target.dispatchEvent(new DragEvent(kind, { dataTransfer, bubbles: true, cancelable: true }));
}"""

PASTE = """([data]) => {
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    const clipboardData = new DataTransfer();
    clipboardData.items.add(new File([bytes], "pasted.png", { type: "image/png" }));
    const paste = { clipboardData, bubbles: true, cancelable: true };
    document.body.dispatchEvent(new ClipboardEvent("paste", paste));
}"""

FETCH = """() => new Promise((resolve) => {
    document.addEventListener("securitypolicyviolation", (event) => resolve(event.effectiveDirective));
    new Image().src = "http://far.away.example/spy.png";
})"""


def png(colour: str, size: tuple[int, int] = (120, 90)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def drop(page: Page, data: bytes, *, name: str = "meme.png", onto: str = "#conversation") -> None:
    page.evaluate(DROP, [onto, name, "image/png", base64.b64encode(data).decode()])


def attach(page: Page, *files: tuple[str, bytes]) -> None:
    before = thumbnails(page).count()
    page.locator("#box input[type=file]").set_input_files(
        [{"name": name, "mimeType": "application/octet-stream", "buffer": data} for name, data in files]
    )
    expect(thumbnails(page)).to_have_count(before + len(files))


def thumbnails(page: Page) -> Locator:
    return page.locator("#box .thumbnail-item")


def questions(page: Page) -> Locator:
    return page.locator("#conversation .user-row")


def answers(page: Page) -> Locator:
    return page.locator("#conversation .bot-row")


def toast(page: Page) -> Locator:
    return page.get_by_test_id("toast-text").last


def send(page: Page, question: str) -> None:
    page.locator("#box textarea").fill(question)
    page.locator("#box textarea").press("Enter")


def ask(page: Page, question: str) -> str:
    """Send the question, wait for the end of the answer and return it with its foot."""
    count = answers(page).count()
    send(page, question)
    finished(page, count + 1)
    return answers(page).last.inner_text()


def finished(page: Page, count: int) -> None:
    expect(answers(page)).to_have_count(count)
    expect(answers(page).last.locator(".foot:not(.waiting)")).to_be_visible()
    expect(page.locator("#box .submit-button")).to_be_visible()


def choose(page: Page, model: str) -> None:
    page.locator("#model input").click()
    page.get_by_role("option", name=model).click()
    page.locator("#status .ready").wait_for()


def test_a_dropped_meme_is_answered_and_further_turns_keep_the_context(visit: Visit) -> None:
    page = visit.tab()
    drop(page, png("orange"))
    expect(thumbnails(page)).to_have_count(1)
    assert re.search(r"first word after \d+\.\d\d s", ask(page, "What is the joke?"))
    expect(thumbnails(page)).to_have_count(0)
    ask(page, "Why?")
    attach(page, ("second.png", png("teal")))
    ask(page, "And this one?")
    assert [row.locator(".pictures img").count() for row in questions(page).all()] == [1, 0, 1]
    assert "What is the joke?" in questions(page).first.inner_text()
    sources = {image.get_attribute("src")[:10] for image in page.locator("#conversation .pictures img").all()}
    assert sources == {"data:image"}


def test_a_picture_can_be_pasted_anywhere(visit: Visit) -> None:
    page = visit.tab()
    page.evaluate(PASTE, [base64.b64encode(png("gold")).decode()])
    expect(thumbnails(page)).to_have_count(1)


def test_an_answer_streams_and_stop_keeps_what_was_written(visit: Visit) -> None:
    page = visit.tab()
    ask(page, "What do you see?")
    choose(page, "Endless")
    page.locator("#settings button").first.click()
    page.get_by_label("number input for Longest answer").fill("2048")
    page.keyboard.press("Tab")
    send(page, "Tell me more.")
    expect(answers(page)).to_have_count(2)
    for length in (1, 8):
        expect(answers(page).last).to_have_text(re.compile(rf"^\s*[a-p]{{{length}}}"))
    page.locator("#box .stop-button").dispatch_event("click")  # at once: on a busy machine it might be over before
    finished(page, 2)
    written = answers(page).last.inner_text()
    assert re.match(r"[a-p]{8,}\s+stopped by you", written)
    page.wait_for_timeout(500)
    assert answers(page).last.inner_text() == written
    assert "What do you see?" in questions(page).first.inner_text()  # another model, the same conversation


def test_a_slow_browser_tells_so_and_stop_is_not_behind_what_it_draws(visit: Visit) -> None:
    page = visit.tab()
    choose(page, "Endless")
    visit.context.new_cdp_session(page).send("Emulation.setCPUThrottlingRate", {"rate": 8})
    with page.expect_request(lambda request: '"late"' in (request.post_data or "")):
        send(page, "Tell me.")
    expect(answers(page)).to_have_text(re.compile(r"^\s*[a-p]"))
    page.locator("#box .stop-button").dispatch_event("click")
    finished(page, 1)
    assert re.match(r"[a-p]+\s+stopped by you", answers(page).inner_text())


def test_retry_undo_and_clear(visit: Visit) -> None:
    page = visit.tab()
    attach(page, ("meme.png", png("orange")))
    ask(page, "First?")
    ask(page, "Second?")
    answers(page).last.locator(".foot").evaluate("foot => { foot.textContent = 'the old answer'; }")
    page.get_by_role("button", name="Retry").click()
    expect(answers(page).last).not_to_contain_text("the old answer")
    finished(page, 2)
    page.get_by_role("button", name="Undo").click()
    expect(answers(page)).to_have_count(1)
    expect(page.locator("#box textarea")).to_have_value("Second?")
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#box textarea")).to_have_value("First?")
    expect(thumbnails(page)).to_have_count(1)
    ask(page, "Once more?")
    page.locator("#clear").click()
    expect(questions(page)).to_have_count(0)
    ask(page, "Anew?")


BAD_FILES = {
    "broken.png": (b"\x89PNG\r\n\x1a\n" + b"nonsense" * 40, "broken.png"),
    "notes.txt": (b"Dear diary, this is no picture.", "notes.txt"),
    "empty.png": (b"", "empty.png"),
    "huge.png": (png("black", (9_000, 8_000)), "72"),
}


def test_a_bad_file_is_named_the_message_is_kept_and_the_next_one_works(visit: Visit) -> None:
    page = visit.tab()
    for name, (data, told) in BAD_FILES.items():
        attach(page, (name, data))
        send(page, "What is the joke?")
        expect(toast(page)).to_contain_text(told)
        expect(page.locator("#box .submit-button")).to_be_visible()
        expect(page.locator("#box textarea")).to_have_value("What is the joke?")
        expect(thumbnails(page)).to_have_count(1)
        expect(questions(page)).to_have_count(0)
        page.locator("#box .delete-button").click()
        expect(thumbnails(page)).to_have_count(0)
    attach(page, ("good.png", png("orange")))
    ask(page, "And now?")


def test_an_empty_message_gets_a_hint_and_a_long_one_says_by_how_much(visit: Visit) -> None:
    page = visit.tab()
    page.locator("#box textarea").press("Enter")
    expect(toast(page)).to_contain_text("Type a question or add a picture")
    send(page, "long " * 3_000)
    expect(toast(page)).to_contain_text("tokens")
    expect(page.locator("#box textarea")).to_have_value("long " * 3_000)
    expect(questions(page)).to_have_count(0)


def test_two_tabs_do_not_disturb_each_other(visit: Visit) -> None:
    one, other = visit.tab(), visit.tab()
    send(one, "From one?")
    send(other, "From the other?")
    for page, question in ((one, "From one?"), (other, "From the other?")):
        finished(page, 1)
        assert question in questions(page).first.inner_text()
        expect(questions(page)).to_have_count(1)


def test_a_reload_in_the_middle_of_an_answer_keeps_what_was_written(visit: Visit) -> None:
    page = visit.tab()
    choose(page, "Endless")
    send(page, "Tell me.")
    expect(answers(page).last).to_have_text(re.compile(r"^\s*[a-p]{5}"))
    page.reload()
    page.locator("#status .ready").wait_for()
    visit.complaints.clear()  # of the page that was left: Gradio's client logs that its stream broke off
    expect(questions(page)).to_have_count(1)
    expect(answers(page)).to_have_text(re.compile(r"^\s*[a-p]{5}"))
    expect(answers(page)).to_contain_text("stopped")
    ask(page, "And now?")


def test_an_example_is_one_click_away(visit: Visit) -> None:
    page = visit.tab()
    page.locator("#conversation button.example").first.click()
    finished(page, 1)
    expect(questions(page).first.locator(".pictures img")).to_have_count(1)


def test_a_finished_run_appears_in_the_list_and_one_that_vanished_is_named(
    visit: Visit, runs: Path, tmp_path: Path
) -> None:
    page = visit.tab()
    write_card(tmp_path / "fresh", replace(write_tiny_model(tmp_path / "fresh"), name="Fresh from training"))
    shutil.move(tmp_path / "fresh", runs / "fresh")
    page.locator("#model input").click()
    page.get_by_role("option", name="Fresh from training · trained here").click()
    page.locator("#status .ready", has_text="Random weights").wait_for()
    shutil.rmtree(runs / "fresh")
    expect(toast(page)).to_contain_text("The model “fresh” is gone")
    expect(page.locator("#model input")).not_to_have_value(re.compile("Fresh"))


def test_what_is_typed_is_shown_as_text_and_fetches_nothing(visit: Visit) -> None:
    page = visit.tab()
    typed = "![x](http://far.away.example/spy.png) <img src='http://far.away.example/spy.png'> <image> **</s>** USER:"
    send(page, typed)
    finished(page, 1)
    assert questions(page).first.inner_text().removesuffix("Edit").strip() == typed
    assert page.locator("#conversation img").count() == 0


def test_even_a_picture_that_got_onto_the_page_is_not_fetched_from_elsewhere(visit: Visit) -> None:
    page = visit.tab()
    assert page.evaluate(FETCH) == "img-src"
    visit.complaints.clear()  # of the attempt


def test_the_settings_say_what_the_engine_is_doing(visit: Visit) -> None:
    page = visit.tab()
    ask(page, "What do you see?")
    page.locator("#settings button").first.click()
    expect(page.locator("#engine")).to_contain_text("0 being answered · 0 waiting")
    expect(page.locator("#engine")).to_contain_text("tokens/s while writing")


def test_a_phone_never_scrolls_sideways(phone: Visit) -> None:
    page = phone.tab()
    width = "document.documentElement.scrollWidth"
    assert page.evaluate(width) <= 390
    drop(page, png("orange", (1600, 300)))
    expect(thumbnails(page)).to_have_count(1)
    ask(page, "Averylongwordwithoutanyblank" * 6)
    assert page.evaluate(width) <= 390
    page.locator("#settings button").first.click()
    page.get_by_label("Seed").scroll_into_view_if_needed()
    assert page.evaluate(width) <= 390


def test_the_box_and_the_model_list_have_names_and_the_keyboard_reaches_them(visit: Visit) -> None:
    page = visit.tab()
    page.get_by_role("combobox", name="Model").focus()
    page.keyboard.press("Tab")
    reached = set()
    for _ in range(40):
        reached.add(page.evaluate("document.activeElement.ariaLabel || document.activeElement.placeholder"))
        page.keyboard.press("Tab")
    assert {"Upload a file", "Ask about a picture …", "Submit"} <= reached
