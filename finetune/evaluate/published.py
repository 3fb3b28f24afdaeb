"""Scores that others published, to stand beside ours: only where the measure and the prompt are the same.

Every figure was read in the table that it names: Liu et al. 2023a is "Visual Instruction Tuning" (arXiv 2304.08485v2),
2023b "Improved Baselines with Visual Instruction Tuning" (arXiv 2310.03744v2), Lu et al. 2022 "Learn to Explain"
(arXiv 2209.09513).
"""

from dataclasses import dataclass

LLAVA = "Liu et al. 2023a"
LLAVA_15 = "Liu et al. 2023b"
LEARN_TO_EXPLAIN = f"Lu et al. 2022, as in {LLAVA}, Table 7"


@dataclass(frozen=True)
class Published:
    """A model's score in per cent, and where it stands."""

    model: str
    score: float
    source: str


PUBLISHED: dict[str, tuple[Published, ...]] = {
    "scienceqa-lepa": (
        Published("Human", 88.40, LEARN_TO_EXPLAIN),
        Published("GPT-3.5 with CoT", 75.17, LEARN_TO_EXPLAIN),
        Published("LLaVA-7B", 89.84, f"{LLAVA}, Table 8"),
        Published("LLaVA-13B", 90.92, f"{LLAVA}, Table 7"),
        Published("LLaVA-13B + GPT-4, complement", 90.97, f"{LLAVA}, Table 7"),
        Published("LLaVA-13B + GPT-4, judge", 92.53, f"{LLAVA}, Table 7"),
    ),
    "gqa": (
        Published("LLaVA-1.5-7B", 62.0, f"{LLAVA_15}, Table 3"),
        Published("LLaVA-1.5-13B", 63.3, f"{LLAVA_15}, Table 3"),
    ),
    "llava-bench-coco": (Published("LLaVA", 85.1, f"{LLAVA}, Table 4"),),
    "llava-bench-wild": (
        Published("OpenFlamingo", 19.1, f"{LLAVA}, Table 5"),
        Published("BLIP-2", 38.1, f"{LLAVA}, Table 5"),
        Published("LLaVA", 67.3, f"{LLAVA}, Table 5"),
        Published("LLaVA-1.5-7B", 65.4, f"{LLAVA_15}, Table 4"),
        Published("LLaVA-1.5-13B", 72.5, f"{LLAVA_15}, Table 4"),
    ),
}
