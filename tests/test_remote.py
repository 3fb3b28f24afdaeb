import json
import logging
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from llava_app.checkpoints import DEMO, Card, built_in
from llava_app.conversation import Conversation, Turn
from llava_app.engine import Engine, Piece, Sampling, reading
from llava_app.engine import servers as pool
from llava_app.engine.local import LocalEngine
from llava_app.engine.remote import RemoteEngine
from llava_app.engine.servers import Servers
from llava_app.errors import BusyError, ContextError, ModelError, UserError
from llava_app.images import Picture, open_image
from llava_app.loading import load
from llava_app.video import open_clip
from tests.openai_server import Broken, Cut, Long, Slow, Status, openai_server
from tests.serving import PATIENCE, ROOT
from tests.test_video import film

GREEDY = Sampling(temperature=0, max_new_tokens=64)
ASKED = Conversation().ask("What is funny?")
MODEL = "scripted"


@contextmanager
def asking(*addresses: str, model: str = MODEL, silence: float = 20, **limits: float) -> Iterator[RemoteEngine]:
    with closing(Servers(addresses, silence=silence)) as servers:
        yield RemoteEngine(next(card for card in servers.cards() if card.source == model), servers, **limits)


def said(engine: Engine, conversation: Conversation, sampling: Sampling = GREEDY) -> tuple[str, str | None]:
    pieces = list(engine.answer(conversation, sampling))
    return "".join(piece.text for piece in pieces), pieces[-1].finish


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def said_chunk(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"id": "1", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}


def sse(*chunks: dict[str, Any], done: bool = True) -> str:
    """What a server streams."""
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + ("data: [DONE]\n\n" if done else "")


@contextmanager
def endless_server(
    port: int = 0, *, finish: str | None = None, dies: bool = False
) -> Iterator[tuple[str, threading.Event]]:
    """Begins an answer and goes on until the client hangs up, which sets the event, or `dies` after the first word.
    Keeps no connection."""
    listener = socket.create_server(("127.0.0.1", port))
    gone = threading.Event()

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                asked = connection.recv(65536)
                if asked.startswith(b"GET"):
                    body = json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]})
                    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
                    connection.sendall(f"{head}Connection: close\r\n\r\n{body}".encode())
                    continue
                chunk = sse(said_chunk("A ", finish), done=False)
                head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
                connection.sendall(f"{head}{chunk}".encode())
                while not dies and connection.recv(
                    65536
                ):  # the rest of the request, then nothing until the client hangs up
                    pass
                gone.set()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1", gone
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def hosted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The built-in model on a real server of transformers."""
    port, model = free_port(), DEMO / "memeworld"
    log = tmp_path_factory.mktemp("serve") / "serve.log"
    program = Path(sys.executable).parent / "transformers"
    command = [program, "serve", str(model), "--device", "cpu", "--port", str(port)]
    with log.open("wb") as output:
        server = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: answers(f"http://localhost:{port}/health") or server.poll() is not None)
        assert server.poll() is None, log.read_text(encoding="utf-8")
        yield f"http://localhost:{port}/v1#{model}"
    finally:
        server.kill()
        server.wait()


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:
        return False
    return True


def test_a_real_server_gives_the_same_greedy_answers_as_this_machine(hosted: str) -> None:
    memes = [open_image(ROOT / "examples" / "memes" / f"{name}.png") for name in ("big-dog", "orange-cats")]
    first = Conversation().ask("What is the joke?", [memes[0]])
    with asking(hosted, model=str(DEMO / "memeworld")) as remote, closing(LocalEngine(load(built_in()))) as local:
        assert remote.card.name == "memeworld"
        answer = said(local, first)
        assert said(remote, first) == answer
        assert answer[0].startswith("The caption says a big dog.")
        second = first.answer(answer[0]).ask("What do you see here?", [memes[1]])
        assert said(remote, second) == said(local, second)
        short = Sampling(temperature=0, max_new_tokens=3)
        assert said(remote, first, short) == said(local, first, short)
        told = Conversation(system="Answer the questions.").ask("What is a cat?")
        assert said(remote, told) == said(local, told)


def test_a_real_server_refuses_another_model(hosted: str) -> None:
    other = hosted.replace("#", "#no-such-")
    with asking(other, model=other.partition("#")[2]) as remote, pytest.raises(ModelError, match="does not know"):
        said(remote, ASKED)


def test_the_request_is_the_conversation_with_its_pictures_as_they_are(pictures: list[Picture]) -> None:
    asked: list[dict[str, Any]] = []
    sampling = Sampling(temperature=0.5, top_p=0.9, max_new_tokens=7, seed=3, stop=("###",))
    conversation = Conversation(system="Be brief.").ask("A?", pictures[:2]).answer("B.").ask("C?")
    with openai_server(["two words"], asked) as url, asking(url) as remote:
        assert said(remote, conversation, sampling) == ("two words", "stop")
    request = asked[0]
    shown = [part.pop("image_url")["url"] for part in request["messages"][1]["content"] if part["type"] == "image_url"]
    with urllib.request.urlopen(shown[1]) as file:
        assert open_image(file.read()).image.tobytes() == pictures[1].image.tobytes()
    assert request.pop("messages") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image_url"}] * 2 + [{"type": "text", "text": "A?"}]},
        {"role": "assistant", "content": "B."},
        {"role": "user", "content": [{"type": "text", "text": "C?"}]},
    ]
    plain = {"model": MODEL, "stream": True, "temperature": 0.5, "top_p": 0.9, "max_tokens": 7, "seed": 3}
    assert request == plain | {"stop": ["###"], "stream_options": {"include_usage": True}}


def test_a_clip_is_sent_as_eight_of_its_frames_and_that_is_said() -> None:
    asked: list[dict[str, Any]] = []
    conversation = Conversation().ask("What moves?", [open_clip(film("mp4"))])
    with openai_server(["a ball"], asked) as url, asking(url) as remote:
        pieces = list(remote.answer(conversation, GREEDY))
    assert pieces[0].left_out == "The server is shown 8 frames of the clip as separate pictures."
    assert "".join(piece.text for piece in pieces) == "a ball"
    kinds = [part["type"] for part in asked[0]["messages"][-1]["content"]]
    assert kinds == ["image_url"] * 8 + ["text"]


def test_what_is_not_of_the_protocol_is_sent_only_when_it_is_asked_for() -> None:
    asked: list[dict[str, Any]] = []
    with openai_server(["yes"], asked) as url, asking(url) as remote:
        said(remote, ASKED, Sampling(repetition_penalty=1.5, top_k=4))
    assert (asked[0]["repetition_penalty"], asked[0]["top_k"]) == (1.5, 4)


def tokens(engine: Engine) -> int:
    return list(engine.answer(ASKED, GREEDY))[-1].tokens


def test_tokens_are_those_that_the_server_counts() -> None:
    usage = {"choices": [], "usage": {"completion_tokens": 7}}
    counted = Broken(sse(said_chunk("two "), said_chunk("words"), said_chunk("", "stop"), usage))
    with openai_server([counted]) as url, asking(url) as remote:
        pieces = list(remote.answer(ASKED, GREEDY))
    assert [piece.tokens for piece in pieces if piece.text] == [1, 2]
    assert (pieces[-1].finish, pieces[-1].tokens) == ("stop", 7)


@pytest.mark.parametrize("code", [400, 422])
def test_a_server_that_does_not_count_is_asked_without_and_its_pieces_are_counted(code: int) -> None:
    asked: list[dict[str, Any]] = []

    def reply(request: dict[str, Any]) -> Any:
        return Status(code, message="Unknown field") if "stream_options" in request else "three words here"

    with openai_server(reply, asked) as url, asking(url) as remote:
        assert [tokens(remote), tokens(remote)] == [3, 3]
    assert ["stream_options" in request for request in asked] == [True, False, False]


@pytest.mark.parametrize("end", ["", 'data: {"error": "too late"}\n\n'])
def test_what_follows_the_finish_cannot_spoil_the_answer(end: str) -> None:
    whole = Broken(sse(said_chunk("whole"), said_chunk("", "stop"), done=False) + end)
    with openai_server([whole]) as url, asking(url) as remote:
        assert said(remote, ASKED) == ("whole", "stop")


def test_a_stream_that_is_left_open_after_the_finish_holds_the_answer_up_for_a_moment_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading, "AFTERWARDS", 0.1)
    with endless_server(finish="stop") as (url, gone), asking(url) as remote:
        assert said(remote, ASKED) == ("A ", "stop")
        assert gone.wait(PATIENCE)


def test_a_server_that_does_not_keep_to_the_limit_is_not_heard_out() -> None:
    asked: list[dict[str, Any]] = []
    many = Broken(sse(*[said_chunk("word " * 100)] * 100))
    with openai_server([many], asked) as url, asking(url) as remote:
        text, finish = said(remote, ASKED, Sampling(max_new_tokens=10))
    assert (len(text), finish) == (160, "length")


def test_an_answer_cut_at_the_limit_says_so() -> None:
    with openai_server([Long("and so on")]) as url, asking(url) as remote:
        assert said(remote, ASKED) == ("and so on", "length")


@pytest.mark.parametrize(
    ("reply", "error", "message"),
    [
        (Status(429), BusyError, "asked too much"),
        (Status(500), ModelError, r"failed \(code 500"),
        (Status(404, message="The model `x` does not exist."), ModelError, "does not know the model scripted"),
        (Status(400, message="maximum context length is 4096 tokens"), ContextError, "longer than scripted can read"),
        (Status(422, message="`inputs` tokens + `max_new_tokens` must be <= 4096"), ContextError, "longer than"),
        (Status(400, message="At most 0 image(s) may be provided"), ModelError, "cannot see pictures"),
        (Status(500, message="image input is not supported - provide the mmproj"), ModelError, "cannot see pictures"),
        (Status(422, message="Unexpected fields in the request: {'top_k'}"), ModelError, "one of the settings"),
        (Status(401), ModelError, "asks for a key"),
        (Status(400, message="context_length_exceeded"), ContextError, "longer than"),
        (Status(500, message="context canceled"), ModelError, r"failed \(code 500"),
        (Status(500, message="CUDA error: failed to create context"), ModelError, r"failed \(code 500"),
        (Status(400, message="At most 3 image(s) may be provided"), ModelError, "takes on its server is 3"),
        (Status(404, message="The model `my-vision` does not exist."), ModelError, "does not know the model"),
        (Cut("nothing"), ModelError, "broke off"),
        (Cut(), ModelError, "broke off"),
        (Broken(), ModelError, "something else than the OpenAI protocol"),
        (Broken("x" * 2_000_000), ModelError, "something else than the OpenAI protocol"),
        (Broken("{}"), ModelError, "something else than the OpenAI protocol"),
        (Broken('{"error": {"message": "maximum context length is 4096"}}'), ContextError, "longer than"),
        (Broken('{"error": {"message": "no", "code": 429}}'), BusyError, "asked too much"),
        (Broken('{"error": "out of memory"}'), ModelError, r"failed \(code 400"),
        (Broken('data: {"error": {"message": "context size", "code": 400}}\n\n'), ContextError, "longer than"),
        (Broken(sse(said_chunk("some"), {"error": {"message": "context canceled"}})), ModelError, r"failed \(code 500"),
        (Broken('data: {"choices": [{"del\n\n'), ModelError, "something else than the OpenAI protocol"),
        (Broken('data: {"choices": [{}]}\n\n'), ModelError, "something else than the OpenAI protocol"),
        (Broken('data: {"error": "out of memory"}\n\n'), ModelError, r"failed \(code 500"),
    ],
)
def test_what_goes_wrong_has_a_name(reply: Any, error: type[UserError], message: str, pictures: list[Picture]) -> None:
    with openai_server([reply]) as url, asking(url) as remote, pytest.raises(error, match=message):
        said(remote, Conversation().ask("What?", pictures[:1]))


ECHO = {"detail": [{"type": "extra_forbidden", "msg": "Extra inputs", "input": "SECRET\nimage of a context window"}]}


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Status(422, body=json.dumps(ECHO)), "one of the settings"),
        (Status(500, message="SECRET\nforged"), "code 500"),
        (Status(500, body="SECRET\nforged"), "code 500"),
        (Status(429, body='{"error": {"type": "SECRET\\nforged", "code": "SECRET"}}'), "too much"),
        (Broken(sse({"error": "SECRET\nforged"})), "code 500"),
        (Broken('{"error": "SECRET"}'), "code 400"),
        (Broken("data: SECRET\n\n"), "something else"),
    ],
)
def test_the_log_has_codes_and_never_the_words_of_a_server(
    reply: Any, message: str, pictures: list[Picture], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "llava_app")
    with openai_server([reply]) as url, asking(url) as remote, pytest.raises(UserError, match=message):
        said(remote, Conversation().ask("What?", pictures[:1]))
    assert "SECRET" not in caplog.text
    assert "forged" not in caplog.text
    if isinstance(reply, Status):
        assert f"code {reply.code}" in caplog.text


def test_a_name_that_would_forge_a_line_of_the_log_is_not_listed(caplog: pytest.LogCaptureFixture) -> None:
    with openai_server(["x"], models=["good", "bad\nforged"]) as url, closing(Servers([url])) as servers:
        assert [card.source for card in servers.cards()] == ["good"]
    assert "forged" not in caplog.text


@pytest.mark.parametrize("code", [302, 307])
def test_no_question_follows_a_redirect(code: int) -> None:
    asked: list[dict[str, Any]] = []
    with openai_server(["stolen"], asked) as other:
        there = Status(code, location=f"{other}/chat/completions")
        with openai_server([there]) as url, asking(url) as remote, pytest.raises(ModelError, match="does not follow"):
            said(remote, ASKED)
        with openai_server([there]) as url, openai_server(["here"]) as well, asking(url, well) as twin:
            assert said(twin, ASKED) == ("here", "stop")
    assert asked == []


def test_a_stream_that_ends_itself_after_the_text_is_whole_without_a_finish() -> None:
    with openai_server([Broken(sse(said_chunk("all said")))]) as url, asking(url) as remote:
        assert said(remote, ASKED) == ("all said", "stop")


def test_a_stream_that_ends_with_its_connection_is_not() -> None:
    with endless_server(dies=True) as (url, _), asking(url) as remote, pytest.raises(ModelError, match="broke off"):
        said(remote, ASKED)


def test_without_a_picture_no_server_is_said_to_be_blind() -> None:
    fault = Status(500, message="image")
    with openai_server([fault]) as url, asking(url) as remote, pytest.raises(ModelError, match="failed"):
        said(remote, ASKED)


def test_silence_has_an_end_and_signs_of_life_until_then() -> None:
    with openai_server([Slow(30)]) as url, asking(url, silence=0.5) as remote:
        answer = remote.answer(ASKED, GREEDY)
        assert next(answer) == Piece("", phase="queued")
        with pytest.raises(ModelError, match="said nothing for too long"):
            list(answer)


def test_an_answer_takes_no_longer_than_its_limit() -> None:
    with endless_server() as (url, gone), asking(url, time_limit=0.5) as remote:
        assert said(remote, ASKED) == ("A ", "time")
        assert gone.wait(PATIENCE)


def test_closing_the_iterator_aborts_the_request() -> None:
    with endless_server() as (url, gone), asking(url) as remote:
        answer = remote.answer(ASKED, GREEDY)
        while not next(answer).text:
            pass
        assert not gone.is_set()
        answer.close()  # type: ignore[attr-defined]
        assert gone.wait(PATIENCE)


def test_closing_the_engine_ends_its_answers() -> None:
    with endless_server() as (url, gone), asking(url) as remote:
        answer = remote.answer(ASKED, GREEDY)
        while not next(answer).text:
            pass
        remote.close()
        assert list(answer)[-1].finish == "stopped"
        assert gone.wait(PATIENCE)


def test_an_answer_that_was_cut_cannot_be_continued_elsewhere() -> None:
    with openai_server(["more"]) as url, asking(url) as remote, pytest.raises(ModelError, match="cannot continue"):
        said(remote, Conversation((Turn("A?", answer="B"),)))


def test_the_least_busy_server_is_asked() -> None:
    first: list[dict[str, Any]] = []
    second: list[dict[str, Any]] = []
    with openai_server([Slow(1, "one")], first) as one, openai_server(["two"], second) as two, asking(one, two) as both:
        slow = both.answer(ASKED, GREEDY)
        next(slow)
        wait_for(lambda: len(first) == 1)
        assert [said(both, ASKED)[0] for _ in range(3)] == ["two"] * 3
        assert "".join(piece.text for piece in slow) == "one"
    assert (len(first), len(second)) == (1, 3)


def test_a_dead_server_is_left_out_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "LOOK", 0.1)
    port = free_port()
    late = f"http://127.0.0.1:{port}/v1"
    with openai_server(["here"]) as alive, closing(Servers([late, alive])) as servers:
        assert [card.about for card in servers.cards()] == [f"Runs on {alive[7:-3]}."]
        with endless_server(port):
            wait_for(lambda: len(servers.offering(MODEL)) == 2)
            monkeypatch.setattr(pool, "LOOK", 60)
            time.sleep(0.3)  # the look that is due
        assert servers.offering(MODEL)[0].name == late[7:-3]  # nobody has noticed
        assert said(RemoteEngine(servers.cards()[0], servers), ASKED) == ("here", "stop")
        wait_for(lambda: [server.name for server in servers.offering(MODEL)] == [alive[7:-3]])


def test_the_models_of_a_server_that_went_away_stay_in_the_list() -> None:
    with endless_server() as (url, _):
        servers = Servers([url])
        listed = servers.cards()
        assert [card.source for card in listed] == [MODEL]
        assert servers.offering(MODEL)
    with closing(servers):
        servers.start(servers.look()).result(PATIENCE)
        assert (servers.cards(), servers.offering(MODEL)) == (listed, [])
        with pytest.raises(ModelError, match="No server with scripted can be reached"):
            said(RemoteEngine(listed[0], servers), ASKED)


@pytest.mark.parametrize("fault", [Status(503, message="Loading model"), Status(429), Status(404), Broken()])
def test_a_server_that_fails_at_once_does_not_swallow_the_questions(fault: Any) -> None:
    asked: list[dict[str, Any]] = []
    with openai_server([fault], asked) as failing, openai_server(["here"]) as well, asking(failing, well) as twin:
        assert [said(twin, ASKED) for _ in range(4)] == [("here", "stop")] * 4
    assert len(asked) == 1


def test_the_question_s_own_fault_is_told_by_the_first_server() -> None:
    asked: list[dict[str, Any]] = []
    with (
        openai_server([Status(401)]) as one,
        openai_server(["no"], asked) as two,
        asking(one, two) as both,
        pytest.raises(ModelError, match="asks for a key"),
    ):
        said(both, ASKED)
    assert asked == []


def test_when_every_server_fails_the_first_that_says_why_is_told() -> None:
    with (
        openai_server([Status(429)]) as busy,
        openai_server([Status(500)]) as faulty,
        asking(busy, faulty) as both,
        pytest.raises(BusyError, match="asked too much"),
    ):
        said(both, ASKED)


def test_when_nobody_takes_the_connection_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with endless_server() as (url, _):
        servers = Servers([url])
    with closing(servers), pytest.raises(ModelError, match="No server with scripted can be reached"):
        said(RemoteEngine(servers.cards()[0], servers), ASKED)
    assert "gave no answer" in caplog.text


def test_a_model_is_listed_once_and_one_that_a_server_does_not_list_can_be_named() -> None:
    with (
        openai_server(["a"]) as one,
        openai_server(["b"]) as two,
        closing(Servers([one, f"{two}#org/model"])) as servers,
    ):
        cards = {card.source: card for card in servers.cards()}
    assert list(cards) == [MODEL, "org/model"]
    assert cards[MODEL].about == f"Runs on {one[7:-3]} and {two[7:-3]}."
    assert (cards["org/model"].name, cards["org/model"].kind) == ("model", "server")


def test_a_server_that_takes_its_time_to_list_its_models_is_not_waited_for_and_not_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "CONNECT", 0.5)
    monkeypatch.setattr(pool, "LOOK", 600)
    listing = threading.Event()
    with openai_server(["here"], listing=listing) as url, closing(Servers([url])) as servers:
        assert servers.cards() == []
        listing.set()
        wait_for(lambda: bool(servers.offering(MODEL)))


def test_strangers_are_not_told_where_a_model_runs_and_lies() -> None:
    from llava_app.ui.models import Models

    paths = ("/home/alice/secret/mine", "/srv/secret/mine", r"C:\secret\mine.gguf")
    with openai_server(["x"], models=[*paths, "org/mine"]) as url, closing(Servers([url])) as servers:
        cards = servers.cards(public=True)
        models = Models(pytest.fail, pytest.fail, runs=Path("nowhere"), elsewhere=lambda: cards)
    assert [card.name for card in cards] == ["mine", "mine", "mine.gguf", "mine"]
    assert {card.about for card in cards} == {"Runs on a server."}
    keys = {key: card.source for key, card in models.cards().items() if card.kind == "server"}
    assert list(keys.values()) == [*paths, "org/mine"]
    assert list(keys)[-1] == "org/mine"
    assert all(key.startswith("server/mine") and "secret" not in key for key in list(keys)[:-1])


@pytest.mark.parametrize("address", ["host:8000", "ftp://host/v1", "http://", ""])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="is no address of a server"):
        Servers([address])


def test_the_page_lists_the_models_of_servers_beside_its_own(tmp_path: Path) -> None:
    from llava_app.ui.display import choices
    from llava_app.ui.models import Models, ask_remotely, connect

    assert connect([]) is None
    with openai_server(["from afar"]) as url:
        servers = connect([url])
        assert servers is not None
        models = Models(
            lambda card: ask_remotely(card, servers), lambda: (built_in(), ""), runs=tmp_path, elsewhere=servers.cards
        )
        models.start()
        assert ("scripted · on a server", MODEL) in choices(models.cards())
        with models.lend(models.card(MODEL)) as ready:
            assert said(ready.result(PATIENCE).engine, ASKED) == ("from afar", "stop")
        servers.close()
    assert isinstance(models.card(MODEL), Card)
