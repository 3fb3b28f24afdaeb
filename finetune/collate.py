"""Examples → batches: which examples form a step, and how they become tensors, packed or padded.

One item of the training's DataLoader is one optimiser step of one process: a list of micro-batches. So the number of
supervised tokens of the whole step is known before its first backward pass.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llava_app.prompts import Encoded

IGNORE = -100  # the label of a token that is read, not learned
PAD_MULTIPLE = 8  # padded lengths are multiples of this: aligned rows for the matrix units
CHUNK = 16  # steps within which examples are sorted by length


@dataclass(frozen=True)
class Batch:
    """N examples as tensors: packed, one row of S tokens in which they follow each other; or padded, one row each.

    There is no attention mask. Padded: attention is causal, so no token sees the padding after it. Packed: positions
    and `parts` say where an example begins, and no token sees another example. What all examples of the row begin with
    (the system prompt) stands in it once, before the rest of the first.
    """

    input_ids: Tensor  # (B, S) int64
    labels: Tensor  # (B, S) int64, IGNORE outside the answers and at the first token of an example; not shifted
    pixel_values: Tensor | None  # (T, 3, H, W) float32, the pictures of all examples in order, or all their tiles
    lengths: Tensor  # (N,) int64, tokens of each example, always on the CPU
    positions: Tensor | None = None  # packed: (1, S) int64, of each token in its example
    parts: Tensor | None = None  # packed: (1 + N,) int64, tokens that all share, then each example's own; on the CPU
    image_sizes: Tensor | None = None  # (I, 2) int64, height and width of each picture in tiles, always on the CPU
    squeezed: Tensor | None = None  # (I,) bool, on the CPU: one tile all the same; OneVision's, several in an example
    features: Tensor | None = None  # (T, P, V), what the vision tower sees in the pictures, where it is known already

    @property
    def supervised(self) -> int:
        """How many tokens this batch teaches. The first of an example has nothing before it, so it never counts."""
        return int((self.labels != IGNORE).sum())

    @property
    def tokens(self) -> int:
        """How many tokens it has, without padding."""
        return int(self.lengths.sum())

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        names = ("input_ids", "labels", "pixel_values", "positions", "features")
        tensors: dict[str, Any] = {name: getattr(self, name) for name in names}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None})


def pad(examples: Sequence[Encoded], pad_id: int) -> Batch:
    """One row per example, padded to the longest one in whole multiples of PAD_MULTIPLE."""
    longest = max(len(example.input_ids) for example in examples)
    width = -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
    input_ids = torch.full((len(examples), width), pad_id)
    labels = torch.full((len(examples), width), IGNORE)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = example.input_ids
        labels[row, :length] = _labels(example)
    return Batch(input_ids, labels, _pixels(examples), _lengths(examples), **_tiles(examples))


def pack(examples: Sequence[Encoded], image_id: int) -> Batch:
    """All examples behind each other in one row, nothing padded, and what they all begin with only once."""
    lengths, shared = _lengths(examples), _shared(examples, image_id)
    kept = [slice(shared if place else 0, None) for place in range(len(examples))]
    input_ids = torch.cat([example.input_ids[part] for example, part in zip(examples, kept, strict=True)])
    labels = torch.cat([_labels(example)[part] for example, part in zip(examples, kept, strict=True)])
    positions = torch.cat([torch.arange(length)[part] for length, part in zip(lengths.tolist(), kept, strict=True)])
    parts = torch.cat((torch.tensor([shared]), lengths - shared))
    return Batch(input_ids[None], labels[None], _pixels(examples), lengths, positions[None], parts, **_tiles(examples))


def _shared(examples: Sequence[Encoded], image_id: int) -> int:
    """How many tokens all examples begin with that are text and before what is learned; 0 for one example alone."""
    if len(examples) == 1:
        return 0
    limit = min(_unlearned(example) for example in examples)
    begun = torch.stack([example.input_ids[:limit] for example in examples])
    alike = (begun == begun[0]).all(dim=0) & (begun[0] != image_id)
    return int(alike.cumprod(0).sum())


def _unlearned(example: Encoded) -> int:
    """How many tokens could stand elsewhere: they are not learned, and neither is the one behind them."""
    learned = example.supervised.nonzero()
    return max(0, (int(learned[0]) if len(learned) else len(example.input_ids)) - 1)


def _labels(example: Encoded) -> Tensor:
    labels = example.input_ids.where(example.supervised, IGNORE)
    labels[0] = IGNORE
    return labels


def _pixels(examples: Sequence[Encoded]) -> Tensor | None:
    pixels = [example.pixel_values for example in examples if example.pixel_values is not None]
    return torch.cat(pixels) if pixels else None


def _tiles(examples: Sequence[Encoded]) -> dict[str, Tensor]:
    """What a batch says of pictures in tiles, where the model sees tiles."""
    shapes = [example.shapes for example in examples if "image_sizes" in example.shapes]
    if not shapes:
        return {}
    tiles = {"image_sizes": torch.cat([shape["image_sizes"] for shape in shapes])}
    if "batch_num_images" in shapes[0]:
        together = torch.cat([shape["batch_num_images"] for shape in shapes])
        tiles["squeezed"] = (together > 1).repeat_interleave(together)
    return tiles


def _lengths(examples: Sequence[Encoded]) -> Tensor:
    return torch.tensor([len(example.input_ids) for example in examples])


@dataclass(frozen=True)
class StepCollator:
    """The examples of one step → its micro-batches. Picklable, so that worker processes can hold it."""

    pad_id: int
    image_id: int
    micro_batch: int
    packing: bool

    def __call__(self, examples: Sequence[Encoded]) -> list[Batch]:
        """Consecutive micro-batches; the last may be smaller."""
        starts = range(0, len(examples), self.micro_batch)
        parts = [examples[start : start + self.micro_batch] for start in starts]
        return [pack(part, self.image_id) if self.packing else pad(part, self.pad_id) for part in parts]


@dataclass(frozen=True)
class StepSampler:
    """The indices of each step of one process, over all epochs, from step `start` on.

    Deterministic from the seed and the epoch, so a place in the data is the number of a step. In each epoch every
    example comes once; where a step has fewer examples
    than there are `processes`, its first one comes again. `grouped`, for
    padded batches: within CHUNK steps examples of similar length come together, and examples with and without pictures
    never share a step.
    """

    lengths: Sequence[int]
    has_images: Sequence[bool]
    global_batch: int
    total: int
    grouped: bool
    seed: int = 0
    start: int = 0
    process: int = 0
    processes: int = 1

    def __len__(self) -> int:
        return self.total - self.start

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.total):
            epoch, place = divmod(step, self.steps_per_epoch)
            if step == self.start or place == 0:
                steps = self._epoch(epoch)
            yield self._share(steps[place])

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every example comes once."""
        with_images = sum(self.has_images) if self.grouped else 0
        return sum(-(-count // self.global_batch) for count in (with_images, len(self.lengths) - with_images))

    def _epoch(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        if not self.grouped:
            return self._cut(order)
        steps = []
        for kind in (True, False):
            indices = [index for index in order if self.has_images[index] == kind]
            steps += self._grouped(indices)
        return [steps[place] for place in torch.randperm(len(steps), generator=generator).tolist()]

    def _grouped(self, indices: list[int]) -> list[list[int]]:
        span = self.global_batch * CHUNK
        grouped = []
        for start in range(0, len(indices), span):
            grouped += sorted(indices[start : start + span], key=lambda index: self.lengths[index])
        return self._cut(grouped)

    def _cut(self, indices: list[int]) -> list[list[int]]:
        return [indices[start : start + self.global_batch] for start in range(0, len(indices), self.global_batch)]

    def _share(self, step: list[int]) -> list[int]:
        return step[self.process :: self.processes] or step[:1]
