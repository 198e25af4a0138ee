"""Scores of image and reconstruction against plain loops over numpy, scipy and scikit-image."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, fields

import numpy as np
import pytest
from scipy import stats
from skimage.metrics import mean_squared_error

from medgen.errors import UserError
from medgen.metrics.anomaly import (
    AnomalyScores,
    Patch,
    body_region,
    heat_map,
    localisation_rate,
    mse_by_patch,
    score_anomaly,
    top_patches,
    wasserstein_by_patch,
    wasserstein_distance,
)


def pair(height: int, width: int, seed: int = 0, levels: int = 256) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    step = 255 // (levels - 1)
    return tuple((rng.integers(0, levels, (height, width)) * step).astype(np.uint8) for _ in range(2))


def loop(score, image: np.ndarray, reconstruction: np.ndarray, patch: int) -> np.ndarray:
    H, W = image.shape
    return np.array(
        [
            [
                score(image[r : r + patch, c : c + patch], reconstruction[r : r + patch, c : c + patch])
                for c in range(W - patch + 1)
            ]
            for r in range(H - patch + 1)
        ]
    )


def plain_wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    return stats.wasserstein_distance(a.ravel() / 255.0, b.ravel() / 255.0)


def plain_mse(a: np.ndarray, b: np.ndarray) -> float:
    return mean_squared_error(a / 255.0, b / 255.0)


@pytest.mark.parametrize(
    ("height", "width", "patch"), [(20, 20, 8), (17, 31, 5), (31, 17, 16), (12, 9, 9), (9, 9, 1), (40, 7, 7)]
)
@pytest.mark.parametrize("levels", [2, 6, 256])
def test_every_offset_equals_the_plain_double_loop(height, width, patch, levels):
    images = pair(height, width, levels=levels)
    for ours, plain in ((mse_by_patch, plain_mse), (wasserstein_by_patch, plain_wasserstein)):
        found = ours(*images, patch)
        assert found.shape == (height - patch + 1, width - patch + 1)
        np.testing.assert_allclose(found, loop(plain, *images, patch), rtol=0, atol=1e-12)


def test_strips_are_put_together_without_a_seam(monkeypatch):
    images = pair(75, 20)
    whole = wasserstein_by_patch(*images, 6)
    monkeypatch.setattr("medgen.metrics.anomaly.STRIP", 500)  # 25 rows of 20: four strips
    np.testing.assert_array_equal(wasserstein_by_patch(*images, 6), whole)


@pytest.mark.parametrize("patch", [127, 128, 181, 182, 200])
def test_counts_of_large_patches_do_not_overflow(patch):
    # every pixel differs at every level: the counts are as large as they can be
    black, white = np.zeros((205, 200), np.uint8), np.full((205, 200), 255, np.uint8)
    for first, second in ((black, white), (white, black)):
        np.testing.assert_allclose(wasserstein_by_patch(first, second, patch), 1, atol=1e-12)
    half = np.where(np.arange(200) < 100, 255, 0).astype(np.uint8) * np.ones((205, 1), np.uint8)
    found = wasserstein_by_patch(half, black, patch)
    assert found[0, 0] == pytest.approx(plain_wasserstein(half[:patch, :patch], black[:patch, :patch]))


def test_an_anomaly_in_the_last_row_and_column_is_seen():
    image = np.zeros((50, 40), np.uint8)
    image[-1, -1] = 255
    scores, maps = score_anomaly(image, np.zeros_like(image), patch=32)
    assert maps.mse[-1, -1] == maps.wd[-1, -1] == scores.mse_patch == 1 / 1024
    assert (maps.mse > 0).sum() == 1
    assert (scores.mse_patch_row, scores.mse_patch_column) == (18, 8)
    assert (scores.wd_patch_row, scores.wd_patch_column) == (18, 8)


def test_floating_point_images_are_scored_as_what_they_are_and_by_256_levels_in_patches():
    rng = np.random.default_rng(1)
    image, reconstruction = rng.random((30, 24)), rng.random((30, 24)) ** 2
    scores, maps = score_anomaly(image, reconstruction, patch=8)
    assert scores.mse_full == pytest.approx(mean_squared_error(image, reconstruction), rel=1e-12)
    assert scores.wd_full == pytest.approx(stats.wasserstein_distance(image.ravel(), reconstruction.ravel()), rel=1e-12)
    np.testing.assert_allclose(maps.mse, loop(mean_squared_error, image, reconstruction, 8), atol=1e-12)
    plain = loop(lambda a, b: stats.wasserstein_distance(a.ravel(), b.ravel()), image, reconstruction, 8)
    np.testing.assert_allclose(maps.wd, plain, rtol=0, atol=1 / 255)
    assert np.abs(maps.wd - plain).max() > 1e-6


def test_the_same_picture_has_the_same_scores_as_uint8_and_as_floating_point():
    images = pair(24, 36)
    whole, whole_maps = score_anomaly(*images, patch=8)
    for dtype, places in ((np.float64, 1e-12), (np.float32, 1e-6)):
        scores, maps = score_anomaly(*(values.astype(dtype)[None] / dtype(255) for values in images), patch=8)
        assert asdict(scores) == pytest.approx(asdict(whole), abs=places)
        np.testing.assert_array_equal(maps.wd, whole_maps.wd)


def test_row_of_scores_by_region():
    rng = np.random.default_rng(2)
    image = np.zeros((40, 60), np.uint8)
    image[5:30, 10:50] = rng.integers(1, 256, (25, 40))
    reconstruction = rng.integers(0, 256, image.shape).astype(np.uint8)
    scores, maps = score_anomaly(image, reconstruction, patch=8)
    body = np.s_[5:30, 10:50]
    assert scores.mse_full == pytest.approx(plain_mse(image, reconstruction))
    assert scores.wd_full == pytest.approx(plain_wasserstein(image, reconstruction))
    assert scores.mse_body == pytest.approx(plain_mse(image[body], reconstruction[body]))
    assert scores.wd_body == pytest.approx(plain_wasserstein(image[body], reconstruction[body]))
    assert scores.body_share == 25 * 40 / 2400
    assert maps.body[body].all()
    for kind, values in (("mse", maps.mse), ("wd", maps.wd)):
        row, column = getattr(scores, f"{kind}_patch_row"), getattr(scores, f"{kind}_patch_column")
        assert getattr(scores, f"{kind}_patch") == values.max() == values[row, column]
    assert list(asdict(scores)) == [field.name for field in fields(AnomalyScores)]
    given, _ = score_anomaly(image, reconstruction, patch=8, body=np.ones_like(image))
    assert given.mse_body == pytest.approx(scores.mse_full)


def test_an_image_without_a_body_has_no_body_scores():
    black, noise = np.zeros((40, 40), np.uint8), pair(40, 40)[0]
    scores, maps = score_anomaly(black, noise)
    assert scores.mse_body is scores.wd_body is None
    assert scores.body_share == 0
    assert not maps.body.any()
    assert scores.mse_full > 0


def test_an_image_equal_to_its_reconstruction_scores_nothing():
    image = pair(40, 50)[0]
    for kind in (image, image / 255):
        scores, maps = score_anomaly(kind, kind)
        assert scores.mse_full == scores.wd_full == scores.mse_patch == scores.wd_patch == 0
        assert not maps.mse.any()
        assert not maps.wd.any()


def test_wasserstein_distance_does_not_see_where_intensities_lie():
    image = pair(32, 32)[0]
    moved = np.roll(image, 5, axis=1)
    assert wasserstein_distance(image, moved) == 0
    assert mse_by_patch(image, moved, 32)[0, 0] > 0
    lighter = np.minimum(image.astype(int) // 2 + 60, 255).astype(np.uint8)
    assert wasserstein_distance(image, lighter) == pytest.approx(plain_wasserstein(image, lighter))


def disc(shape: tuple[int, int], centre: tuple[int, int], radius: float) -> np.ndarray:
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= radius**2


def test_body_keeps_its_lungs_and_loses_table_and_specks():
    body, lung = disc((80, 100), (40, 50), 30), disc((80, 100), (40, 60), 8)
    image = np.where(body & ~lung, 120, 0).astype(np.uint8)
    image[76:78] = 200  # the table, wider than the body
    image[2, 2] = 255
    np.testing.assert_array_equal(body_region(image), body)


def test_background_cut_in_parts_by_the_body_is_no_hole():
    # a body from edge to edge: no corner is reached from the other side, and the gap at the right border from none
    image = np.zeros((60, 60), np.uint8)
    image[10:50] = 100
    image[25:30, 50:] = 0
    image[30:35, 20:25] = 0
    found = body_region(image)
    assert not found[:10].any()
    assert not found[50:].any()
    assert not found[25:30, 50:].any()
    assert found[30:35, 20:25].all()


def test_body_threshold_passes_over_a_noisy_background():
    body = disc((64, 64), (30, 30), 20)
    noise = np.random.default_rng(3).integers(0, 6, body.shape)
    image = np.where(body, 120, noise).astype(np.uint8)
    assert body_region(image).mean() > 0.9
    np.testing.assert_array_equal(body_region(image, 0.05), body)
    np.testing.assert_array_equal(body_region(image / 255, 0.05), body)
    assert not body_region(image, 0.6).any()


def test_top_patches_stand_apart_and_come_best_first():
    scores = np.zeros((20, 30))
    scores[3, 4], scores[4, 5], scores[15, 20], scores[3, 8] = 5, 4, 3, 2
    apart = top_patches(scores, 4, 3)
    assert [(found.row, found.column, found.score) for found in apart] == [(3, 4, 5), (15, 20, 3), (3, 8, 2)]
    shared = top_patches(scores, 4, 3, overlap=True)
    assert [(found.row, found.column) for found in shared] == [(3, 4), (4, 5), (15, 20)]
    assert apart[0].slices == (slice(3, 7), slice(4, 8))


@pytest.mark.parametrize("seed", range(5))
def test_no_two_top_patches_share_a_pixel(seed):
    scores = np.random.default_rng(seed).random((25, 33))
    found = top_patches(scores, 7, 100)
    covered = np.zeros((31, 39), int)
    for patch in found:
        covered[patch.slices] += 1
    assert covered.max() == 1
    assert [patch.score for patch in found] == sorted((patch.score for patch in found), reverse=True)
    # no further patch would fit
    free = loop(lambda a, _: not a.any(), covered, covered, 7)
    assert not free.any()


def test_ties_go_to_the_first_in_reading_order():
    assert [(p.row, p.column) for p in top_patches(np.zeros((5, 5)), 2, 4)] == [(0, 0), (0, 2), (0, 4), (2, 0)]
    assert [(p.row, p.column) for p in top_patches(np.zeros((2, 2)), 2, 9, overlap=True)] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]


@pytest.mark.parametrize(
    ("height", "width", "patch"), [(12, 15, 4), (12, 15, 5), (9, 9, 9), (7, 10, 6), (4, 5, 1), (10, 3, 2)]
)
def test_heat_map_takes_mean_or_maximum_of_the_patches_that_cover_a_pixel(height, width, patch):
    scores = np.random.default_rng(4).random((height - patch + 1, width - patch + 1))
    covering = [[[] for _ in range(width)] for _ in range(height)]
    for (row, column), score in np.ndenumerate(scores):
        for r in range(row, row + patch):
            for c in range(column, column + patch):
                covering[r][c].append(score)
    for reduce, of in (("mean", np.mean), ("max", np.max)):
        expected = np.array([[of(values) for values in line] for line in covering])
        np.testing.assert_allclose(heat_map(scores, patch, reduce), expected, rtol=0, atol=1e-12)


def test_heat_map_is_hottest_where_the_anomaly_was_put():
    rng = np.random.default_rng(5)
    reconstruction = rng.integers(60, 100, (90, 70)).astype(np.uint8)
    image, anomaly = reconstruction.copy(), disc((90, 70), (60, 20), 7)
    image[anomaly] = 230
    _, maps = score_anomaly(image, reconstruction, patch=16)
    for scores in (maps.mse, maps.wd):
        heat = heat_map(scores, 16)
        assert heat.shape == image.shape
        assert anomaly[np.unravel_index(heat.argmax(), heat.shape)]


def anomalous(count: int, hit: int) -> tuple[list[Patch], list[np.ndarray]]:
    mask = np.zeros((20, 20), bool)
    mask[:5, :5] = True
    return [Patch(0 if number < hit else 10, 0, 5, 1.0) for number in range(count)], [mask] * count


def test_localisation_rate_with_its_exact_interval_and_chance():
    found = localisation_rate(*anomalous(20, 14))
    expected = stats.binomtest(14, 20).proportion_ci(0.95, "exact")
    assert found.rate.value == 0.7
    assert (found.rate.low, found.rate.high) == pytest.approx((expected.low, expected.high))
    assert (found.rate.n_reference, found.rate.n_samples) == (20, 20)
    # a patch of 5 hits from the 25 offsets up to (4, 4), of 16 x 16
    assert found.chance == 25 / 256
    assert found.hits == ((True,),) * 14 + ((False,),) * 6


def test_a_hit_takes_the_last_pixel_and_as_many_as_asked_for():
    mask = np.zeros((10, 12), np.uint8)
    mask[4, 4:6] = 255
    corners = [Patch(2, 1, 3, 1.0), Patch(2, 2, 3, 1.0), Patch(4, 3, 3, 1.0), Patch(5, 4, 3, 1.0), Patch(4, 6, 3, 1.0)]
    hits = [localisation_rate([corner], [mask]).hits[0][0] for corner in corners]
    assert hits == [False, True, True, False, False]
    hits = [localisation_rate([corner], [mask], min_pixels=2).hits[0][0] for corner in corners]
    assert hits == [False, False, True, False, False]


def test_patches_of_one_image_or_patient_do_not_count_as_independent():
    patches, masks = anomalous(40, 20)
    single = localisation_rate(patches, masks)
    patients = np.arange(40) // 5  # eight patients, four of them hit
    by_patient = localisation_rate(patches, masks, patients)
    assert by_patient.rate.high - by_patient.rate.low > 1.5 * (single.rate.high - single.rate.low)
    several = localisation_rate([(patch,) * 5 for patch in patches[::5]], masks[::5])
    assert several.rate.value == 0.5
    assert (several.rate.n_reference, several.rate.n_samples) == (8, 40)
    assert (several.rate.low, several.rate.high) == (by_patient.rate.low, by_patient.rate.high)
    all_hit = localisation_rate(*anomalous(40, 40), patients)
    assert (all_hit.rate.low, all_hit.rate.high) == pytest.approx((0.025 ** (1 / 8), 1))


IMAGE = np.zeros((20, 30), np.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: score_anomaly(IMAGE, IMAGE.T), r"one shape, got \(20, 30\) and \(30, 20\)"),
        (lambda: score_anomaly(IMAGE, IMAGE, patch=21), r"patch must be between 1 and .* got 21 for \(20, 30\)"),
        (lambda: mse_by_patch(IMAGE, IMAGE, 21), "patch must be between"),
        (lambda: wasserstein_by_patch(IMAGE, IMAGE, 0), "patch must be between"),
        (lambda: score_anomaly(IMAGE, IMAGE / 255, patch=4), "of one kind, got uint8 and float64"),
        (lambda: score_anomaly(IMAGE.astype(int), IMAGE, patch=4), "must be uint8 or floating point"),
        (lambda: score_anomaly(IMAGE, IMAGE - np.nan, patch=4), "reconstruction must be finite, got 600 NaN"),
        (lambda: score_anomaly(IMAGE - 1.0, IMAGE / 255, patch=4), r"image must lie in \[0, 1\], got -1 to -1"),
        (lambda: score_anomaly(IMAGE + 2.0, IMAGE / 255, patch=4), r"got 2 to 2"),
        (lambda: score_anomaly(np.zeros((3, 20, 20)), np.zeros((3, 20, 20))), r"must be grey, .* got shape \(3, 20"),
        (lambda: score_anomaly(IMAGE[:0], IMAGE[:0]), "must be grey"),
        (lambda: score_anomaly(IMAGE, IMAGE, patch=4, body=np.ones((3, 3))), "body must have the image's shape"),
        (lambda: score_anomaly(IMAGE, IMAGE, patch=4, body=np.full((20, 30), np.nan)), "boolean or finite"),
        (lambda: score_anomaly(IMAGE, IMAGE, patch=4, body_threshold=1), "body's threshold must be"),
        (lambda: wasserstein_distance(IMAGE, IMAGE, IMAGE), "empty mask"),
        (lambda: top_patches(IMAGE / 1.0, 4, 0), "count must be at least 1"),
        (lambda: top_patches(IMAGE + np.inf, 4), "map of patches must be finite"),
        (lambda: top_patches(IMAGE, 0), "patch must be at least 1"),
        (lambda: heat_map(IMAGE, 4, "median"), "reduce must be mean or max, got 'median'"),
        (lambda: localisation_rate([], []), "as many, at least 1, got 0 and 0"),
        (lambda: localisation_rate(anomalous(3, 1)[0], anomalous(2, 1)[1]), "got 3 and 2"),
        (lambda: localisation_rate(*anomalous(3, 1), [1, 2]), "for each of the 3 images, got 2"),
        (lambda: localisation_rate(*anomalous(3, 1), min_pixels=0), "min_pixels must be"),
        (lambda: localisation_rate([Patch(0, 0, 5, 1.0)], [IMAGE]), "got no anomalous pixel in number 0"),
        (lambda: localisation_rate([()], [IMAGE + 1]), "got no patch in number 0"),
        (lambda: localisation_rate([Patch(16, 0, 5, 1.0)], [IMAGE + 1]), r"got one at \(16, 0\) of side 5"),
        (lambda: localisation_rate([Patch(-1, 0, 5, 1.0)], [IMAGE + 1]), r"got one at \(-1, 0\)"),
        (lambda: localisation_rate([Patch(0, 0, 50, 1.0)], [IMAGE + 1]), "patch must be between"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_rounding_just_outside_the_range_is_forgiven():
    image = np.linspace(-5e-7, 1 + 5e-7, 400, dtype=np.float64).reshape(20, 20)
    scores, _ = score_anomaly(image, np.clip(image, 0, 1), patch=4)
    assert scores.mse_full == scores.wd_full == 0


def test_anomaly_scores_need_no_torch():
    code = "import sys, medgen.metrics.anomaly; sys.exit('torch' in sys.modules or 'monai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
