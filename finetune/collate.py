"""Examples → batches: which examples form a step, and how they become padded tensors.

One item of the training's DataLoader is one optimiser step of one process: a list of micro-batches. So the number of
supervised tokens of the whole step is known before its first backward pass.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from llava_app.prompts import Encoded

IGNORE = -100  # the label of a token that is read, not learned
PAD_MULTIPLE = 8  # padded lengths are multiples of this: aligned rows for the matrix units
CHUNK = 16  # steps within which examples are sorted by length


@dataclass(frozen=True)
class Batch:
    """Right-padded tensors. There is no attention mask: attention is causal, so no token sees the padding after it."""

    input_ids: torch.Tensor  # (B, S) int64
    labels: torch.Tensor  # (B, S) int64, IGNORE outside the answers; not shifted
    pixel_values: torch.Tensor | None  # (I, 3, H, W) float32, the pictures of all rows in order
    tokens: int  # without padding

    @property
    def supervised(self) -> int:
        """How many tokens this batch teaches. The first of a row has nothing before it, so it never counts."""
        return int((self.labels[:, 1:] != IGNORE).sum())

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        pixels = None if self.pixel_values is None else self.pixel_values.to(device)
        return Batch(self.input_ids.to(device), self.labels.to(device), pixels, self.tokens)


def collate(examples: Sequence[Encoded], pad_id: int) -> Batch:
    """Pad to the longest example, in whole multiples of PAD_MULTIPLE; all examples have pictures, or none has."""
    longest = max(len(example.input_ids) for example in examples)
    width = -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
    input_ids = torch.full((len(examples), width), pad_id)
    labels = torch.full((len(examples), width), IGNORE)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = example.input_ids
        labels[row, :length] = example.input_ids.where(example.supervised, IGNORE)
    pixels = [example.pixel_values for example in examples if example.pixel_values is not None]
    tokens = sum(len(example.input_ids) for example in examples)
    return Batch(input_ids, labels, torch.cat(pixels) if pixels else None, tokens)


@dataclass(frozen=True)
class StepCollator:
    """The examples of one step → its micro-batches. Picklable, so that worker processes can hold it."""

    pad_id: int
    micro_batch: int

    def __call__(self, examples: Sequence[Encoded]) -> list[Batch]:
        """Consecutive micro-batches; the last may be smaller."""
        starts = range(0, len(examples), self.micro_batch)
        return [collate(examples[start : start + self.micro_batch], self.pad_id) for start in starts]


@dataclass(frozen=True)
class StepSampler:
    """The indices of each step of one process, over all epochs, from step `start` on.

    Deterministic from the seed and the epoch, so a place in the data is the number of a step. Within CHUNK steps
    examples of similar length come together; examples with and without pictures never share a step. In each epoch
    every example comes once; where a step does not divide by `processes`, its first examples come again.
    """

    lengths: Sequence[int]
    has_images: Sequence[bool]
    global_batch: int
    total: int
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
        with_images = sum(self.has_images)
        return sum(-(-count // self.global_batch) for count in (with_images, len(self.lengths) - with_images))

    def _epoch(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
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
        return [grouped[start : start + self.global_batch] for start in range(0, len(grouped), self.global_batch)]

    def _share(self, step: list[int]) -> list[int]:
        missing = -len(step) % self.processes
        filled = [step[place % len(step)] for place in range(len(step) + missing)]
        return filled[self.process :: self.processes]
