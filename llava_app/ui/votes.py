"""Which of two models people liked better: a line of JSON for each vote, and their sum."""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock

from llava_app.lines import append_line

VERDICTS = ("left", "right", "tie", "neither")


@dataclass(frozen=True)
class Vote:
    """What somebody said about the answers of two models, known by their keys in the model list."""

    left: str
    right: str
    verdict: str  # one of VERDICTS
    blind: bool  # whether the names were hidden

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"the verdict is {self.verdict!r}; it must be one of {', '.join(VERDICTS)}")


class Votes:
    """The votes in a file, which several pages may share. Methods may be called from any thread."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, vote: Vote) -> None:
        """Write one line, whole or not at all as far as a reader can tell. Raises OSError when it cannot be kept."""
        line = json.dumps({"at": datetime.now(UTC).isoformat(timespec="seconds")} | asdict(vote), ensure_ascii=False)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._path.with_suffix(".lock")):
            append_line(self._path, line)

    def tally(self, one: str, other: str) -> Counter[str]:
        """How often `one` ("left") or `other` ("right") was better, whichever side it stood on; ties and neithers."""
        counts: Counter[str] = Counter()
        for vote in self._read():
            if (vote.left, vote.right) == (one, other):
                counts[vote.verdict] += 1
            elif (vote.left, vote.right) == (other, one):
                counts[{"left": "right", "right": "left"}.get(vote.verdict, vote.verdict)] += 1
        return counts

    def _read(self) -> list[Vote]:
        """All votes; a line that is none, or none any more, is passed over."""
        if not self._path.exists():
            return []
        votes = []
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                stored = json.loads(line)
                votes.append(Vote(stored["left"], stored["right"], stored["verdict"], stored["blind"]))
            except (ValueError, KeyError, TypeError):
                continue
        return votes
