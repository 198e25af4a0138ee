"""Radiomic features against pyradiomics 3.0.1 and frd-score 1.0.1.

The golden values in ``tests/assets/radiomics_features.npz`` were made by ``tests/assets/make_radiomics_golden.py``,
which says how to install both. With ``MEDGEN_ORACLE_PYTHON`` naming that environment's Python, real radiographs are
compared too.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from medgen.errors import UserError
from medgen.metrics.feature_set import extract_features
from medgen.metrics.protocols import get_protocol, make_extractor
from medgen.metrics.radiomics import PRESETS, RadiomicsExtractor
from medgen.metrics.radiomics_filters import halve, halve_mask, laplacian_of_gaussian, normalise, wavelet_bands
from medgen.metrics.texture import FEATURE_CLASSES, MAX_LEVELS, discretise, region_features

ASSETS = Path(__file__).parents[1] / "assets"
DATA = Path(__file__).parents[2].parent / "shared" / "data"
ORACLE = os.environ.get("MEDGEN_ORACLE_PYTHON")

with np.load(ASSETS / "radiomics_features.npz", allow_pickle=False) as file:
    GOLDEN = dict(file)
IMAGES = [key.removeprefix("image:") for key in GOLDEN if key.startswith("image:") and "mask:" not in key]


def as_image(levels: np.ndarray) -> np.ndarray:
    """(1, H, W) in [0, 1], as an ImageSet gives it."""
    return levels[None].astype(np.float32) / np.float32(255)


def assert_same(ours: np.ndarray, oracle: np.ndarray, names: tuple[str, ...]) -> None:
    # what is zero but for rounding (a symmetrical histogram's skewness) has no relative error
    different = ~np.isclose(ours, oracle, rtol=1e-6, atol=1e-14, equal_nan=True)
    assert not different.any(), [(names[i], ours[i], oracle[i]) for i in np.flatnonzero(different)[:5]]


def radiograph(side: int = 64) -> np.ndarray:
    return as_image(GOLDEN["image:square"][:side, :side])


# ------------------------------------------------------------------------------------------------- against the oracle


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", IMAGES)
def test_every_feature_equals_the_oracle(preset, name):
    extractor = RadiomicsExtractor(preset)
    image, mask = GOLDEN[f"image:{name}"], GOLDEN.get(f"image:mask:{name}")
    oracle = GOLDEN[f"{preset}/{name}"]

    if len(oracle) < len(extractor.feature_names):  # refused, or without LoG images for want of pixels
        with pytest.raises(UserError):
            extractor.on_image(as_image(image), mask)
        return

    assert_same(extractor.on_image(as_image(image), mask), oracle, extractor.feature_names)


@pytest.mark.parametrize("preset", PRESETS)
def test_names_and_order_are_the_oracles(preset):
    assert RadiomicsExtractor(preset).feature_names == tuple(GOLDEN[preset])


def test_presets_have_the_published_numbers_of_features():
    widths = {name: len(RadiomicsExtractor(name).feature_names) for name in PRESETS}

    assert {family: len(names) for family, names in FEATURE_CLASSES.items()} == {
        "firstorder": 18, "glcm": 24, "glrlm": 16, "gldm": 14, "glszm": 16, "ngtdm": 5,
    }  # fmt: skip
    assert widths == {"frd_v1": 13 + 5 * 77, "frd_v0": 93, "full": 9 * 93}


@pytest.mark.skipif(not ORACLE, reason="MEDGEN_ORACLE_PYTHON names no Python with pyradiomics and frd-score")
@pytest.mark.parametrize("preset", PRESETS)
def test_real_radiographs_equal_the_oracle(preset, tmp_path):
    if not (DATA / "nih_cxr512.zip").is_file():
        pytest.skip("real images (../shared/data/nih_cxr512.zip) are absent")
    with zipfile.ZipFile(DATA / "nih_cxr512.zip") as archive:
        files = sorted(name for name in archive.namelist() if name.endswith(".jpg"))[::107]
        images = {Path(name).stem: np.asarray(Image.open(archive.open(name)).convert("L")) for name in files}
    np.savez(tmp_path / "in.npz", **images)
    script = ASSETS / "make_radiomics_golden.py"
    command = [ORACLE, script, "--images", tmp_path / "in.npz", "--output", tmp_path / "out.npz", "--presets", preset]
    subprocess.run(command, check=True)

    extractor = RadiomicsExtractor(preset)
    with np.load(tmp_path / "out.npz", allow_pickle=False) as oracle:
        for name, image in images.items():
            assert_same(extractor.on_image(as_image(image)), oracle[f"{preset}/{name}"], extractor.feature_names)


# --------------------------------------------------------------------------------------------------------- the filters


@pytest.mark.parametrize("shape", [(2, 2), (3, 5), (17, 18), (19, 40), (64, 64), (65, 63), (100, 231)])
@pytest.mark.parametrize("as_slice", [False, True])
def test_normalising_and_halving_equal_simpleitk_to_the_last_bit(shape, as_slice):
    levels = np.random.default_rng(0).integers(0, 256, shape).astype(np.float32)
    new = [(side + 1) // 2 for side in reversed(shape)]
    source = sitk.Normalize(sitk.GetImageFromArray(levels[None] if as_slice else levels)) * 100
    resampler = sitk.ResampleImageFilter()
    resampler.SetInterpolator(sitk.sitkBSpline)
    resampler.SetOutputPixelType(source.GetPixelID())
    resampler.SetOutputSpacing([2, 2, 1][: source.GetDimension()])
    resampler.SetOutputOrigin([0.5, 0.5, 0][: source.GetDimension()])
    resampler.SetSize([*new, 1][: source.GetDimension()])
    expected = sitk.GetArrayFromImage(resampler.Execute(source)).reshape(new[::-1])

    ours = halve(normalise(levels, 100.0), (0, 0, *shape), 10, as_slice=as_slice)

    np.testing.assert_array_equal(ours, expected)


def test_halving_a_region_keeps_its_margin_and_no_more():
    image = np.random.default_rng(0).normal(size=(101, 90))
    mask = np.zeros(image.shape, bool)
    mask[40:60, 30:35] = True

    whole = halve(image, (0, 0, 101, 90), 0, as_slice=False)
    part = halve(image, (40, 30, 20, 5), 3, as_slice=False)

    # rows (40 - 0.5) / 2 - 3 to (60 - 0.5) / 2 + 3, columns likewise
    np.testing.assert_allclose(part, whole[16:34, 11:22], rtol=1e-12)
    assert halve_mask(mask, (40, 30, 20, 5), 3).shape == part.shape


def test_wavelet_bands_of_a_flat_image_keep_its_level_in_one():
    bands = wavelet_bands(np.full((9, 6), 3.0))

    assert np.allclose(bands.pop("LL"), 6)  # the low-pass filters' gain is the root of 2 along each axis
    assert all(np.abs(band).max() < 1e-12 for band in bands.values())
    assert all(band.shape == (9, 6) for band in bands.values())


def test_log_needs_room_for_its_sigma():
    with pytest.raises(UserError, match="LoG of sigma 5 wants at least 4 pixels a side, got an image of 3 x 30"):
        laplacian_of_gaussian(np.zeros((3, 30)), 5.0, 2.0)


# -------------------------------------------------------------------------------------------------------- the features


@pytest.mark.parametrize("turn", [np.transpose, np.flipud, np.fliplr, np.rot90])
def test_turning_an_image_and_its_region_changes_nothing(turn):
    image, mask = GOLDEN["image:even"], GOLDEN["image:mask:disc"]
    extractor = RadiomicsExtractor("frd_v0")

    turned = extractor.on_image(as_image(turn(image)), turn(mask))

    np.testing.assert_allclose(turned, extractor.on_image(as_image(image), mask), rtol=1e-9)


def test_levels_at_the_edges_of_bins_belong_to_the_bin_above():
    values = np.array([-5.0, -1e-17, 0.0, 4.9999999, 5.0, 10.0])

    levels, counts = discretise(values, np.sort(values), 5.0)

    np.testing.assert_array_equal(levels, np.digitize(values, [-5, 0, 5, 10, 15]))
    np.testing.assert_array_equal(counts, [2, 2, 1, 1])


def test_too_many_grey_levels_are_refused():
    ramp = np.arange(0, 2 * MAX_LEVELS, 1.0).reshape(2, -1)

    with pytest.raises(UserError, match=f"at most {MAX_LEVELS} grey levels"):
        region_features(ramp, None, bin_width=1.0, voxel_shift=0, pixel_area=1, features=FEATURE_CLASSES)
    with pytest.raises(UserError, match="at most a million bins"):
        region_features(ramp * 1e6, None, bin_width=1.0, voxel_shift=0, pixel_area=1, features=FEATURE_CLASSES)


# -------------------------------------------------------------------------------------------------------- the extractor


def test_rgb_enters_as_pillows_luma():
    rgb = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    grey = np.asarray(Image.fromarray(rgb).convert("L"))
    extractor = RadiomicsExtractor("frd_v0")

    ours = extractor.on_image(rgb.transpose(2, 0, 1).astype(np.float32) / 255)

    np.testing.assert_array_equal(ours, extractor.on_image(as_image(grey)))


def test_values_between_levels_are_rounded_as_in_a_file():
    image = radiograph()
    extractor = RadiomicsExtractor("frd_v0")

    np.testing.assert_array_equal(extractor.on_image(image + np.float32(0.4 / 255)), extractor.on_image(image))


def test_a_batch_of_different_sizes_gives_each_images_row():
    images = [radiograph(), radiograph(48)]
    extractor = RadiomicsExtractor("frd_v1")

    rows = extractor.on_images(images)

    assert rows.shape == (2, 398)
    assert rows.dtype == np.float64
    for row, image in zip(rows, images, strict=True):
        np.testing.assert_array_equal(row, extractor.on_image(image))
    assert extractor.on_images([]).shape == (0, 398)


@pytest.mark.parametrize("preset", ["frd_v1", "full"])
def test_a_constant_image_cannot_be_normalised(preset):
    with pytest.raises(UserError, match="must not be constant, got 77 in every pixel"):
        RadiomicsExtractor(preset).on_image(as_image(GOLDEN["image:constant"]))


def test_a_constant_image_has_finite_features_where_nothing_is_normalised():
    extractor = RadiomicsExtractor("frd_v0")

    row = dict(zip(extractor.feature_names, extractor.on_image(as_image(GOLDEN["image:constant"])), strict=True))

    assert np.isfinite(list(row.values())).all()
    assert row["firstorder_Mean"] == 77
    assert row["glrlm_GrayLevelVariance"] == 0
    assert row["ngtdm_Coarseness"] == 1e6  # the convention where the sum is zero


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (np.zeros((64, 64)), None, r"must be \(1, H, W\) or \(3, H, W\), got \(64, 64\)"),
        (np.zeros((2, 64, 64)), None, r"got \(2, 64, 64\)"),
        (np.zeros((1, 0, 64)), None, r"got \(1, 0, 64\)"),
        (np.full((1, 8, 8), np.nan), None, r"pixels must lie in 0\.\.1, got nan"),
        (np.full((1, 8, 8), 255.0), None, r"pixels must lie in 0\.\.1, got 255"),
        (np.full((1, 8, 8), -1.0), None, r"pixels must lie in 0\.\.1, got -1"),
        (radiograph(), np.ones((8, 8)), r"a mask must have the image's size, \(64, 64\), got \(8, 8\)"),
        (radiograph(), np.zeros((64, 64)), r"at least 2 pixels, got 0"),
        (radiograph(), np.eye(64)[[5]] * np.eye(64)[:, [5]] + 0, r"at least 2 pixels, got 1"),
    ],
)
def test_what_has_no_features_is_refused_in_one_line(image, mask, message):
    with pytest.raises(UserError, match=message) as caught:
        RadiomicsExtractor("frd_v1").on_image(image, mask)
    assert "\n" not in str(caught.value)


def test_a_region_that_falls_between_the_new_pixels_is_refused():
    mask = np.zeros((64, 64))
    mask[10, 20] = mask[30, 40] = 1

    with pytest.raises(UserError, match="at least 2 pixels high and wide where features are computed, got 0 x 0"):
        RadiomicsExtractor("frd_v1").on_image(radiograph(), mask)


@pytest.mark.filterwarnings("error")
def test_what_is_undefined_in_two_pixels_is_nan_without_a_warning():
    extractor = RadiomicsExtractor("frd_v0")
    mask = np.zeros((64, 64))
    mask[10, 20] = mask[30, 40] = 1

    row = dict(zip(extractor.feature_names, extractor.on_image(radiograph(), mask), strict=True))

    assert np.isnan(row["glcm_Contrast"])  # no two pixels touch
    assert row["firstorder_Mean"] == GOLDEN["image:square"][[10, 30], [20, 40]].mean()


def test_one_mask_per_image():
    with pytest.raises(UserError, match="masks must be 2, one per image, got 1"):
        RadiomicsExtractor("frd_v0").on_images([radiograph()] * 2, [np.ones((64, 64))])


def test_unknown_preset_is_named():
    with pytest.raises(UserError, match="preset must be one of frd_v1, frd_v0, full, got 'v2'"):
        RadiomicsExtractor("v2")


def test_settings_say_what_decides_the_numbers_and_stand_in_json():
    settings = [RadiomicsExtractor(name).settings for name in PRESETS]

    assert json.loads(json.dumps(settings)) == settings
    assert len({json.dumps(row) for row in settings}) == len(PRESETS)
    assert settings[0]["bin_width"] == 5


def test_extractor_travels_to_processes():
    extractor = RadiomicsExtractor("frd_v1")

    sent = pickle.dumps(extractor)

    assert len(sent) < 50_000
    np.testing.assert_array_equal(pickle.loads(sent).on_image(radiograph()), extractor.on_image(radiograph()))


def test_importing_needs_neither_torch_nor_monai():
    code = "import sys, medgen.metrics.radiomics, medgen.metrics.frd; print({'torch', 'monai'} & set(sys.modules))"

    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert answer.stdout.strip() == "set()"


@pytest.mark.parametrize("protocol", ["frd_v1", "frd_v0", "radiomics"])
def test_protocols_find_their_preset(protocol):
    extractor = make_extractor(get_protocol(protocol))

    assert extractor.name == {"radiomics": "full"}.get(protocol, protocol)


def test_a_constant_image_is_listed_and_the_others_have_rows(tmp_path):
    images = [radiograph(), as_image(GOLDEN["image:constant"]), radiograph(48)]

    found = extract_features(images, "frd_v1", cache_dir=tmp_path, progress=False)

    assert found.features.shape == (2, 398)
    assert found.names == RadiomicsExtractor("frd_v1").feature_names
    assert list(found.rejected) == ["1"]
    assert "must not be constant" in found.rejected["1"]
