"""Checkpoints that survive being killed, and the best model."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from torch import nn

from medgen import lineage
from medgen.data.image_set import file_sha256
from medgen.engines.trainer import GenerativeTrainer, TrainingEvents, unwrap
from medgen.errors import UserError
from medgen.handlers.companions import ModelCompanions
from medgen.output import atomic_file, atomic_write_text
from medgen.weights import check_whole_file, load_weights

__all__ = ["BestModelSaver", "TrainingCheckpoint", "WeightsLoader", "atomic_save"]

logger = logging.getLogger(__name__)

ABANDONED_SECONDS = 3600  # a file that is being written changes all the time
# what to do where a state does not fit the settings
RESUME = "resume with what it was made with, or train anew into another --output_dir"
RESUME_FROM = "--resume_from goes on with the same data and settings: give those, or leave it out"


def atomic_save(obj: Any, path: str | Path) -> None:
    """``torch.save`` to a temporary file, flushed to disk, then renamed: a reader sees the old file or the new one."""
    with atomic_file(path) as file:
        torch.save(obj, file)
        file.flush()
        os.fsync(file.fileno())


def _is_of_the_machine(error: BaseException) -> bool:
    """Whether a file could not be read, which says nothing about what it holds."""
    # EINVAL: broken bytes name a place before the beginning
    is_of_volume = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
    return is_of_volume or isinstance(error, MemoryError)


def _read_state(path: Path) -> dict[str, Any]:
    """A training's state on the CPU; raises whatever a broken or foreign file leads to."""
    check_whole_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    if {"components", "fingerprint", "images_seen"} - set(state):
        raise ValueError("not a checkpoint of this collection")
    return state


def _read_other(path: Path) -> dict[str, Any]:
    """The state of another training."""
    wanted = "name OUT/checkpoints/last.pt, or the output folder OUT of a training, with --resume_from"
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; {wanted}")
    try:
        return _read_state(path)
    except Exception as error:
        raise UserError(f"{path} is no checkpoint of a training ({type(error).__name__}); {wanted}") from error


class TrainingCheckpoint:
    """Saves the complete state of a :class:`GenerativeTrainer`, and continues from it.

    The newest state is ``folder/last.pt``, the one before it ``folder/previous.pt``: should the newest be unreadable
    (a disk that filled up, a copy that broke off, a bit that flipped), the older one is taken, and a warning says so;
    the broken file is kept as ``last.corrupt.pt``, so that the next save does not put it in the place of the good one.
    A ``newest.pt``, which a kill in the middle of a save leaves, counts as the newest. A volume that fails to be read
    says nothing about a file: that ends the training, and the same command tries again.

    Saved is every ``interval`` iterations; before and after each validation, after the last epoch, and when the
    processes are told to end (:class:`~medgen.engines.trainer.TrainingEvents`). Where the end of an epoch, and so a
    validation, is still to come, the state says so, and holds up to eight images of the last step, for the pictures
    that are drawn then: training images, and so to be guarded like the data.

    Of several trainings in one folder the one that began last goes on; the others end when they would save.

    Attach it first, so that the other handlers see the resumed state.

    Args:
        folder: where checkpoints lie.
        interval: iterations between checkpoints, at most. 0 saves at the end of every epoch.
        resume: continue from ``folder`` if it holds a checkpoint.
        fingerprint: plain values that must agree between the checkpoint and the resumed training, such as the hash of
            the datalist.
        resume_from: checkpoint of another training on the same data with the same settings (``fingerprint``), whose
            state this one begins with and goes on from, unless it continues from ``folder``; or a function that finds
            it, which is asked only then. Components with ``disown`` are told that the files they remember are that
            training's.
    """

    def __init__(
        self,
        folder: str | Path,
        interval: int = 1000,
        resume: bool = False,
        fingerprint: Mapping[str, str | int | float] | None = None,
        resume_from: str | Path | Callable[[], Path | None] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.interval = interval
        self.resume = resume
        self.fingerprint = dict(fingerprint or {})
        if resume and any(path.is_file() for path in self.paths):
            resume_from = None  # a resumed training needs no server that its beginning came from
        elif callable(resume_from):
            resume_from = resume_from()
        self.resume_from = None if resume_from is None else Path(resume_from)
        self._saved = 0  # images seen at the newest checkpoint of this training
        self._iteration = 0  # and the iteration
        self._has_validated = False  # at the end of this epoch
        self._token: str | None = None  # of this training, in `owner` while no other one has begun

    @property
    def paths(self) -> tuple[Path, Path, Path]:
        """What a kill between the two renames of a save leaves, the newest checkpoint, and the one before it."""
        return self.folder / "newest.pt", self.folder / "last.pt", self.folder / "previous.pt"

    @property
    def owner(self) -> Path:
        """File that tells which training began last in the folder."""
        return self.folder / ".training"

    def attach(self, engine: GenerativeTrainer) -> None:
        """Register on a trainer."""
        engine.add_event_handler(Events.STARTED, self.start)
        if self.interval > 0:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self.save_within_epoch)
        engine.add_event_handler(TrainingEvents.VALIDATION_DUE, self.save_before_validation)
        # at STARTED, so that the end of an epoch is saved after all that other handlers do there
        engine.add_event_handler(
            Events.STARTED, lambda: engine.add_event_handler(Events.EPOCH_COMPLETED, self.end_epoch)
        )
        engine.add_event_handler(TrainingEvents.PREEMPTED, self.save_before_leaving)

    def start(self, engine: GenerativeTrainer) -> None:
        """Load the newest readable checkpoint if asked to, or that of another training.

        Raises:
            UserError: there are checkpoints and this training is not to go on from them, none can be read, or they
                belong to other settings.
        """
        self._saved, source, state = 0, None, None
        if self.resume:
            source, state = self.load()
        elif self._token is None and any(path.is_file() for path in self.paths):
            raise UserError(
                f"{self.folder} holds the checkpoints of an earlier training; continue it with --resume true, or "
                "choose another --output_dir"
            )
        if state is not None:
            self._restore(engine, state, self.folder, RESUME)
            self._saved = engine.images_seen
            if engine.state.epoch >= engine.state.max_epochs and not engine.epoch_end_due:
                logger.info(f"this training is complete; to go on {engine.longer}")
        elif self.resume_from is not None:
            self._continue(engine, self.resume_from)
            for part in engine.components.values():
                if hasattr(part, "disown"):
                    part.disown()
        elif self.resume:
            logger.info(f"no checkpoint in {self.folder} yet: training starts at the beginning")
        # a process that reads another checkpoint, or none, would train other weights than the rest, unnoticed
        positions = idist.all_gather(engine.images_seen)
        if isinstance(positions, list) and len(set(positions)) > 1:
            raise UserError(
                f"the processes found different checkpoints (images seen: {positions}); --output_dir must be one "
                "folder that all of them see"
            )
        self._iteration, self._has_validated = engine.state.iteration, False
        self._token = secrets.token_hex(16)
        if idist.get_rank() == 0:
            atomic_write_text(self.owner, self._token + "\n")
            for part in self.folder.glob(".*.part"):  # what a kill in the middle of a save left
                if time.time() - part.stat().st_mtime > ABANDONED_SECONDS:
                    part.unlink(missing_ok=True)
            if source is not None:  # which all have read by now
                self._tidy(source)

    def _tidy(self, source: Path) -> None:
        """Bring the files into the order that the next save expects, given the one that the training goes on from."""
        newest, last, previous = self.paths
        for broken in self.paths[: self.paths.index(source)]:
            if broken.is_file():
                aside = broken.with_name(f"{broken.stem}.corrupt.pt")
                os.replace(broken, aside)
                logger.warning(f"{broken} is kept as {aside}")
        if source == newest:
            if last.is_file():
                os.replace(last, previous)
            os.replace(newest, last)

    def _continue(self, engine: GenerativeTrainer, source: Path) -> None:
        self._restore(engine, _read_other(source), source, RESUME_FROM)
        if engine.state.epoch >= engine.state.max_epochs:
            raise UserError(
                f"the training of {source} has seen {engine.images_seen} images, which leaves no step of this one, "
                f"{engine.plan}; {engine.longer}"
            )

    def _restore(self, engine: GenerativeTrainer, state: Mapping[str, Any], source: Path, advice: str) -> None:
        self._check_settings(state, source, advice)
        engine.load_training_state(state)
        logger.info(f"resumed from {source} at iteration {engine.state.iteration}, {engine.images_seen} images")

    def _check_settings(self, state: Mapping[str, Any], source: Path, advice: str) -> None:
        for name, value in self.fingerprint.items():
            if state["fingerprint"].get(name) != value:
                raise UserError(
                    f"the checkpoint {source} was made with {name} {state['fingerprint'].get(name)}, this run has "
                    f"{value}; {advice}"
                )

    def check(self) -> None:
        """See, without a training, whether the state that it would begin with can be read and fits the settings.

        Raises:
            UserError: it does not.
            OSError: the volume cannot be read.
        """
        _, state = self.load() if self.resume else (None, None)
        if state is not None:
            self._check_settings(state, self.folder, RESUME)
        elif self.resume_from is not None:
            self._check_settings(_read_other(self.resume_from), self.resume_from, RESUME_FROM)

    def load(self) -> tuple[Path | None, dict[str, Any] | None]:
        """The newest checkpoint that can be read, and its state on the CPU; (None, None) where there is none.

        Raises:
            UserError: there are checkpoints, and none can be read.
            OSError: the volume, not the file, is at fault.
        """
        problem = next((f"{path} cannot be read" for path in self.folder.glob("*.corrupt.pt")), None)
        for path in self.paths:
            if not path.is_file():
                continue
            try:
                return path, _read_state(path)
            # a broken or foreign file raises whatever its bytes lead to
            except Exception as error:
                if _is_of_the_machine(error):
                    error.add_note(f"{path} could not be read, and is left as it is; try the same command again")
                    raise
                problem = f"{path} cannot be read ({type(error).__name__})"
                logger.warning(f"{problem}; trying the one before it")
        if problem:
            raise UserError(f"{problem} and there is no older checkpoint; start again with another --output_dir")
        return None, None

    def save_within_epoch(self, engine: GenerativeTrainer) -> None:
        """Save if it is time, but not at an epoch's last step: what happens at its end belongs before that save."""
        if self._is_time(engine) and not engine.at_epoch_end:
            self.save(engine)

    def _is_time(self, engine: GenerativeTrainer) -> bool:
        return engine.state.iteration - self._iteration >= self.interval

    def save_before_validation(self, engine: GenerativeTrainer) -> None:
        """Save, unless no step was made since the last time."""
        self._has_validated = True
        if engine.images_seen != self._saved:
            self.save(engine)

    def end_epoch(self, engine: GenerativeTrainer) -> None:
        """Save once all is done that other handlers do at the end of an epoch, if it has validated or it is time."""
        engine.epoch_end_due = False
        is_last = engine.state.epoch >= engine.state.max_epochs
        if self._has_validated or is_last or self._is_time(engine):
            self.save(engine)
        self._has_validated = False

    def save_before_leaving(self, engine: GenerativeTrainer) -> None:
        """Save, unless no step was made since the last time, and say how the training goes on."""
        if engine.images_seen != self._saved:
            self.save(engine)
        if idist.get_rank() == 0 and not engine.images_seen:
            logger.warning(f"stopped by {engine.termination.cause} before the first step; nothing had to be saved")
        elif idist.get_rank() == 0:
            again = "the same command" if self.resume else "the same command with --resume true"
            logger.warning(
                f"stopped by {engine.termination.cause} after a checkpoint at {engine.images_seen} images; {again} "
                "goes on from there"
            )

    def save(self, engine: GenerativeTrainer) -> None:
        """Write ``last.pt``; the former one becomes ``previous.pt``.

        Raises:
            UserError: a loss or a weight is not a number, or another training has begun in the folder; the checkpoint
                before stays as it is.
        """
        engine.check_finite()
        engine.check_finite_weights()
        self._saved, self._iteration = engine.images_seen, engine.state.iteration
        if idist.get_rank() > 0:
            return
        self._check_owner()
        last = self.folder / "last.pt"
        newest = self.folder / "newest.pt"
        atomic_save({**engine.training_state(), "fingerprint": self.fingerprint}, newest)
        if last.is_file():
            os.replace(last, self.folder / "previous.pt")
        os.replace(newest, last)

    def _check_owner(self) -> None:
        try:
            owner = self.owner.read_text().strip()
        except OSError:  # tidied away by a person, or the volume fails, and the save says so
            return
        if self._token is None or owner == self._token:
            return
        raise UserError(
            f"another training has begun in {self.folder} since this one did, which therefore saves nothing more; end "
            "one of them, or give one another --output_dir"
        )


class BestModelSaver:
    """Keeps the weights with the best validation metric as a bare state dict.

    Attach it to the evaluator, and give it to the trainer's ``components``: its memory of the best metric is part of
    the training state, so that a resumed training does not overwrite a better model with a worse one. The file of
    another training that stands at ``path`` is kept as ``<name>.previous.pt``. A metric that is not a number is never
    the best.

    Args:
        network: network to save; the network inside DistributedDataParallel is taken.
        path: file of the state dict, for example the bundle's ``models/model.pt``.
        is_better: (new, best so far) -> whether to save.
        record: JSON file that says which weights ``path`` holds: metric, value, epoch, ``position`` and checksum.
        position: more entries of that file, asked for when it is written, such as the images seen.
        companions: what belongs beside the weights; written with the first of them, and what vouches for them with
            all. The file of another training is then kept with its own companions, in the folder ``previous``.
        stage: how far a growing network has grown, such as its resolution: a best value counts within one stage alone,
            and the first model of a later stage replaces that of an earlier one, whatever its value.
    """

    def __init__(
        self,
        network: nn.Module,
        path: str | Path,
        is_better: Callable[[float, float], bool] | None = None,
        record: str | Path | None = None,
        position: Callable[[], Mapping[str, Any]] | None = None,
        companions: ModelCompanions | None = None,
        stage: Callable[[], int] | None = None,
    ) -> None:
        self.stage, self._stage = stage, None
        self.network, self.path = network, Path(path)
        if self.path.is_dir():
            raise UserError(f"model_path must be a file, got the folder {path}; set --model_path {path}/model.pt")
        if re.match(r"\w+:/", str(path)):
            raise UserError(
                f"model_path of a training must be a file to write, got {path}; begin with weights by the settings for "
                "that, and register the file afterwards"
            )
        self.record, self.position = record, position or dict
        self.companions, self._accompanied = companions, companions is None
        self.is_better = is_better or (lambda new, best: new < best)
        self.best: float | None = None

    def attach(self, engine: Engine) -> None:
        """Register on an evaluator that has a key metric."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Save if the key metric is better than ever."""
        name = engine.state.key_metric_name
        value = float(engine.state.metrics[name])
        first = self.best is None
        stage = self.stage() if self.stage is not None else None
        has_grown = stage != self._stage
        if not math.isfinite(value) or not (first or has_grown or self.is_better(value, self.best)):
            logger.info(f"epoch {engine.state.epoch}: {name} {value:.5f}, best so far {self.best}")
            return
        self.best, self._stage = value, stage
        if idist.get_rank() > 0:
            return
        if first and self.path.is_file():
            if self.companions is None:
                before = self.path.with_suffix(".previous.pt")
                os.replace(self.path, before)
            else:
                before = self.companions.set_aside()
            logger.warning(f"{self.path} was there before this training; kept as {before}")
        if not self._accompanied:
            self.companions.place()
        atomic_save({k: v.cpu() for k, v in unwrap(self.network).state_dict().items()}, self.path)
        sha256 = file_sha256(self.path)
        if self.companions is not None:
            self.companions.vouch(sha256)  # after the weights: a kill between leaves them without a word, not another's
        if not self._accompanied:
            self.companions.sign()
            self._accompanied = True
        if self.record is not None:
            about = {"metric": name, "value": value, "epoch": engine.state.epoch, **self.position()}
            about |= {"model": str(self.path), "model_sha256": sha256}
            atomic_write_text(self.record, json.dumps(about, indent=4) + "\n")
        logger.info(f"epoch {engine.state.epoch}: {name} {value:.5f}, the best so far, saved to {self.path}")

    def state_dict(self) -> dict[str, float | int | None]:
        """The best metric so far, and the stage that it belongs to."""
        return {"best": self.best} if self.stage is None else {"best": self.best, "stage": self._stage}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Continue from :meth:`state_dict`; without the file that belongs to it, the next validation starts anew."""
        self.best = state["best"] if self.path.is_file() else None
        if self.best is not None:
            try:
                check_whole_file(self.path)
            # a broken file raises whatever its bytes lead to
            except Exception as error:
                if _is_of_the_machine(error):
                    raise
                logger.warning(
                    f"{self.path} cannot be read ({type(error).__name__}): the next validation writes a model anew"
                )
                self.best = None
        self._stage = state.get("stage")

    def disown(self) -> None:
        """Take the file at ``path`` for another training's: the next validation sets it aside."""
        self.best = None


class WeightsLoader:
    """Loads a bare state dict into a network before an evaluation, and says so in one line if it cannot.

    ``engine.state.model_sha256`` says which file it was, ``engine.state.model`` which registered model, if any.

    Args:
        network: the network.
        path: file of the state dict, read with ``weights_only=True``.
    """

    def __init__(self, network: nn.Module, path: str | Path) -> None:
        self.network, self.path = network, Path(path)

    def attach(self, engine: Engine) -> None:
        """Register on an evaluator."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Load.

        Raises:
            UserError: no such file, not a state dict, or of another architecture.
        """
        if not self.path.is_file():
            raise UserError(f"no weights at {self.path}; train the bundle first, or name a file with --model_path")
        load_weights(unwrap(self.network), self.path)
        source = lineage.note("model", self.path, self.path)
        engine.state.model_sha256 = source.sha256
        if source.uri:
            engine.state.model = source.uri
        logger.info(f"weights from {self.path}")
