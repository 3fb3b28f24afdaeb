from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path

import gradio as gr
import pytest

from llava_app.checkpoints import Card, Outlook, write_card
from llava_app.conversation import Conversation
from llava_app.engine import Piece, Sampling
from llava_app.errors import BusyError, ModelError
from llava_app.ui.models import Models, Ready
from llava_app.ui.other_model import add

PATIENCE = 30  # s


class Silent:
    """An engine that remembers whether it was closed."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self.closed = False

    def answer(self, conversation: Conversation, sampling: Sampling) -> Iterator[Piece]:
        yield Piece("", "stop")

    def close(self) -> None:
        self.closed = True


def card(name: str, kind: str = "hub") -> Card:
    return Card(name, f"somewhere/{name}", kind, "instruct", "vicuna_v1", "pad")


def put_run(runs: Path, folder: str, name: str) -> None:
    (runs / folder).mkdir(parents=True)
    write_card(runs / folder, card(name, "run"))


@pytest.fixture
def loaded() -> list[Silent]:
    return []


@pytest.fixture
def models(loaded: list[Silent], tmp_path: Path) -> Models:
    """Starts with “first”; opens every card but “broken”."""

    def load(wanted: Card) -> Ready:
        if wanted.name == "broken":
            raise ModelError("broken is broken. Choose another one.")
        loaded.append(Silent(wanted))
        return Ready(loaded[-1], "It runs.")

    models = Models(load, lambda: (card("first"), "It fits."), runs=tmp_path)
    models.start()
    assert models.first.result(PATIENCE) == "somewhere/first"
    return models


def open_and_return(models: Models, wanted: Card) -> None:
    with models.lend(wanted) as ready:
        wait([ready], PATIENCE)


def test_the_first_model_loads_by_itself_and_says_why(models: Models) -> None:
    with models.lend(models.card("somewhere/first")) as ready:
        assert models.why("somewhere/first", ready.result(PATIENCE)) == "It fits. It runs."
        assert models.why("another", ready.result()) == "It runs."


def test_an_engine_can_be_looked_at_once_it_is_loaded(models: Models) -> None:
    assert models.loaded(card("big")) is None
    open_and_return(models, card("big"))
    engine = models.loaded(card("big"))
    assert engine is not None
    assert engine.card == card("big")
    open_and_return(models, card("broken"))
    assert models.loaded(card("broken")) is None


def test_its_state_follows_what_is_loaded(models: Models, tmp_path: Path) -> None:
    assert Models(pytest.fail, pytest.fail, runs=tmp_path).state == "loading"
    open_and_return(models, card("first"))
    assert models.state == "ready"
    assert [*models.engines()] == ["first"]
    hopeless = Models(pytest.fail, lambda: (card("broken"), ""), runs=tmp_path)
    hopeless.first.set_exception(ModelError("There is none."))
    assert hopeless.state == "failed"


def test_at_the_end_nothing_is_lent_any_more_and_answers_have_so_long(models: Models, loaded: list[Silent]) -> None:
    with models.lend(card("big")) as ready:
        ready.result(PATIENCE)
        models.close(0.1)
        assert [engine.closed for engine in loaded] == [True, True]
    assert models.state == "closing"
    with pytest.raises(BusyError, match="about to start anew"), models.lend(card("big")):
        pass


def test_two_tabs_share_one_engine(models: Models, loaded: list[Silent]) -> None:
    with models.lend(card("big")) as one, models.lend(card("big")) as other:
        assert one.result(PATIENCE) is other.result(PATIENCE)
    assert [engine.card.name for engine in loaded] == ["first", "big"]


def test_idle_engines_are_closed_before_another_model_loads(models: Models, loaded: list[Silent]) -> None:
    open_and_return(models, card("big"))
    open_and_return(models, card("bigger"))
    assert [(engine.card.name, engine.closed) for engine in loaded] == [
        ("first", True),
        ("big", True),
        ("bigger", False),
    ]


def test_a_model_that_does_not_fit_is_refused_before_another_is_closed_for_it(tmp_path: Path) -> None:
    opened: list[Silent] = []

    def load(wanted: Card) -> Ready:
        opened.append(Silent(wanted))
        return Ready(opened[-1], "It runs.")

    no = Outlook("llava", 10**12, 4096, "4bit", 1e12, 1e9, 0, "huge needs 1,000.0 GB. Choose a smaller model.")
    models = Models(
        load, lambda: (card("first"), ""), runs=tmp_path, weigh=lambda cards: {c: no for c in cards if c.name == "huge"}
    )
    models.start()
    open_and_return(models, card("first"))
    with models.lend(card("huge")) as ready, pytest.raises(ModelError, match=r"needs 1,000\.0 GB"):
        ready.result(PATIENCE)
    assert [(engine.card.name, engine.closed) for engine in opened] == [("first", False)]


def test_a_running_answer_is_waited_for_before_its_engine_is_closed(models: Models, loaded: list[Silent]) -> None:
    with models.lend(card("big")) as ready:
        ready.result(PATIENCE)
        with models.lend(card("bigger")) as other:
            with pytest.raises(TimeoutError):
                other.result(0.2)
            assert not ready.result().engine.closed
    open_and_return(models, card("bigger"))
    assert ready.result().engine.closed


def test_an_answer_that_runs_on_holds_the_next_model_up_to_a_limit(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava_app.ui.models.SWITCH_LIMIT", 0.1)
    with models.lend(card("big")) as ready:
        ready.result(PATIENCE)
        open_and_return(models, card("bigger"))
        assert ready.result().engine.closed


def test_built_in_engines_stay(models: Models, loaded: list[Silent]) -> None:
    open_and_return(models, card("small", "built-in"))
    open_and_return(models, card("big"))
    assert not next(engine for engine in loaded if engine.card.name == "small").closed


def test_a_model_that_failed_to_load_is_tried_again(models: Models) -> None:
    for _ in range(2):
        with models.lend(card("broken")) as ready, pytest.raises(ModelError):
            ready.result(PATIENCE)
    open_and_return(models, card("big"))


def test_a_finished_run_is_listed_without_a_restart(models: Models, tmp_path: Path) -> None:
    assert "run/mine" not in models.cards()
    put_run(tmp_path, "mine", "mine")
    assert models.cards()["run/mine"].kind == "run"


def test_a_model_keeps_its_key_when_another_of_the_same_name_appears(models: Models, tmp_path: Path) -> None:
    put_run(tmp_path, "monday", "mine")
    monday = models.cards()["run/monday"]
    put_run(tmp_path, "tuesday", "mine")
    assert models.cards()["run/monday"] == monday


def test_a_run_cannot_take_the_place_of_the_model_to_start_with(models: Models, tmp_path: Path) -> None:
    put_run(tmp_path, "first", "first")
    assert models.card("somewhere/first") == card("first")


def test_an_unknown_model_is_named(models: Models) -> None:
    with pytest.raises(ModelError, match="“nobody” is not in the list"):
        models.card("nobody")


def test_a_start_that_fails_is_told_to_whoever_waits(tmp_path: Path) -> None:
    def choose() -> tuple[Card, str]:
        raise ModelError("The built-in model is damaged. Install the app again.")

    models = Models(lambda wanted: Ready(Silent(wanted), ""), choose, runs=tmp_path)
    models.start()
    with pytest.raises(ModelError, match="damaged"):
        models.first.result(PATIENCE)


def test_what_is_typed_is_put_into_the_list_once(models: Models, tmp_path: Path) -> None:
    assert models.add("owner/name") == "owner/name"
    assert models.card("owner/name").kind == "hub"
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    keys = [models.add(str(tmp_path / "bare")) for _ in range(2)]
    assert keys == ["folder/bare"] * 2
    assert list(models.cards()).count("folder/bare") == 1
    assert models.add("memeworld") == "built-in/memeworld"
    with pytest.raises(ModelError, match="There is no model “nothing”"):
        models.add("nothing")


def test_a_wrong_name_is_said_and_the_choice_stays(models: Models) -> None:
    with pytest.warns(UserWarning, match="There is no model"):
        assert add(models, "nothing") == (gr.skip(), gr.skip())
    choice, box = add(models, " owner/name ")
    assert (choice["value"], box) == ("owner/name", "")
