"""Generators as functions of one latent space."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medgen.errors import UserError
from medgen.networks import LatentGenerator, PGGANGenerator, StyleGAN2Generator
from medgen.weights import state_digest

STYLEGAN2 = {"image_size": 16, "channel_base": 64, "channel_max": 8, "latent_dim": 6, "w_dim": 8}


def pggan(num_classes=0) -> PGGANGenerator:
    torch.manual_seed(0)
    return PGGANGenerator((8, 6), latent_dim=5, num_classes=num_classes)


def stylegan2(num_classes=0) -> StyleGAN2Generator:
    torch.manual_seed(0)
    return StyleGAN2Generator(**STYLEGAN2, num_mapping_layers=2, num_classes=num_classes)


@pytest.mark.parametrize(
    ("network", "space", "shape"),
    [
        (pggan(), None, (1, 5)),
        (pggan(3), "z", (1, 8)),
        (stylegan2(), None, (6, 8)),
        (stylegan2(), "w", (1, 8)),
        (stylegan2(3), "w+", (6, 8)),
    ],
)
def test_latents_of_z_make_the_generators_own_images(network, space, shape):
    generator = LatentGenerator(network, space)
    z = torch.randn(4, network.latent_dim)
    labels = torch.tensor([0, 1, 2, 0]) if network.num_classes else None

    latents = generator.from_z(z, labels)

    assert generator.latent_shape == shape
    assert latents.shape == (4, *shape)
    torch.testing.assert_close(generator(latents), (network(z, labels) + 1) / 2)


def test_length_of_a_z_latent_does_not_change_the_image():
    generator = LatentGenerator(pggan())
    latents = generator.from_z(torch.randn(3, 5))

    torch.testing.assert_close(generator(latents * 7), generator(latents))
    torch.testing.assert_close(generator.nearest(latents * 7), latents)
    torch.testing.assert_close(latents.square().mean(2), torch.ones(3, 1))


def test_only_z_is_a_sphere():
    latents = torch.randn(2, 6, 8)

    assert LatentGenerator(stylegan2()).nearest(latents) is latents


def test_errors_are_relative_to_the_variance_of_w():
    generator = LatentGenerator(stylegan2(), "w")
    latents = generator.from_z(torch.randn(20_000, 6))

    # of the mean nothing is explained; of itself all
    assert generator.relative_error(generator.mean.expand_as(latents), latents).mean() == pytest.approx(1, rel=0.05)
    assert generator.relative_error(latents, latents).max() == 0
    torch.testing.assert_close(latents.mean(0), generator.mean, atol=0.05, rtol=0)


def test_statistics_of_classes_hold_the_variance_between_them():
    network = stylegan2(num_classes=4)
    generator = LatentGenerator(network, "w")
    labels = torch.arange(40_000) % 4
    latents = generator.from_z(torch.randn(40_000, 6), labels)

    torch.testing.assert_close(latents.mean(0), generator.mean, atol=0.05, rtol=0)
    assert latents.var(0).mean().sqrt() == pytest.approx(float(generator.std), rel=0.02)


def test_error_on_the_sphere_is_twice_one_minus_the_cosine():
    generator = LatentGenerator(pggan())
    a, b = generator.from_z(torch.randn(6, 5)), generator.from_z(torch.randn(6, 5))

    torch.testing.assert_close(generator.relative_error(a, b), 2 * (1 - generator.cosine(a, b)))


def test_cosine_counts_from_the_mean():
    generator = LatentGenerator(stylegan2())
    deviation = torch.randn(3, 6, 8)

    torch.testing.assert_close(
        generator.cosine(generator.mean + deviation, generator.mean - 2 * deviation), -torch.ones(3)
    )


def test_generator_takes_no_gradient_and_stays_in_evaluation_mode():
    generator = LatentGenerator(stylegan2())
    before = state_digest(generator.network)
    latents = generator.from_z(torch.randn(2, 6)).requires_grad_()

    generator.train()
    generator(latents).sum().backward()

    assert not generator.network.training
    assert latents.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in generator.parameters())
    assert state_digest(generator.network) == before


def test_growing_generator_gives_the_size_that_it_is_grown_to():
    network = pggan()
    network.grow(4)

    assert LatentGenerator(network).image_size == (4, 4)


def test_digest_sees_buffers_and_single_bits():
    network = stylegan2()
    before = state_digest(network)
    network.w_avg[3] = torch.nextafter(network.w_avg[3], torch.tensor(1.0))

    assert state_digest(network) != before


@pytest.mark.parametrize(
    ("network", "space", "message"),
    [
        (pggan(), "w", "space must be z for a PGGANGenerator, got 'w'"),
        (stylegan2(), "z", "space must be w\\+ or w for a StyleGAN2Generator"),
        (nn.Linear(2, 2), None, "takes a PGGANGenerator or a StyleGAN2Generator, got Linear"),
    ],
)
def test_wrong_network_or_space_is_refused(network, space, message):
    with pytest.raises(UserError, match=message):
        LatentGenerator(network, space)


def test_latents_of_another_space_are_refused():
    with pytest.raises(UserError, match=r"latents must be \(B, 6, 8\).*got \(2, 1, 8\)"):
        LatentGenerator(stylegan2())(torch.zeros(2, 1, 8))
