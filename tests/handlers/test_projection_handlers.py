"""Progress of a projection, and the picture of its losses."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from PIL import Image

from medgen.handlers import ProjectionProgress, save_loss_curves
from medgen.transforms import SaveProjectiond


def run_engine(progress: ProjectionProgress, sizes: list[int], steps: int, early: int = 0) -> None:
    """An engine that goes through the steps as the projector does; the batches stop ``early`` steps before the end."""

    def project(engine, batch):
        if not batch:
            raise RuntimeError("nothing to project")
        for step in range(1, steps - early + 1):
            progress.projector.on_step(step, batch)

    engine = Engine(project)
    engine.data_loader = SimpleNamespace(dataset=range(sum(sizes)))
    engine.state.device = torch.device("cpu")
    progress.attach(engine)
    engine.run(sizes)


def test_log_says_images_done_speed_and_time_left(caplog):
    progress = ProjectionProgress(SimpleNamespace(steps=4, on_step=None), total=8, log_seconds=0)
    with caplog.at_level(logging.INFO):
        run_engine(progress, [2, 1], steps=4)
    lines = [record.message for record in caplog.records if record.name == "medgen.handlers.projection"]
    assert lines[0] == "projecting 3 of 8 images, 4 steps each, on cpu"
    assert lines[1].startswith("5/8 images done, 2 at step 1/4: ")
    assert lines[5].startswith("7/8 images done, 1 at step 1/4: ")
    assert lines[5].endswith("left")
    assert "images/min" in lines[5]
    assert lines[-1].startswith("3 images projected in")
    assert progress.projector.on_step is None


@pytest.mark.parametrize("early", [0, 2])
def test_bar_on_a_terminal_reaches_its_end(monkeypatch, early):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = ProjectionProgress(SimpleNamespace(steps=4, on_step=None), total=3)
    run_engine(progress, [2, 1], steps=4, early=early)
    assert (progress.bar.n, progress.bar.total, progress.bar.disable) == (12, 12, True)


def test_error_closes_the_bar_and_goes_on(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = ProjectionProgress(SimpleNamespace(steps=4, on_step=None), total=3)
    with pytest.raises(RuntimeError, match="nothing to project"):
        run_engine(progress, [2, 0], steps=4)
    assert progress.bar.disable


@pytest.mark.parametrize("count", [1, 40])
def test_loss_curves_are_drawn_the_same_each_time(tmp_path, count):
    (tmp_path / "model.pt").write_bytes(b"weights")
    saver = SaveProjectiond(tmp_path / "out", {}, tmp_path / "model.pt", save_noise=False)
    random = np.random.default_rng(0)
    records = []
    for number in range(count):
        curve = torch.from_numpy(np.exp(-np.arange(30) / 10) + 0.01 * random.random(30))
        curve[25:] = torch.nan  # all stopped early
        file = tmp_path / f"{number}.png"
        file.write_bytes(b"pixels")
        image = MetaTensor(torch.zeros(1, 4, 4), meta={"filename_or_obj": str(file)})
        found = {"image": image, "w": torch.zeros(1, 4), "loss_curve": curve, "steps": 25, "distance": 0.1}
        records.append(saver(found)["projection_path"])
    for name in ("first.png", "second.png"):
        save_loss_curves(tmp_path / "images" / name, records)
    pixels = np.asarray(Image.open(tmp_path / "images" / "first.png").convert("L"))
    assert pixels.min() < 128 < pixels.max()
    assert (tmp_path / "images/first.png").read_bytes() == (tmp_path / "images/second.png").read_bytes()
