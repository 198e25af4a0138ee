"""Distances between the predicted and the real images of an evaluation, as MONAI metrics and as their handlers."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine
from monai.handlers import IgniteMetricHandler
from monai.metrics import CumulativeIterationMetric
from monai.utils import convert_to_tensor

from medgen.errors import UserError
from medgen.metrics.frd import FRD_VERSIONS, frd_score
from medgen.metrics.frechet import frechet_distance
from medgen.metrics.kernel import kernel_distance
from medgen.metrics.prdc import precision_recall_density_coverage
from medgen.metrics.protocols import PROTOCOLS
from medgen.metrics.radiomics import RadiomicsExtractor

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
]

Extractor = Callable[[torch.Tensor], Any]


class FeatureSetMetric(CumulativeIterationMetric):
    """Gathers the features of all predictions and of all images; a subclass compares the two sets.

    MONAI's buffers hold the features (10,000 images of 2,048 float32 features: 80 MB a set) and gather them over the
    processes of a distributed evaluation.

    Args:
        extractor: images (B, C, H, W) -> features (B, D), a tensor or an array; a network is put in evaluation mode,
            and stands on the images' device. None: the metric is given features instead of images.
    """

    def __init__(self, extractor: Extractor | None = None) -> None:
        super().__init__()
        self.extractor = extractor.eval() if isinstance(extractor, torch.nn.Module) else extractor

    def _compute_list(self, y_pred: Any, y: Any = None, **kwargs: Any) -> Any:
        stacked = _stack((y_pred, y))
        if all(isinstance(images, torch.Tensor) for images in stacked):
            return self._compute_tensor(*stacked)
        return super()._compute_list(y_pred, y, **kwargs)  # images of different sizes: one at a time

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **kwargs: Any) -> list[torch.Tensor]:
        if y is None:
            raise UserError("a distance between sets takes predictions and images, got predictions only; give both")
        return [self._features(y_pred), self._features(y)]

    @torch.no_grad()
    def _features(self, images: torch.Tensor) -> torch.Tensor:
        features = convert_to_tensor(images if self.extractor is None else self.extractor(images), track_meta=False)
        if features.ndim != 2 or len(features) != len(images):
            raise UserError(
                f"features must have the shape (images, features), got {tuple(features.shape)} for {len(images)} "
                "images; pool or flatten what the extractor returns"
            )
        return features if features.dtype == torch.float64 else features.float()  # NumPy knows no bfloat16

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

    Predictions without features, because every pixel is alike, are left out with a warning.

    Args:
        version: ``frd_v1``, ``frd_v0`` or ``radiomics``; see :data:`medgen.metrics.frd.FRD_VERSIONS`.
    """

    def __init__(self, version: str = "frd_v1") -> None:
        if version not in FRD_VERSIONS:
            raise UserError(f"version must be one of {', '.join(FRD_VERSIONS)}, got {version!r}")
        self.radiomics = RadiomicsExtractor(PROTOCOLS[version].preset)
        self.version = version
        super().__init__(self._radiomic_features)

    def _radiomic_features(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([self._of_one(image) for image in images.detach().float().cpu().numpy()])

    def _of_one(self, image: np.ndarray) -> torch.Tensor:
        if image.size and (image == image.flat[0]).all():
            return torch.full((len(self.radiomics.feature_names),), torch.nan, dtype=torch.float64)
        return torch.from_numpy(self.radiomics.on_image(image))

    def aggregate(self) -> torch.Tensor:
        """The score, a scalar in float64: log d² by version 1."""
        images, predictions = self.feature_sets()
        constant = np.isnan(predictions).all(axis=1)
        if constant.all():
            raise UserError(f"FRD takes predictions that are not constant, got {len(predictions)} that are")
        if constant.any():
            warnings.warn(f"FRD leaves out {constant.sum()} constant predictions of {len(predictions)}", stacklevel=2)
        score = frd_score(images, predictions[~constant], self.version, self.radiomics.feature_names)
        return torch.tensor(score, dtype=torch.float64)


class KernelDistanceMetric(FeatureSetMetric):
    """:func:`medgen.metrics.kernel.kernel_distance` of predictions and images; 0 is best, and no bound.

    Args:
        extractor: see :class:`FeatureSetMetric`.
        degree: of the polynomial.
        gamma: 1 / D by default.
        coef0: constant of the polynomial.
    """

    def __init__(
        self, extractor: Extractor | None = None, degree: int = 3, gamma: float | None = None, coef0: float = 1.0
    ) -> None:
        super().__init__(extractor)
        self.kernel = {"degree": degree, "gamma": gamma, "coef0": coef0}

    def aggregate(self) -> torch.Tensor:
        """The distance, a scalar in float64."""
        return torch.tensor(kernel_distance(*self.feature_sets(), **self.kernel), dtype=torch.float64)


class PRDCMetric(FeatureSetMetric):
    """:func:`medgen.metrics.prdc.precision_recall_density_coverage` of predictions and images; 1 is best.

    Args:
        extractor: see :class:`FeatureSetMetric`.
        nearest_k: neighbours that set the radius of a ball.
    """

    def __init__(self, extractor: Extractor | None = None, nearest_k: int = 5) -> None:
        super().__init__(extractor)
        self.nearest_k = nearest_k

    def aggregate(self) -> dict[str, float]:
        """precision, recall, density and coverage."""
        return precision_recall_density_coverage(*self.feature_sets(), nearest_k=self.nearest_k)


class _Handler(IgniteMetricHandler):
    def __init__(self, metric: FeatureSetMetric, output_transform: Callable) -> None:
        # in batches: ignite would else hand over the lists of a decollated batch one image at a time
        super().__init__(
            metric_fn=metric, output_transform=lambda output: _stack(output_transform(output)), save_details=False
        )


class FrechetDistance(_Handler):
    """The Fréchet distance of a whole evaluation as a handler; 0 is best.

    Several handlers that share a slow extractor would each call it. Let the evaluator's postprocessing write the
    features into the batch instead, leave ``extractor`` out, and name those keys in ``output_transform``.

    Args:
        extractor: see :class:`FeatureSetMetric`.
        output_transform: engine output -> (prediction, image), lists of (C, H, W) or batches; of (D,) features where
            there is no extractor.
    """

    def __init__(self, extractor: Extractor | None = None, output_transform: Callable = lambda x: x) -> None:
        super().__init__(FrechetDistanceMetric(extractor), output_transform)


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
    """

    def __init__(
        self,
        extractor: Extractor | None = None,
        output_transform: Callable = lambda x: x,
        degree: int = 3,
        gamma: float | None = None,
        coef0: float = 1.0,
    ) -> None:
        super().__init__(KernelDistanceMetric(extractor, degree, gamma, coef0), output_transform)


class PRDC(_Handler):
    """Precision, recall, density and coverage of a whole evaluation as a handler; 1 is best.

    Attached as ``name``, it writes ``name_precision``, ``name_recall``, ``name_density`` and ``name_coverage``: one of
    the additional metrics, not the key metric.

    Args:
        extractor: see :class:`FeatureSetMetric`.
        output_transform: as for :class:`FrechetDistance`.
        nearest_k: neighbours that set the radius of a ball.
    """

    def __init__(
        self, extractor: Extractor | None = None, output_transform: Callable = lambda x: x, nearest_k: int = 5
    ) -> None:
        super().__init__(PRDCMetric(extractor, nearest_k), output_transform)

    def completed(self, engine: Engine, name: str) -> None:
        """Write the four numbers at the end of an epoch."""
        for key, value in self.compute().items():
            engine.state.metrics[f"{name}_{key}"] = value


def _stack(pair: Sequence[Any]) -> tuple[Any, ...]:
    """Lists of tensors of one shape as batches; everything else as it is."""
    return tuple(
        torch.stack([convert_to_tensor(item, track_meta=False) for item in part])
        if isinstance(part, (list, tuple)) and part and len({tuple(item.shape) for item in part}) == 1
        else part
        for part in pair
    )
