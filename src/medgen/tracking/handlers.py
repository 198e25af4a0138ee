"""Handlers that tell a tracker what a training, its validation or an evaluation does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.engines import Evaluator

from medgen.engines.trainer import GenerativeTrainer
from medgen.handlers.progress import scalars
from medgen.output import keep_run_name
from medgen.tracking.tracker import Tracker

__all__ = ["EvaluationTracking", "TrainingTracking", "ValidationTracking"]


class TrainingTracking:
    """Tracks a :class:`medgen.engines.GenerativeTrainer`.

    The step of all curves is the number of images seen, which means the same whatever the batch size and the number of
    processes. Attach it last, so that the pictures of an epoch are there.

    Args:
        tracker: of the run.
        interval: iterations between points; the last iteration is one as well.
    """

    def __init__(self, tracker: Tracker, interval: int = 10) -> None:
        self.tracker, self.interval = tracker, interval
        self._clock, self._busy, self._images = 0.0, 0.0, 0

    def attach(self, engine: GenerativeTrainer) -> None:
        """Register on a trainer."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self.tick)
        # before a checkpoint is saved: what that holds as done would not be logged by a training resumed from it
        _add_first(engine, Events.ITERATION_COMPLETED, self.update)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.end_epoch)
        engine.add_event_handler(Events.COMPLETED, lambda: self.end("FINISHED"))
        _on_failure(engine, self.end)

    def start(self, engine: GenerativeTrainer) -> None:
        """Open the run."""
        # one that was given on the command line, too: who resumes need not give it again
        keep_run_name(self.tracker.output_dir, self.tracker.run_name)
        self.tracker.step = engine.images_seen
        self.tracker.start(engine.state.device)
        self._busy, self._images = 0.0, 0

    def tick(self, engine: GenerativeTrainer) -> None:
        """Start the clock of a step: what happens between steps (validation, pictures) does not count."""
        self._clock = time.monotonic()

    def update(self, engine: GenerativeTrainer) -> None:
        """Log the scalars of the step now and then: reading them waits for the device."""
        self.tracker.step = engine.images_seen
        self._images += engine.data_loader.global_batch_size
        is_due = engine.state.iteration % self.interval == 0 or engine.images_seen >= engine.total_images
        values = scalars(engine.state.output) if is_due else {}
        self._busy += time.monotonic() - self._clock
        if is_due:
            speed = {"images_per_second": self._images / max(self._busy, 1e-9)}
            self.tracker.metrics({**values, **speed}, self.tracker.step)
            self.tracker.models()
            self._busy, self._images = 0.0, 0

    def end_epoch(self, engine: GenerativeTrainer) -> None:
        """Log the pictures that the epoch has made."""
        self.tracker.pictures()

    def end(self, status: str) -> None:
        """Log what the training has made, and end the run: FINISHED, FAILED or KILLED."""
        if not self.tracker.is_open:
            return
        self.tracker.pictures(last=status == "FINISHED")
        if status != "KILLED":  # somebody waits for the process to end
            self.tracker.results()
        self.tracker.finish(status)


class ValidationTracking:
    """Tracks the metrics of a validation at the position of the training that it belongs to.

    Args:
        tracker: that of the training.
    """

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker

    def attach(self, engine: Evaluator) -> None:
        """Register on the validator."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Evaluator) -> None:
        """Log the metrics."""
        self.tracker.metrics(engine.state.metrics, self.tracker.step)


class EvaluationTracking:
    """Tracks an evaluation or an inference as a run of its own: settings, metrics, and the files that are named.

    Args:
        tracker: of the run.
        files: become artifacts when all is done; these alone, since others may show patients.
    """

    def __init__(self, tracker: Tracker, files: Sequence[str | Path] = ()) -> None:
        self.tracker, self.named = tracker, files

    def attach(self, engine: Evaluator) -> None:
        """Register on an evaluator, last: its metrics are written by then."""
        engine.add_event_handler(Events.STARTED, lambda: self.tracker.start(engine.state.device))
        engine.add_event_handler(Events.COMPLETED, self.complete)
        _on_failure(engine, self.tracker.finish)

    def complete(self, engine: Evaluator) -> None:
        """Log all and end the run."""
        self.tracker.metrics(engine.state.metrics, 0)
        self.tracker.files(self.named)
        self.tracker.finish()


def _on_failure(engine: Engine, end: Callable[[str], None]) -> None:
    """End the run when the engine raises, KILLED by Ctrl+C and FAILED by an error, and let that go on."""

    def stop(_: Engine, error: BaseException) -> None:
        end("FAILED" if isinstance(error, Exception) else "KILLED")

    _add_first(engine, Events.EXCEPTION_RAISED, stop)

    def go_on(_: Engine, error: BaseException) -> None:
        raise error  # ignite takes an error that has a handler for one that was dealt with

    engine.add_event_handler(Events.EXCEPTION_RAISED, go_on)


def _add_first(engine: Engine, event: Events, handler: Callable[..., Any]) -> None:
    """Register a handler before those that are there; of two that raise the first ends the event."""
    engine.add_event_handler(event, handler)
    handlers = engine._event_handlers[event]
    handlers.insert(0, handlers.pop())
