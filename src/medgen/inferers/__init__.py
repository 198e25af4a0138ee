"""Inferers that MONAI does not ship."""

from __future__ import annotations

from medgen.inferers.autoencoder import AutoencoderKLInferer

__all__ = ["AutoencoderKLInferer"]
