"""A conversation of thirty questions with the built-in model, as the page's handlers lead it."""

from dataclasses import replace
from pathlib import Path

from llava_app.checkpoints import built_in
from llava_app.engine.local import LocalEngine
from llava_app.loading import load
from llava_app.ui.asked import Tab
from llava_app.ui.display import Talk, messages
from llava_app.ui.handlers import Handlers
from llava_app.ui.models import Models, Ready
from tests.serving import ROOT

JOKE = "What is the joke?"
AGAIN = ("What colour is the car?", "Where is the car?", "What does the text say?", "Describe the picture.")
QUESTIONS = [JOKE, *(AGAIN * 7), JOKE]
CONTEXT = 512  # tokens, half of what the model was made for: thirty questions do not fit


def test_thirty_turns_stay_about_the_picture_and_say_what_the_model_no_longer_sees(tmp_path: Path) -> None:
    loaded = load(built_in(), "float32")
    engine = LocalEngine(loaded, plan=replace(loaded.plan, length=CONTEXT))
    models = Models(lambda card: Ready(engine, ""), lambda: (built_in(), ""), runs=tmp_path)
    models.start()
    handlers, tab, talk = Handlers(models, []), Tab(), Talk()
    for number, question in enumerate(QUESTIONS):
        files = [] if number else [str(ROOT / "examples" / "memes" / "big-dog.png")]
        box = {"text": question, "files": files}
        talk, _, _ = handlers.send(box, tab, talk, "built-in/memeworld", 0.0, 1.0, 64, "")
        assert list(handlers.stream(tab, talk))
        talk, *_ = handlers.settle(tab, talk)
    answers = [turn.answer for turn in talk.conversation.turns]
    assert len(answers) == 30
    assert answers[0] == answers[29] == "The caption says a big dog. The picture shows a car, and that is the joke."
    assert sum("pink" in (answer or "") for answer in answers[1:29:4]) == 7
    left_out = [notes.left_out for notes in talk.notes]
    begins = next(number for number, said in enumerate(left_out) if said)
    assert begins > 9
    assert all(left_out[begins:])
    assert f"reads {CONTEXT} tokens at most and no longer sees the first" in messages(talk)[-1]["content"][-1]["value"]
    snapshot = engine.snapshot()
    assert snapshot.pictures_seen == 1  # looked at once, whatever was left out
    assert snapshot.tokens_reused > 5 * snapshot.tokens_read
    engine.close()
