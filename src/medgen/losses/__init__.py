"""Losses that neither MONAI nor torch ships."""

from __future__ import annotations

from medgen.losses.kl import GaussianKLLoss
from medgen.losses.perceptual import LocalLPIPS

__all__ = ["GaussianKLLoss", "LocalLPIPS"]
