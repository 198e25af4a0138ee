"""Differentiable augmentation of what a discriminator sees.

Written from Zhao et al. 2020, "Differentiable Augmentation for Data-Efficient GAN Training" (arXiv 2006.10738).

Legend of the shape suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from medgen.errors import UserError

__all__ = ["DiffAugment"]

TRANSLATION = 1 / 8  # of the side
CUTOUT = 1 / 2  # of each side


class DiffAugment:
    """Random colours, translation and cutout, in this order, of each image by itself; differentiable.

    ``color``: brightness plus -0.5 to 0.5 (of the range from -1 to 1), saturation times 0 to 2, contrast times 0.5 to
    1.5, all uniform; grey images have no saturation. ``translation``: whole pixels, up to an eighth of the side along
    each axis. ``cutout``: a rectangle of half the sides around a random pixel. What a translation uncovers and what is
    cut out becomes 0.

    Random numbers come from torch's generator of the images' device.

    Args:
        policy: any of the three, as ``"color,translation,cutout"`` or as a list; ``"none"`` for no augmentation.

    Raises:
        UserError: another word.
    """

    def __init__(self, policy: str | Sequence[str]) -> None:
        # MONAI's command line makes a tuple of words with commas between them
        words = policy.split(",") if isinstance(policy, str) else policy if isinstance(policy, Sequence) else []
        words = [word.strip() if isinstance(word, str) else word for word in words]
        self.policy = [name for name in _STEPS if name in words]
        if words != ["none"] and (not words or len(self.policy) != len(words)):
            raise UserError(
                f"diff_augment must be none or some of {','.join(_STEPS)}, each once, got {policy!r}; set "
                "--diff_augment"
            )

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Augment.

        Args:
            image: (B, C, H, W) in [-1, 1].

        Returns:
            (B, C, H, W), new random numbers in each call; colours can leave [-1, 1].
        """
        for name in self.policy:
            image = _STEPS[name](image)
        return image


def _color(image: torch.Tensor) -> torch.Tensor:
    brightness, saturation, contrast = torch.rand(3, len(image), 1, 1, 1, device=image.device, dtype=image.dtype)
    image = image + (brightness - 0.5)
    if image.shape[1] > 1:
        image = torch.lerp(image.mean(1, keepdim=True), image, 2 * saturation)
    return torch.lerp(image.mean((1, 2, 3), keepdim=True), image, contrast + 0.5)


def _translate(image: torch.Tensor) -> torch.Tensor:
    for dim in (2, 3):
        side = image.shape[dim]
        most = round(side * TRANSLATION)
        shift_B = torch.randint(-most, most + 1, (len(image), 1), device=image.device)
        source_BL = torch.arange(side, device=image.device) + shift_B
        shape = [len(image), 1, 1, 1]
        shape[dim] = side
        is_inside = ((source_BL >= 0) & (source_BL < side)).view(shape)
        image = torch.take_along_dim(image, source_BL.clamp(0, side - 1).view(shape), dim) * is_inside
    return image


def _cut_out(image: torch.Tensor) -> torch.Tensor:
    is_cut = torch.ones(1, dtype=torch.bool, device=image.device)
    for dim in (2, 3):
        side = image.shape[dim]
        length = round(side * CUTOUT)
        # any pixel may be the centre: at the edge part of the rectangle lies outside
        start_B = torch.randint(0, side + 1 - length % 2, (len(image), 1), device=image.device) - length // 2
        offset_BL = torch.arange(side, device=image.device) - start_B
        shape = [len(image), 1, 1, 1]
        shape[dim] = side
        is_cut = is_cut & ((offset_BL >= 0) & (offset_BL < length)).view(shape)
    return image * ~is_cut


_STEPS = {"color": _color, "translation": _translate, "cutout": _cut_out}
