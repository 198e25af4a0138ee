"""Probabilities and their spread."""

from __future__ import annotations

import pytest
import torch

from medgen.errors import UserError
from medgen.inferers import SegmentationInferer, with_noise_seeds
from medgen.networks import DropoutUNet


def network(dropout=0.3) -> DropoutUNet:
    torch.manual_seed(0)
    return DropoutUNet(channels=(4, 8), dropout=dropout).eval()


@torch.no_grad()
def test_without_passes_there_is_the_sigmoid_and_no_uncertainty():
    net, x = network(), torch.rand(2, 1, 8, 8)
    out = SegmentationInferer()(x, net)
    assert list(out) == ["probability"]
    assert torch.equal(out["probability"], torch.sigmoid(net(x)))


@torch.no_grad()
def test_mean_and_standard_deviation_are_those_of_the_passes():
    net, x, seeds = network(), torch.rand(2, 1, 8, 8), [3, 4]
    with net.keep_dropout(seeds):
        passes = torch.stack([torch.sigmoid(net(x)) for _ in range(5)])
    out = SegmentationInferer(5)(x, net, seeds=torch.tensor(seeds))
    torch.testing.assert_close(out["probability"], passes.mean(dim=0))
    torch.testing.assert_close(out["uncertainty"], passes.std(dim=0, unbiased=False), rtol=1e-4, atol=1e-6)
    assert 0 < out["uncertainty"].max() <= 0.5


@torch.no_grad()
def test_uncertainty_of_an_image_does_not_depend_on_its_batch():
    net, x = network(), torch.rand(3, 1, 8, 8)
    together = SegmentationInferer(4)(x, net, seeds=[1, 2, 3])["uncertainty"]
    alone = SegmentationInferer(4)(x[2:], net, seeds=[3])["uncertainty"]
    torch.testing.assert_close(together[2:], alone, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_uncertainty_is_zero_without_dropout():
    net, x = network(dropout=0.0), torch.rand(1, 1, 8, 8)
    out = SegmentationInferer(3)(x, net, seeds=[1])
    torch.testing.assert_close(out["uncertainty"], torch.zeros(1, 1, 8, 8), rtol=0, atol=1e-7)
    torch.testing.assert_close(out["probability"], torch.sigmoid(net(x)))


@pytest.mark.parametrize("passes", [1, -1, 2.5, True])
def test_number_of_passes_is_checked(passes):
    with pytest.raises(UserError, match="mc_passes must be 0"):
        SegmentationInferer(passes)


def test_seeds_follow_the_run_and_the_image_but_neither_the_place_of_the_data_nor_the_order():
    here = with_noise_seeds([{"image": "/a/x/1.png"}, {"image": "/a/y/1.png"}], 5, "/a")
    moved = with_noise_seeds([{"image": "/b/c/y/1.png"}], 5, "/b/c")
    other_run = with_noise_seeds([{"image": "/a/x/1.png"}], 6, "/a")
    seeds = [item["noise_seed"] for item in here]
    assert seeds[1] == moved[0]["noise_seed"]
    assert len({*seeds, other_run[0]["noise_seed"]}) == 3
