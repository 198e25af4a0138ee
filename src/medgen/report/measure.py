"""Measures a set of generated images against real ones: everything that the report prints, as plain values."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from medgen import __version__
from medgen.data.image_set import ImageSet
from medgen.data.workers import default_workers
from medgen.errors import UserError
from medgen.metrics.feature_set import FeatureSet, extract_features
from medgen.metrics.frd import FRD_VERSIONS, feature_table, normalise_features
from medgen.metrics.frechet import FeatureMoments, frechet_distance, small_sample_note
from medgen.metrics.intervals import Baseline, Estimate, bootstrap_interval, prdc_intervals, real_baseline
from medgen.metrics.kernel import kernel_distance
from medgen.metrics.protocols import DEFAULT_PROTOCOLS, PROTOCOLS, get_protocol, parse_weights
from medgen.output import atomic_write_text, git_revision, prepare_output_dir

__all__ = ["Distance", "Measurements", "make_report", "measure"]

LIBRARIES = ("torch", "monai", "numpy", "scipy", "SimpleITK", "PyWavelets", "piq")
BASELINE_REPEATS = 10
FEWEST_FOR_HALVES = 4  # patients: each half needs two images
NEAREST_K = 5
MOST_FOR_NEIGHBOURS = 10_000  # images of a set that precision, recall and the kernel distance look at
TITLES = {
    "frd_v1": "FRD v1, log d² (frd-score 1.x)",
    "frd_v0": "FRD v0 (frd-score 0.x)",
    "radiomics": "FRD on all radiomics, log d²",
    "fid": "FID (Inception v3)",
    "fid_tf": "FID (Inception v3, TensorFlow's resizing)",
    "fsd": "FSD (SwAV ResNet-50)",
    "xrv": "Fréchet distance (XRV DenseNet-121)",
    "xrv_ldm_source": "generative_chestxray's FID",
}
# name in metrics.json, where it is not the protocol's
SHORT = {"frd_v1": "frd", "radiomics": "frd_full", "xrv": "fd_xrv", "xrv_ldm_source": "fd_xrv_ldm_source"}


@dataclass(frozen=True)
class Distance:
    """The distances of one protocol.

    Args:
        protocol: its name.
        title: for people.
        frechet: Fréchet distance, or for radiomics the FRD made of it.
        frechet_baseline: the same between random halves of the reference; None without its features.
        kernel: kernel distance; None without the features of both sets.
        kernel_baseline: the same between random halves of the reference.
        prdc: precision, recall, density, coverage; empty without the features of both sets.
        n_features: that entered the distances.
        invalid: why the protocol's figures mean nothing; empty if they do.
        differences: per-feature table, for radiomics.
        settings: everything that decided the features.
    """

    protocol: str
    title: str
    frechet: Estimate
    frechet_baseline: Baseline | None
    kernel: Estimate | None
    kernel_baseline: Baseline | None
    prdc: dict[str, Estimate]
    n_features: int
    invalid: str = ""
    differences: Sequence[Any] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Measurements:
    """What :func:`measure` found; ``None`` and empty stand for what was not asked for."""

    samples: ImageSet | None
    reference: ImageSet | None
    training: ImageSet | None
    distances: list[Distance]
    diversity: dict[str, Any]  # role -> medgen.metrics.diversity.PairwiseSimilarity
    paired: Any  # medgen.metrics.paired.PairedQuality
    memorisation: Any  # medgen.metrics.memorisation.MemorisationAudit
    notes: list[str]
    seed: int

    def figures(self) -> dict[str, float | int | str | None]:
        """The headline numbers under flat names, as they stand in ``metrics.json``."""
        flat: dict[str, float | int | str | None] = {}
        for distance in self.distances:
            name = SHORT.get(distance.protocol, distance.protocol.replace(":", "_").replace("/", "_"))
            flat |= _flat(name, distance.frechet)
            if distance.frechet_baseline:
                flat[f"{name}_baseline"] = distance.frechet_baseline.mean
            if distance.kernel:
                flat |= _flat(f"kid_{name}", distance.kernel)
            flat |= {f"{key}_{name}": estimate.value for key, estimate in distance.prdc.items()}
        for role, found in self.diversity.items():
            flat[f"ms_ssim_{role}"] = found.mean
        if self.paired is not None:
            flat |= {name: summary.mean for name, summary in self.paired.summary.items()}
        if self.memorisation is not None:
            flat["memorised_share"] = self.memorisation.share
            flat["memorised"] = len(self.memorisation.flagged)
        flat |= {f"n_{role}": len(images) for role, images in self.image_sets().items()}
        if self.distances:
            flat["n"] = self.distances[0].frechet.n_samples
        elif self.samples is not None:
            flat["n"] = len(self.samples)
        return {**{key: _finite(value) for key, value in flat.items()}, "seed": self.seed, "git": git_revision()}

    def lines(self) -> list[str]:
        """The headline numbers for a terminal: each with its interval, its baseline and n."""
        rows = [("", "value", "95% interval", "real against real", "n samples, reference")]
        for distance in self.distances:
            sizes = f"{distance.frechet.n_samples}, {distance.frechet.n_reference}"
            title = distance.title + (" (not valid)" if distance.invalid else "")
            rows.append((title, *_told(distance.frechet, distance.frechet_baseline), sizes))
            if distance.kernel is not None:
                sizes = f"{distance.kernel.n_samples}, {distance.kernel.n_reference}"
                rows.append(("  kernel distance", *_told(distance.kernel, distance.kernel_baseline), sizes))
            for name, estimate in distance.prdc.items():
                rows.append((f"  {name}", *_told(estimate, None), f"{estimate.n_samples}, {estimate.n_reference}"))
        for role, similarity in self.diversity.items():
            rows.append((f"MS-SSIM between {role}", *_told(similarity, None), f"{similarity.n_images} images"))
        if self.paired is not None:
            for name, summary in self.paired.summary.items():
                rows.append((f"paired {name}", *_told(summary, None), f"{summary.n} pairs"))
        if self.memorisation is not None:
            audit = self.memorisation
            share = Estimate(audit.share, audit.share_low, audit.share_high, audit.n_training, len(audit.matches))
            sizes = f"{len(audit.matches)}, training {audit.n_training}"
            rows.append(("share of copies", *_told(share, None), sizes))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

    def image_sets(self) -> dict[str, ImageSet]:
        """The sets that are images, by role."""
        named = {"samples": self.samples, "reference": self.reference, "training": self.training}
        return {role: images for role, images in named.items() if images is not None}


def _told(estimate: Any, baseline: Baseline | None) -> tuple[str, str, str]:
    value = getattr(estimate, "value", getattr(estimate, "mean", None))
    ends = [getattr(estimate, end, None) for end in ("low", "high")]
    known = all(end is not None and math.isfinite(end) for end in ends)
    return (
        "none" if value is None else f"{value:.4g}",
        "{:.4g} to {:.4g}".format(*ends) if known else "",
        f"{baseline.mean:.4g} ({baseline.low:.4g} to {baseline.high:.4g})" if baseline else "",
    )


def _flat(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _finite(value: Any) -> Any:
    # JSON knows neither infinity nor NaN
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------------------------------------------------------
# sources


def _open(source: str | os.PathLike, role: str, **options: Any) -> ImageSet | FeatureSet | FeatureMoments:
    """Images of a folder or datalist, or features that were saved."""
    path = Path(source)
    if path.suffix.lower() != ".npz":
        split = f" ({options['split']})" if options.get("split") else ""
        return ImageSet.from_source(path, name=f"{role} {path.name}{split}", **options)
    if not path.is_file():
        raise UserError(f"expected a feature file of the {role}, got {path}, which does not exist")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if "scatter.npy" in file.namelist():
                return FeatureMoments.load(path)
    return FeatureSet.load(path)


def _is_datalist(source: str | os.PathLike) -> bool:
    return Path(source).suffix.lower() == ".json" and Path(source).is_file()


def _has_split(source: str | os.PathLike, split: str) -> bool:
    content = json.loads(Path(source).read_text(encoding="utf-8"))
    return isinstance(content, dict) and bool(content.get(split))


def _parse_pairs(pairs: str | int) -> str | int:
    if pairs == "all":
        return pairs
    try:
        number = int(pairs)
    except ValueError:
        number = 0
    if number < 1:
        raise UserError(f"--pairs must be a whole number of at least 1, or all, got {pairs!r}")
    return number


# ---------------------------------------------------------------------------------------------------------------------
# the measurements


def measure(
    samples: str | os.PathLike,
    reference: str | os.PathLike,
    *,
    training: str | os.PathLike | None = None,
    protocols: Sequence[str] = DEFAULT_PROTOCOLS,
    weights: Sequence[str] = (),
    feature_size: int | None = None,
    feature_range: Sequence[float] | None = None,
    feature_channels: int | None = None,
    paired: bool = False,
    samples_split: str | None = None,
    split: str = "test",
    dataset_dir: str | os.PathLike | None = None,
    patient_pattern: str | None = None,
    image_size: int | None = None,
    mode: str | None = None,
    max_images: int | None = None,
    pairs: str | int = 2000,
    resamples: int | None = None,
    device: str = "cpu",
    batch_size: int = 32,
    num_workers: int | None = None,
    cache_dir: str | os.PathLike | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Measurements:
    """Distances, diversity, paired quality and the search for copies.

    Args:
        samples: generated images: folder, datalist or feature file.
        reference: real images, the same.
        training: images that the model was trained on; default: the training split of a reference that is a datalist.
        protocols: rows of :data:`medgen.metrics.protocols.PROTOCOLS`, or ``module:PATH``.
        weights: ``PROTOCOL=PATH`` each; with ``paired`` also ``lpips=PATH``, of torchvision's SqueezeNet.
        feature_size: of a ``module:PATH``; see :func:`medgen.metrics.get_protocol`.
        feature_range: likewise.
        feature_channels: likewise.
        paired: compare images of the same file name.
        samples_split: split of the samples' datalist; all by default.
        split: split of the reference's datalist; ``all`` for the whole.
        dataset_dir: base of the paths in the reference's and the training's datalists.
        patient_pattern: regular expression whose first group is the patient in a file's name, where the reference or
            the training images are a folder; see :meth:`medgen.data.ImageSet.from_source`.
        image_size: resize the shorter side to it and crop the centre.
        mode: ``L`` or ``RGB``.
        max_images: at most so many of each set, drawn at random.
        pairs: of images for MS-SSIM, or ``all``.
        resamples: of the bootstrap; by the width of the features by default.
        device: of networks.
        batch_size: of networks.
        num_workers: processes; one per core, at most 8, by default.
        cache_dir: of features.
        seed: of every draw.
        progress: say on standard error what is being done.

    Raises:
        UserError: what is wrong with the arguments or the images, before anything long is begun where it can be seen.
    """
    given_weights, pairs = parse_weights(weights, ["lpips"]), _parse_pairs(pairs)
    of_module = {
        "feature_size": feature_size,
        "feature_range": feature_range,
        "feature_channels": feature_channels,
    }
    rows = {name: get_protocol(name, **(of_module if name.startswith("module:") else {})) for name in protocols}
    if any(value is not None for value in of_module.values()) and not any(n.startswith("module:") for n in protocols):
        raise UserError("feature_size, feature_range and feature_channels belong to a --protocol module:PATH")
    if len(set(protocols)) != len(protocols):
        raise UserError(f"each --protocol once, got {', '.join(protocols)}")
    workers = default_workers() if num_workers is None else num_workers
    shared = {"image_size": image_size, "mode": mode, "max_images": max_images, "seed": seed}
    of_datalist = {"split": None if split == "all" else split, "dataset_dir": dataset_dir}
    of_folder = {"patient_pattern": patient_pattern}
    of_samples = {"split": samples_split} if _is_datalist(samples) else {}
    if samples_split and not of_samples:
        raise UserError(f"samples_split belongs to a datalist, but {samples} is none; leave it out")
    judged = _open(samples, "samples", **shared, **of_samples)
    real = _open(reference, "reference", **shared, **(of_datalist if _is_datalist(reference) else of_folder))
    if training is None and _is_datalist(reference) and split != "training" and _has_split(reference, "training"):
        training = reference
    trained = None
    if training is not None:
        of_training = {"split": "training", "dataset_dir": dataset_dir} if _is_datalist(training) else of_folder
        # all of them, whatever max_images says: a copy of an image that was left out would not be found
        trained = _open(training, "training", image_size=image_size, mode=mode, **of_training)
        if not isinstance(trained, ImageSet):
            raise UserError(
                f"training must be a folder or a datalist, as copies are searched for in images; got {training}"
            )

    say = _Say(progress)
    images = {"samples": judged, "reference": real, "training": trained}
    images = {role: found for role, found in images.items() if isinstance(found, ImageSet)}
    for role, found in images.items():
        say(f"reading {len(found)} images of the {role}")
        found.scan(workers, progress)
        found.check_same_shape()
    both = "samples" in images and "reference" in images
    if both:
        judged.check_comparable(real)
    if paired and not both:
        raise UserError("--paired compares images; give folders or datalists, not feature files")
    if trained is not None and "samples" in images:
        judged.check_comparable(trained)
    notes = _set_notes(images)

    feature_sets: dict[str, dict[str, Any]] = {}
    for name in _protocols_of(judged, real, protocols):
        feature_sets[name] = {}
        for role, found in (("samples", judged), ("reference", real)):
            if isinstance(found, ImageSet):
                say(f"{name} features of the {role}")
                found = extract_features(
                    found,
                    rows.get(name) or get_protocol(name),
                    role=role,
                    weights=given_weights.get(name),
                    device=device,
                    batch_size=batch_size,
                    num_workers=workers,
                    cache_dir=cache_dir,
                    progress=progress,
                )
                lost = len(found.rejected) - len(images[role].rejected)
                if lost:
                    notes.append(f"{lost} images of the {role} have no {name} features; rejected.csv says why.")
                    images[role].rejected.update(found.rejected)
            feature_sets[name][role] = found

    distances = []
    for name, found in feature_sets.items():
        say(f"{name} distances")
        distances.append(_distance(name, found["samples"], found["reference"], resamples, seed, notes))

    diversity = {}
    for role in ("samples", "reference"):
        if role in images:
            say(f"MS-SSIM between images of the {role}")
            diversity[role] = _diversity(images[role], role, pairs, seed, device, notes)
    diversity = {role: found for role, found in diversity.items() if found is not None}

    quality = _paired(real, judged, given_weights.get("lpips"), device, seed) if paired else None

    audit = None
    if trained is not None and "samples" in images:
        say("searching the training images for copies")
        audit = _audit(images, feature_sets, workers, cache_dir, seed, progress, notes)
    return Measurements(
        images.get("samples"), images.get("reference"), trained, distances, diversity, quality, audit, notes, seed
    )


class _Say:
    def __init__(self, aloud: bool) -> None:
        self.aloud = aloud

    def __call__(self, text: str) -> None:
        if self.aloud:
            print(f"{text} ...", file=sys.stderr, flush=True)


def _protocols_of(judged: Any, real: Any, asked: Sequence[str]) -> Sequence[str]:
    """The protocols asked for; that of a feature file where one is given."""
    saved = {found.protocol for found in (judged, real) if not isinstance(found, ImageSet)}
    if not saved:
        return asked
    if len(saved) > 1:
        raise UserError(f"the feature files are of two protocols, {' and '.join(sorted(saved))}; extract one again")
    (name,) = saved
    if name and tuple(asked) != tuple(DEFAULT_PROTOCOLS) and list(asked) != [name]:
        raise UserError(f"the feature file holds {name} features, but --protocol asks for {', '.join(asked)}")
    return [name]


def _set_notes(images: Mapping[str, ImageSet]) -> list[str]:
    notes = []
    for role, found in images.items():
        if found.summary.constant:
            notes.append(
                f"{len(found.summary.constant)} images of the {role} are constant (every pixel alike), such as "
                f"{found.summary.constant[0]}."
            )
        if found.summary.duplicates:
            notes.append(f"{found.summary.duplicates} files of the {role} are byte for byte another of them.")
        if found.rejected:
            notes.append(f"{len(found.rejected)} files of the {role} could not be read; they are listed below.")
    hashes = {role: set(found.summary.hashes) for role, found in images.items()}
    for one, other in (("samples", "reference"), ("samples", "training"), ("reference", "training")):
        if one in hashes and other in hashes and (same := len(hashes[one] & hashes[other])):
            notes.append(f"{same} files of the {one} are byte for byte files of the {other}.")
    real, trained = images.get("reference"), images.get("training")
    if real is not None and trained is not None and real.patients and trained.patients:
        both = set(real.patients) & set(trained.patients)
        if both:
            notes.append(f"{len(both)} patients stand in the reference and in the training images: not independent.")
    unknown = [role for role in ("reference",) if role in images and images[role].patients is None]
    if unknown:
        notes.append(
            "The reference's patients are unknown: intervals and baselines take every image for a patient of its own, "
            "which makes them too narrow where patients have several. A datalist names them."
        )
    return notes


# ---------------------------------------------------------------------------------------------------------------------


def _distance(name: str, judged: Any, real: Any, resamples: int | None, seed: int, notes: list[str]) -> Distance:
    known = name in PROTOCOLS or name.startswith("module:")
    protocol = get_protocol(name) if known else None
    title = TITLES.get(name, f"Fréchet distance ({name or 'features'})")
    invalid = protocol.invalid if protocol else ""
    if isinstance(judged, FeatureMoments) or isinstance(real, FeatureMoments):
        return _distance_of_moments(name, title, judged, real, resamples, seed, notes)
    real.check_comparable(judged)
    radiomic = protocol is not None and protocol.extractor == "radiomics"
    x, y = np.asarray(real.features, dtype=np.float64), np.asarray(judged.features, dtype=np.float64)
    options: dict[str, Any] = {"reference_patients": real.patients, "sample_patients": judged.patients}
    differences: Sequence[Any] = ()
    if radiomic:
        frd = FRD_VERSIONS[name]
        differences = feature_table(x, y, real.names)
        normal = normalise_features(x, y, real.names, frd)
        x, y = normal.reference, normal.samples
        if normal.dropped:
            notes.append(
                f"{title}: {len(normal.dropped)} features that are constant or undefined in a set are left out."
            )
    log = radiomic and frd.log
    frechet = bootstrap_interval(x, y, resamples=resamples, seed=seed, log=log, **options)
    baseline = _baseline(x, real.patients, frechet_distance, seed)
    if log and baseline is not None:
        baseline = _log_baseline(baseline)
    if baseline is None:
        notes.append(f"{title}: no real-against-real baseline, as the reference is too small to be halved.")
    if note := small_sample_note(min(len(x), len(y)), x.shape[1]):
        notes.append(f"{title}: {note}.")
    few_x, few_y = _thinned(x, real.patients, seed), _thinned(y, judged.patients, seed)
    kernel = bootstrap_interval(
        few_x[0], few_y[0], kernel_distance, reference_patients=few_x[1], sample_patients=few_y[1], seed=seed
    )
    kernel_base = _baseline(few_x[0], few_x[1], kernel_distance, seed)
    prdc = {}
    if min(len(x), len(y)) > NEAREST_K:
        prdc = prdc_intervals(few_x[0], few_y[0], NEAREST_K, real_patients=few_x[1], fake_patients=few_y[1], seed=seed)
    else:
        notes.append(f"{title}: no precision and recall, as each image needs {NEAREST_K} neighbours of its own set.")
    settings = {key: value for key, value in real.settings.items() if key not in ("role", "range")}
    return Distance(
        name, title, frechet, baseline, kernel, kernel_base, prdc, x.shape[1], invalid, differences, settings
    )


def _distance_of_moments(
    name: str, title: str, judged: Any, real: Any, resamples: int | None, seed: int, notes: list[str]
) -> Distance:
    """Moments carry no single images: there is nothing to resample, and no neighbours."""
    if name in PROTOCOLS and PROTOCOLS[name].extractor == "radiomics":
        raise UserError(
            f"{name} normalises every feature by the reference's images, which moments do not hold; save the features "
            "themselves (medgen features without --moments)"
        )
    moments = [found if isinstance(found, FeatureMoments) else found.moments() for found in (real, judged)]
    if isinstance(judged, FeatureMoments):
        value = frechet_distance(*moments)
        frechet = Estimate(value, math.nan, math.nan, moments[0].n, moments[1].n, note="no interval: moments only")
        notes.append(f"{title}: no interval, as the samples are given by their moments alone.")
    else:
        frechet = bootstrap_interval(
            moments[0], judged.features, sample_patients=judged.patients, resamples=resamples, seed=seed
        )
        notes.append(f"{title}: the interval holds the reference fixed, which is given by its moments alone.")
    return Distance(name, title, frechet, None, None, None, {}, moments[0].dim)


def _baseline(features: np.ndarray, patients: Sequence[str] | None, statistic: Any, seed: int) -> Baseline | None:
    if len(set(patients or range(len(features)))) < FEWEST_FOR_HALVES:
        return None
    return real_baseline(features, patients, statistic, repeats=BASELINE_REPEATS, seed=seed)


def _thinned(
    features: np.ndarray, patients: Sequence[str] | None, seed: int
) -> tuple[np.ndarray, Sequence[str] | None]:
    """At most as many images as distances between all pairs are affordable for."""
    if len(features) <= MOST_FOR_NEIGHBOURS:
        return features, patients
    chosen = np.sort(np.random.default_rng(seed).choice(len(features), MOST_FOR_NEIGHBOURS, replace=False))
    return features[chosen], None if patients is None else [patients[i] for i in chosen]


def _log_baseline(baseline: Baseline) -> Baseline:
    values = tuple(math.log(value) if value > 0 else -math.inf for value in baseline.values)
    return Baseline(float(np.mean(values)), min(values), max(values), values, baseline.halves, baseline.n_patients)


def _diversity(images: ImageSet, role: str, pairs: str | int, seed: int, device: str, notes: list[str]) -> Any:
    from medgen.metrics.diversity import pairwise_ms_ssim

    if len(images) < 2:
        notes.append(f"No MS-SSIM of the {role}: one image makes no pair.")
        return None
    if min(images.summary.shapes[0][1:]) < 48:
        notes.append(f"No MS-SSIM of the {role}: its five scales take images of at least 48 pixels.")
        return None
    return pairwise_ms_ssim(images, pairs, seed=seed, patients=images.patients, device=device)


def _paired(real: ImageSet, judged: ImageSet, lpips_weights: str | None, device: str, seed: int) -> Any:
    from medgen.metrics.paired import PAIRED_METRICS, paired_quality

    network = None
    if lpips_weights is not None:
        from medgen.losses import LocalLPIPS

        network = LocalLPIPS("squeeze", weights=lpips_weights, rescale=True)
    side = min(real.summary.shapes[0][1:])
    names = [name for name, row in PAIRED_METRICS.items() if side >= row.min_side]
    if network is None:
        names.remove("lpips") if "lpips" in names else None
    return paired_quality(
        real, judged, names, pair_by="name", patients=real.patients, lpips=network, device=device, seed=seed
    )


def _audit(
    images: Mapping[str, ImageSet],
    feature_sets: Mapping[str, Mapping[str, Any]],
    workers: int,
    cache_dir: str | os.PathLike | None,
    seed: int,
    progress: bool,
    notes: list[str],
) -> Any:
    from medgen.metrics.memorisation import audit_memorisation

    trained, held_out = images["training"], images.get("reference")
    name = next((n for n in feature_sets if n in PROTOCOLS and not PROTOCOLS[n].ranges), None)
    features = None
    if name is not None and held_out is not None:
        of_training = extract_features(trained, name, num_workers=workers, cache_dir=cache_dir, progress=progress)
        sets = (feature_sets[name]["samples"], of_training, feature_sets[name]["reference"])
        whole = (images["samples"], trained, held_out)
        # images without features would shift the rows against the images
        if all(len(found) == len(of) for found, of in zip(sets, whole, strict=True)):
            features = [np.asarray(found.features) for found in sets]
        else:
            notes.append(f"Copies were searched for in pixels only: some images have no {name} features.")
    return audit_memorisation(images["samples"], trained, held_out, features=features, seed=seed, progress=progress)


# ---------------------------------------------------------------------------------------------------------------------
# files


def make_report(
    samples: str | os.PathLike,
    reference: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    title: str | None = None,
    command: str = "",
    **options: Any,
) -> tuple[Path, Measurements]:
    """Measure, and write ``report.html``, ``report.json``, ``metrics.json``, ``rejected.csv`` and the tables.

    Args:
        samples: as in :func:`measure`.
        reference: as in :func:`measure`.
        output_dir: folder for the files.
        title: heading of the page.
        command: the command line that asked for it, printed on the page.
        **options: of :func:`measure`.

    Returns:
        The page, and what was measured.

    Raises:
        UserError: as :func:`measure`; or the folder cannot be written to.
    """
    from medgen.report.page import render

    folder = prepare_output_dir(output_dir)
    found = measure(samples, reference, **options)
    figures = found.figures()
    heading = title or f"{Path(samples).name} against {Path(reference).name}"
    versions = {"medgen": __version__, **{name: version(name) for name in LIBRARIES}}
    created = datetime.now().astimezone().isoformat(timespec="minutes")
    atomic_write_text(folder / "metrics.json", json.dumps(figures, indent=4, allow_nan=False) + "\n")
    details = {"title": heading, "created": created, "versions": versions, "command": command, **_details(found)}
    atomic_write_text(folder / "report.json", json.dumps(_plain(details), indent=2, allow_nan=False) + "\n")
    _write_tables(found, folder)
    page = folder / "report.html"
    atomic_write_text(page, render(found, heading, created, versions, command))
    return page, found


def _details(found: Measurements) -> dict[str, Any]:
    sets = {
        role: {
            "name": images.name,
            "n": len(images),
            "patients": None if images.patients is None else len(set(images.patients)),
            "shape": images.summary.shapes[0],
            "mean": images.summary.mean,
            "constant": images.summary.constant,
            "rejected": images.rejected,
        }
        for role, images in found.image_sets().items()
    }
    distances = [{**asdict(distance), "differences": len(distance.differences)} for distance in found.distances]
    return {
        "seed": found.seed,
        "git": git_revision(),
        "sets": sets,
        "notes": found.notes,
        "distances": distances,
        "diversity": {role: asdict(similarity) for role, similarity in found.diversity.items()},
        "paired": None if found.paired is None else {k: asdict(v) for k, v in found.paired.summary.items()},
        "memorisation": None if found.memorisation is None else found.memorisation.to_dict(),
    }


def _plain(value: Any) -> Any:
    """What JSON can hold: NumPy's numbers as Python's, infinity and NaN as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | np.ndarray):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return _finite(value)


def _write_tables(found: Measurements, folder: Path) -> None:
    rejected = [
        (role, file, reason) for role, images in found.image_sets().items() for file, reason in images.rejected.items()
    ]
    _write_csv(folder / "rejected.csv", ("set", "file", "reason"), rejected)
    for distance in found.distances:
        if distance.differences:
            rows = [asdict(row) for row in distance.differences]
            _write_csv(folder / features_file(distance.protocol), tuple(rows[0]), [tuple(row.values()) for row in rows])
    if found.paired is not None:
        names = tuple(found.paired.values)
        rows = zip(found.paired.references, found.paired.files, *found.paired.values.values(), strict=True)
        _write_csv(folder / "paired.csv", ("reference", "sample", *names), list(rows))
    if found.memorisation is not None:
        rows = []
        for match in found.memorisation.matches:
            row = asdict(match)
            row["sample"] = found.samples.files[match.sample]
            row["training"] = "" if match.training is None else found.training.files[match.training]
            row["shift"] = "{} {}".format(*match.shift)
            rows.append(row)
        _write_csv(folder / "copies.csv", tuple(rows[0]), [tuple(row.values()) for row in rows])


def features_file(protocol: str) -> str:
    """Name of the per-feature table of a protocol."""
    return f"features_{protocol}.csv"


def _write_csv(path: Path, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    atomic_write_text(path, table.getvalue())
