"""Grey and colour images to the number of channels a network takes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import ClassVar

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends

from medgen.errors import UserError

__all__ = ["EnsureChannels", "EnsureChannelsd"]

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, what Pillow's convert("L") uses


class EnsureChannels(Transform):
    """Grey (1, H, W) to colour (3, H, W) by repetition, colour to grey by ITU-R 601 luma; else unchanged.

    Args:
        channels: 1 or 3.

    Raises:
        UserError: if ``channels`` is neither 1 nor 3.
    """

    backend: ClassVar[list[TransformBackends]] = [TransformBackends.TORCH, TransformBackends.NUMPY]

    def __init__(self, channels: int) -> None:
        if channels not in (1, 3):
            raise UserError(f"channels must be 1 (grey) or 3 (RGB), got {channels}")
        self.channels = channels

    def __call__(self, img: NdarrayOrTensor) -> NdarrayOrTensor:
        """Convert one image.

        Args:
            img: (1, H, W) or (3, H, W), any range.

        Returns:
            (channels, H, W) of the same type and range.

        Raises:
            UserError: if the image has another shape.
        """
        if img.ndim != 3 or img.shape[0] not in (1, 3):
            name = img.meta.get("filename_or_obj", "image") if isinstance(img, MetaTensor) else "image"
            raise UserError(f"{name}: expected (C, H, W) with 1 or 3 channels, got shape {tuple(img.shape)}")
        if img.shape[0] == self.channels:
            return img
        if self.channels == 3:
            return np.repeat(img, 3, axis=0) if isinstance(img, np.ndarray) else img.repeat(3, 1, 1)
        red, green, blue = (LUMA[i] * img[i : i + 1] for i in range(3))
        return red + green + blue


class EnsureChannelsd(MapTransform):
    """Dictionary version of :class:`EnsureChannels`.

    Args:
        keys: keys of the images.
        channels: 1 or 3.
        allow_missing_keys: whether to skip keys that an item lacks.
    """

    backend = EnsureChannels.backend

    def __init__(self, keys: KeysCollection, channels: int, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.convert = EnsureChannels(channels)

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Convert the images of one item; returns a new dictionary."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.convert(d[key])
        return d
