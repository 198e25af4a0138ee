"""What a person sees while a model trains."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Events
from monai.data import Dataset

from medgen.data.stream import ResumableDataLoader
from medgen.engines import GenerativeTrainer
from medgen.handlers import TrainingProgress, progress


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def train(clock, caplog, log_seconds=0.0):
    class Trainer(GenerativeTrainer):
        def _iteration(self, engine, batch):
            clock.seconds += 0.5
            return [{"loss": torch.tensor(0.25), "kl": torch.tensor(1234.5)}]

    def validate():
        clock.seconds += 60

    shown = TrainingProgress("my-run", keys=("loss", "kl", "absent"), log_seconds=log_seconds)
    loader = ResumableDataLoader(Dataset([{"image": torch.zeros(1)}] * 4), batch_size=2)
    engine = Trainer(device="cpu", max_epochs=2, train_data_loader=loader, components={}, train_handlers=[shown])
    engine.add_event_handler(Events.EPOCH_COMPLETED, validate)
    with caplog.at_level(logging.INFO, logger="medgen"):
        engine.run()
    return [record.getMessage() for record in caplog.records]


def test_log_names_the_run_and_its_length_then_shows_losses_and_speed(clock, caplog):
    lines = train(clock, caplog)
    assert lines[0] == "run my-run: 2 epochs of 2 steps of 2 images on cpu in float32, 1 process(es)"
    assert lines[1] == "epoch 1/2 (25%): loss 0.25 kl 1234, 4.0 img/s"
    assert len(lines) == 5


def test_speed_leaves_the_time_of_validation_out_and_the_end_is_always_shown(clock, caplog):
    lines = train(clock, caplog, log_seconds=1000)
    assert lines[1:] == ["epoch 2/2 (100%): loss 0.25 kl 1234, 4.0 img/s"]


def test_counts_are_shown_whole(clock, caplog):
    class Trainer(GenerativeTrainer):
        def _iteration(self, engine, batch):
            clock.seconds += 1
            return [{"loss": torch.tensor(0.25), "images_seen": 1234567}]

    loader = ResumableDataLoader(Dataset([{"image": torch.zeros(1)}] * 2), batch_size=2)
    shown = TrainingProgress("run", keys=("images_seen", "loss"), log_seconds=0.0)
    engine = Trainer(device="cpu", max_epochs=1, train_data_loader=loader, components={}, train_handlers=[shown])
    with caplog.at_level(logging.INFO, logger="medgen"):
        engine.run()
    assert caplog.records[-1].getMessage() == "epoch 1/1 (100%): images_seen 1,234,567 loss 0.25, 2.0 img/s"
