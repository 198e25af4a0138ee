"""Losses of a projection beside piq, MONAI and the lpips package; the noise regulariser beside a plain loop."""

from __future__ import annotations

import numpy as np
import piq
import pytest
import torch
from monai.metrics import compute_ms_ssim

from medgen.errors import UserError
from medgen.losses import LocalLPIPS, LPIPSProjectionLoss, PixelMSSSIMLoss, noise_correlation, projection_loss
from medgen.metrics.diversity import SCALE_WEIGHTS


def smooth_pair(side: int | tuple[int, int], batch: int = 3, channels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and the same with a change that leaves them alike."""
    generator = torch.Generator().manual_seed(0)
    height, width = (side, side) if isinstance(side, int) else side
    coarse = torch.rand(batch, channels, 6, 6, generator=generator)
    target = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    noise = torch.rand(target.shape, generator=generator)
    return (0.8 * target + 0.2 * noise).double(), target.double()


def ms_ssim(image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    loss = PixelMSSSIMLoss(pixel_weight=0, ssim_weight=1)
    return 1 - loss(image, loss.prepare(target))


@pytest.mark.parametrize(
    ("side", "window", "scales"),
    [(16, 7, 2), (32, 7, 3), (64, 7, 4), (128, 7, 5), (192, 11, 5), ((32, 48), 7, 3)],
)
def test_ms_ssim_equals_piq_with_the_same_window_and_scales(side, window, scales):
    image, target = smooth_pair(side)
    weights = torch.tensor(SCALE_WEIGHTS[:scales], dtype=torch.float64)  # piq divides them by their sum
    expected = piq.multi_scale_ssim(
        image, target, kernel_size=window, data_range=1.0, reduction="none", scale_weights=weights
    )
    torch.testing.assert_close(ms_ssim(image, target), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("channels", [1, 3])
def test_ms_ssim_equals_monai_at_full_depth(channels):
    image, target = smooth_pair(192, channels=channels)
    expected = compute_ms_ssim(image, target, spatial_dims=2, kernel_size=11)[:, 0]
    torch.testing.assert_close(ms_ssim(image, target), expected.double(), rtol=1e-4, atol=0)


def test_pixel_term_is_the_weighted_mean_square_of_each_image():
    image, target = smooth_pair(32)
    loss = PixelMSSSIMLoss(pixel_weight=3, ssim_weight=0)
    expected = [3 * np.square((image[n] - target[n]).numpy()).mean() for n in range(3)]
    assert loss(image, loss.prepare(target)).tolist() == pytest.approx(expected)


def test_equal_images_have_distance_zero():
    _, target = smooth_pair(64)
    loss = PixelMSSSIMLoss()
    assert loss(target.float(), loss.prepare(target.float())).abs().max() < 1e-5


def test_gradient_is_the_derivative():
    image, target = smooth_pair(16, batch=1)
    loss = PixelMSSSIMLoss()
    features = loss.prepare(target)
    assert torch.autograd.gradcheck(lambda x: loss(x, features), image.requires_grad_())


def test_opposites_still_have_a_finite_gradient():
    _, target = smooth_pair(32)
    loss = PixelMSSSIMLoss(pixel_weight=0)
    image = (1 - target).float().requires_grad_()  # every local covariance is negative
    loss(image, loss.prepare(target.float())).sum().backward()
    assert image.grad.isfinite().all()
    constant = torch.zeros(1, 1, 32, 32, requires_grad=True)
    loss(constant, loss.prepare(torch.zeros(1, 1, 32, 32))).sum().backward()
    assert constant.grad.isfinite().all()


def test_images_of_a_batch_do_not_influence_each_other():
    image, target = smooth_pair(64)
    loss = PixelMSSSIMLoss()
    together = loss(image, loss.prepare(target))
    alone = torch.cat([loss(image[n : n + 1], loss.prepare(target[n : n + 1])) for n in range(3)])
    torch.testing.assert_close(together, alone)


def test_features_of_targets_can_leave_the_batch():
    image, target = smooth_pair(64)
    loss = PixelMSSSIMLoss()
    kept = tuple(part[[2, 0]] for part in loss.prepare(target))
    torch.testing.assert_close(loss(image[[2, 0]], kept), loss(image, loss.prepare(target))[[2, 0]])


def test_images_that_no_window_fits_are_refused():
    with pytest.raises(UserError, match="at least 7 pixels, got 6"):
        PixelMSSSIMLoss().prepare(torch.rand(1, 1, 6, 20))


@pytest.mark.parametrize("weights", [(-1, 1), (1, -1), (0, 0), (float("nan"), 1)])
def test_weights_that_mean_nothing_are_refused(weights):
    with pytest.raises(UserError, match="must be 0 or more and not both 0"):
        PixelMSSSIMLoss(*weights)


# ---------------------------------------------------------------------------------------------------------------------
# LPIPS


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """The convolutions of a file as torchvision publishes it, with random numbers in it."""
    from torchvision.models import vgg16

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    features = vgg16(weights=None).features.state_dict()
    torch.save({f"features.{name}": value for name, value in features.items()}, path)
    return path


@pytest.mark.parametrize("channels", [1, 3])
def test_squared_distance_of_embeddings_is_lpips(vgg_file, channels):
    image, target = (x.float() for x in smooth_pair(64, batch=2, channels=channels))
    loss, oracle = LPIPSProjectionLoss(vgg_file), LocalLPIPS("vgg", vgg_file, rescale=True)
    expected = torch.stack([oracle(image[n : n + 1], target[n : n + 1]) for n in range(2)])
    torch.testing.assert_close(loss(image, loss.prepare(target)), expected, rtol=1e-4, atol=1e-7)


def test_large_images_are_compared_after_averaging_to_256_pixels(vgg_file):
    image, target = (x.float() for x in smooth_pair((512, 768), batch=1))
    loss, oracle = LPIPSProjectionLoss(vgg_file), LocalLPIPS("vgg", vgg_file, rescale=True)
    small = [torch.nn.functional.avg_pool2d(x, 2) for x in (image, target)]
    torch.testing.assert_close(loss(image, loss.prepare(target))[0], oracle(*small), rtol=1e-4, atol=1e-7)


def test_black_images_have_a_finite_gradient_and_the_network_none(vgg_file):
    loss = LPIPSProjectionLoss(vgg_file)
    image = torch.zeros(1, 1, 32, 32, requires_grad=True)
    loss(image, loss.prepare(torch.rand(1, 1, 32, 32))).sum().backward()
    assert image.grad.isfinite().all()
    assert not any(parameter.requires_grad for parameter in loss.parameters())


def test_missing_weights_are_one_line_that_names_the_way_out(tmp_path):
    with pytest.raises(UserError, match=r"no file at .*absent\.pth; name one, or leave --perceptual_weights out"):
        projection_loss(tmp_path / "absent.pth")


def test_without_weights_the_loss_is_that_of_pixels_and_ms_ssim():
    assert isinstance(projection_loss(None), PixelMSSSIMLoss)


# ---------------------------------------------------------------------------------------------------------------------
# noise


def correlation_by_loop(noise: np.ndarray) -> float:
    total = 0.0
    while True:
        total += sum((noise * np.roll(noise, 1, axis)).mean() ** 2 for axis in (0, 1))
        if min(noise.shape) <= 8:
            return total
        height, width = noise.shape
        noise = noise.reshape(height // 2, 2, width // 2, 2).mean((1, 3))


@pytest.mark.parametrize(
    "sizes", [[(4, 4), (8, 8), (8, 8), (32, 32), (32, 32)], [(4, 6), (8, 12), (16, 24), (16, 24)], [(64, 64)]]
)
def test_noise_correlation_is_that_of_each_map_and_image_summed(sizes):
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(3, 1, *size, generator=generator, dtype=torch.float64) for size in sizes]
    expected = [sum(correlation_by_loop(noise[n, 0].numpy()) for noise in maps) for n in range(3)]
    assert noise_correlation(maps).tolist() == pytest.approx(expected)
    assert noise_correlation(maps[::-1]).tolist() == pytest.approx(expected)


def test_noise_correlation_tells_a_picture_from_noise():
    noise = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.avg_pool2d(noise, 3, 1, 1)
    smooth = (smooth - smooth.mean()) / smooth.std()
    assert noise_correlation([smooth]) > 100 * noise_correlation([noise])
