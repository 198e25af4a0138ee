"""Starting a StyleGAN2 from a trained one of other channels, resolution or classes."""

from __future__ import annotations

import logging

import pytest
import torch

from medgen.errors import UserError
from medgen.networks import StyleGAN2Discriminator, StyleGAN2Generator, transfer_stylegan2

TINY = {"image_size": 16, "channel_base": 128, "channel_max": 8}
TINY_G = {**TINY, "latent_dim": 8, "w_dim": 8, "num_mapping_layers": 2}


def trained(network, path):
    """Weights that no fresh network has, saved."""
    torch.manual_seed(5)
    with torch.no_grad():
        for value in network.state_dict().values():
            value.normal_()
    torch.save(network.state_dict(), path)
    return network.eval()


def test_same_architecture_takes_everything(tmp_path):
    source = trained(StyleGAN2Generator(**TINY_G), tmp_path / "g.pt")
    target = transfer_stylegan2(StyleGAN2Generator(**TINY_G), tmp_path / "g.pt")
    torch.testing.assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)


def test_no_file_leaves_the_network_as_it_is():
    network = StyleGAN2Generator(**TINY_G)
    assert transfer_stylegan2(network, None) is network


def test_grey_generator_gives_the_mean_of_the_colour_generators_channels(tmp_path):
    colour = trained(StyleGAN2Generator(out_channels=3, **TINY_G), tmp_path / "g.pt")
    grey = transfer_stylegan2(StyleGAN2Generator(out_channels=1, **TINY_G), tmp_path / "g.pt").eval()
    z = torch.randn(2, 8)
    torch.testing.assert_close(grey(z), colour(z).mean(1, keepdim=True), rtol=1e-4, atol=1e-4)


def test_grey_discriminator_judges_a_grey_image_as_the_colour_one_judges_its_three_equal_channels(tmp_path):
    colour = trained(StyleGAN2Discriminator(in_channels=3, **TINY), tmp_path / "d.pt")
    grey = transfer_stylegan2(StyleGAN2Discriminator(in_channels=1, **TINY), tmp_path / "d.pt").eval()
    x = torch.randn(4, 1, 16, 16)
    torch.testing.assert_close(grey(x), colour(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


def test_discriminator_may_come_out_of_a_trainings_checkpoint(tmp_path):
    source = trained(StyleGAN2Discriminator(**TINY), tmp_path / "d.pt")
    parts = {"network": {}, "discriminator": source.state_dict(), "optimizer": {"state": {}, "groups": [1]}}
    torch.save({"components": parts, "images_seen": 1, "fingerprint": {}}, tmp_path / "last.pt")
    target = transfer_stylegan2(StyleGAN2Discriminator(**TINY), tmp_path / "last.pt")
    torch.testing.assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)
    with pytest.raises(UserError, match="one flat state dict of tensors, got components"):
        transfer_stylegan2(StyleGAN2Generator(**TINY_G), tmp_path / "last.pt")


def test_colour_networks_take_a_grey_ones_place(tmp_path):
    grey = trained(StyleGAN2Generator(**TINY_G), tmp_path / "g.pt")
    colour = transfer_stylegan2(StyleGAN2Generator(out_channels=3, **TINY_G), tmp_path / "g.pt").eval()
    judge = trained(StyleGAN2Discriminator(**TINY), tmp_path / "d.pt")
    other = transfer_stylegan2(StyleGAN2Discriminator(in_channels=3, **TINY), tmp_path / "d.pt").eval()
    z = torch.randn(4, 8)
    image = grey(z)
    torch.testing.assert_close(colour(z), image.expand(-1, 3, -1, -1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other(image.expand(-1, 3, -1, -1)), judge(image), rtol=1e-4, atol=1e-3)


def test_blocks_are_matched_by_resolution_and_what_is_new_is_named(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    large = {"image_size": 32, "channel_base": 256}
    small_d = trained(StyleGAN2Discriminator(**TINY), tmp_path / "d.pt")
    large_d = transfer_stylegan2(StyleGAN2Discriminator(**{**TINY, **large}), tmp_path / "d.pt")
    # 16×16 is the first block of the small network and the second of the large one
    assert torch.equal(large_d.blocks[1].conv0.weight, small_d.blocks[0].conv0.weight)
    assert torch.equal(large_d.linear.weight, small_d.linear.weight)
    small_g = trained(StyleGAN2Generator(**TINY_G), tmp_path / "g.pt")
    large_g = transfer_stylegan2(StyleGAN2Generator(**{**TINY_G, **large}), tmp_path / "g.pt")
    assert torch.equal(large_g.synthesis.blocks[2].conv1.weight, small_g.synthesis.blocks[2].conv1.weight)
    assert "random start for synthesis.blocks.3.conv0.weight" in caplog.text


@pytest.mark.parametrize(("classes", "more"), [(0, 3), (3, 0)])
def test_network_with_other_classes_keeps_what_z_means(classes, more, tmp_path):
    source = trained(StyleGAN2Generator(num_classes=classes, **TINY_G), tmp_path / "g.pt")
    with torch.no_grad():  # a class that says nothing
        for name, value in source.named_parameters():
            if name == "mapping_network.layers.0.weight":
                value[:, 8:] = 0
    torch.save(source.state_dict(), tmp_path / "g.pt")
    target = transfer_stylegan2(StyleGAN2Generator(num_classes=more, **TINY_G), tmp_path / "g.pt").eval()
    z = torch.randn(4, 8)
    labels = torch.tensor([0, 1, 2, 0])
    expected = source.mapping(z, labels if classes else None)
    torch.testing.assert_close(target.mapping(z, labels if more else None), expected, rtol=1e-4, atol=1e-5)


def test_another_kind_of_network_is_refused(tmp_path):
    trained(StyleGAN2Discriminator(**TINY), tmp_path / "d.pt")
    with pytest.raises(UserError, match="fits only 0% of the StyleGAN2Generator's numbers; transfer from a network"):
        transfer_stylegan2(StyleGAN2Generator(**TINY_G), tmp_path / "d.pt")
