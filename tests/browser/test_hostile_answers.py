"""Answers that try to do more than be read: nothing in them is fetched and nothing runs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from llava_app.archive import pack
from llava_app.conversation import Conversation
from llava_app.ui.markdown import as_typed, as_written
from tests.browser.conftest import Visit
from tests.openai_server import openai_server
from tests.serving import serving

pytestmark = pytest.mark.browser

FAR = "http://far.away.example"
HOSTILE = f"""Hello.
<script>window.ran = 1</script>
<img src="{FAR}/a.png" onerror="window.ran = 2"> <svg onload="window.ran = 3"></svg>
<iframe src="{FAR}/frame"></iframe> <object data="{FAR}/o"></object> <embed src="{FAR}/e">
<video src="{FAR}/v.mp4" autoplay></video> <audio src="{FAR}/a.mp3" autoplay></audio>
<link rel="stylesheet" href="{FAR}/s.css">
<style>@import url({FAR}/i.css); body {{ background: url({FAR}/b.png) }}</style>
<base href="{FAR}/"> <meta http-equiv="refresh" content="0;url={FAR}/refresh">
<div style="background: url({FAR}/style.png)">styled</div> <a href="javascript:window.ran = 4" id="link">go</a>
<form action="{FAR}/form"><input autofocus onfocus="window.ran = 5"></form>
<details open ontoggle="window.ran = 6">x</details>

![cat]({FAR}/markdown.png) ![cat][later] [![cat]({FAR}/linked.png)]({FAR}/page)
!\\[cat]({FAR}/escaped.png) !&#91;cat]({FAR}/entity.png) ![cat](<{FAR}/angle.png>)
[click](javascript:window.ran=7) [click](data:text/html,<script>window.ran=8</script>) [plain]({FAR}/plain)
`![code]({FAR}/code.png)` <{FAR}/auto> &lt;img src={FAR}/double.png&gt; <IMG SRC=`javascript:window.ran=9`>

| a | b |
|---|---|
| ![cell]({FAR}/cell.png) | <img src={FAR}/cell2.png> |

```html
<img src="{FAR}/fence.png"><script>window.ran = 10</script>
```
<!-- <img src="{FAR}/comment.png"> --> <![CDATA[<img src="{FAR}/cdata.png">]]>
$$\\includegraphics{{{FAR}/latex.png}}$$ <math><mtext><img src={FAR}/math.png onerror=window.ran=11></mtext></math>

[later]: {FAR}/reference.png
The end.
"""
# Where Markdown ends code, begins it or does not, in every way that looks like another.
PART = (
    f'![cat]({FAR}/b.png) <b id="bold">y</b> <img src={FAR}/i.png> <details open ontoggle="window.ran = 12">z</details>'
)
BETWEEN_CODE = (
    f"Hi ```\n\n{PART}",
    f"x ```a\n{PART}\n",
    f"\\`{PART}\\` \\`{PART}\\`",
    f"a ` b\n\nc ` {PART}",
    f"``x`{PART}`y``\n\n    z {PART}",
    f"    ```\n\n{PART}\n\n    ```",
    f"- ```\n\n{PART}\n\n> ~~~\n\n{PART}\n~~~\n{PART}",
    f"````\n```\n````\n{PART}\n```mermaid\ngraph LR\n a[{PART}] --> b\n```",
    f"> ```mermaid\n> graph LR\n> a[{PART}] --> b\n> ```",
    f'[x]: u "\n\n```\n"\n{PART}\n```\n![x] ![x][x] [^1]\n\n[^1]: {PART}',
)
CODE = """Python:
```python
if a < b:

    print('<b> & `c`')
```
- one:
  ```
  in a list
  ```

And `<img> ![x](y)`, the end of it."""
RAN = "window.ran === undefined"
# Elements of an answer that would fetch or run something; pictures of our own making are data URLs.
ACTIVE = (
    "#conversation .bot :is(script, iframe, object, embed, video, audio, link, style, base, meta, form, input,"
    " img:not([src^='data:']), [onerror], [onload], [onclick], [onfocus], [ontoggle], [href^='javascript'],"
    " [href^='data'], #bold, details, .mermaid)"
)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("hostile")
    with openai_server([HOSTILE]) as server:
        flags = ("--public", "--server", server, "--model", "scripted", "--runs", str(folder))
        with serving(*flags, log=folder / "log") as address:
            yield address


def ask(page: Page, question: str) -> None:
    page.locator("#box textarea").fill(question)
    page.keyboard.press("Enter")
    page.locator("#conversation .foot", has_text="finished").last.wait_for()


def test_an_answer_with_markup_scripts_and_remote_pictures_fetches_and_runs_nothing(
    browser: Browser, hostile: str
) -> None:
    context = browser.new_context()
    visit = Visit(context, hostile)
    page = visit.tab()
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    ask(page, HOSTILE)  # the question shows the same
    answer = page.locator("#conversation .bot").last
    assert "The end." in answer.inner_text()
    assert "<script>window.ran = 1</script>" in answer.inner_text()
    assert page.locator(ACTIVE).count() == 0
    assert page.evaluate(RAN)
    assert visit.complaints == []
    page.reload()  # what is kept in the browser is shown anew
    page.locator("#conversation .bot").last.get_by_text("The end.").wait_for()
    assert page.locator(ACTIVE).count() == 0
    assert page.evaluate(RAN)
    links = page.locator("#conversation .bot a")
    addresses = [links.nth(number).get_attribute("href") for number in range(links.count())]
    assert f"{FAR}/plain" in addresses  # a link is one, to be clicked
    assert all(address is None or address.startswith(FAR) for address in addresses)
    context.close()
    # Of the page that was left, Gradio's client logs that its stream broke off.
    assert [told for told in visit.complaints if not told.startswith("console:")] == []
    assert dialogs == []


def test_nothing_around_code_is_fetched_or_becomes_html(browser: Browser, hostile: str, tmp_path: Path) -> None:
    """Answers of an imported conversation, which are shown as any other."""
    conversation = Conversation()
    for answer in (*BETWEEN_CODE, CODE):
        conversation = conversation.ask(answer).answer(answer, "stop")
    (tmp_path / "hostile.zip").write_bytes(pack(conversation, typed=as_typed, written=as_written))
    context = browser.new_context()
    visit = Visit(context, hostile)
    page = visit.tab()
    page.locator("#panel .toggle-button").click()
    with page.expect_file_chooser() as chooser:
        page.locator("#import").click()
    chooser.value.set_files(tmp_path / "hostile.zip")
    last = page.locator("#conversation .bot").last
    last.get_by_text("the end of it").wait_for()
    assert last.locator("pre code").all_inner_texts() == ["if a < b:\n\n    print('<b> & `c`')\n", "in a list\n"]
    assert last.locator("p code").all_inner_texts() == ["<img> ![x](y)"]
    assert page.locator(ACTIVE).count() == 0
    assert page.evaluate(RAN)
    assert "<img src=http://far.away.example/i.png>" in page.locator("#conversation .bot").first.inner_text()
    assert visit.complaints == []
    context.close()
