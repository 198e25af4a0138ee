"""What sets of images are compared by at the end of an evaluation."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from medgen.handlers.pictures import save_grid
from medgen.metrics import extract_features, matched_distance, pairwise_ms_ssim, real_baseline
from medgen.metrics.feature_set import FeatureSet
from medgen.metrics.protocols import Protocol

__all__ = ["FEWEST_FOR_HALVES", "SHOWN", "SetMetrics"]

logger = logging.getLogger(__name__)

SHOWN = 8  # images in a row of the picture
FEWEST_FOR_HALVES = 4  # patients: each half needs two images


class SetMetrics:
    """Diversity of sets of images, their distances from the real images, and a picture of them; a subclass says which.

    A set is a sequence of images (C, H, W) in [0, 1] with ``name``, what messages call it.

    Args:
        picture: PNG of one set over another.
        seed: of divisions and draws.
        device: of networks.
        batch_size: of networks.
        num_workers: processes for decoding and radiomics.
    """

    def __init__(
        self,
        picture: str | os.PathLike,
        seed: int = 0,
        device: str | torch.device = "cpu",
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        self.picture, self.seed, self.device = picture, seed, str(device)
        self.options = {"batch_size": batch_size, "num_workers": num_workers}

    def diversity(self, sets: Mapping[str, Any]) -> dict[str, float]:
        """``ms_ssim_<role>`` of each set: mean MS-SSIM over all pairs i < j."""
        metrics = {}
        for role, images in sets.items():
            logger.info(f"MS-SSIM of {len(images) * (len(images) - 1) // 2:,} pairs of {images.name}")
            metrics[f"ms_ssim_{role}"] = pairwise_ms_ssim(images, device=self.device, progress=sys.stderr.isatty()).mean
        return metrics

    def show(self, sets: Mapping[str, Any], places: Sequence[int]) -> None:
        """Write the picture: a row for each set, with the images at some places."""
        rows = [torch.stack([torch.from_numpy(images[i]) for i in places]) for images in sets.values()]
        save_grid(rows, self.picture)

    def features(self, name: str, images: Any, protocol: Protocol, extractor: Any) -> FeatureSet:
        """Features of a set for the distance called ``name``."""
        logger.info(f"{name}: features of {len(images):,} {images.name}")
        return extract_features(images, protocol, extractor=extractor, **self.options)

    def distances(
        self,
        name: str,
        statistic: Callable[..., float],
        real: FeatureSet,
        others: Mapping[str, FeatureSet],
        by_patient: bool = False,
    ) -> dict[str, float]:
        """Distances of sets from the real images.

        Args:
            name: of the distance.
            statistic: (reference rows, rows of a set) -> distance.
            real: rows of the real images.
            others: role -> rows of a set.
            by_patient: whether the statistic takes the sets' patients as ``x_patients`` and ``y_patients``.

        Returns:
            For each role ``<name>_<role>`` (for ``samples`` ``<name>``) of all images and, with ``_equal_n``, of half
            the real images and as many others; ``<name>_real``, the same between random halves of the real images.
            Where the real images are of too few patients to be halved, the first alone.
        """
        halves = len(set(real.patients)) >= FEWEST_FOR_HALVES
        if not halves:
            logger.warning(f"{name} at equal n is left out: halves take at least {FEWEST_FOR_HALVES} patients")
        found = {}
        for role, given in others.items():
            key = name if role == "samples" else f"{name}_{role}"
            known = {"x_patients": real.patients, "y_patients": given.patients} if by_patient else {}
            found[key] = statistic(real.features, given.features, **known)
            if halves:
                patients = {"reference_patients": real.patients, "sample_patients": given.patients}
                options = {"seed": self.seed, "by_patient": by_patient}
                equal = matched_distance(real.features, given.features, statistic, **patients, **options)
                found[f"{key}_equal_n"] = equal.mean
        if halves:
            options = {"seed": self.seed, "by_patient": by_patient}
            found[f"{name}_real"] = real_baseline(real.features, real.patients, statistic, **options).mean
        return found
