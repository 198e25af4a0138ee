"""Grids lie as the images do; metrics.json is flat and complete."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from PIL import Image

from medgen.handlers import MetricsJSON, ReconstructionGrid, SampleGrid, save_comparison, save_grid, scalars
from medgen.inferers import draw_latents
from medgen.networks import PGGANGenerator, StyleGAN2Generator


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


def test_reconstruction_grid_pads_smaller_images_with_black(tmp_path):
    batches = [
        [{"image": torch.full((1, *size), 0.4), "pred": torch.full((1, *size), 0.6)}] for size in ((2, 5), (4, 3))
    ]
    engine = Engine(lambda _, batch: batch)
    ReconstructionGrid(tmp_path, name="grid").attach(engine)
    engine.run(batches)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.shape == (3 * 4 + 2 * 2, 2 * 5 + 2)
    for row, level in enumerate((102, 153, 204)):
        first, second = pixels[6 * row : 6 * row + 4, :5], pixels[6 * row : 6 * row + 4, 7:]
        assert (first[:2] == level).all()
        assert (first[2:] == 0).all()
        assert (second[:, :3] == level).all()
        assert (second[:, 3:] == 0).all()


def test_reconstruction_grid_of_a_known_total_is_taken_evenly(tmp_path):
    values = [n / 10 for n in range(10)]  # in batches of 2
    batches = [
        [{"image": torch.full((1, 3, 3), v), "pred": torch.zeros(1, 3, 3)} for v in values[n : n + 2]]
        for n in range(0, 10, 2)
    ]
    engine = Engine(lambda _, batch: batch)
    ReconstructionGrid(tmp_path, name="even", count=4, total=10).attach(engine)
    for _ in range(2):  # a second run begins anew
        engine.run(batches)
    pixels = np.asarray(Image.open(tmp_path / "even.png"))
    assert pixels[0, ::5].tolist() == [0, 76, 153, 230]


def test_comparison_of_files_is_the_picture_that_a_run_over_them_draws(tmp_path):
    images = [{"image": torch.full((1, 3, 3 + v), v / 4), "pred": torch.full((1, 3, 3 + v), 0.5)} for v in range(3)]
    engine = Engine(lambda _, batch: batch)
    ReconstructionGrid(tmp_path, name="run", count=3).attach(engine)
    engine.run([[image] for image in images])
    save_comparison(tmp_path / "files.png", [{"number": number} for number in range(3)], lambda i: images[i["number"]])
    assert (tmp_path / "files.png").read_bytes() == (tmp_path / "run.png").read_bytes()
    save_comparison(tmp_path / "none.png", [], lambda item: item)
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("num_classes", [0, 2])
def test_sample_grid_shows_the_same_latents_below_real_images(num_classes, tmp_path):
    network = StyleGAN2Generator(16, num_classes=num_classes, latent_dim=4, w_dim=4, channel_base=32, channel_max=4)
    engine = Engine(lambda *_: [{"image": torch.full((2, 1, 16, 16), 0.5)}])
    engine.images_seen = 0
    engine.state.device = "cpu"
    engine.add_event_handler(Events.EPOCH_STARTED, lambda: setattr(engine, "images_seen", engine.images_seen + 10))
    SampleGrid(network.eval(), tmp_path, interval=2, rows=2, columns=3).attach(engine)
    engine.run([0], max_epochs=5)
    assert [file.name for file in sorted(tmp_path.iterdir())] == [f"samples_0000000{n}.png" for n in (20, 40, 50)]
    pictures = [np.asarray(Image.open(file)) for file in sorted(tmp_path.iterdir())]
    assert pictures[0].shape == (3 * 18 - 2, 3 * 18 - 2)
    assert (pictures[0][:16, :34:18] == 191).all()  # 0.5 of [-1, 1]
    assert (pictures[0][:16, 36:] == 0).all()  # a batch of two leaves the third place black
    assert pictures[0][18:].std() > 10
    assert (pictures[0] == pictures[2]).all()


def test_sample_grid_of_a_growing_network_has_its_full_size_and_a_caption(tmp_path):
    network = PGGANGenerator((4, 4, 4), latent_dim=4).eval()
    network.grow(8)
    engine = Engine(lambda *_: [{"image": torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)}])
    engine.images_seen, engine.state.device, engine.caption = 10, "cpu", "10 images, 8 px"
    SampleGrid(network, tmp_path, rows=1, columns=2, size=16).attach(engine)
    engine.run([0], max_epochs=1)
    picture = np.asarray(Image.open(tmp_path / "samples_000000010.png"))
    caption, grid = picture[: -2 * 18 + 2], picture[-2 * 18 + 2 :]
    assert len(caption) > 8
    assert (caption == 0).any()
    assert (caption == 255).any()
    pixels = np.linspace(0, 255, 64).round().reshape(8, 8)
    assert (grid[:16, :16] == np.kron(pixels, np.ones((2, 2)))).all()
    expected = network(draw_latents([0, 1], 4))[0, 0].detach().numpy() / 2 + 0.5
    assert (grid[18:, :16] == np.kron((expected.clip(0, 1) * 255).round(), np.ones((2, 2)))).all()


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
