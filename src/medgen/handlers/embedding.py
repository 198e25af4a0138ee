"""Embeddings of image sets while they are evaluated."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from monai.handlers import IgniteMetricHandler, MeanSquaredError, PeakSignalToNoiseRatio, from_engine
from monai.utils import convert_to_numpy

from medgen.data.embedding import FIELDS, Embedding
from medgen.handlers.anomaly import reconstruction_metrics
from medgen.networks.latent_generator import LatentGenerator

__all__ = ["EmbeddingWriter", "inversion_metrics"]

logger = logging.getLogger(__name__)


def inversion_metrics() -> dict[str, IgniteMetricHandler]:
    """Mean square error, PSNR in dB and MS-SSIM between ``pred`` and ``image`` in [0, 1].

    The window of MS-SSIM goes by the images' size (:func:`~medgen.metrics.ms_ssim_kernel_size`); below the 48 pixels
    that it takes it is NaN.

    Returns:
        For an evaluator's ``key_val_metric``: the mean square error is the key.
    """
    transform = from_engine(["pred", "image"])
    return {
        "mse": MeanSquaredError(output_transform=transform),
        "psnr": PeakSignalToNoiseRatio(max_val=1.0, output_transform=transform),
        "ms_ssim": reconstruction_metrics()["ms_ssim"],
    }


class EmbeddingWriter:
    """Writes the latents of a run as an :class:`~medgen.data.Embedding`, with the metrics that are kept by image.

    Attach it to an evaluator that goes through ``items`` in their order and whose output has ``latent`` (L, D). The
    encoder is the one that :class:`~medgen.handlers.WeightsLoader` has loaded there; without, the latents have none.

    Args:
        folder: of the embedding.
        items: of the datalist, all that the evaluator goes through.
        generator: that the latents belong to.
        stage: "encoder" or "optimised".
        data_root: folder that the items' ``image`` is named from.
    """

    def __init__(
        self,
        folder: str | Path,
        items: Sequence[Mapping[str, Any]],
        generator: LatentGenerator,
        stage: str,
        data_root: str | Path,
    ) -> None:
        self.folder, self.items, self.generator = Path(folder), items, generator
        self.stage, self.data_root = stage, Path(data_root)
        self._latents, self._count = np.empty(0, np.float32), 0

    def attach(self, engine: Engine) -> None:
        """Register on an evaluator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.write)

    def start(self, engine: Engine) -> None:
        """Forget the run before."""
        # at once: a list of 100,000 latents of W+ and the array made of it would take twice their memory
        self._latents, self._count = np.empty((len(self.items), *self.generator.latent_shape), np.float32), 0

    def collect(self, engine: Engine) -> None:
        """Keep the latents of a batch."""
        for item in engine.state.output:
            self._latents[self._count] = convert_to_numpy(item["latent"])
            self._count += 1

    def write(self, engine: Engine) -> None:
        """Write the embedding."""
        figures = {
            name: convert_to_numpy(values).reshape(len(values), -1).mean(1).tolist()
            for name, values in engine.state.metric_details.items()
        }
        items = []
        for number, item in enumerate(self.items):
            image = os.path.relpath(os.path.abspath(item["image"]), os.path.abspath(self.data_root))
            row = {"image": image.replace(os.sep, "/")}
            row |= {name: item[name] for name in FIELDS if item.get(name) is not None}
            items.append(row | {name: values[number] for name, values in figures.items()})
        generator, encoder_sha256 = self.generator, getattr(engine.state, "model_sha256", "")
        embedding = Embedding(
            self._latents, items, generator.space, generator.sha256, encoder_sha256,
            convert_to_numpy(generator.mean), float(generator.std), self.stage,
        )  # fmt: skip
        embedding.write(self.folder)
        finite = {name: [value for value in values if np.isfinite(value)] for name, values in figures.items()}
        means = ", ".join(f"{name} {np.mean(values):.4g}" for name, values in finite.items() if values)
        logger.info(f"{len(embedding)} latents -> {self.folder}; means: {means}")
