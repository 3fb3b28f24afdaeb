import re
import zipfile
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Visit
from tests.browser.test_chat_page import answers, ask, attach, choose, finished, png, questions, send, thumbnails

pytestmark = pytest.mark.browser

CONTRAST = """() => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const parts = (colour) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const light = (colour) => parts(colour).slice(0, 3)
        .map((part) => part / 255).map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
        .reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
    const ground = (element) => {
        for (; element; element = element.parentElement) {
            const colour = getComputedStyle(element).backgroundColor;
            if (parts(colour)[3] === 255) return colour;
        }
        return getComputedStyle(document.body).backgroundColor;
    };
    const low = [];
    for (const element of document.querySelectorAll("main *")) {
        const text = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
        if (!text || !element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
        const [one, other] = [light(getComputedStyle(element).color), light(ground(element))].sort((a, b) => b - a);
        const ratio = (one + 0.05) / (other + 0.05);
        const told = `${element.className} ${element.textContent.trim().slice(0, 40)}`;
        if (ratio < 4.5) low.push(`${ratio.toFixed(2)} ${told}`);
    }
    return low;
}"""
NAMELESS = """() => [...document.querySelectorAll("main :is(button, input, textarea, select, img)")]
    .filter((element) => element.checkVisibility() && element.type !== "file")
    .filter((element) => !(element.ariaLabel || element.title || element.alt || element.placeholder
        || element.textContent.trim() || element.labels?.length))
    .map((element) => element.outerHTML.slice(0, 200))"""


def act(page: Page, name: str) -> None:
    page.locator(f"#conversation [data-act={name}]").first.click()


def write(page: Page, text: str) -> None:
    page.locator("#bridge textarea").fill(text)
    page.get_by_role("button", name="Save").click()


def open_panel(page: Page) -> None:
    page.locator("#panel .toggle-button").click()
    expect(page.locator("#listing")).to_be_visible()


def test_an_earlier_question_is_edited_and_its_picture_stays(visit: Visit) -> None:
    page = visit.tab()
    attach(page, ("meme.png", png("orange")))
    ask(page, "First *one*?")
    ask(page, "Second?")
    act(page, "edit")
    expect(page.locator("#bridge textarea")).to_have_value("First *one*?")
    write(page, "Another?")
    expect(questions(page)).to_have_count(1)
    finished(page, 1)
    assert "Another?" in questions(page).inner_text()
    expect(questions(page).locator(".pictures img")).to_have_count(1)


def test_an_answer_that_was_cut_is_continued(visit: Visit) -> None:
    page = visit.tab()
    choose(page, "Endless")
    page.locator("#settings button").first.click()
    page.get_by_label("number input for Longest answer").fill("9")
    page.keyboard.press("Tab")
    begun = re.match(r"\s*([a-p]+)", ask(page, "Go on.")).group(1)
    assert len(begun) == 9
    expect(answers(page)).to_contain_text("reached the longest answer allowed")
    page.get_by_role("button", name="Continue the answer").click()
    expect(answers(page)).to_have_text(re.compile(rf"^\s*{begun}[a-p]{{9}}\s"))
    finished(page, 1)


def test_one_click_asks_about_the_picture_and_shift_enter_makes_a_line(visit: Visit) -> None:
    page = visit.tab()
    attach(page, ("meme.png", png("orange")))
    box = page.locator("#box textarea")
    box.fill("mine")
    box.press("Shift+Enter")
    box.type("yours")
    page.locator("#quick").get_by_role("button", name="Describe the picture").click()
    finished(page, 1)
    assert "Describe the picture." in questions(page).inner_text()
    expect(box).to_have_value("mine\nyours")
    expect(thumbnails(page)).to_have_count(0)


def test_an_answer_is_copied_judged_and_corrected(visit: Visit, runs: Path) -> None:
    visit.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = visit.tab()
    attach(page, ("meme.png", png("orange")))
    ask(page, "What is it, judged?")
    act(page, "up")
    expect(page.locator("#conversation [data-act=up]")).to_have_attribute("aria-pressed", "true")
    act(page, "correct")
    write(page, "An orange square.")
    expect(answers(page)).to_contain_text("An orange square.")
    act(page, "copy")
    expect(page.locator("#conversation .done")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "An orange square."
    kept = (runs / "feedback" / "records.jsonl").read_text(encoding="utf-8")
    assert kept.count("An orange square.") == kept.count("What is it, judged?") == 1


def test_what_the_model_sees_is_shown_and_a_part_becomes_a_picture(visit: Visit) -> None:
    page = visit.tab()
    attach(page, ("meme.png", png("orange", (400, 300))))
    ask(page, "What is it?")
    act(page, "view")
    sheet = page.locator("dialog.wide")
    expect(sheet).to_contain_text("112 × 112 pixels, 64 visual tokens")
    expect(page.get_by_role("button", name="Ask about this part")).to_be_disabled()
    area = sheet.locator(".area").bounding_box()
    page.mouse.move(area["x"] + area["width"] / 4, area["y"] + area["height"] / 4)
    page.mouse.down()
    page.mouse.move(area["x"] + area["width"] / 2, area["y"] + area["height"] / 2, steps=3)
    page.mouse.up()
    page.get_by_role("button", name="Ask about this part").click()
    expect(thumbnails(page)).to_have_count(1)
    expect(sheet).to_be_hidden()
    ask(page, "And here?")
    expect(questions(page).last.locator(".pictures img")).to_have_count(1)
    page.locator("#settings button").first.click()
    expect(page.locator("#context")).to_contain_text("pictures 128")


def test_conversations_survive_a_reload_and_are_listed_renamed_and_deleted(visit: Visit) -> None:
    page = visit.tab()
    attach(page, ("meme.png", png("orange")))
    ask(page, "The first chat?")
    page.locator("#clear").click()
    expect(questions(page)).to_have_count(0)
    ask(page, "The second chat?")
    page.wait_for_function("Object.keys(localStorage).filter((key) => key.startsWith('llava.talk')).length == 2")
    page.reload()
    expect(questions(page)).to_contain_text("The second chat?")
    open_panel(page)
    page.locator("#listing label", has_text="The first chat?").click()
    expect(questions(page)).to_contain_text("The first chat?")
    expect(questions(page).locator(".pictures img")).to_have_count(1)
    page.locator("#title textarea, #title input").first.fill("Renamed")
    page.keyboard.press("Enter")
    expect(page.locator("#listing label").first).to_have_text("Renamed")
    page.locator("#delete").click()
    expect(page.locator("#listing")).not_to_contain_text("Renamed")
    expect(questions(page)).to_have_count(0)
    page.wait_for_function("Object.keys(localStorage).filter((key) => key.startsWith('llava.talk')).length == 1")
    visit.complaints.clear()  # of the page that was left: Gradio's client logs that its stream broke off


def test_another_visitor_sees_nothing_of_it(visit: Visit, phone: Visit) -> None:
    ask(visit.tab(), "A secret?")
    other = phone.tab()
    open_panel(other)
    expect(other.locator("#listing")).to_contain_text("New chat")
    assert "A secret?" not in other.content()


def test_a_conversation_is_exported_and_imported(visit: Visit, tmp_path: Path) -> None:
    page = visit.tab()
    attach(page, ("meme.png", png("orange")))
    ask(page, "What is it?")
    open_panel(page)
    with page.expect_download() as download:
        page.locator("#export").click()
    download.value.save_as(tmp_path / "talk.zip")
    names = zipfile.ZipFile(tmp_path / "talk.zip").namelist()
    assert names == ["conversation.json", "conversation.md", "pictures/1.png"]
    page.locator("#new").click()
    expect(questions(page)).to_have_count(0)
    with page.expect_file_chooser() as chooser:
        page.locator("#import").click()
    chooser.value.set_files(tmp_path / "talk.zip")
    expect(questions(page)).to_contain_text("What is it?")
    expect(questions(page).locator(".pictures img")).to_have_count(1)


def test_settings_are_remembered_and_reset_and_the_address_begins_a_question(visit: Visit) -> None:
    page = visit.tab()
    page.locator("#settings button").first.click()
    page.get_by_label("Seed").fill("77")
    page.keyboard.press("Tab")
    page.wait_for_function("localStorage['llava.settings'] !== undefined")
    page.goto(visit.address + "?model=Endless&q=What is it?")
    expect(page.locator("#model input")).to_have_value(re.compile("Endless"))
    expect(page.locator("#box textarea")).to_have_value("What is it?")
    page.locator("#settings button").first.click()
    expect(page.get_by_label("Seed")).to_have_value("77")
    page.get_by_role("button", name="Reset to defaults").click()
    expect(page.get_by_label("Seed")).to_have_value("")
    visit.complaints.clear()  # of the page that was left


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read_and_every_control_has_a_name(visit: Visit, scheme: str) -> None:
    page = visit.context.new_page()
    page.emulate_media(color_scheme=scheme)
    page.goto(visit.address)
    page.locator("#status .ready").wait_for()
    assert page.evaluate(CONTRAST) == []
    attach(page, ("meme.png", png("orange")))
    ask(page, "What is it?")
    page.locator("#settings button").first.click()
    expect(page.locator("#context .bar")).to_be_visible()
    assert page.evaluate(CONTRAST) == []
    assert page.evaluate(NAMELESS) == []


def test_what_was_written_does_not_move_while_an_answer_streams(visit: Visit) -> None:
    page = visit.tab()
    ask(page, "First?")
    choose(page, "Endless")
    send(page, "Go on.")
    expect(answers(page).last).to_have_text(re.compile(r"^\s*[a-p]{3}"))
    before = page.locator("#box").bounding_box()
    said, top = answers(page).first.bounding_box(), answers(page).last.bounding_box()["y"]
    expect(answers(page).last).to_have_text(re.compile(r"^\s*[a-p]{12}"))
    assert page.locator("#box").bounding_box() == before
    assert (answers(page).first.bounding_box(), answers(page).last.bounding_box()["y"]) == (said, top)
    page.locator("#box .stop-button").dispatch_event("click")
    finished(page, 2)
