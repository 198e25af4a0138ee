"""Checks that an image is what the network after it expects."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import ClassVar

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, ensure_tuple_rep

from medgen.errors import UserError

__all__ = ["CheckImage", "CheckImaged"]

ROUNDING = 1e-5  # what float32 arithmetic on [0, 1] may leave outside


class CheckImage(Transform):
    """Pass an image on unchanged, or say in one line what is wrong with it.

    Args:
        channels: the number of channels.
        spatial_shape: height and width, or one number for both.
        min_shape: least height and width, or one number for both: the size of a crop that follows.
        divisible_by: height and width must be multiples of this: the network's total downsampling.
        value_range: least and greatest value; None for any. Values that are not finite are always refused.

    Raises:
        UserError: if an argument makes no sense.
    """

    backend: ClassVar[list[TransformBackends]] = [TransformBackends.TORCH, TransformBackends.NUMPY]

    def __init__(
        self,
        channels: int,
        spatial_shape: Sequence[int] | int | None = None,
        min_shape: Sequence[int] | int | None = None,
        divisible_by: int | None = None,
        value_range: Sequence[float] | None = (0.0, 1.0),
    ) -> None:
        if channels < 1:
            raise UserError(f"channels must be at least 1, got {channels}")
        if divisible_by is not None and divisible_by < 1:
            raise UserError(f"divisible_by must be at least 1, got {divisible_by}")
        if value_range is not None and (len(value_range) != 2 or not value_range[0] < value_range[1]):
            raise UserError(f"value_range must be a least and a greater value such as (0, 1), got {value_range}")
        self.channels = channels
        self.spatial_shape = _two_sides("spatial_shape", spatial_shape)
        self.min_shape = _two_sides("min_shape", min_shape)
        self.divisible_by = divisible_by
        self.value_range = value_range

    def __call__(self, img: NdarrayOrTensor, name: str = "image") -> NdarrayOrTensor:
        """Check one image.

        Args:
            img: (channels, H, W).
            name: what to call the image where no metadata say its file.

        Returns:
            ``img`` itself.

        Raises:
            UserError: if something is not as expected.
        """
        if isinstance(img, MetaTensor):
            name = str(img.meta.get("filename_or_obj", name))
        if img.ndim != 3:
            raise UserError(f"{name}: expected an image of shape (C, H, W), got {tuple(img.shape)}")
        channels, height, width = img.shape
        if channels != self.channels:
            raise UserError(
                f"{name}: expected {self.channels} channel(s), got {channels}; preprocess with --channels grey "
                "or rgb, or set in_channels"
            )
        size = f"{height}×{width} pixels (height × width)"
        if self.spatial_shape and (height, width) != self.spatial_shape:
            expected = "×".join(map(str, self.spatial_shape))
            raise UserError(
                f"{name}: is {size}, expected {expected}; preprocess with --size {min(self.spatial_shape)} or set "
                "image_size"
            )
        if self.min_shape and (height < self.min_shape[0] or width < self.min_shape[1]):
            expected = "×".join(map(str, self.min_shape))
            raise UserError(
                f"{name}: is {size}, smaller than the crop of {expected}; preprocess with --size "
                f"{max(self.min_shape)} or lower image_size"
            )
        if self.divisible_by and (height % self.divisible_by or width % self.divisible_by):
            raise UserError(
                f"{name}: is {size}, expected multiples of {self.divisible_by}; crop or pad it, or set image_size to a "
                f"multiple of {self.divisible_by}"
            )
        if not height or not width:
            raise UserError(f"{name}: is {size}; leave the file out of the datalist")
        low, high = float(img.min()), float(img.max())  # NaN spreads to both, infinity shows in one
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise UserError(f"{name}: has values that are not finite; leave the file out of the datalist")
        if self.value_range and (low < self.value_range[0] - ROUNDING or high > self.value_range[1] + ROUNDING):
            raise UserError(
                f"{name}: has values from {low:g} to {high:g}, expected {self.value_range[0]:g} to "
                f"{self.value_range[1]:g}; read it with MedicalImageReader or scale its intensities"
            )
        return img


def _two_sides(argument: str, shape: Sequence[int] | int | None) -> tuple[int, int] | None:
    if shape is None:
        return None
    try:
        sides = ensure_tuple_rep(shape, 2)
    except ValueError:
        sides = ()
    if len(sides) != 2 or any(int(side) != side or side < 1 for side in sides):
        raise UserError(f"{argument} must be height and width in pixels, got {shape}")
    return int(sides[0]), int(sides[1])


class CheckImaged(MapTransform):
    """Dictionary version of :class:`CheckImage`.

    Args:
        keys: keys of the images.
        channels: see :class:`CheckImage`.
        spatial_shape: see :class:`CheckImage`.
        min_shape: see :class:`CheckImage`.
        divisible_by: see :class:`CheckImage`.
        value_range: see :class:`CheckImage`.
        allow_missing_keys: whether to skip keys that an item lacks.
    """

    backend = CheckImage.backend

    def __init__(
        self,
        keys: KeysCollection,
        channels: int,
        spatial_shape: Sequence[int] | int | None = None,
        min_shape: Sequence[int] | int | None = None,
        divisible_by: int | None = None,
        value_range: Sequence[float] | None = (0.0, 1.0),
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.check = CheckImage(channels, spatial_shape, min_shape, divisible_by, value_range)

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Check the images of one item; returns a new dictionary with the same images."""
        d = dict(data)
        for key in self.key_iterator(d):
            self.check(d[key], name=str(key))
        return d
