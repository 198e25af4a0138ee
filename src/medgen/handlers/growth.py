"""Weights of each level of a progressively grown network."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Events
from torch import nn

from medgen.data.image_set import file_sha256
from medgen.data.provenance import TRAINED_ON
from medgen.engines.pggan import PGGANTrainer
from medgen.handlers.checkpoint import atomic_save
from medgen.handlers.companions import write_trained_on
from medgen.inferers.pggan import LEVELS

__all__ = ["LevelSaver"]

logger = logging.getLogger(__name__)


class LevelSaver:
    """Keeps the weights as they are at the end of each level: ``levels/0064.pt`` beside the model.

    A level's own output layer is no longer trained once the next one is in, while the layers below it go on changing:
    images of that size come from these weights, not from the grown network's.

    Attach it before :class:`medgen.handlers.TrainingCheckpoint`: a training that is killed between the two then writes
    the level again. Give it to the trainer's ``components``: it then tells its own levels from those of another
    training, which are kept as ``levels.previous``.

    Args:
        network: the moving average.
        model_path: file of the best weights.
        trained_on: whose images the network sees (:func:`medgen.data.trained_on`), written to ``trained_on.json``
            beside the levels with the SHA-256 of each; None for none.
    """

    def __init__(self, network: nn.Module, model_path: str | Path, trained_on: Mapping[str, Any] | None = None) -> None:
        self.network, self.folder = network, Path(model_path).parent / LEVELS
        self.trained_on = None if trained_on is None else dict(trained_on)
        self._saved: list[int] = []

    def attach(self, engine: PGGANTrainer) -> None:
        """Register on a trainer."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: PGGANTrainer) -> None:
        """Save if the step was the last of its level.

        Raises:
            UserError: a weight is not a number.
        """
        if not engine.at_level_end:
            return
        engine.check_finite_weights()
        first = not self._saved
        if self.network.resolution not in self._saved:  # a training that is lengthened ends a level twice
            self._saved.append(self.network.resolution)
        if idist.get_rank() > 0:
            return
        if first and self.folder.is_dir():
            before = self.folder.with_name(f"{LEVELS}.previous")
            shutil.rmtree(before, ignore_errors=True)
            self.folder.rename(before)
            logger.warning(f"{self.folder} was there before this training; kept as {before}")
        path = self.folder / f"{self.network.resolution:04d}.pt"
        atomic_save({name: value.cpu() for name, value in self.network.state_dict().items()}, path)
        self._vouch(path)
        logger.info(f"{engine.images_seen} images: level {self.network.resolution} is over, saved to {path}")

    def _vouch(self, path: Path) -> None:
        """Say of a level's weights, too, whose images they saw."""
        if self.trained_on is None:
            return
        # their own record, not the model's: that one names the best weights alone
        try:
            before = json.loads((self.folder / TRAINED_ON).read_text()).get("weights_sha256", [])
        except FileNotFoundError:
            before = []
        write_trained_on(self.folder, self.trained_on, dict.fromkeys([*before, file_sha256(path)]))

    def state_dict(self) -> dict[str, list[int]]:
        """Sides of the levels that this training has saved."""
        return {"saved": list(self._saved)}

    def load_state_dict(self, state: Mapping[str, list[int]]) -> None:
        """Continue from :meth:`state_dict`."""
        self._saved = list(state["saved"])

    def disown(self) -> None:
        """Take the levels that are there for another training's: the first of this one sets them aside."""
        self._saved = []
