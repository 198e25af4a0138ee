"""StyleGAN2's losses on networks whose gradients are known, and beside arrays of the official implementation."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medgen.convert.stylegan2 import from_official, official_settings
from medgen.errors import UserError
from medgen.losses import (
    PathLengthRegulariser,
    discriminator_loss,
    generator_loss,
    lazy_adam_settings,
    r1_penalty,
)
from medgen.networks import StyleGAN2Discriminator, StyleGAN2Generator
from medgen.transforms import AdaptiveAugment

ASSETS = Path(__file__).parents[1] / "assets"
TINY = {"image_size": 16, "channel_base": 64, "channel_max": 4}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# non-saturating loss


def test_losses_are_binary_cross_entropy_with_the_targets_real_and_generated():
    real, fake = normal(6, 1), normal(6, 1, seed=1)
    ones, zeros = torch.ones_like(real), torch.zeros_like(real)
    bce = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(generator_loss(fake), bce(fake, ones))
    torch.testing.assert_close(discriminator_loss(real, fake), bce(real, ones) + bce(fake, zeros))


def test_an_undecided_discriminator_costs_log_2_for_each_kind_of_image():
    zeros = torch.zeros(4, 1)
    assert float(generator_loss(zeros)) == pytest.approx(math.log(2))
    assert float(discriminator_loss(zeros, zeros)) == pytest.approx(2 * math.log(2))


def test_the_generator_keeps_its_gradient_where_the_discriminator_is_sure():
    logits = torch.tensor([-50.0], requires_grad=True)
    generator_loss(logits).backward()
    assert float(logits.grad) == pytest.approx(-1)


# ---------------------------------------------------------------------------------------------------------------------
# R1


@pytest.mark.parametrize(("gamma", "interval"), [(10.0, 1), (0.5, 16)])
def test_r1_of_a_linear_discriminator_is_its_squared_weight(gamma, interval):
    images, weight = normal(5, 1, 4, 6).requires_grad_(), normal(1, 4, 6, seed=1).requires_grad_()
    penalty = r1_penalty((images * weight).sum((1, 2, 3)), images, gamma, interval)
    torch.testing.assert_close(penalty, gamma / 2 * interval * weight.square().sum())
    (by_weight,) = torch.autograd.grad(penalty, weight)
    torch.testing.assert_close(by_weight, gamma * interval * weight)


def test_r1_of_a_quadratic_discriminator_averages_over_the_images():
    images, matrix = normal(5, 1, 2, 3).requires_grad_(), normal(6, 6, seed=1)
    matrix = matrix + matrix.T
    flat = images.flatten(1)
    penalty = r1_penalty((flat @ matrix * flat).sum(1, keepdim=True) / 2, images, gamma=3.0)
    torch.testing.assert_close(penalty, 1.5 * (flat @ matrix).square().sum(1).mean())


@pytest.mark.parametrize("name", ["gray32", "rgb16_cond2"])
def test_r1_equals_that_of_the_official_implementation(name):
    with np.load(ASSETS / f"stylegan2_{name}.npz", allow_pickle=False) as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    official = {key[2:]: value for key, value in arrays.items() if key.startswith("D.")}
    discriminator = StyleGAN2Discriminator(**official_settings(official), conv_clamp=256.0).eval()
    discriminator.load_state_dict(from_official(official))
    images = arrays["image_noise_const"].requires_grad_()
    logits = discriminator(images, arrays["c"] if discriminator.num_classes else None)
    # the arrays hold the squared norm of each image's gradient
    torch.testing.assert_close(r1_penalty(logits, images, gamma=2.0), arrays["r1_penalty"].mean(), rtol=1e-5, atol=0)


def slope_of(penalty_of, parameter, direction, step=1e-5):
    """Central difference of a penalty along a direction of a parameter."""
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.add_(sign * step * direction)
        values.append(float(penalty_of().detach()))
        with torch.no_grad():
            parameter.sub_(sign * step * direction)
    return (values[0] - values[1]) / (2 * step)


def test_r1_through_augmentation_and_the_real_discriminator_has_the_gradient_of_finite_differences():
    torch.manual_seed(0)
    discriminator = StyleGAN2Discriminator(**TINY).double()
    augment = AdaptiveAugment.from_preset("bgc", 1.0)
    parameters = augment.draw(3, torch.Generator().manual_seed(0))
    images = normal(3, 1, 16, 16).requires_grad_()
    weight = discriminator.blocks[0].conv1.weight

    def penalty():
        return r1_penalty(discriminator(augment(images, parameters)), images)

    direction = normal(*weight.shape, seed=2)
    (gradient,) = torch.autograd.grad(penalty(), weight)
    assert gradient.abs().sum() > 0
    assert float((gradient * direction).sum()) == pytest.approx(slope_of(penalty, weight, direction), rel=1e-5)


def test_r1_refuses_images_that_the_discriminator_saw_without_gradient():
    images = torch.zeros(1, 1, 4, 4)
    with pytest.raises(UserError, match="requires_grad_\\(\\) before"):
        r1_penalty(images.sum((1, 2, 3)), images)


@pytest.mark.parametrize("settings", [{"gamma": -1.0}, {"gamma": math.nan}, {"interval": 0}])
def test_r1_settings_outside_their_range_are_refused(settings):
    images = torch.zeros(1, 1, 4, 4, requires_grad=True)
    with pytest.raises(UserError, match=next(iter(settings))):
        r1_penalty(images.sum((1, 2, 3)), images, **settings)


# ---------------------------------------------------------------------------------------------------------------------
# path length


def linear_generator(ws, matrix, height=4, width=5):
    """Images (B, 1, H, W), linear in w (B, W) or W+ (B, L, W)."""
    return torch.einsum("pk,bk->bp" if ws.ndim == 2 else "plk,blk->bp", matrix, ws).reshape(-1, 1, height, width)


def test_path_length_of_a_linear_generator_is_the_norm_of_its_transpose_times_y():
    ws, matrix, y = normal(3, 6).requires_grad_(), normal(20, 6, seed=1).requires_grad_(), normal(3, 1, 4, 5, seed=2)
    regulariser = PathLengthRegulariser(weight=2.0, decay=0.01, interval=4).double()

    penalty = regulariser(linear_generator(ws, matrix), ws, y)

    lengths = (y.flatten(1) @ matrix).norm(dim=1) / math.sqrt(20)
    a = 0.01 * lengths.detach().mean()  # from 0, where it starts
    expected = 2 * 4 * (lengths - a).square().mean()
    torch.testing.assert_close(penalty, expected)
    torch.testing.assert_close(regulariser.mean, a)
    torch.testing.assert_close(torch.autograd.grad(penalty, matrix)[0], torch.autograd.grad(expected, matrix)[0])


def test_path_length_in_w_plus_takes_the_mean_square_over_layers():
    ws, matrix, y = normal(3, 4, 6).requires_grad_(), normal(20, 4, 6, seed=1), normal(3, 1, 4, 5, seed=2)
    regulariser = PathLengthRegulariser(decay=1.0).double()
    regulariser(linear_generator(ws, matrix), ws, y)
    jacobian_y = torch.einsum("bp,plk->blk", y.flatten(1), matrix) / math.sqrt(20)
    # with a decay of 1 the running mean is the mean of the batch
    torch.testing.assert_close(regulariser.mean, jacobian_y.square().sum(2).mean(1).sqrt().mean())


def test_running_mean_approaches_the_length_geometrically_and_only_in_training():
    ws, matrix, y = normal(3, 6).requires_grad_(), normal(20, 6, seed=1), normal(3, 1, 4, 5, seed=2)
    length = ((y.flatten(1) @ matrix).norm(dim=1) / math.sqrt(20)).mean()
    regulariser = PathLengthRegulariser(decay=0.1).double()
    for _ in range(7):
        regulariser(linear_generator(ws, matrix), ws, y)
    torch.testing.assert_close(regulariser.mean, length * (1 - 0.9**7))
    regulariser.eval()(linear_generator(ws, matrix), ws, y)
    torch.testing.assert_close(regulariser.mean, length * (1 - 0.9**7))


def test_running_mean_goes_on_from_its_saved_state():
    ws, matrix = normal(3, 6).requires_grad_(), normal(20, 6, seed=1)
    undisturbed, before, after = (PathLengthRegulariser().double() for _ in range(3))
    noise = [normal(3, 1, 4, 5, seed=seed) for seed in range(4)]
    for y in noise:
        expected = undisturbed(linear_generator(ws, matrix), ws, y)
    for y in noise[:2]:
        before(linear_generator(ws, matrix), ws, y)
    after.load_state_dict(before.state_dict())
    for y in noise[2:]:
        resumed = after(linear_generator(ws, matrix), ws, y)
    assert torch.equal(resumed, expected)
    assert torch.equal(after.mean, undisturbed.mean)


def test_means_averaged_over_processes_are_those_of_the_whole_batch():
    ws, matrix, y = normal(4, 6).requires_grad_(), normal(20, 6, seed=1), normal(4, 1, 4, 5, seed=2)
    whole, first, second = (PathLengthRegulariser().double() for _ in range(3))
    images = linear_generator(ws, matrix)
    whole(images, ws, y)
    for part, rows in ((first, slice(0, 2)), (second, slice(2, 4))):
        own = ws[rows].detach().requires_grad_()
        part(linear_generator(own, matrix), own, y[rows])
    torch.testing.assert_close((first.mean + second.mean) / 2, whole.mean)


def test_path_length_does_not_depend_on_the_resolution():
    """The same pixel value everywhere, w₁: ‖Jᵀy‖ = |Σ y| / √(HW), half-normal with mean √(2/π) at any size."""
    torch.manual_seed(0)
    for side in (4, 16):
        ws = torch.randn(20_000, 2, requires_grad=True)
        regulariser = PathLengthRegulariser(decay=1.0)
        regulariser(ws[:, :1, None, None].expand(-1, 1, side, side), ws)
        # standard error: 0.6 / √20000
        assert float(regulariser.mean) == pytest.approx(math.sqrt(2 / math.pi), abs=5 * 0.6 / math.sqrt(20_000))


@pytest.mark.parametrize("in_w_plus", [True, False])
def test_path_length_through_the_real_generator_has_the_gradient_of_finite_differences(in_w_plus):
    torch.manual_seed(0)
    generator = StyleGAN2Generator(**TINY, latent_dim=8, w_dim=8, num_mapping_layers=2).double()
    regulariser = PathLengthRegulariser().double().eval()
    z, y = normal(2, 8), normal(2, 1, 16, 16, seed=1)
    weight = generator.synthesis.blocks[1].conv0.weight

    def penalty():
        ws = generator.mapping(z, update_w_avg=False) if in_w_plus else generator.mapping_network(z, None)
        return regulariser(generator.synthesis(ws, "const"), ws, y)

    direction = normal(*weight.shape, seed=2)
    (gradient,) = torch.autograd.grad(penalty(), weight)
    assert gradient.abs().sum() > 0
    assert float((gradient * direction).sum()) == pytest.approx(slope_of(penalty, weight, direction), rel=1e-5)


@pytest.mark.parametrize(("batch", "shrink", "expected"), [(32, 2, 16), (7, 2, 3), (1, 2, 1), (8, 1, 8)])
def test_path_length_batches_are_smaller_but_never_empty(batch, shrink, expected):
    assert PathLengthRegulariser(batch_shrink=shrink).batch_size(batch) == expected


def test_path_length_refuses_ws_of_another_batch():
    with pytest.raises(UserError, match="the ws that the images were made from"):
        PathLengthRegulariser()(torch.zeros(2, 1, 4, 4), torch.zeros(3, 6, requires_grad=True))


@pytest.mark.parametrize("settings", [{"weight": -1.0}, {"decay": 0.0}, {"decay": 1.5}, {"interval": 0}])
def test_path_length_settings_outside_their_range_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        PathLengthRegulariser(**settings)


def test_path_length_refuses_a_batch_shrink_below_one():
    with pytest.raises(UserError, match="batch_shrink must be at least 1, got 0"):
        PathLengthRegulariser(batch_shrink=0)


# ---------------------------------------------------------------------------------------------------------------------
# lazy regularisation


def test_lazy_settings_of_the_two_networks_are_the_papers():
    generator = lazy_adam_settings(0.002, (0.0, 0.99), interval=4)
    discriminator = lazy_adam_settings(0.002, (0.9, 0.99), interval=16)
    assert generator["lr"] == pytest.approx(0.002 * 4 / 5)
    assert generator["betas"] == pytest.approx((0.0, 0.99 ** (4 / 5)))
    assert discriminator["lr"] == pytest.approx(0.002 * 16 / 17)
    assert discriminator["betas"] == pytest.approx((0.9 ** (16 / 17), 0.99 ** (16 / 17)))


def test_one_step_more_with_lazy_settings_moves_as_far_and_forgets_as_much():
    settings = lazy_adam_settings(0.002, (0.5, 0.99), interval=16)
    assert 17 * settings["lr"] == pytest.approx(16 * 0.002)
    assert [beta**17 for beta in settings["betas"]] == pytest.approx([0.5**16, 0.99**16])
    torch.optim.Adam([torch.zeros(1, requires_grad=True)], **settings)


def test_lazy_settings_refuse_an_interval_below_one():
    with pytest.raises(UserError, match="at least 1 step, got 0"):
        lazy_adam_settings(0.002, (0.0, 0.99), 0)
