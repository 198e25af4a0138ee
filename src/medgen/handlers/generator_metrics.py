"""What an evaluator generates against the real images that it reads."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from ignite.engine import Engine, Events
from numpy.typing import NDArray
from torch.nn import functional as F

from medgen.errors import UserError
from medgen.handlers.set_metrics import SHOWN, SetMetrics
from medgen.metrics import (
    PAIRED_METRICS,
    frd_score,
    get_protocol,
    kernel_distance,
    make_extractor,
    ms_ssim_kernel_size,
    paired_quality,
)
from medgen.metrics.feature_set import FeatureSet
from medgen.metrics.frd import normalise_features
from medgen.metrics.sliced_wasserstein import REAL, SAMPLES, pyramid_sides, set_descriptors, sliced_wasserstein

__all__ = ["GeneratorMetrics"]

logger = logging.getLogger(__name__)

# of a distance: (rows of real images, rows of samples) -> distance, and those rows
Distance = tuple[Callable[..., float], FeatureSet, FeatureSet]
BY_PATIENT = {"kid"}  # distances that leave out pairs of images of one patient
UNPAIRED = ("psnr", "ssim", "ms_gmsd", "mdsi", "haarpsi")  # of PAIRED_METRICS, those that MedImageGAN reports


@dataclass(frozen=True)
class _PixelSet(Sequence[np.ndarray]):
    """Images in memory, in 8 bits, as files and a training's pyramid have them.

    Attributes:
        pixels: (N, C, H, W) uint8.
        name: what messages call the set.
    """

    pixels: NDArray[np.uint8]
    name: str

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> np.ndarray:
        """(C, H, W) float32 in [0, 1]."""
        return self.pixels[index].astype(np.float32) / 255


class _Stretched(Sequence[np.ndarray]):
    """Images of a set, each stretched to its own least and greatest value, as MedImageGAN does before it measures.

    Args:
        images: the set, (C, H, W) each.
        order: places in the set, one after the other; all of them by default.
    """

    def __init__(self, images: _PixelSet, order: Sequence[int] | None = None) -> None:
        self.images, self.order = images, range(len(images)) if order is None else order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> np.ndarray:
        """(C, H, W) float32 from 0 to 1; an image of one value is black."""
        image = self.images[self.order[index]]
        low, high = image.min(), image.max()
        return (image - low) / (high - low or 1)


class GeneratorMetrics(SetMetrics):
    """Diversity of generated and of real images, and the distance of the ones from the others.

    Real images that are larger than the generated ones are averaged to their size, as in the training of a growing
    network, and both are rounded to 8 bits. Adds to ``engine.state.metrics``, so it stands before :class:`MetricsJSON`:

    - ``ms_ssim_samples``, ``ms_ssim_test``: mean over all pairs i < j; lower is more diverse, and samples should come
      near the real images. Left out below 48 pixels, where no window fits;
    - ``frd``: Fréchet radiomic distance (version 1, log d²) of samples from real images;
    - ``swd``: sliced Wasserstein distance × 1000 (Karras et al. 2018, section 5), the mean of ``swd_64``, ``swd_32``,
      ``swd_16``, those of the levels of the images' Laplacian pyramids by their sides;
    - ``kid``: unbiased kernel distance (Binkowski et al. 2018) of the radiomic features of ``frd``, brought to one
      scale by mean and deviation of both sets together, and their tails drawn in by the inverse hyperbolic sine; sets
      of one distribution have 0 on average, at any n, and often less. It grows ever more slowly with what
      separates the sets: among bad generators ``frd`` tells more. (``medgen report`` scales by the real images alone,
      by which few real images are above 0 as well: there it is to be held against the baseline beside it);
    - ``frd_real``, ``swd_real``, ``kid_real``: the same between random halves of the real images, and ``frd_equal_n``,
      ``swd_equal_n``, ``kid_equal_n`` between such a half and as many samples. The first two distances fall with n:
      these may be compared, and a perfect generator would have them equal;
    - with ``source_metrics`` the five figures that MedImageGAN reports, ``unpaired_psnr``, ``unpaired_ssim``,
      ``unpaired_ms_gmsd``, ``unpaired_mdsi``, ``unpaired_haarpsi``: means over the pairs of sample i with real image i,
      each stretched to its own range. The two have nothing to do with each other, so that these say nothing about
      quality and are there to stand beside that project's; ``..._real``, of each real image with the next one of
      another patient, is what a perfect generator would have;
    - ``resolution``: side of the images; ``n_samples``, ``n_test``: images compared, as many of each;
    - of a network with classes all of these once more for each class, named ``..._class0``.

    Radiomics are those of the luma of colour images; all other figures take all channels, but for MS-GMSD.
    ``medgen report`` gives intervals, precision, recall and the search for copies.

    Args:
        picture: PNG of samples over real images.
        num_classes: of the network; 0 for none.
        seed: of the divisions, and of the patches and directions of the sliced Wasserstein distance.
        device: of MS-SSIM.
        num_workers: processes for radiomics.
        source_metrics: whether the figures of MedImageGAN are taken as well.
    """

    def __init__(
        self,
        picture: str | os.PathLike,
        num_classes: int = 0,
        seed: int = 0,
        device: str | torch.device = "cpu",
        num_workers: int = 0,
        source_metrics: bool = False,
    ) -> None:
        super().__init__(picture, seed, device, num_workers=num_workers)
        self.num_classes, self.source_metrics = num_classes, source_metrics

    def attach(self, engine: Engine) -> None:
        """Register on an evaluator with ``pred`` and ``image`` in [0, 1]; ``patient`` and ``label`` in its batch."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        # not when all is completed: a tracker logs what an epoch has measured
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.measure)

    def start(self, engine: Engine) -> None:
        """Forget the images of the run before."""
        self._pixels: dict[str, list[np.ndarray]] = {"samples": [], "test": []}
        self._patients: list[str] = []
        self._labels: list[int] = []

    def collect(self, engine: Engine) -> None:
        """Keep the images of a batch."""
        for item, entry in zip(engine.state.output, engine.state.batch, strict=True):
            pred, image = (torch.as_tensor(item[key]).float() for key in ("pred", "image"))
            image = F.adaptive_avg_pool2d(image, pred.shape[-2:])
            for role, pixels in (("samples", pred), ("test", image)):
                levels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
                self._pixels[role].append(levels.cpu().numpy())
            self._patients.append(str(entry["patient"]))
            if self.num_classes:
                self._labels.append(int(entry["label"]))

    def measure(self, engine: Engine) -> None:
        """Measure.

        Raises:
            UserError: fewer than two images.
        """
        n = len(self._patients)
        if n < 2:
            raise UserError(f"distances and diversity take at least 2 real images, got {n}; name a --split with more")
        names = {"samples": "generated images", "test": "real images"}
        # the single images go at once: at full size a set has gigabytes
        sets = {role: _PixelSet(np.stack(self._pixels.pop(role)), name) for role, name in names.items()}
        self.show(sets, np.linspace(0, n - 1, min(SHOWN, n)).round().astype(int).tolist())
        distances = {**self._radiomics(sets), **self._patches(sets)}
        metrics = self._figures(sets, distances, np.arange(n))
        labels = np.array(self._labels)
        for number in range(self.num_classes):
            places = np.flatnonzero(labels == number)
            if len(places) < 2:
                logger.warning(f"class {number} is not measured alone: it has {len(places)} images")
                continue
            of_class = {role: replace(of, pixels=of.pixels[places]) for role, of in sets.items()}
            found = self._figures(of_class, distances, places)
            metrics |= {f"{name}_class{number}": value for name, value in found.items()}
        engine.state.metrics.update(metrics | {"resolution": sets["test"].pixels.shape[-1]})

    def _figures(
        self, sets: dict[str, _PixelSet], distances: dict[str, Distance], places: NDArray[np.intp]
    ) -> dict[str, float]:
        """All figures of the images at some places, which the sets are of."""
        metrics: dict[str, float] = {f"n_{role}": len(places) for role in sets}
        try:
            ms_ssim_kernel_size(min(sets["test"].pixels.shape[2:]))
            metrics |= self.diversity(sets)
        except UserError as error:
            logger.warning(f"MS-SSIM is left out: {error}")
        if self.source_metrics:
            metrics |= self._unpaired(sets, [self._patients[place] for place in places])
        for name, (statistic, *both) in distances.items():
            real, samples = (_rows_at(rows, places) for rows in both)
            if min(len(real), len(samples)) < 2:
                logger.warning(f"{name} is left out: it takes 2 images of each set, and fewer of these have features")
                continue
            if name not in BY_PATIENT:
                metrics |= self.distances(name, statistic, real, {"samples": samples})
                continue
            try:
                metrics |= self.distances(name, statistic, real, {"samples": samples}, by_patient=True)
            except UserError as error:  # all images of a class, or of a half, may be of one patient
                logger.warning(f"{name} is left out: {error}")
        return metrics

    def _unpaired(self, sets: dict[str, _PixelSet], patients: Sequence[str]) -> dict[str, float]:
        """MedImageGAN's figures: of each real image with the sample at its place, and with another patient's image."""
        side = min(sets["test"].pixels.shape[2:])
        names = [name for name in UNPAIRED if PAIRED_METRICS[name].min_side <= side]
        if left := [PAIRED_METRICS[name].title for name in UNPAIRED if name not in names]:
            logger.warning(f"unpaired {', '.join(left)} left out: images of {side} pixels are too small")
        real = _Stretched(sets["test"])
        others = {"": _Stretched(sets["samples"])}
        if len(set(patients)) > 1:
            others["_real"] = _Stretched(sets["test"], _others(patients))
        else:
            logger.warning("unpaired figures of real images are left out: all images are of one patient")
        found = {}
        for suffix, images in others.items():
            summary = paired_quality(real, images, names, device=self.device, n_resamples=2).summary
            means = {f"unpaired_{name}{suffix}": figures.mean for name, figures in summary.items()}
            found |= {name: mean for name, mean in means.items() if mean is not None}  # PSNR of equal images has none
        return found

    def _radiomics(self, sets: dict[str, _PixelSet]) -> dict[str, Distance]:
        """Fréchet and kernel distance of radiomic features; nothing where images have no such features."""
        protocol = get_protocol("frd_v1")
        extractor = make_extractor(protocol)
        try:
            samples, real = (self.features("frd", sets[role], protocol, extractor) for role in ("samples", "test"))
        except UserError as error:  # images of 4 pixels, or those of a generator that has collapsed
            logger.warning(f"frd and kid are left out: {error}")
            return {}
        real = replace(real, patients=tuple(self._patients[int(place)] for place in real.files))
        frechet = functools.partial(frd_score, version="frd_v1", names=real.names)
        kernel = functools.partial(_radiomic_kernel_distance, names=real.names)
        return {"frd": (frechet, real, samples), "kid": (kernel, real, samples)}

    def _patches(self, sets: dict[str, _PixelSet]) -> dict[str, Distance]:
        """The sliced Wasserstein distance, the mean and each level."""
        logger.info(f"swd: patches of {len(self._patients):,} generated and real images")
        roles = {"test": REAL, "samples": SAMPLES}
        descriptors = np.concatenate([set_descriptors(sets[name], self.seed, role) for name, role in roles.items()])

        # the levels are measured together and asked for one after the other
        @functools.cache
        def levels(real: bytes, samples: bytes) -> NDArray[np.float64]:
            chosen = (descriptors[np.frombuffer(rows).astype(np.intp)] for rows in (real, samples))
            return sliced_wasserstein(*chosen, seed=self.seed)

        def mean(real: NDArray[np.float64], samples: NDArray[np.float64]) -> float:
            return float(levels(real.tobytes(), samples.tobytes()).mean())

        def of_level(number: int, real: NDArray[np.float64], samples: NDArray[np.float64]) -> float:
            return float(levels(real.tobytes(), samples.tobytes())[number])

        # a row is the number of its image among all descriptors: any division of the images is one of rows
        n = len(self._patients)
        files = tuple(map(str, range(n)))
        rows = FeatureSet(np.arange(float(n))[:, None], (), files, tuple(self._patients), "swd", {})
        samples = replace(rows, features=rows.features + n, patients=None)
        sides = pyramid_sides(sets["test"].pixels.shape[-1])
        statistics = {"swd": mean} | {f"swd_{side}": functools.partial(of_level, i) for i, side in enumerate(sides)}
        return {name: (statistic, rows, samples) for name, statistic in statistics.items()}


def _radiomic_kernel_distance(
    real: NDArray[np.float64], samples: NDArray[np.float64], names: Sequence[str], **patients: Sequence[str] | None
) -> float:
    """Kernel distance of radiomic features, (N, D) and (M, D), named by ``names``."""
    # not by the real images alone: from few of them their own mean and deviation keep closer than any other images
    both = np.concatenate([real, samples])
    # radiomics have long tails, of which the cubic kernel would see nothing else
    scaled = np.arcsinh(normalise_features(both, both, names, "frd_v1").reference)
    return kernel_distance(scaled[: len(real)], scaled[len(real) :], **patients)


def _others(patients: Sequence[str]) -> list[int]:
    """For each image the place of the next one, round the end, that is of another patient; there are two at least."""
    n = len(patients)
    following = [0] * (2 * n)
    for i in reversed(range(2 * n - 1)):
        differs = patients[i % n] != patients[(i + 1) % n]
        following[i] = (i + 1) % n if differs else following[i + 1]
    return following[:n]


def _rows_at(rows: FeatureSet, places: NDArray[np.intp]) -> FeatureSet:
    """The rows of the images at some places; images without features have none."""
    kept = np.flatnonzero(np.isin([int(place) for place in rows.files], places))
    patients = None if rows.patients is None else tuple(rows.patients[i] for i in kept)
    return replace(rows, features=rows.features[kept], files=tuple(rows.files[i] for i in kept), patients=patients)
