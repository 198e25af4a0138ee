"""Networks, one family a file."""

from __future__ import annotations

from medgen.networks.autoencoder_kl import KLAutoencoder, PosteriorReconstruction

__all__ = ["KLAutoencoder", "PosteriorReconstruction"]
