"""Larger pictures with small print, which a model reads in tiles and cannot read in one squeezed picture."""

import random
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForCausalLM

from finetune.assemble import write_llava
from finetune.memeworld.dataset import dialogue_record, write_records
from finetune.memeworld.draw import TEXT_CENTRE, draw, write_line
from finetune.memeworld.world import Scene, make_scene
from llava_app.checkpoints import Card
from llava_app.loading import load

SIDE = 224  # pixels: two tiles of the tower's 112 across and down


def draw_small_print(scene: Scene, seed: int) -> Image.Image:
    """The scene as `draw` draws it, each line of text half as large and in the left or the right half.

    So a tile of the tower's size shows a whole line, as large as a picture of `draw` shows it to the tower.
    """
    rng = random.Random(f"small print/{seed}")
    drawn = 2 * SIDE  # and halved: as `draw`'s pictures are by the tower
    image = draw(replace(scene, claim=None, tag=None), seed, drawn)
    canvas = ImageDraw.Draw(image)
    for line, centre in zip(scene.lines(), (TEXT_CENTRE / 2, 1 - TEXT_CENTRE / 2), strict=True):
        middle = (rng.choice((1 / 4, 3 / 4)) * drawn, centre * drawn)
        if line:
            write_line(canvas, line, middle, side=drawn // 2, scale=rng.uniform(0.92, 1.0))
    return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def write_small_print(folder: Path, *, count: int) -> Path:
    """Draw `count` pictures of the split "train" into `folder`, unless they are there; returns the dialogues' file."""
    path = folder / "small_print.json"
    if path.exists():
        return path
    (folder / "small_print").mkdir(parents=True, exist_ok=True)
    records = []
    for index in range(count):
        scene, name = make_scene("train", index), f"small_print/{index:06}.png"
        draw_small_print(scene, index).save(folder / name, compress_level=1)
        records.append(dialogue_record(scene, index, name))
    write_records(path, records)
    return path


def with_tiles(card: Card, out: Path) -> Card:
    """Write the same weights as a model that sees tiles to `out`; new is only the feature that ends a row of them."""
    loaded = load(card, "float32")
    llava, config = loaded.model, loaded.model.config
    text = AutoModelForCausalLM.from_config(config.text_config)
    setattr(text, text.base_model_prefix, llava.model.language_model)
    text.set_output_embeddings(llava.lm_head)
    return write_llava(
        llava.model.vision_tower,
        text,
        loaded.processor.tokenizer,
        out,
        select=config.vision_feature_select_strategy,
        projector="mlp2x_gelu",
        projector_weights=llava.model.multi_modal_projector.state_dict(),
        feature_layer=config.vision_feature_layer,
        image_mode="anyres",
        template=card.template,
        dtype=torch.float16,
        base=card.name,
        stage=card.stage,
        about=f"{card.name} with tiles, which it has to learn to read.",
    )
