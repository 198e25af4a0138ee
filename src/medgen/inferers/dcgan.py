"""Images of a DCGAN or SNGAN generator from seeds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks import eval_mode

from medgen.inferers.generation import SeedInferer, draw_latents
from medgen.networks import DCGANGenerator

__all__ = ["DCGANInferer"]


class DCGANInferer(SeedInferer):
    """Seeds to images in [0, 1], by a generator in evaluation mode.

    Batch normalisation takes its running statistics, whatever mode the network is in: with those of the batch, an image
    would depend on which others are made beside it.

    Args:
        truncation_psi: multiplies the latent. 1 changes nothing, less than 1 moves all images towards the one of the
            latent 0, away from the rare ones.

    Raises:
        UserError: it is no finite number.
    """

    def generate(self, seeds: Sequence[int], network: DCGANGenerator, labels: torch.Tensor | None) -> torch.Tensor:
        """Images (B, C, H, W) in [0, 1] of B seeds; see :meth:`SeedInferer.__call__`."""
        device = next(network.parameters()).device
        z = draw_latents(seeds, network.latent_dim).to(device) * self.truncation_psi
        with eval_mode(network):
            images = network(z, None if labels is None else labels.to(device))
        return images.float().add(1).div(2).clamp(0, 1)
