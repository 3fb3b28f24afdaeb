"""How many tiles a model cuts a picture into, and how many tokens it makes of them: arithmetic on width and height.

AnyRes (LLaVA-1.6): the picture is fitted into the best of some grids of tiles, padded, and read tile by tile after an
overview of the whole; the features of the padding are dropped, and one more feature ends each row. OneVision's
anyres_max_9 then shrinks the rows to what nine tiles would take. LLaVA-1.5 has one tile and no rows.
"""

import math
from dataclasses import dataclass

from transformers import PretrainedConfig

SLACK = 1.1  # squared, how much more than its most tiles OneVision leaves unshrunk


@dataclass(frozen=True)
class Tiling:
    """How a model cuts pictures. Sizes are pixels, width before height, but for `grids`."""

    side: int  # of a tile
    patches: int  # along a side of a tile, each one feature
    class_tokens: int = 0  # of a tile, kept as features
    grids: tuple[tuple[int, int], ...] = ()  # (height, width) that a picture may be fitted into; none: one tile
    most: int | None = None  # tiles whose features a picture takes at most, beside the overview

    def tiles(self, width: int, height: int) -> int:
        """Tiles of a picture, the overview included."""
        rows, columns = self._shape(width, height)
        return 1 + rows * columns

    def tokens(self, width: int, height: int) -> int:
        """Tokens of a picture in a prompt."""
        rows, columns = self._shape(width, height)
        if not rows:
            return self._overview
        high, wide = _unpadded(width, height, high=rows * self.patches, wide=columns * self.patches)
        ratio = math.sqrt(high * wide / (self.most * self.patches**2)) if self.most else 1
        if ratio > SLACK:
            high, wide = int(high // ratio), int(wide // ratio)
        return self._overview + high * (wide + 1)

    @property
    def most_tokens(self) -> int:
        """No picture takes more tokens than this."""
        if not self.grids:
            return self._overview
        room = SLACK**2 * self.most * self.patches**2 if self.most else math.inf
        shapes = [(height // self.side, width // self.side) for height, width in self.grids]
        return self._overview + max(
            int(min(rows * columns * self.patches**2, room)) + rows * self.patches for rows, columns in shapes
        )

    @property
    def most_tiles(self) -> int:
        """No picture has more tiles than this."""
        return 1 + max((height // self.side * (width // self.side) for height, width in self.grids), default=0)

    @property
    def _overview(self) -> int:
        return self.patches**2 + self.class_tokens

    def _shape(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of tiles beside the overview."""
        if not self.grids:
            return 0, 0
        best = max(self.grids, key=lambda grid: _fitness(width, height, grid))
        return best[0] // self.side, best[1] // self.side


def tiling_of(config: PretrainedConfig) -> Tiling:
    """How the LLaVA of this config cuts pictures."""
    vision = config.vision_config
    with_class = config.vision_feature_select_strategy == "full" and vision.model_type == "clip_vision_model"
    limit = getattr(config, "vision_aspect_ratio", "")  # OneVision's: "anyres_max_9"
    return Tiling(
        side=vision.image_size,
        patches=vision.image_size // vision.patch_size,
        class_tokens=int(with_class),
        grids=tuple((height, width) for height, width in getattr(config, "image_grid_pinpoints", ())),
        most=int(limit.removeprefix("anyres_max_")) if limit else None,
    )


def _fitness(width: int, height: int, grid: tuple[int, int]) -> tuple[int, int]:
    """How well a picture fits a grid: the pixels that it keeps there, then as few others as possible."""
    scale = min(grid[1] / width, grid[0] / height)
    kept = min(int(width * scale) * int(height * scale), width * height)
    return kept, kept - grid[0] * grid[1]


def _unpadded(width: int, height: int, *, high: int, wide: int) -> tuple[int, int]:
    """Rows and columns of features without those that lie in the padding."""
    if width / height > wide / high:
        padding = (high - int(round(height * (wide / width), 7))) // 2
        return high - 2 * padding, wide
    padding = (wide - int(round(width * (high / height), 7))) // 2
    return high, wide - 2 * padding
