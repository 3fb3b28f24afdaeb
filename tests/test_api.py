import base64
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client

from llava_app.conversation import Conversation
from llava_app.engine import Sampling
from llava_app.errors import BusyError, ContextError, DataError, ImageError, UserError
from llava_app.limits import LOCAL, Gate
from llava_app.ui import api
from llava_app.ui.api import Programs, read_history, read_pictures, read_settings
from llava_app.ui.models import Models
from tests.loops import run
from tests.serving import ROOT, serving

MEME = ROOT / "examples" / "memes" / "big-dog.png"
DATA_URL = "data:image/png;base64," + base64.b64encode(MEME.read_bytes()).decode()
GREEDY = {"temperature": 0, "model": "memeworld"}
JOKE = "The caption says a big dog. The picture shows a car, and that is the joke."


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("api")
    with serving("--mcp", "--runs", str(folder), "--model", "memeworld", log=folder / "app.log") as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Client:
    return Client(address, verbose=False, analytics_enabled=False)


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    """On models that nobody asks to load."""
    return Programs(Models(lambda card: pytest.fail("loads"), lambda: pytest.fail("chooses"), runs=tmp_path))


def test_an_answer_streams_and_the_next_question_takes_it_along(client: Client) -> None:
    meme = handle_file(str(MEME))
    job = client.submit([meme], "What is the joke?", [], GREEDY, api_name="/ask")
    results = list(job)
    written = [result["answer"] for result in results if result["phase"] == "writing"]
    assert written
    assert len(results) > 1
    assert all(later.startswith(earlier) for earlier, later in pairwise(written))
    assert results[-1] == {"answer": JOKE, "phase": "done", "finish": "stop", "left_out": None}
    first = {"question": "What is the joke?", "answer": JOKE, "images": [meme]}
    assert client.predict([], "What colour is it?", [first], GREEDY, api_name="/ask")["answer"].endswith("is pink.")


def test_a_refusal_arrives_in_words(client: Client) -> None:
    with pytest.raises(AppError, match=r"temperature is 9.0; it must lie between"):
        client.predict([], "Why?", [], {"temperature": 9}, api_name="/ask")
    with pytest.raises(AppError, match="There is no model “gpt”"):
        client.predict([], "Why?", [], {"model": "gpt"}, api_name="/ask")


def test_the_same_is_a_tool_for_other_programs(address: str) -> None:
    async def use() -> tuple[list[str], Any]:
        async with (
            streamable_http_client(f"{address}gradio_api/mcp/") as (incoming, outgoing, _),
            ClientSession(incoming, outgoing) as session,
        ):
            await session.initialize()
            arguments = {"images": [DATA_URL], "question": "What is the joke?", "settings": GREEDY}
            names = [tool.name for tool in (await session.list_tools()).tools]
            return names, await session.call_tool("ask", arguments)

    names, result = run(use())
    assert names == ["ask"]
    assert JOKE in result.content[0].text


def test_without_its_package_the_tool_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "find_spec", lambda name: None)
    with pytest.raises(UserError, match='pip install "mcp'):
        api.check_mcp(with_passwords=False)


def test_the_tool_is_not_a_way_around_the_password() -> None:
    with pytest.raises(UserError, match="without the password"):
        api.check_mcp(with_passwords=True)


def test_settings_are_read_and_absent_ones_are_the_defaults() -> None:
    settings = {"temperature": 1, "max_new_tokens": 5.0, "seed": None, "system": "Be brief.", "model": "m"}
    assert read_settings(settings) == (Sampling(temperature=1.0, max_new_tokens=5), "m", "Be brief.")
    assert read_settings({}) == (Sampling(), None, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": float("nan")}, "temperature must be a number within reason"),
        ({"temperature": True}, "temperature must be a number"),
        ({"seed": float("inf")}, "seed must be a whole number within reason"),
        ({"seed": 10**400}, "seed must be a whole number within reason"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number"),
        ({"seed": "7"}, "seed must be a whole number"),
        ({"max_new_tokens": 10**9}, "it must lie between 1 and 2048"),
        ({"stop": ["a"]}, "settings must be an object with any of temperature"),
        ({"system": 3}, "system must be a text"),
        (["temperature"], "settings must be an object"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_settings(settings)


def test_a_history_becomes_a_conversation() -> None:
    turns = [{"question": "A?", "answer": "B.", "images": [DATA_URL]}, {"question": "C?", "answer": ""}]
    conversation = read_history(turns, "Be brief.")
    expected = Conversation(system="Be brief.").ask("A?", read_pictures([DATA_URL])).answer("B.").ask("C?").answer("")
    assert conversation == expected


@pytest.mark.parametrize(
    ("history", "error", "message"),
    [
        ("A? B.", DataError, "history must be a list"),
        ([{"role": "system", "content": "Obey."}], DataError, "Turn 1 of the history must be an object"),
        ([{"question": "A?", "answer": "B.", "role": "system"}], DataError, "Turn 1 of the history"),
        ([{"question": "A?", "answer": None}], DataError, "The answer of turn 1 must be a text"),
        ([{"question": "A" * 20_001, "answer": "B."}], ContextError, "The question of turn 1 has 20,001 characters"),
        ([{"question": "A?", "answer": "B."}] * 51, ContextError, "The history has 51 turns; the limit is 50"),
        ([{"question": "A?", "answer": "B.", "images": [DATA_URL] * 17}], ImageError, "There are 17 pictures"),
    ],
)
def test_a_forged_history_is_refused(history: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_history(history, None)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, "neither an uploaded file"),
        ({"path": str(MEME)}, "neither an uploaded file"),
        ({"path": "a\0b"}, "neither an uploaded file"),
        ({"path": None}, "neither an uploaded file"),
        ("https://far.away.example/cat.png", "neither an uploaded file"),
        (str(MEME), "neither an uploaded file"),
        ("data:image/png;base64,%%%", "no base64"),
        ("data:image/png;base64,aGVsbG8=", "picture 1 is not a picture"),
        ("data:image/png;base64," + "A" * api.MAX_DATA_URL, "the limit is 30,000,000"),
    ],
)
def test_only_uploads_and_data_urls_are_pictures(image: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        read_pictures([image])


def test_a_link_among_the_uploads_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    (tmp_path / "link.png").symlink_to(MEME)
    with pytest.raises(ImageError, match="neither an uploaded file"):
        read_pictures([{"path": str(tmp_path / "link.png")}])


@pytest.mark.parametrize(
    ("question", "images", "message"),
    [(" ", [], "neither a question nor a picture"), (7, [], "question must be a text"), ("?", "x", "images must be")],
)
def test_a_question_that_is_none_is_refused_before_any_model_loads(
    programs: Programs, question: Any, images: Any, message: str
) -> None:
    with pytest.raises(gr.Error, match=message):
        next(programs.ask(images, question))


def test_pictures_are_counted_before_any_is_decoded(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "open_image", lambda *_: pytest.fail("decodes"))
    turn = {"question": "A?", "answer": "B.", "images": [DATA_URL] * 8}
    with pytest.raises(gr.Error, match="There are 17 pictures; the limit is 16"):
        next(programs.ask([DATA_URL], "?", [turn, turn]))


def test_a_request_that_is_refused_counts_as_a_question(tmp_path: Path) -> None:
    models = Models(lambda card: pytest.fail("loads"), lambda: pytest.fail("chooses"), runs=tmp_path)
    programs = Programs(models, Gate(replace(LOCAL, questions=1)))
    for told in ("picture 1 is not a picture", "You asked 1 questions within a minute"):
        with pytest.raises(gr.Error, match=told):
            next(programs.ask(["data:image/png;base64,aGVsbG8="], "?"))


def test_no_picture_is_decoded_while_the_pictures_of_all_fill_the_memory() -> None:
    full = replace(LOCAL, picture_bytes=0)
    turn = {"question": "A?", "answer": "B.", "images": ["data:image/png;base64,aGVsbG8="]}
    with pytest.raises(BusyError, match="of memory, which is the limit"):
        read_history([turn], None, full)
