"""Precision, recall, density and coverage against torch-fidelity and the papers' definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

from medgen.errors import UserError
from medgen.metrics import prdc
from medgen.metrics.prdc import PRDC_NAMES, prdc_per_image, precision_recall_density_coverage


def two_sets(n: int, m: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), rng.normal(size=(m, d)) * 0.6 + 0.4  # fakes less varied: precision is not recall


def by_definition(real, fake, k: int, real_patients=None, fake_patients=None) -> dict[str, float]:
    distance = lambda a, b: np.sqrt(((a[:, None] - b[None]) ** 2).sum(axis=-1))  # noqa: E731

    def radii(images, patients):
        patients = np.arange(len(images)) if patients is None else np.asarray(patients)
        between = distance(images, images)
        return np.array([np.sort(between[i][patients != patients[i]])[k - 1] for i in range(len(images))])

    real_radii, fake_radii = radii(real, real_patients), radii(fake, fake_patients)
    between = distance(real, fake)
    in_real, in_fake = between <= real_radii[:, None], between <= fake_radii[None]
    return {
        "precision": in_real.any(axis=0).mean(),
        "recall": in_fake.any(axis=1).mean(),
        "density": in_real.sum(axis=0).mean() / k,
        "coverage": in_real.any(axis=1).mean(),
    }


@pytest.mark.parametrize("block", [2**22, 500, 1])
@pytest.mark.parametrize(("n", "m", "d", "k"), [(80, 60, 3, 5), (60, 90, 40, 3), (50, 50, 2, 1)])
def test_all_four_follow_the_definition_whatever_the_blocks(n, m, d, k, block, monkeypatch):
    monkeypatch.setattr(prdc, "BLOCK_VALUES", block)
    real, fake = two_sets(n, m, d)
    assert precision_recall_density_coverage(real, fake, k) == pytest.approx(by_definition(real, fake, k), abs=1e-12)


@pytest.mark.parametrize("block", [2**22, 500])
def test_balls_reach_to_images_of_other_patients_in_both_sets(block, monkeypatch):
    monkeypatch.setattr(prdc, "BLOCK_VALUES", block)
    real, fake = two_sets(60, 80, 6)
    rng = np.random.default_rng(2)
    patients = {"real_patients": rng.integers(0, 12, 60), "fake_patients": rng.integers(0, 20, 80)}
    found = precision_recall_density_coverage(real, fake, 3, **patients)
    assert found == pytest.approx(by_definition(real, fake, 3, **patients), abs=1e-12)
    plain = precision_recall_density_coverage(real, fake, 3)
    assert found["density"] > plain["density"]
    assert found["recall"] > plain["recall"]


def test_several_images_a_patient_do_not_lower_the_scores_of_fakes_from_the_same_distribution():
    rng = np.random.default_rng(3)
    patients = np.arange(50).repeat(6)
    real, fake = (
        (0.8 * rng.normal(size=(50, 20)).repeat(6, axis=0) + 0.6 * rng.normal(size=(300, 20))) for _ in range(2)
    )
    one_each = precision_recall_density_coverage(rng.normal(size=(300, 20)), rng.normal(size=(300, 20)))
    known = precision_recall_density_coverage(real, fake, real_patients=patients, fake_patients=patients)
    unknown = precision_recall_density_coverage(real, fake)
    for name in ("precision", "recall", "coverage"):
        assert known[name] == pytest.approx(one_each[name], abs=0.12)
        assert unknown[name] < one_each[name] - 0.15


@pytest.mark.parametrize("d", [2, 30])
def test_precision_and_recall_equal_torch_fidelity_and_are_not_swapped(d):
    real, fake = two_sets(120, 100, d)
    expected = prc_features_to_metric(
        torch.from_numpy(fake), torch.from_numpy(real), prc_neighborhood=3, prc_batch_size=1000, save_cpu_ram=False,
        verbose=False,
    )  # fmt: skip
    found = precision_recall_density_coverage(real, fake, nearest_k=3)
    assert found["precision"] > found["recall"]
    assert found["precision"] == pytest.approx(expected["precision"], abs=1e-6)
    assert found["recall"] == pytest.approx(expected["recall"], abs=1e-6)


def test_fakes_of_one_mode_are_precise_but_recall_little():
    rng = np.random.default_rng(5)
    real = np.vstack([rng.normal(size=(100, 2)), rng.normal(size=(100, 2)) + 50])
    found = precision_recall_density_coverage(real, rng.normal(size=(200, 2)))
    assert found["precision"] > 0.9
    assert found["recall"] < 0.55
    assert found["coverage"] < 0.55


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_copies_of_the_reals_are_perfect_even_far_from_zero(offset):
    real = two_sets(70, 2, 5)[0] + offset
    found = precision_recall_density_coverage(real, real.copy())
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)
    assert found["density"] == pytest.approx(by_definition(real, real, 5)["density"], abs=1e-12)


def test_an_image_that_occurs_many_times_has_a_ball_of_no_size_that_holds_its_copies():
    real = np.vstack([np.full((10, 3), 0.1), two_sets(20, 2, 3)[0] + 100])
    fake = np.vstack([np.full((5, 3), 0.1), np.full((5, 3), 0.1 + 1e-3)])
    values = prdc_per_image(real, fake, nearest_k=4)
    assert values["precision"].tolist() == [1.0] * 5 + [0.0] * 5
    assert values["coverage"].tolist() == [1.0] * 10 + [0.0] * 20


def test_values_per_image_belong_to_the_set_that_is_scored():
    real, fake = two_sets(30, 20, 4)
    values = prdc_per_image(real, fake)
    assert [len(values[name]) for name in PRDC_NAMES] == [20, 30, 20, 30]


def test_bad_input_is_refused():
    real, fake = two_sets(30, 5, 4)
    with pytest.raises(UserError, match="less than the 5 images of the smaller set, got 5"):
        precision_recall_density_coverage(real, fake)
    with pytest.raises(UserError, match="3 neighbours of other patients, got a patient with 28 of the 30 real images"):
        precision_recall_density_coverage(real, fake, 3, real_patients=["A"] * 28 + ["B", "C"])
    with pytest.raises(UserError, match="2 neighbours of other patients, got a patient with 4 of the 5 fake images"):
        precision_recall_density_coverage(real, fake, 2, fake_patients=[1, 1, 1, 1, 2])
    with pytest.raises(UserError, match="same number of features"):
        precision_recall_density_coverage(real, fake[:, :2], nearest_k=2)
    fake[2, 0] = np.inf
    with pytest.raises(UserError, match="NaN or infinity in row 2"):
        precision_recall_density_coverage(real, fake, nearest_k=2)
