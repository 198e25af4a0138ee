"""Inference with an autoencoder: reconstruction and latents in one pass."""

from __future__ import annotations

from typing import Any

import torch
from monai.inferers import Inferer
from monai.networks.nets import AutoencoderKL

__all__ = ["AutoencoderKLInferer"]


class AutoencoderKLInferer(Inferer):
    """Reconstruction from the posterior's mean, with the posterior."""

    def __call__(
        self, inputs: torch.Tensor, network: AutoencoderKL, *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """Encode and decode.

        Args:
            inputs: images (B, C, H, W) in [0, 1].
            network: the autoencoder.
            args: not used; part of the interface.
            kwargs: not used; part of the interface.

        Returns:
            ``reconstruction`` (B, C, H, W), ``mean`` and ``std`` of the posterior in the shape of the latents.
        """
        mu, sigma = network.encode(inputs)
        return {"reconstruction": network.decode(mu), "mean": mu, "std": sigma}
