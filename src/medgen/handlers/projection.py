"""Progress of a projection, and a picture of its losses."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
from ignite.engine import Engine, Events
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from medgen.inferers.optimisation import LatentOptimiser
from medgen.inferers.projection import StyleGAN2Projector
from medgen.output import atomic_file
from medgen.transforms.save_projection import ProjectionRecord

__all__ = ["ProjectionProgress", "save_loss_curves"]

logger = logging.getLogger(__name__)

MOST_CURVES = 1000  # that are read for a picture
SINGLE_CURVES = 32  # up to so many images each has its own line


class ProjectionProgress:
    """Shows images done, speed and time left.

    On a terminal a bar over all steps of all images; elsewhere (a cluster's log) a line every ``log_seconds``. Steps
    that an early stop saves count as done.

    Args:
        projector: the evaluator's inferer.
        total: images of the whole run, those finished before a resume included.
        log_seconds: seconds between lines where there is no terminal.
    """

    def __init__(self, projector: StyleGAN2Projector | LatentOptimiser, total: int, log_seconds: float = 10.0) -> None:
        self.projector, self.total, self.log_seconds = projector, total, log_seconds
        self.bar: tqdm | None = None
        self._images = self._batch = self._to_do = 0
        self._started = self._shown = 0.0

    def attach(self, engine: Engine) -> None:
        """Register on an evaluator."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.finish_batch)
        engine.add_event_handler(Events.COMPLETED, self.close)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.fail)

    def start(self, engine: Engine) -> None:
        """Say what is to be done."""
        self._to_do, self._images = len(engine.data_loader.dataset), 0
        self._started = self._shown = time.monotonic()
        logger.info(
            f"projecting {self._to_do} of {self.total} images, {self.projector.steps} steps each, on "
            f"{engine.state.device}"
        )
        self.projector.on_step = self.step
        if sys.stderr.isatty():
            self.bar = tqdm(total=self._to_do * self.projector.steps, unit="step", unit_scale=True, dynamic_ncols=True)

    def step(self, step: int, images: int) -> None:
        """Count a step of the batch at hand."""
        if step == 1:
            self._batch = images
        done = self._images * self.projector.steps + step * self._batch
        before = self.total - self._to_do
        if self.bar is not None:
            self.bar.set_description(f"images {before + self._images}/{self.total}", refresh=False)
            self.bar.update(done - self.bar.n)
            return
        now = time.monotonic()
        if now - self._shown < self.log_seconds:
            return
        self._shown = now
        rate = done / max(now - self._started, 1e-9)
        left = timedelta(seconds=round((self._to_do * self.projector.steps - done) / rate))
        logger.info(
            f"{before + self._images}/{self.total} images done, {self._batch} at step {step}/{self.projector.steps}: "
            f"{60 * rate / self.projector.steps:.3g} images/min, {left} left"
        )

    def finish_batch(self, engine: Engine) -> None:
        """Count the images of the batch that is saved."""
        self._images += self._batch
        if self.bar is not None:
            self.bar.update(self._images * self.projector.steps - self.bar.n)

    def close(self, engine: Engine) -> None:
        """Close the bar."""
        self.projector.on_step = None
        if self.bar is not None:
            self.bar.close()
        minutes = max(time.monotonic() - self._started, 1e-9) / 60
        logger.info(f"{self._images} images projected in {minutes:.1f} min, {self._images / minutes:.3g} images/min")

    def fail(self, engine: Engine, error: BaseException) -> None:
        """Close the bar before the error is printed."""
        if self.bar is not None:
            self.bar.close()
        raise error


def save_loss_curves(path: str | Path, records: Sequence[str | Path], label: str = "loss, w disturbed") -> None:
    """Draw the loss of projections over their steps as a PNG.

    Up to 32 images have a line each; of more, the median and the band from the 5th to the 95th percentile are drawn,
    of at most 1,000 taken evenly from the list.

    Args:
        path: the PNG.
        records: files that :class:`~medgen.transforms.SaveProjectiond` wrote.
        label: of the losses.
    """
    chosen = records[:: -(-len(records) // MOST_CURVES)]
    curves = np.stack([ProjectionRecord(record).loss_curve for record in chosen])
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel=label, yscale="log")
    steps = np.arange(1, curves.shape[1] + 1)
    if len(curves) <= SINGLE_CURVES:
        axes.plot(steps, curves.T, linewidth=0.7)
    else:
        some = ~np.isnan(curves).all(0)  # every image may have stopped early
        low, middle, high = np.nanpercentile(curves[:, some], (5, 50, 95), axis=0)
        axes.fill_between(steps[some], low, high, alpha=0.3, linewidth=0, label="5th to 95th percentile")
        axes.plot(steps[some], middle, linewidth=1, label="median")
        axes.legend()
    axes.set_title(f"{len(records)} images projected")
    FigureCanvasAgg(figure)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
