"""What is to be tracked, as lines of a file: written at once by the training, read by who sends them."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from medgen.data.image_set import file_sha256

__all__ = ["Journal", "locked", "read_header", "read_records"]

logger = logging.getLogger(__name__)

FOLDER = "tracking"  # of the output folder
RUN, METRICS, PARAMS, TAGS, STATUS = "run", "metrics", "params", "tags", "status"
TEXT, FILE, PICTURE, DATASET, MODEL = "text", "file", "picture", "dataset", "model"
ADDRESS = "address"

_NAME = re.compile(r"[^\w.-]")
_UNLOCKED: set[Path] = set()  # folders of which that is said


class Journal:
    """One run's journal: ``OUTPUT_DIR/tracking/RUN_NAME.jsonl``, a JSON object a line, only ever appended to.

    Each line has ``kind`` and ``time`` (milliseconds since 1970), and what that kind needs. A line that a kill cut off
    is passed over by readers, and the next one begins on a line of its own.

    A run that is continued repeats the steps between its last checkpoint and its end: a metric's point is taken only
    if its step lies after that metric's last one, a parameter only once, a picture again only if it has changed.

    Args:
        output_dir: of the training.
        run_name: of the run; what no file name may hold becomes ``_``.
        experiment: MLflow experiment of a new run.
        tracking_uri: where it is to be sent; None for the database in the folder. A journal that goes on is sent to
            the newest address that was named.
        resume: go on with the journal of that name if there is one; otherwise it is a new run, whatever lies there.
    """

    def __init__(
        self,
        output_dir: str | Path,
        run_name: str,
        experiment: str,
        tracking_uri: str | None = None,
        resume: bool = False,
    ) -> None:
        self.root = Path(output_dir).absolute()
        self.path = _path(self.root / FOLDER, run_name, resume)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._mutex = threading.RLock()  # a signal's handler may write while the training does
        self._failed = False
        self.last_step: dict[str, int] = {}
        self.params: dict[str, str] = {}
        self.pictures: dict[str, tuple[str, str]] = {}  # uuid -> name, SHA-256
        self.drawn: set[str] = set()  # files of pictures
        self.header: dict[str, Any] = {}
        self._cut = False  # the last line has no end
        for record, _, _ in read_records(self.path):
            self._remember(record)
        if self.path.is_file() and self.path.stat().st_size:
            with open(self.path, "rb") as file:
                file.seek(-1, os.SEEK_END)
                self._cut = file.read(1) != b"\n"
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        if not self.header:
            self.append(RUN, id=secrets.token_hex(16), name=run_name, experiment=experiment, uri=tracking_uri)
        elif tracking_uri not in (None, self.header["uri"]):
            logger.warning(f"tracking: the run goes to {tracking_uri} from its beginning, no longer to {self._address}")
            self.append(ADDRESS, uri=tracking_uri)
        elif tracking_uri != self.header["uri"]:
            logger.warning(f"tracking: the run goes on at {self._address}; name another with --tracking_uri")

    def append(self, kind: str, **content: Any) -> None:
        """Write a line; a disk that refuses it is said once, and the training goes on."""
        record = {"kind": kind, "time": int(time.time() * 1000), **content}
        line = json.dumps(record, ensure_ascii=True).encode() + b"\n"
        with self._mutex:
            start = b"\n" if self._cut else b""
            try:
                # one call of the system: a kill leaves the line whole or not at all, or cut on a full disk
                written = os.write(self._file, start + line)
                reason = "the disk took half a line"
            except OSError as error:
                written, reason = 0, error.strerror
            if written == len(start + line):
                self._cut = False
                self._remember(record)
                return
            self._cut = self._cut or written > 0
            if not self._failed:
                logger.warning(f"{self.path} cannot be written ({reason}): what follows may not be tracked")
            self._failed = True

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Points of curves at a step; those that the journal has are left out."""
        new = {name: value for name, value in values.items() if step > self.last_step.get(name, -1)}
        if new:
            self.append(METRICS, step=step, values=new)

    def relative(self, path: str | Path) -> str:
        """A file as lines name it: relative to the output folder if it lies there, so that the folder can be moved."""
        path = Path(os.path.abspath(path))
        return (path.relative_to(self.root) if path.is_relative_to(self.root) else path).as_posix()

    def close(self) -> None:
        """Write no more."""
        with self._mutex:
            os.close(self._file)

    def picture(self, path: Path, key: str, step: int, last: bool = False) -> None:
        """A picture at a step, unless the journal has it there as it is.

        Its name is the one that MLflow's page looks for, and is the same for one that is drawn again, which so takes
        the place of the first.

        Args:
            path: PNG.
            key: under which it is shown.
            step: of the training.
            last: it is the newest of those of that key, whatever their files' names.
        """
        name, sha256 = self.relative(path), file_sha256(path)
        own = str(uuid.uuid5(uuid.UUID(self.header["id"]), json.dumps([key, step, "" if last else name])))
        stem, known = self.pictures.get(own, (f"{key}+step+{step}+timestamp+{int(time.time() * 1000)}+{own}", ""))
        if known != sha256:
            self.append(PICTURE, path=name, name=stem, sha256=sha256)

    @property
    def _address(self) -> str:
        return self.header["uri"] or f"the database in {self.root}"

    def _remember(self, record: Mapping[str, Any]) -> None:
        kind = record["kind"]
        if kind == METRICS:
            self.last_step.update(dict.fromkeys(record["values"], record["step"]))
        elif kind == PARAMS:
            self.params.update(record["values"])
        elif kind == PICTURE:
            self.pictures[record["name"].rpartition("+")[2]] = record["name"], record["sha256"]
            self.drawn.add(record["path"])
        elif kind == RUN:
            self.header = dict(record)
        elif kind == ADDRESS:
            self.header["uri"] = record["uri"]


def read_header(path: Path) -> dict[str, Any]:
    """The first line of a journal, with the newest address; empty where there is none."""
    header: dict[str, Any] = {}
    for record, _, _ in read_records(path):
        if record["kind"] == RUN:
            header = header or record
        elif record["kind"] == ADDRESS and header:
            header["uri"] = record["uri"]
    return header


def read_records(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int, int]]:
    """The whole lines of a journal from an offset on.

    Yields:
        The record, the offset behind its line, and that line's length. What is no record is passed over.
    """
    if not path.is_file():
        return
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return  # it is being written
            offset += len(line)
            try:
                record = json.loads(line)
            except ValueError:
                continue  # cut off by a kill
            if isinstance(record, dict) and "kind" in record and "time" in record:
                yield record, offset, len(line)


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """A lock file held by this process alone, let go by the system if it dies; False where another one has it.

    Where the system has no locks (Windows, some network file systems) or the file cannot be made, that is said once,
    and the caller goes on as if it were alone.

    Args:
        path: the lock file, made if need be.
        wait: until it is free.
    """
    with ExitStack() as stack:
        mine = True
        try:
            import fcntl

            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, "a"))
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            mine = False
        except (ImportError, OSError) as error:
            if path.parent not in _UNLOCKED:
                logger.warning(f"{path} cannot be locked ({error}): let one process at a time use {path.parent}")
            _UNLOCKED.add(path.parent)
        yield mine


def _path(folder: Path, run_name: str, resume: bool) -> Path:
    """The journal to write: a new one, or the newest of that name."""
    name = _NAME.sub("_", run_name)
    path, number = folder / f"{name}.jsonl", 1
    while path.exists():
        number += 1
        following = folder / f"{name}.{number}.jsonl"
        if resume and not following.exists():
            return path
        path = following
    return path
