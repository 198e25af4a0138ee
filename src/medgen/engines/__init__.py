"""Training loops, as MONAI engines."""

from __future__ import annotations

from medgen.engines.autoencoder import AutoencoderKLTrainer
from medgen.engines.trainer import GenerativeTrainer

__all__ = ["AutoencoderKLTrainer", "GenerativeTrainer"]
