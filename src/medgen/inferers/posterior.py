"""Posteriors of an autoencoder, without decoding them."""

from __future__ import annotations

from typing import Any

import torch
from monai.inferers import Inferer
from monai.networks.nets import AutoencoderKL

__all__ = ["PosteriorInferer"]


class PosteriorInferer(Inferer):
    """Mean and standard deviation of the latents of images and of their variants."""

    def __call__(self, inputs: torch.Tensor, network: AutoencoderKL, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Encode.

        Args:
            inputs: images in [0, 1] with their variants, (B, V, C, H, W).
            network: the autoencoder.
            args: not used; part of the interface.
            kwargs: not used; part of the interface.

        Returns:
            (B, V, 2, latent channels, h, w): mean, standard deviation.
        """
        posterior = torch.stack(network.encode(inputs.flatten(0, 1)), dim=1)
        return posterior.unflatten(0, inputs.shape[:2])
