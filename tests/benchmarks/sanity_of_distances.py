"""Do the distances order what a radiologist would order, and does the audit find planted copies? On real images.

    python tests/benchmarks/sanity_of_distances.py RADIOGRAPHS [--others FOLDER ...] [--count 500] [--image_size 256]

prints the two tables of src/medgen/metrics/README.md; with --patches that of the sliced Wasserstein distance instead.
Nothing is downloaded and nothing is kept.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import convolve1d

from medgen.data.image_set import ImageSet
from medgen.metrics.memorisation import audit_memorisation
from medgen.metrics.prdc import PRDC_NAMES
from medgen.metrics.sliced_wasserstein import REAL, SAMPLES, pyramid_sides, set_descriptors, sliced_wasserstein
from medgen.report.measure import measure
from medgen.report.measurements import Distance

BLUR_SIDE = 5  # kernel of the anomaly source's baseline; sigma 0 there means OpenCV's rule, which is:
BLUR_SIGMA = 0.3 * ((BLUR_SIDE - 1) / 2 - 1) + 0.8
NOISE_VARIANCE = 0.01  # on a range of 1, clipped
PLANTED = 20  # copies of each kind
DIVISIONS = 5  # of the radiographs, for the sliced Wasserstein distance


def blurred(pixels: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """Gaussian blur with a kernel of 5 pixels, the border reflected."""
    x = np.arange(BLUR_SIDE) - BLUR_SIDE // 2
    kernel = np.exp(-(x**2) / (2 * BLUR_SIGMA**2))
    kernel /= kernel.sum()
    soft = convolve1d(convolve1d(pixels.astype(np.float64), kernel, 0, mode="mirror"), kernel, 1, mode="mirror")
    return soft.astype(np.uint8)  # truncated, as the source does


def noised(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise."""
    rough = pixels / 255 + rng.normal(0, NOISE_VARIANCE**0.5, pixels.shape)
    return (np.clip(rough, 0, 1) * 255).astype(np.uint8)


def shifted(pixels: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """By 2 pixels down and right, the border repeated."""
    return np.pad(pixels, ((2, 0), (2, 0)), mode="edge")[:-2, :-2]


def recompressed(pixels: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """JPEG of quality 75 and back."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=75)
    return np.asarray(Image.open(buffer))


COPIES = {
    "exact": lambda pixels, _: pixels,
    "shifted by 2 pixels": shifted,
    "JPEG of quality 75": recompressed,
    "flipped left to right": lambda pixels, _: pixels[:, ::-1],
}


def save(images: ImageSet, folder: Path, change=lambda pixels, _: pixels) -> Path:
    """The images as PNG, changed."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, file in enumerate(images.files):
        pixels = np.rint(images[i][0] * 255).astype(np.uint8)
        Image.fromarray(change(pixels, rng)).save(folder / f"{Path(file).stem}.png")
    return folder


def divided(images: ImageSet, parts: int, count: int, seed: int = 0) -> list[ImageSet]:
    """Disjoint sets of about equal size, no patient in two."""
    patients = np.array(images.patients or range(len(images)))
    order = np.random.default_rng(seed).permutation(np.unique(patients))
    groups = [np.flatnonzero(np.isin(patients, group)) for group in np.array_split(order, parts)]
    return [images.subset(group[:count].tolist()) for group in groups]


def distance_row(name: str, distance: Distance) -> str:
    """A line of the table."""
    low, high = distance.frechet.low, distance.frechet.high
    prdc = [f"{distance.prdc[key].value:.2f}" for key in PRDC_NAMES]
    value = f"{distance.frechet.value:.3g} ({low:.3g} to {high:.3g})"
    cells = [name, value, f"{distance.frechet_equal.mean:.3g}", f"{distance.kernel.value:.3g}", *prdc]
    return "| " + " | ".join(cells) + " |"


def distances(images: ImageSet, others: list[Path], count: int, options: dict, folder: Path) -> None:
    """First table: one half of the real images against the other half, and against what is not that."""
    reference, half = divided(images, 2, count)
    real = save(reference, folder / "reference")
    against = {"the other half": save(half, folder / "half")}
    against["the other half, blurred"] = save(half, folder / "blurred", blurred)
    against["the other half, noised"] = save(half, folder / "noised", noised)
    for other in others:
        taken = ImageSet.from_source(other, max_images=count, mode="L", image_size=options["image_size"])
        against[other.name] = save(taken, folder / "others" / other.name)
    found = {
        name: measure(samples, real, cache_dir=folder / "cache", pairs=200, progress=False, **options)
        for name, samples in against.items()
    }
    for number, first in enumerate(next(iter(found.values())).distances):
        sizes = f"{first.frechet.n_reference} real images against {first.frechet.n_samples}"
        base = first.frechet_baseline
        print(f"\n**{first.title}**, {first.n_features} features, {sizes}; ", end="")
        print(f"real against real at equal n: {base.mean:.3g} ({base.low:.3g} to {base.high:.3g})\n")
        columns = (
            "samples",
            "Fréchet (95% interval)",
            "at equal n",
            "KID",
            "precision",
            "recall",
            "density",
            "coverage",
        )
        print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
        for name, measured in found.items():
            print(distance_row(name, measured.distances[number]))


def copies(images: ImageSet, count: int) -> None:
    """Second table: copies of training images planted among images of other patients."""
    training, held_out, fresh = divided(images, 3, count)
    rng = np.random.default_rng(1)
    samples, kinds = [fresh[i] for i in range(len(fresh))], ["other patients"] * len(fresh)
    originals = rng.permutation(len(training))[: PLANTED * len(COPIES)].reshape(len(COPIES), -1)
    for (kind, change), chosen in zip(COPIES.items(), originals, strict=True):
        for i in chosen.tolist():
            pixels = change(np.rint(training[i][0] * 255).astype(np.uint8), rng)
            samples.append((pixels / np.float32(255))[None].astype(np.float32))
            kinds.append(kind)
    audit = audit_memorisation(samples, training, held_out)
    flagged = Counter(kinds[i] for i in audit.flagged)
    print(f"\n{len(training)} training images, {len(held_out)} held out, limit {audit.threshold:.3f}\n")
    print("| among the samples | flagged | of |\n|---|---|---|")
    for kind, number in Counter(kinds).items():
        print(f"| {kind} | {flagged[kind]} | {number} |")


def patches(images: ImageSet, others: list[Path], count: int, image_size: int | None) -> None:
    """Sliced Wasserstein distance of one half of the real images, level by level, from what the first table has."""

    def described(taken: ImageSet, change=lambda pixels, _: pixels, role: int = SAMPLES) -> np.ndarray:
        rng = np.random.default_rng(0)
        changed = [change(np.rint(taken[i][0] * 255).astype(np.uint8), rng) for i in range(len(taken))]
        return set_descriptors([(pixels[None] / 255).astype(np.float32) for pixels in changed], role=role)

    found: dict[str, list[np.ndarray]] = {}
    of_others = {}
    for other in others:
        taken = ImageSet.from_source(other, max_images=count, mode="L", image_size=image_size)
        of_others[f"{other.name} ({len(taken)})"] = described(taken)
    for seed in range(DIVISIONS):
        reference, half = divided(images, 2, count, seed)
        against = {"the other half": described(half)}
        against["the other half, blurred"] = described(half, blurred)
        against["the other half, noised"] = described(half, noised)
        real = described(reference, role=REAL)
        for name, samples in (against | of_others).items():
            found.setdefault(name, []).append(sliced_wasserstein(real, samples, seed=seed))
    sides = pyramid_sides(images[0].shape[-1])
    print(f"\n{len(reference)} real images against {len(half)}, mean and range over {DIVISIONS} divisions\n")
    columns = ("samples", "mean of levels", *(f"{side} pixels" for side in sides))
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for name, levels in found.items():
        values = [[of.mean(), *of] for of in levels]
        cells = [f"{np.mean(of):.3g} ({min(of):.3g} to {max(of):.3g})" for of in zip(*values, strict=True)]
        print("| " + " | ".join([name, *cells]) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("radiographs", type=Path)
    parser.add_argument("--others", type=Path, nargs="*", default=[])
    parser.add_argument("--count", type=int, default=500, help="images of each set, at most")
    parser.add_argument("--image_size", type=int, default=None)
    parser.add_argument("--patient_pattern", default=None)
    parser.add_argument("--protocols", nargs="+", default=["frd_v1", "radiomics"])
    parser.add_argument("--patches", action="store_true", help="print the sliced Wasserstein distance alone")
    arguments = parser.parse_args()
    images = ImageSet.from_source(
        arguments.radiographs, image_size=arguments.image_size, mode="L", patient_pattern=arguments.patient_pattern
    )
    if arguments.patches:
        patches(images, arguments.others, arguments.count, arguments.image_size)
        return
    options = {"protocols": arguments.protocols, "image_size": arguments.image_size}
    options["patient_pattern"] = arguments.patient_pattern
    with tempfile.TemporaryDirectory() as folder:
        distances(images, arguments.others, arguments.count, options, Path(folder))
    copies(images, arguments.count)


if __name__ == "__main__":
    main()
