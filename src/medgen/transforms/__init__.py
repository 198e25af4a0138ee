"""MONAI transforms for 2-D images, (C, H, W); array and dictionary versions side by side."""

from __future__ import annotations

from medgen.transforms.adaptive_augment import (
    AUGMENT_PRESETS,
    RISE_IMAGES,
    RISE_IMAGES_TRANSFER,
    AdaptiveAugment,
    AugmentController,
)
from medgen.transforms.anomaly import (
    FitAnomalyMaskd,
    FitToReferenced,
    RestoreGridd,
    ScoreAnomalyd,
    check_files,
    check_scoring,
    default_patch,
    origin_of_reconstructions,
    pair_reconstructions,
)
from medgen.transforms.background import InBackground
from medgen.transforms.captions import Captiond, RandCaptiond, RandDropLabeld
from medgen.transforms.channels import EnsureChannels, EnsureChannelsd
from medgen.transforms.check import CheckImage, CheckImaged
from medgen.transforms.diff_augment import DiffAugment
from medgen.transforms.latents import AugmentedCopiesd, LoadLatentd, transform_digest
from medgen.transforms.outline import draw_outlines
from medgen.transforms.resize import ResizeShorterSide, ResizeShorterSided
from medgen.transforms.save import SaveArray, SaveArrayd, SavePNG, SavePNGd
from medgen.transforms.save_anomaly import SaveAnomalyDICOMd, SaveMapd, SaveOverlayd
from medgen.transforms.save_dicom import SaveDICOM, SaveDICOMd
from medgen.transforms.save_probabilities import SaveProbabilitiesd, write_predictions
from medgen.transforms.save_projection import ProjectionRecord, SaveProjectiond, SaveUnlessDiverged
from medgen.transforms.save_region import SaveRegiond, bounding_box
from medgen.transforms.save_scores import SaveScoresd, score_images

__all__ = [
    "AUGMENT_PRESETS",
    "RISE_IMAGES",
    "RISE_IMAGES_TRANSFER",
    "AdaptiveAugment",
    "AugmentController",
    "AugmentedCopiesd",
    "Captiond",
    "CheckImage",
    "CheckImaged",
    "DiffAugment",
    "EnsureChannels",
    "EnsureChannelsd",
    "FitAnomalyMaskd",
    "FitToReferenced",
    "InBackground",
    "LoadLatentd",
    "ProjectionRecord",
    "RandCaptiond",
    "RandDropLabeld",
    "ResizeShorterSide",
    "ResizeShorterSided",
    "RestoreGridd",
    "SaveAnomalyDICOMd",
    "SaveArray",
    "SaveArrayd",
    "SaveDICOM",
    "SaveDICOMd",
    "SaveMapd",
    "SaveOverlayd",
    "SavePNG",
    "SavePNGd",
    "SaveProbabilitiesd",
    "SaveProjectiond",
    "SaveRegiond",
    "SaveScoresd",
    "SaveUnlessDiverged",
    "ScoreAnomalyd",
    "bounding_box",
    "check_files",
    "check_scoring",
    "default_patch",
    "draw_outlines",
    "origin_of_reconstructions",
    "pair_reconstructions",
    "score_images",
    "transform_digest",
    "write_predictions",
]
