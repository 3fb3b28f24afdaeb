"""The drawn world: what a picture can hold, and what a caption can claim about it.

A scene is one to three things on a background, most with a caption. The joke, where there is one, is a claim of the
caption that the picture contradicts: the wrong thing, colour, size or count.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

KINDS = (
    "cat", "dog", "fish", "bird", "house", "car", "boat", "hat",
    "star", "tree", "flower", "apple", "cup", "heart", "moon", "rocket",
)  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
SIZES = ("big", "small")
PLACES = ("left", "middle", "right")
BACKGROUNDS = ("meadow", "beach", "night", "snow", "room")
NUMBERS = ("no", "one", "two", "three")
TAGS = ("NAILED IT", "TRUST ME", "SO PROUD", "EVERY TIME", "OH WELL", "LOL")
JOKES = ("thing", "colour", "size", "count")
SPLITS = ("train", "heldout", "combinations")

# Each thing in one colour, each colour on two things: 16 of 128 combinations that no training picture shows.
HELD_OUT = frozenset((kind, COLOURS[(3 * i + i // 8) % 8]) for i, kind in enumerate(KINDS))

IRREGULAR_PLURALS = {"fish": "fish"}


@dataclass(frozen=True)
class Thing:
    kind: str
    colour: str
    size: str
    place: str


@dataclass(frozen=True)
class Claim:
    """What a caption says: `count` things of a kind, perhaps of a colour or a size. `count` None is "a" or "my"."""

    kind: str
    count: int | None = None
    colour: str | None = None
    size: str | None = None
    mine: bool = False

    def words(self) -> str:
        """The claim as a noun phrase: "a red cat", "two dogs"."""
        adjectives = [word for word in (self.size, self.colour) if word]
        noun = plural(self.kind) if (self.count or 1) > 1 else self.kind
        phrase = " ".join([*adjectives, noun])
        return with_article(phrase) if self.count is None else f"{NUMBERS[self.count]} {phrase}"

    def caption(self) -> str:
        """The claim as a meme writes it: "MY RED CAT"."""
        text = self.words()
        return f"my {text.split(' ', 1)[1]}".upper() if self.mine else text.upper()


@dataclass(frozen=True)
class Scene:
    """`things` stand from left to right; several things are either all alike or all of different kinds."""

    things: tuple[Thing, ...]
    background: str
    claim: Claim | None = None
    tag: str | None = None
    claim_on_top: bool = True
    joke: str | None = None  # one of JOKES; None where the caption is true or missing

    def lines(self) -> tuple[str | None, str | None]:
        """The written text: the top line and the bottom line."""
        caption = self.claim.caption() if self.claim else None
        return (caption, self.tag) if self.claim_on_top else (self.tag, caption)

    def of_kind(self, kind: str) -> tuple[Thing, ...]:
        return tuple(thing for thing in self.things if thing.kind == kind)


def plural(kind: str) -> str:
    return IRREGULAR_PLURALS.get(kind, kind + "s")


def with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def make_scene(split: str, index: int) -> Scene:
    """The scene with this number in a split: always the same one.

    Pictures of "train" and "heldout" show only combinations outside HELD_OUT, in the things and in the captions;
    every picture of "combinations" shows at least one thing of HELD_OUT.
    """
    rng = random.Random(f"memeworld/{split}/{index}")
    unseen = split == "combinations"
    things = _things(rng, unseen)
    scene = Scene(things, rng.choice(BACKGROUNDS))
    if rng.random() < 0.12:
        return scene
    joke = rng.choice(JOKES) if rng.random() < 0.6 else None
    return _captioned(rng, scene, joke, allow_unseen=unseen)


def _things(rng: random.Random, unseen: bool) -> tuple[Thing, ...]:
    arrangement = rng.choices(("single", "group", "mixed"), (45, 25, 30))[0]
    count = 1 if arrangement == "single" else rng.choice((2, 3))
    places = sorted(rng.sample(PLACES, count), key=PLACES.index)
    kinds = rng.sample(KINDS, count) if arrangement == "mixed" else [rng.choice(KINDS)] * count
    looks = [(_colour(rng, kind), rng.choice(SIZES)) for kind in kinds]
    if arrangement == "group":
        looks = looks[:1] * count
    if unseen:
        chosen = range(count) if arrangement == "group" else [rng.randrange(count)]
        held_out = dict(HELD_OUT)
        looks = [(held_out[kinds[i]] if i in chosen else colour, size) for i, (colour, size) in enumerate(looks)]
    return tuple(Thing(kind, *look, place) for kind, look, place in zip(kinds, looks, places, strict=True))


def _colour(rng: random.Random, kind: str, other_than: Sequence[str] = (), unseen: bool = False) -> str:
    return rng.choice([c for c in COLOURS if c not in other_than and (unseen or (kind, c) not in HELD_OUT)])


def _captioned(rng: random.Random, scene: Scene, joke: str | None, *, allow_unseen: bool) -> Scene:
    unseen_things = [thing for thing in scene.things if (thing.kind, thing.colour) in HELD_OUT]
    subject = rng.choice(unseen_things or scene.things)
    count = len(scene.of_kind(subject.kind))
    if joke == "size" and count > 1:
        joke = "count"
    claim = _true_claim(rng, subject, count, about=joke)
    if joke:
        claim = _contradicted(rng, claim, scene, count, joke=joke, allow_unseen=allow_unseen)
    tag = rng.choice(TAGS) if rng.random() < 0.4 else None
    return replace(scene, claim=claim, tag=tag, claim_on_top=rng.random() < 0.7, joke=joke)


def _true_claim(rng: random.Random, subject: Thing, count: int, *, about: str | None) -> Claim:
    aspect = about if about in ("colour", "size", "count") else rng.choice(("thing", "colour", "size", "count"))
    if aspect == "size" and count > 1:
        aspect = "count"
    counted = count > 1 or aspect == "count"
    return Claim(
        kind=subject.kind,
        count=count if counted else None,
        colour=subject.colour if aspect == "colour" else None,
        size=subject.size if aspect == "size" else None,
        mine=not counted and rng.random() < 0.5,
    )


def _contradicted(
    rng: random.Random, claim: Claim, scene: Scene, count: int, *, joke: str, allow_unseen: bool
) -> Claim:
    if joke == "colour":
        shown = [thing.colour for thing in scene.of_kind(claim.kind)]
        return replace(claim, colour=_colour(rng, claim.kind, other_than=shown, unseen=allow_unseen))
    if joke == "size":
        return replace(claim, size=next(size for size in SIZES if size != claim.size))
    if joke == "count":
        return replace(claim, count=rng.choice([n for n in (1, 2, 3) if n != count]))
    absent = [kind for kind in KINDS if not scene.of_kind(kind)]
    allowed = [k for k in absent if allow_unseen or claim.colour is None or (k, claim.colour) not in HELD_OUT]
    return replace(claim, kind=rng.choice(allowed))
