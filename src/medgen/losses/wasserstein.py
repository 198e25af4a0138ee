"""Losses of the Wasserstein GAN with gradient penalty, as the progressive GAN trains by them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from medgen.errors import UserError

__all__ = ["critic_loss", "gradient_penalty"]


def critic_loss(real_scores: torch.Tensor, fake_scores: torch.Tensor, drift: float = 0.001) -> torch.Tensor:
    """``E[D(G(z))] - E[D(x)] + drift · E[D(x)²]``; the generator's loss is ``-E[D(G(z))]``.

    Arjovsky et al. 2017, arXiv 1701.07875, equation 2; the last term, which keeps the scores from drifting away from
    zero, is of Karras et al. 2018, arXiv 1710.10196, appendix A.1.

    Args:
        real_scores: of training images, any shape.
        fake_scores: of generated images, any shape.
        drift: weight of the last term.

    Returns:
        scalar.
    """
    return fake_scores.mean() - real_scores.mean() + drift * real_scores.square().mean()


def gradient_penalty(
    critic: Callable[[torch.Tensor], torch.Tensor],
    real: torch.Tensor,
    fake: torch.Tensor,
    weight: float = 10.0,
    target: float = 1.0,
) -> torch.Tensor:
    """``weight / target² · E[(‖∇ D(x̂)‖₂ - target)²]`` at random points x̂ between real and generated images.

    Gulrajani et al. 2017, arXiv 1704.00028, equation 3; the target is of Karras et al. 2018, arXiv 1710.10196, who
    train with 1 and, for CIFAR10, 750 (appendix A.1).

    Args:
        critic: images (B, C, H, W) to scores, one for each image.
        real: training images (B, C, H, W).
        fake: generated images, as many.
        weight: λ.
        target: γ, the norm that the gradient is drawn to.

    Returns:
        scalar, differentiable with respect to the weights of the critic.

    Raises:
        UserError: shapes that differ, or a target that is not positive.
    """
    if real.shape != fake.shape:
        raise UserError(
            f"a gradient penalty needs as many generated images as real ones, of one shape, got {tuple(real.shape)} "
            f"and {tuple(fake.shape)}; generate one image for each real one"
        )
    if not target > 0:
        raise UserError(f"target must be positive, got {target}; set target to 1")
    t = torch.rand(len(real), 1, 1, 1, device=real.device, dtype=real.dtype)
    mixed = torch.lerp(real.detach(), fake.detach(), t).requires_grad_()
    # each score depends on its own image but for the minibatch standard deviation: one backward pass serves the batch
    (gradient,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
    norms = gradient.flatten(1).norm(dim=1)
    return (norms - target).square().mean() * (weight / target**2)
