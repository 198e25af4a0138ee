"""Measuring reconstructions, in the form that a bundle's ``evaluate.json`` names."""

from __future__ import annotations

from collections.abc import Callable

import torch
from monai.handlers import IgniteMetricHandler
from monai.metrics import MultiScaleSSIMMetric
from torch.nn import functional as F

from medgen.errors import UserError

__all__ = ["MultiScaleSSIM", "ms_ssim_kernel_size", "shrink_enlarge"]

SCALES = 5  # Wang et al. 2003, section 3.2


def ms_ssim_kernel_size(side: int) -> int:
    """Side of the Gaussian window that five scales leave room for.

    11, as everywhere in the literature, where the image's shorter side is 176 pixels or more; below, the largest odd
    number that fits into the image halved four times. Figures with different windows do not compare.

    Raises:
        UserError: below 48 pixels no window fits.
    """
    # MONAI's check is side // 16 >= window, stricter than the 160 that its message names
    fitting = min(11, side // 2 ** (SCALES - 1))
    kernel_size = fitting if fitting % 2 else fitting - 1
    if kernel_size < 3:
        raise UserError(f"MS-SSIM takes images of at least 48 pixels, got {side}; evaluate larger images")
    return kernel_size


class MultiScaleSSIM(IgniteMetricHandler):
    """Multi-scale structural similarity as a handler; 1 is best.

    Wang et al. 2003, "Multiscale structural similarity for image quality assessment": Gaussian window of sigma 1.5,
    k 0.01 and 0.03, five scales, valid convolution; images in [0, 1].

    Args:
        image_size: shorter side of the images in pixels; sets the window (:func:`ms_ssim_kernel_size`).
        output_transform: engine output -> (prediction, image), lists of (C, H, W) or batches.
    """

    def __init__(self, image_size: int, output_transform: Callable = lambda x: x) -> None:
        metric = MultiScaleSSIMMetric(spatial_dims=2, kernel_size=ms_ssim_kernel_size(image_size))
        super().__init__(metric_fn=metric, output_transform=output_transform, save_details=True)


def shrink_enlarge(image: torch.Tensor, factor: int = 8) -> torch.Tensor:
    """What is left of an image after shrinking it with antialiasing and enlarging it again: the yardstick of a codec.

    Args:
        image: (C, H, W) or (B, C, H, W) in [0, 1], sides divisible by ``factor``.
        factor: how many times smaller.

    Returns:
        Image of the same shape, clipped to [0, 1].
    """
    batch = image if image.ndim == 4 else image[None]
    H, W = batch.shape[-2:]
    small = F.interpolate(batch, size=(H // factor, W // factor), mode="bicubic", antialias=True)
    large = F.interpolate(small, size=(H, W), mode="bicubic").clamp(0, 1)
    return large if image.ndim == 4 else large[0]
