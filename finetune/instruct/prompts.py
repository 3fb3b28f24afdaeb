"""Domains: folders of prompts in plain files, and the messages that a teacher is sent.

A domain holds, for each kind that it knows, KIND.md (the system prompt) and KIND.examples.md (worked examples, each
`### Context` and `### Reply`); detail.questions.txt (ways to ask for a description) and objects.txt.
"""

import hashlib
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

from finetune.instruct.context import Context, read_text
from finetune.instruct.dialogue import KINDS
from finetune.instruct.objects import Lexicon, read_lexicon
from llava_app.errors import DataError

PROMPTS = Path(__file__).parent / "prompts"
Message = dict[str, str]  # role, content


@dataclass(frozen=True)
class Domain:
    """What of a domain's folder does not depend on the picture."""

    name: str
    openings: dict[str, list[Message]] = field(hash=False)  # kind → system prompt and worked examples
    detail_questions: tuple[str, ...]
    lexicon: Lexicon

    def messages(self, kind: str, context: Context) -> list[Message]:
        """The exact prompt for one picture. Raises DataError when the domain lacks the kind."""
        return [*self._opening(kind), {"role": "user", "content": context.text()}]

    def version(self, kind: str) -> str:
        """12 hexadecimal digits that change with the system prompt or an example of the kind."""
        said = "\0".join(message["content"] for message in self._opening(kind))
        return hashlib.sha256(said.encode()).hexdigest()[:12]

    def detail_question(self, context: Context) -> str:
        """One of the ways to ask for a description, always the same for the same picture."""
        return random.Random(f"detail/{context.id}").choice(self.detail_questions)

    def _opening(self, kind: str) -> list[Message]:
        if kind not in self.openings:
            known = ", ".join(self.openings)
            raise DataError(
                f"The domain {self.name} has no {kind}.md. It knows {known}; write the file, or leave it out."
            )
        return self.openings[kind]


def read_domain(name_or_folder: str) -> Domain:
    """A shipped domain by name, or a folder of one's own by path. Raises DataError when it holds no prompts."""
    shipped = PROMPTS / name_or_folder
    folder = shipped if shipped.is_dir() else Path(name_or_folder)
    openings = {kind: _read_opening(folder, kind) for kind in KINDS if (folder / f"{kind}.md").exists()}
    if not openings:
        known = ", ".join(sorted(path.name for path in PROMPTS.iterdir()))
        raise DataError(f"{name_or_folder} is no domain. Choose one of {known}, or give a folder with conversation.md.")
    questions = folder / "detail.questions.txt" if "detail" in openings else None
    asked = tuple(line.strip() for line in read_text(questions).splitlines() if line.strip()) if questions else ()
    if questions and not asked:
        raise DataError(f"{questions} is empty. Write a way to ask for a description on each line.")
    return Domain(folder.name, openings, asked, read_lexicon(folder / "objects.txt"))


def _read_opening(folder: Path, kind: str) -> list[Message]:
    system = [{"role": "system", "content": read_text(folder / f"{kind}.md").strip()}]
    examples = folder / f"{kind}.examples.md"
    if not examples.exists():
        return system
    parts = re.split(r"^### (Context|Reply)[ \t]*$", read_text(examples), flags=re.MULTILINE)
    titles, texts = parts[1::2], parts[2::2]
    if titles != ["Context", "Reply"] * (len(titles) // 2) or not titles:
        raise DataError(f"{examples} must hold “### Context” and “### Reply” in turn; it has {titles}.")
    roles = {"Context": "user", "Reply": "assistant"}
    said = zip(titles, texts, strict=True)
    return system + [{"role": roles[title], "content": text.strip()} for title, text in said]
