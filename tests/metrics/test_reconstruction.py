"""MS-SSIM against a plain NumPy implementation of the paper; the shrink-and-enlarge yardstick."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from scipy.signal import convolve2d

from medgen.errors import UserError
from medgen.metrics import MultiScaleSSIM, ms_ssim_kernel_size, shrink_enlarge

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def ms_ssim_of_the_paper(x: np.ndarray, y: np.ndarray, window_side: int) -> float:
    axis = np.arange(window_side) - (window_side - 1) / 2
    window = np.exp(-(axis**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    smooth = lambda image: convolve2d(image, window, mode="valid")  # noqa: E731
    product = 1.0
    for scale, weight in enumerate(WEIGHTS):
        mx, my = smooth(x), smooth(y)
        vx, vy, cov = smooth(x * x) - mx**2, smooth(y * y) - my**2, smooth(x * y) - mx * my
        contrast = (2 * cov + 0.03**2) / (vx + vy + 0.03**2)
        luminance = (2 * mx * my + 0.01**2) / (mx**2 + my**2 + 0.01**2)
        term = (luminance * contrast).mean() if scale == len(WEIGHTS) - 1 else contrast.mean()
        product *= max(term, 0.0) ** weight
        x, y = (image.reshape(image.shape[0] // 2, 2, -1, 2).mean((1, 3)) for image in (x, y))
    return product


def measured(prediction: torch.Tensor, image: torch.Tensor) -> float:
    engine = Engine(lambda _, batch: batch)
    MultiScaleSSIM(image_size=image.shape[-1]).attach(engine, "ms_ssim")
    return engine.run([(prediction, image)]).metrics["ms_ssim"]


@pytest.mark.parametrize("side", [64, 192])
def test_ms_ssim_equals_the_paper(side):
    rng = np.random.default_rng(0)
    image = np.cumsum(np.cumsum(rng.normal(size=(3, side, side)), 1), 2)
    image = (image - image.min()) / (image.max() - image.min())
    noisy = np.clip(image + rng.normal(scale=0.05, size=image.shape), 0, 1)
    expected = [ms_ssim_of_the_paper(a, b, ms_ssim_kernel_size(side)) for a, b in zip(noisy, image, strict=True)]
    value = measured(torch.tensor(noisy)[:, None].float(), torch.tensor(image)[:, None].float())
    assert value == pytest.approx(np.mean(expected), abs=2e-4)


@pytest.mark.parametrize(("side", "kernel_size"), [(512, 11), (176, 11), (175, 9), (128, 7), (64, 3), (48, 3)])
def test_window_is_the_literatures_wherever_it_fits(side, kernel_size):
    assert ms_ssim_kernel_size(side) == kernel_size
    assert measured(*torch.rand(2, 2, 1, side, side)) < 1  # and MONAI's metric takes it


def test_too_small_an_image_is_refused():
    with pytest.raises(UserError, match="at least 48 pixels, got 47"):
        ms_ssim_kernel_size(47)


def test_shrinking_keeps_what_is_smooth_and_loses_what_is_finer_than_a_cell():
    ramp = torch.linspace(0.2, 0.8, 64).expand(1, 64, 64)
    checkers = (torch.arange(64)[:, None] + torch.arange(64)[None]).remainder(2).float()[None]
    assert (shrink_enlarge(ramp, 8) - ramp)[..., 16:-16].abs().max() < 0.005
    assert (shrink_enlarge(checkers, 8) - 0.5).abs().max() < 0.01
    assert torch.equal(shrink_enlarge(ramp[None], 8)[0], shrink_enlarge(ramp, 8))
