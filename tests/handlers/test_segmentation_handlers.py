"""Pictures of masks and the intervals of their figures."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from medgen.handlers import MetricIntervals, SegmentationGrid
from medgen.metrics import bootstrap_mean
from medgen.transforms.outline import PREDICTED, TRUE


def test_grid_shows_both_outlines_where_the_masks_are(tmp_path):
    label, pred = torch.zeros(2, 1, 1, 256, 256)
    label[..., 20:120, 20:120] = 1
    pred[..., 140:240, 140:240] = 1
    item = {"image": torch.full((1, 256, 256), 0.5), "label": label[0], "pred": pred[0]}
    engine = SimpleNamespace(state=SimpleNamespace(output=[item] * 3, epoch=4))
    grid = SegmentationGrid(tmp_path, count=3, columns=2)
    grid.start(engine)
    grid.collect(engine)
    grid.write(engine)
    picture = np.asarray(Image.open(tmp_path / "epoch_0004.png"))
    assert picture.shape == (2 * 256 + 4, 2 * 256 + 4, 3)
    first = picture[:256, :256]
    for colour, low, high in ((TRUE, 20, 120), (PREDICTED, 140, 240)):
        points = np.argwhere((first == colour).all(axis=-1))
        np.testing.assert_allclose([points.min(), points.max()], [low, high], atol=2)
    assert (picture[260:, 260:] == 255).all()  # no fourth image


def test_grid_keeps_the_first_images_of_several_batches(tmp_path):
    item = {"image": torch.zeros(1, 256, 256), "label": torch.zeros(1, 256, 256), "pred": torch.zeros(1, 256, 256)}
    engine = SimpleNamespace(state=SimpleNamespace(output=[item] * 2, epoch=1))
    grid = SegmentationGrid(tmp_path, "test", count=3, columns=3)
    grid.start(engine)
    for _ in range(3):
        grid.collect(engine)
    grid.write(engine)
    assert Image.open(tmp_path / "test.png").size == (3 * 256 + 2 * 4, 256)


def test_intervals_are_drawn_over_patients():
    values = [0.9, 0.8, 0.95, 0.7]
    items = [{"patient": patient} for patient in ("a", "a", "b", "c")]
    engine = SimpleNamespace(state=SimpleNamespace(metric_details={"dice": torch.tensor(values)[:, None]}, metrics={}))
    MetricIntervals(items, seed=1)(engine)
    expected = bootstrap_mean(values, ["a", "a", "b", "c"], seed=1)
    assert engine.state.metrics == {
        "dice": pytest.approx(expected.value, abs=1e-6),
        "dice_low": pytest.approx(expected.low, abs=1e-6),
        "dice_high": pytest.approx(expected.high, abs=1e-6),
    }


def test_distances_to_empty_masks_are_left_out_and_counted():
    details = {"distance": torch.tensor([[1.0], [float("inf")], [float("nan")], [3.0]])}
    items = [{"patient": n} for n in range(4)]
    engine = SimpleNamespace(state=SimpleNamespace(metric_details=details, metrics={"distance": float("nan")}))
    MetricIntervals(items)(engine)
    assert engine.state.metrics["distance"] == 2
    assert engine.state.metrics["n_distance"] == 2


def test_of_one_patient_there_is_a_mean_and_no_interval(caplog):
    details = {"distance": torch.tensor([[1.0], [2.0], [float("inf")]])}
    items = [{"patient": "a"}, {"patient": "a"}, {"patient": "b"}]
    engine = SimpleNamespace(state=SimpleNamespace(metric_details=details, metrics={"distance": float("inf")}))
    MetricIntervals(items)(engine)
    assert engine.state.metrics == {"distance": 1.5, "n_distance": 2}
    assert "one patient" in caplog.text
