"""One run's tracking: the training writes lines to a journal, a thread sends them."""

from __future__ import annotations

import atexit
import json
import logging
import math
import os
import re
import signal
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from medgen.bundle_zip import COMPANIONS
from medgen.data.image_set import file_sha256
from medgen.output import plain_json
from medgen.settings import check_between, flag
from medgen.tracking import facts
from medgen.tracking.journal import DATASET, FILE, MODEL, PARAMS, STATUS, TAGS, TEXT, Journal
from medgen.tracking.sender import BackgroundSender, Sender
from medgen.tracking.uri import default_uri, local_uri, resolve_uri

__all__ = ["Tracker"]

logger = logging.getLogger(__name__)

LAST_WORDS = 10.0  # seconds for what is left when the process is told to end; a cluster kills it after 30

_OPEN: dict[Path, Tracker] = {}


class Tracker:
    """A run of an MLflow tracker, which may be down, slow, or away: nothing here waits for it but :meth:`close`.

    It lies in ``configs/tracking.json`` as ``tracker``, and the handlers of :mod:`medgen.tracking.handlers` share it.

    Args:
        output_dir: of the training; holds ``tracking/RUN_NAME.jsonl``.
        experiment_name: MLflow experiment, made if need be.
        run_name: of the run. A training that goes on with ``resume`` continues the run that it had.
        tracking_uri: server or database; None for :func:`medgen.tracking.default_uri`.
        settings: MONAI's live dictionary of resolved ids (``$__local_refs`` in a config): complete when the run starts.
        executed_config: JSON file of the whole config, if there is one.
        timeout: seconds that the end of the run waits for the tracker.
        checkpoints: whether the last checkpoint becomes an artifact.

    Raises:
        UserError: the address is none.
    """

    def __init__(
        self,
        output_dir: str | Path,
        experiment_name: str,
        run_name: str,
        tracking_uri: str | None = None,
        settings: Mapping[str, Any] | None = None,
        executed_config: str | Path | None = None,
        timeout: float = 30.0,
        checkpoints: bool = True,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.experiment_name, self.run_name = experiment_name, str(run_name)
        uri = resolve_uri(tracking_uri or default_uri(output_dir))
        # found beside the journal, wherever that is by the time that it is sent
        self.tracking_uri = None if uri == local_uri(output_dir) else uri
        check_between(0, 86400, tracking_timeout=timeout)
        self.resolved = {} if settings is None else settings
        self.executed_config = Path(executed_config) if executed_config else None
        self.timeout, self.checkpoints = timeout, checkpoints
        self.step = 0
        self._journal: Journal | None = None
        self._sender: BackgroundSender | None = None
        self._seen: dict[str, int] = {}
        self._lineage: dict[str, str] = {}
        self._terminate: Any = None
        self._process = 0  # a worker that is forked off later has the handler of the signal, too

    # begin and end

    @property
    def is_open(self) -> bool:
        """Whether the run has begun and not ended."""
        return self._journal is not None

    def start(self, device: Any) -> None:
        """Open the run and say what it is; does nothing on a run that is open.

        Where the journal cannot be written that is said, and nothing is tracked.

        Args:
            device: that the run computes on.
        """
        if self._journal is not None:
            return
        resume = flag(self.resolved.get("resume", False))
        key = self.output_dir.absolute() / self.run_name
        if key in _OPEN:  # an interrupted training that is run again in the same process
            _OPEN[key].close(self.timeout)
        try:
            journal = Journal(self.output_dir, self.run_name, self.experiment_name, self.tracking_uri, resume)
            if not journal.header:  # a full disk, which it has said
                journal.close()
                return
            self._sender = BackgroundSender(Sender(journal.path, self.tracking_uri))
        except OSError as error:
            logger.warning(f"tracking: no journal in {self.output_dir} ({error.strerror}): the run is not tracked")
            return
        self._journal = journal
        _OPEN[key], self._process = self, os.getpid()
        self._sender.start()
        self._journal.append(STATUS, status="RUNNING")
        self._describe(device)
        self._seen = {path.name: path.stat().st_mtime_ns for path in self._pictures()}
        atexit.register(self._die)
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            self._terminate = signal.signal(signal.SIGTERM, self._terminated)

    def finish(self, status: str = "FINISHED") -> None:
        """End the run, and wait for the tracker no longer than ``timeout``.

        Args:
            status: FINISHED, FAILED or KILLED.
        """
        if self._journal is None:
            return
        self.models()
        self._journal.append(STATUS, status=status)
        self.close(min(self.timeout, LAST_WORDS) if status == "KILLED" else self.timeout)

    def close(self, timeout: float) -> None:
        """Write no more; send what is left, within so many seconds."""
        if self._journal is None:
            return
        journal, self._journal = self._journal, None
        _OPEN.pop(self.output_dir.absolute() / self.run_name, None)
        atexit.unregister(self._die)
        if self._terminate is not None:
            signal.signal(signal.SIGTERM, self._terminate)
            self._terminate = None
        journal.close()
        self._sender.close(timeout)

    # what a run tells

    def metrics(self, values: Mapping[str, Any], step: int) -> None:
        """Points of curves: numbers alone, those that are infinite or NaN left out.

        Args:
            values: name -> number, or tensor of one.
            step: position; images seen, for a training.
        """
        if self._journal is None:
            return
        numbers = {}
        for name, value in values.items():
            with suppress(TypeError, ValueError, RuntimeError):  # no number
                if math.isfinite(number := float(value)):
                    numbers[facts.name_of(name)] = number
        self._journal.metrics(numbers, step)

    def pictures(self, last: bool = False) -> None:
        """PNGs that have come to ``OUTPUT_DIR/images``: MLflow shows those of one name along the steps.

        Args:
            last: show the newest of each name once more, as ``last_NAME`` at step 0, where MLflow's page begins.
        """
        if self._journal is None:
            return
        for path in self._pictures():
            changed = path.stat().st_mtime_ns
            if self._seen.get(path.name) != changed:
                self._seen[path.name] = changed
                self._journal.picture(path, _key(path), self.step)
        newest = {_key(path): path for path in sorted(self._pictures(), key=lambda path: path.stat().st_mtime_ns)}
        for key, path in newest.items() if last else ():
            if self._journal.relative(path) in self._journal.drawn:  # not by an earlier run in the same folder
                self._journal.picture(path, f"last_{key}", 0, last=True)

    def file(self, path: str | Path, to: str = "") -> None:
        """A file becomes an artifact in the folder ``to``; one that is not there is passed over."""
        if self._journal is not None and Path(path).is_file():
            self._journal.append(FILE, path=self._journal.relative(path), to=to, sha256=file_sha256(Path(path)))

    def files(self, paths: Iterable[str | Path]) -> None:
        """Files, and all files of folders, become artifacts."""
        for path in map(Path, paths):
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                self.file(file)

    def models(self) -> None:
        """Models that this process has used and that the run does not name yet."""
        if self._journal is None:
            return
        tags, models = facts.lineage()
        if tags != self._lineage:
            new = {name: value for name, value in tags.items() if self._lineage.get(name) != value}
            self._journal.append(TAGS, values=new)
            for model in models:
                self._journal.append(MODEL, model_id=model)
            self._lineage = tags

    def results(self) -> None:
        """Weights of this training, with what lies beside them, and its last checkpoint become artifacts."""
        if self._journal is None:
            return
        model = Path(self.resolved["model_path"])
        if self._is_ours(model):
            for path in (model, *(model.with_name(Path(name).name) for name in COMPANIONS)):
                self.file(path, "model")
            self.file(self.output_dir / "best.json", "model")
        if self.checkpoints:
            self.file(self.output_dir / "checkpoints" / "last.pt", "checkpoints")

    # inside

    def _pictures(self) -> list[Path]:
        return sorted((self.output_dir / "images").glob("*.png"))

    def _describe(self, device: Any) -> None:
        """Settings, data, versions and device."""
        config: dict[str, Any] = {}
        if self.executed_config and self.executed_config.is_file():
            config = json.loads(self.executed_config.read_text(encoding="utf-8"))
            self.file(self.executed_config)
        settings = facts.plain_settings(dict(self.resolved), config)
        self._journal.append(TEXT, to="settings.json", text=json.dumps(plain_json(settings), indent=4) + "\n")
        self._journal.append(TEXT, to="requirements.txt", text=facts.installed_packages())
        params, dataset = facts.data_facts(self.resolved.get("datalist"))
        shown = {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}
        params = {
            facts.name_of(name): facts.short(value, facts.LONGEST_PARAM) for name, value in {**shown, **params}.items()
        }
        known = self._journal.params
        tags = {**facts.version_facts(), **facts.device_facts(device), "overrides": facts.overrides_of(settings)}
        # MLflow keeps a parameter's first value for good
        changed = [f"{n}: {known[n]} -> {v}" for n, v in params.items() if known.get(n, v) != v and n != "resume"]
        if changed:
            tags["changed_on_resume"] = facts.short("; ".join(changed), facts.LONGEST_TAG)
        if new := {name: value for name, value in params.items() if name not in known}:
            self._journal.append(PARAMS, values=new)
        self._journal.append(TAGS, values={name: value for name, value in tags.items() if value})
        if dataset:
            self._journal.append(DATASET, dataset=dataset, context="datalist")

    def _is_ours(self, model: Path) -> bool:
        """Whether weights were written by this run: until its first validation those of an earlier one stand there."""
        if not model.is_file():
            return False
        record = self.output_dir / "best.json"
        if record.is_file():
            return json.loads(record.read_text(encoding="utf-8"))["model_sha256"] == file_sha256(model)
        return model.stat().st_mtime * 1000 >= self._journal.header["time"] - 1000

    def _die(self) -> None:
        """The process ends, and the run has not: it was interrupted."""
        if self._journal is not None and os.getpid() == self._process:
            self._journal.append(STATUS, status="KILLED")
            self.close(min(self.timeout, LAST_WORDS))

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        self._die()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _key(picture: Path) -> str:
    """Under what MLflow shows a picture: its name without the position."""
    key = re.sub(r"_?\d+$", "", picture.stem)
    return "images" if key in ("", "epoch") else facts.name_of(key)
