"""Samples and reconstructions against real images, at the end of an evaluation."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events

from medgen.data.image_set import ImageSet
from medgen.errors import UserError
from medgen.handlers.set_metrics import SHOWN, SetMetrics
from medgen.metrics import frd_score, frechet_distance, get_protocol, make_extractor

__all__ = ["SampleMetrics"]

logger = logging.getLogger(__name__)


class SampleMetrics(SetMetrics):
    """Diversity of samples and of real images, and the distance of samples and of reconstructions from real images.

    Adds to ``engine.state.metrics``, so it stands before :class:`MetricsJSON`:

    - ``ms_ssim_samples``, ``ms_ssim_test``: mean over all pairs i < j (the source's measure of diversity; lower is more
      diverse, and samples should come near the real images);
    - ``frd``, ``frd_reconstruction``: Fréchet radiomic distance (version 1, log d²) of samples and of reconstructions
      from the real images. Reconstructions share their anatomy with the reference: the bound that the autoencoder sets;
    - ``frd_real``: the same between random halves of the real images, and ``frd_equal_n``,
      ``frd_reconstruction_equal_n`` between such a half and as many samples or reconstructions. The Fréchet distance
      depends on n: these three may be compared;
    - ``fid_xrv`` and its companions: likewise with the features of torchxrayvision's DenseNet-121 on −1024 … 1024 at
      224 pixels. The source fed samples in 0–255 and real images in 0–1; its figure is no reference;
    - ``n_samples``, ``n_test``: images compared; so many of each.

    ``medgen report`` gives intervals, precision, recall and the search for copies.

    Args:
        samples_dir: folder with the ``datalist.json`` of samples that inference.json wrote; None: what is said of
            samples is left out, and one line says so.
        datalist: JSON file of the real images.
        split: list of it that the evaluation reads.
        dataset_dir: base of its paths.
        image_size: side that all are brought to, as in training.
        channels: 1 or 3.
        max_images: at most so many of each set, drawn at random.
        xrv_weights: file of the DenseNet's weights; None: where torchxrayvision keeps it, and without it one line says
            that ``fid_xrv`` is left out.
        picture: PNG of samples over real images.
        seed: of the draws.
        device: of networks.
        batch_size: of networks.
        num_workers: processes for decoding and radiomics.

    Raises:
        UserError: no samples there, or weights that were named are missing or others.
    """

    def __init__(
        self,
        samples_dir: str | os.PathLike | None,
        datalist: str | os.PathLike,
        split: str,
        dataset_dir: str | os.PathLike | None,
        image_size: int,
        channels: int,
        max_images: int,
        xrv_weights: str | os.PathLike | None,
        picture: str | os.PathLike,
        seed: int = 0,
        device: str | torch.device = "cpu",
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__(picture, seed, device, batch_size, num_workers)
        size = {"image_size": image_size, "mode": "L" if channels == 1 else "RGB"}
        draw = {"max_images": max_images, "seed": seed}
        self.sets: dict[str, ImageSet] = {}
        self.model: dict[str, str] = {}
        if samples_dir:
            source = Path(samples_dir) / "datalist.json"
            if not source.is_file():
                raise UserError(
                    f"no samples in {samples_dir}: it has no datalist.json; make them with inference.json, and name "
                    "its --output_dir with --samples_dir"
                )
            self.sets["samples"] = ImageSet.from_source(source, name="samples", **size, **draw)
            self.model = _model_of(source)
        else:
            logger.warning(
                "samples are left out: none given; make them with inference.json, and name its --output_dir with "
                "--samples_dir"
            )
        self.sets["test"] = ImageSet.from_source(
            datalist, split=split, dataset_dir=dataset_dir, name="real images", **size, **draw
        )
        self.extractors = {"frd": make_extractor(get_protocol("frd_v1"))}
        xrv = get_protocol("xrv")
        if xrv_weights or xrv.weights.found():
            self.extractors["fid_xrv"] = make_extractor(xrv, weights=xrv_weights, device=self.device)
        else:
            logger.warning(
                f"fid_xrv is left out: no {xrv.weights.names[0]} in {xrv.weights.search_folder}; fetch it from "
                f"{xrv.weights.url} and name it with --xrv_weights"
            )
        self._reconstructions: dict[str, str] = {}

    def attach(self, engine: Engine) -> None:
        """Register on an evaluator whose output has ``image`` and ``pred_path``, the file of its reconstruction."""
        engine.add_event_handler(Events.STARTED, self.check)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        # not when all is completed: a tracker logs what an epoch has measured
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.measure)

    def check(self, engine: Engine) -> None:
        """See that all sets can be read and compared, before an image is reconstructed.

        Raises:
            UserError: fewer than two images in one, or images that cannot be compared.
        """
        for images in self.sets.values():
            images.scan(self.options["num_workers"])
            for file, reason in images.rejected.items():
                logger.warning(f"{file} of the {images.name} is left out: {reason}")
            images.check_comparable(self.sets["test"])
        if (n := self._count()) < 2:
            raise UserError(f"distances and diversity take at least 2 samples and 2 real images, got {n}; make more")

    def collect(self, engine: Engine) -> None:
        """Note the files of a batch's reconstructions."""
        for item in engine.state.output:
            self._reconstructions[str(item["image"].meta["filename_or_obj"])] = item["pred_path"]

    def measure(self, engine: Engine) -> None:
        """Measure."""
        n = self._count()
        chosen = {name: _some(images, n, self.seed) for name, images in self.sets.items()}
        metrics: dict[str, float] = {f"n_{name}": n for name in chosen} | self.diversity(chosen)
        if "samples" in chosen:
            self.show(chosen, range(min(SHOWN, n)))
        test = chosen["test"]
        chosen["reconstruction"] = ImageSet(
            [self._reconstructions[test.path(i)] for i in range(n)],
            patients=test.patients,
            image_size=test.image_size,
            mode=test.mode,
            name="reconstructions",
        )
        for name, extractor in self.extractors.items():
            metrics |= self._distances(name, extractor, chosen)
        engine.state.metrics.update(metrics)
        for name, value in self.model.items():
            setattr(engine.state, name, value)

    def _count(self) -> int:
        """Images of the smallest set."""
        return min(map(len, self.sets.values()))

    def _distances(self, name: str, extractor: Any, chosen: dict[str, ImageSet]) -> dict[str, float]:
        """Distances of sets from the real images, of all images and at the n of their halves."""
        protocol = get_protocol("frd_v1" if name == "frd" else "xrv")
        features = {role: self.features(name, images, protocol, extractor) for role, images in chosen.items()}
        real = features.pop("test")
        statistic: Callable[..., float] = frechet_distance
        if name == "frd":
            statistic = functools.partial(frd_score, version="frd_v1", names=real.names)
        return self.distances(name, statistic, real, features)


def _some(images: ImageSet, n: int, seed: int) -> ImageSet:
    """``n`` of the images, drawn at random, in their order."""
    return images.subset(np.sort(np.random.default_rng(seed).choice(len(images), n, replace=False)).tolist())


def _model_of(datalist: Path) -> dict[str, str]:
    """What made all samples of a datalist: checksum of the weights, and the registered model; empty if none did."""
    content = json.loads(datalist.read_text(encoding="utf-8"))
    items = [item for split in content.values() if isinstance(split, list) for item in split if isinstance(item, dict)]
    found = {name: {item.get(name) for item in items} for name in ("model", "model_sha256")}
    return {name: value for name, values in found.items() if len(values) == 1 and (value := values.pop())}
