"""The forward pass of training: a batch → the sum of its losses, with no work for what teaches nothing."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from finetune.collate import IGNORE, Batch
from finetune.stages import part_of, used_layers
from llava_app.tiles import tiling_of


class SupervisedLoss(nn.Module):
    """A LLaVA and the sum of its losses, in one module, so that accelerate wraps forward pass and loss together."""

    def __init__(self, llava: LlavaForConditionalGeneration, *, compiled: bool = False) -> None:
        super().__init__()
        self.llava = llava
        self._cross_entropy = torch.compile(_cross_entropy, dynamic=True) if compiled else _cross_entropy

    def forward(self, batch: Batch) -> Tensor:
        """Cross entropy summed over the supervised tokens, float32, shape (). Logits are made for those tokens only."""
        embeds_BSD = self.llava.get_input_embeddings()(batch.input_ids)
        features_IPV = batch.features
        if features_IPV is None and batch.pixel_values is not None:
            features_IPV = tower_features(self.llava, batch.pixel_values)
        if features_IPV is not None:
            projector = self.llava.model.multi_modal_projector
            seen = projector(features_IPV.to(projector.linear_1.weight.dtype)).to(embeds_BSD.dtype)
            if batch.image_sizes is not None:
                seen = _rows_of_tiles(self.llava, seen, batch.image_sizes, batch.squeezed)
            places = (batch.input_ids == self.llava.config.image_token_id)[..., None]
            embeds_BSD = embeds_BSD.masked_scatter(places, seen)
        targets = batch.labels[:, 1:]
        taught = targets != IGNORE
        logits_NV = self.llava.lm_head(self._read(embeds_BSD, batch, taught))
        loss = self._cross_entropy(logits_NV, targets[taught])
        return loss if features_IPV is not None else loss + 0 * self._unused()

    def _read(self, embeds_BSD: Tensor, batch: Batch, taught: Tensor) -> Tensor:
        """What the language model makes of the tokens that teach, (N, D)."""
        read = partial(self.llava.model.language_model, inputs_embeds=embeds_BSD, use_cache=False)
        if batch.parts is None:
            return read().last_hidden_state[:, :-1][taught]
        places = taught[0].nonzero()[:, 0]
        return read(position_ids=batch.positions, parts=batch.parts, taught=places).last_hidden_state[0]

    def _unused(self) -> Tensor:
        """Something of every weight that text alone does not reach: every process needs a gradient for every weight."""
        weights = [
            weight.sum()
            for name, weight in self.llava.named_parameters()
            if weight.requires_grad and part_of(name) != "language_model"
        ]
        return torch.stack(weights).sum() if weights else torch.zeros(())


def _cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum")


PACKING = {"llava_next": "vision_feature_select_strategy", "llava_onevision": "vision_aspect_ratio"}


def _rows_of_tiles(llava: PreTrainedModel, seen_TPD: Tensor, sizes_I2: Tensor, squeezed_I: Tensor | None) -> Tensor:
    """The features of tiles in the order of the pictures' rows, without those of the padding, (S, D)."""
    config = llava.config
    tiling = tiling_of(config)
    counts = [tiling.tiles(width, height) for height, width in sizes_I2.tolist()]
    if squeezed_I is not None:
        counts = [1 if alone else count for count, alone in zip(counts, squeezed_I.tolist(), strict=True)]
    setting = PACKING[config.model_type]
    packed, _ = llava.model.pack_image_features(
        seen_TPD.split(counts),
        sizes_I2.tolist(),
        image_newline=llava.model.image_newline,
        **{setting: getattr(config, setting)},
    )
    return torch.cat(packed)


def tower_features(llava: LlavaForConditionalGeneration, pixels_I3HW: Tensor) -> Tensor:
    """What the vision tower sees in I pictures, (I, P, V), as LLaVA's projector takes it.

    The layers behind the one that LLaVA reads are not computed. Works for CLIP and SigLIP.
    """
    tower: PreTrainedModel = llava.model.vision_tower
    with torch.set_grad_enabled(torch.is_grad_enabled() and any(w.requires_grad for w in tower.parameters())):
        hidden_IPV = tower.embeddings(pixels_I3HW.to(tower.dtype))
        if hasattr(tower, "pre_layrnorm"):  # CLIP's, under the name that its first release gave it
            hidden_IPV = tower.pre_layrnorm(hidden_IPV)
        for layer in used_layers(llava):
            hidden_IPV = layer(hidden_IPV, None)
    return hidden_IPV[:, 1:] if llava.config.vision_feature_select_strategy == "default" else hidden_IPV


def compile_layers(llava: LlavaForConditionalGeneration) -> None:
    """Compile the layers that training runs, at their first use; one by one, so that equal ones share a graph."""
    for layer in (*llava.model.language_model.layers, *used_layers(llava)):
        layer.compile(dynamic=True)
