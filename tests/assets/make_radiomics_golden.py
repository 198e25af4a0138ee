"""Make the golden values of the radiomic features and of FRD with pyradiomics 3.0.1 and frd-score 1.0.1.

Neither is a dependency. pyradiomics builds in an environment of its own::

    python3.11 -m venv oracle
    oracle/bin/pip install "setuptools<75" wheel numpy versioneer
    oracle/bin/pip install --no-build-isolation pyradiomics==3.0.1
    oracle/bin/pip install frd-score==1.0.1 SimpleITK==2.5.7
    oracle/bin/python tests/assets/make_radiomics_golden.py

This writes ``radiomics_features.npz`` and ``radiomics_frd.npz`` beside the script. With ``--images IN.npz --output
OUT.npz`` it computes the features of other images: arrays of 8-bit grey levels (H, W), and regions under ``mask:NAME``.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from frd_score import frd
from radiomics import featureextractor

HERE = Path(__file__).parent
PRESETS = ("frd_v1", "frd_v0", "full")
FULL = {
    "setting": {
        "normalize": True,
        "normalizeScale": 100,
        "interpolator": "sitkBSpline",
        "resampledPixelSpacing": [2, 2],
        "padDistance": 10,
        "binWidth": 5,
        "voxelArrayShift": 300,
        "label": 1,
    },
    "imageType": {"Original": {}, "LoG": {"sigma": [2.0, 3.0, 4.0, 5.0]}, "Wavelet": {}},
    "featureClass": {name: [] for name in ("firstorder", "glcm", "glrlm", "gldm", "glszm", "ngtdm")},
}


def make_extractor(preset: str):
    """The oracle's extractor; frd_v1 and frd_v0 are frd-score's own."""
    frd._ensure_radiomics()
    if preset == "full":
        return featureextractor.RadiomicsFeatureExtractor(FULL)
    return frd.get_feature_extractor(preset.removeprefix("frd_"))


def features(extractor, preset: str, image: np.ndarray, mask: np.ndarray | None) -> dict[str, float]:
    """What frd-score keeps of the oracle's answer; frd_v1 sees the image as a volume of one slice."""
    if mask is None:
        mask = np.ones(image.shape, np.uint8)
        mask[0, 0] = 0
    image, mask = image.astype(np.float32), mask.astype(np.uint8)
    if preset == "frd_v1":
        image, mask = image[None], mask[None]
    found = {}
    for name, value in extractor.execute(sitk.GetImageFromArray(image), sitk.GetImageFromArray(mask)).items():
        if name.startswith("diagnostics"):
            try:
                number = float(value)
            except (TypeError, ValueError):
                continue
            if preset == "frd_v1":
                found[name] = number
        elif "_shape" not in name:
            found[name.replace("original_", "").replace("-0-mm-3D", "")] = float(value)
    return found


def all_features(images: dict[str, np.ndarray], presets: tuple[str, ...] = PRESETS) -> dict[str, np.ndarray]:
    """``PRESET/IMAGE`` -> values (empty where the oracle refuses), ``PRESET`` -> names, ``seconds/PRESET/IMAGE``."""
    found: dict[str, np.ndarray] = {}
    for preset in presets:
        extractor = make_extractor(preset)
        for name, image in images.items():
            if name.startswith("mask:"):
                continue
            start = time.perf_counter()
            try:
                row = features(extractor, preset, image, images.get(f"mask:{name}"))
            except (ValueError, RuntimeError):
                row = {}
            found[f"seconds/{preset}/{name}"] = np.array(time.perf_counter() - start)
            found[f"{preset}/{name}"] = np.array(list(row.values()))
            if len(row) > len(found.get(preset, ())):
                found[preset] = np.array(list(row))
    return found


def make_images() -> dict[str, np.ndarray]:
    """Soft shapes with noise, flat borders and burnt-in marks, as radiographs have; and what breaks features."""
    rng = np.random.default_rng(20240917)
    images = {}
    for name, (height, width) in {"even": (96, 80), "odd": (65, 47), "square": (64, 64)}.items():
        y, x = np.mgrid[:height, :width] / np.array([height, width])[:, None, None]
        lungs = sum(np.exp(-(((y - 0.5) / 0.3) ** 2 + ((x - centre) / 0.13) ** 2)) for centre in (0.3, 0.7))
        image = 190 - 130 * lungs + 20 * np.sin(40 * y) * (lungs > 0.3) + rng.normal(0, 4, (height, width))
        image[:, : width // 10] = 0
        image[4:12, -14:-6] = 255
        images[name] = np.clip(image, 0, 255).astype(np.uint8)
    images["noise_8x8"] = rng.integers(0, 256, (8, 8), dtype=np.uint8)
    images["noise_5x7"] = rng.integers(0, 256, (5, 7), dtype=np.uint8)
    images["noise_3x3"] = rng.integers(0, 256, (3, 3), dtype=np.uint8)
    images["noise_1x9"] = rng.integers(0, 256, (1, 9), dtype=np.uint8)
    images["one_pixel"] = np.full((1, 1), 9, np.uint8)
    images["constant"] = np.full((17, 16), 77, np.uint8)
    images["two_levels"] = np.where(rng.random((32, 30)) > 0.5, 200, 0).astype(np.uint8)
    spike = np.full((40, 40), 10, np.uint8)
    spike[21, 3] = 255
    images["spike"] = spike
    y, x = np.mgrid[:96, :80]
    for name, mask in {
        "disc": (y - 50) ** 2 + (x - 30) ** 2 < 400,
        "two_parts": ((y > 8) & (y < 30) & (x < 20)) | ((y > 60) & (x > 40)),
        "scattered": rng.random((96, 80)) > 0.9,
        "line": (y == 40) & (x < 30),
    }.items():
        images[name] = images["even"]
        images[f"mask:{name}"] = mask.astype(np.uint8)
    return images


def make_feature_sets() -> dict[str, np.ndarray]:
    """Two sets of 24 features of all magnitudes; two are constant, one of them in the reference alone."""
    rng = np.random.default_rng(7)
    mixing = rng.normal(size=(24, 24)) * np.geomspace(1e-3, 1e6, 24)
    reference = rng.normal(size=(90, 24)) @ mixing + np.geomspace(1, 1e7, 24)
    samples = 1.1 * rng.normal(size=(70, 24)) @ mixing + 1.2 * np.geomspace(1, 1e7, 24)
    reference[:, 5] = samples[:, 5] = 262143
    reference[:, 9] = 4
    return {"reference": reference, "samples": samples}


def frd_of(reference: np.ndarray, samples: np.ndarray, version: str) -> float:
    """frd-score's distance of given features: all that it does after it has extracted them."""
    tables = iter([reference, samples])

    def extracted(**_):
        table = next(tables)
        return table.copy(), [dict.fromkeys(map(str, range(table.shape[1])))], None

    kept, frd.compute_features = frd.compute_features, extracted
    try:
        normalisation, low_high, _, _, base = frd._resolve_defaults(version, None, None, None, None)
        means, covariances, _, _ = frd.calculate_feature_statistics(
            [["a"], ["b"]], normalisation, low_high, None, norm_ref=base, frd_version=version
        )
    finally:
        frd.compute_features = kept
    squared = frd.calculate_frechet_distance(means[0], covariances[0], means[1], covariances[1])
    return float(np.log(squared)) if version == "v1" else float(squared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="npz of images to compute features of; default: those made here")
    parser.add_argument("--output", help="npz for their features")
    parser.add_argument("--presets", default=",".join(PRESETS))
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    if arguments.images:
        with np.load(arguments.images, allow_pickle=False) as file:
            images = dict(file)
        np.savez_compressed(arguments.output, **all_features(images, tuple(arguments.presets.split(","))))
        return
    images = make_images()
    golden = {key: value for key, value in all_features(images).items() if not key.startswith("seconds/")}
    np.savez_compressed(
        HERE / "radiomics_features.npz", **{f"image:{key}": value for key, value in images.items()}, **golden
    )
    sets = make_feature_sets()
    scores = {version: np.array(frd_of(**sets, version=version)) for version in ("v0", "v1")}
    np.savez_compressed(HERE / "radiomics_frd.npz", **sets, **scores)


if __name__ == "__main__":
    main()
