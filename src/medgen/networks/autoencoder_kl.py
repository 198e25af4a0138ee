"""MONAI's AutoencoderKL as one network with one image in and one image out."""

from __future__ import annotations

from pathlib import Path

import torch
from monai.networks.nets import AutoencoderKL
from torch import nn

from medgen.errors import UserError
from medgen.weights import load_weights

__all__ = ["KLAutoencoder", "PosteriorReconstruction", "load_autoencoder"]


class KLAutoencoder(AutoencoderKL):
    """Autoencoder with a KL-regularised latent space whose ``forward`` is the reconstruction from the posterior's mean.

    The same parameters under the same names as :class:`monai.networks.nets.AutoencoderKL`, so that weights pass freely
    between the two; only ``forward`` differs. MONAI's returns ``(reconstruction, mu, sigma)`` from a random posterior
    sample, which no exporter and no ``verify_net_in_out`` takes and which no two calls agree on. Training draws that
    sample through :class:`PosteriorReconstruction`.

    Arguments are those of :class:`monai.networks.nets.AutoencoderKL`. Rombach et al. 2022, arXiv 2112.10752, section
    3.1.

    Shapes: images (B, C, H, W) with values in [0, 1], H and W divisible by ``f = 2 ** (len(channels) - 1)``; latents
    (B, latent_channels, H / f, W / f).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Reconstruct images (B, C, H, W) in [0, 1] from their posterior's mean; same shape, linear output."""
        # encode() and decode() hold activation checkpointing, which TorchScript cannot compile: not called from here
        mu = self.quant_conv_mu(self.encoder(x))
        return self.decoder(self.post_quant_conv(mu))


class PosteriorReconstruction(nn.Module):
    """Training's view of an autoencoder: reconstruction from a posterior sample, and the posterior.

    A module of its own because DistributedDataParallel synchronises gradients only of what passes through ``forward``.

    Args:
        network: the autoencoder; its state dict stays free of this wrapper when saved from ``network`` itself.
    """

    def __init__(self, network: AutoencoderKL) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Decode ``mu + sigma * noise``.

        Args:
            x: images (B, C, H, W) in [0, 1].
            noise: standard normal, in the shape of the latents. Passed in, not drawn here, so that a resumed training
                repeats it.

        Returns:
            reconstruction (B, C, H, W), and mu and sigma in the shape of the latents.
        """
        mu, sigma = self.network.encode(x)
        return self.network.decode(mu + sigma * noise), mu, sigma


def load_autoencoder(network: AutoencoderKL, path: str | Path) -> AutoencoderKL:
    """The autoencoder under a latent diffusion model: trained weights, frozen, in evaluation mode.

    Args:
        network: the autoencoder, as it was trained.
        path: file of its state dict, read with ``weights_only=True``.

    Returns:
        The same network.

    Raises:
        UserError: no such file, not a state dict, or of another architecture.
    """
    if not Path(path).is_file():
        raise UserError(f"no autoencoder at {path}; train one first and name its model.pt with --autoencoder_path")
    load_weights(network, path, f"the autoencoder {path}")
    return network.eval().requires_grad_(False)
