"""Pictures for people: the example memes of the page, and a sheet of memes with a model's own answers."""

import json
import textwrap
from itertools import count, islice
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from finetune.evaluate.memeworld import as_upload
from finetune.memeworld.draw import draw
from finetune.memeworld.world import make_scene
from llava_app.conversation import Conversation
from llava_app.engine import Engine, Sampling

SIDE = 448  # of an example meme; drawn at twice that, so that its edges are smooth
EXAMPLES = {  # name: number in the split "heldout", question
    "big-dog": (7, "What is the joke?"),
    "orange-cats": (9, "Why is this funny?"),
    "red-flower": (4, "Explain the joke."),
    "two-hearts": (14, "What is funny here?"),
    "blue-dog": (15, "Is this a joke?"),
    "proud-cat": (16, "Describe the picture."),
}
SHEET_QUESTION = "What is the joke?"


def write_examples(folder: Path) -> None:
    """Write `folder`/memes/*.png and `folder`/questions.json, which the page offers."""
    (folder / "memes").mkdir(parents=True, exist_ok=True)
    for name, (index, _) in EXAMPLES.items():
        meme(index).save(folder / "memes" / f"{name}.png", optimize=True)
    offered = [{"image": f"memes/{name}.png", "question": question} for name, (_, question) in EXAMPLES.items()]
    (folder / "questions.json").write_text(json.dumps(offered, indent=2) + "\n", encoding="utf-8")


def meme(index: int, split: str = "heldout") -> Image.Image:
    """One picture of a split, large and smooth."""
    return draw(make_scene(split, index), index, 2 * SIDE).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def write_sheet(engine: Engine, path: Path, *, memes: int = 12, columns: int = 4) -> None:
    """The first memes of "heldout" that have a caption, each above the model's own answer: nothing is selected."""
    cell, text_height, margin = 300, 88, 16
    captioned = list(islice((index for index in count() if make_scene("heldout", index).claim), memes))
    rows = -(-len(captioned) // columns)
    sheet = Image.new(
        "RGB", (columns * (cell + margin) + margin, rows * (cell + text_height + margin) + margin), "white"
    )
    canvas = ImageDraw.Draw(sheet)
    for place, index in enumerate(captioned):
        x = margin + place % columns * (cell + margin)
        y = margin + place // columns * (cell + text_height + margin)
        sheet.paste(meme(index).resize((cell, cell), Image.Resampling.LANCZOS), (x, y))
        lines = "\n".join(textwrap.wrap(answer_about(engine, index), 40))
        canvas.multiline_text((x + 2, y + cell + 10), lines, "#26222f", ImageFont.load_default(15), spacing=5)
    sheet.save(path, optimize=True)


def answer_about(engine: Engine, index: int) -> str:
    """What the model says the joke of a held-out meme is."""
    picture = as_upload(meme(index), f"meme-{index}.png")
    conversation = Conversation().ask(SHEET_QUESTION, [picture])
    pieces = engine.answer(conversation, Sampling(temperature=0, max_new_tokens=96))
    return "".join(piece.text for piece in pieces).strip()
