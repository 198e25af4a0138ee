"""Planted copies must be found, with their transform; independent images, constant ones and follow-ups must not."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist
from scipy.stats import gumbel_r

from medgen.data.phantom import make_thorax
from medgen.errors import UserError
from medgen.metrics import memorisation
from medgen.metrics.memorisation import Calibration, audit_features, audit_memorisation, draw_worst_pairs

DATA = Path(__file__).parents[2].parent / "shared" / "data"


def body(seed: int, size: int = 64, width: int | None = None) -> np.ndarray:
    """(1, H, W): coarse structure that all share, as anatomy is, and texture of their own."""
    width = width or size
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : width * 1j]
    shared = np.exp(-((np.abs(x) - 0.4) ** 2) / 0.05 - y**2 / 0.5)
    rng = np.random.default_rng(seed)
    texture = sum(weight * gaussian_filter(rng.normal(size=(size, width)), s) * s for s, weight in ((1.5, 1), (4, 1)))
    return np.clip(0.2 + 0.5 * shared + 0.04 * texture, 0, 1).astype(np.float32)[None]


def bodies(first: int, count: int, size: int = 64) -> list[np.ndarray]:
    return [body(seed, size) for seed in range(first, first + count)]


def jpeg(image: np.ndarray, quality: int = 50) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(np.round(image[0] * 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file), np.float32)[None] / 255


def shifted(image: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """Moved down and right; what comes in repeats the edge."""
    reach = max(abs(dy), abs(dx))
    _, H, W = image.shape
    padded = np.pad(image, ((0, 0), (reach, reach), (reach, reach)), mode="edge")
    return padded[:, reach - dy : reach - dy + H, reach - dx : reach - dx + W]


PLANTS = {  # how it is copied, and the transform to be reported
    "exact": (lambda x: x.copy(), ("none", (0, 0))),
    "shifted": (lambda x: shifted(x, 2, -2), ("none", (2, -2))),
    "recompressed": (jpeg, ("none", (0, 0))),
    "flipped": (lambda x: x[:, :, ::-1].copy(), ("horizontal", (0, 0))),
    "flipped, shifted and recompressed": (lambda x: jpeg(shifted(x[:, :, ::-1], -1, 2)), ("horizontal", (-1, 2))),
    "darker": (lambda x: 0.7 * x + 0.02, ("none", (0, 0))),
    "gamma": (lambda x: x**1.5, ("none", (0, 0))),
    "blurred": (lambda x: gaussian_filter(x, (0, 1, 1)), ("none", (0, 0))),
}
SOURCES = (3, 17, 42)  # training images that are copied


def plant(training: list[np.ndarray]) -> list[np.ndarray]:
    return [np.asarray(copy(training[i]), np.float32) for copy, _ in PLANTS.values() for i in SOURCES]


def assert_plants_are_found(audit: memorisation.MemorisationAudit, kind: str) -> None:
    first = list(PLANTS).index(kind) * len(SOURCES)
    matches = audit.matches[first : first + len(SOURCES)]
    assert [match.training for match in matches] == list(SOURCES)
    assert [(match.flip, match.shift) for match in matches] == [PLANTS[kind][1]] * len(SOURCES)
    assert all(match.flagged for match in matches)
    assert all(match.p_value < audit.alpha / len(audit.matches) for match in matches)


@pytest.fixture(scope="module")
def training() -> list[np.ndarray]:
    return bodies(0, 60)


@pytest.fixture(scope="module")
def held_out() -> list[np.ndarray]:
    return bodies(1000, 40)


@pytest.fixture(scope="module")
def synthetic(training, held_out) -> memorisation.MemorisationAudit:
    return audit_memorisation([*plant(training), *bodies(2000, 16)], training, held_out)


@pytest.fixture(scope="module")
def phantoms() -> memorisation.MemorisationAudit:
    images = [make_thorax(np.random.default_rng(seed), 128).image[None] for seed in range(100)]
    return audit_memorisation([*plant(images[:50]), *images[50:60]], images[:50], images[60:])


# ------------------------------------------------------------------------------------------------------ what it is for


@pytest.mark.parametrize("kind", PLANTS)
def test_planted_copy_is_flagged_with_its_transform(synthetic, kind):
    assert_plants_are_found(synthetic, kind)


@pytest.mark.parametrize("kind", PLANTS)
def test_planted_copy_of_a_phantom_is_flagged_with_its_transform(phantoms, kind):
    assert_plants_are_found(phantoms, kind)


@pytest.mark.parametrize("audit", ["synthetic", "phantoms"])
def test_independent_images_are_not_flagged(audit, request):
    audit = request.getfixturevalue(audit)

    assert not any(match.flagged for match in audit.matches[len(PLANTS) * len(SOURCES) :])
    assert audit.copied_training_images == len(SOURCES)


def test_strangers_that_correlate_pixel_by_pixel_are_not_similar(training, held_out, synthetic):
    pixels = np.corrcoef([image.ravel() for image in (*training, *held_out)])[:60, 60:]

    assert pixels.max() > 0.9
    assert max(synthetic.calibration.scores) < 0.8


def test_share_has_the_exact_binomial_interval(training, held_out):
    strangers = bodies(2000, 25)

    audit = audit_memorisation(strangers, training, held_out)

    assert audit.share == 0
    assert audit.share_low == 0
    assert audit.share_high == pytest.approx(1 - 0.025 ** (1 / 25))  # Clopper and Pearson 1934 at no success


def test_worst_pairs_come_first(synthetic):
    worst = synthetic.worst()

    assert [match.p_value for match in worst] == sorted(match.p_value for match in worst)
    assert synthetic.flagged == tuple(match.sample for match in worst[: len(PLANTS) * len(SOURCES)])


@pytest.mark.parametrize("shift", [(0, 0), (2, -2), (3, -11), (-1, 5)])
def test_shift_of_a_large_image_is_reported_in_its_own_pixels(shift):
    images = [gaussian_filter(image, (0, 2, 2)) for image in bodies(0, 22, size=320)]  # compared at 128

    audit = audit_memorisation([jpeg(shifted(images[5][:, :, ::-1], *shift))], images)

    assert (audit.matches[0].training, audit.matches[0].flip) == (5, "horizontal")
    assert audit.matches[0].shift == shift
    assert audit.matches[0].flagged


def test_vertical_flip_is_found_only_when_asked_for(training, held_out):
    sample = [np.ascontiguousarray(training[8][:, ::-1]), np.ascontiguousarray(training[9][:, ::-1, ::-1])]

    blind = audit_memorisation(sample, training, held_out)
    seeing = audit_memorisation(sample, training, held_out, vertical_flips=True)

    assert not blind.flagged
    assert [(match.training, match.flip) for match in seeing.matches] == [(8, "vertical"), (9, "both")]
    assert sorted(seeing.flagged) == [0, 1]


def test_copy_of_an_image_with_many_near_duplicates_is_flagged(training, held_out):
    crowded = [*training, *(jpeg(training[4], quality) for quality in range(60, 96, 3))]

    audit = audit_memorisation([training[4]], crowded, held_out)

    assert audit.matches[0].training == 4
    assert audit.matches[0].flagged


def test_smaller_samples_of_the_same_aspect_are_compared():
    training = [gaussian_filter(image, (0, 1, 1)) for image in bodies(0, 30, size=128)]
    small = training[7].reshape(1, 64, 2, 64, 2).mean((2, 4))

    audit = audit_memorisation([small], training)

    assert audit.matches[0].training == 7
    assert audit.matches[0].flagged
    assert audit.settings["compared_at"] == [64, 64]


@pytest.mark.parametrize(("height", "width"), [(48, 72), (120, 40), (20, 140)])
def test_oblong_images_are_compared_whole(height, width):
    training = [body(seed, height, width) for seed in range(40)]

    audit = audit_memorisation(
        [shifted(training[6], 1, 2), body(500, height, width)], training, max_shift=0.2 if height == 20 else 1 / 16
    )

    assert (audit.matches[0].training, audit.matches[0].shift) == (6, (1, 2))
    assert audit.flagged == (0,)


def test_colour_is_compared_by_luminance(training, held_out):
    tint = np.array([1.0, 0.6, 0.4], np.float32)[:, None, None]
    coloured = [image * tint for image in training]

    audit = audit_memorisation([training[11], coloured[12]], coloured, held_out)

    assert [match.training for match in audit.matches] == [11, 12]
    assert sorted(audit.flagged) == [0, 1]


def test_result_does_not_depend_on_the_run(training, held_out, synthetic):
    again = audit_memorisation([*plant(training), *bodies(2000, 16)], training, held_out)

    assert again.to_dict() == synthetic.to_dict()


# ---------------------------------------------------------------------------------------------------------- odd images


def test_constant_images_are_counted_and_leave_no_nan(training, held_out):
    grey = np.full((1, 64, 64), 0.5, np.float32)

    audit = audit_memorisation([grey, training[2]], [grey, *training, grey], [grey, *held_out])

    assert audit.constant == {"samples": 1, "training": 2, "held_out": 1}
    assert (audit.matches[0].training, audit.matches[0].similarity, audit.matches[0].flagged) == (None, None, False)
    assert (audit.matches[1].training, audit.matches[1].flagged) == (3, True)
    assert audit.share == 1.0  # of the one that can be compared
    assert json.loads(json.dumps(audit.to_dict(), allow_nan=False))["matches"][0]["similarity"] is None
    assert any("constant" in note for note in audit.notes)


def test_only_constant_samples_have_no_share(training):
    audit = audit_memorisation([np.zeros((1, 64, 64), np.float32)] * 2, training)

    assert (audit.share, audit.share_low, audit.share_high) == (None, None, None)
    json.dumps(audit.to_dict(), allow_nan=False)


def test_repeated_training_images_are_found_by_the_first_and_counted(training, held_out):
    repeated = [*training, training[5], training[5], training[20]]

    audit = audit_memorisation([training[5], training[30]], repeated, held_out)

    assert audit.n_training_duplicates == 3
    assert [(match.training, match.training_copies) for match in audit.matches] == [(5, 3), (30, 1)]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (np.full((1, 64, 64), np.nan), r"samples\[0\] must be finite"),
        (body(0) * 255, r"samples\[0\] must be in \[0, 1\]"),
        (body(0) * 2 - 1, r"samples\[0\] must be in \[0, 1\]"),
        (body(0)[0], r"must be \(C, H, W\)"),
        (np.zeros((2, 64, 64)), r"must be \(C, H, W\) with 1 or 3"),
        (np.zeros((1, 8, 8)), "at least 16 pixels"),
        (body(0, 64, 80), "must share one aspect"),
    ],
)
def test_unusable_sample_is_refused(sample, message, training):
    with pytest.raises(UserError, match=message):
        audit_memorisation([sample], training)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_shift": 0.5}, "max_shift"),
        ({"candidates": 0}, "candidates"),
        ({"alpha": 0.0}, "alpha"),
        ({"level": 95}, "level"),
        ({"training_patients": ["a"]}, "one patient per image"),
        ({"features": [np.zeros((1, 3)), np.zeros((4, 3))]}, "a row per image"),
    ],
)
def test_setting_out_of_range_is_refused(settings, message, training):
    with pytest.raises(UserError, match=message):
        audit_memorisation([training[0]], training, **settings)


def test_empty_or_structureless_sets_are_refused(training):
    with pytest.raises(UserError, match="at least one image of samples"):
        audit_memorisation([], training)
    with pytest.raises(UserError, match="at least one image of training"):
        audit_memorisation(training, [])
    with pytest.raises(UserError, match="all training images are constant"):
        audit_memorisation(training[:1], [np.zeros((1, 64, 64), np.float32)])


# --------------------------------------------------------------------------------------------------------- calibration


def test_few_training_images_still_show_exact_copies(training):
    audit = audit_memorisation([training[1], body(900)], training[:5])

    assert audit.calibration.source == "none"
    assert audit.threshold == memorisation.UNCALIBRATED_THRESHOLD
    assert [match.flagged for match in audit.matches] == [True, False]
    assert all(match.p_value is None for match in audit.matches)
    assert any("near-exact copies" in note for note in audit.notes)
    json.dumps(audit.to_dict(), allow_nan=False)


def test_a_single_training_image_can_be_compared_with(training):
    audit = audit_memorisation([training[0], training[1]], training[:1])

    assert [match.flagged for match in audit.matches] == [True, False]


def test_training_images_stand_in_for_few_held_out_ones(training, held_out):
    audit = audit_memorisation([training[0]], training, held_out[:5])

    assert (audit.calibration.source, audit.calibration.n) == ("training", len(training))
    assert any("Only 5 held-out images" in note for note in audit.notes)


def test_duplicates_among_the_held_out_do_not_raise_the_threshold(training, held_out, synthetic):
    audit = audit_memorisation(
        [jpeg(training[9])], training, [jpeg(training[0]), *held_out, shifted(training[1], 1, 1)]
    )

    assert audit.calibration.outliers == (0, len(held_out) + 1)
    assert audit.calibration.scores == synthetic.calibration.scores
    assert audit.flagged == (0,)
    assert any("too similar" in note for note in audit.notes)


def test_held_out_images_of_training_patients_or_pixels_are_not_calibrated_with(training, held_out):
    patients = [f"t{i}" for i in range(len(training))]
    others = ["t3", "t4", *(f"h{i}" for i in range(len(held_out) - 2))]

    by_patient = audit_memorisation(
        [body(900)], training, held_out, training_patients=patients, held_out_patients=others
    )
    by_pixels = audit_memorisation([body(900)], training, [training[3], *held_out])

    assert (by_patient.n_leaked, by_patient.calibration.n) == (2, len(held_out) - 2)
    assert (by_pixels.n_leaked, by_pixels.calibration.n) == (1, len(held_out))
    assert any("no held-out images" in note for note in by_patient.notes)


def test_numbers_and_text_name_the_same_patient(training, held_out):
    numbers, text = list(range(len(training))), ["3", "4", *(f"h{i}" for i in range(len(held_out) - 2))]

    audit = audit_memorisation([body(900)], training, held_out, training_patients=numbers, held_out_patients=text)

    assert audit.n_leaked == 2


def test_unknown_patients_are_told_as_what_they_may_hide(training, held_out):
    trained, others = [f"t{i}" for i in range(len(training))], [f"h{i}" for i in range(len(held_out))]

    def note(*sets, **patients):
        return [note for note in audit_memorisation([body(900)], *sets, **patients).notes if "unknown" in note]

    assert "patients of the training and held-out images are unknown" in note(training, held_out)[0]
    assert "of the training images" in note(training, held_out, held_out_patients=others)[0]
    assert "of the held-out images" in note(training, held_out, training_patients=trained)[0]
    assert "of the training images" in note(training)[0]
    assert "may raise the limit and hide copies" in note(training)[0]
    assert not note(training, held_out, training_patients=trained, held_out_patients=others)
    assert not note(training, training_patients=trained)


def test_calibration_takes_one_image_a_patient_and_compares_it_with_other_patients(training):
    class WithPatients(list):
        patients = tuple(np.repeat(np.arange(30), 2))

    pairs = WithPatients(variant for image in training[:30] for variant in (image, shifted(image, 1, 0)))

    known = audit_memorisation([body(900)], pairs)
    unknown = audit_memorisation([body(900)], list(pairs))

    assert known.calibration.n == 30
    assert max(known.calibration.scores) < 0.8
    assert min(unknown.calibration.scores) > 0.9  # each has its double: without patients nobody can tell


def test_patients_who_have_a_near_double_are_still_copies_of_one_image(training, held_out):
    pairs = [variant for image in training[:30] for variant in (image, jpeg(image), jpeg(image, 80), jpeg(image, 70))]
    patients = [i // 4 for i in range(len(pairs))]

    audit = audit_memorisation([pairs[40]], pairs, held_out, training_patients=patients)

    # the three other versions are the patient's own and no runners-up
    assert audit.matches[0].training == 40
    assert audit.matches[0].excess > audit.excess_threshold


def test_fit_equals_scipys_maximum_likelihood():
    scores = np.random.default_rng(0).gumbel(0.4, 0.07, 200)

    location, scale = memorisation._fit_gumbel(scores)

    assert (location, scale) == pytest.approx(gumbel_r.fit(scores), rel=1e-3)


def test_fit_to_the_lower_part_does_not_see_the_upper():
    scores = np.sort(np.random.default_rng(0).gumbel(0.4, 0.07, 200))
    spoilt = np.concatenate([scores[:180], np.full(20, 5.0)])

    fitted = memorisation._fit_gumbel(scores, censored=20)

    assert fitted == pytest.approx((0.4, 0.07), rel=0.1)
    assert memorisation._fit_gumbel(spoilt, censored=20) == fitted


def test_p_values_are_those_of_the_distribution_when_the_fit_is_certain():
    scores = np.array([0.3, 0.5, 0.8, 1.2])
    certain = Calibration("held_out", tuple([0.0] * 10**6), 0.4, 0.07)
    uncertain = Calibration("held_out", tuple([0.0] * 20), 0.4, 0.07)

    assert certain.p_values(scores) == pytest.approx(gumbel_r.sf(scores, 0.4, 0.07), rel=0.05)
    assert (uncertain.p_values(scores) > certain.p_values(scores)).all()
    assert uncertain.p_values(uncertain.quantile(1e-5)) == pytest.approx(1e-5, rel=1e-6)


@pytest.mark.parametrize("n", [20, 100])
def test_false_alarms_are_rarer_than_alpha_whatever_the_size_of_the_calibration(n):
    rng = np.random.default_rng(0)
    alarms, runs = 0, 300

    for _ in range(runs):
        scores = rng.gumbel(0.4, 0.07, n)
        (calibration,) = memorisation._calibrate("held_out", list(range(n)), [(scores, scores)], 0.05)
        alarms += rng.gumbel(0.4, 0.07, 50).max() >= calibration.quantile(0.05 / 50)

    assert alarms / runs < 0.05


# -------------------------------------------------------------------------------------------------------------- search


def test_cross_correlation_equals_the_sum_over_the_overlap():
    rng = np.random.default_rng(0)
    query = gaussian_filter(rng.normal(size=(20, 24)), 2)
    other = gaussian_filter(rng.normal(size=(20, 24)), 2)
    moved = np.roll(query, (2, -3), (0, 1))

    values, shifts = memorisation._cross_correlate(query, np.stack([other, moved]), 4)

    expected = []
    for image in (other, moved):
        for dy in range(-4, 5):
            for dx in range(-4, 5):
                a = query[max(dy, 0) : 20 + min(dy, 0), max(dx, 0) : 24 + min(dx, 0)]
                b = image[max(-dy, 0) : 20 + min(-dy, 0), max(-dx, 0) : 24 + min(-dx, 0)]
                expected.append((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
    best = np.reshape(expected, (2, -1)).max(1)
    assert values[1] == pytest.approx(best[1], abs=0.01)
    assert (values >= best - 1e-9).all()  # between pixels it can only be higher
    assert shifts[1] == pytest.approx([-2, 3], abs=0.13)


def test_images_are_read_one_at_a_time():
    class Generated:
        def __init__(self, first, count):
            self.first, self.count = first, count

        def __len__(self):
            return self.count

        def __getitem__(self, i):
            rng = np.random.default_rng(self.first + i)
            return np.kron(rng.random((64, 64)), np.ones((4, 4))).astype(np.float32)[None]  # 256 KiB

    tracemalloc.start()
    try:
        audit_memorisation(Generated(0, 5), Generated(100, 300), max_calibration=25)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 0.5 * 300 * 256 * 1024


def test_descriptors_that_are_not_kept_are_made_again(training, held_out, monkeypatch):
    samples = [jpeg(training[3]), body(900)]
    kept = audit_memorisation(samples, training, held_out)
    monkeypatch.setattr(memorisation, "MAX_KEPT_BYTES", 0)

    again = audit_memorisation(samples, training, held_out)

    assert again.to_dict() == kept.to_dict()


def test_import_needs_neither_torch_nor_monai():
    code = "import sys, medgen.metrics.memorisation; print({'torch', 'monai'} & set(sys.modules))"

    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert printed.strip() == "set()"


# ------------------------------------------------------------------------------------------------------------ features


@pytest.fixture(scope="module")
def features() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(6, 12)) * 10.0 ** rng.integers(-3, 4, 12)
    return tuple(rng.normal(size=(n, 6)) @ mixing + 100 for n in (50, 200, 80))


def test_feature_distances_are_those_to_the_standardised_training_set(features):
    samples, training, held_out = features
    mean, std = training.mean(0), training.std(0)
    expected = cdist((samples - mean) / std, (training - mean) / std)

    audit = audit_features(samples, training, held_out)

    assert audit.nearest == tuple(expected.argmin(1))
    assert audit.distances == pytest.approx(expected.min(1), rel=1e-9)
    reached = cdist((held_out - mean) / std, (training - mean) / std).min(1)
    assert audit.ratios == pytest.approx(expected.min(1) / np.median(reached), rel=1e-9)


def test_independent_features_are_neither_flagged_nor_closer(features):
    audit = audit_features(*features)

    assert audit.flagged == ()
    assert 0.35 < audit.closer < 0.65
    assert audit.closer_p_value > 0.01


def test_copied_features_are_flagged_and_their_nearness_shows(features):
    samples, training, held_out = features
    copied = np.concatenate([training[[7, 70]], samples])

    audit = audit_features(copied, training, held_out)
    near = audit_features(training[:50] + 0.05 * (samples - samples.mean(0)), training, held_out)

    assert audit.flagged == (0, 1)
    assert audit.nearest[:2] == (7, 70)
    assert audit.distances[:2] == (0.0, 0.0)
    assert audit.p_values[0] < 1e-6
    assert near.closer > 0.95
    assert near.closer_p_value < 1e-6


def test_constant_features_are_left_out(features):
    wider = [np.concatenate([array, np.full((len(array), 2), 3.7)], 1) for array in features]

    audit = audit_features(*wider)

    assert (audit.n_features, audit.n_constant) == (12, 2)
    assert audit.distances == pytest.approx(audit_features(*features).distances)


def test_features_without_held_out_ones_leave_out_the_patient(features):
    samples, training, _ = features
    doubled = np.repeat(training, 2, 0)

    known = audit_features(samples, doubled, training_patients=np.repeat(np.arange(len(training)), 2))
    unknown = audit_features(samples, doubled)

    assert (known.calibration.source, known.calibration.n) == ("training", len(training))
    assert min(known.calibration.scores) > 0
    assert max(unknown.calibration.scores) == 0


def test_few_features_give_distances_without_p_values(features):
    audit = audit_features(features[0], features[1][:10])

    assert len(audit.distances) == 50
    assert (audit.p_values, audit.threshold, audit.flagged) == (None, None, ())
    json.dumps(audit.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros((4, 5)), "same number of columns"),
        (np.full((4, 12), np.nan), "must be finite, got NaN or infinity in 4 of 4"),
        (np.zeros(12), r"array \(N, D\)"),
        (np.zeros((0, 12)), r"array \(N, D\)"),
    ],
)
def test_unusable_features_are_refused(samples, message, features):
    with pytest.raises(UserError, match=message):
        audit_features(samples, features[1], features[2])


def test_features_of_unknown_patients_are_told_and_identifiers_compared_as_text(features):
    samples, training, held_out = features
    numbers, text = list(range(len(training))), [str(i) for i in range(5, 5 + len(held_out))]

    unknown = audit_features(samples, training, held_out)
    alone = audit_features(samples, training)
    known = audit_features(samples, training, held_out, training_patients=numbers, held_out_patients=text)

    assert any("training and held-out images are unknown" in note for note in unknown.notes)
    assert any("compared with all others" in note for note in alone.notes)
    assert not any("unknown" in note for note in known.notes)
    assert any("share their patient with the training set" in note for note in known.notes)


def test_audit_carries_the_features_it_is_given(training, held_out, features):
    samples, of_training, of_held_out = features[0][:2], features[1][:60], features[2][:40]

    audit = audit_memorisation([body(900), body(901)], training, held_out, features=(samples, of_training, of_held_out))

    assert audit.features == audit_features(samples, of_training, of_held_out)
    assert audit.to_dict()["features"]["distances"] == list(audit.features.distances)


# ------------------------------------------------------------------------------------------------------------- picture


def test_picture_shows_sample_above_aligned_training_above_difference(training, held_out, tmp_path):
    samples = [body(900), shifted(training[4], 0, 3)[:, :, ::-1].copy()]
    audit = audit_memorisation(samples, training, held_out)

    figure = draw_worst_pairs(audit, samples, training, count=1, path=tmp_path / "pairs" / "worst.png")

    sample, aligned, difference = (np.asarray(ax.images[0].get_array()) for ax in figure.axes)
    inside = np.s_[:, :-3]  # the copy was flipped, so the training image moves left
    np.testing.assert_array_equal(sample, samples[1][0])
    np.testing.assert_allclose(aligned[inside], samples[1][0][inside], atol=1e-6)
    np.testing.assert_allclose(difference[inside], 0, atol=1e-4)
    assert (difference[:, -3:] == 1).all()
    assert figure.axes[0].get_title().startswith("sample 1\nFLAGGED\n")
    assert "training 4\nflip horizontal, shift (0, -3)" in figure.axes[1].get_title()
    with Image.open(tmp_path / "pairs" / "worst.png") as picture:
        assert np.ptp(np.asarray(picture.convert("L"))) > 100


def test_picture_of_grey_samples_beside_a_coloured_training_set(training, held_out):
    coloured = [np.repeat(image, 3, 0) for image in training]
    audit = audit_memorisation([training[0]], coloured, held_out)

    figure = draw_worst_pairs(audit, [training[0]], coloured)

    np.testing.assert_allclose(figure.axes[2].images[0].get_array(), 0, atol=1e-4)


def test_picture_of_other_sets_or_of_no_pair_is_refused(training):
    grey = [np.zeros((1, 64, 64), np.float32)]
    audit = audit_memorisation(grey, training)

    with pytest.raises(UserError, match="there is no pair"):
        draw_worst_pairs(audit, grey, training)
    with pytest.raises(UserError, match="the audit is of 1 samples and 60"):
        draw_worst_pairs(audit, grey, training[:10])


# ---------------------------------------------------------------------------------------------------------- real images


@pytest.fixture(scope="module")
def radiographs() -> tuple[list[np.ndarray], np.ndarray]:
    """ChestX-ray14 at 128 pixels, and the patient of each."""
    path = DATA / "nih_cxr512.zip"
    if not path.exists():
        pytest.skip("real images (../shared/data/nih_cxr512.zip) are absent")
    images, patients = [], []
    with zipfile.ZipFile(path) as archive:
        names = {Path(name).name: name for name in archive.namelist()}
        table = io.TextIOWrapper(archive.open(names["Data_Entry_2017.csv"]), "utf-8")
        for row in csv.DictReader(table):
            with Image.open(archive.open(names[row["Image Index"]])) as image:
                small = image.convert("L").resize((128, 128), Image.Resampling.BOX)
            images.append(np.asarray(small, np.float32)[None] / 255)
            patients.append(row["Patient ID"])
    return images, np.array(patients)


@pytest.fixture(scope="module")
def split(radiographs) -> dict[str, list[int]]:
    """120 patients to train on, the others half to calibrate with and half as independent samples."""
    patients = np.random.default_rng(0).permutation(np.unique(radiographs[1]))
    groups = {"training": patients[:120], "held_out": patients[120:166], "strangers": patients[166:]}
    return {name: np.flatnonzero(np.isin(radiographs[1], group)).tolist() for name, group in groups.items()}


@pytest.fixture(scope="module")
def real(radiographs, split) -> memorisation.MemorisationAudit:
    images, patients = radiographs
    training = [images[i] for i in split["training"]]
    return audit_memorisation(
        [*plant(training), *(images[i] for i in split["strangers"])],
        training,
        [images[i] for i in split["held_out"]],
        training_patients=patients[split["training"]],
        held_out_patients=patients[split["held_out"]],
    )


@pytest.mark.parametrize("kind", PLANTS)
def test_planted_copy_of_a_radiograph_is_flagged_with_its_transform(real, kind):
    assert_plants_are_found(real, kind)


def test_radiographs_of_other_patients_are_not_flagged(real, split):
    assert real.calibration.n == 46  # patients, not images
    assert sorted(real.flagged) == list(range(len(PLANTS) * len(SOURCES)))
    assert len(split["strangers"]) > 40


def test_follow_ups_of_training_patients_are_no_copies(radiographs):
    images, patients = radiographs
    first = [np.flatnonzero(patients == patient) for patient in np.unique(patients)]
    samples = [group[0] for group in first if len(group) > 1]
    singles = [group[0] for group in first if len(group) == 1]
    held_out, training = singles[:80], [*singles[80:], *(i for group in first if len(group) > 1 for i in group[1:])]

    audit = audit_memorisation(
        [images[i] for i in samples],
        [images[i] for i in training],
        [images[i] for i in held_out],
        training_patients=patients[training],
        held_out_patients=patients[held_out],
    )

    own = [patients[training[match.training]] == patients[i] for match, i in zip(audit.matches, samples, strict=True)]
    assert len(samples) == 48
    assert 8 <= sum(own) <= 24  # more often the nearest than chance would have it, yet mostly not
    # two exposures of patient 3426 between which nobody moved
    assert {patients[samples[i]] for i in audit.flagged} <= {"3426"}
    assert patients[samples[audit.worst()[0].sample]] == "3426"
    assert audit.worst()[0].p_value < 1e-3
    assert sum(match.p_value < 0.01 for match in audit.matches) <= 4


def test_small_radiographs_without_patients_behave_alike():
    path = DATA / "mednist64.zip"
    if not path.exists():
        pytest.skip("real images (../shared/data/mednist64.zip) are absent")
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if "/CXR/" in f"/{name}" and name.endswith(".jpeg"))[:300]
        images = [np.asarray(Image.open(archive.open(name)).convert("L"), np.float32)[None] / 255 for name in names]

    audit = audit_memorisation([*plant(images[:200]), *images[280:]], images[:200], images[200:280])

    for kind in PLANTS:
        assert_plants_are_found(audit, kind)
    assert len(audit.flagged) == len(PLANTS) * len(SOURCES)
