from hypothesis import assume, example, given
from hypothesis import strategies as st

from llava_app.engine.stream import StopText

CHUNKS = st.lists(st.text("abc", max_size=4), max_size=10)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


def shown(stops: list[str], chunks: list[str]) -> str:
    stop_text = StopText(stops)
    return "".join([stop_text.push(chunk) for chunk in chunks]) + stop_text.flush()


@given(STOPS, CHUNKS)
def test_the_text_up_to_the_first_stop_is_shown_whatever_the_pieces(stops: list[str], chunks: list[str]) -> None:
    assume(not any(one != other and one in other for one in stops for other in stops))
    text = "".join(chunks)
    assert shown(stops, chunks) == text[: min((text.index(stop) for stop in stops if stop in text), default=None)]


@given(STOPS, CHUNKS)
@example(["abca", "bc"], ["a", "b", "c", "a"])
def test_the_pieces_make_no_difference(stops: list[str], chunks: list[str]) -> None:
    assert shown(stops, chunks) == shown(stops, ["".join(chunks)])


@given(STOPS, CHUNKS)
def test_only_what_may_become_a_stop_is_held_back(stops: list[str], chunks: list[str]) -> None:
    stop_text, out = StopText(stops), ""
    for count, chunk in enumerate(chunks, start=1):
        out += stop_text.push(chunk)
        held = "".join(chunks[:count])[len(out) :]
        assert stop_text.reached or not held or any(stop.startswith(held) for stop in stops)


def test_a_stop_is_found_behind_a_beginning_of_itself() -> None:
    assert shown(["aab"], list("caaabc")) == "ca"


def test_nothing_comes_after_a_stop() -> None:
    stop_text = StopText(["\n", "USER:"])
    assert [stop_text.push(piece) for piece in ("Yes. US", "ER", ": no", "\n")] == ["Yes. ", "", "", ""]
    assert stop_text.reached
    assert stop_text.flush() == ""


def test_a_beginning_that_comes_to_nothing_is_shown() -> None:
    stop_text = StopText(["USER:"])
    assert [stop_text.push("US"), stop_text.push("A"), stop_text.push(" US")] == ["", "USA", " "]
    assert stop_text.flush() == "US"
    assert not stop_text.reached
