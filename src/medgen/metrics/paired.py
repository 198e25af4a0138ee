"""Quality of images that each have a reference: reconstructions, translations, inpainted pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from types import MappingProxyType

import numpy as np
import torch
from monai.data import MetaTensor
from monai.handlers import IgniteMetricHandler
from monai.metrics.regression import RegressionMetric

from medgen.errors import UserError
from medgen.metrics.diversity import check_range, checked_image, image_name, ms_ssim
from medgen.metrics.intervals import bootstrap_mean

__all__ = [
    "MDSI",
    "PAIRED_METRICS",
    "HaarPSI",
    "MultiScaleGMSD",
    "PairedMetric",
    "PairedQuality",
    "PairedSummary",
    "match_pairs",
    "paired_quality",
]

# B images, C channels, H, W. Everything is computed in float64: MDSI ends in a fourth root, which turns float32's
# rounding on two nearly equal images into an error in the third decimal.


def _psnr(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    return -10 * (image - reference).square().mean((1, 2, 3)).log10()  # of a data range of 1


def _ssim(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    import piq  # imports torchvision and its models: only those who use these metrics need it

    # the paper's window at the image's own scale; piq would halve images from 384 pixels first
    return piq.ssim(image, reference, downsample=False, reduction="none")


def _ms_gmsd(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    import piq

    return piq.multi_scale_gmsd(image, reference, reduction="none")


def _mdsi(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    import piq

    rgb = [x.expand(-1, 3, -1, -1) for x in (image, reference)]
    return piq.mdsi(*rgb, reduction="none")


def _haarpsi(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    import piq

    # two black images have no coefficient to weigh by: piq says infinity
    differ = (image != reference).flatten(1).any(1)
    return piq.haarpsi(image, reference, reduction="none").where(differ, 1.0)


@dataclass(frozen=True)
class PairedMetric:
    """One row of :data:`PAIRED_METRICS`.

    Args:
        title: how papers write it.
        function: (image, reference), each (B, C, H, W) float64 in [0, 1], -> (B,); None where a network is needed.
        direction: ``"higher"`` or ``"lower"`` is better.
        best: value of two equal images.
        worst: the other end of its range.
        min_side: pixels that the shorter side must have.
        grey: what it does on one channel, and on three.
    """

    title: str
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None
    direction: str
    best: float
    worst: float
    min_side: int
    grey: str


_MDSI_GREY = (
    "one channel stands for all three (as in piq). The chromaticity channels do not vanish then: the published weights "
    "of H and M sum to -0.01 and -0.09, so 0.4 of the score is the similarity (0.0164 ab + 550) / (0.0082 (a² + b²) + "
    "550) of the grey levels a and b (0 to 255), 0.6 the gradients'. Grey figures do not compare with colour ones"
)

# fmt: off
PAIRED_METRICS: Mapping[str, PairedMetric] = MappingProxyType({
    # name                   title      function  direction  best          worst         side  on one and three channels
    "psnr":     PairedMetric("PSNR",    _psnr,    "higher",  float("inf"), 0.0,          1,    "mean squared error over all channels; decibels at a range of 1"),  # noqa: E501
    "ssim":     PairedMetric("SSIM",    _ssim,    "higher",  1.0,          -1.0,         11,   "mean over channels; Gaussian window of 11, sigma 1.5, valid"),  # noqa: E501
    "ms_ssim":  PairedMetric("MS-SSIM", ms_ssim,  "higher",  1.0,          0.0,          48,   "mean over channels at each scale; see pairwise_ms_ssim"),  # noqa: E501
    "ms_gmsd":  PairedMetric("MS-GMSD", _ms_gmsd, "lower",   0.0,          1.0,          17,   "grey as it is; of colour the luma alone"),  # noqa: E501
    "mdsi":     PairedMetric("MDSI",    _mdsi,    "lower",   0.0,          1.0,          3,    _MDSI_GREY),
    "haarpsi":  PairedMetric("HaarPSI", _haarpsi, "higher",  1.0,          0.0,          16,   "grey as it is; of colour the chroma too"),  # noqa: E501
    "lpips":    PairedMetric("LPIPS",   None,     "lower",   0.0,          float("inf"), 32,   "one channel stands for all three"),  # noqa: E501
})
# fmt: on


@dataclass(frozen=True)
class PairedSummary:
    """One metric over all pairs.

    Args:
        mean: over the pairs with a finite value; None when there is none.
        std: their standard deviation; None likewise.
        low: lower end of the mean's bootstrap interval; None when the note says why there is none.
        high: its upper end.
        n: pairs measured.
        n_infinite: pairs with an infinite value, which no mean holds: the PSNR of two equal images.
        direction: ``"higher"`` or ``"lower"`` is better.
        note: what a reader must know beside the numbers; empty when nothing.
    """

    mean: float | None
    std: float | None
    low: float | None
    high: float | None
    n: int
    n_infinite: int
    direction: str
    note: str = ""


@dataclass(frozen=True)
class PairedQuality:
    """Paired metrics of an image set.

    Args:
        references: name of each pair's reference.
        files: name of each pair's image.
        values: metric -> (N,) float64, one value per pair; an equal pair's PSNR is infinite here.
        summary: metric -> mean, interval and counts.
        level: confidence level of the intervals.
    """

    references: tuple[str, ...]
    files: tuple[str, ...]
    values: dict[str, np.ndarray]
    summary: dict[str, PairedSummary]
    level: float


def match_pairs(reference_files: Sequence[str], files: Sequence[str]) -> list[tuple[int, int]]:
    """Pair two lists of files by name without folder and suffix.

    Args:
        reference_files: paths of the references.
        files: paths of the images.

    Returns:
        (index into ``reference_files``, index into ``files``) per pair, in the order of ``files``.

    Raises:
        UserError: a file without partner; two files of one list with the same name.
    """
    references, images = _by_stem(reference_files, "reference"), _by_stem(files, "image")
    alone = [f"{reference_files[i]} (reference)" for stem, i in references.items() if stem not in images]
    alone += [f"{files[i]} (image)" for stem, i in images.items() if stem not in references]
    if alone:
        shown = ", ".join(alone[:5]) + (f" and {len(alone) - 5} more" if len(alone) > 5 else "")
        raise UserError(f"every image needs a reference of the same name, no partner for {shown}")
    return [(references[stem], i) for stem, i in images.items()]


def _by_stem(files: Sequence[str], kind: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for i, file in enumerate(files):
        stem = PurePath(file).stem
        if stem in found:
            raise UserError(f"{kind} names must differ to be paired, got {files[found[stem]]} and {file}")
        found[stem] = i
    return found


def paired_quality(
    reference: Sequence | torch.Tensor,
    images: Sequence | torch.Tensor,
    metrics: Sequence[str] | None = None,
    *,
    pair_by: str = "position",
    patients: Sequence[str] | None = None,
    lpips: torch.nn.Module | None = None,
    device: str | torch.device | None = None,
    batch_size: int = 8,
    n_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> PairedQuality:
    """Measure each image against its own reference.

    Args:
        reference: ``len()`` and ``[i]`` -> (C, H, W) in [0, 1]; or a tensor (N, C, H, W).
        images: as many, each of its reference's shape.
        metrics: names from :data:`PAIRED_METRICS`. Default: all, LPIPS only with ``lpips``.
        pair_by: ``"position"``, or ``"name"`` by the ``files`` of both sets (:func:`match_pairs`).
        patients: one per reference; the bootstrap then draws patients instead of images.
        lpips: network for LPIPS, ``medgen.losses.LocalLPIPS(..., rescale=True)``.
        device: default: CUDA where there is one.
        batch_size: pairs of one shape that are measured at once.
        n_resamples: bootstrap resamples.
        level: confidence level of the interval (:func:`medgen.metrics.bootstrap_mean`).
        seed: of the bootstrap.

    Returns:
        Values of every pair, and means with intervals.

    Raises:
        UserError: nothing to pair, or sets that do not pair; shapes that differ; values outside [0, 1] or not finite;
            images too small for a metric; unknown metrics; LPIPS without its network.
    """
    names = _checked_names(metrics, lpips)
    pairs = _pair(reference, images, pair_by)
    if patients is not None and len(patients) != len(reference):
        raise UserError(f"expected one patient per reference, got {len(patients)} for {len(reference)} references")
    if batch_size < 1 or n_resamples < 2 or not 0 < level < 1:
        raise UserError(
            "batch_size must be at least 1, n_resamples 2 and level between 0 and 1, "
            f"got {batch_size}, {n_resamples} and {level}"
        )
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if lpips is not None:
        lpips = lpips.to(device)
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    with torch.no_grad():
        for image, target in _batches(reference, images, pairs, names, batch_size):
            image, target = image.to(device), target.to(device)
            for name in names:
                found[name].append(_measure(name, image, target, lpips).cpu().numpy())
    values = {name: np.concatenate(parts) for name, parts in found.items()}
    chosen = [str(patients[i]) if patients is not None else str(i) for i, _ in pairs]
    return PairedQuality(
        references=tuple(image_name(reference, i) for i, _ in pairs),
        files=tuple(image_name(images, j) for _, j in pairs),
        values=values,
        summary={
            name: _summary(values[name], np.asarray(chosen), PAIRED_METRICS[name].direction, n_resamples, level, seed)
            for name in names
        },
        level=level,
    )


def _checked_names(metrics: Sequence[str] | None, lpips: torch.nn.Module | None) -> list[str]:
    names = list(PAIRED_METRICS if metrics is None else metrics)
    if metrics is None and lpips is None:
        names.remove("lpips")
    unknown = [name for name in names if name not in PAIRED_METRICS]
    if unknown or not names:
        raise UserError(f"metrics must be of {', '.join(PAIRED_METRICS)}, got {', '.join(unknown) or 'none'}")
    if "lpips" in names and lpips is None:
        raise UserError(
            "lpips needs a network with weights, got none; pass lpips=LocalLPIPS('alex', weights=FILE, rescale=True)"
        )
    return names


def _pair(reference: Sequence, images: Sequence, pair_by: str) -> list[tuple[int, int]]:
    if pair_by not in ("position", "name"):
        raise UserError(f'pair_by must be "position" or "name", got {pair_by!r}')
    if not len(reference) or not len(images):
        raise UserError(f"nothing to compare: {len(reference)} references and {len(images)} images")
    if pair_by == "name":
        if not (hasattr(reference, "files") and hasattr(images, "files")):
            raise UserError('pair_by="name" needs sets that know their files; pair by position')
        return match_pairs(reference.files, images.files)
    # pairing what is left over with anything would measure nothing: these metrics mean nothing on unpaired images
    if len(reference) != len(images):
        raise UserError(
            f"every image needs its reference, got {len(reference)} references and {len(images)} images; pair by name, "
            "or compare the sets by a distance"
        )
    return [(i, i) for i in range(len(images))]


def _batches(
    reference: Sequence, images: Sequence, pairs: list[tuple[int, int]], names: list[str], batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs (image, reference), stacked as long as their shape stays the same; each (B, C, H, W) float64."""
    waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
    for i, j in pairs:
        # values stay as they are: stretching each image to its own minimum and maximum, as is done for display, would
        # hide the very differences of brightness and contrast that are measured
        target = checked_image(reference[i], image_name(reference, i)).double()
        image = checked_image(images[j], image_name(images, j)).double()
        name = image_name(images, j)
        if image.shape != target.shape:
            raise UserError(
                f"an image and its reference must have one shape, got {tuple(image.shape)} and {tuple(target.shape)} "
                f"for {name}"
            )
        _check_shape(image.shape, names, name)
        if waiting and (len(waiting) == batch_size or waiting[0][0].shape != image.shape):
            yield _stack(waiting)
            waiting = []
        waiting.append((image, target))
    yield _stack(waiting)


def _stack(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    images, references = zip(*pairs, strict=True)
    return torch.stack(images), torch.stack(references)


def _check_shape(shape: Sequence[int], metrics: Sequence[str], name: str) -> None:
    if shape[0] not in (1, 3):
        raise UserError(f"expected 1 or 3 channels, got {shape[0]} in {name}")
    for metric in metrics:
        least = PAIRED_METRICS[metric].min_side
        if min(shape[1:]) < least:
            raise UserError(
                f"{metric} takes images of at least {least} pixels, got {tuple(shape[1:])} for {name}; leave {metric} "
                "out or measure larger images"
            )


def _measure(name: str, image: torch.Tensor, reference: torch.Tensor, lpips: torch.nn.Module | None) -> torch.Tensor:
    function = PAIRED_METRICS[name].function
    if function is not None:
        return function(image, reference).double()
    pairs = zip(image.float().split(1), reference.float().split(1), strict=True)  # LocalLPIPS gives a batch's mean
    return torch.stack([lpips(x, y) for x, y in pairs]).double()


def _summary(
    values: np.ndarray, groups: np.ndarray, direction: str, n_resamples: int, level: float, seed: int
) -> PairedSummary:
    finite = np.isfinite(values)
    n_infinite = int((~finite).sum())
    plain = PairedSummary(None, None, None, None, len(values), n_infinite, direction)
    if not finite.any():
        return replace(plain, note="every pair is equal: no finite value to average")
    notes = [f"{n_infinite} of {len(values)} pairs are equal, and not in the mean"] if n_infinite else []
    kept, patients = values[finite], groups[finite]
    plain = replace(plain, mean=float(kept.mean()), std=float(kept.std()))
    if len(np.unique(patients)) < 2:
        return replace(plain, note="; ".join([*notes, "no interval: fewer than two images or patients"]))
    estimate = bootstrap_mean(kept, patients, resamples=n_resamples, level=level, seed=seed)
    return replace(plain, low=estimate.low, high=estimate.high, note="; ".join(filter(None, [*notes, estimate.note])))


class _PairedMetric(RegressionMetric):
    """A metric of the table in MONAI's form."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def _compute_metric(self, y_pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        image, reference = (x.as_tensor() if isinstance(x, MetaTensor) else x for x in (y_pred, y))
        image, reference = image.double(), reference.double()
        for x, kind in ((image, "the prediction"), (reference, "the reference")):
            if x.ndim != 4:
                raise UserError(f"{self.name} takes images of shape (C, H, W), got {tuple(x.shape[1:])}")
            check_range(x, kind)
        _check_shape(image.shape[1:], [self.name], "the prediction")
        return PAIRED_METRICS[self.name].function(image, reference)[:, None]


class _PairedHandler(IgniteMetricHandler):
    name: str

    def __init__(self, output_transform: Callable = lambda x: x) -> None:
        super().__init__(metric_fn=_PairedMetric(self.name), output_transform=output_transform, save_details=True)


class MultiScaleGMSD(_PairedHandler):
    """Multi-scale gradient magnitude similarity deviation as a handler: a deviation, so 0 is best, not 1.

    Zhang et al. 2017, "Gradient magnitude similarity deviation on multiple scales", without its chromatic term.

    Args:
        output_transform: engine output -> (prediction, image) in [0, 1], lists of (C, H, W) or batches.
    """

    name = "ms_gmsd"


class MDSI(_PairedHandler):
    """Mean deviation similarity index as a handler: a deviation, so 0 is best; not symmetric, the prediction first.

    Nafchi et al. 2016, arXiv 1608.07433. One channel stands for all three; what remains of its chromaticity then is
    said in ``PAIRED_METRICS["mdsi"].grey``.

    Args:
        output_transform: engine output -> (prediction, image) in [0, 1], lists of (C, H, W) or batches.
    """

    name = "mdsi"


class HaarPSI(_PairedHandler):
    """Haar wavelet-based perceptual similarity index as a handler; 1 is best.

    Reisenhofer et al. 2018, arXiv 1607.06140.

    Args:
        output_transform: engine output -> (prediction, image) in [0, 1], lists of (C, H, W) or batches.
    """

    name = "haarpsi"
