"""When validation takes place."""

from __future__ import annotations

import pytest
from ignite.engine import Engine, Events
from monai.engines import Evaluator

from medgen.engines.trainer import TrainingEvents
from medgen.handlers import ValidationAtIntervals
from medgen.preemption import Termination


class Recorder(Evaluator):
    def __init__(self):
        super().__init__(device="cpu", val_data_loader=[0])
        self.epochs = []

    def run(self, global_epoch):
        self.epochs.append(global_epoch)


@pytest.mark.parametrize(
    ("interval", "epochs", "expected"), [(3, 7, [3, 6, 7]), (3, 6, [3, 6]), (3, 2, [2]), (1, 2, [1, 2])]
)
def test_every_interval_and_after_the_last_epoch(interval, epochs, expected):
    validator, trainer = Recorder(), Engine(lambda *_: None)
    ValidationAtIntervals(interval, validator).attach(trainer)
    trainer.termination = Termination()
    trainer.register_events(*TrainingEvents)
    trainer.add_event_handler(TrainingEvents.VALIDATION_DUE, lambda: due.append(trainer.state.epoch))
    due = []
    assert not trainer.has_event_handler(validator, Events.COMPLETED)
    trainer.run([0], max_epochs=epochs)
    assert validator.epochs == due == expected
