"""Measurements as one flat JSON file."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events

from medgen.output import atomic_write_text, git_revision

__all__ = ["MetricsJSON"]

logger = logging.getLogger(__name__)

SHOWN = 12  # figures named in the log; a detection has more than a hundred


class MetricsJSON:
    """Writes ``engine.state.metrics`` at the end of a run, with ``n``, ``git`` and what else is given.

    Args:
        path: the JSON file.
        extra: more entries, such as the seed and the settings that a metric depends on.
    """

    def __init__(self, path: str | Path, extra: Mapping[str, Any] | None = None) -> None:
        self.path, self.extra = Path(path), dict(extra or {})
        self.count = 0

    def attach(self, engine: Engine) -> None:
        """Register on an evaluator whose output is a list, one entry an image."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def start(self, engine: Engine) -> None:
        """Count from zero."""
        self.count = 0

    def add(self, engine: Engine) -> None:
        """Count the images of a batch."""
        self.count += len(engine.state.output)

    def write(self, engine: Engine) -> None:
        """Write the file and print the figures."""
        n = int(idist.all_reduce(self.count))
        if idist.get_rank() > 0:
            return
        figures = {name: float(value) for name, value in engine.state.metrics.items()}
        # JSON knows neither infinity (the PSNR of equal images) nor NaN
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        finite |= {name: int(value) for name, value in figures.items() if name.startswith("n_")}  # counts
        for name in (name for name, value in finite.items() if value is None):
            logger.warning(f"{name} is {figures[name]}: written as null")
        # which weights were measured: the registry refuses the figures of others
        names = ("model", "model_sha256")
        model = {name: getattr(engine.state, name) for name in names if hasattr(engine.state, name)}
        record = {**finite, "n": n, **self.extra, **model, "git": git_revision()}
        atomic_write_text(self.path, json.dumps(record, indent=4, allow_nan=False) + "\n")
        shown = ", ".join(f"{name} {value:.4f}" for name, value in list(figures.items())[:SHOWN])
        more = f" and {len(figures) - SHOWN} more" if len(figures) > SHOWN else ""
        logger.info(f"{shown}{more} (n = {n}) -> {self.path}")
