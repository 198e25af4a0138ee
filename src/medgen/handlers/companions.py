"""What must lie beside a model's weights for them to be of use."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events

from medgen.data.image_set import file_sha256
from medgen.errors import UserError
from medgen.output import atomic_file, atomic_write_text

__all__ = ["ModelCompanions", "check_trained_as"]

logger = logging.getLogger(__name__)

RECORD = "trained_as.json"


class ModelCompanions:
    """Puts files that a model cannot be used without beside its weights, as a training begins.

    Args:
        model_path: file of the weights.
        files: name beside the weights -> file that is copied there.
        record: settings that the weights are wrong without, written to ``trained_as.json``; sampling checks them with
            :func:`check_trained_as`.
    """

    def __init__(self, model_path: str | Path, files: Mapping[str, str | Path], record: Mapping[str, Any]) -> None:
        self.folder = Path(model_path).parent
        self.files, self.record = {name: Path(path) for name, path in files.items()}, dict(record)

    def attach(self, engine: Engine) -> None:
        """Register on a trainer."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Write them."""
        if idist.get_rank() > 0:
            return
        for name, path in self.files.items():
            target = self.folder / name
            # another autoencoder's latents mean nothing to weights that are there already
            if target.is_file() and file_sha256(target) == file_sha256(path):
                continue
            with atomic_file(target) as file:
                file.write(path.read_bytes())
        atomic_write_text(self.folder / RECORD, json.dumps(self.record, indent=4) + "\n")


def check_trained_as(model_path: str | Path, **settings: Any) -> None:
    """See that weights are used with the settings that they were trained with, where those lie beside them.

    Args:
        model_path: file of the weights.
        settings: what this run has; each is compared with what the training recorded under its name.

    Raises:
        UserError: names the first that differs, and what it should be.
    """
    path = Path(model_path).with_name(RECORD)
    if not path.is_file():
        logger.warning(f"no {path}: that the weights were trained with these settings is taken for granted")
        return
    try:
        trained = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); delete it to go on without this check") from error
    for name, value in settings.items():
        if name in trained and trained[name] != value:
            raise UserError(
                f"{name} must be {trained[name]} as in the training of {model_path}, got {value}; use the settings, or "
                "the overlays, that it was trained with"
            )
