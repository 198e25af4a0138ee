"""What lies beside a model's weights: what they are of no use without, and whose images they saw."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medgen import lineage
from medgen.data.image_set import file_sha256
from medgen.data.provenance import TRAINED_ON
from medgen.errors import UserError
from medgen.output import atomic_file, atomic_write_text, plain_json

__all__ = ["ModelCompanions", "check_trained_as"]

logger = logging.getLogger(__name__)

RECORD = "trained_as.json"
PREVIOUS = "previous"


class ModelCompanions:
    """What belongs to a model, beside its weights; for :class:`medgen.handlers.BestModelSaver`.

    It comes with the first weights of a training, not before: until then those of an earlier training stand there, and
    their companions with them. Those weights are kept in the folder ``previous``, of use as they are. A kill at any
    moment leaves weights with their own companions, or without ``trained_as.json``, or with a ``trained_on.json`` that
    does not name them and so says nothing of them, or no weights.

    Args:
        model_path: file of the weights.
        files: name beside the weights -> file that the model cannot be used without, which is copied there.
        record: settings that the weights are wrong without, written to ``trained_as.json``; sampling checks them with
            :func:`check_trained_as`. Registered models that the training read are written beside them, such as
            ``"autoencoder_model": "models:/NAME/VERSION"``. None writes no such file.
        trained_on: whose images the model sees, as :func:`medgen.data.trained_on` gives it, written to
            ``trained_on.json`` with the SHA-256 of the weights; None writes no such file.
    """

    def __init__(
        self,
        model_path: str | Path,
        files: Mapping[str, str | Path] | None = None,
        record: Mapping[str, Any] | None = None,
        trained_on: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(model_path)
        self.files = {name: Path(path) for name, path in (files or {}).items()}
        self.record = None if record is None else dict(record)
        self.trained_on = None if trained_on is None else dict(trained_on)

    def set_aside(self) -> Path:
        """Take the weights of another training away, with copies of what lies beside them; returns where they are."""
        folder = self.path.with_name(PREVIOUS)
        kept = folder / self.path.name
        kept.unlink(missing_ok=True)
        for name in (*self.files, RECORD, TRAINED_ON):
            if self.path.with_name(name).is_file():
                _copy(self.path.with_name(name), folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        folder.mkdir(exist_ok=True)
        os.replace(self.path, kept)
        return kept

    def place(self) -> None:
        """Put beside the weights that are about to be written what they must never be without."""
        for name in (RECORD, TRAINED_ON):
            self.path.with_name(name).unlink(missing_ok=True)
        for name, path in self.files.items():
            target = self.path.with_name(name)
            if not target.is_file() or file_sha256(target) != file_sha256(path):
                _copy(path, target)

    def vouch(self, sha256: str) -> None:
        """Say of the weights that were just written, by their SHA-256, whose images they saw: of all, not the first."""
        if self.trained_on is not None:
            write_trained_on(self.path.parent, self.trained_on, [sha256])

    def sign(self) -> None:
        """Say of the weights that were written how they were trained."""
        if self.record is None:
            return
        models = {f"{source.kind}_model": source.uri for source in lineage.used() if source.uri}
        content = plain_json({**self.record, **models})
        atomic_write_text(self.path.with_name(RECORD), json.dumps(content, indent=4) + "\n")


def write_trained_on(folder: Path, record: Mapping[str, Any], sha256: Sequence[str]) -> None:
    """Write whose images the weights of these SHA-256 in a folder saw; see :func:`medgen.data.read_trained_on`."""
    atomic_write_text(folder / TRAINED_ON, json.dumps({"weights_sha256": list(sha256), **record}) + "\n")


def _copy(path: Path, target: Path) -> None:
    with atomic_file(target) as file:
        file.write(path.read_bytes())


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
    if not isinstance(trained, dict):
        raise UserError(f"{path} must hold the settings of a training, got {trained!r:.50}; delete it to go on without")
    for name, value in plain_json(settings).items():
        if name in trained and trained[name] != value:
            remedy = "the settings, or the overlays, that it was trained with"
            if name == "generator_sha256":
                remedy = "the generator that it was trained for: --generator, --generator_weights"
            raise UserError(
                f"{name} must be {trained[name]} as in the training of {model_path}, got {value}; use {remedy}"
            )
