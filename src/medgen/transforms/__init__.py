"""MONAI transforms for 2-D images, (C, H, W); array and dictionary versions side by side."""

from __future__ import annotations

from medgen.transforms.adaptive_augment import AUGMENT_PRESETS, AdaptiveAugment, AugmentController
from medgen.transforms.channels import EnsureChannels, EnsureChannelsd
from medgen.transforms.check import CheckImage, CheckImaged
from medgen.transforms.resize import ResizeShorterSide, ResizeShorterSided
from medgen.transforms.save import SaveArray, SaveArrayd, SavePNG, SavePNGd

__all__ = [
    "AUGMENT_PRESETS",
    "AdaptiveAugment",
    "AugmentController",
    "CheckImage",
    "CheckImaged",
    "EnsureChannels",
    "EnsureChannelsd",
    "ResizeShorterSide",
    "ResizeShorterSided",
    "SaveArray",
    "SaveArrayd",
    "SavePNG",
    "SavePNGd",
]
