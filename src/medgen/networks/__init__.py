"""Networks, one family a file."""

from __future__ import annotations

from medgen.networks.autoencoder_kl import KLAutoencoder, PosteriorReconstruction, load_autoencoder
from medgen.networks.stylegan2 import (
    STYLEGAN2_PRESETS,
    StyleGAN2Discriminator,
    StyleGAN2Generator,
    transfer_stylegan2,
)

__all__ = [
    "STYLEGAN2_PRESETS",
    "KLAutoencoder",
    "PosteriorReconstruction",
    "StyleGAN2Discriminator",
    "StyleGAN2Generator",
    "load_autoencoder",
    "transfer_stylegan2",
]
