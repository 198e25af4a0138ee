"""Losses that neither MONAI nor torch ships."""

from __future__ import annotations

from medgen.losses.adversarial import AdversarialLoss
from medgen.losses.diffusion import DiffusionLoss
from medgen.losses.inversion import DiscriminatorLoss, InversionLoss, MoCoLoss, inversion_loss
from medgen.losses.kl import GaussianKLLoss
from medgen.losses.perceptual import LocalLPIPS
from medgen.losses.projection import (
    LPIPSProjectionLoss,
    PixelMSSSIMLoss,
    ProjectionLoss,
    noise_correlation,
    projection_loss,
)
from medgen.losses.stylegan2 import (
    PathLengthRegulariser,
    discriminator_loss,
    generator_loss,
    lazy_adam_settings,
    r1_penalty,
)
from medgen.losses.wasserstein import critic_loss, gradient_penalty

__all__ = [
    "AdversarialLoss",
    "DiffusionLoss",
    "DiscriminatorLoss",
    "GaussianKLLoss",
    "InversionLoss",
    "LPIPSProjectionLoss",
    "LocalLPIPS",
    "MoCoLoss",
    "PathLengthRegulariser",
    "PixelMSSSIMLoss",
    "ProjectionLoss",
    "critic_loss",
    "discriminator_loss",
    "generator_loss",
    "gradient_penalty",
    "inversion_loss",
    "lazy_adam_settings",
    "noise_correlation",
    "projection_loss",
    "r1_penalty",
]
