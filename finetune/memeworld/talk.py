"""Scene → what can be said about it: questions with the one right answer, captions and descriptions."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from finetune.memeworld import world
from finetune.memeworld.phrasings import STRANGERS, UNSEEN, phrase
from finetune.memeworld.world import COLOURS, KINDS, NUMBERS, Scene, Thing, plural, with_article

PLACE = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
SETTING = {
    "meadow": "in a meadow", "beach": "on a beach", "night": "at night", "snow": "in the snow", "room": "in a room",
}  # fmt: skip
BACKGROUND = {"meadow": "a meadow", "beach": "a beach", "night": "the night sky", "snow": "snow", "room": "a room"}

NO_PERSON = "I cannot tell who somebody is: I only know drawn things."
NO_MIND = "I cannot read minds: I only see what is drawn."
NO_PICTURE = "Please show me a picture first."
NOT_MINE = "I only know my drawn world. Ask me about the picture."
HELLO = "Hello! Ask me about the picture."
THANKS = "You are welcome!"

# How often a dialogue asks each kind; explaining the joke is what this model is for.
WEIGHTS = {
    "joke": 22, "what": 9, "colour": 8, "where": 8, "count": 8, "count_all": 2, "size": 7, "background": 6, "text": 9,
    "exists": 8, "check": 7, "describe": 8, "funny": 8, "person": 2, "mind": 2, "hello": 1, "thanks": 1, "other": 1,
}  # fmt: skip
WHICH = ("colour", "where", "size", "check")  # where several kinds of things are shown: which of them is asked about?
WHICH_FACTOR = 3  # asked so much more often there, because it takes longest to learn
SUITE = (
    "what", "colour", "where", "count", "size", "background", "text", "exists", "check", "describe", "funny", "joke",
    "refusal",
)  # fmt: skip


@dataclass(frozen=True)
class Exchange:
    """One question, its right answer, and the thing it is about where it is about one."""

    kind: str
    question: str
    answer: str
    subject: Thing | None = None


# What is so


def things_phrase(scene: Scene, *, coloured: bool) -> str:
    """The things from left to right: "two red cats", "a dog and a fish"."""
    first = scene.things[0]
    adjective = [first.colour] if coloured else []
    if len(scene.things) > 1 and first.kind == scene.things[1].kind:
        return " ".join([NUMBERS[len(scene.things)], *adjective, plural(first.kind)])
    return listing([noun(thing, coloured=coloured) for thing in scene.things])


def noun(thing: Thing, *, coloured: bool = False, sized: bool = False) -> str:
    words = [thing.size] * sized + [thing.colour] * coloured + [thing.kind]
    return with_article(" ".join(words))


def listing(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def caption(scene: Scene) -> str:
    """The short caption that stage 1 learns: "A red cat and a blue dog, in a meadow."""
    return f"{capital(things_phrase(scene, coloured=True))}, {SETTING[scene.background]}. {text_answer(scene)}"


def description(scene: Scene) -> str:
    """Everything a picture shows, in one order."""
    first = scene.things[0]
    if len(scene.things) > 1 and first.kind == scene.things[1].kind:
        places = listing([PLACE[thing.place] for thing in scene.things])
        body = f"{NUMBERS[len(scene.things)]} {first.size} {first.colour} {plural(first.kind)}, {places}"
    else:
        body = listing([f"{noun(thing, coloured=True, sized=True)} {PLACE[thing.place]}" for thing in scene.things])
    return f"{capital(body)}, {SETTING[scene.background]}. {text_answer(scene)}"


def text_answer(scene: Scene) -> str:
    lines = [f'"{line}"' for line in scene.lines() if line]
    return f"The text says {' and '.join(lines)}." if lines else "There is no text."


def joke_answer(scene: Scene) -> str:
    if scene.claim is None:
        return "There is no joke: the picture has no caption."
    verdict = "so there is no joke" if scene.joke is None else "and that is the joke"
    return f"{_compared(scene)}, {verdict}."


def _compared(scene: Scene) -> str:
    """What is claimed beside what is shown. A small model finds the verdict once it has said both, not before."""
    assert scene.claim
    return f"The caption says {scene.claim.words()}. The picture shows {_truth(scene)}"


def _truth(scene: Scene) -> str:
    """What the picture shows in place of the claim, in the terms of the joke; the claim itself where it is true."""
    assert scene.claim
    if scene.joke is None:
        return scene.claim.words()
    if scene.joke == "thing":
        return things_phrase(scene, coloured=False)
    shown = scene.of_kind(scene.claim.kind)
    noun = shown[0].kind if len(shown) == 1 else plural(shown[0].kind)
    adjective = {"colour": [shown[0].colour], "size": [shown[0].size], "count": []}[scene.joke]
    phrase_ = " ".join([*adjective, noun])
    return with_article(phrase_) if scene.claim.count is None else f"{NUMBERS[len(shown)]} {phrase_}"


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


# Questions. Each asker picks its subject and gives the names for the pattern and the answer.


Asked = tuple[dict[str, str], str, Thing | None]


def _subject(rng: random.Random, scene: Scene) -> Thing:
    unseen = [thing for thing in scene.things if (thing.kind, thing.colour) in world.HELD_OUT]
    return rng.choice(unseen or scene.things)


def _names(scene: Scene, thing: Thing) -> dict[str, str]:
    several = len(scene.of_kind(thing.kind)) > 1
    return {"thing": thing.kind, "things": plural(thing.kind) if several else thing.kind, "plural": plural(thing.kind)}


def _be(scene: Scene, thing: Thing) -> str:
    """ "The cat is" or "The cats are"."""
    several = len(scene.of_kind(thing.kind)) > 1
    return f"the {plural(thing.kind)} are" if several else f"the {thing.kind} is"


def colour_answer(scene: Scene, thing: Thing) -> str:
    return f"{capital(_be(scene, thing))} {thing.colour}."


def where_answer(scene: Scene, thing: Thing) -> str:
    places = listing([PLACE[other.place] for other in scene.of_kind(thing.kind)])
    return f"{capital(_be(scene, thing))} {places}."


def size_answer(scene: Scene, thing: Thing) -> str:
    return f"{capital(_be(scene, thing))} {thing.size}."


def count_answer(scene: Scene, kind: str) -> str:
    count = len(scene.of_kind(kind))
    return f"There {'is' if count == 1 else 'are'} {NUMBERS[count]} {kind if count == 1 else plural(kind)}."


def count_all_answer(scene: Scene) -> str:
    count = len(scene.things)
    return "There is one thing." if count == 1 else f"There are {NUMBERS[count]} things."


def exists_answer(scene: Scene, word: str) -> str:
    count = len(scene.of_kind(word))
    if not count:
        return f"No, there is no {word}."
    return f"Yes, there {'is' if count == 1 else 'are'} {NUMBERS[count]} {word if count == 1 else plural(word)}."


def funny_answer(scene: Scene) -> str:
    if scene.claim is None:
        return "No, the picture has no caption."
    return f"{_compared(scene)}, {'so no' if scene.joke is None else 'so yes'}."


def _about_thing(answer: Callable[[Scene, Thing], str]) -> Callable[[random.Random, Scene], Asked]:
    def ask(rng: random.Random, scene: Scene) -> Asked:
        thing = _subject(rng, scene)
        return _names(scene, thing), answer(scene, thing), thing

    return ask


def _about_scene(answer: Callable[[Scene], str]) -> Callable[[random.Random, Scene], Asked]:
    def ask(rng: random.Random, scene: Scene) -> Asked:
        return _names(scene, scene.things[0]), answer(scene), None

    return ask


def _ask_count(rng: random.Random, scene: Scene) -> Asked:
    kind = _subject(rng, scene).kind if rng.random() < 0.8 else rng.choice(KINDS)
    return {"plural": plural(kind)}, count_answer(scene, kind), None


def _ask_exists(rng: random.Random, scene: Scene) -> Asked:
    if rng.random() < 0.5:
        word = _subject(rng, scene).kind
    else:
        word = rng.choice(KINDS) if rng.random() < 0.8 else rng.choice(STRANGERS)
    return {"word": word}, exists_answer(scene, word), None


def _ask_check(rng: random.Random, scene: Scene) -> Asked:
    thing = _subject(rng, scene)
    colour = thing.colour if rng.random() < 0.5 else rng.choice([c for c in COLOURS if c != thing.colour])
    verdict = "Yes" if colour == thing.colour else "No"
    return {**_names(scene, thing), "colour": colour}, f"{verdict}, {_be(scene, thing)} {thing.colour}.", thing


def _fixed(answer: str) -> Callable[[random.Random, Scene], Asked]:
    return _about_scene(lambda scene: answer)


ASK: dict[str, Callable[[random.Random, Scene], Asked]] = {
    "what": _about_scene(lambda scene: f"{capital(things_phrase(scene, coloured=True))}."),
    "colour": _about_thing(colour_answer),
    "where": _about_thing(where_answer),
    "count": _ask_count,
    "count_all": _about_scene(count_all_answer),
    "size": _about_thing(size_answer),
    "background": _about_scene(lambda scene: f"The background is {BACKGROUND[scene.background]}."),
    "text": _about_scene(text_answer),
    "exists": _ask_exists,
    "check": _ask_check,
    "describe": _about_scene(description),
    "funny": _about_scene(funny_answer),
    "joke": _about_scene(joke_answer),
    "person": _fixed(NO_PERSON),
    "mind": _about_thing(lambda scene, thing: NO_MIND),
    "hello": _fixed(HELLO),
    "thanks": _fixed(THANKS),
    "other": _fixed(NOT_MINE),
}


def ask(rng: random.Random, scene: Scene, kind: str) -> Exchange:
    names, answer, subject = ASK[kind](rng, scene)
    return Exchange(kind, phrase(rng, kind, names), answer, subject)


def dialogue(rng: random.Random, scene: Scene, turns: int) -> list[Exchange]:
    """Several questions about one scene; some only make sense after the one before ("And the dog?", "Why?")."""
    exchanges: list[Exchange] = []
    several = len({thing.kind for thing in scene.things}) > 1
    kinds = list(WEIGHTS)
    weights = [weight * (WHICH_FACTOR if several and kind in WHICH else 1) for kind, weight in WEIGHTS.items()]
    while len(exchanges) < turns:
        following = _follow_up(rng, scene, exchanges[-1]) if exchanges and rng.random() < 0.5 else None
        exchanges.append(following or ask(rng, scene, rng.choices(kinds, weights)[0]))
    return exchanges


CARRIED: dict[str, Callable[[Scene, Thing], str]] = {
    "colour": colour_answer, "where": where_answer, "size": size_answer,
}  # fmt: skip


def _follow_up(rng: random.Random, scene: Scene, last: Exchange) -> Exchange | None:
    if last.kind == "funny":
        return Exchange("joke", phrase(rng, "why", {}), joke_answer(scene))
    others = [thing for thing in scene.things if last.subject and thing.kind != last.subject.kind]
    if last.kind in CARRIED and others:
        other = rng.choice(others)
        return Exchange(last.kind, phrase(rng, "and", _names(scene, other)), CARRIED[last.kind](scene, other), other)
    if last.kind in ("colour", "size") and last.subject and len(scene.of_kind(last.subject.kind)) == 1:
        return Exchange("where", phrase(rng, "where_it", {}), where_answer(scene, last.subject), last.subject)
    return None


def suite_question(split: str, index: int, scene: Scene) -> Exchange:
    """The question that the evaluation asks about scene number `index`: the kinds in turn, phrased as in training."""
    rng = random.Random(f"suite/{split}/{index}")
    kind = SUITE[index % len(SUITE)]
    asked = ask(rng, scene, rng.choice(("person", "mind")) if kind == "refusal" else kind)
    return Exchange(kind, asked.question, asked.answer)


def unseen_question(index: int, scene: Scene) -> Exchange:
    """Question number `index` of the phrasings that training never produced."""
    rng = random.Random(f"unseen/{index}")
    kind, pattern = UNSEEN[index % len(UNSEEN)]
    names, answer, _ = ASK[kind](rng, scene)
    return Exchange(kind, pattern.format(**names), answer)
