"""Which resolution a progressively grown network is at, after how many images."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from medgen.errors import UserError

__all__ = ["GrowthSchedule", "GrowthStage"]

SMALLEST = 4  # pixels of the first level (Karras et al. 2018, table 2)


@dataclass(frozen=True)
class GrowthStage:
    """Where a growing network stands.

    Attributes:
        level: number of the level in the schedule, from 0.
        resolution: side of the images, pixels.
        alpha: weight of the newest level's path, from 0 (just added) to 1 (fully in).
        batch_size: images in a step, of all processes together.
        lr: learning rate.
        phase: 0 for the first level, then 2·level − 1 while a level fades in and 2·level once it is in: optimisers
            forget their moments when it changes.
    """

    level: int
    resolution: int
    alpha: float
    batch_size: int
    lr: float
    phase: int


@dataclass(frozen=True)
class GrowthSchedule:
    """Levels of progressive growing, measured in images shown (Karras et al. 2018, arXiv 1710.10196, section 2).

    Every argument has one entry a level.

    Example::

        GrowthSchedule([4, 8, 16], [128, 128, 64], [0.001] * 3, [600_000, 1_200_000, 3_000_000], [0, 600_000, 600_000])

    Args:
        resolutions: sides of the images in pixels; powers of two from 4 on, each twice the one before.
        batch_sizes: images in a step, of all processes together.
        lrs: learning rates.
        images: images shown at a level in all, its fading in included; at least the batch of the level before.
        fade_images: how many of them while it fades in, at least such a batch or 0; 0 for the first.

    Raises:
        UserError: the lists differ in length, or a setting is out of range.
    """

    resolutions: Sequence[int]
    batch_sizes: Sequence[int]
    lrs: Sequence[float]
    images: Sequence[int]
    fade_images: Sequence[int]

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            values = getattr(self, name)
            if not isinstance(values, Sequence) or isinstance(values, str):
                raise UserError(f"{name} must be a list with one entry a level, got {values!r}; set --{name}")
            object.__setattr__(self, name, tuple(values))
        if not self.resolutions:
            raise UserError("resolutions must name at least one level, got none; set --resolutions")
        for name in self.__dataclass_fields__:
            count = len(getattr(self, name))
            if count != len(self.resolutions):
                raise UserError(
                    f"{name} must have one entry for each of the {len(self.resolutions)} resolutions, got {count}; "
                    f"set --{name}"
                )
        for name, minimum in {"resolutions": SMALLEST, "batch_sizes": 1, "images": 1, "fade_images": 0}.items():
            for value in getattr(self, name):
                if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                    raise UserError(f"{name} must be whole numbers of at least {minimum}, got {value!r}; set --{name}")
        expected = tuple(self.resolutions[0] << level for level in range(len(self.resolutions)))
        if self.resolutions[0].bit_count() != 1 or self.resolutions != expected:
            raise UserError(
                f"resolutions must be powers of two from {SMALLEST} on, each twice the one before, got "
                f"{list(self.resolutions)}; set --resolutions"
            )
        for value in self.lrs:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise UserError(f"lrs must be numbers above 0, got {value!r}; set --lrs")
        if self.fade_images[0]:
            raise UserError(
                f"fade_images must begin with 0, since the first level has nothing to fade from, got "
                f"{self.fade_images[0]}; set --fade_images"
            )
        for resolution, images, fade in zip(self.resolutions, self.images, self.fade_images, strict=True):
            if fade > images:
                raise UserError(
                    f"fade_images must not exceed images, got {fade} of {images} at {resolution}×{resolution}; lower "
                    "--fade_images or raise --images"
                )
        for level in range(1, len(self.resolutions)):
            # the step that ends a level takes up to a batch from the next one, of which something must be left
            batch_size = self.batch_sizes[level - 1]
            for name in ("images", "fade_images"):
                count = getattr(self, name)[level]
                if count < batch_size and (count or name == "images"):
                    raise UserError(
                        f"{name} must be at least the batch of the level before, {batch_size}, got {count} at "
                        f"{self.resolutions[level]}×{self.resolutions[level]}: a step would skip them; raise --{name} "
                        "or lower --batch_sizes"
                    )
        object.__setattr__(self, "_starts", (0, *accumulate(self.images)))

    @property
    def total_images(self) -> int:
        """Images shown at all levels."""
        return self._starts[-1]

    def level_start(self, level: int) -> int:
        """Images shown before a level is added.

        Args:
            level: from 0; the number of levels gives the end of the training.
        """
        return self._starts[level]

    def at(self, images_seen: int) -> GrowthStage:
        """The stage of the step that begins after so many images; beyond the end, that of the end.

        A step that begins before the end of a level belongs to that level with all its images: the next level then
        begins up to a step later, and is shorter by as much.

        Args:
            images_seen: images shown before, on all processes.

        Raises:
            ValueError: a negative number.
        """
        if images_seen < 0:
            raise ValueError(f"images_seen must be at least 0, got {images_seen}")
        level = min(bisect_right(self._starts, images_seen), len(self.images)) - 1
        into, fade = images_seen - self._starts[level], self.fade_images[level]
        fading = into < fade
        return GrowthStage(
            level=level,
            resolution=self.resolutions[level],
            alpha=into / fade if fading else 1.0,
            batch_size=self.batch_sizes[level],
            lr=self.lrs[level],
            phase=2 * level - fading,
        )
