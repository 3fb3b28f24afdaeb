"""What a frozen vision tower sees in each picture, kept on disk for the next epoch and the next run.

FOLDER/TOWER/PICTURE.npy, float16, (P, V): TOWER is the hash of the tower's weights and of what is read from it,
PICTURE that of the prepared pixels. So nothing can be out of date, and the folder can be deleted at any time.
"""

import hashlib
import os
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path

import numpy
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from finetune.collate import Batch
from finetune.supervision import tower_features


@dataclass
class FeatureStore:
    """Features below `folder`, up to `limit` bytes or until the disk is full; what is beyond is computed each time."""

    folder: Path
    limit: float
    held: int = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.held = sum(path.stat().st_size for path in self.folder.glob("*.npy"))

    def fill(self, batch: Batch, llava: LlavaForConditionalGeneration) -> Batch:
        """The batch with features in place of its pictures.

        They are rounded to float16 whether they come from disk or not, so that training does not depend on it.
        """
        if batch.pixel_values is None:
            return batch
        paths = [self.folder / f"{_digest(pixels)}.npy" for pixels in batch.pixel_values]
        missing = [place for place, path in enumerate(paths) if not path.exists()]
        fresh: dict[int, Tensor] = {}
        if missing:
            with torch.no_grad():
                seen_IPV = tower_features(llava, batch.pixel_values[missing].to(llava.device)).half().cpu()
            fresh = dict(zip(missing, seen_IPV, strict=True))
        for place, seen_PV in fresh.items():
            self._keep(paths[place], seen_PV)
        seen = (
            fresh[place] if place in fresh else torch.from_numpy(numpy.load(path)) for place, path in enumerate(paths)
        )
        features = torch.stack([seen_PV.float() for seen_PV in seen])  # a CPU's autocast to bfloat16 stacks no float16
        return replace(batch, pixel_values=None, features=features)

    def _keep(self, path: Path, seen_PV: Tensor) -> None:
        if self.held + seen_PV.nbytes > self.limit:
            return
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        written = BytesIO()  # numpy.save does not notice that a disk takes a part of a file only
        numpy.save(written, seen_PV.numpy())
        try:
            temporary.write_bytes(written.getbuffer())
            temporary.replace(path)
        except OSError as error:  # a full disk
            temporary.unlink(missing_ok=True)
            self.limit = 0.0
            tqdm.write(f"{self.folder} cannot be written ({error}). No more features are kept; training goes on.")
            return
        self.held += path.stat().st_size


def tower_digest(llava: LlavaForConditionalGeneration) -> str:
    """What tells this vision tower, and the layer that is read, from others."""
    config = llava.config
    digest = hashlib.sha256(f"{config.vision_feature_layer} {config.vision_feature_select_strategy}".encode())
    for weight in llava.model.vision_tower.state_dict().values():
        digest.update(_bytes(weight))
    return digest.hexdigest()[:16]


def _digest(pixels: Tensor) -> str:
    return hashlib.sha256(_bytes(pixels)).hexdigest()[:32]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data
