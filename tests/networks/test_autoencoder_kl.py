"""KLAutoencoder beside MONAI's AutoencoderKL and the one of monai-generative."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import AutoencoderKL

from medgen.networks import KLAutoencoder, PosteriorReconstruction

SETTINGS = {
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 1,
    "latent_channels": 3,
    "num_res_blocks": 2,
    "attention_levels": (False, False, False, False),
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
}
SOURCE = (64, 128, 128, 128)  # the published model's widths
IMAGE = torch.rand(2, 1, 32, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return KLAutoencoder(channels=SOURCE, **SETTINGS).eval()


def test_monais_autoencoder_takes_the_weights_and_reconstructs_the_same(network):
    monai = AutoencoderKL(channels=SOURCE, **SETTINGS).eval()
    monai.load_state_dict(network.state_dict(), strict=True)
    with torch.inference_mode():
        assert torch.equal(network(IMAGE), monai.reconstruct(IMAGE))


def test_weights_of_monai_generative_load_and_reconstruct_the_same(network):
    from generative.networks.nets import AutoencoderKL as GenerativeAutoencoderKL

    torch.manual_seed(1)
    settings = {**SETTINGS, "num_channels": SOURCE}
    old = GenerativeAutoencoderKL(**settings).eval()
    new = KLAutoencoder(channels=SOURCE, **SETTINGS).eval()
    new.load_old_state_dict(dict(old.state_dict()))
    with torch.inference_mode():
        mu, sigma = old.encode(IMAGE)
        ours = new.encode(IMAGE)
        torch.testing.assert_close(ours, (mu, sigma), rtol=0, atol=0)
        torch.testing.assert_close(new(IMAGE), old.decode(mu), rtol=0, atol=0)


def test_parameters_are_those_of_the_published_model(network):
    assert sum(p.numel() for p in network.parameters()) == 4_607_848


def test_latent_is_eight_times_smaller(network):
    mu, sigma = network.encode(IMAGE)
    assert mu.shape == sigma.shape == (2, 3, 4, 6)
    assert network(IMAGE).shape == IMAGE.shape


def test_training_view_decodes_the_sample_that_the_noise_gives(network):
    noise = torch.randn(2, 3, 4, 6)
    reconstruction, mu, sigma = PosteriorReconstruction(network)(IMAGE, noise)
    torch.testing.assert_close(reconstruction, network.decode(mu + sigma * noise))
    without_noise = PosteriorReconstruction(network)(IMAGE, torch.zeros_like(noise))[0]
    torch.testing.assert_close(without_noise, network(IMAGE))
