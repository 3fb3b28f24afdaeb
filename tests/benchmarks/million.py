"""A file of a million records: seconds until training could start, and memory: python -m tests.benchmarks.million.

"s of computing" is what the processor worked, which a busy machine does not change.
Each layout in a process of its own: how much memory it takes beyond the imports and the processor, at most.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from finetune.data import Examples, check
from finetune.recipe import load_recipe
from llava_app.checkpoints import built_in
from llava_app.loading import load

PICTURES = 1000  # different ones; their names are what takes memory, and those are read from the file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(PICTURES):
            Image.new("RGB", (336, 336), (number % 256, 0, 0)).save(folder / f"{number}.jpg")
        for file in (folder / "records.jsonl", folder / "records.json"):
            _write(file, options.records)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                size, seconds, busy, grown, read = pool.apply(_measure, (file,))
            print(
                f"{file.suffix[1:]}: {options.records:,} records, {size / 1e6:.0f} MB: ready in {seconds:.0f} s "
                f"({busy:.0f} s of computing), {grown / 1e6:.0f} MB at most; "
                f"an example is then read in {read * 1e3:.2f} ms"
            )


def _write(file: Path, count: int) -> None:
    with file.open("w", encoding="utf-8") as out:
        lines = file.suffix == ".jsonl"
        out.write("" if lines else "[\n")
        for number, record in enumerate(_records(count)):
            out.write(("" if lines or not number else ",\n") + json.dumps(record) + ("\n" if lines else ""))
        out.write("" if lines else "\n]\n")


def _records(count: int) -> Iterator[dict[str, object]]:
    answer = "It shows a street with cars, a shop with a red sign and three people who wait for the green light."
    for number in range(count):
        turns = [
            {"from": "human", "value": f"<image>\nWhat does picture {number} show, in a sentence?"},
            {"from": "gpt", "value": f"{answer} It is number {number}."},
        ]
        yield {"id": f"{number:09}", "image": f"{number % PICTURES}.jpg", "conversations": turns}


def _measure(file: Path) -> tuple[int, float, float, int, float]:
    processor = load(built_in(), "float32").processor
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, idle = time.perf_counter(), time.process_time()
    recipe = load_recipe("memeworld_instruct")
    checked = check(file, file.parent, processor, recipe=recipe)
    ready, busy = time.perf_counter(), time.process_time() - idle
    examples = Examples(checked.examples, processor, max_length=recipe.max_length)
    for number in range(0, len(examples), max(1, len(examples) // 200)):
        examples[number]
    read = (time.perf_counter() - ready) / min(200, len(examples))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return file.stat().st_size, ready - began, busy, grown * 1024, read


if __name__ == "__main__":
    main()
