"""Training loops, as MONAI engines."""

from __future__ import annotations

from medgen.engines.autoencoder import AutoencoderKLTrainer
from medgen.engines.latent_diffusion import LatentDiffusionTrainer, warmup
from medgen.engines.stylegan2 import (
    STYLEGAN2_TRAINING,
    StyleGAN2Trainer,
    batch_per_process,
    exponential_moving_copy,
    stylegan2_setting,
)
from medgen.engines.trainer import GenerativeTrainer

__all__ = [
    "STYLEGAN2_TRAINING",
    "AutoencoderKLTrainer",
    "GenerativeTrainer",
    "LatentDiffusionTrainer",
    "StyleGAN2Trainer",
    "batch_per_process",
    "exponential_moving_copy",
    "stylegan2_setting",
    "warmup",
]
