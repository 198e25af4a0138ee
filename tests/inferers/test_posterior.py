"""Posteriors of variants are those that the autoencoder gives of each image alone."""

from __future__ import annotations

import torch

from medgen.inferers import PosteriorInferer
from medgen.networks import KLAutoencoder


def test_posteriors_of_variants_are_those_of_single_images():
    torch.manual_seed(0)
    network = KLAutoencoder(
        2,
        in_channels=1,
        out_channels=1,
        num_res_blocks=1,
        channels=[8, 8],
        attention_levels=[False] * 2,
        latent_channels=3,
        norm_num_groups=4,
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    ).eval()
    images = torch.rand(2, 3, 1, 16, 16)

    with torch.no_grad():
        posteriors = PosteriorInferer()(images, network)
        expected = [torch.cat(network.encode(image[None])) for item in images for image in item]

    assert posteriors.shape == (2, 3, 2, 3, 8, 8)
    torch.testing.assert_close(posteriors.flatten(0, 1), torch.stack(expected))
    assert (posteriors[:, :, 1] > 0).all()
