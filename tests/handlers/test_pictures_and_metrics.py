"""Grids lie as the images do; metrics.json is flat and complete."""

from __future__ import annotations

import json

import numpy as np
import torch
from ignite.engine import Engine, Events
from PIL import Image

from medgen.handlers import MetricsJSON, ReconstructionGrid, save_grid, scalars


def test_grid_shows_rows_below_each_other_and_images_upright(tmp_path):
    corner = torch.zeros(2, 1, 4, 6)
    corner[0, 0, 0, 5] = 1.0  # top right of the first image
    save_grid([corner, torch.full_like(corner, 0.5)], tmp_path / "grid.png", gap=1)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.shape == (2 * 4 + 1, 2 * 6 + 1)
    assert pixels[0, 5] == 255
    assert pixels[:4, :5].max() == 0
    assert (pixels[5:, :6] == 128).all()
    assert (pixels[4, :] == 255).all()  # the gap


def test_colour_grid_keeps_channels(tmp_path):
    red = torch.zeros(1, 3, 2, 2)
    red[:, 0] = 1
    save_grid([red], tmp_path / "grid.png")
    assert np.asarray(Image.open(tmp_path / "grid.png"))[0, 0].tolist() == [255, 0, 0]


def test_reconstruction_grid_takes_the_first_images_and_shows_their_difference(tmp_path):
    batches = [[{"image": torch.full((1, 3, 3), v), "pred": torch.full((1, 3, 3), v + 0.1)}] for v in (0.2, 0.5, 0.8)]
    engine = Engine(lambda _, batch: batch)
    ReconstructionGrid(tmp_path, name="at_{epoch}", count=2).attach(engine)
    engine.run(batches)
    pixels = np.asarray(Image.open(tmp_path / "at_1.png"))
    assert pixels.shape == (3 * 3 + 2 * 2, 2 * 3 + 2)
    assert [pixels[1, 1], pixels[6, 1], pixels[11, 1]] == [51, 76, 102]
    assert pixels[1, 6] == 128


def test_metrics_json_is_one_flat_object_with_n_git_and_extras(tmp_path):
    engine = Engine(lambda _, batch: [{"x": x} for x in batch])
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: e.state.metrics.update(l1=torch.tensor(3.0)))
    MetricsJSON(tmp_path / "metrics.json", {"seed": 3}).attach(engine)
    engine.run([[1.0, 2.0], [6.0]])
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["l1"] == 3.0
    assert (record["n"], record["seed"]) == (3, 3)
    assert set(record) == {"l1", "n", "seed", "git"}


def test_scalars_leave_images_out():
    assert scalars([{"loss": torch.tensor(2.0), "kl": 3.0, "image": torch.zeros(1, 1)}]) == {"loss": 2.0, "kl": 3.0}
