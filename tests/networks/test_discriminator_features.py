"""What discriminators see in an image: their scores begin with it, and it does not depend on the batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from medgen.errors import UserError
from medgen.networks import PGGANDiscriminator, StyleGAN2Discriminator
from medgen.networks.stylegan2 import minibatch_std


def images(batch: int, side: int) -> torch.Tensor:
    return torch.rand(batch, 1, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def pggan() -> PGGANDiscriminator:
    torch.manual_seed(0)
    return PGGANDiscriminator((12, 10, 8, 6)).requires_grad_(False)


def stylegan2(**changes) -> StyleGAN2Discriminator:
    torch.manual_seed(0)
    return StyleGAN2Discriminator(32, channel_base=256, channel_max=16, **changes).requires_grad_(False)


@pytest.mark.parametrize("network", [pggan(), stylegan2()], ids=["pggan", "stylegan2"])
def test_features_halve_the_side_down_to_four_pixels(network):
    assert [f.shape[2:] for f in network.features(images(2, 32))] == [(16, 16), (8, 8), (4, 4)]


@pytest.mark.parametrize("network", [pggan(), stylegan2()], ids=["pggan", "stylegan2"])
def test_features_of_an_image_do_not_depend_on_its_batch_as_its_score_does(network):
    x = images(4, 32)
    for together, alone in zip(network.features(x), network.features(x[1:2]), strict=True):
        torch.testing.assert_close(together[1:2], alone)
    assert (network(x)[1] - network(x[1:2])[0]).abs() > 1e-4


@pytest.mark.parametrize(("resolution", "alpha"), [(32, 1.0), (32, 0.25), (16, 1.0), (8, 0.5)])
def test_pggan_s_score_is_what_its_last_level_makes_of_the_last_feature(resolution, alpha):
    network, x = pggan(), images(4, resolution)
    network.grow(resolution, alpha)
    assert torch.equal(network.blocks[0](network.features(x)[-1]), network(x))


def test_a_level_without_weight_leaves_the_features_of_the_smaller_network():
    network, x = pggan(), images(2, 32)
    network.grow(32, 0.0)
    faded = network.features(x)
    network.grow(16)
    smaller = network.features(F.avg_pool2d(x, 2))
    assert len(faded) == len(smaller) + 1
    for mine, expected in zip(faded[1:], smaller, strict=True):
        torch.testing.assert_close(mine, expected)


def test_a_network_of_one_level_has_no_features():
    network = pggan()
    network.grow(4)
    assert network.features(images(2, 4)) == []


def test_stylegan2_s_score_is_what_its_last_layers_make_of_the_last_feature():
    network, x = stylegan2(), images(4, 32)
    last = network.conv(minibatch_std(network.features(x)[-1], 4))
    assert torch.equal(network.out(network.linear(last.flatten(1))), network(x))


def test_bfloat16_levels_are_computed_in_the_weights_type():
    rounded, exact = stylegan2(num_bf16_resolutions=2), stylegan2()
    rounded.load_state_dict(exact.state_dict())
    x = images(2, 32)
    for mine, expected in zip(rounded.features(x), exact.features(x), strict=True):
        assert torch.equal(mine, expected)
    assert not torch.equal(rounded(x), exact(x))  # the score itself is still rounded


def test_features_need_no_classes():
    torch.manual_seed(0)
    network = StyleGAN2Discriminator(16, channel_base=128, channel_max=8, num_classes=3)
    assert len(network.features(images(2, 16))) == 2


@pytest.mark.parametrize("network", [pggan(), stylegan2()], ids=["pggan", "stylegan2"])
def test_images_of_another_size_are_refused(network):
    with pytest.raises(UserError, match=r"\(B, 1, 32, 32\), got \(2, 1, 16, 16\)"):
        network.features(images(2, 16))
