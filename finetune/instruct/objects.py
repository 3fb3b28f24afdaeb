"""Which things a text speaks of: the words of a domain's objects.txt and of the boxes' own categories."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from finetune.instruct.context import Context, read_text

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_PLURALS = {
    "person": "people", "man": "men", "woman": "women", "child": "children", "policeman": "policemen",
    "knife": "knives", "shelf": "shelves", "loaf": "loaves", "calf": "calves", "goose": "geese",
    "fish": "fish", "sheep": "sheep", "aircraft": "aircraft", "broccoli": "broccoli", "luggage": "luggage",
}  # fmt: skip
_PLURAL_ENDINGS = (("s", "ses"), ("x", "xes"), ("ch", "ches"), ("sh", "shes"), ("y", "ies"))


@dataclass(frozen=True)
class Mention:
    """A thing named in a text: from which letter on, and whether in the plural."""

    thing: str
    start: int
    plural: bool


@dataclass(frozen=True)
class Lexicon:
    """Words in the singular → the thing that they mean; a thing → its family of look-alikes."""

    words: dict[str, str] = field(hash=False)
    families: dict[str, str] = field(hash=False)

    def mentions(self, text: str) -> list[Mention]:
        """The things that `text` names, in order; of words within one another the longest counts."""
        found = [(self._surfaces[match[0]], match.start()) for match in self._pattern.finditer(text.lower())]
        return [Mention(thing, start, plural) for (thing, plural), start in found]

    def things(self, text: str) -> set[str]:
        """The names of the things that `text` names."""
        return {mention.thing for mention in self.mentions(text)}

    def name(self, category: str) -> str:
        """The thing that a box of this category shows."""
        return self.words.get(category.lower(), category.lower())

    def known(self, context: Context) -> set[str]:
        """Everything that a context names, in words or in boxes."""
        return self.things(context.words) | {self.name(box.category) for box in context.boxes}

    def also(self, categories: Iterable[str]) -> "Lexicon":
        """With the categories of boxes that no line of the file names."""
        new = {category.lower() for category in categories} - set(self.words) - set(self.words.values())
        return Lexicon(self.words | {name: name for name in new}, self.families)

    @cached_property
    def _surfaces(self) -> dict[str, tuple[str, bool]]:
        singulars = {word: (thing, False) for word, thing in self.words.items()}
        known = self.words.items() | {(thing, thing) for thing in self.words.values()}
        return singulars | {plural(word): (thing, True) for word, thing in known if plural(word) != word}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._surfaces, key=len, reverse=True)
        return re.compile(rf"\b(?:{'|'.join(map(re.escape, longest_first)) or '(?!)'})\b")


def read_lexicon(file: Path) -> Lexicon:
    """Read objects.txt: `[family]`, then lines `name: other, words`. A file that is not there is an empty lexicon."""
    words: dict[str, str] = {}
    families: dict[str, str] = {}
    family = ""
    for line in read_text(file).lower().splitlines() if file.exists() else []:
        line = line.split("#")[0].strip()
        if line.startswith("["):
            family = line.strip("[]")
        elif line:
            first, _, others = line.partition(":")
            name = first.strip("() ")
            families[name] = family
            words |= {} if first.startswith("(") else {name: name}
            words |= {word.strip(): name for word in others.split(",") if word.strip()}
    return Lexicon(words, families)


def plural(phrase: str) -> str:
    """The plural of a noun or of a phrase that ends in one."""
    before, space, noun = phrase.rpartition(" ")
    if noun in _PLURALS:
        return before + space + _PLURALS[noun]
    for ending, pluralised in _PLURAL_ENDINGS:
        if noun.endswith(ending) and not re.search("[aeiou]y$", noun):
            return phrase.removesuffix(ending) + pluralised
    return phrase + "s"


def counted(number: int, category: str) -> str:
    """ "one cat", "two cats"; a number above ten in digits."""
    word = NUMBERS[number] if number < len(NUMBERS) else str(number)
    return f"{word} {category if number == 1 else plural(category)}"


def with_article(phrase: str) -> str:
    return f"{'an' if phrase[0].lower() in 'aeiou' else 'a'} {phrase}"


def listing(phrases: list[str]) -> str:
    """ "a cat, a dog and two birds"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
