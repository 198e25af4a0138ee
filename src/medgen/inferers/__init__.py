"""Inferers that MONAI does not ship."""

from __future__ import annotations

from medgen.inferers.autoencoder import AutoencoderKLInferer
from medgen.inferers.dcgan import DCGANInferer
from medgen.inferers.denoising import DenoisingInferer, PosteriorEncoder
from medgen.inferers.encoder_start import EncoderStart
from medgen.inferers.generation import (
    GeneratorInferer,
    PrepareInputs,
    SeedInferer,
    check_class,
    draw_latents,
    parse_numbers,
)
from medgen.inferers.inversion import BootstrapInferer, InversionInferer, draw_pairs
from medgen.inferers.latent_diffusion import LatentDiffusionSampler
from medgen.inferers.latent_walk import LatentWalkInferer, StyleMixingInferer, mixing_cells, walk_positions
from medgen.inferers.optimisation import LatentOptimiser, OptimisedInferer
from medgen.inferers.pggan import PGGANInferer, PGGANWalkInferer, check_resolution, level_weights
from medgen.inferers.posterior import PosteriorInferer
from medgen.inferers.projection import StyleGAN2Projector
from medgen.inferers.samplers import Sampler
from medgen.inferers.segmentation import SegmentationInferer, with_noise_seeds

__all__ = [
    "AutoencoderKLInferer",
    "BootstrapInferer",
    "DCGANInferer",
    "DenoisingInferer",
    "EncoderStart",
    "GeneratorInferer",
    "InversionInferer",
    "LatentDiffusionSampler",
    "LatentOptimiser",
    "LatentWalkInferer",
    "OptimisedInferer",
    "PGGANInferer",
    "PGGANWalkInferer",
    "PosteriorEncoder",
    "PosteriorInferer",
    "PrepareInputs",
    "Sampler",
    "SeedInferer",
    "SegmentationInferer",
    "StyleGAN2Projector",
    "StyleMixingInferer",
    "check_class",
    "check_resolution",
    "draw_latents",
    "draw_pairs",
    "level_weights",
    "mixing_cells",
    "parse_numbers",
    "walk_positions",
    "with_noise_seeds",
]
