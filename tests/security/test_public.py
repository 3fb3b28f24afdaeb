"""What strangers can reach of a public page."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_app.checkpoints import HUB_PRESETS, Card, built_in
from llava_app.limits import PUBLIC
from llava_app.ui.models import Models
from tests.security.conftest import Public
from tests.security.visitor import Visitor
from tests.serving import PATIENCE, ROOT

BUILD = """
import json, pathlib, tempfile
from llava_app.ui.models import Models
from llava_app.ui.page import build
runs = pathlib.Path(tempfile.mkdtemp())
pages = {"private": {}, "public": {"public": True}, "feedback": {"public": True, "feedback": True}}
configs = {name: build(Models(None, None, runs=runs), runs, **how).config for name, how in pages.items()}
print(json.dumps(configs, default=str))
"""


@pytest.fixture(scope="module")
def configs() -> dict[str, dict[str, Any]]:
    """What pages are made of. In a process of its own, since Gradio leaves an event loop open for each."""
    told = subprocess.run([sys.executable, "-c", BUILD], cwd=ROOT, capture_output=True, check=True, timeout=PATIENCE)
    return json.loads(told.stdout)


@pytest.fixture(scope="module")
def private_events(configs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The events of a page of one's own, with all its tabs."""
    return configs["private"]["dependencies"]


def test_a_public_page_has_the_chat_alone(visitor: Visitor, private_events: list[dict[str, Any]]) -> None:
    config = visitor.config
    assert not [part for part in config["components"] if part["type"] in ("tabs", "tabitem", "file", "dataframe")]
    chat = {event["api_name"] for event in config["dependencies"]}
    everywhere = {event["api_name"] for event in private_events}
    assert {"send", "stream", "ask"} < chat < everywhere
    assert not chat & {"run", "start", "first", "decide", "export_1", "preview", "look", "plan", "resume_1"}


def test_every_event_of_the_other_tabs_refuses(
    public: Public, visitor: Visitor, private_events: list[dict[str, Any]]
) -> None:
    offered = visitor.config["dependencies"]
    names = {event["api_name"] for event in offered}
    tried = 0
    for event in private_events:
        if event["api_name"] in names:
            continue
        data = [None] * len(event["inputs"])
        for route in ("api", "run", "call"):
            answer = visitor.http.post(f"gradio_api/{route}/{event['api_name']}", json={"data": data})
            assert answer.status_code >= 400, event["api_name"]
        tried += 1
    assert tried > 25
    beyond = range(len(offered), len(private_events))
    for number in beyond:
        assert not visitor.call({"id": number}, [None] * 12).success
    assert not list((public.folder / "runs").glob("*"))


def test_no_private_event_answers_to_its_name_and_none_is_told_about(visitor: Visitor) -> None:
    told = visitor.http.get("gradio_api/info").json()
    assert list(told["named_endpoints"]) == ["/ask"]
    assert not told["unnamed_endpoints"]


def test_a_vote_keeps_nothing_unless_the_owner_wants_it(public: Public, visitor: Visitor) -> None:
    visitor.ask("What?")
    for name in ("vote", "correct"):
        event_data = {"turn": 0, "vote": "up", "text": "Better."}
        assert visitor.call(name, [None, "scripted"], event_data=event_data).success
    assert not (public.folder / "runs" / "feedback").exists()


def test_feedback_is_kept_on_a_public_page_where_that_is_asked_for(configs: dict[str, dict[str, Any]]) -> None:
    def windows(name: str) -> list[Any]:
        return [part["props"]["elem_classes"] for part in configs[name]["components"] if part["type"] == "chatbot"]

    assert (windows("public"), windows("feedback")) == ([["no-votes"]], [[]])


@pytest.mark.parametrize("key", ["meta-llama/Llama-3.2-11B", "/etc", "../..", "folder/x", "llava-hf/llava-1.5-13b-hf"])
def test_a_model_that_is_not_offered_is_not_loaded(public: Public, visitor: Visitor, key: str) -> None:
    asked = len(public.asked)
    assert "is not in the list" in visitor.ask("What?", model=key).words or "Value" in visitor.ask("?", model=key).words
    outcome = visitor.call("ask", [[], "What?", [], {"model": key}])
    assert "There is no model" in (outcome.error or "")
    assert len(public.asked) == asked


def test_a_public_page_fetches_small_models_only_and_only_where_the_first_is_small(tmp_path: Path) -> None:
    def offered(first: Card) -> set[str]:
        models = Models(lambda card: pytest.fail("loads"), lambda: (first, ""), runs=tmp_path, public=True)
        models._load_first = lambda choose: None
        models._pinned = (first,)
        return {card.name for card in models.cards().values() if card.kind == "hub"}

    big = next(card for card in HUB_PRESETS if card.name == "LLaVA-1.5-7B")
    assert offered(built_in()) == {"LLaVA-OneVision-0.5B", "LLaVA-Interleave-0.5B"}
    assert offered(big) == {"LLaVA-1.5-7B"}


def test_a_public_page_shows_its_shorter_answers_in_the_settings(visitor: Visitor) -> None:
    sliders = [part["props"] for part in visitor.config["components"] if part["props"].get("label") == "Longest answer"]
    assert [slider["maximum"] for slider in sliders] == [PUBLIC.new_tokens]


def test_every_visitor_begins_with_nothing(public: Public, visit: Callable[[], Visitor]) -> None:
    visit().ask("My secret is pomegranate.")
    with visit() as other:
        assert "pomegranate" not in other.ask("What is the secret?").everything
    told = [message for request in public.asked[-1:] for message in request["messages"]]
    assert "pomegranate" not in str(told)
