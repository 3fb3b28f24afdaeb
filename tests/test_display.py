import html
import re
from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from PIL import Image

from llava_app.chat import Progress
from llava_app.checkpoints import Card
from llava_app.conversation import Conversation
from llava_app.engine.watch import Snapshot, Wait
from llava_app.images import Picture
from llava_app.ui.compare import Match
from llava_app.ui.display import Notes, Talk, activity, choices, doing, messages, status
from llava_app.ui.markdown import as_typed, as_written

COMMONMARK = MarkdownIt("commonmark").enable("table")
RED = Picture(Image.new("RGB", (20, 10), "red"), "red")


def talk(*turns: tuple[str, str, str], notes: Notes | None = None) -> Talk:
    conversation = Conversation()
    for question, answer, finish in turns:
        conversation = conversation.ask(question).answer(answer, finish)
    return Talk(conversation, (notes or Notes(),) * len(turns))


def texts(shown: list[dict]) -> list[str]:
    return [part.get("text", part.get("value")) for message in shown for part in message["content"]]


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("a <b>bold</b> word", "<p>a &lt;b&gt;bold&lt;/b&gt; word</p>"),
        ("![x](http://far.away/spy.png)", "<p>![x](http://far.away/spy.png)</p>"),
        ("&lt;img&gt; \\< \\` AT&T", "<p>&amp;lt;img&amp;gt; &lt; ` AT&amp;T</p>"),
        ("> quoted, **bold**", "<blockquote>\n<p>quoted, <strong>bold</strong></p>\n</blockquote>"),
        ("[a link](http://far.away)", '<p><a href="http://far.away">a link</a></p>'),
        ("`<b> *x*` and `` a`b ``", "<p><code><b> *x*</code> and <code>a`b</code></p>"),
        ("no \\`<b>\\` code", "<p>no `&lt;b&gt;` code</p>"),
        ("`no\n\n<b>` code", "<p>`no</p>\n<p>&lt;b&gt;` code</p>"),
        ("see:\n```html\n<img>\n\n  <b>\n```\nso", "<p>see:</p>\n<pre><code><img>\n\n  <b>\n</code></pre>\n<p>so</p>"),
        ("~~~~\n~~~\n~~~~", "<pre><code>~~~\n</code></pre>"),
        ("```\nnot closed", "<pre><code>not closed</code></pre>"),
        ("      ```\n      deep\n      ```", "<pre><code>deep\n</code></pre>"),
        ("no ```\n![x](y) fence", "<p>no ```\n![x](y) fence</p>"),
        ("> ```mermaid\n> <b>\n> ```", "<blockquote>\n<pre><code><b>\n</code></pre></blockquote>"),
        ("1. ```\n   a\n   ```\n2. b", "<ol>\n<li>\n<pre><code>a\n</code></pre>\n</li>\n<li>b</li>\n</ol>"),
    ],
)
def test_an_answer_may_format_text_and_show_code_but_neither_hold_html_nor_fetch_pictures(
    written: str, shown: str
) -> None:
    """`shown`, with what stands in code as it is read."""
    rendered = COMMONMARK.render(as_written(written)).strip()
    assert re.sub("<code>.*?</code>", lambda code: html.unescape(code[0]), rendered, flags=re.DOTALL) == shown


WORDS = "``` ```` ~~~ ![x](http://f/x) <img/src=//f/x> <b> </code> </pre> <pre> <!-- --> <? ]]> &lt; [x]: mermaid |-|"
PIECES = st.sampled_from(
    [*WORDS.split(), *"`\\!<>[]()|='\"#*a \t\r\n", "\n\n", "    ", "> ", "- ", "1. ", "$$", "![x][x]", "``"]
)


@given(st.lists(PIECES, max_size=25).map("".join))
def test_nothing_that_anybody_writes_is_html_or_a_picture(text: str) -> None:
    """To any parser: no tag but ours is left of an answer, no backtick (Gradio would draw diagrams) and no picture."""
    written = re.sub("</?(pre|code)>", "", as_written(text))
    assert not re.search(r"<|`|!\[", written)
    kinds = {token.type for shown in (written, as_typed(text)) for token in tokens(shown)}
    assert not kinds & {"image", "html_inline", "html_block"}


@given(st.lists(PIECES | st.text(max_size=3), max_size=12).map("".join), st.sampled_from(["", "> ", "- ", "10. "]))
def test_code_is_shown_character_for_character(code: str, lead: str) -> None:
    margin = lead if lead == "> " else " " * len(lead)
    lines = [f"{lead}~~~~~~~~~", *(margin + line for line in code.split("\n")), f"{margin}~~~~~~~~~"]
    (shown,) = re.findall("<code>(.*)</code>", as_written("\n".join(lines)))
    assert re.sub("&#([0-9]+);", lambda number: chr(int(number[1])), shown) == f"{code}\n"


def tokens(markdown: str) -> list[Token]:
    blocks = COMMONMARK.parse(markdown)
    return [token for block in blocks for token in (block, *(block.children or ()))]


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("what is <image>?", "what is &lt;image&gt;?"),
        ("**no** _format_", "\\*\\*no\\*\\* \\_format\\_"),
        ("# no heading", "\\# no heading"),
        ("- no list", "\\- no list"),
        ("1. no list", "1\\. no list"),
        ("    no code", "&nbsp;&nbsp;&nbsp;&nbsp;no code"),
        ("![](http://far.away/spy.png)", "!\\[\\](http://far.away/spy.png)"),
        ("What's the joke? It's 3-2!", "What's the joke? It's 3-2!"),
    ],
)
def test_a_question_is_shown_character_for_character(typed: str, shown: str) -> None:
    assert as_typed(typed) == shown


def test_a_copy_that_gradio_makes_of_a_talk_has_a_key_of_its_own() -> None:
    begun = talk(("q", "a", "stop"))
    copies = {deepcopy(begun).key for _ in range(3)} | {copy.key for copy in deepcopy(Match()).talks}
    assert len(copies | {begun.key}) == 6
    assert deepcopy(begun) == begun


def test_text_keeps_its_indentation_by_going_as_a_dictionary() -> None:
    shown = messages(talk(("q", "  indented", "stop")))
    assert shown[1]["content"][0] == {"type": "text", "text": "  indented"}


def test_pictures_are_shown_from_the_session_and_not_from_a_file() -> None:
    asked = Talk(Conversation().ask("What?", (RED, RED)).answer("Red.", "stop"), (Notes(),))
    picture, question, _ = messages(asked)[0]["content"]
    assert picture["value"].count("<img src='data:image/webp;base64,") == 2
    assert question["text"] == "What?"


@pytest.mark.parametrize(
    ("finish", "note"), [("stopped", "stopped by you"), ("length", "longest answer"), ("time", "time limit")]
)
def test_under_an_answer_stands_why_it_ended_and_how_fast_it_came(finish: str, note: str) -> None:
    foot = texts(messages(talk(("q", "a", finish), notes=Notes(0.123, 240.6))))[-1]
    assert note in foot
    assert "first word after 0.12 s · 241 tokens/s" in foot


def test_an_answer_that_ended_by_itself_says_so_and_how_fast_it_came() -> None:
    foot = texts(messages(talk(("q", "a", "stop"), notes=Notes(0.1, None))))[-1]
    assert foot.startswith("<div class='foot'>finished · first word after 0.10 s</div>")


def test_what_the_buttons_copy_and_let_edit_is_the_text_itself() -> None:
    acts = texts(messages(talk(("'q' <b>", "a & b", "stop"))))
    assert "data-act='edit' data-turn='0'" in acts[1]
    assert "data-text='&#x27;q&#x27; &lt;b&gt;'" in acts[1]
    assert "data-text='a &amp; b'" in acts[3]


@pytest.mark.parametrize(("finish", "offered"), [("length", True), ("stopped", True), ("stop", False)])
def test_an_answer_that_was_cut_can_be_continued_while_it_is_the_last(finish: str, offered: bool) -> None:
    shown = messages(talk(("q", "a", finish), ("r", "b", finish)))
    assert [bool(message.get("options")) for message in shown] == [False, False, False, offered]


def test_while_an_answer_streams_only_its_own_turn_is_drawn_anew() -> None:
    both = talk(("q", "a", "stop"), ("r", "b", "stopped"))
    for phase in ("writing", None):
        assert messages(both, phase, messages(both)[:2]) == messages(both, phase)


def test_while_an_answer_comes_only_the_last_turn_lacks_its_foot() -> None:
    shown = texts(messages(talk(("q", "a", "stopped"), ("r", "b", "stopped")), "writing"))
    assert [text for text in shown if "data-act" not in text] == ["q", "a", "r", "b"]
    assert "stopped by you" in shown[3]


@pytest.mark.parametrize(
    ("wait", "told"),
    [
        (Wait(0, None), "you are next …"),
        (Wait(2, None), "2 before you …"),
        (Wait(0, 0.2), "you are next, about 1 s …"),
        (Wait(3, 12.4), "3 before you, about 12 s …"),
        (Wait(9, 200.0), "9 before you, about 3 min …"),
    ],
)
def test_who_waits_is_told_the_place_and_about_how_long(wait: Wait, told: str) -> None:
    assert doing(Progress(Conversation(), "", "queued", wait=wait)) == f"Waiting for its turn: {told}"


def test_what_an_answer_is_doing_is_its_phase_until_it_is_done() -> None:
    assert [doing(Progress(Conversation(), "", phase)) for phase in ("reading", "writing", "done")] == [
        "reading",
        "writing",
        None,
    ]
    pictured = Talk(Conversation().ask("What?", (RED,)).answer("", "stopped"))
    assert "Reading the picture …" in texts(messages(pictured, "reading"))[-1]


def test_what_is_waited_for_is_shown_escaped() -> None:
    assert "Loading &lt;b&gt; …" in texts(messages(talk(("q", "", "stopped")), "Loading <b> …"))[-1]


def test_the_model_list_says_where_a_model_comes_from_and_that_stage_1_only_captions() -> None:
    built_in = Card("world", "a", "built-in", "instruct", "vicuna_v1", "pad")
    aligned = Card("mine", "b", "run", "align", "plain", "pad")
    shown = choices({"built-in/a": built_in, "run/b": aligned})
    assert shown == [("world · built in", "built-in/a"), ("mine · stage 1: only captions", "run/b")]


def test_models_of_one_name_are_told_apart_by_their_folder() -> None:
    cards = {folder: Card("mine", f"runs/{folder}", "run", "instruct", "vicuna_v1", "pad") for folder in ("a", "b")}
    assert [label for label, _ in choices(cards)] == ["mine (a) · trained here", "mine (b) · trained here"]


def test_the_status_escapes_what_a_card_says() -> None:
    assert "&lt;script&gt;" in status("<script>", state="ready", why="<b>")
    assert "<b>" not in status("<script>", state="ready", why="<b>")


def test_what_an_engine_is_doing_fits_on_a_line() -> None:
    snapshot = Snapshot(
        queued=1,
        answering=3,
        rows=4,
        tokens_held=900,
        tokens_read=250,
        tokens_reused=750,
        tokens_written=90,
        pictures_seen=1,
        pictures_reused=2,
        tokens_per_second=1234.5,
        seconds_to_first=0.123,
        cache_bytes=8_400_000,
    )
    assert activity(snapshot) == (
        "<p class='activity'>3 being answered · 1 waiting · 1,234 tokens/s while writing · first word after 0.12 s · "
        "75% of what was asked was read before · 8 MB remembered</p>"
    )


def test_an_engine_that_has_done_nothing_yet_promises_nothing() -> None:
    idle = Snapshot(0, 0, 4, 0, 0, 0, 0, 0, 0, None, None, 0)
    assert activity(idle) == "<p class='activity'>0 being answered · 0 waiting · 0 MB remembered</p>"


def test_what_the_model_did_not_see_is_said_under_the_answer() -> None:
    left_out = "The model reads 512 tokens at most and no longer sees the first question."
    foot = texts(messages(talk(("q", "a", "stop"), notes=Notes(0.1, None, left_out))))[-1]
    assert left_out in foot
