"""DCI and SAP of codes whose scores can be worked out by hand."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from medgen.apps.factor_scores import (
    completeness,
    disentanglement,
    factor_scores,
    importances,
    sap,
    sap_matrix,
)
from medgen.apps.probes import Factor
from medgen.errors import UserError


def continuous(name, values):
    return Factor(name, "age", np.asarray(values, dtype=float))


def binary(name, values):
    return Factor(name, "label", np.asarray(values, dtype=float))


class TestImportances:
    """Of hand-made importance matrices."""

    def test_one_coordinate_for_each_factor_is_perfect(self):
        importance = np.array([[2.0, 0], [0, 3], [0, 0]])

        assert disentanglement(importance) == pytest.approx(1)
        assert completeness(importance) == pytest.approx(1)

    def test_all_coordinates_for_all_factors_are_worst(self):
        assert disentanglement(np.ones((4, 3))) == pytest.approx(0)
        assert completeness(np.ones((4, 3))) == pytest.approx(0)

    def test_two_coordinates_for_each_of_two_factors(self):
        # each coordinate has one factor; each factor is spread over two of four: 1 - log_4(2)
        importance = np.array([[1.0, 0], [1, 0], [0, 1], [0, 1]])

        assert disentanglement(importance) == pytest.approx(1)
        assert completeness(importance) == pytest.approx(0.5)

    def test_weights_are_the_coordinates_shares(self):
        # row 0: 3 of 4, entropy of (2/3, 1/3); row 1: 1 of 4, one factor
        importance = np.array([[2.0, 1], [0, 1]])
        mixed = 1 - (math.log2(3) - 2 / 3)

        assert disentanglement(importance) == pytest.approx(0.75 * mixed + 0.25)
        # columns: 2 of 4 with one coordinate; 2 of 4 with two equal ones
        assert completeness(importance) == pytest.approx(0.5)

    def test_nothing_predicted_is_nothing_disentangled(self):
        assert disentanglement(np.zeros((4, 2))) == 0
        assert completeness(np.zeros((4, 2))) == 0

    def test_forest_finds_the_coordinate_and_what_it_explains(self):
        random = np.random.default_rng(0)
        latents = random.normal(size=(300, 5)) * [1, 10, 0.1, 1, 1]
        values = 3 * latents[:, 2] / 0.1 + random.normal(size=300)  # 9 parts of 10 are explained

        found, explained = importances(latents, values, np.arange(300))

        assert found.argmax() == 2
        assert found[2] > 0.9
        assert found.sum() == pytest.approx(1)
        assert explained == pytest.approx(0.88, abs=0.05)

    def test_forest_explains_nothing_of_noise(self):
        random = np.random.default_rng(0)

        _, explained = importances(random.normal(size=(200, 5)), random.normal(size=200), np.arange(200))

        assert explained == 0


class TestSAP:
    def test_continuous_factor_is_scored_by_squared_correlation(self):
        latents = np.random.default_rng(0).normal(size=(50, 3))
        values = latents @ [1.0, 0.5, 0.0]

        matrix = sap_matrix(latents, [continuous("a", values)])

        expected = [np.corrcoef(latents[:, code], values)[0, 1] ** 2 for code in range(3)]
        assert matrix[:, 0] == pytest.approx(expected)

    def test_label_is_scored_by_the_best_threshold(self):
        # sorted by the coordinate: 0 0 1 0 1 1; best cut: 3 of 3 and 2 of 3, or 2 of 3 and 3 of 3
        latents = np.array([[1.0], [2], [3], [4], [5], [6]])

        assert sap_matrix(latents, [binary("a", [0, 0, 1, 0, 1, 1])])[0, 0] == pytest.approx(5 / 6)
        # the other way round, too
        assert sap_matrix(-latents, [binary("a", [0, 0, 1, 0, 1, 1])])[0, 0] == pytest.approx(5 / 6)

    def test_no_threshold_parts_equal_values(self):
        latents = np.array([[0.0], [0], [0], [0], [1], [1]])

        # the cut after the zeros: all of 2 positives above, 2 of 4 below... by hand (2/3 + 3/3) / 2
        assert sap_matrix(latents, [binary("a", [0, 0, 0, 1, 1, 1])])[0, 0] == pytest.approx(5 / 6)

    def test_constant_coordinate_predicts_nothing(self):
        latents = np.column_stack([np.ones(6), np.arange(6.0)])

        matrix = sap_matrix(latents, [binary("a", [0, 0, 0, 1, 1, 1]), continuous("b", np.arange(6))])

        assert matrix.tolist() == [[0, 0], [1, 1]]

    def test_columns_in_blocks_are_scored_alike(self, monkeypatch):
        latents = np.random.default_rng(0).normal(size=(50, 7))
        factors = [continuous("a", latents @ np.arange(7)), binary("b", latents[:, 3] > 0)]
        whole = sap_matrix(latents, factors)

        # the package's attribute of this name is the function
        monkeypatch.setattr(sys.modules[sap_matrix.__module__], "SAP_NUMBERS", 100)

        assert sap_matrix(latents, factors) == pytest.approx(whole, rel=1e-12)

    def test_is_the_gap_between_the_two_best(self):
        # 0.9 - 0.6 and 0.8 - 0.8
        assert sap(np.array([[0.9, 0.8], [0.6, 0.8], [0.1, 0.2]])) == pytest.approx(0.15)


class TestFactorScores:
    def test_perfect_code_is_near_one_and_its_shuffles_are_not(self):
        random = np.random.default_rng(0)
        latents = random.normal(size=(400, 4))
        factors = [continuous("a", latents[:, 1]), continuous("b", -2 * latents[:, 3]), binary("c", latents[:, 0] > 0)]

        found = factor_scores(latents, factors, [str(number) for number in range(400)])

        assert found.scores["dci_disentanglement"] > 0.9
        assert found.scores["dci_completeness"] > 0.9
        assert found.scores["dci_informativeness"] > 0.85
        assert found.scores["sap"] > 0.7
        for name, highest in {"dci_informativeness": 0.05, "sap": 0.1}.items():
            mean, low, high = found.shuffled[name]
            assert low <= mean <= high < highest
        assert found.names == ("a", "b", "c")
        assert found.importances.argmax(0).tolist() == [1, 3, 0]

    def test_rotated_code_is_as_informative_and_not_disentangled(self):
        random = np.random.default_rng(0)
        truth = random.normal(size=(400, 2))
        turned = truth @ np.array([[1, 1], [1, -1]]) / math.sqrt(2)
        factors = [continuous("a", truth[:, 0]), continuous("b", truth[:, 1])]

        found = factor_scores(turned, factors, [str(number) for number in range(400)])

        assert found.scores["dci_informativeness"] > 0.8
        assert found.scores["dci_disentanglement"] < 0.1
        assert found.scores["sap"] < 0.1

    def test_images_of_which_a_factor_is_unknown_are_left_out(self):
        random = np.random.default_rng(0)
        latents = random.normal(size=(60, 3))
        values = latents[:, 0].copy()
        values[:20] = np.nan

        found = factor_scores(
            latents, [continuous("a", values), continuous("b", latents[:, 1])], [str(n) for n in range(60)], shuffles=1
        )

        assert found.n == 40

    def test_one_factor_is_too_few(self):
        with pytest.raises(UserError, match="at least 2 factors, got 1"):
            factor_scores(np.eye(20), [continuous("a", np.arange(20))], [str(n) for n in range(20)])
