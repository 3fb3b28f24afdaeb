"""Who may have how many tabs, and whose contents go when there are too many."""

import pytest
from gradio.state_holder import StateHolder

from llava_app.errors import BusyError
from llava_app.ui import tabs as module
from llava_app.ui.tabs import ASLEEP, IDLE, Tabs


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


class Page:
    """What calls the tabs, and Gradio, which makes room for the contents of each that calls."""

    def __init__(self, most: int) -> None:
        self.tabs = Tabs(most)
        self.kept = StateHolder()

    def use(self, name: str, visitor: str = "me") -> None:
        self.tabs.enter(name, visitor, self.kept)
        self.kept.session_data[name] = object()  # type: ignore[assignment]


def test_a_visitor_has_so_many_tabs_and_another_has_as_many(clock: list[float]) -> None:
    page = Page(2)
    page.use("1"), page.use("2"), page.use("1")
    with pytest.raises(BusyError, match=r"You have 2 tabs of this page open, which is the limit\. Close some"):
        page.use("3")
    page.use("4", "another")
    page.tabs.leave("2")
    page.use("3")
    assert not any(page.tabs.is_lost(name) for name in "1234")


def test_a_tab_that_sleeps_makes_room_for_its_visitor_alone_and_is_lost(clock: list[float]) -> None:
    page = Page(2)
    page.use("other", "another"), page.use("1"), page.use("2")
    clock[0] = ASLEEP + 1
    page.use("2"), page.use("3")
    assert [page.tabs.is_lost(name) for name in ("other", "1", "2", "3")] == [False, True, False, False]
    assert list(page.kept.session_data) == ["other", "2", "3"]


def test_a_tab_where_nobody_is_any_more_is_lost(clock: list[float]) -> None:
    page = Page(2)
    page.use("1")
    clock[0] = IDLE + 1
    page.use("2", "another")
    assert (page.tabs.is_lost("1"), list(page.kept.session_data)) == (True, ["2"])


def test_a_tab_is_lost_when_its_contents_were_taken_away(clock: list[float]) -> None:
    page = Page(2)
    page.tabs.enter("1", "me", page.kept)  # its first event was not taken
    page.use("1"), page.use("1")
    assert not page.tabs.is_lost("1")
    page.kept.session_data.clear()
    page.use("1")
    assert page.tabs.is_lost("1")


def test_the_names_of_lost_tabs_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_LOST", 2)
    page = Page(9)
    for name in "123":
        page.tabs.lose(name, page.kept)
    assert [page.tabs.is_lost(name) for name in "123"] == [False, True, True]
