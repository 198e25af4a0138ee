"""Training loops, as MONAI engines."""

from __future__ import annotations

from medgen.engines.adversarial import AdversarialTrainer, batch_per_process, exponential_moving_copy
from medgen.engines.autoencoder import AutoencoderKLTrainer
from medgen.engines.classification import ClassificationTrainer
from medgen.engines.dcgan import DCGAN_TRAINING, DCGANTrainer, dcgan_setting, standing_statistics
from medgen.engines.inversion import BootstrapTrainer, EncoderTrainer, InversionTrainer, StylePool
from medgen.engines.latent_diffusion import LatentDiffusionTrainer, warmup
from medgen.engines.pggan import PGGAN_TRAINING, PGGANTrainer, check_groups, growth_schedule, pggan_setting
from medgen.engines.segmentation import SegmentationTrainer
from medgen.engines.stylegan2 import STYLEGAN2_TRAINING, StyleGAN2Trainer, stylegan2_setting
from medgen.engines.supervised import LabelledTrainer
from medgen.engines.trainer import GenerativeTrainer

__all__ = [
    "DCGAN_TRAINING",
    "PGGAN_TRAINING",
    "STYLEGAN2_TRAINING",
    "AdversarialTrainer",
    "AutoencoderKLTrainer",
    "BootstrapTrainer",
    "ClassificationTrainer",
    "DCGANTrainer",
    "EncoderTrainer",
    "GenerativeTrainer",
    "InversionTrainer",
    "LabelledTrainer",
    "LatentDiffusionTrainer",
    "PGGANTrainer",
    "SegmentationTrainer",
    "StyleGAN2Trainer",
    "StylePool",
    "batch_per_process",
    "check_groups",
    "dcgan_setting",
    "exponential_moving_copy",
    "growth_schedule",
    "pggan_setting",
    "standing_statistics",
    "stylegan2_setting",
    "warmup",
]
