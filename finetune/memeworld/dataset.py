"""Pictures and LLaVA records of memeworld on disk, for the two stages."""

import json
import multiprocessing
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from finetune.memeworld import talk
from finetune.memeworld.corpus import text_conversation
from finetune.memeworld.draw import draw
from finetune.memeworld.world import Scene, make_scene
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
    write_records(records.align, [caption for caption, _ in pairs])
    write_records(records.instruct, [dialogue for _, dialogue in pairs] + spoken)
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
        caption = [("Write a caption.", talk.caption(scene))]
        return picture_record(f"train-{index:06}", [name], caption), dialogue_record(scene, index, name)


def dialogue_record(scene: Scene, index: int, image: str) -> dict[str, Any]:
    """The record of a dialogue about the picture of a scene."""
    rng = random.Random(f"dialogue/{index}")
    exchanges = talk.dialogue(rng, scene, rng.randint(*TURNS))
    return picture_record(f"train-{index:06}", [image], [(said.question, said.answer) for said in exchanges])


def picture_record(identifier: str, images: list[str], exchanges: list[tuple[str, str]]) -> dict[str, Any]:
    """A LLaVA record of questions and answers, with its pictures before the first question."""
    said = [
        {"from": speaker, "value": value}
        for turn in exchanges
        for speaker, value in zip(("human", "gpt"), turn, strict=True)
    ]
    said[0]["value"] = "".join(f"{IMAGE_MARK}\n" for _ in images) + said[0]["value"]
    return {"id": identifier, "image": images if len(images) > 1 else images[0], "conversations": said}


def write_questions(folder: Path, kind: str, asked: Iterable[tuple[Sequence[Image.Image], str, str]]) -> Path:
    """Write questions about several pictures, each with them and its answer, to `folder`; returns their records' file.

    Of a kind "pair" that is pairs.json, and its pictures are pairs/000000-1.png and so on.
    """
    (folder / f"{kind}s").mkdir(parents=True, exist_ok=True)
    records = []
    for index, (pictures, question, answer) in enumerate(asked):
        names = [f"{kind}s/{index:06}-{place}.png" for place in range(1, len(pictures) + 1)]
        for name, picture in zip(names, pictures, strict=True):
            picture.save(folder / name, compress_level=1)
        records.append(picture_record(f"{kind}-{index:06}", names, [(question, answer)]))
    path = folder / f"{kind}s.json"
    write_records(path, records)
    return path


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Write a data file, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n", encoding="utf-8")
    partial.replace(path)
