"""What a model learns from to look at two pictures and at clips, beside what it knew before."""

from pathlib import Path

import yaml

from finetune.memeworld.clips import write_clips
from finetune.memeworld.dataset import make_dataset
from finetune.memeworld.pairs import write_pairs


def write_several(folder: Path, *, pairs: int, clips: int, rehearsal: int, processes: int) -> Path:
    """Draw pairs, clips and single pictures into `folder`, unless they are there; returns the mixture of their records.

    `rehearsal` counts single pictures, with a fifth as many dialogues without one.
    """
    mixture = folder / "several.yaml"
    if mixture.exists():
        return mixture
    known = make_dataset(folder / "rehearsal", pictures=rehearsal, texts=rehearsal // 5, processes=processes)
    files = [write_pairs(folder, count=pairs), write_clips(folder, count=clips), known.instruct]
    parts = [{"data": str(file.relative_to(folder)), "images": str(file.parent.relative_to(folder))} for file in files]
    mixture.write_text(yaml.safe_dump({"seed": 0, "parts": parts}), encoding="utf-8")
    return mixture
