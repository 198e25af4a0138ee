"""Distances between the predicted and the real images of an evaluation, as MONAI metrics and as their handlers."""

from __future__ import annotations

import os
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine
from monai.handlers import IgniteMetricHandler
from monai.metrics import CumulativeIterationMetric
from monai.utils import convert_to_tensor

from medgen.errors import UserError
from medgen.metrics.feature_set import FeatureExtractor
from medgen.metrics.frd import FRD_VERSIONS, frd_score
from medgen.metrics.frechet import frechet_distance
from medgen.metrics.kernel import kernel_distance
from medgen.metrics.prdc import precision_recall_density_coverage
from medgen.metrics.protocols import PROTOCOLS, get_protocol, make_extractor
from medgen.metrics.radiomics import RadiomicsExtractor
from medgen.metrics.sliced_wasserstein import (
    PATCHES,
    REAL,
    SAMPLES,
    patch_descriptors,
    pyramid_sides,
    sliced_wasserstein,
)

__all__ = [
    "PRDC",
    "FeatureSetMetric",
    "FrechetDistance",
    "FrechetDistanceMetric",
    "FrechetRadiomicDistance",
    "FrechetRadiomicDistanceMetric",
    "KernelDistance",
    "KernelDistanceMetric",
    "PRDCMetric",
    "SlicedWassersteinDistance",
    "SlicedWassersteinDistanceMetric",
]

Extractor = str | FeatureExtractor | Callable[[torch.Tensor], Any]
HALF_LEVEL = 0.5 / 255  # what is less than that beyond 0 or 1 would be gone in an 8-bit file


class FeatureSetMetric(CumulativeIterationMetric):
    """Gathers the features of all predictions and of all images; a subclass compares the two sets.

    MONAI's buffers hold the features (10,000 images of 2,048 float32 features: 80 MB a set) and gather them over the
    processes of a distributed evaluation.

    Args:
        extractor: one of

            - the name of a row of :data:`medgen.metrics.protocols.PROTOCOLS` with a network (``fid``, ``xrv``, ...) or
              ``module:PATH``. Images are in [0, 1], C = 1 or 3; the row brings them to the network's range, size and
              channels, as it does for ``medgen features``.
            - an object with ``on_images``, such as :func:`medgen.metrics.protocols.make_extractor` returns: the same,
              made beforehand, so that several metrics share it.
            - any other callable, (B, C, H, W) -> features (B, D), a tensor or an array. It is given the images as they
              are, and prepares them itself; a network is put in evaluation mode, and stands on the images' device.
            - None: the metric is given features instead of images.
        weights: file of a named row's weights; default: where the network's own library keeps it.
        device: of a named row's network; the CPU by default.

    Raises:
        UserError: no such row; it is of radiomics, or treats predictions and images differently; its weights are
            missing; weights or a device are given where no row is named.
    """

    def __init__(
        self,
        extractor: Extractor | None = None,
        *,
        weights: str | os.PathLike | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__()
        if isinstance(extractor, str):
            row = get_protocol(extractor)
            _check_one_for_both(row.name, row.extractor, bool(row.ranges))
            extractor = make_extractor(row, weights=weights, device=str(device or "cpu"))
        elif weights is not None or device is not None:
            given = "device" if weights is None else "weights"
            raise UserError(
                f"{given} belongs to an extractor that is named as a string, such as 'fid', got "
                f"{type(extractor).__name__}; leave {given} out"
            )
        elif hasattr(extractor, "on_images"):
            settings = getattr(extractor, "settings", {})
            _check_one_for_both(type(extractor).__name__, settings.get("extractor"), "role" in settings)
        elif extractor is not None and not callable(extractor):
            raise UserError(
                "extractor must be the name of a protocol, an object with on_images, or a callable, got a "
                f"{type(extractor).__name__}"
            )
        self.extractor = extractor.eval() if isinstance(extractor, torch.nn.Module) else extractor

    def _compute_list(self, y_pred: Any, y: Any = None, **kwargs: Any) -> Any:
        stacked = _stack((y_pred, y))
        if all(isinstance(images, torch.Tensor) for images in stacked):
            return self._compute_tensor(*stacked)
        return super()._compute_list(y_pred, y, **kwargs)  # images of different sizes: one at a time

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **kwargs: Any) -> list[torch.Tensor]:
        if y is None:
            raise UserError("a distance between sets takes predictions and images, got predictions only; give both")
        return [self._features(y_pred, "predictions"), self._features(y, "images")]

    @torch.no_grad()
    def _features(self, images: torch.Tensor, what: str) -> torch.Tensor:
        features = convert_to_tensor(self._extracted(images, what), track_meta=False)
        if features.ndim != 2 or len(features) != len(images):
            raise UserError(
                f"features must have the shape (images, features), got {tuple(features.shape)} for {len(images)} "
                "images; pool or flatten what the extractor returns"
            )
        return features if features.dtype == torch.float64 else features.float()  # NumPy knows no bfloat16

    def _extracted(self, images: torch.Tensor, what: str) -> Any:
        """Whatever the extractor returns for a batch of the ``what``."""
        if self.extractor is None:
            return images
        if hasattr(self.extractor, "on_images"):
            return self.extractor.on_images(_unit_images(images, what))
        return self.extractor(images)

    def feature_sets(self) -> tuple[np.ndarray, np.ndarray]:
        """Features of the images (N, D) and of the predictions (N, D), of all processes.

        Raises:
            UserError: nothing was gathered.
        """
        buffers = self.get_buffer()
        if buffers is None:
            raise UserError("a distance between sets takes images, got none; give the evaluation a data set")
        predictions, images = (buffer.cpu().numpy() for buffer in buffers)
        return images, predictions

    @abstractmethod
    def aggregate(self) -> Any:
        """Compare the two sets."""


class FrechetDistanceMetric(FeatureSetMetric):
    """:func:`medgen.metrics.frechet.frechet_distance` of predictions and images; 0 is best."""

    def aggregate(self) -> torch.Tensor:
        """The distance, a scalar in float64."""
        return torch.tensor(frechet_distance(*self.feature_sets()), dtype=torch.float64)


class FrechetRadiomicDistanceMetric(FeatureSetMetric):
    """:func:`medgen.metrics.frd.frd_score` of predictions and images in [0, 1]: a distance that needs no weights.

    Predictions and images without features (for ``frd_v1`` and ``radiomics`` those of which every pixel is alike) are
    left out with a warning.

    Args:
        version: ``frd_v1``, ``frd_v0`` or ``radiomics``; see :data:`medgen.metrics.frd.FRD_VERSIONS`.

    Raises:
        UserError: there is no such version.
    """

    def __init__(self, version: str = "frd_v1") -> None:
        if version not in FRD_VERSIONS:
            raise UserError(f"version must be one of {', '.join(FRD_VERSIONS)}, got {version!r}")
        self.radiomics = RadiomicsExtractor(PROTOCOLS[version].preset)
        self.version = version
        super().__init__()

    def _extracted(self, images: torch.Tensor, what: str) -> np.ndarray:
        return np.stack([self._of_one(image) for image in _unit_images(images, what)])

    def _of_one(self, image: np.ndarray) -> np.ndarray:
        try:
            return self.radiomics.on_image(image)
        except UserError:  # MONAI's buffers gather a row for each image: it is left out at the end
            return np.full(len(self.radiomics.feature_names), np.nan)

    def aggregate(self) -> torch.Tensor:
        """The score, a scalar in float64: log d² by version 1.

        Raises:
            UserError: fewer than 2 predictions or images have features.
        """
        images, predictions = self.feature_sets()
        real, fake = (table[np.isfinite(table).all(axis=1)] for table in (images, predictions))
        if min(len(real), len(fake)) < 2:
            raise UserError(
                f"FRD takes at least 2 predictions and 2 images with {self.version} features, got {len(fake)} of "
                f"{len(predictions)} and {len(real)} of {len(images)}; constant and tiny ones have none"
            )
        lost = len(predictions) - len(fake), len(images) - len(real)
        if any(lost):
            warnings.warn(
                f"FRD leaves out {lost[0]} of {len(predictions)} predictions and {lost[1]} of {len(images)} images, "
                f"which have no {self.version} features: constant and tiny ones have none",
                stacklevel=2,
            )
        score = frd_score(real, fake, self.version, self.radiomics.feature_names)
        return torch.tensor(score, dtype=torch.float64)


class KernelDistanceMetric(FeatureSetMetric):
    """:func:`medgen.metrics.kernel.kernel_distance` of predictions and images; 0 is best, and no bound.

    Args:
        extractor: see :class:`FeatureSetMetric`.
        degree: of the polynomial.
        gamma: 1 / D by default.
        coef0: constant of the polynomial.
        weights, device: see :class:`FeatureSetMetric`.
    """

    def __init__(
        self,
        extractor: Extractor | None = None,
        degree: int = 3,
        gamma: float | None = None,
        coef0: float = 1.0,
        *,
        weights: str | os.PathLike | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__(extractor, weights=weights, device=device)
        self.kernel = {"degree": degree, "gamma": gamma, "coef0": coef0}

    def aggregate(self) -> torch.Tensor:
        """The distance, a scalar in float64."""
        return torch.tensor(kernel_distance(*self.feature_sets(), **self.kernel), dtype=torch.float64)


class PRDCMetric(FeatureSetMetric):
    """:func:`medgen.metrics.prdc.precision_recall_density_coverage` of predictions and images; 1 is best.

    Args:
        extractor: see :class:`FeatureSetMetric`.
        nearest_k: neighbours that set the radius of a ball.
        weights, device: see :class:`FeatureSetMetric`.
    """

    def __init__(
        self,
        extractor: Extractor | None = None,
        nearest_k: int = 5,
        *,
        weights: str | os.PathLike | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__(extractor, weights=weights, device=device)
        self.nearest_k = nearest_k

    def aggregate(self) -> dict[str, float]:
        """precision, recall, density and coverage."""
        return precision_recall_density_coverage(*self.feature_sets(), nearest_k=self.nearest_k)


class SlicedWassersteinDistanceMetric(FeatureSetMetric):
    """:func:`medgen.metrics.sliced_wasserstein` of predictions and images in [0, 1]; 0 is best.

    The buffers hold 128 patches of each level, 25 KB an image, level and channel. Predictions and images have their
    patches at positions of their own, which follow from an image's place. That is its index in the data set where one
    process takes all of it in order, or several take every so many-th image of it, as DistributedSampler without
    shuffling has them do: the result is then the same for any number of processes, and for any batch size.

    Args:
        seed: of the patches' positions and of the directions.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        super().__init__()

    def reset(self) -> None:
        """Forget the patches."""
        super().reset()
        self._seen: dict[str, int] = {}
        self._shape: tuple[int, ...] | None = None

    def _extracted(self, images: torch.Tensor, what: str) -> np.ndarray:
        batch = np.stack(_unit_images(images, what))
        self._shape = self._shape or batch.shape[1:]
        if batch.shape[1:] != self._shape:  # MONAI finds out at the end, and prints every pixel of every patch
            raise UserError(
                "the sliced Wasserstein distance takes predictions and images of one size and mode, got "
                f"{self._shape} and {batch.shape[1:]}; bring them to one size first"
            )
        first = self._seen.get(what, 0)
        self._seen[what] = first + len(batch)
        places = [idist.get_rank() + idist.get_world_size() * (first + i) for i in range(len(batch))]
        role = SAMPLES if what == "predictions" else REAL
        return patch_descriptors(batch, places, self.seed, role).reshape(len(batch), -1)

    def aggregate(self) -> dict[int, float]:
        """Side of a level -> distance × 1000, finest level first.

        Raises:
            UserError: fewer than 2 predictions or images.
        """
        images, predictions = self.feature_sets()
        if len(images) < 2:
            raise UserError(
                f"a distance between sets takes at least 2 images in each, got {len(images)}; give more images"
            )
        sides = pyramid_sides(self._shape[-1])
        shape = (len(images), len(sides), PATCHES, self._shape[0], -1)
        distances = sliced_wasserstein(images.reshape(shape), predictions.reshape(shape), seed=self.seed)
        return dict(zip(sides, distances.tolist(), strict=True))


class _Handler(IgniteMetricHandler):
    def __init__(self, metric: FeatureSetMetric, output_transform: Callable) -> None:
        # in batches: ignite would else hand over the lists of a decollated batch one image at a time
        super().__init__(
            metric_fn=metric, output_transform=lambda output: _stack(output_transform(output)), save_details=False
        )


class FrechetDistance(_Handler):
    """The Fréchet distance of a whole evaluation as a handler; 0 is best.

    In a bundle's JSON, for images in [0, 1]::

        {
            "_target_": "medgen.metrics.FrechetDistance",
            "extractor": "xrv",
            "device": "@device",
            "output_transform": "$monai.handlers.from_engine(['pred', 'image'])"
        }

    Several handlers that share a slow extractor would each call it. Let the evaluator's postprocessing write the
    features into the batch instead, leave ``extractor`` out, and name those keys in ``output_transform``.

    Args:
        extractor: see :class:`FeatureSetMetric`.
        output_transform: engine output -> (prediction, image), lists of (C, H, W) or batches; of (D,) features where
            there is no extractor.
        weights, device: see :class:`FeatureSetMetric`.
    """

    def __init__(
        self,
        extractor: Extractor | None = None,
        output_transform: Callable = lambda x: x,
        *,
        weights: str | os.PathLike | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__(FrechetDistanceMetric(extractor, weights=weights, device=device), output_transform)


class FrechetRadiomicDistance(_Handler):
    """The Fréchet radiomic distance (FRD) of a whole evaluation as a handler; lower is better.

    Radiomic features are computed on the CPU, tens of milliseconds an image.

    Args:
        version: see :class:`FrechetRadiomicDistanceMetric`.
        output_transform: engine output -> (prediction, image) in [0, 1], lists of (C, H, W) or batches.
    """

    def __init__(self, version: str = "frd_v1", output_transform: Callable = lambda x: x) -> None:
        super().__init__(FrechetRadiomicDistanceMetric(version), output_transform)


class KernelDistance(_Handler):
    """The kernel distance (KID) of a whole evaluation as a handler; 0 is best, and no bound.

    Args:
        extractor: see :class:`FeatureSetMetric`.
        output_transform: as for :class:`FrechetDistance`.
        degree: of the polynomial.
        gamma: 1 / D by default.
        coef0: constant of the polynomial.
        weights, device: see :class:`FeatureSetMetric`.
    """

    def __init__(
        self,
        extractor: Extractor | None = None,
        output_transform: Callable = lambda x: x,
        degree: int = 3,
        gamma: float | None = None,
        coef0: float = 1.0,
        *,
        weights: str | os.PathLike | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        metric = KernelDistanceMetric(extractor, degree, gamma, coef0, weights=weights, device=device)
        super().__init__(metric, output_transform)


class PRDC(_Handler):
    """Precision, recall, density and coverage of a whole evaluation as a handler; 1 is best.

    Attached as ``name``, it writes ``name_precision``, ``name_recall``, ``name_density`` and ``name_coverage``: one of
    the additional metrics, not the key metric.

    Args:
        extractor: see :class:`FeatureSetMetric`.
        output_transform: as for :class:`FrechetDistance`.
        nearest_k: neighbours that set the radius of a ball.
        weights, device: see :class:`FeatureSetMetric`.
    """

    def __init__(
        self,
        extractor: Extractor | None = None,
        output_transform: Callable = lambda x: x,
        nearest_k: int = 5,
        *,
        weights: str | os.PathLike | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__(PRDCMetric(extractor, nearest_k, weights=weights, device=device), output_transform)

    def completed(self, engine: Engine, name: str) -> None:
        """Write the four numbers at the end of an epoch."""
        for key, value in self.compute().items():
            engine.state.metrics[f"{name}_{key}"] = value


class SlicedWassersteinDistance(_Handler):
    """The sliced Wasserstein distance of a whole evaluation as a handler; 0 is best, × 1000 as in the paper's tables.

    Attached as ``name``, it writes the mean over the levels as ``name`` and each level as ``name_64``, ``name_32``, ...
    ``name_16`` after its side. In a bundle's JSON, for images in [0, 1]::

        "swd": {
            "_target_": "medgen.metrics.SlicedWassersteinDistance",
            "output_transform": "$monai.handlers.from_engine(['pred', 'image'])"
        }

    Args:
        output_transform: engine output -> (prediction, image) in [0, 1], lists of (C, S, S) or batches; S a power of
            two from 4.
        seed: see :class:`SlicedWassersteinDistanceMetric`.
    """

    def __init__(self, output_transform: Callable = lambda x: x, seed: int = 0) -> None:
        super().__init__(SlicedWassersteinDistanceMetric(seed), output_transform)

    def completed(self, engine: Engine, name: str) -> None:
        """Write the mean and the levels at the end of an epoch."""
        levels = self.compute()
        engine.state.metrics[name] = float(np.mean(list(levels.values())))
        for side, distance in levels.items():
            engine.state.metrics[f"{name}_{side}"] = distance


def _check_one_for_both(name: str, kind: str | None, has_roles: bool) -> None:
    """Refuse extractors whose features cannot be compared as they are, or that differ between the two sets."""
    if kind == "radiomics":
        raise UserError(
            f"extractor must be a network, got radiomics ({name}), whose features have units of their own and must be "
            "normalised before they are compared; use FrechetRadiomicDistance"
        )
    if has_roles:
        raise UserError(
            f"extractor must treat predictions and images alike, got {name}, which does not; compare feature files of "
            "its two roles with medgen report, or use xrv"
        )


def _unit_images(images: torch.Tensor, what: str) -> list[np.ndarray]:
    """A batch (B, C, H, W) as float32 arrays in [0, 1]; refused if it is in another range, as its scale is unknown."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UserError(
            f"{what} must be (B, 1, H, W) or (B, 3, H, W), got {tuple(images.shape)}; bring them to grey or RGB slices"
        )
    batch = images.detach().float().cpu().numpy()
    if batch.size and not (batch.min() >= -HALF_LEVEL and batch.max() <= 1 + HALF_LEVEL):  # NaN is neither
        got = f"{batch.min():g} to {batch.max():g}" if np.isfinite(batch).all() else "NaN or infinity"
        raise UserError(f"{what} must lie in 0..1, got {got}; scale or clip the {what} in the postprocessing")
    return list(np.clip(batch, 0, 1))


def _stack(pair: Sequence[Any]) -> tuple[Any, ...]:
    """Lists of tensors of one shape as batches; everything else as it is."""
    return tuple(
        torch.stack([convert_to_tensor(item, track_meta=False) for item in part])
        if isinstance(part, (list, tuple)) and part and len({tuple(item.shape) for item in part}) == 1
        else part
        for part in pair
    )
