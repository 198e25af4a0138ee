"""Resizing that keeps the aspect ratio."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.transforms.utils import scale_affine
from monai.utils import TransformBackends, convert_to_dst_type

from medgen.errors import UserError

__all__ = ["ResizeShorterSide", "ResizeShorterSided"]


class ResizeShorterSide(Transform):
    """Resize so that the shorter side has ``size`` pixels and the aspect ratio stays.

    Bilinear with antialiasing, which is what torchvision's ``Resize`` does to a Pillow image and so what the published
    preprocessing did: each output pixel averages all input pixels below it. MONAI's ``Resize`` knows no shorter side,
    and its bilinear mode takes two input pixels per axis however much it shrinks; ``area`` would alias at other than
    whole ratios. The longer side is rounded down, as in torchvision. No value leaves the input's range.

    Args:
        size: pixels of the shorter side.
        enlarge: False leaves smaller images as they are, for a check after it to refuse: enlarged images hold no more
            than they did, and a model trained on them learns to blur.

    Raises:
        UserError: if ``size`` is less than 1.
    """

    backend: ClassVar[list[TransformBackends]] = [TransformBackends.TORCH]

    def __init__(self, size: int, enlarge: bool = True) -> None:
        if size < 1:
            raise UserError(f"size must be at least 1 pixel, got {size}")
        self.size = int(size)
        self.enlarge = enlarge

    def __call__(self, img: NdarrayOrTensor) -> NdarrayOrTensor:
        """Resize one image.

        Args:
            img: (C, H, W), any range.

        Returns:
            (C, H', W') float32 with min(H', W') = size, array or tensor like ``img``, which itself comes back where it
            has that size, or is smaller and not to be enlarged. The affine of a ``MetaTensor`` follows.

        Raises:
            UserError: if the image is not (C, H, W).
        """
        if img.ndim != 3:
            raise UserError(f"expected an image of shape (C, H, W), got {tuple(img.shape)}")
        height, width = img.shape[1:]
        shorter = min(height, width)
        if shorter == self.size or (shorter < self.size and not self.enlarge):
            return img
        target = (height * self.size // shorter, width * self.size // shorter)
        values = torch.from_numpy(np.ascontiguousarray(img)) if isinstance(img, np.ndarray) else img
        values = values.as_subclass(torch.Tensor).float()
        resized = F.interpolate(values[None], size=target, mode="bilinear", antialias=True)[0]
        out = convert_to_dst_type(resized, img, dtype=resized.dtype)[0]
        if isinstance(out, MetaTensor):
            scale = scale_affine((height, width), target)
            out.affine = out.affine @ torch.as_tensor(_embed(scale, len(out.affine)), dtype=out.affine.dtype)
        return out


def _embed(matrix: np.ndarray, size: int) -> np.ndarray:
    """A 2-D homogeneous matrix, (3, 3), as one of ``size`` that leaves the further axes alone."""
    out = np.eye(size)
    out[:2, :2], out[:2, -1] = matrix[:2, :2], matrix[:2, -1]
    return out


class ResizeShorterSided(MapTransform):
    """Dictionary version of :class:`ResizeShorterSide`.

    Args:
        keys: keys of the images.
        size: pixels of the shorter side.
        enlarge: False leaves smaller images as they are.
        allow_missing_keys: whether to skip keys that an item lacks.
    """

    backend = ResizeShorterSide.backend

    def __init__(self, keys: KeysCollection, size: int, enlarge: bool = True, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.resize = ResizeShorterSide(size, enlarge)

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Resize the images of one item; returns a new dictionary."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.resize(d[key])
        return d
