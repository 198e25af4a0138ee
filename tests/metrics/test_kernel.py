"""Kernel distance against torchmetrics, torch-fidelity and the plain definition; patients; resampling; refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import kid_features_to_metric
from torchmetrics.image.kid import poly_mmd

from medgen.errors import UserError
from medgen.metrics import kernel
from medgen.metrics.kernel import kernel_distance, kernel_distance_resampled, kernel_distance_subsets


def two_sets(n: int, m: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), rng.normal(size=(m, d)) * 1.2 + 0.3


def by_definition(x, y, degree=3, gamma=None, coef0=1.0, x_patients=None, y_patients=None) -> float:
    k = lambda a, b: (a @ b * (gamma or 1 / len(a)) + coef0) ** degree  # noqa: E731
    inside = []
    for s, patients in ((x, x_patients), (y, y_patients)):
        patients = range(len(s)) if patients is None else patients
        pairs = [(i, j) for i in range(len(s)) for j in range(len(s)) if patients[i] != patients[j]]
        inside.append(np.mean([k(s[i], s[j]) for i, j in pairs]))
    return sum(inside) - 2 * np.mean([k(a, b) for a in x for b in y])


def of_patients(rng: np.random.Generator, patients: int = 50, images: int = 6, d: int = 20) -> np.ndarray:
    """Features of several images of each patient, correlated by 0.64 within one."""
    own = rng.normal(size=(patients, 1, d)).repeat(images, axis=1)
    return (0.8 * own + 0.6 * rng.normal(size=(patients, images, d))).reshape(-1, d)


@pytest.mark.parametrize("shape", [(120, 8), (40, 100)])
def test_distance_equals_torchmetrics_and_torch_fidelity(shape):
    x, y = two_sets(shape[0], *shape)
    tensors = torch.from_numpy(x), torch.from_numpy(y)
    fidelity = kid_features_to_metric(
        *tensors, kid_subsets=1, kid_subset_size=len(x), kid_kernel="poly", kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1.0, rng_seed=0, verbose=False,
    )  # fmt: skip
    assert kernel_distance(x, y) == pytest.approx(float(poly_mmd(*tensors)), rel=1e-9)
    assert kernel_distance(x, y) == pytest.approx(fidelity["kernel_inception_distance_mean"], rel=1e-9)


@pytest.mark.parametrize("options", [{}, {"degree": 2, "gamma": 0.3, "coef0": 0.5}])
def test_sets_of_different_size_follow_the_definition_whatever_the_blocks(options, monkeypatch):
    x, y = two_sets(23, 31, 4)
    expected = by_definition(x, y, **options)
    for block in (1024, 7, 1):
        monkeypatch.setattr(kernel, "BLOCK", block)
        assert kernel_distance(x, y, **options) == pytest.approx(expected, rel=1e-9)
        assert kernel_distance(y, x, **options) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("options", [{}, {"degree": 2, "gamma": 0.3, "coef0": 0.5}])
def test_pairs_of_one_patient_are_left_out_of_both_sets_whatever_the_blocks_and_the_order(options, monkeypatch):
    x, y = two_sets(23, 31, 4)
    rng = np.random.default_rng(1)
    patients = {"x_patients": [f"P{n}" for n in rng.integers(0, 9, 23)], "y_patients": rng.integers(0, 12, 31)}
    expected = by_definition(x, y, **options, **patients)
    assert abs(expected - by_definition(x, y, **options)) > 1e-3
    for block in (1024, 7, 1):
        monkeypatch.setattr(kernel, "BLOCK", block)
        assert kernel_distance(x, y, **options, **patients) == pytest.approx(expected, rel=1e-9)


def test_images_of_few_patients_from_one_distribution_give_zero_on_average():
    rng = np.random.default_rng(0)
    patients = np.arange(50).repeat(6)
    sets = [(of_patients(rng), of_patients(rng)) for _ in range(60)]
    known = [kernel_distance(x, y, x_patients=patients, y_patients=patients) for x, y in sets]
    taken_for_strangers = [kernel_distance(x, y) for x, y in sets]
    assert abs(np.mean(known)) < 3 * np.std(known) / 60**0.5
    assert np.mean(taken_for_strangers) > 10 * np.std(taken_for_strangers) / 60**0.5


def test_numbers_and_text_name_the_same_patient():
    x, y = two_sets(6, 6, 3)
    as_text = kernel_distance(x, y, x_patients=["1", "1", "2", "2", "3", "3"])
    assert kernel_distance(x, y, x_patients=[1, "1", 2, "2", 3, "3"]) == as_text != kernel_distance(x, y)


def test_equal_distributions_give_zero_on_average_at_any_n():
    rng = np.random.default_rng(4)
    for n in (5, 50):
        values = [kernel_distance(rng.normal(size=(n, 3)), rng.normal(size=(n, 3))) for _ in range(400)]
        assert abs(np.mean(values)) < 4 * np.std(values) / 20  # 20: the root of 400
        assert min(values) < 0


def test_subsets_of_everything_are_the_distance_itself_and_smaller_ones_scatter_around_it():
    x, y = two_sets(60, 60, 5)
    mean, std = kernel_distance_subsets(x, y, subsets=3, subset_size=60)
    assert mean == pytest.approx(kernel_distance(x, y), rel=1e-9)
    assert std < 1e-9
    mean, std = kernel_distance_subsets(x, y, subsets=200, subset_size=30, seed=1)
    assert abs(mean - kernel_distance(x, y)) < 4 * std / np.sqrt(200)
    assert (mean, std) == kernel_distance_subsets(x, y, subsets=200, subset_size=30, seed=1)
    assert mean != kernel_distance_subsets(x, y, subsets=200, subset_size=30, seed=2)[0]


def test_resamples_leave_out_the_kernel_of_a_patient_with_itself_and_its_copies(monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", 4)
    x, y = two_sets(6, 9, 3)
    patients = np.array([0, 1, 1, 2, 1, 3])
    x_counts = np.array([1, 2, 2, 3, 2, 0])[None].astype(float)
    y_counts = np.array([0, 1, 1, 2, 0, 3, 1, 1, 0])[None].astype(float)
    k = lambda a, b: (a @ b / 3 + 1) ** 3  # noqa: E731

    def mean_of_pairs(s, codes, counts):
        total = pairs = 0.0
        for i in range(len(s)):
            for j in range(len(s)):
                if codes[i] != codes[j]:
                    weight = counts[i] * counts[j]
                    total, pairs = total + weight * k(s[i], s[j]), pairs + weight
        return total / pairs

    drawn_x, drawn_y = x.repeat(x_counts[0].astype(int), axis=0), y.repeat(y_counts[0].astype(int), axis=0)
    expected = mean_of_pairs(x, patients, x_counts[0]) + mean_of_pairs(y, range(9), y_counts[0])
    expected -= 2 * np.mean([k(a, b) for a in drawn_x for b in drawn_y])
    value = kernel_distance_resampled(x, y, x_counts, y_counts, patients)
    assert value == pytest.approx(expected, rel=1e-9)
    assert kernel_distance(drawn_x, drawn_y) > value[0] + 0.5  # what copies would do


def test_resamples_of_equal_counts_are_the_distance_itself():
    x, y = two_sets(12, 15, 3)
    patients = np.arange(12) // 3
    values = kernel_distance_resampled(x, y, np.ones((2, 12)), np.ones((2, 15)), patients)
    np.testing.assert_allclose(values, kernel_distance(x, y, x_patients=patients), rtol=1e-9)


def test_a_resample_without_a_pair_has_no_value():
    x, y = two_sets(3, 3, 2)
    value = kernel_distance_resampled(x, y, np.array([[3.0, 0, 0]]), np.ones((1, 3)))
    assert np.isnan(value).all()


def test_bad_input_is_refused():
    x, y = two_sets(10, 8, 3)
    with pytest.raises(UserError, match="same number of features, got 3 and 2"):
        kernel_distance(x, y[:, :2])
    with pytest.raises(UserError, match="at least 2 images in each, got 1"):
        kernel_distance(x, y[:1])
    with pytest.raises(UserError, match="at least 2 patients, got 1 patient"):
        kernel_distance(x, y, y_patients=["A"] * 8)
    with pytest.raises(UserError, match="for each of the 10 images, got 8"):
        kernel_distance(x, y, x_patients=["A"] * 8)
    with pytest.raises(UserError, match="from 2 to the 8 images of the smaller set"):
        kernel_distance_subsets(x, y)
    x[7, 1] = np.nan
    with pytest.raises(UserError, match="NaN or infinity in row 7"):
        kernel_distance(x, y)
