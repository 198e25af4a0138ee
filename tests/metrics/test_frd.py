"""Fréchet radiomic distance against frd-score 1.0.1; ``tests/assets/make_radiomics_golden.py`` made the values."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from medgen.errors import UserError
from medgen.metrics.frd import FRD_VERSIONS, feature_table, frd_score, normalise_features
from medgen.metrics.protocols import PROTOCOLS

with np.load(Path(__file__).parents[1] / "assets" / "radiomics_frd.npz", allow_pickle=False) as file:
    GOLDEN = dict(file)
NAMES = tuple(f"f{i}" for i in range(24))


@pytest.fixture
def sets() -> tuple[np.ndarray, np.ndarray]:
    """(50, 3) and (40, 3) features with different means."""
    rng = np.random.default_rng(0)
    return rng.normal([0, 5, -3], [1, 2, 4], (50, 3)), rng.normal([0, 9, -3], [1, 2, 8], (40, 3))


@pytest.mark.parametrize("version", ["v0", "v1"])
def test_score_equals_frd_score(version):
    assert frd_score(GOLDEN["reference"], GOLDEN["samples"], f"frd_{version}") == pytest.approx(
        float(GOLDEN[version]), rel=1e-6
    )


def test_every_radiomics_protocol_has_a_version():
    assert {name for name, row in PROTOCOLS.items() if row.extractor == "radiomics"} == set(FRD_VERSIONS)


def test_z_score_is_by_the_reference_alone(sets):
    normal = normalise_features(*sets, ("a", "b", "c"), "frd_v1")

    np.testing.assert_allclose(normal.reference.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(normal.reference.std(axis=0), 1, rtol=1e-6)
    expected = (sets[1] - sets[0].mean(axis=0)) / sets[0].std(axis=0)
    np.testing.assert_allclose(normal.samples, expected, rtol=1e-5, atol=1e-5)


def test_z_score_drops_what_is_constant_in_the_reference_and_names_it():
    normal = normalise_features(GOLDEN["reference"], GOLDEN["samples"], NAMES, "frd_v1")

    assert normal.dropped == ("f5", "f9")
    assert normal.names == tuple(name for name in NAMES if name not in normal.dropped)
    assert normal.reference.shape == (90, 22)
    assert normal.samples.shape == (70, 22)


def test_min_max_is_by_both_sets_and_constants_go_to_the_middle():
    normal = normalise_features(GOLDEN["reference"], GOLDEN["samples"], NAMES, "frd_v0")
    both = np.concatenate([normal.reference, normal.samples])

    assert normal.dropped == ()
    np.testing.assert_array_equal(both[:, 5], 7.45670747756958 / 2)
    varying = np.delete(both, 5, axis=1)
    np.testing.assert_allclose(varying.min(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(varying.max(axis=0), 7.45670747756958)


def test_version_1_ignores_units_and_version_0_the_order_of_the_sets(sets):
    x, y = sets

    assert frd_score(1e3 * x + 7, 1e3 * y + 7) == pytest.approx(frd_score(x, y), abs=1e-4)
    assert frd_score(x, y, "frd_v0") == pytest.approx(frd_score(y, x, "frd_v0"), rel=1e-9)
    assert abs(frd_score(x, y) - frd_score(y, x)) > 0.1


def test_a_larger_shift_is_a_larger_distance(sets):
    x, _ = sets

    for version in FRD_VERSIONS:
        scores = [frd_score(x, np.concatenate([x[:, :2], x[:, 2:] + shift], axis=1), version) for shift in (1, 2, 4)]
        assert scores == sorted(scores)


def test_a_set_has_no_distance_to_itself(sets):
    x, _ = sets

    assert frd_score(x, x, "frd_v0") == pytest.approx(0, abs=1e-12)
    assert frd_score(x, x) < -20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": np.array([[1.0, np.nan]])}, "got nan for b of image 0 of the reference"),
        ({"samples": np.array([[1.0, 2], [np.inf, 1]])}, "got inf for a of image 1 of the samples"),
        ({"samples": np.ones((3, 5))}, r"of one width, got \(2, 2\) and \(3, 5\)"),
        ({"samples": np.ones(2)}, r"must be \(images, features\)"),
        ({"samples": np.ones((0, 2))}, r"got \(2, 2\) and \(0, 2\)"),
        ({"names": ("a",)}, "names must be 2, one per feature, got 1"),
        ({"version": "frd_v2"}, "version must be one of frd_v1, frd_v0, radiomics, got 'frd_v2'"),
        ({"reference": np.ones((4, 2))}, "some feature must vary among the reference's images, got 4 images"),
    ],
)
def test_bad_input_is_refused_in_one_line(change, message):
    given = {"reference": np.array([[1.0, 2], [3, 4]]), "samples": np.array([[1.0, 2], [3, 4]]), "names": ("a", "b")}

    with pytest.raises(UserError, match=message) as caught:
        normalise_features(**{**given, "version": "frd_v1", **change})
    assert "\n" not in str(caught.value)


def test_one_image_is_no_distribution(sets):
    with pytest.raises(UserError, match="at least 2 images in each, got 1"):
        frd_score(sets[0], sets[1][:1], "frd_v0")


def test_table_begins_with_the_feature_that_differs_most(sets):
    x, y = sets

    table = feature_table(x, y, ("a", "b", "c"))

    assert table[0].name == "b"
    assert table[0].difference == pytest.approx((y[:, 1].mean() - x[:, 1].mean()) / x[:, 1].std())
    assert (table[0].reference_std, table[0].samples_std) == pytest.approx((x[:, 1].std(), y[:, 1].std()))
    sizes = [abs(row.difference) for row in table]
    assert sizes == sorted(sizes, reverse=True)


def test_table_stays_finite_where_the_reference_is_constant():
    reference = np.array([[0.1, 1.0, 2.0]] * 7)
    samples = np.array([[0.1, 1.0, 5.0], [0.1, 3.0, 5.0], [0.1, 5.0, 5.0]])

    rows = {row.name: row for row in feature_table(reference, samples, ("same", "varies", "other"))}

    assert rows["same"].reference_std == 0  # exactly: 0.1 added up seven times is not 0.7
    assert rows["same"].difference == 0
    assert all(math.isfinite(row.difference) for row in rows.values())
    assert rows["varies"].difference > 0
    assert rows["other"].difference > 0
