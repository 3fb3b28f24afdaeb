"""Checkpoints of the original LLaVA code (liuhaotian/llava-v1…, v1.5…) → the standard folder, strictly by keys.

Three layouts: whole weights (pytorch_model*.bin or safetensors); mm_projector.bin, which stage 1 leaves, on its
language model; adapter_model.bin and non_lora_trainables.bin, which LoRA leaves, on its language model.
Formats: https://github.com/haotian-liu/LLaVA, llava/model/builder.py and llava/train/llava_trainer.py.
"""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from finetune.assemble import load_tower, write_llava
from llava_app.checkpoints import Card
from llava_app.errors import ModelError

Weights = dict[str, Tensor]
TOWER = "model.vision_tower.vision_tower."
PROJECTOR = "model.mm_projector."
LAYERS = {  # the original's projector → names of its weights → names of the standard class
    "linear": {"weight": "linear_1.weight", "bias": "linear_1.bias"},
    "mlp2x_gelu": {
        "0.weight": "linear_1.weight",
        "0.bias": "linear_1.bias",
        "2.weight": "linear_2.weight",
        "2.bias": "linear_2.bias",
    },
}
SELECT = {"patch": "default", "cls_patch": "full"}
DERIVED = (".rotary_emb.inv_freq", ".position_ids")  # buffers that older versions stored; they follow from the config


def import_original(source: Path, out: Path, *, vision: Path, language: Path | None, template: str) -> Card:
    """Write the checkpoint in `source` to `out` as a standard folder; returns its card.

    `vision` is the folder of its vision tower, `language` that of the language model that a projector or an adapter
    belongs to. Raises ModelError when something is missing, or does not fit key by key.
    """
    if out.exists() and any(out.iterdir()):
        raise ModelError(f"{out} is not empty. Give a new folder.")
    settings = _json(source / "config.json")
    _refuse_unknown(settings, source)
    weights = _all_weights(source, language)
    text = _language(language or source, weights)
    tower, _ = load_tower(vision)
    own = {name.removeprefix("vision_model."): value for name, value in _inside(weights, TOWER).items()}
    if own:
        _fill(tower, own, "vision tower")
    kind = settings.get("mm_projector_type", "linear")
    aligned = (source / "mm_projector.bin").is_file()
    return write_llava(
        tower,
        text,
        AutoTokenizer.from_pretrained(source if list(source.glob("tokenizer*")) else language, local_files_only=True),
        out,
        select=SELECT[settings.get("mm_vision_select_feature", "patch")],
        projector=kind,
        projector_weights=_renamed(_inside(weights, PROJECTOR), LAYERS[kind]),
        feature_layer=settings.get("mm_vision_select_layer", -2),
        image_mode="pad" if settings.get("image_aspect_ratio") == "pad" else "crop",
        template="plain" if aligned else template,
        dtype=next(iter(weights.values())).dtype,
        base=source.name,
        stage="align" if aligned else "instruct",
        about=f"{source.name}, brought over from the original LLaVA code.",
    )


def _refuse_unknown(settings: Mapping[str, Any], source: Path) -> None:
    kind = settings.get("mm_projector_type", "linear")
    if kind not in LAYERS:
        raise ModelError(f"{source.name} has a projector {kind!r}; known are {', '.join(LAYERS)}.")
    if settings.get("mm_use_im_start_end"):
        raise ModelError(f"{source.name} puts start and end tokens around pictures, which no template here writes.")


def _all_weights(source: Path, language: Path | None) -> Weights:
    """The weights of every part, under the original's names, adapters merged."""
    adapted = (source / "adapter_config.json").is_file()
    if not adapted and not (source / "mm_projector.bin").is_file():
        return _read(source, "pytorch_model")
    if language is None:
        raise ModelError(f"{source.name} holds no language model of its own. Give that of its base with --language.")
    weights = _read(language, "pytorch_model")
    if not adapted:
        return weights | _unwrapped(_load(source / "mm_projector.bin"))
    settings = _json(source / "adapter_config.json")
    _merge(weights, _unwrapped(_read(source, "adapter_model")), scale=settings["lora_alpha"] / settings["r"])
    return weights | _unwrapped(_load(source / "non_lora_trainables.bin"))


def _merge(weights: Weights, adapters: Weights, *, scale: float) -> None:
    """Add the product of each pair of adapter matrices to the weight beside them, in float32."""
    for name, down in adapters.items():
        if not name.endswith(".lora_A.weight"):
            continue
        target, up = name.replace(".lora_A", ""), adapters.get(name.replace(".lora_A", ".lora_B"))
        if up is None or target not in weights:
            raise ModelError(f"The adapter {name} has no partner or no weight beside it. Give the base that it is for.")
        weight = weights[target]
        weights[target] = (weight.float() + scale * (up.float() @ down.float())).to(weight.dtype)


def _unwrapped(weights: Weights) -> Weights:
    """Names without what PEFT puts in front; those of mm_projector.bin begin as whole models' do."""
    return {name.removeprefix("base_model.model."): value for name, value in weights.items()}


def _language(folder: Path, weights: Weights) -> LlamaForCausalLM:
    config = LlamaConfig.from_dict({**_json(folder / "config.json"), "model_type": "llama"})
    text = LlamaForCausalLM(config)
    own = {name: value for name, value in weights.items() if not name.startswith((TOWER, PROJECTOR))}
    own.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    _fill(text, own, "language model")
    return text


def _fill(module: nn.Module, weights: Weights, part: str) -> None:
    kept = {name: value for name, value in weights.items() if not name.endswith(DERIVED)}
    try:
        module.load_state_dict(kept, assign=True)
    except RuntimeError as error:
        raise ModelError(f"The weights of its {part} do not fit: {' '.join(str(error).split())[:300]}") from error


def _inside(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _renamed(weights: Weights, names: Mapping[str, str]) -> Weights:
    if weights.keys() != names.keys():
        raise ModelError(f"Its projector has the weights {sorted(weights)}; expected are {sorted(names)}.")
    return {names[name]: value for name, value in weights.items()}


def _read(folder: Path, stem: str) -> Weights:
    """All weights of a folder, one file or shards, .bin or safetensors (there called model*)."""
    bins = sorted(folder.glob(f"{stem}*.bin"))
    tensors = sorted(folder.glob(f"{stem.removeprefix('pytorch_')}*.safetensors"))
    if not bins and not tensors:
        raise ModelError(f"{folder} has neither {stem}*.bin nor safetensors. Download it whole.")
    weights: Weights = {}
    for path in tensors or bins:
        weights |= _load(path)
    return weights


def _load(path: Path) -> Weights:
    """Tensors only: a file that wants to run code is refused."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read as plain tensors: {str(error).splitlines()[0]}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}. Download the folder whole.") from error
