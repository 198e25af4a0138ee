"""Inferers that MONAI does not ship."""

from __future__ import annotations

from medgen.inferers.autoencoder import AutoencoderKLInferer
from medgen.inferers.generation import GeneratorInferer, PrepareInputs, check_class, draw_latents, parse_numbers
from medgen.inferers.latent_walk import LatentWalkInferer, StyleMixingInferer, mixing_cells, walk_positions
from medgen.inferers.projection import StyleGAN2Projector, latent_statistics

__all__ = [
    "AutoencoderKLInferer",
    "GeneratorInferer",
    "LatentWalkInferer",
    "PrepareInputs",
    "StyleGAN2Projector",
    "StyleMixingInferer",
    "check_class",
    "draw_latents",
    "latent_statistics",
    "mixing_cells",
    "parse_numbers",
    "walk_positions",
]
