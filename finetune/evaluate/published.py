"""Scores that others published, to stand beside ours: only where the measure and the prompt are the same."""

from dataclasses import dataclass

LLAVA = "Liu et al. 2023, Visual Instruction Tuning"
LLAVA_15 = "Liu et al. 2023, Improved Baselines with Visual Instruction Tuning, Table 4"


@dataclass(frozen=True)
class Published:
    """A model's score in per cent, and where it stands."""

    model: str
    score: float
    source: str


PUBLISHED: dict[str, tuple[Published, ...]] = {
    "scienceqa-lepa": (
        Published("Human", 88.40, "Lu et al. 2022, Learn to Explain"),
        Published("GPT-3.5 with CoT", 75.17, "Lu et al. 2022, Learn to Explain"),
        Published("LLaVA-13B", 90.92, f"{LLAVA}, Table 7"),
        Published("LLaVA-13B + GPT-4, complement", 90.97, f"{LLAVA}, Table 7"),
        Published("LLaVA-13B + GPT-4, judge", 92.53, f"{LLAVA}, Table 7"),
    ),
    "llava-bench-coco": (Published("LLaVA-13B", 85.1, f"{LLAVA}, Table 4"),),
    "llava-bench-wild": (
        Published("OpenFlamingo", 19.1, f"{LLAVA}, Table 5"),
        Published("BLIP-2", 38.1, f"{LLAVA}, Table 5"),
        Published("LLaVA-13B", 67.3, f"{LLAVA}, Table 5"),
        Published("LLaVA-1.5-7B", 65.4, LLAVA_15),
        Published("LLaVA-1.5-13B", 72.5, LLAVA_15),
    ),
}
