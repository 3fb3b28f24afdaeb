"""A scene as text, for a language model that has no eyes yet."""

import random

from finetune.memeworld.talk import PLACE, SETTING, capital, description, listing, noun, text_answer
from finetune.memeworld.world import Scene


def as_text(rng: random.Random, scene: Scene) -> str:
    """The scene described in one of several styles and orders, complete in each."""
    return rng.choice((_as_prose, _as_notes, _as_words))(rng, scene)


def _as_prose(rng: random.Random, scene: Scene) -> str:
    if rng.random() < 0.5:
        return description(scene)
    things = [f"{noun(thing, coloured=True, sized=True)} {PLACE[thing.place]}" for thing in scene.things]
    rng.shuffle(things)
    parts = [f"{capital(listing(things))}.", f"It is {SETTING[scene.background]}.", text_answer(scene)]
    rng.shuffle(parts)
    return " ".join(parts)


def _as_notes(rng: random.Random, scene: Scene) -> str:
    notes = [f"{thing.place}: {thing.size} {thing.colour} {thing.kind}" for thing in scene.things]
    text = " / ".join(line for line in scene.lines() if line)
    notes += [f"text: {text or 'none'}", f"background: {scene.background}"]
    rng.shuffle(notes)
    return "; ".join(notes)


def _as_words(rng: random.Random, scene: Scene) -> str:
    """Words in reading order, much as patches lie in a picture: top line, things from left to right, bottom line."""
    top, bottom = scene.lines()
    middle = []
    for thing in scene.things:
        words = [thing.kind, thing.colour, thing.size, thing.place]
        rng.shuffle(words)
        middle.append(" ".join(words * rng.choice((1, 1, 2))))
    return " | ".join([top or scene.background, *middle, scene.background, bottom or scene.background])
