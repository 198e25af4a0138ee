"""Detection figures of a table of scores: names, values, what is left out, and the files."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from scipy.stats import mannwhitneyu

from medgen.errors import UserError
from medgen.metrics.detection import auroc_delong, delong_test, permutation_test, sensitivity_at_specificity
from medgen.metrics.detection_table import (
    SCORE_COLUMNS,
    detection_figures,
    detection_report,
    read_scores,
    roc_curve,
    write_table,
)

FAST = {"resamples": 200, "shuffles": 200}


def table(n: int = 24, shift: float = 1.0, images_per_patient: int = 2) -> list[dict]:
    """Rows of as many normal as anomalous images, whose scores overlap."""
    random = np.random.default_rng(0)
    rows = []
    for number in range(2 * n):
        anomaly = int(number >= n)
        scores = {name: float(random.gamma(2) + shift * anomaly) for name in SCORE_COLUMNS}
        patient = f"{'a' if anomaly else 'n'}{number // images_per_patient}"
        rows.append({"image": f"{number}.png", "patient": patient, "anomaly": anomaly, **scores})
    return rows


def columns(rows: list[dict], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return tuple(np.array([row[key] for row in rows]) for key in (name, "anomaly", "patient"))


def test_auroc_of_each_score_is_that_of_mann_whitney():
    rows = table()
    found = detection_figures(rows, **FAST).figures
    for name in SCORE_COLUMNS:
        scores, labels, _ = columns(rows, name)
        u = mannwhitneyu(scores[labels == 1], scores[labels == 0]).statistic
        assert found[f"auroc_{name}"] == pytest.approx(u / (24 * 24))
        assert found[f"auroc_{name}_low"] <= found[f"auroc_{name}"] <= found[f"auroc_{name}_high"]


def test_figures_are_those_of_the_functions_with_patients():
    rows = table()
    found = detection_figures(rows, seed=3, **FAST).figures
    scores, labels, patients = columns(rows, "mse_patch")
    interval = auroc_delong(scores, labels, patients)
    point = sensitivity_at_specificity(scores, labels, patients, specificity=0.9, resamples=200, seed=3)
    kinds = labels == 1, labels == 0
    groups = [scores[kind] for kind in kinds]
    test = permutation_test(
        *groups,
        alternative="greater",
        shuffles=200,
        seed=3,
        first_patients=patients[kinds[0]],
        second_patients=patients[kinds[1]],
    )
    pair = delong_test(scores, columns(rows, "wd_patch")[0], labels, patients)
    assert found["auroc_delong_mse_patch_low"] == interval.low
    assert found["sensitivity_at_90_mse_patch"] == point.sensitivity.value
    assert found["sensitivity_at_90_mse_patch_threshold"] == point.threshold
    assert found["permutation_p_mse_patch"] == test.p_value
    assert found["delong_p_patch"] == pair.p_value
    assert found["auroc_mse_minus_wd_patch"] == pytest.approx(found["auroc_mse_patch"] - found["auroc_wd_patch"])


def test_same_seed_same_figures():
    assert detection_figures(table(), seed=1, **FAST) == detection_figures(table(), seed=1, **FAST)


def test_images_without_a_body_are_left_out_and_named():
    rows = table()
    rows[0]["mse_body"] = None
    rows[1]["mse_body"] = float("nan")
    rows[-1]["mse_body"] = None
    found = detection_figures(rows, **FAST)
    row = next(row for row in found.rows if row["score"] == "mse_body")
    scores, labels, _ = columns(rows[2:-1], "mse_body")
    u = mannwhitneyu(scores[labels == 1], scores[labels == 0]).statistic
    assert found.figures["auroc_mse_body"] == pytest.approx(u / (23 * 22))
    assert (row["n_normal"], row["n_anomalous"], row["left_out"]) == (22, 23, 3)
    assert "mse_body: 2 normal and 1 anomalous images without it are left out" in found.notes
    assert found.counts["n_normal"] == 24


def test_patient_with_images_of_both_classes_costs_the_permutation_test_and_nothing_else():
    rows = table()
    rows[-1]["patient"] = rows[0]["patient"]
    found = detection_figures(rows, **FAST)
    assert "permutation_p_mse_full" not in found.figures
    (note,) = (note for note in found.notes if "no permutation_p: no patient may be in both groups" in note)
    assert note.startswith("mse_full, ")
    assert "auroc_mse_full_low" in found.figures


def test_without_patients_each_image_is_its_own_and_a_note_says_so():
    rows = [{**row, "patient": ""} for row in table()]
    found = detection_figures(rows, **FAST)
    assert found.notes[0].startswith("not every image names its patient")
    assert found.counts == {"n_normal": 24, "n_anomalous": 24}


def test_two_images_give_what_two_images_allow():
    rows = [{"anomaly": kind, "patient": str(kind), "mse_full": 1.0 + kind} for kind in (0, 1)]
    found = detection_figures(rows, **FAST)
    assert found.figures["auroc_mse_full"] == 1
    assert "auroc_delong_mse_full_low" not in found.figures
    assert any("no auroc_delong" in note for note in found.notes)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"anomaly": 0, "mse_full": 1.0}], "both classes are needed, got 0 anomalous and 1 normal"),
        ([{"anomaly": kind, "image": "x"} for kind in (0, 1)], "needs one of the columns mse_full"),
        ([{"anomaly": 2, "image": "x.png", "mse_full": 1.0}], "anomaly must be 1 or 0 in every row, got 2 for x.png"),
    ],
)
def test_useless_tables_are_refused(rows, message):
    with pytest.raises(UserError, match=message):
        detection_figures(rows, **FAST)


def test_area_under_the_roc_curve_is_the_auroc_with_ties():
    random = np.random.default_rng(1)
    scores, labels = random.integers(0, 6, 60).astype(float), random.integers(0, 2, 60).astype(bool)
    false, found = roc_curve(scores, labels)
    u = mannwhitneyu(scores[labels], scores[~labels]).statistic
    assert (false[0], found[0], false[-1], found[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(found, false) == pytest.approx(u / (labels.sum() * (~labels).sum()))


def test_table_survives_writing_and_reading(tmp_path):
    rows = table(n=3)
    rows[1]["wd_body"] = None
    write_table(tmp_path / "scores.csv", rows)
    back = read_scores(tmp_path / "scores.csv")
    assert [row["wd_body"] for row in back] == [row["wd_body"] for row in rows]
    assert [row["patient"] for row in back] == [row["patient"] for row in rows]
    assert detection_figures(back, **FAST).figures == detection_figures(rows, **FAST).figures


def test_two_tables_without_a_class_equal_one_with_it(tmp_path):
    rows = table()
    write_table(tmp_path / "all.csv", rows)
    for kind in (0, 1):
        mine = [{k: v for k, v in row.items() if k != "anomaly"} for row in rows if row["anomaly"] == kind]
        write_table(tmp_path / f"{kind}.csv", mine)
    one = detection_report(tmp_path / "all.csv", None, tmp_path / "a", **FAST)
    two = detection_report(tmp_path / "0.csv", tmp_path / "1.csv", tmp_path / "b", **FAST)
    assert one.figures == two.figures


def test_report_writes_flat_finite_metrics_a_table_and_the_curves(tmp_path):
    write_table(tmp_path / "scores.csv", table())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.json").write_text("of an evaluation")
    found = detection_report(tmp_path / "scores.csv", None, tmp_path / "out", **FAST)
    metrics = json.loads((tmp_path / "out" / "detection.json").read_text())
    assert {name: metrics[name] for name in found.figures} == found.figures
    assert (metrics["n"], metrics["n_anomalous"], metrics["patients_normal"]) == (48, 24, 12)
    assert all(isinstance(value, int | float | str) for value in metrics.values())
    with (tmp_path / "out" / "detection.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["score"] for row in rows] == list(SCORE_COLUMNS)
    assert float(rows[0]["auroc"]) == found.figures["auroc_mse_full"]
    with Image.open(tmp_path / "out" / "images" / "roc.png") as picture:
        assert min(picture.size) > 300
    assert "mse_full: AUROC" in found.summary()
    assert (tmp_path / "out" / "metrics.json").read_text() == "of an evaluation"


def test_patients_of_both_tables_are_told_and_can_be_others(tmp_path):
    rows = table()
    for kind in (0, 1):
        mine = [row | {"patient": f"{n:04d}"} for n, row in enumerate(row for row in rows if row["anomaly"] == kind)]
        write_table(tmp_path / f"{kind}.csv", mine)
    tables = tmp_path / "0.csv", tmp_path / "1.csv", tmp_path / "out"
    shared = detection_report(*tables, **FAST)
    assert shared.notes[0].startswith("24 patients are in both tables (0000 is one)")
    assert "--distinct true" in shared.summary()
    assert "permutation_p_mse_full" not in shared.figures
    distinct = detection_report(*tables, distinct=True, **FAST)
    assert not [note for note in distinct.notes if "both tables" in note]
    assert "permutation_p_mse_full" in distinct.figures
    named = [row | {"patient": f"{n:04d}"} for n, row in enumerate(rows)]
    write_table(tmp_path / "all.csv", named)
    assert distinct.figures == pytest.approx(detection_report(tmp_path / "all.csv", None, tmp_path, **FAST).figures)


@pytest.mark.parametrize(
    ("text", "anomaly", "message"),
    [
        ("image,mse_full\n", None, "has no rows"),
        ("image,mse_full\na.png,1\n", None, "line 2: names no class"),
        ("image,anomaly,mse_full\na.png,1,0.5\n", 0, "line 2: anomaly is 1, but the table was given as one of class 0"),
        ("image,anomaly,mse_full\na.png,1,much\n", None, "line 2, mse_full: expected a number, got 'much'"),
        ("image,anomaly,mse_full\na.png,1,inf\n", None, "expected a finite number"),
        ("image,anomaly,mse_full\na.png,1,2\nb.png,yes,2\n", None, r"scores\.csv, line 3, anomaly: .* got 'yes'"),
        ("image,anomaly,mse_full\na.png,2,1\n", None, r"scores\.csv, line 2: anomaly must be 0 or 1, got 2"),
    ],
)
def test_broken_tables_are_refused_with_their_line(tmp_path, text, anomaly, message):
    (tmp_path / "scores.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_scores(tmp_path / "scores.csv", anomaly)


@pytest.mark.parametrize("anomaly", [None, 1])
def test_tables_of_pandas_and_of_excel_are_read(tmp_path, anomaly):
    (tmp_path / "scores.csv").write_text("anomaly,mse_full\n1.0,0.5\n1,0.25\n", encoding="utf-8-sig")
    rows = read_scores(tmp_path / "scores.csv", anomaly)
    assert [(row["anomaly"], row["mse_full"]) for row in rows] == [(1, 0.5), (1, 0.25)]


def test_missing_table_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"scores\.csv cannot be read"):
        read_scores(tmp_path / "scores.csv")


def test_module_imports_neither_torch_nor_monai():
    code = "import sys, medgen.metrics.detection_table; print({'torch', 'monai'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
