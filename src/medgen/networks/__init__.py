"""Networks, one family a file."""

from __future__ import annotations

from medgen.networks.autoencoder_kl import KLAutoencoder, PosteriorReconstruction, load_autoencoder
from medgen.networks.conditioning import CLIPTextConditioner, LabelConditioner, make_conditioner
from medgen.networks.dcgan import DCGANDiscriminator, DCGANGenerator
from medgen.networks.dropout_unet import DropoutUNet, GaussianDropout
from medgen.networks.encoders import (
    ConvNeXtEncoder,
    LatentDiscriminator,
    LatentEncoder,
    PyramidEncoder,
    begin_encoder,
)
from medgen.networks.latent_generator import LatentGenerator, LatentStatistics, latent_statistics
from medgen.networks.pggan import PGGAN_PRESETS, PGGANDiscriminator, PGGANGenerator
from medgen.networks.pretrained import load_pretrained
from medgen.networks.stylegan2 import (
    STYLEGAN2_PRESETS,
    StyleGAN2Discriminator,
    StyleGAN2Generator,
    transfer_stylegan2,
)

__all__ = [
    "PGGAN_PRESETS",
    "STYLEGAN2_PRESETS",
    "CLIPTextConditioner",
    "ConvNeXtEncoder",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "DropoutUNet",
    "GaussianDropout",
    "KLAutoencoder",
    "LabelConditioner",
    "LatentDiscriminator",
    "LatentEncoder",
    "LatentGenerator",
    "LatentStatistics",
    "PGGANDiscriminator",
    "PGGANGenerator",
    "PosteriorReconstruction",
    "PyramidEncoder",
    "StyleGAN2Discriminator",
    "StyleGAN2Generator",
    "begin_encoder",
    "latent_statistics",
    "load_autoencoder",
    "load_pretrained",
    "make_conditioner",
    "transfer_stylegan2",
]
