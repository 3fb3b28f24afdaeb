"""Pictures and LLaVA records of memeworld on disk, for the two stages."""

import json
import multiprocessing
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune.memeworld import talk
from finetune.memeworld.corpus import text_conversation
from finetune.memeworld.draw import draw
from finetune.memeworld.world import make_scene
from llava_app.conversation import IMAGE_MARK, to_record

TURNS = (5, 9)  # questions of a dialogue, fewest and most


@dataclass(frozen=True)
class Records:
    """Where the records of a stage lie."""

    align: Path
    instruct: Path


def make_dataset(folder: Path, *, pictures: int, texts: int, processes: int) -> Records:
    """Draw `pictures` of the split "train" into `folder`, with a caption and a dialogue each, and `texts` dialogues
    about scenes in words, which keep the language model from unlearning what no picture shows.
    """
    records = Records(folder / "align.json", folder / "instruct.json")
    if records.instruct.exists():
        return records
    with multiprocessing.Pool(processes) as pool:
        drawn = pool.imap(_Painter(folder), range(pictures), chunksize=64)
        pairs = list(tqdm(drawn, total=pictures, desc="drawing", unit=" pictures"))
    spoken = [to_record(text_conversation(random.Random(f"words/{i}")), f"words-{i}") for i in range(texts)]
    _write(records.align, [caption for caption, _ in pairs])
    _write(records.instruct, [dialogue for _, dialogue in pairs] + spoken)
    return records


@dataclass(frozen=True)
class _Painter:
    """Draws one picture into its folder; returns its record for stage 1 and for stage 2."""

    folder: Path

    def __call__(self, index: int) -> tuple[dict[str, Any], dict[str, Any]]:
        scene = make_scene("train", index)
        name = f"pictures/{index // 1000:03}/{index:06}.png"
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(scene, index).save(path, compress_level=1)
        rng = random.Random(f"dialogue/{index}")
        exchanges = talk.dialogue(rng, scene, rng.randint(*TURNS))
        caption = [(f"{IMAGE_MARK}\nWrite a caption.", talk.caption(scene))]
        asked = [(exchange.question, exchange.answer) for exchange in exchanges]
        asked[0] = (f"{IMAGE_MARK}\n{asked[0][0]}", asked[0][1])
        return _record(index, name, caption), _record(index, name, asked)


def _record(index: int, image: str, exchanges: list[tuple[str, str]]) -> dict[str, Any]:
    said = [
        {"from": speaker, "value": value}
        for turn in exchanges
        for speaker, value in zip(("human", "gpt"), turn, strict=True)
    ]
    return {"id": f"train-{index:06}", "image": image, "conversations": said}


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n", encoding="utf-8")
    partial.replace(path)
