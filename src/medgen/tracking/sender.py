"""Sends journals to MLflow, in the background of a training or for ``medgen tracking send``."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medgen.data.image_set import file_sha256
from medgen.errors import UserError
from medgen.output import atomic_write_text, disable_usage_reports
from medgen.tracking.journal import (
    DATASET,
    FILE,
    FOLDER,
    METRICS,
    MODEL,
    PARAMS,
    PICTURE,
    RUN,
    STATUS,
    TAGS,
    TEXT,
    locked,
    read_records,
)
from medgen.tracking.uri import database_of, local_uri, resolve_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

__all__ = ["BackgroundSender", "JournalStatus", "Sender", "folder_status", "send_folder"]

logger = logging.getLogger(__name__)

JOURNAL_TAG = "medgen.journal"
LOGS, FILES = "logs", "files"  # two positions in a journal: an artifact that does not get through holds up no curve
LOG_KINDS = (METRICS, PARAMS, TAGS, STATUS, DATASET, MODEL)
FILE_KINDS = (TEXT, FILE, PICTURE)

MOST_METRICS, MOST_PARAMS, MOST_BYTES = 900, 90, 500_000  # of a request; MLflow takes 1000, 100 and 1e6

INTERVAL = 5.0  # seconds between looks at the journal
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between attempts while a tracker does not answer
# MLflow's own 120 seconds and 7 attempts are for those who wait; the attempts here go on for ever
REQUEST_TIMEOUT, REQUEST_RETRIES = "20", "0"


class RefusedError(Exception):
    """The tracker answers, and will take nothing of this run until somebody does something about it."""


@dataclass
class _Batch:
    """What one ``log_batch`` takes."""

    metrics: list[Any] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    size: int = 0

    @property
    def is_full(self) -> bool:
        return (
            len(self.metrics) > MOST_METRICS
            or max(len(self.params), len(self.tags)) > MOST_PARAMS
            or self.size > MOST_BYTES
        )


class Sender:
    """Sends what a journal holds and the tracker has not.

    How far it came is kept beside the journal, per tracker: ``RUN_NAME.sent.json``. A sender that dies between sending
    and noting sends the last lines again. Each point carries the time at which it was written, and MLflow keeps points
    that agree in all as one; parameters, tags and files replace themselves, pictures are looked for first.

    The run is known by the journal's id, which is one of its tags, not by its name: nothing is ever added to the run of
    another journal.

    Args:
        path: of the journal.
        tracking_uri: where to; default: what the journal names.
    """

    def __init__(self, path: Path, tracking_uri: str | None = None) -> None:
        self.path = path
        self.root = path.parents[1]
        self.header = next((r for r, _, _ in read_records(path) if r["kind"] == RUN), {})
        if not self.header:
            raise UserError(f"{path} is no journal of a run; delete it, or take it away")
        self.uri = resolve_uri(tracking_uri or self.header["uri"] or local_uri(self.root))
        self.run_id: str | None = None
        self.sent = {LOGS: 0, FILES: 0}
        self._client: MlflowClient | None = None
        self._pictures: set[str] | None = None

    @property
    def state_path(self) -> Path:
        """Where the positions are kept."""
        return self.path.with_suffix(".sent.json")

    def lock(self) -> Any:
        """Context of being the only sender of this journal; False where another process is."""
        return locked(self.path.with_suffix(".lock"))

    def load_position(self) -> None:
        """Go on where the last sender to this tracker stopped."""
        state = _read_state(self.state_path).get(self.uri, {})
        self.run_id = state.get("run_id")
        self.sent = {lane: int(state.get(lane, 0)) for lane in self.sent}

    def waiting(self, lane: str) -> int:
        """Records that are not sent yet."""
        kinds = LOG_KINDS if lane == LOGS else FILE_KINDS
        return sum(record["kind"] in kinds for record, _, _ in read_records(self.path, self.sent[lane]))

    def send(self) -> int:
        """Send all that is there; returns the number of lines.

        Raises:
            Exception: whatever MLflow raises when it cannot be reached; what was sent until then is noted.
        """
        if self._client is None:
            self._open()
        return self._send_logs() + self._send_files()

    # the run

    def _open(self) -> None:
        """A client, and the run: its own, or a new one."""
        from mlflow.exceptions import MlflowException

        self.load_position()
        with _quiet_client(self.uri) as client:
            run = None
            if self.run_id:
                try:
                    run = client.get_run(self.run_id)
                except MlflowException as error:
                    if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                        raise
                    # another database of the same address: the journal has all of it
                    self.run_id, self.sent = None, dict.fromkeys(self.sent, 0)
            if run is None:
                run = self._find_or_create(client)
        if run.info.lifecycle_stage != "active":
            raise RefusedError(f"the run {self.header['name']} was deleted there")
        self.run_id = run.info.run_id
        self._note()
        self._client = client

    def _find_or_create(self, client: MlflowClient) -> Any:
        from mlflow.entities import ViewType

        experiment = _experiment(client, self.header["experiment"], self.uri)
        mine = f"tags.`{JOURNAL_TAG}` = '{self.header['id']}'"
        found = client.search_runs([experiment.experiment_id], mine, run_view_type=ViewType.ALL)
        if found:
            return found[0]
        tags = {JOURNAL_TAG: self.header["id"]}
        return client.create_run(experiment.experiment_id, self.header["time"], tags, self.header["name"])

    def _note(self, **sent: int) -> None:
        """Keep how far the sending has come."""
        self.sent.update(sent)
        state = _read_state(self.state_path)
        state[self.uri] = {"run_id": self.run_id, **self.sent}
        with suppress(OSError):  # a full disk: the same is sent again, which changes nothing
            atomic_write_text(self.state_path, json.dumps(state, indent=4) + "\n")

    # logs

    def _send_logs(self) -> int:
        from mlflow.entities import Metric

        count, batch, end = 0, _Batch(), self.sent[LOGS]
        for record, end, size in read_records(self.path, self.sent[LOGS]):
            kind = record["kind"]
            if kind == METRICS:
                batch.metrics += [
                    Metric(name, value, record["time"], record["step"]) for name, value in record["values"].items()
                ]
            elif kind == PARAMS:
                batch.params |= record["values"]
            elif kind == TAGS:
                batch.tags |= record["values"]
            count += kind in LOG_KINDS
            batch.size += size
            if batch.is_full or kind in (STATUS, DATASET, MODEL):
                self._send_batch(batch)
                batch = _Batch()
                self._attempt(self._send_one, record)
                self._note(**{LOGS: end})
        self._send_batch(batch)
        if end > self.sent[LOGS]:
            self._note(**{LOGS: end})
        return count

    def _send_batch(self, batch: _Batch) -> None:
        from mlflow.entities import Param, RunTag

        params = [Param(name, value) for name, value in batch.params.items()]
        tags = [RunTag(name, value) for name, value in batch.tags.items()]
        # apart, so that what is refused of one takes nothing of the other with it
        for kind, entries, most in (
            ("metrics", batch.metrics, MOST_METRICS),
            ("params", params, MOST_PARAMS),
            ("tags", tags, MOST_PARAMS),
        ):
            for first in range(0, len(entries), most):  # one line may hold more than a request may
                part = {kind: entries[first : first + most]}
                self._attempt(self._client.log_batch, self.run_id, **part)

    def _send_one(self, record: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput

        if record["kind"] == STATUS:
            if record["status"] == "RUNNING":
                self._client.update_run(self.run_id, "RUNNING")
            else:
                self._client.set_terminated(self.run_id, record["status"], record["time"])
        elif record["kind"] == DATASET:
            dataset = DatasetInput(
                Dataset(**record["dataset"]),
                [InputTag("mlflow.data.context", record["context"])],
            )
            self._client.log_inputs(self.run_id, datasets=[dataset])
        elif record["kind"] == MODEL:
            self._client.log_inputs(self.run_id, models=[LoggedModelInput(record["model_id"])])

    # files

    def _send_files(self) -> int:
        count = 0
        for record, end, _ in read_records(self.path, self.sent[FILES]):
            if record["kind"] in FILE_KINDS:
                self._attempt(self._send_file, record)
                self._note(**{FILES: end})
                count += 1
        return count

    def _send_file(self, record: dict[str, Any]) -> None:
        if record["kind"] == TEXT:
            self._client.log_text(self.run_id, record["text"], record["to"])
            return
        path = self.root / record["path"]
        # a file that is not the one that the training meant, be it a later one's or somebody's secret, stays here
        if not path.is_file() or file_sha256(path) != record["sha256"]:
            logger.warning(f"{path} was changed or removed since it was to be tracked: left out")
        elif record["kind"] == PICTURE:
            self._send_picture(path, record)
        else:
            self._client.log_artifact(self.run_id, str(path), record["to"] or None)

    def _send_picture(self, path: Path, record: dict[str, Any]) -> None:
        from PIL import Image

        if self._pictures is None:
            self._pictures = {Path(file.path).name for file in self._client.list_artifacts(self.run_id, "images")}
        # log_image makes a new name each time; the thumbnail is the second of its two files
        start = f"{record['key']}+step+{record['step']}+timestamp+{record['time']}+"
        if any(name.startswith(start) and name.endswith("+compressed.webp") for name in self._pictures):
            return
        with Image.open(path) as image:
            picture = image.convert("RGB" if image.mode not in ("L", "RGB") else image.mode)
        self._client.log_image(
            self.run_id, picture, key=record["key"], step=record["step"], timestamp=record["time"], synchronous=True
        )

    # failures

    def _attempt(self, send: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Call; what the tracker will never take, though the run is there, is left out and said."""
        from mlflow.exceptions import MlflowException

        try:
            send(*args, **kwargs)
        except MlflowException as error:
            if error.error_code not in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST"):
                raise
            client, self._client = self._client, None  # should the run be gone, the next attempt looks for it anew
            if client.get_run(self.run_id).info.lifecycle_stage != "active":
                raise RefusedError(f"the run {self.header['name']} was deleted there") from error
            self._client = client
            logger.warning(f"{self.uri} refuses a line of {self.path.name}, left out: {one_line(error)}")


class BackgroundSender(threading.Thread):
    """Sends a journal while it is being written, and never makes its writer wait.

    A tracker that does not answer is said once, and once more when it is back.

    Args:
        sender: of the journal.
    """

    def __init__(self, sender: Sender) -> None:
        super().__init__(name=f"tracking {sender.path.name}", daemon=True)  # daemon: a request may hang at the end
        self.sender = sender
        self._wake, self._ended = threading.Event(), threading.Event()
        self._closing = self._abandoned = False
        self._down = False

    def run(self) -> None:
        """Send until closed and all is sent, or abandoned."""
        while not self._abandoned:
            with self.sender.lock() as mine:
                if mine:
                    self._loop()
                    self._ended.set()
                    return
            self._wake.wait(FIRST_PAUSE)  # `medgen tracking send` is at it

    def _loop(self) -> None:
        pause = FIRST_PAUSE
        while not self._abandoned:
            last = self._closing  # nothing is written any more: what is sent now is all
            try:
                count = self.sender.send()
            # whatever a client, a proxy or a database may raise: a training is not stopped by it
            except Exception as error:
                if self._abandoned:
                    return
                self._say_down(error)
                self._wake.wait(min(pause, FIRST_PAUSE) if self._closing else pause)
                self._wake.clear()
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            if self._down:
                logger.warning(f"tracking: {self.sender.uri} answers again, {count} lines of the journal were sent")
                self._down, pause = False, FIRST_PAUSE
            if last:
                return
            if not self._closing:
                self._wake.wait(INTERVAL)
                self._wake.clear()

    def _say_down(self, error: Exception) -> None:
        if not self._down:
            logger.warning(
                f"tracking: {self.sender.uri} takes nothing ({one_line(error)}); the run goes on, and "
                f"{self.sender.path} is sent later"
            )
        self._down = True

    def close(self, timeout: float) -> bool:
        """Send what is left; returns whether all was sent within so many seconds. Nothing is sent after that."""
        self._closing = True
        self._wake.set()
        done = self._ended.wait(timeout)
        if not done:
            logger.warning(
                f"tracking: {self.sender.uri} has not taken all within {timeout:g} seconds; send the rest with "
                f"`medgen tracking send {self.sender.root}`"
            )
        self._abandoned = True
        self._wake.set()
        return done


@dataclass(frozen=True)
class JournalStatus:
    """How far a journal is sent.

    Args:
        name: of the run.
        uri: of the tracker.
        run_id: of MLflow, None as long as nothing was sent.
        status: RUNNING, FINISHED, FAILED or KILLED.
        points: metrics written in all.
        waiting: lines that are not sent.
        active: whether a process sends it just now.
    """

    name: str
    uri: str
    run_id: str | None
    status: str
    points: int
    waiting: int
    active: bool


def folder_status(folder: str | Path, tracking_uri: str | None = None) -> list[JournalStatus]:
    """State of all journals of an output folder; asks no tracker.

    Args:
        folder: output folder of trainings.
        tracking_uri: instead of what each names.

    Raises:
        UserError: there are none.
    """
    found = []
    for sender in _senders(folder, tracking_uri):
        sender.load_position()
        with sender.lock() as mine:
            found.append(_status(sender, active=not mine))
    return found


def send_folder(folder: str | Path, tracking_uri: str | None = None) -> list[JournalStatus]:
    """Send all journals of an output folder; what is sent already is not sent again.

    A run whose process died without a word is closed as KILLED; ``--resume true`` opens it again.

    Args:
        folder: output folder of trainings.
        tracking_uri: instead of what each names.

    Returns:
        The state of each after that.

    Raises:
        UserError: there are none, or the tracker does not take them.
    """
    found = []
    for sender in _senders(folder, tracking_uri):
        with sender.lock() as mine:
            if mine:
                if _last_status(sender.path) == "RUNNING":
                    killed = {"kind": STATUS, "time": int(sender.path.stat().st_mtime * 1000), "status": "KILLED"}
                    with open(sender.path, "a", encoding="ascii") as file:
                        file.write("\n" + json.dumps(killed) + "\n")  # the line before may be cut
                try:
                    sender.send()
                except Exception as error:
                    reason = f"{sender.uri} takes nothing ({one_line(error)})"
                    raise UserError(f"{reason}; see that it runs, or name another with --tracking_uri") from error
            else:
                sender.load_position()
            found.append(_status(sender, active=not mine))
    return found


def one_line(error: BaseException) -> str:
    """The cause of a failure, short."""
    while not isinstance(error, RefusedError) and (cause := error.__cause__ or error.__context__):
        error = cause
    text = " ".join(f"{error or type(error).__name__}".split())
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _senders(folder: str | Path, tracking_uri: str | None) -> Iterator[Sender]:
    paths = sorted((Path(folder).absolute() / FOLDER).glob("*.jsonl"))
    if not paths:
        raise UserError(f"no journal in {Path(folder) / FOLDER}; name the --output_dir of a training that was tracked")
    return (Sender(path, tracking_uri) for path in paths)


def _status(sender: Sender, active: bool) -> JournalStatus:
    points = sum(len(r["values"]) for r, _, _ in read_records(sender.path) if r["kind"] == METRICS)
    waiting = sender.waiting(LOGS) + sender.waiting(FILES)
    status = _last_status(sender.path) or "RUNNING"
    return JournalStatus(sender.header["name"], sender.uri, sender.run_id, status, points, waiting, active)


def _last_status(path: Path) -> str | None:
    last = None
    for record, _, _ in read_records(path):
        if record["kind"] == STATUS:
            last = record["status"]
    return last


def _read_state(path: Path) -> dict[str, dict[str, Any]]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


@contextmanager
def _quiet_client(uri: str) -> Iterator[MlflowClient]:
    """A client for the first questions; on a SQLite file one process after the other, since MLflow's tables are made
    by the first of them."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", REQUEST_TIMEOUT)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", REQUEST_RETRIES)
    disable_usage_reports()
    from mlflow import MlflowClient

    # tables that are made, and a traceback for each lock of a database, are nothing for the log of a training
    for name, level in {"alembic": logging.ERROR, "mlflow.store.db.utils": logging.CRITICAL}.items():
        logging.getLogger(name).setLevel(level)
    database = database_of(uri)
    if database is None:
        yield MlflowClient(uri)
        return
    with locked(database.with_name(f".{database.name}.lock"), wait=True):
        yield MlflowClient(uri)


def _experiment(client: MlflowClient, name: str, uri: str) -> Experiment:
    """The experiment of that name, made if need be."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        # beside a database MLflow would put artifacts into the current folder
        database = database_of(uri)
        try:
            client.create_experiment(
                name, artifact_location=(database.parent / "mlruns").as_uri() if database else None
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process was faster
                raise
        found = client.get_experiment_by_name(name)
    if found.lifecycle_stage != "active":
        raise RefusedError(f"the experiment {name} was deleted there; restore it with `mlflow experiments restore`")
    return found
