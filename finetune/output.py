"""What a finished run leaves: a standard model folder or, with LoRA, adapters and a projector for its base."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import LlavaForConditionalGeneration, ProcessorMixin

from finetune.adapters import save_adapter
from finetune.checkpoint import Run, save_model, stored_dtype
from finetune.data import Checked
from finetune.stages import learning_parts
from llava_app.checkpoints import Card, revision
from llava_app.errors import TrainingError
from llava_app.loading import stored_weights

ABOUT = {
    "align": "Stage 1 only: it captions a picture in a few words and cannot chat. From {base}, {count:,} examples.",
    "instruct": "Both stages: it answers about pictures. From {base}, {count:,} examples.",
}


@dataclass(frozen=True)
class Output:
    """How the model of a run is saved and described."""

    run: Run
    folder: Path
    base: Card
    source: Path  # where the base's files lie
    processor: ProcessorMixin

    def save(self, folder: Path, model: LlavaForConditionalGeneration, weights: dict[str, Tensor]) -> None:
        """Write all files but the card to `folder`, whole models in the precision of their base."""
        recipe, processor = self.run.recipe, self.processor
        if recipe.lora_rank:
            save_adapter(folder, model, weights, recipe=recipe, base=self.base.source, processor=processor)
        else:
            dtype: torch.dtype = stored_dtype(self.source)
            save_model(folder, model, weights, processor=processor, dtype=dtype)

    def unrounded(self, model: LlavaForConditionalGeneration, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights to save; those that were frozen, and rounded to compute with them, as the base has them."""
        kept = (stored_dtype(self.source), torch.float32)
        frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
        rounded = {name for name in frozen & weights.keys() if weights[name].dtype not in kept}
        if self.run.recipe.lora_rank or not rounded:
            return weights
        stored = stored_weights(self.source)
        return weights | {name: stored[name] for name in rounded}

    def try_saving(self, model: LlavaForConditionalGeneration) -> None:
        """Save once and delete it: a full disk or a config that cannot be saved shows before training, not after."""
        trial = self.folder / "state" / "trial"
        try:
            self.save(trial, model, model.state_dict())
        except (OSError, ValueError, SafetensorError) as error:
            raise TrainingError(f"The model cannot be saved in {self.folder}: {error}") from error
        finally:
            shutil.rmtree(trial, ignore_errors=True)

    def card(self, checked: Checked) -> Card:
        """What the finished model is."""
        recipe = self.run.recipe
        return Card(
            name=self.run.name,
            source=str(self.folder),
            kind="run",
            stage=recipe.stage,
            template=recipe.template,
            image_mode=recipe.image_mode,
            trained=learning_parts(recipe),
            base=self.base.name,
            base_revision=revision(self.source),
            data=checked.summary(),
            recipe=asdict(recipe),
            about=ABOUT[recipe.stage].format(base=self.base.name, count=len(checked.examples)),
        )
