"""Progress that a person can see: a bar on a terminal, lines in a log file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from tqdm import tqdm

__all__ = ["TrainingProgress", "scalars"]

logger = logging.getLogger(__name__)


def scalars(output: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The scalars of a trainer's output, a list with one dictionary, as floats: what loggers take."""
    return {k: float(v) for k, v in output[0].items() if not isinstance(v, torch.Tensor) or v.ndim == 0}


class TrainingProgress:
    """Shows epoch, losses and images per second.

    On a terminal a bar over all images of the training; elsewhere (a cluster's log) a line every ``log_seconds``.
    ``engine.state.images_per_second`` holds the speed since the last line, without the time of validation.

    Args:
        run_name: name of the run, shown at the start.
        keys: entries of the engine's output to show.
        log_seconds: seconds between lines where there is no terminal, and between refreshes of the losses.
    """

    def __init__(self, run_name: str, keys: Sequence[str] = ("loss",), log_seconds: float = 10.0) -> None:
        self.run_name, self.keys, self.log_seconds = run_name, tuple(keys), log_seconds
        self.bar: tqdm | None = None
        self._clock, self._busy, self._images = 0.0, 0.0, 0
        self._shown = 0.0

    def attach(self, engine: Engine) -> None:
        """Register on a trainer with ``images_seen``; does nothing on other ranks than 0."""
        if idist.get_rank() > 0:
            return
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self.tick)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.update)
        engine.add_event_handler(Events.COMPLETED, self.close)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.fail)

    def start(self, engine: Engine) -> None:
        """Name the run and open the bar."""
        logger.info(
            f"run {self.run_name}: {engine.plan} on {engine.state.device} in {engine.precision}, "
            f"{idist.get_world_size()} process(es)"
        )
        engine.state.images_per_second = 0.0
        self._images, self._busy = 0, 0.0
        self._shown = time.monotonic()
        if sys.stderr.isatty():
            self.bar = tqdm(total=engine.total_images, initial=engine.images_seen, unit="img", dynamic_ncols=True)

    def tick(self, engine: Engine) -> None:
        """Start the clock of a step: what happens between steps (validation, pictures) does not count."""
        self._clock = time.monotonic()

    def update(self, engine: Engine) -> None:
        """Count the step; show the losses now and then: reading them waits for the device."""
        now = time.monotonic()
        step = engine.data_loader.global_batch_size
        self._busy += now - self._clock
        self._images += step
        last = engine.images_seen >= engine.total_images
        if self.bar is not None:
            self.bar.update(step)
        if now - self._shown < (0.5 if self.bar is not None else self.log_seconds) and not last:
            return
        engine.state.images_per_second = self._images / max(self._busy, 1e-9)
        output = engine.state.output[0]
        shown = {key: output[key] for key in self.keys if key in output}
        losses = " ".join(f"{k} {v:,}" if isinstance(v, int) else f"{k} {float(v):.4g}" for k, v in shown.items())
        speed = f"{engine.state.images_per_second:.1f} img/s"
        if self.bar is not None:
            self.bar.set_description(f"epoch {engine.state.epoch}/{engine.state.max_epochs}", refresh=False)
            self.bar.set_postfix_str(f"{losses}, {speed}", refresh=False)
        else:
            done = min(engine.images_seen / engine.total_images, 1.0)
            logger.info(f"epoch {engine.state.epoch}/{engine.state.max_epochs} ({done:.0%}): {losses}, {speed}")
        self._images, self._busy, self._shown = 0, 0.0, now

    def close(self, engine: Engine) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()

    def fail(self, engine: Engine, error: BaseException) -> None:
        """Close the bar before the error is printed."""
        self.close(engine)
        raise error
