"""The output folder of a run: checks, names and atomic files."""

from __future__ import annotations

import json
import math
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from medgen.errors import UserError

__all__ = [
    "atomic_file",
    "atomic_write_text",
    "check_apart",
    "disable_usage_reports",
    "git_revision",
    "keep_run_name",
    "plain_json",
    "prepare_output_dir",
    "run_name",
    "unique_name",
    "write_first",
]


@contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """Path for a file on its way to another path, in the same folder, which is made; what lies there at the end goes.

    The name is random: the processes of containers that share a folder have equal numbers, and threads of one process
    share theirs.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        yield temporary
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """A file that is written whole or not at all, in a folder that is made.

    It takes its name when the block ends, and vanishes when the block raises.

    Args:
        path: the file; one that is there is replaced.
        mode: ``wb``, or ``w`` for text in UTF-8.

    Yields:
        The open file.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    with _unfinished(path) as temporary:
        # not tempfile's, which the owner alone may read: the file gets the permissions that open() gives any other
        with open(temporary, mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8") as file:
            yield file
        os.replace(temporary, path)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic_file(path, "w") as file:
        file.write(text)


def write_first(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file whole unless it is there, even when other processes do so at this moment.

    The file that was first stays; who writes has to read it again and see whether it is as wished. A disk that knows no
    links keeps the last of several that are written at once.

    Args:
        path: the file; its folder is made.
        text: in UTF-8.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    with _unfinished(path) as ready:
        ready.write_text(text, encoding="utf-8")
        try:
            os.link(ready, path)
        except FileExistsError:
            pass
        except OSError:
            if not path.exists():
                os.replace(ready, path)


def plain_json(value: Any) -> Any:
    """What JSON can hold: tuples, sets and arrays as lists, NumPy's numbers as Python's, infinity and NaN as None."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(entry) for key, entry in value.items()}
    if hasattr(value, "tolist"):  # an array or number of NumPy, which this module need not import
        return plain_json(value.tolist())
    if isinstance(value, list | tuple | set):
        return [plain_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def prepare_output_dir(output_dir: str | Path, resume: bool = True) -> Path:
    """Make the output folder and see that it can be written to.

    Args:
        output_dir: the folder.
        resume: False refuses a folder that holds the checkpoints of an earlier training.

    Raises:
        UserError: not writable, or it would overwrite an earlier training.
    """
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"output_dir must be a folder that can be written to, got {folder} ({error.strerror}); "
            "choose another with --output_dir"
        ) from error
    if not resume and any((folder / "checkpoints").glob("*.pt")):
        raise UserError(
            f"{folder} holds the checkpoints of an earlier training; continue it with --resume true, "
            "or choose another --output_dir"
        )
    return folder


def check_apart(input_dir: str | Path | None, output_dir: str | Path) -> None:
    """See that a folder of images does not hold the output folder, whose pictures a later run would take for images.

    Args:
        input_dir: searched for images with all folders below it; None for none.
        output_dir: the output folder.

    Raises:
        UserError: the output folder is the input folder or lies below it, through links, too.
    """
    if input_dir and Path(output_dir).resolve().is_relative_to(Path(input_dir).resolve()):
        raise UserError(
            f"output_dir must lie outside input_dir, got {output_dir} in {input_dir}: a second run would take the "
            "results of the first for images; choose another --output_dir"
        )


def unique_name(prefix: str) -> str:
    """``prefix-YYYYmmdd-HHMMSS-xxxx``: the jobs of a sweep start in the same second and share a tracker."""
    return f"{prefix}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def run_name(output_dir: str | Path, prefix: str, resume: bool = False) -> str:
    """Name of the training run of an output folder.

    The name is kept in ``output_dir/run.json``, so that a resumed training continues its own run in the tracker. MLflow
    would otherwise let a new training adopt any unfinished run of the experiment.
    """
    record = Path(output_dir) / "run.json"
    if resume and record.is_file():
        return json.loads(record.read_text(encoding="utf-8"))["run_name"]
    name = unique_name(prefix)
    keep_run_name(output_dir, name)
    return name


def keep_run_name(output_dir: str | Path, name: str) -> None:
    """Note the name of the training run of an output folder for :func:`run_name`; rank 0 does."""
    if int(os.environ.get("RANK", "0")) == 0:
        atomic_write_text(Path(output_dir) / "run.json", json.dumps({"run_name": name}) + "\n")


def git_revision() -> str:
    """Commit of the checkout that this package runs from, with ``+changes`` if it is not clean.

    Outside one it is what MEDGEN_REVISION says, which the container image sets, or "".
    """
    outside = os.environ.get("MEDGEN_REVISION", "")
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here)]
    try:
        # installed below somebody else's repository, this package is not part of it
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True)
        if tracked.returncode:
            return outside
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return outside
    return commit + ("+changes" if dirty.stdout.strip() else "")


def disable_usage_reports() -> None:
    """Keep MLflow from reporting usage to its makers: a hospital's network is not asked for that.

    ``MLFLOW_DISABLE_TELEMETRY=false`` in the environment allows it.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    if "mlflow" in sys.modules:  # MONAI has imported it already, with its client of the reports
        from mlflow.telemetry import set_telemetry_client

        set_telemetry_client()
