"""Latents to the disk while they are made, with a bar."""

from __future__ import annotations

import logging
import sys
import time

from ignite.engine import Engine, Events
from tqdm import tqdm

from medgen.data.latents import LatentStore

__all__ = ["LatentWriter"]

logger = logging.getLogger(__name__)


class LatentWriter:
    """Hands an evaluator's posteriors to a store, and shows images done and images per second.

    On a terminal a bar; elsewhere (a cluster's log) a line every ``log_seconds``.

    Args:
        store: takes them.
        log_seconds: seconds between lines where there is no terminal.
    """

    def __init__(self, store: LatentStore, log_seconds: float = 10.0) -> None:
        self.store, self.log_seconds = store, log_seconds
        self.bar: tqdm | None = None
        self._done, self._started, self._shown = 0, 0.0, 0.0

    def attach(self, engine: Engine) -> None:
        """Register on an evaluator whose batch has ``number`` and whose output has ``pred``, one entry an image."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add)
        engine.add_event_handler(Events.COMPLETED, self.close)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.fail)

    def start(self, engine: Engine) -> None:
        """Say what is to be done."""
        to_do, total = len(self.store.todo), self.store.count
        logger.info(f"encoding {to_do:,} of {total:,} images, {self.store.copies} augmented copies each")
        self._started = self._shown = time.monotonic()
        self.bar = tqdm(total=to_do, unit="img", dynamic_ncols=True, disable=not sys.stderr.isatty())
        self._done = 0

    def add(self, engine: Engine) -> None:
        """Store a batch."""
        for item, output in zip(engine.state.batch, engine.state.output, strict=True):
            self.store.add(int(item["number"]), output["pred"].cpu().numpy())
        count = len(engine.state.output)
        self._done += count
        self.bar.update(count)
        now = time.monotonic()
        if self.bar.disable and now - self._shown >= self.log_seconds:
            self._shown = now
            speed = self._done / (now - self._started)
            logger.info(f"{self._done:,}/{len(self.store.todo):,} images encoded, {speed:.1f} img/s")

    def close(self, engine: Engine) -> None:
        """Close the bar and say how fast it was."""
        self.bar.close()
        seconds = max(time.monotonic() - self._started, 1e-9)
        logger.info(f"{self._done:,} images encoded in {seconds:.0f} s, {self._done / seconds:.1f} img/s")

    def fail(self, engine: Engine, error: BaseException) -> None:
        """Close the bar before the error is printed, and let go of the folder."""
        self.store.close()
        if self.bar is not None:
            self.bar.close()
        raise error
