"""Measures a set of generated images against real ones: everything that the report prints."""

from __future__ import annotations

import json
import math
import os
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medgen.data.image_set import ImageSet
from medgen.data.workers import default_workers
from medgen.errors import UserError
from medgen.metrics.feature_set import FeatureSet, extract_features
from medgen.metrics.frd import FRD_VERSIONS, feature_table, normalise_features
from medgen.metrics.frechet import FeatureMoments, frechet_distance, small_sample_note
from medgen.metrics.intervals import (
    Baseline,
    Estimate,
    bootstrap_interval,
    draw_counts,
    matched_distance,
    patient_codes,
    prdc_intervals,
    real_baseline,
    recentred_interval,
    with_few_patients,
)
from medgen.metrics.kernel import kernel_distance
from medgen.metrics.protocols import (
    DEFAULT_PROTOCOLS,
    PROTOCOLS,
    Protocol,
    get_protocol,
    make_extractor,
    parse_weights,
)
from medgen.metrics.sliced_wasserstein import REAL, SAMPLES, laplacian_pyramid, set_descriptors, sliced_wasserstein
from medgen.report.measurements import Distance, Measurements, PatchDistance

__all__ = ["measure"]

REPEATS = 10  # random halves of the reference
FEWEST_FOR_HALVES = 4  # patients: each half needs two images
NEAREST_K = 5
MOST_FOR_NEIGHBOURS = 10_000  # images of a set that precision, recall and the kernel distance look at
SMALLEST_FOR_MS_SSIM = 48  # pixels
MOST_FOR_PATCHES = 4096  # images of a set: 2.5 GB of patches for grey images of 512 pixels
PATCH_RESAMPLES = (
    50  # at most, as each sorts all patches; suffice for a standard error (Efron and Tibshirani 1993, section 6.4)
)
PATCH_DIRECTIONS = 128  # in the resamples and halves: one of the paper's four repeats
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

Source = ImageSet | FeatureSet | FeatureMoments


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
        max_images: at most so many of each set, drawn at random; not of the training images, where a copy of one that
            was left out would not be found.
        pairs: of images for MS-SSIM, or ``all``.
        resamples: of the bootstrap; by the width of the features by default. The sliced Wasserstein distance, each of
            whose resamples sorts all patches, takes at most 50.
        device: of networks.
        batch_size: of networks.
        num_workers: processes; one per core, at most 8, by default.
        cache_dir: of features.
        seed: of every draw.
        progress: say on standard error what is being done.

    Raises:
        UserError: what is wrong with the arguments, before any image is read; or with the images.
    """
    workers = default_workers() if num_workers is None else num_workers
    _check_numbers(seed, resamples, batch_size, workers, device)
    given_weights, pairs = parse_weights(weights, ["lpips"]), _parse_pairs(pairs)
    of_module = {
        "feature_size": feature_size,
        "feature_range": feature_range,
        "feature_channels": feature_channels,
    }
    if any(value is not None for value in of_module.values()) and not any(n.startswith("module:") for n in protocols):
        raise UserError("feature_size, feature_range and feature_channels belong to a --protocol module:PATH")
    if len(set(protocols)) != len(protocols):
        raise UserError(f"each --protocol once, got {', '.join(protocols)}")
    rows = {name: get_protocol(name, **(of_module if name.startswith("module:") else {})) for name in protocols}
    if unused := set(given_weights) - set(protocols) - ({"lpips"} if paired else set()):
        raise UserError(
            f"--weights names {', '.join(sorted(unused))}, which nothing here uses; leave it out, or add "
            f"{'--paired' if unused == {'lpips'} else '--protocol'}"
        )

    shared = {"image_size": image_size, "mode": mode, "max_images": max_images, "seed": seed}
    of_datalist = {"split": None if split == "all" else split, "dataset_dir": dataset_dir}
    of_folder = {"patient_pattern": patient_pattern}
    of_samples = {"split": samples_split} if _is_datalist(samples) else {}
    if samples_split and not of_samples:
        raise UserError(f"samples_split belongs to a datalist, but {samples} is none; leave it out")
    judged = _open(samples, "samples", **shared, **of_samples)
    real = _open(reference, "reference", **shared, **(of_datalist if _is_datalist(reference) else of_folder))
    if training is not None and not isinstance(judged, ImageSet):
        raise UserError(
            f"copies are searched for in images, but the samples are features; leave --training out or give "
            f"the images instead of {samples}"
        )
    without_search = ""
    if not isinstance(judged, ImageSet):
        without_search = "No search for copies of training images: the samples are given as features."
    elif training is None and _is_datalist(reference) and split != "training" and _has_split(reference, "training"):
        training = reference
    trained = None
    if training is not None:
        of_training = {"split": "training", "dataset_dir": dataset_dir} if _is_datalist(training) else of_folder
        trained = _open(training, "training", image_size=image_size, mode=mode, **of_training)
        if not isinstance(trained, ImageSet):
            raise UserError(
                f"training must be a folder or a datalist, as copies are searched for in images; got {training}"
            )
    if patient_pattern is not None and not any(
        isinstance(of, ImageSet) and not _is_datalist(source) for of, source in ((real, reference), (trained, training))
    ):
        raise UserError("patient_pattern is for folders of images: datalists and feature files name their patients")
    images = {"samples": judged, "reference": real, "training": trained}
    images = {role: found for role, found in images.items() if isinstance(found, ImageSet)}
    rows = {name: rows.get(name) or get_protocol(name) for name in _protocols_of(judged, real, protocols)}
    extract = _Extraction(rows, images, given_weights, device, batch_size, workers, cache_dir, progress)
    lpips = None
    if paired:
        _check_pairing(judged, real)
        lpips = _lpips(given_weights["lpips"]) if "lpips" in given_weights else None

    say = _Say(progress)
    for role, found in images.items():
        say(f"reading {len(found)} images of the {role}")
        found.scan(workers, progress)
        found.check_same_shape()
    if "samples" in images:
        for other in images.values():
            judged.check_comparable(other)
    notes = _set_notes(images) + ([without_search] if without_search else [])

    features: dict[str, dict[str, Any]] = {}
    for name in rows:
        features[name] = {}
        for role, source in (("samples", judged), ("reference", real)):
            if isinstance(source, ImageSet):
                say(f"{name} features of the {role}")
                source = extract(name, role)
            features[name][role] = source
    distances = []
    for name, found in features.items():
        say(f"{name} distances")
        distances.append(_distance(rows[name], found["samples"], found["reference"], resamples, seed, notes))

    patches = []
    if {"samples", "reference"} <= set(images):
        say("sliced Wasserstein distance")
        patches = _patch_distances(real, judged, resamples, seed, notes)

    diversity = {}
    for role in ("samples", "reference"):
        if role in images:
            say(f"MS-SSIM between images of the {role}")
            diversity[role] = _diversity(images[role], role, pairs, seed, device, notes)
    diversity = {role: found for role, found in diversity.items() if found is not None}

    quality = _paired(real, judged, lpips, device, seed, notes) if paired else None
    audit = None
    if trained is not None and "samples" in images:
        audit = _audit(images, features, extract, say, seed, progress, notes)
    notes += [f"{count} images of the {role} have no {name} features." for (name, role), count in extract.lost.items()]
    named = (images.get(role) for role in ("samples", "reference", "training"))
    files = {
        role: (Path(source).name, of.n if isinstance(of, FeatureMoments) else len(of), _patients(of))
        for role, source, of in (("samples", samples, judged), ("reference", reference, real))
        if not isinstance(of, ImageSet)
    }
    return Measurements(*named, files, distances, patches, diversity, quality, audit, extract.unmeasured, notes, seed)


def _patients(found: Source) -> int | None:
    known = getattr(found, "patients", None)
    return None if known is None else len(set(known))


class _Say:
    def __init__(self, aloud: bool) -> None:
        self.aloud = aloud

    def __call__(self, text: str) -> None:
        if self.aloud:
            print(f"{text} ...", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# what is asked for, and from where


def _check_numbers(seed: int, resamples: int | None, batch_size: int, num_workers: int, device: str) -> None:
    from medgen.settings import check_device, check_whole

    check_whole(0, seed=seed, num_workers=num_workers)
    check_whole(1, batch_size=batch_size)
    if resamples is not None:
        check_whole(2, resamples=resamples)
    check_device(device)


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


def _open(source: str | os.PathLike, role: str, **options: Any) -> Source:
    """Images of a folder or datalist, or features that were saved."""
    path = Path(source)
    if path.suffix.lower() != ".npz":
        split = f" ({options['split']})" if options.get("split") else ""
        return ImageSet.from_source(path, name=f"{role} {path.name}{split}", **options)
    if not path.is_file():
        raise UserError(f"expected a feature file of the {role}, got {path}, which does not exist")
    try:
        with zipfile.ZipFile(path) as file:
            is_moments = "scatter.npy" in file.namelist()
    except (zipfile.BadZipFile, OSError):
        is_moments = False  # a message for people is the loader's
    return FeatureMoments.load(path) if is_moments else FeatureSet.load(path)


def _is_datalist(source: str | os.PathLike) -> bool:
    return Path(source).suffix.lower() == ".json" and Path(source).is_file()


def _has_split(source: str | os.PathLike, split: str) -> bool:
    content = json.loads(Path(source).read_text(encoding="utf-8"))
    return isinstance(content, dict) and bool(content.get(split))


def _protocols_of(judged: Source, real: Source, asked: Sequence[str]) -> Sequence[str]:
    """The protocols asked for; that of a feature file where one is given."""
    saved = {found.protocol for found in (judged, real) if not isinstance(found, ImageSet)}
    if not saved:
        return asked
    if len(saved) > 1:
        raise UserError(f"the feature files are of two protocols, {' and '.join(sorted(saved))}; extract one again")
    (name,) = saved
    if list(asked) == [name]:
        return [name]
    if tuple(asked) != tuple(DEFAULT_PROTOCOLS):
        raise UserError(f"the feature file holds {name} features, but --protocol asks for {', '.join(asked)}")
    if name in PROTOCOLS:
        return [name]
    if name.startswith("module:"):
        # running code because a data file names it would be for its author to decide, not for its reader
        raise UserError(f"the feature file holds {name} features; give --protocol {name} if you trust that network")
    raise UserError(f"the feature file names no known protocol, got {name!r}; write it again with medgen features")


class _Extraction:
    """Features of the image sets by each protocol; networks are built once, before any image is read."""

    def __init__(
        self,
        rows: Mapping[str, Protocol],
        images: Mapping[str, ImageSet],
        weights: Mapping[str, str],
        device: str,
        batch_size: int,
        num_workers: int,
        cache_dir: str | os.PathLike | None,
        progress: bool,
    ) -> None:
        self.images = images
        self.options = {
            "batch_size": batch_size,
            "num_workers": num_workers,
            "cache_dir": cache_dir,
            "progress": progress,
        }
        self.unmeasured: list[tuple[str, str, str]] = []
        self.lost: dict[tuple[str, str], int] = {}  # (protocol, role) -> images that could be read but have no features
        self.rows: dict[tuple[str, str], Protocol] = {}
        self.extractors: dict[tuple[str, str], Any] = {}
        for name, row in rows.items():
            for role in ("samples", "reference"):
                if role in images:
                    self.rows[name, role] = row.with_role(role)
        for key, row in self.rows.items():
            earlier = next((other for other, known in self.rows.items() if known == row), key)
            if earlier in self.extractors:
                self.extractors[key] = self.extractors[earlier]
            else:
                self.extractors[key] = make_extractor(row, weights=weights.get(row.name), device=device)

    def __call__(self, name: str, role: str, like: str | None = None) -> FeatureSet:
        """Features of one set; ``like`` names another role whose protocol it takes."""
        key = (name, like or role)
        source = self.images[role]
        found = extract_features(source, self.rows[key], extractor=self.extractors[key], **self.options)
        lacking = {file: reason for file, reason in found.rejected.items() if file not in source.rejected}
        if lacking:
            self.lost[name, role] = len(source) - len(found)
            self.unmeasured += [(role, file, f"no {name} features: {reason}") for file, reason in lacking.items()]
        return found


def _check_pairing(judged: Source, real: Source) -> None:
    if not (isinstance(judged, ImageSet) and isinstance(real, ImageSet)):
        raise UserError("--paired compares images; give folders or datalists, not feature files")
    if not set(_by_stem(judged)) & set(_by_stem(real)):
        raise UserError(
            f"--paired compares images of one file name (without folder and suffix), but none of {judged.name} "
            f"({judged.files[0]}, ...) stands in {real.name} ({real.files[0]}, ...)"
        )


def _by_stem(images: ImageSet) -> dict[str, int]:
    found: dict[str, int] = {}
    for i, file in enumerate(images.files):
        stem = Path(file).stem
        if stem in found:
            raise UserError(
                f"--paired needs names that differ, got {images.files[found[stem]]} and {file} in {images.name}"
            )
        found[stem] = i
    return found


def _lpips(path: str) -> Any:
    from medgen.losses import LocalLPIPS

    wanted = "torchvision's squeezenet1_1-b8a52dc0.pth (https://download.pytorch.org/models)"
    if not Path(path).is_file():
        raise UserError(f"--weights lpips must name {wanted}, got {path}, which is no file")
    try:
        return LocalLPIPS("squeeze", weights=path, rescale=True)
    except UserError as error:
        raise UserError(f"--weights lpips must name {wanted}, got another file, {path}") from error


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
            notes.append(f"{len(found.rejected)} files of the {role} could not be read; rejected.csv names them.")
    hashes = {role: set(found.summary.hashes) for role, found in images.items()}
    for one, other in (("samples", "reference"), ("samples", "training"), ("reference", "training")):
        if one in hashes and other in hashes and (same := len(hashes[one] & hashes[other])):
            notes.append(f"{same} files of the {one} are byte for byte files of the {other}.")
    real, trained = images.get("reference"), images.get("training")
    if real is not None and trained is not None and real.patients and trained.patients:
        both = set(real.patients) & set(trained.patients)
        if both:
            notes.append(f"{len(both)} patients stand in the reference and in the training images: not independent.")
    if real is not None and real.patients is None:
        notes.append(
            "The reference's patients are unknown: intervals and baselines take every image for a patient of its own, "
            "which makes them too narrow where patients have several. A datalist or --patient_pattern names them."
        )
    return notes


# ---------------------------------------------------------------------------------------------------------------------
# the measurements


def _distance(row: Protocol, judged: Any, real: Any, resamples: int | None, seed: int, notes: list[str]) -> Distance:
    title = TITLES.get(row.name, f"Fréchet distance ({row.name})")
    if isinstance(judged, FeatureMoments) or isinstance(real, FeatureMoments):
        return _distance_of_moments(row, title, judged, real, resamples, seed, notes)
    real.check_comparable(judged)
    # the samples' and the reference's range may differ by design; each stands in the features already
    settings = {key: value for key, value in real.settings.items() if key not in ("role", "range")}
    x, y = np.asarray(real.features, dtype=np.float64), np.asarray(judged.features, dtype=np.float64)
    patients = {"reference_patients": real.patients, "sample_patients": judged.patients}
    differences: Sequence[Any] = ()
    normalised, log, as_compared, as_neighbours = (x, y), False, _as_they_are, _as_they_are
    if row.extractor == "radiomics":
        frd = FRD_VERSIONS[row.name]
        log, as_compared = frd.log, _normalised(real.names, frd)
        as_neighbours = _normalised(real.names, frd, tails=frd.normalisation != "z-score")
        differences = feature_table(x, y, real.names)
        normal = normalise_features(x, y, real.names, frd)
        normalised = (normal.reference, normal.samples)
        if normal.dropped:
            notes.append(f"{title}: {len(normal.dropped)} features without spread in the reference are left out.")

    # The normalisation is held fixed in the resamples. Halves have one of their own: each is a comparison like the
    # whole one, of fewer images.
    frechet = bootstrap_interval(*normalised, resamples=resamples, seed=seed, log=log, **patients)
    equal, baseline, why_not = _halves(x, y, as_compared(frechet_distance), patients, seed, log=log)
    if baseline is None:
        notes.append(f"{title}: no real-against-real baseline: {why_not}.")
    if note := small_sample_note(min(len(x), len(y)), normalised[0].shape[1]):
        notes.append(f"{title}: {note}.")
    if not math.isfinite(frechet.value):
        notes.append(f"{title}: the two sets have the same features, so the logarithm of their distance is infinite.")
    if "rough" in frechet.note:
        notes.append(f"{title}: rough intervals, as fewer than 20 patients were drawn from.")

    few_x, few_y = _thinned(x, real.patients, seed), _thinned(y, judged.patients, seed)
    if len(few_x[0]) < len(x) or len(few_y[0]) < len(y):
        notes.append(
            f"{title}: kernel distance, precision, recall, density and coverage of {len(few_y[0])} samples and "
            f"{len(few_x[0])} reference images, drawn at random, as they compare all with all."
        )
    patients = {"reference_patients": few_x[1], "sample_patients": few_y[1]}
    thin = as_neighbours(_both)(few_x[0], few_y[0])
    kernel = bootstrap_interval(*thin, kernel_distance, seed=seed, **patients)
    *kernel_halves, why_not = _halves(
        few_x[0], few_y[0], as_neighbours(kernel_distance), patients, seed, by_patient=True
    )
    if kernel_halves[0] is None:
        notes.append(f"{title}: no baseline of the kernel distance: {why_not}.")
    prdc = {}
    try:
        prdc = prdc_intervals(*thin, NEAREST_K, real_patients=few_x[1], fake_patients=few_y[1], seed=seed)
    except UserError as error:
        notes.append(f"{title}: no precision and recall: {error}.")
    return Distance(
        row.name,
        title,
        frechet,
        equal,
        baseline,
        kernel,
        *kernel_halves,
        prdc,
        normalised[0].shape[1],
        (real.patients is not None, judged.patients is not None),
        row.invalid,
        differences,
        settings,
    )


def _as_they_are(statistic: Callable[..., Any]) -> Callable[..., Any]:
    return statistic


def _both(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x, y


def _normalised(
    names: Sequence[str], frd: Any, tails: bool = True
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A statistic of features as one of their normalised values.

    Without ``tails`` it is one of their inverse hyperbolic sines. A radiomic feature of slightly blurred images lies
    hundreds of standard deviations from the reference: a cubic kernel, and neighbourhoods, would see nothing else.
    """

    def wrap(statistic: Callable[..., Any]) -> Callable[..., Any]:
        def of(x: np.ndarray, y: np.ndarray, **options: Any) -> Any:
            normal = normalise_features(x, y, names, frd)
            values = (normal.reference, normal.samples)
            return statistic(*(values if tails else map(np.arcsinh, values)), **options)

        return of

    return wrap


def _halves(
    x: np.ndarray,
    y: np.ndarray,
    statistic: Callable[..., float],
    patients: Mapping[str, Sequence[str] | None],
    seed: int,
    by_patient: bool = False,
    log: bool = False,
) -> tuple[Baseline | None, Baseline | None, str]:
    """A statistic between halves of the reference and as many samples, and between halves of the reference.

    Each repeat takes of a reference with known patients one image a patient where the samples' are not known (images
    of one patient resemble each other, so that halves of them would be worse than as many independent samples), and of
    one more than twice as large as the samples a random part: else the two figures would not be comparable.

    Returns:
        Both, and why not, where they are None.
    """
    known, of_samples = patients["reference_patients"], patients["sample_patients"]
    equal: list[Baseline] = []
    real: list[Baseline] = []
    reason = ""
    for repeat in range(REPEATS):
        rng = np.random.default_rng([seed, repeat])
        chosen, of_reference = np.arange(len(x)), known
        if known is not None and of_samples is None:
            shuffled = rng.permutation(len(x))
            chosen = shuffled[np.unique(np.asarray(known, dtype=str)[shuffled], return_index=True)[1]]
            of_reference = None
        if len(chosen) > 2 * len(y):
            part = _some_patients(of_reference, len(chosen), 2 * len(y), rng)
            chosen = chosen[part]
            of_reference = None if of_reference is None else [of_reference[i] for i in part]
        if len(set(of_reference or range(len(chosen)))) < FEWEST_FOR_HALVES:
            return None, None, f"the reference needs at least {FEWEST_FOR_HALVES} patients to be halved"
        options = {"repeats": 1, "seed": seed + repeat, "by_patient": by_patient}
        both = {"reference_patients": of_reference, "sample_patients": of_samples}
        try:
            pair = (
                matched_distance(x[chosen], y, statistic, **both, **options),
                real_baseline(x[chosen], of_reference, statistic, **options),
            )
        except UserError as error:
            reason = str(error)
            continue
        equal.append(pair[0])
        real.append(pair[1])
    if not equal:
        return None, None, reason
    return _joined(equal, log), _joined(real, log), ""


def _joined(parts: Sequence[Baseline], log: bool) -> Baseline:
    values = [value for part in parts for value in part.values]
    if log:
        values = [math.log(value) if value > 0 else -math.inf for value in values]
    halves = tuple(half for part in parts for half in part.halves)
    return Baseline(float(np.mean(values)), min(values), max(values), tuple(values), halves, parts[0].n_patients)


def _some_patients(patients: Sequence[str] | None, n: int, most: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of about ``most`` of n images, those of a patient together."""
    codes = np.arange(n) if patients is None else np.unique(np.asarray(patients, dtype=str), return_inverse=True)[1]
    sizes = np.bincount(codes)
    order = rng.permutation(len(sizes))
    taken = order[: max(FEWEST_FOR_HALVES, int(np.searchsorted(np.cumsum(sizes[order]), most, side="right")))]
    return np.flatnonzero(np.isin(codes, taken))


def _distance_of_moments(
    row: Protocol, title: str, judged: Any, real: Any, resamples: int | None, seed: int, notes: list[str]
) -> Distance:
    """Moments carry no single images: there is nothing to resample, and no neighbours."""
    if row.extractor == "radiomics":
        raise UserError(
            f"{row.name} normalises every feature by the reference's images, which moments do not hold; save the "
            "features themselves (medgen features without --moments)"
        )
    moments = [found if isinstance(found, FeatureMoments) else found.moments() for found in (real, judged)]
    by_patient = (False, False)
    if isinstance(judged, FeatureMoments):
        value = frechet_distance(*moments)
        frechet = Estimate(value, math.nan, math.nan, moments[0].n, moments[1].n, note="no interval: moments only")
        notes.append(f"{title}: no interval, as the samples are given by their moments alone.")
    else:
        frechet = bootstrap_interval(
            moments[0], judged.features, sample_patients=judged.patients, resamples=resamples, seed=seed
        )
        by_patient = (False, judged.patients is not None)
        notes.append(f"{title}: the interval holds the reference fixed, which is given by its moments alone.")
    notes.append(f"{title}: no real-against-real baseline, as moments cannot be halved.")
    if note := small_sample_note(min(of.n for of in moments), moments[0].dim):
        notes.append(f"{title}: {note}.")
    return Distance(row.name, title, frechet, None, None, None, None, None, {}, moments[0].dim, by_patient, row.invalid)


def _thinned(
    features: np.ndarray, patients: Sequence[str] | None, seed: int
) -> tuple[np.ndarray, Sequence[str] | None]:
    """At most as many images as distances between all pairs are affordable for."""
    if len(features) <= MOST_FOR_NEIGHBOURS:
        return features, patients
    chosen = np.sort(np.random.default_rng(seed).choice(len(features), MOST_FOR_NEIGHBOURS, replace=False))
    return features[chosen], None if patients is None else [patients[i] for i in chosen]


def _patch_distances(
    real: ImageSet, judged: ImageSet, resamples: int | None, seed: int, notes: list[str]
) -> list[PatchDistance]:
    """The sliced Wasserstein distance: the mean over the levels, then each level."""
    title = "Sliced Wasserstein distance"
    try:
        sides = [level.shape[-1] for level in laplacian_pyramid(real[0][None])]
    except UserError as error:
        notes.append(f"No {title[0].lower()}{title[1:]}: {error}.")
        return []
    whole = (len(real), len(judged))
    rng = np.random.default_rng(seed)
    real, judged = (of.subset(np.sort(rng.permutation(len(of))[:MOST_FOR_PATCHES]).tolist()) for of in (real, judged))
    if whole != (len(real), len(judged)):
        notes.append(
            f"{title}: of {len(judged)} samples and {len(real)} reference images, drawn at random, as their patches "
            "are held in memory."
        )
    x, y = (set_descriptors(of, seed, role) for of, role in ((real, REAL), (judged, SAMPLES)))
    codes = [patient_codes(of.patients, len(of)) for of in (real, judged)]
    resamples = min(resamples or PATCH_RESAMPLES, PATCH_RESAMPLES)
    counts = [draw_counts(rng, code, resamples).astype(np.intp) for code in codes]
    drawn = [tuple(np.repeat(np.arange(len(of)), of) for of in pair) for pair in zip(*counts, strict=True)]
    patients = {"reference_patients": real.patients, "sample_patients": judged.patients}
    fewer = {"seed": seed, "directions": PATCH_DIRECTIONS}
    values, resampled, halves = [], [], []
    for level in range(len(sides)):
        a, b = x[:, level : level + 1], y[:, level : level + 1]
        values.append(sliced_wasserstein(a, b, seed=seed)[0])
        resampled.append([sliced_wasserstein(a[i], b[j], **fewer)[0] for i, j in drawn])

        def statistic(a: np.ndarray, b: np.ndarray, shape: tuple[int, ...] = a.shape[1:]) -> float:
            return float(sliced_wasserstein(a.reshape(-1, *shape), b.reshape(-1, *shape), **fewer)[0])

        *pair, why_not = _halves(a.reshape(len(a), -1), b.reshape(len(b), -1), statistic, patients, seed)
        halves.append(pair)
    if why_not:
        notes.append(f"{title}: no real-against-real baseline: {why_not}.")

    found = []
    names = [("swd", title), *((f"swd_{side}", f"  level of {side} pixels") for side in sides)]
    rows = zip(
        [np.mean(values), *values],
        [np.mean(resampled, axis=0), *np.array(resampled)],
        [[_mean_of(parts) for parts in zip(*halves, strict=True)], *halves],
        strict=True,
    )
    for (name, of), (value, of_resamples, pair) in zip(names, rows, strict=True):
        low, high, note = recentred_interval(float(value), of_resamples, 0.95)
        note = with_few_patients(note, min(int(code.max()) + 1 for code in codes))
        estimate = Estimate(float(value), max(low, 0.0), high, len(real), len(judged), note=note)
        found.append(PatchDistance(name, of, estimate, *pair))
    return found


def _mean_of(levels: Sequence[Baseline | None]) -> Baseline | None:
    """The baseline of the mean over levels, which were divided alike."""
    first = levels[0]
    if first is None:
        return None
    values = np.mean([of.values for of in levels], axis=0)
    return Baseline(
        float(values.mean()), float(values.min()), float(values.max()), tuple(values), first.halves, first.n_patients
    )


def _diversity(images: ImageSet, role: str, pairs: str | int, seed: int, device: str, notes: list[str]) -> Any:
    from medgen.metrics.diversity import pairwise_ms_ssim

    if len(images) < 2:
        notes.append(f"No MS-SSIM of the {role}: one image makes no pair.")
        return None
    if min(images.summary.shapes[0][1:]) < SMALLEST_FOR_MS_SSIM:
        notes.append(
            f"No MS-SSIM of the {role}: its five scales take images of at least {SMALLEST_FOR_MS_SSIM} pixels."
        )
        return None
    return pairwise_ms_ssim(images, pairs, seed=seed, patients=images.patients, device=device)


def _paired(real: ImageSet, judged: ImageSet, lpips: Any, device: str, seed: int, notes: list[str]) -> Any:
    from medgen.metrics.paired import PAIRED_METRICS, paired_quality

    of_reference, of_samples = _by_stem(real), _by_stem(judged)
    both = [stem for stem in of_samples if stem in of_reference]
    for of, role in ((of_samples, "samples"), (of_reference, "reference images")):
        if len(of) > len(both):
            notes.append(
                f"{len(of) - len(both)} of the {len(of)} {role} that can be read have no partner of their name."
            )
    if not both:
        raise UserError("--paired finds no pair of which both images can be read; look at what cannot")
    side = min(real.summary.shapes[0][1:])
    names = [name for name, metric in PAIRED_METRICS.items() if side >= metric.min_side]
    if lpips is None and "lpips" in names:
        names.remove("lpips")
    real, judged = (of.subset([i[stem] for stem in both]) for of, i in ((real, of_reference), (judged, of_samples)))
    return paired_quality(real, judged, names, patients=real.patients, lpips=lpips, device=device, seed=seed)


def _audit(
    images: Mapping[str, ImageSet],
    features: Mapping[str, Mapping[str, Any]],
    extract: _Extraction,
    say: _Say,
    seed: int,
    progress: bool,
    notes: list[str],
) -> Any:
    """Copies of training images, in pixels; and in the space of the first protocol that has features of all sets."""
    from medgen.metrics.memorisation import audit_memorisation

    held_out = images.get("reference")
    name = next((name for name in features if (name, "samples") in extract.rows), None)
    given = None
    if name is not None and held_out is not None and not extract.rows[name, "samples"].ranges:
        say(f"{name} features of the {len(images['training'])} training images")
        found = [features[name]["samples"], extract(name, "training", like="samples"), features[name]["reference"]]
        whole = (images["samples"], images["training"], held_out)
        # images without features would shift the rows against the images
        if all(len(of) == len(all_of) for of, all_of in zip(found, whole, strict=True)):
            given = [np.asarray(of.features) for of in found]
        else:
            notes.append(f"Copies were searched for in pixels only: some images have no {name} features.")
    say("searching the training images for copies")
    return audit_memorisation(
        images["samples"], images["training"], held_out, features=given, seed=seed, progress=progress
    )
