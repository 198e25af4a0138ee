"""Did a generative model copy its training images? Nearest neighbours in pixels and in feature space, calibrated.

Frontal radiographs of different patients correlate highly pixel by pixel, so plain correlation cannot tell a copy from
a stranger. Here low frequencies are removed by a difference of Gaussians and the local contrast is made equal; then
images of different patients have little in common and copies nearly everything. The search has two stages: every
training image, in every flip and small shift, against low-resolution descriptors by matrix products; the best of them
again by normalised cross-correlation at a higher resolution.

How similar an *independent* image is to its nearest training image is measured, not assumed: the same search is run
for held-out patients. Two figures are compared with theirs: the similarity, and its excess over that of the runners-up
(a copy is like one training image, a typical image is like many). A Gumbel distribution, the limit of maxima over many
training images, is fitted to each on the scale of Fisher's z; a sample is flagged when either is beyond it, after
Bonferroni's correction for both figures and all samples.

Follow-ups of a training patient are no copies: patients stand differently each time, and such pairs score little above
pairs of strangers. Two exposures between which the patient did not move are the exception: they reach the threshold.

What the audit cannot do: copies rotated by several degrees, copied details in an otherwise new image, and copies buried
in noise stay below the thresholds. A sample that is not flagged is no proof of privacy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image
from scipy import fft, optimize, stats
from scipy.ndimage import gaussian_filter

from medgen.data.image_set import LUMA
from medgen.errors import UserError
from medgen.output import plain_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Calibration",
    "FeatureAudit",
    "Match",
    "MemorisationAudit",
    "audit_features",
    "audit_memorisation",
    "draw_worst_pairs",
]

FINE_SIDE = 128  # longer side in pixels at which images are compared; smaller images keep theirs
COARSE_SIDE = 32  # the same for the search over all training images
MIN_SIDE = 16
ASPECT_TOLERANCE = 0.02  # relative

FLIPS = ("none", "horizontal", "vertical", "both")
FLIP_AXES = {"none": (), "horizontal": (-1,), "vertical": (-2,), "both": (-2, -1)}

FEATURELESS = 1e-4  # standard deviation after the band-pass; a single edge of one grey level of 255 has twice that
MIN_CALIBRATION = 20  # fewer independent images say nothing about a tail
UNCALIBRATED_THRESHOLD = 0.9
MIN_RUNNERS_UP = 3
MAX_SIMILARITY = 1 - 1e-6  # Fisher's z of 1 is infinite
ONE_SIDED_95 = 1.6448536269514722
# Asymptotic variance of the maximum likelihood quantile mu + y beta of a Gumbel distribution, in units of beta² / n:
# a + b y + c y² (Johnson, Kotz, Balakrishnan 1995, Continuous Univariate Distributions 2, section 22.9)
GUMBEL_VARIANCE = (1.10867, 0.51404, 0.60793)
CAPTION = 22  # characters above a picture
DIFFERENCE_GAIN = 4
MAX_KEPT_BYTES = 512 * 2**20  # descriptors kept of one set; beyond it images are read again when they are candidates


class Images(Protocol):
    """Images that are read when asked for: a list of arrays, an ``ImageSet``, a dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Match:
    """A sample and the training image most like it.

    ``sample ≈ shift(flip(training))``: the training image is flipped, then moved down by ``shift[0]`` and right by
    ``shift[1]`` pixels of the sample.

    Args:
        sample: index of the sample.
        training: index of the training image; None where the sample is constant, as nothing correlates with it.
        similarity: correlation of the band-passed images over their overlap, at most 1; None for a constant sample.
        excess: Fisher's z of the similarity minus the median z of the runners-up (training images of other patients
            than the nearest, where patients are known); None with fewer than three of them.
        flip: ``none``, ``horizontal``, ``vertical`` or ``both``.
        shift: rows and columns, in pixels of the sample; settled at full resolution for flagged samples.
        p_value: probability that similarity or excess of an independent image is as large; corrected for looking at
            two figures, not for the number of samples. None without calibration.
        flagged: beyond a threshold.
        training_copies: how many training images have exactly these pixels, this one included.
    """

    sample: int
    training: int | None
    similarity: float | None
    excess: float | None = None
    flip: str = "none"
    shift: tuple[int, int] = (0, 0)
    p_value: float | None = None
    flagged: bool = False
    training_copies: int = 1


@dataclass(frozen=True)
class Calibration:
    """How near independent images come to the training set by chance.

    Args:
        source: ``held_out``, ``training`` (left out one patient, or one image, at a time) or ``none``.
        scores: of each image used, ascending: the similarity of its nearest training image, its excess, or its
            distance.
        location: of the Gumbel distribution fitted to the transformed scores (Fisher's z of a similarity, an excess as
            it is, minus the logarithm of a distance); NaN without calibration.
        scale: of the same.
        outliers: indices (in the calibration set) of images that are themselves too near to be independent; they are
            left out of the fit. Look at them: the same image in both sets, or the same patient.
    """

    source: str
    scores: tuple[float, ...] = ()
    location: float = float("nan")
    scale: float = float("nan")
    outliers: tuple[int, ...] = ()

    @property
    def n(self) -> int:
        """Number of images that the fit rests on."""
        return len(self.scores)

    @property
    def fitted(self) -> bool:
        """Whether there were enough images for a fit."""
        return self.source != "none"

    def p_values(self, transformed: np.ndarray) -> np.ndarray:
        """Upper tail probability of transformed scores, at the 95 % bound of the fit's uncertainty.

        A fit to few images is uncertain far out in the tail; the bound makes the p-value larger instead of hiding that.
        """
        a, b, c = (coefficient * ONE_SIDED_95**2 / self.n for coefficient in GUMBEL_VARIANCE)
        d = (np.asarray(transformed, dtype=np.float64) - self.location) / self.scale
        # y + sqrt(a + b y + c y²) = d, solved for y
        half = d + b / 2
        y = (half - np.sqrt(np.maximum(half**2 - (1 - c) * (d**2 - a), 0.0))) / (1 - c)
        return -np.expm1(-np.exp(-np.maximum(y, -30.0)))

    def quantile(self, tail: float) -> float:
        """The transformed score whose :meth:`p_values` is ``tail``."""
        a, b, c = (coefficient * ONE_SIDED_95**2 / self.n for coefficient in GUMBEL_VARIANCE)
        y = -np.log(-np.log1p(-tail))
        return float(self.location + self.scale * (y + np.sqrt(a + b * y + c * y * y)))


@dataclass(frozen=True)
class FeatureAudit:
    """Nearest training neighbours in feature space.

    Smooth or average-looking samples lie near the training set without being copies, so nearness here is a reason to
    look, not a finding.

    Args:
        nearest: of each sample the index of its nearest training image.
        distances: Euclidean, features divided by the training set's standard deviations.
        ratios: the same divided by the median distance of the calibration images; 1 is what independent images have.
        p_values: probability that an independent image is as near; None without calibration.
        flagged: indices of the samples beyond the threshold, nearest first.
        threshold: distance below which a sample is flagged; None without calibration.
        median_distance: of the samples.
        calibration: distances of independent images.
        closer: probability that a sample is nearer to the training set than an independent image is; 0.5 is ideal.
            None without calibration.
        closer_p_value: of the one-sided Mann-Whitney test that it is no more than 0.5 (Meehan et al. 2020, "A
            non-parametric test to detect data-copying in generative models"). None without calibration.
        n_features: features used.
        n_constant: features left out because they do not vary over the training set.
        notes: what a reader must know.
    """

    nearest: tuple[int, ...]
    distances: tuple[float, ...]
    ratios: tuple[float, ...] | None
    p_values: tuple[float, ...] | None
    flagged: tuple[int, ...]
    threshold: float | None
    median_distance: float
    calibration: Calibration
    closer: float | None
    closer_p_value: float | None
    n_features: int
    n_constant: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON: plain numbers, strings, lists and None."""
        return plain_json(asdict(self) | {"calibration": _plain_calibration(self.calibration)})


@dataclass(frozen=True)
class MemorisationAudit:
    """What :func:`audit_memorisation` found.

    Args:
        matches: one per sample, in the order of the samples.
        threshold: similarity from which a sample is flagged.
        excess_threshold: excess from which a sample is flagged; None without calibration.
        share: flagged samples over samples that are not constant; None when all are.
        share_low: lower end of its exact (Clopper-Pearson) confidence interval.
        share_high: upper end.
        level: of the interval.
        alpha: probability that any of the samples is flagged although all are independent of the training set.
        calibration: similarities that independent images reach.
        excess_calibration: and their excess.
        n_training: training images searched.
        n_training_duplicates: how many of them repeat the pixels of an earlier one.
        constant: of ``samples``, ``training`` and ``held_out`` the number of images without any structure; they take
            no part.
        n_leaked: held-out images left out of the calibration because their patient, or their very pixels, are in the
            training set.
        copied_training_images: different training images among the flagged pairs.
        features: the same question in feature space; None when no features were given.
        notes: what a reader must know, a sentence each.
        settings: everything that changes the numbers.
    """

    matches: tuple[Match, ...]
    threshold: float
    excess_threshold: float | None
    share: float | None
    share_low: float | None
    share_high: float | None
    level: float
    alpha: float
    calibration: Calibration
    excess_calibration: Calibration
    n_training: int
    n_training_duplicates: int
    constant: dict[str, int]
    n_leaked: int
    copied_training_images: int
    features: FeatureAudit | None
    notes: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def flagged(self) -> tuple[int, ...]:
        """Indices of the flagged samples, worst first."""
        return tuple(match.sample for match in self.worst() if match.flagged)

    def worst(self, count: int | None = None) -> list[Match]:
        """Pairs in the order of their p-values, flagged or not; without calibration in that of their similarity.

        Args:
            count: how many; all by default.
        """
        found = [match for match in self.matches if match.similarity is not None]
        return sorted(found, key=lambda match: (match.p_value or 0.0, -match.similarity, match.sample))[:count]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: plain numbers, strings, lists and None."""
        out = dict(vars(self)) | {
            "n_samples": len(self.matches),
            "n_flagged": len(self.flagged),
            "flagged": self.flagged,
            "worst": [match.sample for match in self.worst()],
            "calibration": _plain_calibration(self.calibration),
            "excess_calibration": _plain_calibration(self.excess_calibration),
            "features": None if self.features is None else self.features.to_dict(),
            "matches": [asdict(match) for match in self.matches],
        }
        return plain_json(out)


def audit_memorisation(
    samples: Images,
    training: Images,
    held_out: Images | None = None,
    *,
    features: Sequence[Any] | None = None,
    training_patients: Sequence[object] | None = None,
    held_out_patients: Sequence[object] | None = None,
    vertical_flips: bool = False,
    max_shift: float = 1 / 16,
    candidates: int = 8,
    alpha: float = 0.01,
    level: float = 0.95,
    max_calibration: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> MemorisationAudit:
    """Look for copies of training images among samples.

    Images are read one at a time; small descriptors stay. They may differ in size but not in aspect. Colour images are
    compared by luminance.

    Args:
        samples: generated images, float32 (C, H, W) in [0, 1], C 1 or 3.
        training: what the model was trained on.
        held_out: real images of other patients that the model has not seen: what "independent" looks like. Without
            them, or with fewer than 20, training images stand in, each against those of other patients.
        features: arrays (N, D) of the samples, the training and the held-out images (or None), or objects that carry
            one as ``features``: see :func:`audit_features`.
        training_patients: one identifier per training image, compared as text; ``training.patients`` by default where
            there is one. Where they are unknown, follow-ups may raise the limit, and a note says so.
        held_out_patients: the same for the held-out images.
        vertical_flips: look for copies turned upside down, too; doubles the time.
        max_shift: largest shift looked for, as a share of the longer side; at most 1/4.
        candidates: how many training images of the coarse search are compared at the higher resolution.
        alpha: probability of any false alarm.
        level: of the confidence interval of the share.
        max_calibration: at most so many images are used for the calibration, one per patient where patients are known.
        seed: of the choice among more.
        progress: show bars.

    Returns:
        The audit.

    Raises:
        UserError: for an empty set, images of another aspect, below 16 pixels, outside [0, 1] or not finite, patients
            or features that do not match the images, or a setting out of range.
    """
    _check_settings(max_shift, candidates, alpha, level, max_calibration)
    for name, images in (("samples", samples), ("training", training)):
        if len(images) == 0:
            raise UserError(f"the audit takes at least one image of {name}, got none; check the folder or datalist")
    held_out = held_out if held_out is not None and len(held_out) else None
    patients = _patients(training, training_patients, "training")
    others = None if held_out is None else _patients(held_out, held_out_patients, "held_out")
    notes = _note_unknown(patients, others, held_out is not None)

    # sizes of the first images only: the others are brought to the same grid when they are read
    sets = {"samples": samples, "training": training, "held_out": held_out}
    first = [_luminance(images[0], name, 0).shape for name, images in sets.items() if images is not None]
    grids = _Grids.of(first, max_shift)
    flips = FLIPS if vertical_flips else FLIPS[:2]
    reference = _Descriptors("training", training, grids, progress)
    queries = _Descriptors("samples", samples, grids, progress)
    index = _Index(reference, patients, flips, grids, candidates)
    if not index.n:
        raise UserError("all training images are constant, expected images with structure; check how they are read")
    found = index.search(queries, range(len(samples)), progress=progress)

    source, chosen, n_leaked, constant_held_out = "training", [], 0, 0
    if held_out is None:
        reason = "No held-out images were given"
    else:
        known = set() if patients is None or others is None else set(patients)
        strangers = [i for i in range(len(held_out)) if others is None or others[i] not in known]
        drawn = _one_per_patient(strangers, others, max_calibration, seed)
        independent = _Descriptors("held_out", held_out, grids, progress, drawn)
        copied = [i for i in drawn if independent.digests[i] in index.digests]
        constant_held_out, n_leaked = len(independent.constant), len(held_out) - len(strangers) + len(copied)
        chosen = [i for i in drawn if i not in copied and i not in independent.constant]
        reason = f"Only {len(chosen)} held-out images are usable for the calibration"
        if n_leaked:
            notes.append(
                f"{n_leaked} held-out images share their patient or their pixels with the training set: "
                "they are no held-out images and were left out of the calibration."
            )
        if len(chosen) >= MIN_CALIBRATION:
            source, scores = "held_out", index.search(independent, chosen, progress=progress)
    if source == "training":
        chosen = _one_per_patient(index.members, patients, max_calibration, seed)
        scores = index.search(reference, chosen, leave_out=True, progress=progress)
        notes.append(
            f"{reason}: training images were compared with those of "
            + ("other patients." if patients is not None else "all others, follow-ups of the same patient included.")
        )
    pairs = {i: hit for i, hit in zip(chosen, scores, strict=True) if hit is not None}
    similarities = np.array([hit.similarity for hit in pairs.values()])
    excesses = np.array([np.nan if hit.excess is None else hit.excess for hit in pairs.values()])
    figures = [(similarities, _fisher_z(similarities)), (excesses, excesses)]
    calibration, excess_calibration = _calibrate(source, list(pairs), figures, alpha)
    n_figures = calibration.fitted + excess_calibration.fitted
    threshold, excess_threshold = UNCALIBRATED_THRESHOLD, None
    if calibration.fitted:
        threshold = float(np.tanh(calibration.quantile(alpha / (n_figures * len(samples)))))
        if excess_calibration.fitted:
            excess_threshold = excess_calibration.quantile(alpha / (n_figures * len(samples)))
    else:
        notes.append(
            f"Only {len(pairs)} independent images are there to calibrate with, {MIN_CALIBRATION} are needed: flagged "
            f"are near-exact copies, of a similarity of at least {UNCALIBRATED_THRESHOLD}; there are no p-values, and "
            "nothing is said about looser copies."
        )
    if calibration.outliers:
        notes.append(
            f"{len(calibration.outliers)} calibration images are too similar to a training image to be independent and "
            "were left out of the fit: look for the same image or the same patient in both sets."
        )
    matches = tuple(
        _match(i, hit, index, (calibration, excess_calibration), (threshold, excess_threshold))
        for i, hit in enumerate(found)
    )
    matches = tuple(
        replace(match, shift=_shift_in_full(match, queries.read(match.sample), reference.read(match.training)))
        if match.flagged and max(queries.shapes[match.sample]) > max(grids.fine)
        else match
        for match in matches
    )
    n_flagged, n_compared = sum(match.flagged for match in matches), sum(hit is not None for hit in found)
    if n_compared < len(samples):
        notes.append(
            f"{len(samples) - n_compared} of {len(samples)} samples are constant: nothing correlates with them."
        )
    interval = (None, None)
    if n_compared:
        interval = stats.binomtest(n_flagged, n_compared).proportion_ci(level, method="exact")

    feature_audit = None
    if features is not None:
        feature_audit = _features_of_sets(
            features, (samples, training, held_out), patients, others, alpha, max_calibration, seed
        )
    return MemorisationAudit(
        matches=matches,
        threshold=threshold,
        excess_threshold=excess_threshold,
        share=n_flagged / n_compared if n_compared else None,
        share_low=interval[0],
        share_high=interval[1],
        level=level,
        alpha=alpha,
        calibration=calibration,
        excess_calibration=excess_calibration,
        n_training=len(training),
        n_training_duplicates=len(training) - len(reference.constant) - index.n,
        constant={
            "samples": len(samples) - n_compared,
            "training": len(reference.constant),
            "held_out": constant_held_out,
        },
        n_leaked=n_leaked,
        copied_training_images=len({match.training for match in matches if match.flagged}),
        features=feature_audit,
        notes=tuple(notes),
        settings={
            "vertical_flips": vertical_flips,
            "max_shift": max_shift,
            "candidates": candidates,
            "max_calibration": max_calibration,
            "seed": seed,
            "compared_at": list(grids.fine),
            "searched_at": list(grids.coarse),
            "band": [grids.sigma(grids.fine), 3 * grids.sigma(grids.fine)],
        },
    )


def audit_features(
    samples: Any,
    training: Any,
    held_out: Any = None,
    *,
    training_patients: Sequence[object] | None = None,
    held_out_patients: Sequence[object] | None = None,
    alpha: float = 0.01,
    max_calibration: int = 1000,
    seed: int = 0,
) -> FeatureAudit:
    """Distance of each sample to its nearest training image in feature space, beside that of independent images.

    Args:
        samples: array (N, D), or an object that carries one as ``features``.
        training: array (M, D).
        held_out: array (K, D) of real images of other patients; without it, each training image against those of
            other patients.
        training_patients: one identifier per training image, compared as text; where they are unknown, follow-ups
            may raise the limit, and a note says so.
        held_out_patients: one identifier per held-out image.
        alpha: probability of any false alarm.
        max_calibration: at most so many images are used for the calibration, one per patient where patients are known.
        seed: of the choice among more.

    Returns:
        Distances and what independent images have.

    Raises:
        UserError: for arrays that are not (N, D) of the same D, not finite or empty, or patients that do not match.
    """
    arrays = {"samples": samples, "training": training, "held_out": held_out}
    arrays = {name: _feature_array(name, value) for name, value in arrays.items() if value is not None}
    widths = {name: array.shape[1] for name, array in arrays.items()}
    if len(set(widths.values())) > 1:
        raise UserError(f"features must have the same number of columns, got {widths}; extract them in one way")
    patients = _patients(training, training_patients, "training", len(arrays["training"]))
    others = None
    if held_out is not None:
        others = _patients(held_out, held_out_patients, "held_out", len(arrays["held_out"]))
    mean, std = arrays["training"].mean(0), arrays["training"].std(0)
    # a feature that rounding alone makes vary would be blown up to the size of the others
    varies = std > 1e-9 * np.maximum(np.abs(mean), 1e-30)
    if not varies.any():
        raise UserError("no feature varies over the training set; check the features or give more training images")
    scaled = {name: (array[:, varies] - mean[varies]) / std[varies] for name, array in arrays.items()}
    notes = _note_unknown(patients, others, held_out is not None)

    nearest, distances = _nearest(scaled["samples"], scaled["training"])
    if held_out is not None:
        source = "held_out"
        known = set() if patients is None or others is None else set(patients)
        allowed = [i for i in range(len(scaled["held_out"])) if others is None or others[i] not in known]
        if len(allowed) < len(scaled["held_out"]):
            notes.append(
                f"{len(scaled['held_out']) - len(allowed)} held-out images share their patient with the training set "
                "and were left out of the calibration."
            )
        chosen = _one_per_patient(allowed, others, max_calibration, seed)
        reached = _nearest(scaled["held_out"][chosen], scaled["training"])[1]
    else:
        source = "training"
        chosen = _one_per_patient(range(len(scaled["training"])), patients, max_calibration, seed)
        own = _codes(patients, len(scaled["training"]))
        reached = _nearest(scaled["training"][chosen], scaled["training"], own[chosen], own)[1]
        notes.append(
            "No held-out features were given: training images were compared with "
            + ("those of other patients." if patients is not None else "all others.")
        )
    usable = {i: float(d) for i, d in zip(chosen, reached, strict=True) if np.isfinite(d)}
    reached = np.array(list(usable.values()))
    (calibration,) = _calibrate(source, list(usable), [(reached, _nearness(reached))], alpha)
    p_values = ratios = closer = closer_p = threshold = None
    flagged = np.empty(0, dtype=int)
    if calibration.fitted:
        independent = np.array(calibration.scores)
        p = calibration.p_values(_nearness(distances))
        order = np.argsort(distances, kind="stable")
        flagged = order[p[order] < alpha / len(distances)]
        threshold = float(np.exp(-calibration.quantile(alpha / len(distances))))
        test = stats.mannwhitneyu(distances, independent, alternative="less")
        closer = float(1 - test.statistic / (len(distances) * len(independent)))
        closer_p = float(test.pvalue)
        p_values = tuple(p.tolist())
        if (median := np.median(independent)) > 0:
            ratios = tuple((distances / median).tolist())
    else:
        notes.append(
            f"Only {len(usable)} independent images are there to calibrate with, {MIN_CALIBRATION} are needed: "
            "distances are given without p-values."
        )
    return FeatureAudit(
        nearest=tuple(nearest.tolist()),
        distances=tuple(distances.tolist()),
        ratios=ratios,
        p_values=p_values,
        flagged=tuple(flagged.tolist()),
        threshold=threshold,
        median_distance=float(np.median(distances)),
        calibration=calibration,
        closer=closer,
        closer_p_value=closer_p,
        n_features=int(varies.sum()),
        n_constant=int((~varies).sum()),
        notes=tuple(notes),
    )


def draw_worst_pairs(
    audit: MemorisationAudit,
    samples: Images,
    training: Images,
    count: int = 8,
    path: str | Path | None = None,
) -> Figure:
    """Draw the most similar pairs: sample, aligned training image and their absolute difference below each other.

    The training image is flipped and shifted as found and, for the difference only, fitted to the sample in brightness
    and contrast, which the similarity ignores. The difference is shown four times as strong. White where the shifted
    image has no pixels.

    Args:
        audit: of these samples and training images.
        samples: as audited.
        training: as audited.
        count: number of pairs.
        path: PNG to write; not written by default.

    Returns:
        A matplotlib figure that is not registered with pyplot.

    Raises:
        UserError: when there is no pair to draw, or the sets are not those of the audit.
    """
    from matplotlib.figure import Figure

    if len(samples) != len(audit.matches) or len(training) != audit.n_training:
        raise UserError(
            f"the audit is of {len(audit.matches)} samples and {audit.n_training} training images, got {len(samples)} "
            f"and {len(training)}; give the sets that were audited"
        )
    pairs = audit.worst(count)
    if not pairs:
        raise UserError("there is no pair to draw, expected samples that are not constant and a count of at least 1")
    aspect = np.asarray(samples[pairs[0].sample]).shape[1] / np.asarray(samples[pairs[0].sample]).shape[2]
    figure = Figure(figsize=(2.2 * len(pairs) + 0.5, 3 * 2.2 * aspect + 2.0), layout="constrained", dpi=110)
    axes = figure.subplots(3, len(pairs), squeeze=False)
    for column, match in zip(axes.T, pairs, strict=True):
        sample = np.asarray(samples[match.sample], dtype=np.float32)
        aligned = _aligned(np.asarray(training[match.training], dtype=np.float32), sample.shape, match)
        titles = (
            _sample_caption(match, _short_name(samples, "sample", match.sample)),
            _training_caption(match, _short_name(training, "training", match.training)),
            "",
        )
        difference = DIFFERENCE_GAIN * _difference(sample, aligned)
        for ax, title, picture in zip(column, titles, (sample, aligned, difference), strict=True):
            pixels = np.nan_to_num(picture.transpose(1, 2, 0), nan=1.0).clip(0, 1)
            ax.imshow(pixels.squeeze(-1) if pixels.shape[2] == 1 else pixels, cmap="gray", vmin=0, vmax=1)
            ax.set_title(title, fontsize=11, color="firebrick" if match.flagged else "black")
            ax.set_xticks([])
            ax.set_yticks([])
    labels = ("sample", "nearest training\nimage, aligned", f"difference × {DIFFERENCE_GAIN},\ncontrast made equal")
    for ax, label in zip(axes[:, 0], labels, strict=True):
        ax.set_ylabel(label, fontsize=11)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return figure


# ---------------------------------------------------------------------------------------------- images => descriptors


@dataclass(frozen=True)
class _Grids:
    """Sizes to which images are brought: (H, W) of the comparison and of the search, and shifts on each."""

    aspect: float  # height / width
    fine: tuple[int, int]
    coarse: tuple[int, int]
    max_shift: float

    @classmethod
    def of(cls, shapes: Iterable[tuple[int, int]], max_shift: float) -> _Grids:
        shapes = list(shapes)
        aspect = shapes[0][0] / shapes[0][1]
        # nothing is enlarged: an image of 64 pixels has no more to say at 128
        longer = min(FINE_SIDE, *(max(shape) for shape in shapes))
        return cls(aspect, *(cls._grid(aspect, min(side, longer)) for side in (longer, COARSE_SIDE)), max_shift)

    @staticmethod
    def _grid(aspect: float, longer: int) -> tuple[int, int]:
        return (longer, max(1, round(longer / aspect))) if aspect >= 1 else (max(1, round(longer * aspect)), longer)

    @staticmethod
    def sigma(grid: tuple[int, int]) -> float:
        """Of the finer Gaussian; the other is three times as wide, the local contrast is taken over six times."""
        return max(0.7, max(grid) / 128)

    def shifts(self, grid: tuple[int, int]) -> int:
        return min(int(np.ceil(self.max_shift * max(grid))), min(grid) // 4)


def _luminance(image: np.ndarray, name: str, i: int) -> np.ndarray:
    """(C, H, W) in [0, 1] -> (H, W), checked."""
    image = np.asarray(image, dtype=np.float32)
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise UserError(f"{name}[{i}] must be (C, H, W) with 1 or 3 channels, got shape {image.shape}")
    if min(image.shape[1:]) < MIN_SIDE:
        raise UserError(f"{name}[{i}] must have sides of at least {MIN_SIDE} pixels, got {image.shape[1:]}")
    low, high = float(image.min()), float(image.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise UserError(f"{name}[{i}] must be finite, got NaN or infinity; check how it was generated or read")
    if low < -1e-3 or high > 1 + 1e-3:
        raise UserError(f"{name}[{i}] must be in [0, 1], got {low:.3g} to {high:.3g}; scale the images")
    if image.shape[0] == 1:
        return image[0]
    return np.tensordot(LUMA, image, 1)


def _resized(image: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    if image.shape == grid:
        return image
    # reducing with Pillow smooths over all source pixels
    return np.asarray(Image.fromarray(image).resize((grid[1], grid[0]), Image.Resampling.BICUBIC))


def _band_passed(image: np.ndarray, sigma: float) -> np.ndarray | None:
    """Edges and texture at equal local contrast, unit energy; None when the image has none."""
    band = gaussian_filter(image, sigma, mode="reflect") - gaussian_filter(image, 3 * sigma, mode="reflect")
    energy = float(np.mean(band * band))
    if energy < FEATURELESS**2:
        return None
    # without the second term the noise of a flat background would count as much as the ribs
    contrast = np.sqrt(gaussian_filter(band * band, 6 * sigma, mode="reflect")) + 0.3 * np.sqrt(energy)
    band = band / contrast
    return band / np.linalg.norm(band)


class _Descriptors:
    """Reads each image of a set once and keeps what the search needs; what does not fit is read again on demand."""

    def __init__(
        self, name: str, images: Images, grids: _Grids, progress: bool, chosen: Sequence[int] | None = None
    ) -> None:
        self.name, self.images, self.grids = name, images, grids
        chosen = range(len(images)) if chosen is None else chosen
        self._rows = {i: row for row, i in enumerate(chosen)}
        self._coarse = np.zeros((len(chosen), *grids.coarse), np.float32)
        self.constant: set[int] = set()
        self.digests: dict[int, bytes] = {}
        self.shapes: dict[int, tuple[int, int]] = {}
        n_kept = min(len(chosen), MAX_KEPT_BYTES // (2 * grids.fine[0] * grids.fine[1]))
        # half precision: 1e-3 of each value, far below what any of the thresholds can resolve
        self._kept = np.zeros((n_kept, *grids.fine), np.float16)
        for i in _progress(chosen, f"reading {name}", progress):
            row, luminance = self._rows[i], self.read(i)
            self.digests[i] = hashlib.blake2b(luminance.tobytes(), digest_size=16).digest()
            self.shapes[i] = luminance.shape
            fine = self._describe(luminance)
            coarse = _band_passed(_resized(luminance, grids.coarse), grids.sigma(grids.coarse))
            if fine is None or coarse is None:
                self.constant.add(i)
                continue
            self._coarse[row] = coarse
            if row < n_kept:
                self._kept[row] = fine

    def coarse(self, indices: Sequence[int]) -> np.ndarray:
        """Descriptors (len(indices), H, W) at the lower resolution, float32."""
        return self._coarse[[self._rows[i] for i in indices]]

    def fine(self, i: int) -> np.ndarray:
        """Descriptor (H, W) at the higher resolution, float32."""
        row = self._rows[i]
        kept = self._kept[row] if row < len(self._kept) else self._describe(self.read(i))
        return kept.astype(np.float32)

    def _describe(self, luminance: np.ndarray) -> np.ndarray | None:
        band = _band_passed(_resized(luminance, self.grids.fine), self.grids.sigma(self.grids.fine))
        # values of a unit vector are near the smallest half precision has
        return None if band is None else (band * np.sqrt(band.size)).astype(np.float16)

    def read(self, i: int) -> np.ndarray:
        """Luminance (H, W) of an image, float32."""
        luminance = np.ascontiguousarray(_luminance(self.images[i], self.name, i))
        height, width = luminance.shape
        if abs(height / width / self.grids.aspect - 1) > ASPECT_TOLERANCE:
            raise UserError(
                f"images must share one aspect, expected height / width {self.grids.aspect:.3f}, got "
                f"{height} × {width} in {self.name}[{i}]; crop or resize the sets in the same way"
            )
        return luminance


# ------------------------------------------------------------------------------------------- descriptors => neighbours


@dataclass(frozen=True)
class _Hit:
    """Nearest training image of a query; shift in pixels of the query."""

    training: int
    similarity: float
    excess: float | None
    flip: str
    shift: tuple[int, int]


class _Index:
    """Finds the training image most like a query, whatever its flip and small shift.

    Args:
        reference: descriptors of the training images.
        patients: one per training image, or None.
        flips: those looked for.
        grids: sizes.
        candidates: pairs compared at the higher resolution.
    """

    def __init__(
        self,
        reference: _Descriptors,
        patients: list[str] | None,
        flips: tuple[str, ...],
        grids: _Grids,
        candidates: int,
    ) -> None:
        self.reference, self.flips, self.grids, self.candidates = reference, flips, grids, candidates
        # repeated images would fill the places of the candidates: the first stands for all
        groups: dict[bytes, list[int]] = {}
        for i, digest in reference.digests.items():
            if i not in reference.constant:
                groups.setdefault(digest, []).append(i)
        self.members = [group[0] for group in groups.values()]
        self.copies = {group[0]: len(group) for group in groups.values()}
        self.digests = set(groups)
        self.n = len(self.members)
        self._patients = patients
        self._owners = None if patients is None else [{patients[i] for i in group} for group in groups.values()]
        self._coarse = reference.coarse(self.members).reshape(self.n, grids.coarse[0] * grids.coarse[1])

    def search(
        self, queries: _Descriptors, chosen: Sequence[int], leave_out: bool = False, progress: bool = False
    ) -> list[_Hit | None]:
        """Nearest training image of each chosen query; None for a constant one or where none is left.

        Args:
            queries: descriptors.
            chosen: indices into them.
            leave_out: the queries are training images; each is compared with those of other patients only.
            progress: show a bar.
        """
        variants = len(self.flips) * (2 * self.grids.shifts(self.grids.coarse) + 1) ** 2
        chunk = max(1, 1024 // variants)
        hits: list[_Hit | None] = []
        starts = range(0, len(chosen), chunk)
        for start in _progress(starts, f"comparing {queries.name}", progress):
            part = list(chosen[start : start + chunk])
            scores = self._coarse_scores(queries.coarse(part))  # (Q, flips, N)
            for i, score in zip(part, scores, strict=True):
                if leave_out:
                    score[:, self._left_out(i)] = -np.inf
                hits.append(None if i in queries.constant else self._refine(queries, i, score))
        return hits

    def _left_out(self, i: int) -> list[int]:
        if self._owners is None:
            return [self.members.index(i)]
        return [row for row, owners in enumerate(self._owners) if self._patients[i] in owners or self.members[row] == i]

    def _coarse_scores(self, queries: np.ndarray) -> np.ndarray:
        """(Q, H, W) -> (Q, flips, N): best cosine over all shifts."""
        Q, F, reach = len(queries), len(self.flips), self.grids.shifts(self.grids.coarse)
        shifts = [(dy, dx) for dy in range(-reach, reach + 1) for dx in range(-reach, reach + 1)]
        moved = np.zeros((Q, F, len(shifts), *queries.shape[1:]), np.float32)
        for f, flip in enumerate(self.flips):
            # sample = shift(flip(training)), so the query is shifted back first and flipped after
            for s, (dy, dx) in enumerate(shifts):
                to, source = _overlap(queries.shape[1:], -dy, -dx)
                part = np.zeros_like(queries)
                part[:, *to] = queries[:, *source]
                moved[:, f, s] = np.flip(part, FLIP_AXES[flip])
        vectors = moved.reshape(Q * F * len(shifts), -1)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        out = np.empty((Q, F, self.n), np.float32)
        for start in range(0, self.n, 2048):  # blocks that stay in the processor's cache
            block = vectors @ self._coarse[start : start + 2048].T
            out[:, :, start : start + 2048] = block.reshape(Q, F, len(shifts), -1).max(2)
        return out

    def _refine(self, queries: _Descriptors, i: int, score: np.ndarray) -> _Hit | None:
        flips, best = score.argmax(0), score.max(0)
        order = _top(best, self.candidates)
        order = order[np.isfinite(best[order])]
        if not len(order):
            return None
        pairs = [(self.flips[flips[row]], self.members[row]) for row in order.tolist()]
        stack = np.stack([np.flip(self.reference.fine(j), FLIP_AXES[flip]) for flip, j in pairs])
        values, peaks = _cross_correlate(queries.fine(i), stack, self.grids.shifts(self.grids.fine))
        winner = int(np.argmax(values))  # the first of equals: deterministic
        others = [k for k in range(len(pairs)) if k != winner and not self._same_patient(order[k], order[winner])]
        excess = None
        if len(others) >= MIN_RUNNERS_UP:
            excess = float(_fisher_z(values[winner]) - np.median(_fisher_z(values[others])))
        flip, training = pairs[winner]
        height, width = queries.shapes[i]
        dy, dx = peaks[winner]
        shift = (round(dy * height / self.grids.fine[0]), round(dx * width / self.grids.fine[1]))
        return _Hit(training, float(min(values[winner], 1.0)), excess, flip, shift)

    def _same_patient(self, a: int, b: int) -> bool:
        return self._owners is not None and not self._owners[a].isdisjoint(self._owners[b])


def _top(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the largest values, largest first, lower index first among equals."""
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    part = np.sort(np.argpartition(-values, count)[:count])
    return part[np.argsort(-values[part], kind="stable")]


def _overlap(shape: tuple[int, int], dy: int, dx: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Slices such that ``out[to] = image[source]`` moves an image down by dy and right by dx."""
    to = tuple(slice(max(d, 0), n + min(d, 0)) for n, d in zip(shape, (dy, dx), strict=True))
    source = tuple(slice(max(-d, 0), n + min(-d, 0)) for n, d in zip(shape, (dy, dx), strict=True))
    return to, source


def _cross_correlate(query: np.ndarray, stack: np.ndarray, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """Normalised cross-correlation over the overlap, best shift to a fraction of a pixel.

    Args:
        query: (H, W).
        stack: (K, H, W).
        reach: largest shift in pixels.

    Returns:
        Best values (K,), and the shifts (K, 2) that move each of the stack onto the query.
    """
    H, W = query.shape
    size = tuple(fft.next_fast_len(n + reach, real=True) for n in (H, W))  # zeros, or shifts would wrap around
    spectrum = fft.rfft2(query, size) * np.conj(fft.rfft2(stack, size))  # (K, h, w // 2 + 1)
    shifts = np.arange(-reach, reach + 1)
    products = fft.irfft2(spectrum, size)[:, shifts[:, None], shifts]  # (K, 2 reach + 1, 2 reach + 1)
    energy = _window_energy(query[None], shifts) * _window_energy(stack, -shifts)
    norm = np.sqrt(np.maximum(energy, 1e-12))
    values = products / norm
    flat = values.reshape(len(stack), -1).argmax(1)
    rows, columns = np.unravel_index(flat, values.shape[1:])
    # the peak lies between pixels when an image of 512 was shifted by 2 and is compared at 128
    fine = np.arange(-4, 5) / 8
    peaks = np.empty((len(stack), 2))
    best = np.empty(len(stack))
    ky = 2j * np.pi * fft.fftfreq(size[0])
    kx = 2j * np.pi * fft.rfftfreq(size[1])
    # of the half spectrum all but the first column, and the last of an even size, stand for two
    weight = np.full(len(kx), 2.0)
    weight[0] = 1.0
    if size[1] % 2 == 0:
        weight[-1] = 1.0
    for k, (row, column) in enumerate(zip(rows, columns, strict=True)):
        dy, dx = shifts[row] + fine, shifts[column] + fine
        local = (np.exp(dy[:, None] * ky) @ spectrum[k] @ (weight * np.exp(dx[:, None] * kx)).T).real
        local /= size[0] * size[1] * norm[k, row, column]
        y, x = np.unravel_index(local.argmax(), local.shape)
        best[k], peaks[k] = local[y, x], (dy[y], dx[x])
    return best, peaks


def _shift_in_full(match: Match, sample: np.ndarray, training: np.ndarray) -> tuple[int, int]:
    """The shift at the sample's own resolution, looked for within two pixels of the one found at the lower."""
    band = _band_passed(sample, 1.0)
    other = _band_passed(np.flip(_resized(training, sample.shape), FLIP_AXES[match.flip]), 1.0)
    if band is None or other is None:
        return match.shift
    shifts = [(match.shift[0] + dy, match.shift[1] + dx) for dy in range(-2, 3) for dx in range(-2, 3)]
    inside = tuple(slice(abs(d) + 2, n - abs(d) - 2) for d, n in zip(match.shift, sample.shape, strict=True))
    scores = []
    for shift in shifts:
        part = other[tuple(slice(s.start - d, s.stop - d) for s, d in zip(inside, shift, strict=True))]
        scores.append(float(np.sum(band[inside] * part) / np.linalg.norm(part)))
    return shifts[int(np.argmax(scores))]


def _window_energy(images: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """(K, H, W) -> (K, S, S): sum of squares over what stays in the frame when the image is moved back by the shift."""
    _, H, W = images.shape
    sums = np.pad(np.square(images, dtype=np.float64).cumsum(1).cumsum(2), ((0, 0), (1, 0), (1, 0)))
    top, bottom = np.maximum(shifts, 0), H + np.minimum(shifts, 0)
    left, right = np.maximum(shifts, 0), W + np.minimum(shifts, 0)
    rows = sums[:, bottom] - sums[:, top]
    return rows[:, :, right] - rows[:, :, left]


# ----------------------------------------------------------------------------------------------- neighbours => p-values


def _fisher_z(similarity: np.ndarray | list[float] | float) -> np.ndarray:
    return np.arctanh(np.clip(similarity, -MAX_SIMILARITY, MAX_SIMILARITY))


def _nearness(distance: np.ndarray | float) -> np.ndarray:
    # minima of distances follow a Weibull distribution, so this follows a Gumbel
    return -np.log(np.maximum(distance, 1e-12))


def _calibrate(
    source: str, indices: list[int], figures: list[tuple[np.ndarray, np.ndarray]], alpha: float
) -> list[Calibration]:
    """Fit the distribution of each figure over independent images, leaving out those that cannot be independent.

    Args:
        source: see :class:`Calibration`.
        indices: of the images in the calibration set (n,).
        figures: per figure the scores (n,) and what they are on the scale of the fit (n,); NaN where undefined.
        alpha: probability that any independent image is left out.
    """
    defined = [np.isfinite(values) for _, values in figures]
    independent = np.ones(len(indices), bool)
    for (_, values), seen in zip(figures, defined, strict=True):
        if seen.sum() >= MIN_CALIBRATION:
            # this fit does not see how far out the upper tenth lies, so a few duplicates cannot hide themselves
            first = Calibration(source, tuple(values[seen]), *_fit_gumbel(values[seen], censored=int(seen.sum()) // 10))
            independent[seen] &= first.p_values(values[seen]) >= alpha / (len(figures) * len(indices))
    outliers = tuple(np.asarray(indices, dtype=int)[~independent].tolist())
    out = []
    for (scores, values), seen in zip(figures, defined, strict=True):
        used = independent & seen
        ordered = tuple(np.sort(scores[used]).tolist())
        if len(ordered) < MIN_CALIBRATION:
            out.append(Calibration("none", ordered))
        else:
            out.append(Calibration(source, ordered, *_fit_gumbel(values[used]), outliers=outliers))
    return out


def _fit_gumbel(values: np.ndarray, censored: int = 0) -> tuple[float, float]:
    """Maximum likelihood location and scale; of the ``censored`` largest values only the rank is used."""
    ordered = np.sort(values)
    seen = ordered[: len(ordered) - censored]
    spread = max(float(seen.std()), 1e-3)

    def loss(parameters: np.ndarray) -> float:
        location, scale = parameters[0], max(float(np.exp(parameters[1])), 1e-9)
        t = np.maximum((seen - location) / scale, -30.0)
        total = float(np.sum(t + np.exp(-t)) + len(seen) * np.log(scale))
        if censored:
            # logarithm of the upper tail, which far out is exp(-t)
            total -= censored * float(np.log(-np.expm1(-np.exp(-t[-1]))) if t[-1] < 30 else -t[-1])
        return total

    start = np.array([float(np.median(seen)), np.log(spread * np.sqrt(6) / np.pi)])
    fitted = optimize.minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-9})
    # equal scores have no scale; a spread of a thousandth is what rounding to 8 bits makes
    return float(fitted.x[0]), max(float(np.exp(fitted.x[1])), 1e-3)


def _match(
    i: int,
    hit: _Hit | None,
    index: _Index,
    calibrations: tuple[Calibration, Calibration],
    thresholds: tuple[float, float | None],
) -> Match:
    if hit is None:
        return Match(i, None, None)
    figures = (_fisher_z(hit.similarity), hit.excess)
    tails = [
        float(calibration.p_values(figure))
        for calibration, figure in zip(calibrations, figures, strict=True)
        if calibration.fitted and figure is not None
    ]
    by_excess = thresholds[1] is not None and hit.excess is not None and hit.excess >= thresholds[1]
    return Match(
        sample=i,
        training=hit.training,
        similarity=hit.similarity,
        excess=hit.excess,
        flip=hit.flip,
        shift=hit.shift,
        p_value=min(1.0, sum(calibration.fitted for calibration in calibrations) * min(tails)) if tails else None,
        flagged=hit.similarity >= thresholds[0] or by_excess,
        training_copies=index.copies[hit.training],
    )


# ------------------------------------------------------------------------------------------------------------- patients


def _patients(images: Any, given: Sequence[object] | None, name: str, count: int | None = None) -> list[str] | None:
    patients = given if given is not None else getattr(images, "patients", None)
    if patients is None:
        return None
    count = len(images) if count is None else count
    if len(patients) != count:
        raise UserError(f"{name}_patients must name one patient per image, got {len(patients)} for {count} images")
    return [str(patient) for patient in patients]  # 12 in one table and "12" in the other are one patient


def _note_unknown(patients: list[str] | None, others: list[str] | None, held_out: bool) -> list[str]:
    """What it means that the patients of the training or of the held-out images are unknown."""
    names = ["training"] if patients is None else []
    if held_out and others is None:
        names.append("held-out")
    if not names:
        return []
    return [
        f"The patients of the {' and '.join(names)} images are unknown: follow-ups of one patient then pass for "
        "independent images, which may raise the limit and hide copies. Name the patients where they can be known."
    ]


def _codes(patients: list[str] | None, count: int) -> np.ndarray:
    """A number per image, equal for images of one patient; all different when patients are unknown."""
    if patients is None:
        return np.arange(count)
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(patient, len(numbers)) for patient in patients])


def _one_per_patient(allowed: Iterable[int], patients: list[str] | None, limit: int, seed: int) -> list[int]:
    """At most ``limit`` of the allowed indices, no two of one patient: their neighbours are not independent."""
    order = np.random.default_rng(seed).permutation(np.fromiter(allowed, dtype=int)).tolist()
    if patients is not None:
        first: dict[str, int] = {}
        for i in order:
            first.setdefault(patients[i], i)
        order = list(first.values())
    return sorted(order[:limit])


# ------------------------------------------------------------------------------------------------------------- features


def _feature_array(name: str, value: Any) -> np.ndarray:
    array = np.asarray(getattr(value, "features", value), dtype=np.float64)
    if array.ndim != 2 or 0 in array.shape:
        raise UserError(f"features of {name} must be an array (N, D) with N and D at least 1, got shape {array.shape}")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array).all(1)).sum())
        raise UserError(f"features of {name} must be finite, got NaN or infinity in {bad} of {len(array)} rows")
    return array


def _features_of_sets(
    features: Sequence[Any],
    sets: tuple[Images, Images, Images | None],
    patients: list[str] | None,
    others: list[str] | None,
    alpha: float,
    max_calibration: int,
    seed: int,
) -> FeatureAudit:
    if len(features) not in (2, 3):
        raise UserError(f"features must be those of samples, training and held-out images, got {len(features)} arrays")
    given = (*features, None)[:3]
    for name, array, images in zip(("samples", "training", "held_out"), given, sets, strict=True):
        rows = None if array is None else len(getattr(array, "features", array))
        if array is not None and images is not None and rows != len(images):
            raise UserError(f"features of {name} must have a row per image, got {rows} for {len(images)} images")
    return audit_features(
        *given,
        training_patients=patients,
        held_out_patients=others,
        alpha=alpha,
        max_calibration=max_calibration,
        seed=seed,
    )


def _nearest(
    queries: np.ndarray,
    reference: np.ndarray,
    query_codes: np.ndarray | None = None,
    reference_codes: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Index and Euclidean distance of the nearest row with another code; distance infinite where there is none."""
    squares = np.einsum("ij,ij->i", reference, reference)
    indices, distances = np.empty(len(queries), dtype=int), np.empty(len(queries))
    count = min(4, len(reference))
    for start in range(0, len(queries), 256):
        part = queries[start : start + 256]
        squared = squares - 2 * part @ reference.T
        if query_codes is not None:
            squared[query_codes[start : start + 256, None] == reference_codes] = np.inf
        near = np.sort(np.argpartition(squared, count - 1, axis=1)[:, :count], axis=1)
        # |a|² - 2ab + |b|² loses half the digits of a small distance, and duplicates are what is looked for
        exact = np.linalg.norm(part[:, None] - reference[near], axis=2)
        exact[~np.isfinite(np.take_along_axis(squared, near, axis=1))] = np.inf
        best = exact.argmin(1)
        indices[start : start + 256] = np.take_along_axis(near, best[:, None], axis=1)[:, 0]
        distances[start : start + 256] = np.take_along_axis(exact, best[:, None], axis=1)[:, 0]
    return indices, distances


# -------------------------------------------------------------------------------------------------- pictures and output


def _aligned(training: np.ndarray, shape: tuple[int, ...], match: Match) -> np.ndarray:
    """The training image, flipped and shifted onto the sample; NaN where it has no pixels."""
    if training.shape[1:] != shape[1:]:
        training = np.stack([_resized(np.ascontiguousarray(channel), shape[1:]) for channel in training])
    if training.shape[0] != shape[0]:
        training = _luminance(training, "training", match.training)[None]
    flipped = np.flip(training, FLIP_AXES[match.flip])
    out = np.full(flipped.shape, np.nan, np.float32)
    to, source = _overlap(flipped.shape[1:], *match.shift)
    out[:, *to] = flipped[:, *source]
    return out


def _difference(sample: np.ndarray, aligned: np.ndarray) -> np.ndarray:
    if sample.shape[0] != aligned.shape[0]:
        sample = _luminance(sample, "samples", 0)[None]
    inside = np.isfinite(aligned)
    x, y = aligned[inside].astype(np.float64), sample[inside].astype(np.float64)
    variance = x.var()
    gain = float(np.mean((x - x.mean()) * (y - y.mean())) / variance) if variance > 0 else 0.0
    return np.abs(sample - (gain * (aligned - x.mean()) + y.mean()))


def _short_name(images: Images, role: str, index: int) -> str:
    """Name of an image's file, or its role and number; not wider than the picture below it."""
    files = getattr(images, "files", None)
    name = f"{role} {index}" if files is None else PurePath(files[index]).stem
    return name if len(name) <= CAPTION else f"{name[: CAPTION // 2]}…{name[-CAPTION // 2 + 1 :]}"


def _sample_caption(match: Match, name: str) -> str:
    # a fitted tail is not to be believed to the eightieth digit
    tail = "" if match.p_value is None else f", p {match.p_value:.1g}" if match.p_value > 1e-9 else ", p < 1e-9"
    flag = "FLAGGED" if match.flagged else "not flagged"
    return f"{name}\n{flag}\nsimilarity {match.similarity:.2f}{tail}"


def _training_caption(match: Match, name: str) -> str:
    moved = "" if match.flip == "none" else f"flip {match.flip}"
    if any(match.shift):
        moved += f"{', ' if moved else ''}shift ({match.shift[0]}, {match.shift[1]})"
    copies = f" ({match.training_copies} copies)" if match.training_copies > 1 else ""
    return f"{name}{copies}\n{moved or 'in place'}"


def _progress(items: Any, label: str, shown: bool) -> Any:
    if not shown:
        return items
    from tqdm import tqdm

    return tqdm(items, desc=label, leave=False, disable=None)  # None: where nobody looks


def _plain_calibration(calibration: Calibration) -> dict[str, Any]:
    return asdict(calibration) | {"n": calibration.n}


def _check_settings(max_shift: float, candidates: int, alpha: float, level: float, max_calibration: int) -> None:
    if not 0 <= max_shift <= 0.25:
        raise UserError(f"max_shift must be from 0 to 0.25 of the longer side, got {max_shift}; 0.0625 is usual")
    for name, count in (("candidates", candidates), ("max_calibration", max_calibration)):
        if count < 1:
            raise UserError(f"{name} must be at least 1, got {count}")
    for name, probability in (("alpha", alpha), ("level", level)):
        if not 0 < probability < 1:
            raise UserError(f"{name} must be between 0 and 1, got {probability}")
