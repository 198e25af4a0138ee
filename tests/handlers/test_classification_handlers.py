"""Predictions, figures and pictures of a classifier's evaluation."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from PIL import Image

from medgen.errors import UserError
from medgen.handlers import ClassificationFigures, ClassificationGrid, PredictionsCSV

P1 = (0.9, 0.2, 0.6, 0.4)
LABELS = (1, 0, 0, 1)


def outputs(p1=P1, names=None):
    """Entries of an evaluator's output: images of one grey level each, which tells them apart."""
    return [
        {
            "image": MetaTensor(
                torch.full((1, 4, 4), n / 10), meta={"filename_or_obj": f"data/{(names or 'abcd')[n]}.png"}
            ),
            "pred": torch.tensor([1 - p, p]),
            "label": torch.eye(2)[label],
        }
        for n, (p, label) in enumerate(zip(p1, LABELS, strict=False))
    ]


@pytest.fixture
def items():
    return [
        {"image": f"data/{n}.png", "patient": n.upper(), "label": label}
        for n, label in zip("abcd", LABELS, strict=True)
    ]


def evaluate(entries, *handlers):
    """An evaluation in batches of three."""
    engine = Engine(lambda _, batch: batch)
    for handler in handlers:
        handler.attach(engine)
    engine.run([entries[:3], entries[3:]])
    return engine


def test_table_has_a_row_for_each_image_in_the_order_of_the_datalist(items, tmp_path):
    table = PredictionsCSV(tmp_path / "p.csv", items, "data")
    evaluate(outputs(), table)
    evaluate(outputs(), table)  # a second run begins anew
    with open(tmp_path / "p.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["image", "patient", "label", "p0", "p1"]
    assert [row[:3] for row in rows[1:]] == [
        [f"{n}.png", n.upper(), str(k)] for n, k in zip("abcd", LABELS, strict=True)
    ]
    # to the last bit of a float32
    assert [np.float32(row[4]) for row in rows[1:]] == [np.float32(p) for p in P1]
    np.testing.assert_array_equal(table.labels, LABELS)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (outputs(names="abdc"), r"in the order of the datalist: expected data/c\.png, got data/d\.png"),
        (outputs()[:3], "expected 4 predictions, got 3"),
        (outputs() + outputs()[:1], "expected no further image, got data/a.png"),
        (outputs((0.9, 0.2, float("nan"), 0.4)), "data/c.png: the prediction is not a number"),
    ],
)
def test_table_is_complete_or_not_written(entries, message, items, tmp_path):
    with pytest.raises(UserError, match=message):
        evaluate(entries, PredictionsCSV(tmp_path / "p.csv", items, "data"))
    assert not (tmp_path / "p.csv").exists()


def test_figures_are_those_at_the_given_threshold_or_the_validations(items, tmp_path):
    table = PredictionsCSV(tmp_path / "p.csv", items, "data")
    many = np.repeat([[0.85, 0.15], [0.65, 0.35]], 10, axis=0)
    validation = SimpleNamespace(probabilities=many, labels=np.repeat([0, 1], 10))
    given = evaluate(outputs(), table, ClassificationFigures(table, validation, threshold=0.7)).state.metrics
    assert (given["sensitivity"], given["specificity"], given["threshold"]) == (0.5, 1.0, 0.7)
    assert given["auroc"] == 0.75  # of four pairs one is in the wrong order
    picked = evaluate(outputs(), table, ClassificationFigures(table, validation)).state.metrics
    assert (picked["sensitivity"], picked["specificity"]) == (1.0, 0.5)
    assert picked["threshold"] == pytest.approx(0.25)


def test_grid_shows_the_least_probability_of_the_true_class_first(tmp_path):
    grid = ClassificationGrid(tmp_path, ["no", "yes"], mean=[0.5], std=[0.5], name="worst", count=2)
    evaluate(outputs(), grid)
    picture = np.asarray(Image.open(tmp_path / "worst.png"))
    # c and d, which were decided wrongly with 0.6 each, and whose levels come from 0.2 and 0.3
    side = picture.shape[0] - 30
    assert picture.shape[1] == 2 * side + 4
    assert picture[-1, 0].tolist() == [round(255 * 0.6)] * 3
    assert picture[-1, -1].tolist() == [round(255 * 0.65)] * 3
