"""Sends journals to MLflow, in the background of a training or for ``medgen tracking send``."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

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
    STATUS,
    TAGS,
    TEXT,
    locked,
    read_header,
    read_records,
)
from medgen.tracking.uri import database_of, local_uri, resolve_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

__all__ = ["BackgroundSender", "JournalStatus", "Sender", "first_use", "folder_status", "send_folder"]

logger = logging.getLogger(__name__)

JOURNAL_TAG = "medgen.journal"
LOGS, FILES = "logs", "files"  # two positions in a journal: an artifact that does not get through holds up no curve
LOG_KINDS = (METRICS, PARAMS, TAGS, STATUS, DATASET, MODEL)
FILE_KINDS = (TEXT, FILE, PICTURE)

MOST_METRICS, MOST_PARAMS, MOST_BYTES = 900, 90, 500_000  # of a request; MLflow takes 1000, 100 and 1e6

INTERVAL = 5.0  # seconds between looks at the journal
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between attempts while a tracker does not answer
# MLflow's own 120 seconds and 7 attempts are for those who wait; the attempts here go on for ever. A server may well
# take longer than that over a file before it answers.
REQUEST_TIMEOUT, REQUEST_RETRIES = "20", "0"


class RefusedError(Exception):
    """The tracker answers, and will take nothing of this run until somebody does something about it."""


class AbandonedError(Exception):
    """Nothing more is to be sent."""


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
    that agree in all as one; parameters, tags, files and pictures replace themselves.

    The run is known by the journal's id, which is one of its tags, not by its name: nothing is ever added to the run of
    another journal.

    Args:
        path: of the journal.
        tracking_uri: where to; default: what the journal names, unless that would give it what logs in somewhere else.

    Raises:
        UserError: the file is no journal.
    """

    def __init__(self, path: Path, tracking_uri: str | None = None) -> None:
        self.path = path
        self.root = path.parents[1]
        self.header = read_header(path)
        if not self.header:
            raise UserError(f"{path} is no journal of a run; delete it, or take it away")
        self.uri = resolve_uri(tracking_uri or self.header["uri"] or local_uri(self.root))
        self.is_named = bool(tracking_uri)
        self.abandoned = False
        self.run_id: str | None = None
        self.sent = {LOGS: 0, FILES: 0}
        self._client: MlflowClient | None = None
        self._takes_files = True

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
            with _api_limits():
                self._open()
        return self._send_logs() + self._send_files()

    @property
    def stuck(self) -> str:
        """What does not get through, after a failure."""
        return "nothing" if self._client is None or self.waiting(LOGS) else "no files"

    # the run

    def _open(self) -> None:
        """A client, and the run: its own, or a new one."""
        from mlflow.exceptions import MlflowException
        from mlflow.utils.file_utils import local_file_uri_to_path

        if not self.is_named:
            _check_credentials(self.uri)
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
        self.run_id = run.info.run_id
        self._check_active(run)
        self._note()
        # a SQLite file tells the absolute address of its files, which may be where the folder was copied from
        place = local_file_uri_to_path(run.info.artifact_uri)
        self._takes_files = self.uri != local_uri(self.root) or Path(place).resolve().is_relative_to(
            self.root.resolve()
        )
        if not self._takes_files and self.waiting(FILES):
            logger.warning(
                f"tracking: files of {self.header['name']} are left out: {self.root} was moved or copied, and its "
                f"mlflow.db keeps them in {place}; send all to another tracker with "
                f"`medgen tracking send {self.root} --tracking_uri`"
            )
        self._client = client

    def _check_active(self, run: Any) -> None:
        if run.info.lifecycle_stage != "active":
            raise RefusedError(
                f"the run {self.header['name']} was deleted there; restore it with "
                f"`mlflow runs restore --run-id {self.run_id}`, or take {self.path} away"
            )

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
                with _api_limits():
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
                with _api_limits():
                    self._send_entries(kind, entries[first : first + most])

    def _send_entries(self, kind: str, entries: list[Any]) -> None:
        """Entries of a kind; of those that are refused together the halves, until what is refused is alone."""
        if not self._attempt(self._client.log_batch, self.run_id, said=len(entries) == 1, **{kind: entries}):
            middle = len(entries) // 2
            for half in (entries[:middle], entries[middle:]) if middle else ():
                self._send_entries(kind, half)

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
                if self._takes_files:
                    self._attempt(self._send_file, record, end)
                self._note(**{FILES: end})
                count += 1
        return count

    def _send_file(self, record: dict[str, Any], end: int) -> None:
        if record["kind"] == TEXT:
            with _api_limits(upload=True):
                self._client.log_text(self.run_id, record["text"], record["to"])
            return
        path = self.root / record["path"]
        try:
            is_as_meant = path.is_file() and file_sha256(path) == record["sha256"]
        except OSError as error:
            logger.warning(f"{path} cannot be read ({error.strerror}): left out")
            return
        # a file that is not the one that the training meant, be it a later one's or somebody's secret, stays here
        if not is_as_meant:
            if not self._is_superseded(record, end):
                logger.warning(f"{path} was changed or removed since it was to be tracked: left out")
        elif record["kind"] == PICTURE:
            self._send_picture(path, record["name"])
        else:
            with _api_limits(upload=True):
                self._client.log_artifact(self.run_id, str(path), record["to"] or None)

    def _is_superseded(self, record: dict[str, Any], end: int) -> bool:
        """Whether a picture was drawn again, and that one is still to come."""
        return record["kind"] == PICTURE and any(
            later.get("name") == record["name"] for later, _, _ in read_records(self.path, end)
        )

    def _send_picture(self, path: Path, name: str) -> None:
        """What ``MlflowClient.log_image`` makes, under a name that is the same each time."""
        from mlflow.tracking.multimedia import compress_image_size
        from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_IMAGES
        from PIL import Image

        with tempfile.TemporaryDirectory() as folder:
            full, small = Path(folder, f"{name}.png"), Path(folder, f"{name}+compressed.webp")
            try:
                with Image.open(path) as image:
                    picture = image.convert("RGB" if image.mode not in ("L", "RGB") else image.mode)
            # Pillow tells a broken file in all these ways
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                logger.warning(f"{path} is no picture that can be read ({one_line(error)}): left out")
                return
            picture.save(full)
            compress_image_size(picture).save(small)
            with _api_limits(upload=True):
                for file in (full, small):
                    self._client.log_artifact(self.run_id, str(file), "images")
        with _api_limits():
            self._client.set_tag(self.run_id, MLFLOW_LOGGED_IMAGES, "True")

    # failures

    def _attempt(self, send: Callable[..., None], *args: Any, said: bool = True, **kwargs: Any) -> bool:
        """Call; what the tracker will never take, though the run is there, is left out and said.

        Returns:
            Whether it was taken.
        """
        from mlflow.exceptions import MlflowException

        if self.abandoned:
            raise AbandonedError
        try:
            send(*args, **kwargs)
        except MlflowException as error:
            if error.error_code not in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST"):
                raise
            client, self._client = self._client, None  # should the run be gone, the next attempt looks for it anew
            self._check_active(client.get_run(self.run_id))
            self._client = client
            if said:
                logger.warning(f"{self.uri} refuses a line of {self.path.name}, left out: {one_line(error)}")
            return False
        return True


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
        self._closing = False
        self._down = False

    def run(self) -> None:
        """Send until closed and all is sent, or abandoned."""
        try:
            while not self.sender.abandoned:
                with self.sender.lock() as mine:
                    if mine:
                        self._loop()
                        return
                self._wake.wait(FIRST_PAUSE)  # `medgen tracking send` is at it
                self._wake.clear()
        finally:
            self._ended.set()

    def _loop(self) -> None:
        pause = FIRST_PAUSE
        while not self.sender.abandoned:
            last = self._closing  # nothing is written any more: what is sent now is all
            try:
                count = self.sender.send()
            # whatever a client, a proxy or a database may raise: a training is not stopped by it
            except Exception as error:
                if self.sender.abandoned:
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
                f"tracking: {self.sender.uri} takes {self.sender.stuck} ({one_line(error)}); the run goes on, and "
                f"what {self.sender.path} holds is sent later"
            )
        self._down = True

    def close(self, timeout: float) -> bool:
        """Send what is left; returns whether all was sent within so many seconds.

        A request that is under way then may still arrive; no other is begun.
        """
        self._closing = True
        self._wake.set()
        done = self._ended.wait(timeout)
        if not done:
            logger.warning(
                f"tracking: {self.sender.uri} has not taken all within {timeout:g} seconds; send the rest with "
                f"`medgen tracking send {self.sender.root}`"
            )
        self.sender.abandoned = True
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
        waiting_files: those of them that stand for files.
        active: whether a process sends it just now.
    """

    name: str
    uri: str
    run_id: str | None
    status: str
    points: int
    waiting: int
    waiting_files: int
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

    A run whose process died without a word is closed as KILLED; ``--resume true`` opens it again. One that is not
    taken holds up no other.

    Args:
        folder: output folder of trainings.
        tracking_uri: instead of what each names.

    Returns:
        The state of each after that.

    Raises:
        UserError: there are none, or the tracker does not take all of them.
    """
    found: list[JournalStatus] = []
    failed: dict[str, None] = {}
    for sender in _senders(folder, tracking_uri):
        with sender.lock() as mine:
            if mine:
                if _last_status(sender.path) == "RUNNING":
                    killed = {"kind": STATUS, "time": int(sender.path.stat().st_mtime * 1000), "status": "KILLED"}
                    with open(sender.path, "a", encoding="ascii") as file:
                        file.write("\n" + json.dumps(killed) + "\n")  # the line before may be cut
                try:
                    sender.send()
                except (RefusedError, UserError) as error:
                    if sender.waiting(LOGS) + sender.waiting(FILES):
                        failed[f"{sender.uri}: {error}"] = None
                except Exception as error:
                    reason = f"{sender.uri} takes {sender.stuck} ({one_line(error)})"
                    failed[f"{reason}; see that it runs, or name another with --tracking_uri"] = None
            else:
                sender.load_position()
            found.append(_status(sender, active=not mine))
    if failed:
        sent = sum(not status.waiting for status in found)
        raise UserError(f"{sent} of {len(found)} runs are sent; " + "; ".join(failed))
    return found


def one_line(error: BaseException) -> str:
    """The cause of a failure, short."""
    while not isinstance(error, RefusedError) and (cause := error.__cause__ or error.__context__):
        error = cause
    text = " ".join(f"{error or type(error).__name__}".split())
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _senders(folder: str | Path, tracking_uri: str | None) -> list[Sender]:
    paths = sorted((Path(folder).absolute() / FOLDER).glob("*.jsonl"))
    senders = []
    for path in paths:
        if read_header(path):
            senders.append(Sender(path, tracking_uri))
        elif path.stat().st_size:  # else a kill came between the file and its first line
            logger.warning(f"{path} is no journal of a run: passed over")
    if not senders:
        raise UserError(f"no journal in {Path(folder) / FOLDER}; name the --output_dir of a training that was tracked")
    return senders


def _status(sender: Sender, active: bool) -> JournalStatus:
    points = sum(len(r["values"]) for r, _, _ in read_records(sender.path) if r["kind"] == METRICS)
    logs, files = sender.waiting(LOGS), sender.waiting(FILES)
    status = _last_status(sender.path) or "RUNNING"
    return JournalStatus(sender.header["name"], sender.uri, sender.run_id, status, points, logs + files, files, active)


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
def first_use(uri: str) -> Iterator[None]:
    """Context of the first questions to a tracker: on a SQLite file one process after the other.

    MLflow's tables are made by the first question, and two that make them at once fail. Tables that are made, and a
    traceback for each lock of a database, are nothing for the log of a training: they are silenced, for good.

    Args:
        uri: resolved address (:func:`medgen.tracking.resolve_uri`) of any tracker.
    """
    for name, level in {"alembic": logging.ERROR, "mlflow.store.db.utils": logging.CRITICAL}.items():
        logging.getLogger(name).setLevel(level)
    database = database_of(uri)
    if database is None:
        yield
        return
    with locked(database.with_name(f".{database.name}.lock"), wait=True):
        yield


@contextmanager
def _quiet_client(uri: str) -> Iterator[MlflowClient]:
    """A client for the first questions."""
    disable_usage_reports()
    from mlflow import MlflowClient

    with first_use(uri):
        yield MlflowClient(uri)


_LIMITS = threading.Lock()
_limits: dict[str, int] = {}  # variable -> blocks that need it


@contextmanager
def _api_limits(upload: bool = False) -> Iterator[None]:
    """Requests of this block fail soon; MLflow reads the limits of each from the environment alone.

    Args:
        upload: a file is sent: as long as MLflow itself allows.
    """
    wanted = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": REQUEST_RETRIES}
    if not upload:
        wanted["MLFLOW_HTTP_REQUEST_TIMEOUT"] = REQUEST_TIMEOUT
    with _LIMITS:  # what the user has set stays; two trainings of a process share what is set here
        mine = [name for name in wanted if name in _limits or name not in os.environ]
        for name in mine:
            _limits[name] = _limits.get(name, 0) + 1
            os.environ[name] = wanted[name]
    try:
        yield
    finally:
        with _LIMITS:
            for name in mine:
                _limits[name] -= 1
                if not _limits[name]:
                    del _limits[name]
                    os.environ.pop(name, None)


def _check_credentials(uri: str) -> None:
    """Refuse to log in with what is meant for another server; a journal may come from anywhere.

    Raises:
        UserError: the address is a server that ``MLFLOW_TRACKING_URI`` does not name, and there is a token or password.
    """
    from mlflow.utils.credentials import read_mlflow_creds

    own, its = urlsplit(os.environ.get("MLFLOW_TRACKING_URI", "")), urlsplit(uri)
    if its.scheme not in ("http", "https") or (own.scheme, own.netloc) == (its.scheme, its.netloc):
        return
    if any(read_mlflow_creds()) or any(os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("TOKEN", "AUTH")):
        raise UserError(
            "the journal alone names this server, which would be given your token or password; if you trust it, give "
            f"--tracking_uri {uri}"
        )


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
