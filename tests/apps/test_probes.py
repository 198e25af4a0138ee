"""Probes of planted factors, folds by patient, and what chance gives."""

from __future__ import annotations

import numpy as np
import pytest

from medgen.apps import probes
from medgen.apps.probes import (
    Factor,
    find_factors,
    fit_probe,
    holm,
    patient_folds,
    patients_of,
    shuffle_patients,
)
from medgen.errors import UserError
from medgen.metrics.intervals import patient_codes

D = 12
QUICK = {"shuffles": 20, "resamples": 200}


@pytest.fixture(scope="module")
def planted():
    """240 latents of 120 patients on unequal axes, with a label, a sex and an age along known directions."""
    random = np.random.default_rng(0)
    spread = np.linspace(0.8, 1.6, D)
    latents = random.normal(size=(240, D)) * spread
    normals = np.linalg.qr(random.normal(size=(D, 3)))[0].T
    noise = 0.3 * random.normal(size=(3, 240))
    along = latents @ normals.T + noise.T
    patients = [f"p{number // 2}" for number in range(240)]
    label = Factor("mass", "label", (along[:, 0] > 0.5).astype(float))
    sex = Factor("sex", "sex", (along[:, 1] > 0).astype(float))
    age = Factor("age", "age", 50 + 10 * along[:, 2])
    return latents, patients, normals, (label, sex, age)


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def items(labels, patients=None):
    return [
        {"image": f"{number}.png", "patient": f"p{number}" if patients is None else patients[number], "labels": names}
        for number, names in enumerate(labels)
    ]


class TestFitProbe:
    @pytest.mark.parametrize("number", range(3), ids=["label", "sex", "age"])
    def test_planted_direction_is_recovered(self, planted, number):
        latents, patients, normals, factors = planted

        probe = fit_probe(latents, factors[number], patients, **QUICK)

        assert cosine(probe.weight, normals[number]) > 0.97
        headline = probe.figures[probe.headline]
        assert headline.value > 0.9
        assert headline.low <= headline.value <= headline.high
        assert probe.p_value == 1 / 21
        assert probe.null[2] < headline.low

    def test_score_is_the_weight_times_the_latent(self, planted):
        latents, patients, _, (_, _, age) = planted

        probe = fit_probe(latents, age, patients, **QUICK)

        years = latents @ probe.weight + probe.bias
        assert np.abs(years - age.values).mean() < 5
        assert probe.figures["mae"].value < probe.chance["mae"] / 3

    def test_no_patient_is_in_two_folds(self, planted):
        latents, patients, _, (label, _, _) = planted

        probe = fit_probe(latents, label, patients, **QUICK)

        folds = {}
        for patient, fold in zip(patients, probe.folds, strict=True):
            folds.setdefault(patient, set()).add(fold)
        assert all(len(places) == 1 for places in folds.values())
        assert set(probe.folds) == set(range(5))

    def test_scores_are_of_probes_that_have_not_seen_the_patient(self, planted):
        # an image of each patient is noise that repeats in the other: only a leak could read it
        random = np.random.default_rng(1)
        of_patients = random.normal(size=(60, 200))
        latents = np.repeat(of_patients, 2, axis=0)
        values = np.repeat(random.permutation(np.arange(60) % 2), 2).astype(float)
        patients = [f"p{number // 2}" for number in range(120)]

        probe = fit_probe(latents, Factor("noise", "label", values), patients, **QUICK)

        assert probe.figures["auroc"].value < 0.7

    def test_shuffled_labels_have_intervals_that_contain_chance(self, planted):
        latents, patients, _, (label, _, _) = planted
        codes, random = patient_codes(patients, 240), np.random.default_rng(3)
        contained = []
        for _ in range(8):
            shuffled = Factor("nothing", "label", label.values[shuffle_patients(codes, random)])
            found = fit_probe(latents, shuffled, patients, shuffles=0, resamples=200).figures["auroc"]
            contained.append(found.low < 0.5 < found.high)

        assert sum(contained) >= 6  # of 95 % intervals

    def test_chance_of_shuffled_patients_surrounds_one_half(self, planted):
        latents, patients, _, (label, _, _) = planted
        shuffled = label.values[shuffle_patients(patient_codes(patients, 240), np.random.default_rng(3))]

        probe = fit_probe(latents, Factor("nothing", "label", shuffled), patients, **QUICK)

        mean, low, high = probe.null
        assert low < 0.5 < high
        assert mean == pytest.approx(0.5, abs=0.05)
        assert probe.p_value > 0.05

    def test_unknown_values_are_left_out(self, planted):
        latents, patients, normals, (label, _, _) = planted
        values = label.values.copy()
        values[:40] = np.nan

        probe = fit_probe(latents, Factor("mass", "label", values), patients, **QUICK)

        assert probe.n == 200
        assert probe.patients == 100
        assert (probe.folds[:40] == -1).all()
        assert np.isnan(probe.scores[:40]).all()
        assert cosine(probe.weight, normals[0]) > 0.95

    def test_same_seed_gives_the_same_probe(self, planted):
        latents, patients, _, (label, _, _) = planted

        first, second = (fit_probe(latents, label, patients, seed=4, **QUICK) for _ in range(2))

        assert np.array_equal(first.weight, second.weight)
        assert first.null == second.null

    def test_no_shuffles_give_no_null(self, planted):
        latents, patients, _, (label, _, _) = planted

        probe = fit_probe(latents, label, patients, shuffles=0, resamples=200)

        assert probe.null is None
        assert probe.p_value is None

    def test_fewer_patients_than_folds_are_refused(self, planted):
        latents, _, _, (label, _, _) = planted
        few = [f"p{number % 4}" for number in range(240)]

        with pytest.raises(UserError, match=r"number of patients, 4, got 5; set --folds 4"):
            fit_probe(latents, label, few, **QUICK)

    def test_long_latents_are_projected_and_the_weights_mapped_back(self, planted, monkeypatch):
        latents, patients, _, (label, _, age) = planted
        wide = np.concatenate([latents, np.random.default_rng(1).normal(size=(240, 600))], 1)

        for factor in (label, age):
            projected = fit_probe(wide, factor, patients, shuffles=0, resamples=200)
            with monkeypatch.context() as patch:
                patch.setattr(probes, "COMPONENTS", 1000)
                whole = fit_probe(wide, factor, patients, shuffles=0, resamples=200)
            # 240 images span fewer axes than are kept: nothing is lost
            assert projected.weight.shape == (D + 600,)
            assert cosine(projected.weight, whole.weight) > 0.999
            assert wide @ projected.weight + projected.bias == pytest.approx(wide @ whole.weight + whole.bias, abs=0.05)


class TestShuffle:
    def test_latents_that_know_nothing_are_found_to_in_one_run_of_twenty(self, monkeypatch):
        # patients of very unequal numbers of images, who keep their label and much of their latent
        def centroids(x, y, *_):
            return (x[y == 1].mean(0) - x[y == 0].mean(0) if len(set(y)) == 2 else np.zeros(x.shape[1])), 0.0

        monkeypatch.setattr(probes, "_fit", centroids)
        monkeypatch.setattr(probes, "_choose_strength", lambda *_: 1.0)
        runs, hits = 150, 0
        for run in range(runs):
            random = np.random.default_rng(run)
            codes = np.repeat(np.arange(40), np.minimum(random.zipf(1.6, 40), 60))
            latents = random.normal(size=(40, 3))[codes] + 0.3 * random.normal(size=(len(codes), 3))
            label = Factor("nothing", "label", (random.permutation(40) % 2)[codes].astype(float))
            probe = fit_probe(latents, label, codes.astype(str), folds=3, shuffles=19, resamples=2, seed=run)
            hits += probe.p_value <= 0.05

        assert 0.02 <= hits / runs <= 0.09

    def test_each_patient_gets_the_values_of_one(self):
        codes = np.repeat(np.arange(30), np.random.default_rng(0).integers(1, 20, 30))

        donors = shuffle_patients(codes, np.random.default_rng(1))

        of_patients = [set(codes[donors[codes == code]]) for code in range(30)]
        assert all(len(of) == 1 for of in of_patients)
        assert set.union(*of_patients) == set(range(30))

    def test_keeps_the_values_and_most_of_the_patients_together(self):
        codes = np.repeat(np.arange(50), 4)
        values = np.repeat(np.arange(50), 4)

        shuffled = values[shuffle_patients(codes, np.random.default_rng(0))]

        assert np.array_equal(np.sort(shuffled), values)
        assert all(len(set(shuffled[codes == code])) == 1 for code in range(50))
        assert (shuffled != values).mean() > 0.9

    def test_patients_may_stand_anywhere_in_the_list(self):
        codes = np.arange(60) % 20

        donors = shuffle_patients(codes, np.random.default_rng(0))

        assert np.array_equal(np.sort(donors), np.arange(60))
        assert all(len(set(codes[donors[codes == code]])) == 1 for code in range(20))


def test_holm_multiplies_by_the_tests_that_are_left():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1, 1]
    assert holm([]) == []


class TestFolds:
    def test_labels_are_about_as_frequent_in_each_fold(self):
        random = np.random.default_rng(0)
        codes = np.sort(random.integers(0, 80, 200))
        values = (random.random(200) < 0.3).astype(float)

        shares = [values[test].mean() for _, test in patient_folds(values, codes, 5, seed=0)]

        assert max(shares) - min(shares) < 0.15


class TestFindFactors:
    def test_labels_age_and_sex_are_found(self):
        found = [
            {**item, "age": 30 + number, "sex": "FM"[number % 2]}
            for number, item in enumerate(items([["mass"] if number < 15 else [] for number in range(30)]))
        ]

        factors, left_out = find_factors(found)

        assert [(factor.name, factor.kind) for factor in factors] == [
            ("mass", "label"),
            ("age", "age"),
            ("sex", "sex"),
        ]
        assert left_out == {}
        assert factors[0].values.sum() == 15
        assert np.array_equal(factors[2].values, np.arange(30) % 2)

    def test_rare_and_constant_labels_are_left_out_with_the_reason(self):
        labels = [["mass", "all"] if number < 15 else ["all"] for number in range(30)]
        labels[0] = ["mass", "all", "rare"]

        factors, left_out = find_factors(items(labels))

        assert [factor.name for factor in factors] == ["mass"]
        assert left_out["rare"] == "1 patients with it and 29 without it, 10 of each are needed"
        assert left_out["all"] == "one class only, 30 patients with it and 0 without it"
        assert "known of 0 patients" in left_out["age"]
        assert left_out["sex"] == "it is known of no image"

    def test_patients_count_and_not_images(self):
        labels = [["mass"] if number < 15 else [] for number in range(30)]
        patients = ["p0" if number < 15 else f"p{number}" for number in range(30)]

        with pytest.raises(UserError, match="mass: 1 patients with it"):
            find_factors(items(labels, patients))

    def test_items_without_labels_are_unknown_and_not_negative(self):
        found = items([["mass"] if number < 15 else [] for number in range(30)])
        found += [{"image": f"more{number}.png", "patient": f"q{number}"} for number in range(5)]

        factors, _ = find_factors(found)

        assert np.isnan(factors[0].values[30:]).all()
        assert np.isfinite(factors[0].values[:30]).all()

    def test_of_two_classes_one_is_a_factor(self):
        found = [
            {"image": f"{number}.png", "patient": str(number), "label": ("NORMAL", "PNEUMONIA")[number % 2]}
            for number in range(30)
        ]

        factors, _ = find_factors(found)

        assert [factor.name for factor in factors] == ["PNEUMONIA"]

    @pytest.mark.parametrize(
        ("words", "classes"),
        [
            (("female", "Male"), ("F", "M")),
            (("f", "M"), ("F", "M")),
            (("woman", "man"), ("F", "M")),
            ((1, 2), ("1", "2")),
        ],
    )
    def test_sex_is_two_words(self, words, classes):
        found = [{"image": f"{number}.png", "patient": str(number), "sex": words[number % 2]} for number in range(30)]

        (sex,), _ = find_factors(found)

        assert sex.classes == classes
        assert np.array_equal(sex.values, np.arange(30) % 2)

    def test_sex_of_other_words_is_left_out_with_the_words(self):
        found = items([["mass"] if number < 15 else [] for number in range(30)])
        for number, item in enumerate(found):
            item["sex"] = "abc"[number % 3]

        assert find_factors(found)[1]["sex"] == "sex must be F or M, or one of two values, got A, B, C"

    def test_label_of_one_class_that_was_asked_for_is_an_error(self):
        with pytest.raises(UserError, match=r"label all cannot be probed: one class only") as error:
            find_factors(items([["all"]] * 30), labels=["all"])
        assert "\n" not in str(error.value)

    def test_unknown_label_names_the_closest(self):
        labels = [["Pneumonia"] if number < 15 else ["Mass"] for number in range(30)]

        with pytest.raises(UserError, match=r"label Pnuemonia occurs in none .* did you mean Pneumonia"):
            find_factors(items(labels), labels=["Pnuemonia"])

    def test_nothing_known_is_an_error(self):
        with pytest.raises(UserError, match="nothing of the 30 images can be probed") as error:
            find_factors([{"image": f"{number}.png", "patient": str(number)} for number in range(30)])
        assert "\n" not in str(error.value)

    def test_label_asked_for_where_there_are_none_is_an_error(self):
        with pytest.raises(UserError, match="none of the 30 images has a label"):
            find_factors([{"image": f"{number}.png", "patient": str(number)} for number in range(30)], ["mass"])

    def test_age_that_is_no_number_is_an_error(self):
        with pytest.raises(UserError, match=r"age must be a number of years, got 'old' for 3.png"):
            find_factors([{**item, "age": 40 if n != 3 else "old"} for n, item in enumerate(items([["a"]] * 30))])

    def test_image_without_patient_is_its_own(self):
        assert patients_of([{"image": "a.png"}, {"image": "b.png", "patient": 7}]) == ["a.png", "7"]
