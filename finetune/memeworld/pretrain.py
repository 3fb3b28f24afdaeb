"""The two halves before they meet: eyes that know the drawn world, and a language model that can talk about it.

The eyes are a CLIP vision tower. Its last layer learns what CLIP's learns, which description belongs to which picture
(Radford et al. 2021, equation of figure 3). Its layer −2, the one a LLaVA reads, also learns what each patch shows,
which the renderer knows; contrast alone does not teach shapes and lettering in a budget of minutes.

The language model is a Llama that reads scenes described in words and learns to answer questions about them.
"""

import json
import math
import multiprocessing
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from finetune.memeworld import draw, talk
from finetune.memeworld.corpus import CAPTION_LENGTH, DIALOGUE_LENGTH, caption_rows, dialogue_rows
from finetune.memeworld.world import BACKGROUNDS, COLOURS, KINDS, PLACES, SIZES, make_scene

PICTURE_SIDE = 112
EYES = CLIPVisionConfig(
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=6,
    image_size=PICTURE_SIDE,
    patch_size=PICTURE_SIDE // draw.GRID,
    projection_dim=128,
)
WORTH_COMPILING = 100  # steps; compiling takes half a minute, then saves a fifth of each; a CPU needs g++ for it
NOTHING = 0.15  # weight of a patch that shows nothing of what a head asks for; most do not
WIDTH = 192  # of the language model; a multiple of 64, so that 4-bit weights work on a CPU


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a half is pretrained. `learning_rate` is the peak of a cosine with 3 % warm-up."""

    steps: int
    batch: int
    learning_rate: float
    weight_decay: float = 0.05
    save_every: int = 200


# Text


def language_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class NextToken(nn.Module):
    """Mean cross-entropy of the supervised tokens, logits only where they are needed."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, supervised: Tensor) -> Tensor:
        """`input_ids` (B, S) int64, padded on the right; `supervised` (B, S) bool."""
        hidden_BSD = self.model.model(input_ids=input_ids, use_cache=False).last_hidden_state
        weights = supervised[:, 1:].float()
        logits_BSV = self.model.lm_head(hidden_BSD[:, :-1]).float()
        losses = F.cross_entropy(logits_BSV.flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none")
        return (losses * weights.flatten()).sum() / weights.sum()


def pretrain_text(folder: Path, tokenizer: PreTrainedTokenizerFast, schedule: Schedule) -> None:
    """Train the language model into `folder`, from the last saved step where there is one."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(language_config(tokenizer))

    def batch(step: int) -> tuple[Tensor, ...]:
        rng = random.Random(f"text/{step}")
        if step % 6 == 5:  # what a caption is, for the stage that trains on captions
            rows = caption_rows(rng, tokenizer, schedule.batch * DIALOGUE_LENGTH // CAPTION_LENGTH)
        else:
            rows = dialogue_rows(rng, tokenizer, schedule.batch)
        return tuple(torch.from_numpy(array) for array in rows)

    _pretrain(folder, NextToken(model), batch, schedule)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# Eyes


@dataclass(frozen=True)
class Gallery:
    """Drawn pictures with the labels of their patches and the words of their descriptions."""

    pixels: np.ndarray  # (N, 112, 112, 3) uint8
    labels: np.ndarray  # (N, 6, 64) uint8, in the order of PATCH_HEADS
    words: np.ndarray  # (N, 32) int64 word numbers of the description, 0 where it is shorter
    in_colour: np.ndarray  # (N,) bool; false where the things are repainted


PATCH_HEADS = {
    "kind": len(KINDS), "colour": len(COLOURS), "size": len(SIZES), "place": len(PLACES), "word": len(draw.WORDS),
    "background": len(BACKGROUNDS),
}  # fmt: skip
LEXICON = sorted({*draw.WORDS, *(word.upper() for word in (*BACKGROUNDS, *talk.PLACE, *COLOURS, *KINDS, *SIZES))})
CAPTION_WORDS = 32


def _draw_one(index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    scene = make_scene("train", index)
    in_colour = index % 5 < 2
    picture = draw.draw(scene, index, repainted=not in_colour)
    labels = draw.label(scene, index)
    words = [word for line in scene.lines() if line for word in line.split()] + [scene.background]
    for thing in scene.things:
        words += [thing.colour if in_colour else thing.kind, thing.size, thing.place]
    numbers = [1 + LEXICON.index(word.upper()) for word in words]
    padded = np.array(numbers + [0] * (CAPTION_WORDS - len(numbers)))
    pixels = np.asarray(picture.resize((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BICUBIC))
    return pixels, np.stack([getattr(labels, head) for head in PATCH_HEADS]), padded, in_colour


def make_gallery(count: int, processes: int) -> Gallery:
    """The first `count` pictures of the split "train"."""
    with multiprocessing.Pool(processes) as pool:
        drawn = list(
            tqdm(pool.imap(_draw_one, range(count), chunksize=256), total=count, desc="drawing", unit=" pictures")
        )
    pixels, labels, words, in_colour = zip(*drawn, strict=True)
    return Gallery(np.stack(pixels), np.stack(labels), np.stack(words), np.array(in_colour))


class Looking(nn.Module):
    """The vision tower with the heads that teach it; the heads are thrown away afterwards."""

    def __init__(self, tower: CLIPVisionModel) -> None:
        super().__init__()
        width = tower.config.hidden_size
        self.tower = tower
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict({name: nn.Linear(width, 1 + size) for name, size in PATCH_HEADS.items()})
        self.picture_side = nn.Linear(width, tower.config.projection_dim)
        self.text_side = nn.EmbeddingBag(1 + len(LEXICON), tower.config.projection_dim, mode="mean", padding_idx=0)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, pixels: Tensor, labels: Tensor, words: Tensor, in_colour: Tensor) -> Tensor:
        """`pixels` (B, 3, 112, 112); `labels` (B, 6, 64); `words` (B, 32); `in_colour` (B,) bool.

        A picture in nameable colours teaches colours; a grey or repainted one teaches kinds of things. No picture
        teaches both, so that the eyes cannot learn which kinds never come in which colour.
        """
        output = self.tower(pixels, output_hidden_states=True)
        patches_BPD = self.norm(output.hidden_states[-2][:, 1:])
        loss = self._contrast(output.pooler_output, words)
        for i, (name, head) in enumerate(self.heads.items()):
            target_BP = labels[:, i]
            if name in ("kind", "colour"):
                silent = in_colour if name == "kind" else ~in_colour
                target_BP = target_BP.masked_fill(silent[:, None], -100)
            weights = torch.ones(1 + PATCH_HEADS[name], device=pixels.device)
            weights[0] = NOTHING
            loss = loss + F.cross_entropy(head(patches_BPD).float().transpose(1, 2), target_BP, weights)
        return loss

    def _contrast(self, pooled_BD: Tensor, words: Tensor) -> Tensor:
        pictures = F.normalize(self.picture_side(pooled_BD).float(), dim=-1)
        texts = F.normalize(self.text_side(words), dim=-1)
        similarity_BB = self.log_scale.exp().clamp(max=100) * pictures @ texts.T
        own = torch.arange(len(pictures), device=pooled_BD.device)
        return 0.1 * (F.cross_entropy(similarity_BB, own) + F.cross_entropy(similarity_BB.T, own))


def pretrain_eyes(folder: Path, schedule: Schedule, *, pictures: int, processes: int) -> None:
    """Train the vision tower into `folder`, from the last saved step where there is one."""
    torch.manual_seed(0)
    gallery = make_gallery(pictures, processes)
    looking = Looking(CLIPVisionModel(EYES))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))

    def batch(step: int) -> tuple[Tensor, ...]:
        rng = np.random.default_rng((1, step))
        chosen = rng.choice(pictures, schedule.batch, replace=False)
        pixels = torch.from_numpy(gallery.pixels[chosen]).permute(0, 3, 1, 2).float() / 255
        turned_grey = torch.from_numpy(rng.random(schedule.batch) < 0.15)
        grey = pixels.mean(1, keepdim=True).expand_as(pixels)
        pixels = torch.where(turned_grey[:, None, None, None], grey, pixels)
        in_colour = torch.from_numpy(gallery.in_colour[chosen]) & ~turned_grey
        labels = torch.from_numpy(gallery.labels[chosen]).long()
        return (pixels - mean) / std, labels, torch.from_numpy(gallery.words[chosen]), in_colour

    _pretrain(folder, looking, batch, schedule)
    looking.tower.save_pretrained(folder)


# The loop


def _pretrain(folder: Path, module: nn.Module, batch: Callable[[int], tuple[Tensor, ...]], schedule: Schedule) -> None:
    """Muon and AdamW with a warmed-up cosine in bf16 autocast; a JSON line a step; a state every `save_every` steps.

    `batch(step)` depends on the step alone, so that a resumed run sees what the interrupted one would have seen.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module.to(device)
    optimizers = _optimizers(module, schedule)
    state_file = folder / "state.pt"
    first = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=device)
        module.load_state_dict(state["module"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first = state["step"]
    compiled = torch.compile(module, dynamic=False) if worth_compiling(schedule.steps) else module
    started = time.monotonic()
    with (folder / "log.jsonl").open("a") as log:
        for step in tqdm(range(first, schedule.steps), initial=first, total=schedule.steps, desc=folder.name):
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = schedule.learning_rate * _warm_cosine(step, schedule.steps)
            with torch.autocast(device.type, torch.bfloat16):
                loss = compiled(*(tensor.to(device) for tensor in batch(step)))
            if not torch.isfinite(loss):
                raise ArithmeticError(f"the loss is {loss.item()} at step {step}")
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            seconds = time.monotonic() - started
            log.write(json.dumps({"step": step, "loss": round(loss.item(), 4), "seconds": round(seconds, 1)}) + "\n")
            log.flush()
            if (step + 1) % schedule.save_every == 0 or step + 1 == schedule.steps:
                _save_state(state_file, module, optimizers, step + 1)


def worth_compiling(steps: int) -> bool:
    """Whether a run of so many steps gets faster by compiling, on a machine that can."""
    return steps > WORTH_COMPILING and (torch.cuda.is_available() or shutil.which("g++") is not None)


def _optimizers(module: nn.Module, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices of the layers, at AdamW's learning rate (Liu et al. 2025, equation 4);
    AdamW for the rest: embeddings, norms, biases, heads."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        (matrices if ".layers." in name and parameter.ndim == 2 else others).append(parameter)
    decay = schedule.weight_decay
    return [
        torch.optim.Muon(matrices, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=decay, fused=True),
    ]


def _warm_cosine(step: int, steps: int) -> float:
    warm = max(1, round(0.03 * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _save_state(path: Path, module: nn.Module, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    partial = path.with_suffix(".partial")
    saved = [optimizer.state_dict() for optimizer in optimizers]
    torch.save({"module": module.state_dict(), "optimizers": saved, "step": step}, partial)
    partial.replace(path)
