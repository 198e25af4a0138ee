"""Kullback-Leibler divergence of a diagonal Gaussian posterior from the standard normal."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["GaussianKLLoss"]


class GaussianKLLoss(nn.Module):
    """KL(N(mu, sigma²) || N(0, 1)), summed over an image's latent, averaged over the batch.

    Kingma and Welling 2014, arXiv 1312.6114, appendix B. The sum (not the mean) over the latent is what the weight of
    1e-8 in the latent diffusion model for chest radiographs belongs to.
    """

    def forward(self, mu: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Scalar loss in nats per image.

        Args:
            mu: posterior mean (B, C, ...).
            sigma: posterior standard deviation, positive, same shape.
        """
        kl = 0.5 * (mu**2 + sigma**2 - torch.log(sigma**2) - 1)
        return kl.flatten(1).sum(1).mean()
