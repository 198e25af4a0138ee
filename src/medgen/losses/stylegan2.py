"""Losses and regularisers of StyleGAN2: non-saturating, R1, path length, and the optimiser's share in lazy ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from medgen.errors import UserError

__all__ = [
    "PathLengthRegulariser",
    "discriminator_loss",
    "generator_loss",
    "lazy_adam_settings",
    "r1_penalty",
]


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """``E[softplus(-D(G(z)))]``, that is ``-E[log sigmoid(D(G(z)))]``: the non-saturating loss.

    Goodfellow et al. 2014, arXiv 1406.2661, section 3.

    Args:
        fake_logits: of generated images, any shape.

    Returns:
        scalar.
    """
    return F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """``E[softplus(-D(x))] + E[softplus(D(G(z)))]``: logistic loss of both kinds of image.

    Goodfellow et al. 2014, arXiv 1406.2661, equation 1.

    Args:
        real_logits: of training images, any shape.
        fake_logits: of generated images, any shape.

    Returns:
        scalar.
    """
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def r1_penalty(real_logits: torch.Tensor, images: torch.Tensor, gamma: float = 10.0, interval: int = 1) -> torch.Tensor:
    """``γ/2 · E[‖∇ₓ D(x)‖²]`` over training images, times ``interval``.

    Mescheder et al. 2018, arXiv 1801.04406, equation 9. Computed lazily, in each ``interval``-th step alone, it counts
    ``interval``-fold (Karras et al. 2020, arXiv 1912.04958, section 3.1 and appendix B; 16 there).

    Args:
        real_logits: of the training images, (B, 1) or (B,).
        images: the training images, (B, C, H, W) in [-1, 1], with ``requires_grad`` set before D and the augmentation
            saw them: the gradient is with respect to the images as they are, through the augmentation.
        gamma: weight.
        interval: steps from one evaluation to the next.

    Returns:
        scalar, differentiable with respect to the weights of D.

    Raises:
        UserError: the images do not require a gradient, gamma is negative, or interval is below 1.
    """
    if not gamma >= 0:
        raise UserError(f"gamma must be 0 or more, got {gamma}; set gamma to 10, or to 0 to switch R1 off")
    _check_interval(interval)
    if not images.requires_grad:
        raise UserError(
            "r1_penalty needs images with requires_grad, got images without; call images.requires_grad_() before the "
            "discriminator sees them"
        )
    # each logit depends on its own image but for the minibatch standard deviation: one backward pass serves the batch
    (gradient,) = torch.autograd.grad(real_logits.sum(), images, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean() * (gamma / 2 * interval)


class PathLengthRegulariser(nn.Module):
    """``weight · interval · E[(‖J_wᵀ y‖₂ - a)²]`` with ``y ~ N(0, I)``, ``J_w = ∂G(w)/∂w``.

    Karras et al. 2020, arXiv 1912.04958, equation 4. ``a`` is the running mean of the lengths, this batch included; no
    gradient goes through it. ``y`` is divided by √(H · W), so that length and weight do not depend on the resolution.
    With W+ the square of the length is the mean over the layers' w.

    ``a`` is the only state, in ``state_dict`` as ``mean``. Each process moves its own by its own batch: average
    ``mean`` over the processes after each call, then all hold what one process would, which had seen the whole batch.

    Args:
        weight: of the penalty.
        decay: by which fraction ``a`` moves towards the mean of a batch.
        interval: steps from one evaluation to the next; the penalty counts ``interval``-fold.
        batch_shrink: how many times smaller its batches are than those of the training, to save memory; see
            :meth:`batch_size`.

    Raises:
        UserError: a setting outside its range.
    """

    def __init__(self, weight: float = 2.0, decay: float = 0.01, interval: int = 4, batch_shrink: int = 2) -> None:
        super().__init__()
        if not weight >= 0:
            raise UserError(f"path length weight must be 0 or more, got {weight}; set it to 2, or to 0 to switch off")
        if not 0 < decay <= 1:
            raise UserError(f"path length decay must be above 0 and at most 1, got {decay}; set it to 0.01")
        if batch_shrink < 1:
            raise UserError(f"batch_shrink must be at least 1, got {batch_shrink}; set it to 2")
        _check_interval(interval)
        self.weight, self.decay, self.interval, self.batch_shrink = weight, decay, interval, batch_shrink
        self.register_buffer("mean", torch.zeros(()))

    def batch_size(self, batch_size: int) -> int:
        """Images to generate for a penalty in a training with this batch size; at least 1."""
        return max(batch_size // self.batch_shrink, 1)

    def forward(self, images: torch.Tensor, ws: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """The penalty; moves ``mean`` in training mode.

        Args:
            images: generated from ``ws``, (B, C, H, W), not augmented.
            ws: (B, W) or (B, L, W), part of the graph of the images: what the mapping network returned.
            noise: y before the division, like the images; drawn from torch's generator by default.

        Returns:
            scalar, differentiable with respect to the weights of G.

        Raises:
            UserError: shapes do not fit.
        """
        if images.ndim != 4 or ws.ndim not in {2, 3} or len(images) != len(ws):
            raise UserError(
                "path length needs images (B, C, H, W) and their ws (B, W) or (B, L, W), got "
                f"{tuple(images.shape)} and {tuple(ws.shape)}; pass the ws that the images were made from"
            )
        if noise is None:
            noise = torch.randn_like(images)
        height, width = images.shape[2:]
        projection = (images * noise).sum() / math.sqrt(height * width)
        (gradient,) = torch.autograd.grad(projection, ws, create_graph=True)
        squares = gradient.square().sum(-1)
        lengths = (squares if ws.ndim == 2 else squares.mean(1)).sqrt()
        mean = self.mean
        if self.training:
            mean = self.mean.lerp(lengths.detach().mean().to(self.mean.dtype), self.decay)
            self.mean.copy_(mean)
        return (lengths - mean).square().mean() * (self.weight * self.interval)


def lazy_adam_settings(lr: float, betas: Sequence[float], interval: int) -> dict[str, Any]:
    """Adam's settings where a regulariser takes a step of its own after each ``interval`` steps of the main loss.

    ``c = k / (k + 1)`` for interval k: ``lr · c``, ``β₁^c`` and ``β₂^c``, so that k + 1 steps do what k did. Karras et
    al. 2020, arXiv 1912.04958, appendix B, lazy regularisation.

    Args:
        lr: learning rate without the regulariser.
        betas: β₁ and β₂ without it.
        interval: k: 16 for R1, 4 for path length in that paper.

    Returns:
        ``lr`` and ``betas``, to be passed to ``torch.optim.Adam``.

    Raises:
        UserError: interval below 1.
    """
    _check_interval(interval)
    c = interval / (interval + 1)
    return {"lr": lr * c, "betas": tuple(beta**c for beta in betas)}


def _check_interval(interval: int) -> None:
    if interval < 1:
        raise UserError(f"interval of a lazy regulariser must be at least 1 step, got {interval}; set it to 16 or 4")
