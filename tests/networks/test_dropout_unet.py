"""Gaussian dropout and the U-Net that keeps it on."""

from __future__ import annotations

import pytest
import torch
from monai.networks.layers import get_dropout_layer
from torch import nn

from medgen.errors import UserError
from medgen.networks import DropoutUNet, GaussianDropout


def small_unet(dropout=0.3, **kwargs) -> DropoutUNet:
    torch.manual_seed(0)
    return DropoutUNet(channels=(4, 8, 8), dropout=dropout, **kwargs).eval()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_noise_has_mean_one_and_the_variance_of_dropout(p):
    torch.manual_seed(1)
    noise = GaussianDropout(p).train()(torch.ones(400_000))
    binary = nn.functional.dropout(torch.ones(400_000), p)
    assert noise.mean().item() == pytest.approx(1, abs=0.01 * (1 + noise.std().item()))
    assert noise.var().item() == pytest.approx(p / (1 - p), rel=0.02)
    assert noise.var().item() == pytest.approx(binary.var().item(), rel=0.04)


def test_noise_multiplies_so_that_zeros_stay_zero():
    assert not GaussianDropout(0.5).train()(torch.zeros(100)).any()


def test_dropout_is_off_at_evaluation_and_at_rate_zero():
    x = torch.randn(5, 5)
    assert torch.equal(GaussianDropout(0.5).eval()(x), x)
    assert torch.equal(GaussianDropout(0.0).train()(x), x)


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_rate_out_of_range_is_refused(p):
    with pytest.raises(UserError, match="from 0 to below 1"):
        GaussianDropout(p)


def test_monai_finds_the_layer_by_name():
    layer = get_dropout_layer(("gaussian", {"p": 0.2}))
    assert isinstance(layer, GaussianDropout)
    assert layer.p == 0.2


def test_dropout_follows_every_pair_of_convolution_and_relu_and_nothing_else():
    kinds = [type(module) for module in small_unet().modules() if not list(module.children())]
    pairs = [kinds[n + 1 :] for n, kind in enumerate(kinds) if kind is nn.Conv2d]
    *inner, head = pairs
    assert len(inner) == 2 * 3 + 2 * 2  # two a level down and up
    for after in inner:
        assert after[:3] == [nn.InstanceNorm2d, nn.ReLU, GaussianDropout]
    assert head == []
    assert kinds.count(GaussianDropout) == len(inner)


@pytest.mark.parametrize(
    ("kwargs", "shape", "expected"),
    [
        ({}, (2, 1, 16, 24), (2, 1, 16, 24)),
        ({"in_channels": 3, "out_channels": 2}, (1, 3, 8, 8), (1, 2, 8, 8)),
        ({"spatial_dims": 3}, (1, 1, 8, 8, 12), (1, 1, 8, 8, 12)),
    ],
)
def test_logits_have_the_images_size(kwargs, shape, expected):
    assert small_unet(**kwargs)(torch.rand(shape)).shape == expected


def test_one_level_is_refused():
    with pytest.raises(UserError, match="at least two levels"):
        DropoutUNet(channels=(8,))


class TestKeepDropout:
    """``keep_dropout``: Monte Carlo dropout with seeds of the images."""

    def outputs(self, network, x, seeds, passes=1):
        with torch.no_grad(), network.keep_dropout(seeds):
            return [network(x) for _ in range(passes)]

    def test_noise_of_an_image_does_not_depend_on_its_batch(self):
        network, x = small_unet(), torch.rand(3, 1, 16, 16)
        together = self.outputs(network, x, [7, 8, 9], passes=2)
        alone = self.outputs(network, x[1:2], [8], passes=2)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[1:2], b, rtol=1e-5, atol=1e-6)

    def test_same_seeds_repeat_and_others_differ(self):
        network, x = small_unet(), torch.rand(1, 1, 16, 16)
        (a,), (b,), (c,) = (self.outputs(network, x, [seed]) for seed in (1, 1, 2))
        assert torch.equal(a, b)
        assert not torch.allclose(a, c)

    def test_passes_differ_and_their_mean_is_near_the_network_without_dropout(self):
        network, x = small_unet(dropout=0.01), torch.rand(1, 1, 16, 16)
        passes = torch.stack(self.outputs(network, x, [1], passes=50))
        assert passes.std(dim=0).min() > 0
        torch.testing.assert_close(passes.mean(dim=0), network(x).detach(), rtol=0, atol=0.15)

    def test_global_generator_and_network_are_left_as_they_were(self):
        network, x = small_unet(), torch.rand(1, 1, 16, 16)
        before, state = network(x), torch.random.get_rng_state()
        self.outputs(network, x, [1])
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.equal(network(x), before)

    def test_without_dropout_nothing_changes(self):
        network, x = small_unet(dropout=0.0), torch.rand(2, 1, 16, 16)
        assert torch.equal(self.outputs(network, x, [1, 2])[0], network(x))

    def test_hooks_are_taken_off_after_an_error(self):
        network, x = small_unet(), torch.rand(2, 1, 16, 16)
        with pytest.raises(ValueError, match="a seed for each of 2 images, got 1"):
            self.outputs(network, x, [1])
        assert torch.equal(network(x), network(x))
