"""A teacher that needs no model: questions whose answers follow from the boxes, in sentences of its own.

It says a number only where the captions do not speak against it, a place only of a thing that is there once, and
denies a thing only where neither a box nor a caption names it or anything like it.
"""

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from finetune.instruct.budget import Usage
from finetune.instruct.context import Box, Context
from finetune.instruct.dialogue import Dialogue, Exchange, format_dialogue
from finetune.instruct.objects import NUMBERS, Lexicon, counted, listing, plural, with_article
from finetune.instruct.teachers import Reply, Task

MOST_TURNS = 6
MOST_COUNTED = 4  # annotators miss things in larger groups
SMALLEST = 0.002  # of the picture: where a box is smaller, more of its kind may have been missed
LARGER = 2.5  # times the area: what anybody would call larger
_NUMBER = {word: number for number, word in enumerate(NUMBERS)} | {"couple": 2, "pair": 2, "both": 2, "single": 1}
_NUMBER |= {str(number): number for number in range(100)}
_VAGUE = re.compile(
    r"several|many|some|few|groups?|bunch|lots?|various|crowd|herd|flock|rows?|sets?|assortment|selection|filled"
    r"|multiple|different|other"
)
NO_SINGULAR = ("skis", "scissors", "glasses", "broccoli")  # what one of it is, the boxes do not say


class TemplateTeacher:
    """Writes conversations and descriptions; the same for the same context."""

    kinds: tuple[str, ...] = ("conversation", "detail")
    at_once = 1

    def __init__(self, lexicon: Lexicon, categories: Sequence[str]) -> None:
        self.lexicon = lexicon
        self.categories = sorted({category.lower() for category in categories} - set(NO_SINGULAR))
        self.name = f"template {hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]}"

    def most(self, _: Task) -> Usage:
        return Usage()

    def ask(self, task: Task) -> Reply:
        write = {"conversation": self._conversation, "detail": self._description}[task.kind]
        return Reply(write(_Seen(task.context, self.lexicon)), "stop", Usage())

    def _conversation(self, seen: "_Seen") -> str:
        rng = random.Random(f"template/{seen.context.id}")
        absent = self._absent_categories(seen)
        else_unsaid = len(seen.groups) > 1 or not seen.counted
        affirmed = rng.choice(seen.groups) if seen.groups and else_unsaid else None  # asked about in no other way
        single = [group for group in seen.single if group is not affirmed]
        pairs = [rng.sample(pair, 2) for pair in combinations(single, 2)]
        kinds = [
            [_count(rng, group) for group in seen.counted if group is not affirmed],
            [exchange for group in single for exchange in _place(rng, group)],
            [exchange for pair in pairs for exchange in _relation(*pair)],
            [exchange for pair in pairs for exchange in _larger(*pair)],
            [_present(rng, affirmed)] if affirmed else [],
            [_absent(rng, category) for category in rng.sample(absent, min(2, len(absent)))],
            [_text(rng, seen.context.ocr)] if seen.context.ocr else [],
        ]
        return format_dialogue(_mixed(rng, kinds))

    def _absent_categories(self, seen: "_Seen") -> list[str]:
        """What is surely not there. A picture without any box was perhaps not annotated: nothing is sure."""
        families = {self.lexicon.families.get(thing, thing) for thing in self.lexicon.known(seen.context)}
        absent = [(category, self.lexicon.name(category)) for category in self.categories]
        return [c for c, name in absent if seen.groups and self.lexicon.families.get(name, name) not in families]

    def _description(self, seen: "_Seen") -> str:
        if not seen.groups:
            return ""
        caption = seen.context.captions[0].strip().rstrip(".") + "." if seen.context.captions else ""
        verb = "is" if seen.groups[0].phrase.startswith(("a ", "an ", "one ", "at least one")) else "are"
        sentences = [caption[:1].upper() + caption[1:], f"There {verb} {listing([g.phrase for g in seen.groups])}."]
        places = [(group.category, _where(group.boxes[0])) for group in seen.single]
        sentences += [f"The {category} is {where}." for category, where in places if where]
        return " ".join(sentence for sentence in sentences if sentence)


@dataclass(frozen=True)
class _Group:
    """All boxes of one category; `sure`: whether there are just as many of it as boxes."""

    category: str
    boxes: tuple[Box, ...]
    sure: bool

    @property
    def phrase(self) -> str:
        if self.sure:
            return with_article(self.category) if len(self.boxes) == 1 else counted(len(self.boxes), self.category)
        many = len(self.boxes) > 2
        return f"several {plural(self.category)}" if many else f"at least {counted(len(self.boxes), self.category)}"


class _Seen:
    """What the boxes of a context show, the largest first."""

    def __init__(self, context: Context, lexicon: Lexicon) -> None:
        self.context = context
        by_category: dict[str, list[Box]] = {}
        for box in sorted(context.boxes, key=lambda box: -box.area):
            by_category.setdefault(box.category.lower(), []).append(box)
        self.groups = [
            _Group(category, tuple(boxes), _is_sure(boxes, context.captions, lexicon))
            for category, boxes in by_category.items()
            if category not in NO_SINGULAR
        ]
        self.counted = [group for group in self.groups if group.sure]
        self.single = [group for group in self.counted if len(group.boxes) == 1]


def _is_sure(boxes: list[Box], captions: Sequence[str], lexicon: Lexicon) -> bool:
    countable = len(boxes) <= MOST_COUNTED and not any(box.crowd or box.area < SMALLEST for box in boxes)
    thing = lexicon.name(boxes[0].category)
    return countable and not any(_speaks_against(caption, thing, len(boxes), lexicon) for caption in captions)


def _speaks_against(caption: str, thing: str, number: int, lexicon: Lexicon) -> bool:
    """Whether a caption gives another number of a thing, names several where there is one, or is vague about it."""
    for mention in lexicon.mentions(caption):
        before = re.findall(r"\w+", caption[: mention.start].lower())[-4:]
        numbers = {_NUMBER[word] for word in before if word in _NUMBER}
        unclear = (mention.plural and number == 1) or any(map(_VAGUE.fullmatch, before))
        if mention.thing == thing and numbers != {number} and (numbers or unclear):
            return True
    return False


def _mixed(rng: random.Random, kinds: list[list[Exchange]]) -> Dialogue:
    """Some of every kind in turn, no question twice, in any order."""
    for exchanges in kinds:
        rng.shuffle(exchanges)
    longest = max(map(len, kinds))
    in_turn = [exchanges[n] for n in range(longest) for exchanges in kinds if n < len(exchanges)]
    chosen = list({exchange.question: exchange for exchange in in_turn}.values())[:MOST_TURNS]
    rng.shuffle(chosen)
    return tuple(chosen)


# One question each


def _count(rng: random.Random, group: _Group) -> Exchange:
    number, many = len(group.boxes), plural(group.category)
    asked = (f"How many {many} are there?", f"How many {many} can you see?", f"What is the number of {many} here?")
    return Exchange(rng.choice(asked), f"There {'is' if number == 1 else 'are'} {counted(number, group.category)}.")


def _place(rng: random.Random, group: _Group) -> Iterator[Exchange]:
    where = _where(group.boxes[0])
    if where:
        asked = (f"Where is the {group.category}?", f"In which part of the picture is the {group.category}?")
        yield Exchange(rng.choice(asked), f"The {group.category} is {where}.")


def _relation(one: _Group, other: _Group) -> Iterator[Exchange]:
    """Only where the two boxes stand side by side, or one above the other."""
    first, second = one.boxes[0].corners, other.boxes[0].corners
    for axis, words in ((0, ("to the left of", "to the right of")), (1, ("above", "below"))):
        before, after = first[axis + 2] <= second[axis], second[axis + 2] <= first[axis]
        if before != after:
            question = f"In the picture, is the {one.category} {words[0]} or {words[1]} the {other.category}?"
            yield Exchange(question, f"The {one.category} is {words[0] if before else words[1]} the {other.category}.")


def _larger(one: _Group, other: _Group) -> Iterator[Exchange]:
    areas = {group.category: group.boxes[0].area for group in (one, other)}
    small, large = sorted(areas, key=lambda category: areas[category])
    if areas[large] >= LARGER * areas[small]:
        question = f"Which takes up more of the picture, the {one.category} or the {other.category}?"
        yield Exchange(question, f"The {large} takes up more of the picture than the {small}.")


def _present(rng: random.Random, group: _Group) -> Exchange:
    several = len(group.boxes) > 1
    verb = "are" if several else "is"
    return Exchange(_is_there(rng, group.category), f"Yes, there {verb} {group.phrase}.")


def _absent(rng: random.Random, category: str) -> Exchange:
    return Exchange(_is_there(rng, category), f"No, there is no {category} in the picture.")


def _is_there(rng: random.Random, category: str) -> str:
    thing = with_article(category)
    return rng.choice((f"Is there {thing} in the picture?", f"Can you see {thing}?", f"Does the image show {thing}?"))


def _text(rng: random.Random, lines: Sequence[str]) -> Exchange:
    said = listing([f"“{line}”" for line in lines])
    return Exchange(rng.choice(("What is written in the picture?", "Which text can be read here?")), f"It says {said}.")


def _where(box: Box) -> str:
    """The place in words, "" where no word is plainly right."""
    x1, y1, x2, y2 = box.corners
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    across = _side(x1, x, x2, ("left", "right"))
    down = _side(y1, y, y2, ("top", "bottom"))
    if across in ("left", "right"):
        return f"at the {down} {across}" if down in ("top", "bottom") else f"on the {across}"
    if across == "middle" and down in ("top", "bottom"):
        return f"at the {down}, in the middle"
    return "in the middle" if across == "middle" and (down == "middle" or y2 - y1 > 0.6) else ""


def _side(start: float, centre: float, end: float, names: tuple[str, str]) -> str:
    """Which third of an axis a box lies in; "" where it lies in several or between two."""
    if centre < 0.34 and start < 0.2 and end < 0.6:
        return names[0]
    if centre > 0.66 and start > 0.4 and end > 0.8:
        return names[1]
    return "middle" if abs(centre - 0.5) < 0.09 and end - start < 0.7 else ""
