import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from llava_app.chat import Progress, reply
from llava_app.checkpoints import Card, built_in
from llava_app.conversation import Conversation, Turn
from llava_app.engine import Piece, Sampling
from llava_app.engine.local import LocalEngine
from llava_app.errors import ContextError, UserError
from llava_app.images import open_image
from llava_app.loading import Loaded, load
from llava_app.prompts import tokenise

ASKED = Conversation().ask("What is funny?")


@dataclass
class ScriptedEngine:
    """Says what it was told to, then fails if it was told to."""

    script: list[Piece]
    error: Exception | None = None
    card: Card = field(default_factory=lambda: Card("Scripted", "", "run", "instruct", "vicuna_v1", "pad"))
    stopped: bool = False

    def answer(self, conversation: Conversation, sampling: Sampling) -> Iterator[Piece]:
        try:
            yield from self.script
            if self.error:
                raise self.error
        finally:
            self.stopped = True

    def close(self) -> None: ...


def replies(script: list[Piece]) -> list[Progress]:
    return list(reply(ScriptedEngine(script), ASKED, Sampling()))


def test_the_last_progress_holds_the_finished_conversation() -> None:
    last = replies([Piece("A ", tokens=1), Piece("joke.", "stop", 3)])[-1]
    assert (last.phase, last.text) == ("done", "A joke.")
    assert last.conversation == ASKED.answer("A joke.", finish="stop")


@pytest.mark.parametrize("finish", ["stop", "length", "time", "stopped"])
def test_the_answer_is_marked_with_the_reason_why_it_ended(finish: str) -> None:
    assert replies([Piece("A", finish, 1)])[-1].conversation.turns[-1].finish == finish


def test_phases_follow_the_engine() -> None:
    script = [Piece("", phase="queued"), Piece("", phase="reading"), Piece("A", tokens=1), Piece("", "stop", 2)]
    assert [progress.phase for progress in replies(script)] == ["queued", "reading", "writing", "done"]


def test_before_the_end_the_conversation_is_the_one_to_keep_if_somebody_stops() -> None:
    engine = ScriptedEngine([Piece("A ", tokens=1), Piece("joke.", "stop", 3)])
    answer = reply(engine, ASKED, Sampling())
    kept = next(answer).conversation
    answer.close()
    assert kept == ASKED.answer("A ", finish="stopped")
    assert engine.stopped


def test_a_reply_stopped_before_any_text_is_kept_empty_and_marked() -> None:
    answer = reply(ScriptedEngine([Piece("", phase="queued")]), ASKED, Sampling())
    assert next(answer).conversation == ASKED.answer("", finish="stopped")


def test_the_first_token_is_timed_and_the_speed_counts_the_tokens_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 100.5, 101.0, 102.0, 104.0])
    monkeypatch.setattr("llava_app.chat.time.monotonic", lambda: next(clock))
    script = [Piece("", phase="reading"), Piece("A", tokens=2), Piece(" joke", tokens=12), Piece(".", "stop", 22)]
    progress = replies(script)
    assert [p.seconds_to_first for p in progress] == [None, 1.0, 1.0, 1.0]
    assert [p.tokens_per_second for p in progress] == [None, None, 10 / 1, 20 / 3]


def test_an_engine_that_counts_no_tokens_has_a_first_time_but_no_speed() -> None:
    last = replies([Piece("A"), Piece(" joke.", "stop")])[-1]
    assert last.seconds_to_first is not None
    assert last.tokens_per_second is None


def test_a_user_error_is_passed_on_as_it_is() -> None:
    engine = ScriptedEngine([Piece("A", tokens=1)], ContextError("too long"))
    with pytest.raises(ContextError, match="too long"):
        list(reply(engine, ASKED, Sampling()))
    assert ASKED.is_open


def test_a_fault_is_told_with_an_id_that_finds_it_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    engine = ScriptedEngine([], RuntimeError("secret path"))
    with caplog.at_level(logging.ERROR), pytest.raises(UserError, match=r"error id [0-9a-f]{8}") as caught:
        list(reply(engine, ASKED, Sampling()))
    identifier = str(caught.value).split("error id ")[1][:8]
    assert "secret path" not in str(caught.value)
    assert identifier in caplog.text
    assert "secret path" in caplog.text
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    ("error", "outcome"), [(None, "stop"), (ContextError("too long"), "ContextError"), (RuntimeError(), "fault")]
)
def test_the_log_accounts_for_every_question(
    error: Exception | None, outcome: str, caplog: pytest.LogCaptureFixture
) -> None:
    script = [Piece("A ", tokens=1), Piece("joke.", None if error else "stop", 3)]
    with caplog.at_level(logging.INFO), suppress(UserError):
        list(reply(ScriptedEngine(script, error), ASKED, Sampling()))
    account = caplog.records[-1].account  # type: ignore[attr-defined]
    assert (account.outcome, account.tokens, account.turns, account.model) == (outcome, 3, 1, "Scripted")
    assert account.seconds >= account.seconds_to_first >= 0


def test_an_answer_that_nobody_reads_on_is_accounted_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        answer = reply(ScriptedEngine([Piece("A ", tokens=1), Piece("joke.", "stop", 3)]), ASKED, Sampling())
        next(answer)
        answer.close()
    assert caplog.records[-1].account.outcome == "left"  # type: ignore[attr-defined]


def test_a_real_engine_answers_and_the_conversation_goes_on(tiny_loaded: Loaded) -> None:
    engine = LocalEngine(tiny_loaded)
    sampling = Sampling(temperature=0, max_new_tokens=5)
    first = list(reply(engine, ASKED, sampling))[-1].conversation
    second = list(reply(engine, first.ask("Why?"), sampling))[-1]
    engine.close()
    assert [turn.question for turn in second.conversation.turns] == ["What is funny?", "Why?"]
    assert second.seconds_to_first is not None


def test_chat_needs_neither_torch_nor_gradio() -> None:
    code = "import sys, llava_app.chat; sys.exit(bool({'torch', 'transformers', 'gradio'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_continued_answer_keeps_what_was_written() -> None:
    cut = ASKED.answer("A joke", "length").resume()
    progress = list(reply(ScriptedEngine([Piece(" about", tokens=1), Piece(" cats.", "stop", 2)]), cut, Sampling()))
    assert [p.text for p in progress] == ["A joke about", "A joke about cats."]
    assert progress[-1].conversation == ASKED.answer("A joke about cats.", "stop")


def test_the_prompt_of_a_continued_answer_ends_with_its_beginning_and_no_end_token(tiny_loaded: Loaded) -> None:
    before = ASKED.answer("A joke </s> of 3", "length").ask("Why?")
    ids, _ = tokenise(
        before.answer("It is", "length").resume(), tiny_loaded.processor, picture_tokens=[], open_answer=True
    )
    asked, _ = tokenise(before, tiny_loaded.processor, picture_tokens=[], open_answer=True)
    decoded = tiny_loaded.processor.tokenizer.decode(ids)
    assert decoded.endswith("USER: Why? ASSISTANT: It is")
    assert ids[: len(asked)].tolist() == asked.tolist()
    assert ids.tolist().count(tiny_loaded.processor.tokenizer.eos_token_id) == 1  # of the first answer


def test_greedy_and_continued_is_the_answer_in_one_go() -> None:
    picture = open_image(Path(__file__).parents[1] / "examples" / "memes" / "big-dog.png")
    asked = Conversation().ask("Describe the picture.", (picture,))
    engine = LocalEngine(load(built_in(), "float32"))

    def answered(conversation: Conversation, tokens: int) -> Turn:
        sampling = Sampling(temperature=0, max_new_tokens=tokens)
        return list(reply(engine, conversation, sampling))[-1].conversation.turns[-1]

    whole, half = answered(asked, 100), answered(asked, 5)
    assert half.finish == "length"
    assert answered(Conversation((half,)).resume(), 95) == whole
    engine.close()
