"""Images of any format to PNGs of one size, in parallel, in shards and restartable: what every command shares.

A target folder has one journal, ``.journal.jsonl``, whose first line is the settings; then comes a line for each file
that is finished. With ``--shard i/n`` a process does every n-th file and appends to a journal of its own,
``.journal.i-of-n.<random>.jsonl``: no two processes ever append to one file, not even two that take each other for
dead and do the same shard. The command without ``--shard`` reads all of them into the first, does what is missing and
writes the tables, so that any number of shards, finished or not, ends in the bytes that one process writes.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import logging
import multiprocessing
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import typer
from PIL import Image
from tqdm import tqdm

from medgen.data.datalist import distinct_names, file_stem, printable, write_datalist, write_rejected
from medgen.data.reader import UnreadableImageError, read_frames
from medgen.data.shard import parse_shard, shard_of
from medgen.errors import UserError
from medgen.output import atomic_write_text, write_first
from medgen.preemption import AGAIN

__all__ = [
    "Channels",
    "Fit",
    "Job",
    "Outcome",
    "Settings",
    "Task",
    "clear_parts",
    "convert",
    "convert_file",
    "exit_code",
    "file_key",
    "finish",
    "finish_shard",
    "main",
    "make_jobs",
    "new_app",
    "one_line",
    "prepare_target",
    "quantise",
    "ranges",
    "read_table",
    "render",
    "resize",
    "write_png",
    "write_whole",
]

SMALLEST, LARGEST = 16, 8192  # pixels
LONGEST = 8  # sides 1:8 and beyond are strips and scanner bars; with --fit shorter they would fill the memory
# On filtered rows of radiographs and photographs zlib's run-length strategy gives files a little smaller than Pillow's
# default does, in a sixth of its time; compression is most of the work of this command.
PNG_OPTIONS = {"compress_level": 6, "compress_type": zlib.Z_RLE}
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as Pillow's mode L
JOURNAL = ".journal.jsonl"
SHARD_JOURNALS = ".journal.*-of-*.jsonl"
JOURNAL_VERSION = 1
INTERRUPTED = 130  # exit code, as of a shell
REJECTED = 3  # exit code
PARTS = ".parts"  # unfinished PNGs; on the target's own disk, so that moving one into place is a single step
TRIES = 5  # of a PNG whose unfinished file another process has cleared away


class Fit(StrEnum):
    """How an image that is not square meets the size."""

    shorter = "shorter"  # shorter side = size, all of the image is kept
    pad = "pad"  # longer side = size, black borders make it square
    crop = "crop"  # shorter side = size, the centre square is kept


class Channels(StrEnum):
    """Colours of the PNGs."""

    grey = "grey"
    rgb = "rgb"
    keep = "keep"


@dataclass(frozen=True)
class Settings:
    """The task of :mod:`preprocessing.images` and its like; a target folder holds images of one setting only."""

    dataset: str
    size: int = 512  # pixels
    fit: str = Fit.shorter
    bits: int = 8
    channels: str = Channels.keep
    window: tuple[float, float] | None = None  # centre, width in the image's own units

    def convert(self, job: Job, target: Path) -> Outcome:
        """Every frame of the file to a PNG of its own."""
        return _convert_frames(job, self, target)


@dataclass(frozen=True)
class Job:
    """One source file.

    Attributes:
        path: where it lies.
        file: its name in journal, datalist and rejected.csv: relative to the source.
        stem: path of its PNG below ``TARGET/images`` without ``.png``.
    """

    path: str
    file: str
    stem: str

    def is_made_of(self, used: Sequence[str]) -> bool:
        """Whether other files that decided an outcome are those that would now, where the job knows them."""
        return True


@dataclass(frozen=True)
class Outcome:
    """What became of one source file.

    Attributes:
        file: as in :class:`Job`.
        images: the files written, relative to the target; a command that writes masks counts them here.
        reason: why the file, or a part of it, was rejected; empty if all was written.
        patient: DICOM PatientID, if the file says.
        modality: DICOM Modality; empty if the file does not say.
        view: DICOM ViewPosition; empty if the file does not say.
        colour: whether the PNGs have three channels.
        final: False if trying again may help (a disk error, too little memory); see :func:`exit_code`.
        key: :func:`file_key` of the source, which tells whether it is still the same; None if it has gone.
        bytes: size of each file written.
        items: datalist items, of a command that knows more of an image than its file's name and patient.
        used: other files that decided the outcome, such as masks: path, the two numbers of :func:`file_key` (None and
            None for one that was looked for in vain), and what the command knows of it.
    """

    file: str
    images: tuple[str, ...] = ()
    reason: str = ""
    patient: str | None = None
    modality: str = ""
    view: str = ""
    colour: bool = False
    final: bool = True
    key: tuple[int, int] | None = None
    bytes: tuple[int, ...] = ()
    items: tuple[dict[str, Any], ...] = ()
    used: tuple[Sequence[Any], ...] = ()


class Task(Protocol):
    """What a command does to a file, as a dataclass of what decides the pixels; ``dataset`` names the command."""

    dataset: str

    def convert(self, job: Job, target: Path) -> Outcome:
        """Write what becomes of one source file below ``target``; any exception but a UserError rejects the file."""


class _RejectedError(Exception):
    """A picture that cannot be used; the message is the reason."""


# ---------------------------------------------------------------------------------------------------------------------
# one file


def render(pixels: np.ndarray, settings: Settings) -> Image.Image:
    """Bring one picture to the size, number of channels and bit depth of the PNGs.

    Resampling is Pillow's BICUBIC on 32-bit float planes: it widens its kernel when shrinking, so fine texture does not
    alias; 16-bit input keeps its precision; and it rings less around burnt-in markers than LANCZOS. Values pass
    unchanged when the size fits already.

    Args:
        pixels: (H, W) grey or (H, W, 3) colour, in [0, 1].
        settings: size, fit, channels and bits.

    Returns:
        Image of mode ``L``, ``I;16`` or ``RGB``; colour is always 8 bits per channel (PNGs by Pillow know no more).

    Raises:
        _RejectedError: if the picture is constant, not finite, or a strip; the message is the reason.
    """
    low, high = float(pixels.min()), float(pixels.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise _RejectedError("some pixels are not finite (NaN or infinity)")
    if low == high:
        raise _RejectedError("all pixels have the same value")
    height, width = pixels.shape[:2]
    shorter, longer = sorted((width, height))
    if settings.fit == Fit.shorter and longer > LONGEST * shorter:
        raise _RejectedError(f"too long and narrow, {width}×{height} (at most 1:{LONGEST} with --fit shorter)")

    if pixels.ndim == 3 and settings.channels == Channels.grey:
        pixels = pixels @ LUMA
    planes = [pixels] if pixels.ndim == 2 else [pixels[..., c] for c in range(3)]
    size, box = settings.size, None
    if settings.fit == Fit.crop:
        left, top = (width - shorter) // 2, (height - shorter) // 2
        box, shape = (left, top, left + shorter, top + shorter), (size, size)
    else:
        scale = size / (longer if settings.fit == Fit.pad else shorter)
        shape = (max(1, round(width * scale)), max(1, round(height * scale)))
    wide = settings.bits == 16 and len(planes) == 1 and settings.channels != Channels.rgb
    planes = [quantise(resize(plane, shape, box), wide) for plane in planes]
    if all(plane.min() == plane.max() for plane in planes):
        raise _RejectedError("all pixels have the same value in the PNG")

    if settings.fit == Fit.pad:
        left, top = (size - shape[0]) // 2, (size - shape[1]) // 2
        borders = ((top, size - shape[1] - top), (left, size - shape[0] - left))
        planes = [np.pad(plane, borders) for plane in planes]
    if settings.channels == Channels.rgb and len(planes) == 1:
        planes *= 3
    return Image.fromarray(planes[0] if len(planes) == 1 else np.stack(planes, axis=-1))


def resize(plane: np.ndarray, shape: tuple[int, int], box: tuple[int, int, int, int] | None) -> np.ndarray:
    """(H, W) float32 to ``shape`` (width, height); ``box`` is the part used: left, top, right, bottom."""
    if box is not None and box[2:] == shape:
        plane = plane[box[1] : box[3], box[0] : box[2]]
        box = None
    if box is None and plane.shape == shape[::-1]:
        return plane
    image = Image.fromarray(np.ascontiguousarray(plane, dtype=np.float32))
    return np.asarray(image.resize(shape, Image.Resampling.BICUBIC, box=box))


def quantise(plane: np.ndarray, wide: bool) -> np.ndarray:
    """[0, 1] to 0..255, or 0..65535 if ``wide``, rounded to the nearest."""
    top = 65535 if wide else 255
    scaled = np.multiply(plane, top, dtype=np.float32)
    scaled += 0.5
    return np.clip(scaled, 0, top, out=scaled).astype(np.uint16 if wide else np.uint8)


def convert_file(job: Job, task: Task, target: str) -> Outcome:
    """Convert one file, or say why not.

    Args:
        job: the file.
        task: what is done to it.
        target: folder of the converted dataset.

    Returns:
        What became of it; a file that cannot be used is an outcome, too.

    Raises:
        UserError: if the target cannot be written to. That stops the run: a full disk is no fault of the image.
    """
    key = file_key(job.path)  # before reading: a file that changes meanwhile is converted again next time
    reject = partial(Outcome, job.file, key=key)
    try:
        return replace(task.convert(job, Path(target)), key=key)
    except UnreadableImageError as error:
        return reject(reason=one_line(error))
    except UserError:
        raise
    except MemoryError:
        return reject(reason="too large for the memory; try fewer --workers", final=False)
    except OSError as error:
        return reject(reason=one_line(error.strerror or error), final=False)
    except Exception as error:  # one odd file among 100,000 must not stop the rest
        return reject(reason=f"{type(error).__name__}: {one_line(error)}")


def _convert_frames(job: Job, settings: Settings, target: Path) -> Outcome:
    frames = read_frames(job.path, window=settings.window)
    written: list[str] = []
    sizes: list[int] = []
    refused: dict[str, list[int]] = {}
    colour = False
    for frame in frames:
        stem = job.stem if len(frames) == 1 else f"{job.stem}.frame{frame.index:04d}"
        try:
            image = render(frame.pixels, settings)
        except _RejectedError as error:
            refused.setdefault(str(error), []).append(frame.index)
            continue
        written.append(f"images/{stem}.png")
        sizes.append(write_png(image, target, written[-1]))
        colour = image.mode == "RGB"
    reason = "; ".join(refused)
    if written and refused:
        reason = "; ".join(
            f"{len(numbers)} of {len(frames)} frames left out (numbers {ranges(numbers)}): {why}"
            for why, numbers in refused.items()
        )
    first = frames[0]
    return Outcome(
        file=job.file,
        images=tuple(written),
        reason=reason,
        patient=first.patient or None,
        modality=first.modality,
        view=first.meta.get("view_position", ""),
        colour=colour,
        bytes=tuple(sizes),
    )


def write_png(image: Image.Image, target: Path, name: str) -> int:
    """Write one PNG, whole or not at all.

    Args:
        image: what to write.
        target: folder of the converted dataset, prepared.
        name: of the file, relative to it.

    Returns:
        Its size in bytes.

    Raises:
        UserError: if it cannot be written.
    """
    return write_whole(target, name, lambda part: image.save(part, **PNG_OPTIONS))


def write_whole(target: Path, name: str, save: Callable[[Path], object]) -> int:
    """As :func:`write_png`, for any format: ``save`` writes to the path that it is given, of the same suffix."""
    path = target / name
    # random: the processes of containers that share a folder have equal numbers
    part = target / PARTS / (secrets.token_hex(8) + (".nii.gz" if name.endswith(".nii.gz") else path.suffix))
    for left in reversed(range(TRIES)):
        try:
            save(part)
            size = part.stat().st_size
            try:
                os.replace(part, path)
            except FileNotFoundError:
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(part, path)
            return size
        except FileNotFoundError as error:
            # a merge that was begun while this shard was running has cleared the unfinished files away
            if not left:
                raise _cannot_write(path, error) from error
            with suppress(OSError):
                part.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be written ({error.strerror or error}); mend that and run the same command again")


def clear_parts(target: Path) -> None:
    """Remove what killed processes have left unfinished; only who finishes the target may, not a shard among others."""
    shutil.rmtree(target / PARTS, ignore_errors=True)


def ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 7 as "0-2, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def one_line(text: object) -> str:
    """A message without line breaks, short enough for a cell of a table."""
    return " ".join(str(text).split())[:300] or "no reason given"


# ---------------------------------------------------------------------------------------------------------------------
# tables


def read_table(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Rows of a CSV, plain or zipped, that must have certain columns.

    Args:
        path: the table, in UTF-8; compressed by gzip or not, whatever its suffix.
        columns: the ones to read.

    Yields:
        These columns of each row, without the blanks around a cell.

    Raises:
        UserError: if it cannot be read or lacks a column.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
        rows = csv.DictReader(io.StringIO(text, newline=""))
        lacking = [name for name in columns if name not in (rows.fieldnames or ())]
        if lacking:
            got = ", ".join(rows.fieldnames or ()) or "an empty file"
            raise UserError(f"{path} must have the columns {', '.join(columns)}; lacks {', '.join(lacking)}, has {got}")
        for row in rows:
            yield {name: (row[name] or "").strip() for name in columns}
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a CSV table ({one_line(error)})") from error


# ---------------------------------------------------------------------------------------------------------------------
# names


def make_jobs(source: Path, files: Iterable[str], names: Iterable[str] | None = None) -> list[Job]:
    """Name the PNGs of source files so that no two files share a name, on file systems that ignore case, too.

    ``a/b.jpg`` becomes ``images/a/b.png``; frames of a file become ``images/a/b.frame0000.png`` and so on. Where two
    files would meet (``b.jpg`` beside ``b.dcm``), both keep their suffix: ``b.jpg.png``, ``b.dcm.png``.

    Args:
        source: root of the files.
        files: paths relative to it, as :func:`medgen.data.datalist.list_files` gives them.
        names: what the PNGs are named after; default: ``files``.

    Raises:
        UserError: if a PNG would lie outside of ``TARGET/images``.
    """
    files = list(files)
    shown = [printable(file) for file in files]
    names = shown if names is None else [printable(name) for name in names]
    short = []
    for name in names:
        folder, slash, _ = name.rpartition("/")
        stem = folder + slash + file_stem(name)
        # ".frame0000" is how frames are told apart: a file of that name keeps its suffix
        short.append(name if re.search(r"\.frame\d+$", stem, re.IGNORECASE) else stem)
    stems = distinct_names(short, names, shown)
    for file, stem in zip(shown, stems, strict=True):
        # by either slash: the target may be on a disk that is Windows' tomorrow
        if stem.startswith(("/", "\\")) or "\0" in stem or ".." in re.split(r"[/\\]", stem):
            raise UserError(f"{file} would be written outside of the target, as {stem!r:.200}; rename it")
    return [Job(str(source / file), name, stem) for file, name, stem in zip(files, shown, stems, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# the journals: one line of settings, then one line for each file that is finished


def prepare_target(
    source: Path | None, target: Path, settings: Task, *, inside: bool = False, folder: str = "images"
) -> None:
    """Make the target folder, or see that it was begun by the same command; many processes may do so at once.

    Args:
        source: folder of the source files; None if they are not of one folder, and each job tells its own.
        target: folder of the converted dataset.
        settings: what decides the pixels.
        inside: whether the target may lie inside the source, since a datalist and no listing says what is read.
        folder: of the files written, below the target; "" for the target itself, which may then hold files already.

    Raises:
        UserError: if the target lies inside the source, cannot be written to, was made with other settings, or holds
            files that no such command made.
    """
    source, target = source and source.resolve(), target.resolve()
    if source and ((target.is_relative_to(source) and not inside) or source.is_relative_to(target / folder)):
        raise UserError(f"--target must lie outside of --source {source}, got {target}; choose another folder")
    journal = target / JOURNAL
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target):
            pass
        head = {"version": JOURNAL_VERSION, "source": str(source or ""), **asdict(settings)}
        head = json.loads(json.dumps(head))
        # looked for before the journal, which another shard that starts just now makes before the folder
        foreign = [name for name in (folder, "datalist.json") if name and (target / name).exists()]
        if not journal.exists():
            if foreign:
                raise UserError(
                    f"--target must be empty or begun by this command, got {target} with {' and '.join(foreign)} "
                    "of another origin; choose another folder"
                )
            write_first(journal, json.dumps(head) + "\n")
        with open(journal, encoding="utf-8") as file:
            before = _parsed(file.readline()) or {}
    except OSError as error:
        raise UserError(
            f"--target must be a folder that can be written to, got {target} ({error.strerror or error})"
        ) from error
    other = [name for name in head if before.get(name) != head[name]]
    if other:
        told = ", ".join(f"{name} {_told(before.get(name))} (now {_told(head[name])})" for name in other)
        raise UserError(f"{target} was made with other settings: {told}; choose another --target or delete it")
    for made in (target / PARTS, target / folder):
        made.mkdir(exist_ok=True)


def _told(value: Any) -> str:
    return " ".join(f"{v:g}" for v in value) if isinstance(value, list) else "none" if value is None else str(value)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:  # the last line of a run that was killed while writing it
        return None
    return entry if isinstance(entry, dict) else None


def file_key(path: str | Path) -> tuple[int, int] | None:
    """Size and time of change of a file, or a digest of them for the files in a folder; None if there is none."""
    try:
        if not os.path.isdir(path):
            status = os.stat(path)
            return status.st_size, status.st_mtime_ns
        # a folder's own time of change tells of files that came or went, not of those written anew
        listing = []
        with os.scandir(path) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.is_file():
                    status = entry.stat()
                    listing.append((os.fsencode(entry.name).hex(), status.st_size, status.st_mtime_ns))
    except OSError:
        return None
    digest = hashlib.sha256(json.dumps(sorted(listing)).encode()).digest()
    return sum(size for _, size, _ in listing), int.from_bytes(digest[:6])


def _holds(outcome: Outcome, job: Job, target: Path) -> bool:
    """Whether the source is still the one that was converted, and its PNGs still what was written."""
    if outcome.key is None or file_key(job.path) != outcome.key:
        return False
    if not job.is_made_of([path for path, *_ in outcome.used]):
        return False
    if any((file_key(used) or (None, None)) != (size, changed) for used, size, changed, *_ in outcome.used):
        return False
    found = [file_key(target / image) for image in outcome.images]
    return [status and status[0] for status in found] == list(outcome.bytes)


def _records(target: Path) -> Iterator[tuple[str, str, Outcome]]:
    """Line, stem and outcome of all that is in the journals: the first one, then those of shards."""
    for journal in (target / JOURNAL, *sorted(target.glob(SHARD_JOURNALS))):
        # one that vanishes has been merged; its files are looked at again
        with suppress(FileNotFoundError), open(journal, encoding="utf-8", errors="replace") as file:
            for line in file:
                entry = _parsed(line)
                if entry is None or "file" not in entry:  # torn, or the settings
                    continue
                stem = entry.pop("stem")
                # JSON has no tuples
                outcome = Outcome(**{k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()})
                yield line.rstrip("\n") + "\n", stem, outcome


def _finished(jobs: Sequence[Job], target: Path) -> dict[str, Outcome]:
    """Outcomes of earlier runs that still hold, of any shards."""
    by_file = {job.file: job for job in jobs}
    kept: dict[str, Outcome] = {}
    for _, stem, outcome in _records(target):
        job = by_file.get(outcome.file)
        if job is not None and job.stem == stem and _holds(outcome, job, target):
            kept[outcome.file] = outcome
    return kept


def _merged(jobs: Sequence[Job], target: Path) -> dict[str, Outcome]:
    """As :func:`_finished`, of all files: what the other outcomes wrote is removed, the journals become one."""
    by_file = {job.file: job for job in jobs}
    kept: dict[str, tuple[Outcome, str]] = {}
    stale: set[str] = set()
    gone: set[str] = set()
    shards = sorted(target.glob(SHARD_JOURNALS))
    for line, stem, outcome in _records(target):
        job = by_file.get(outcome.file)
        if job is not None and job.stem == stem and _holds(outcome, job, target):
            kept[outcome.file] = outcome, line
        else:
            stale.update(outcome.images)
            if job is None and outcome.images:
                gone.add(outcome.file)
    # a source may be gone, or have fewer frames now: what it left must not be taken for an image of the dataset
    for image in stale.difference(*(outcome.images for outcome, _ in kept.values())):
        if not Path(image).is_absolute() and ".." not in Path(image).parts:  # a target may come from elsewhere
            (target / image).unlink(missing_ok=True)
    if gone:
        print(f"note: removed the results of files that are not asked for any more: {len(gone)}", file=sys.stderr)
    with open(target / JOURNAL, encoding="utf-8") as file:
        head = file.readline()
    atomic_write_text(target / JOURNAL, head + "".join(line for _, line in kept.values()))
    for journal in shards:
        journal.unlink(missing_ok=True)
    return {file: outcome for file, (outcome, _) in kept.items()}


# ---------------------------------------------------------------------------------------------------------------------
# many files


def convert(
    jobs: Sequence[Job], settings: Task, target: Path, workers: int, shard: str | None = None
) -> dict[str, Outcome]:
    """Convert files with a pool of processes; those that an earlier run finished are passed over.

    Args:
        jobs: the files, all of them in the same order for every shard.
        settings: how the PNGs shall look; the target must have been prepared for them.
        target: folder of the converted dataset.
        workers: processes.
        shard: ``i/n``, the part of the files to do; None does all, with what shards have done.

    Returns:
        Outcome per file (of the shard), in the order of ``jobs`` whatever the number of workers.

    Raises:
        UserError: if the target cannot be written to any more.
        KeyboardInterrupt: after the files at work are finished; every PNG is whole then.
    """
    has_shards = False
    if shard is None:
        has_shards = any(target.glob(SHARD_JOURNALS))
        outcomes = _merged(jobs, target)
        path = target / JOURNAL
    else:
        jobs = shard_of(jobs, shard)
        outcomes = _finished(jobs, target)
        path = target / f".journal.{shard.replace('/', '-of-')}.{secrets.token_hex(8)}.jsonl"
    todo = [job for job in jobs if job.file not in outcomes]
    if todo and has_shards:
        print(
            f"note: the shards have left {len(todo)} of {len(jobs)} files undone; this process does them now. Shards "
            "that have not ended yet work in vain",
            file=sys.stderr,
        )
    stems = {job.file: job.stem for job in todo}
    seconds = 0.2 if sys.stderr.isatty() else 15
    with tqdm(
        total=len(jobs), initial=len(outcomes), unit="file", desc="converting", mininterval=seconds, disable=not todo
    ) as bar:

        def record(outcome: Outcome) -> None:
            outcomes[outcome.file] = outcome
            if outcome.final:
                write(json.dumps({"stem": stems[outcome.file], **asdict(outcome)}) + "\n")
            bar.update()

        if todo:
            with _appended(path) as write:
                _pool(todo, settings, str(target), workers, record)
    return {job.file: outcomes[job.file] for job in jobs}


@contextmanager
def _appended(journal: Path) -> Iterator[Callable[[str], None]]:
    """Function that appends a line to a journal; every error of its disk is a UserError."""

    def write(line: str) -> None:
        try:
            file.write(line)
        except OSError as error:
            raise _cannot_write(journal, error) from error

    try:
        file = open(journal, "a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise _cannot_write(journal, error) from error
    try:
        yield write
    except BaseException:
        with suppress(OSError):  # tries again to write what a full disk did not take
            file.close()
        raise
    try:
        file.close()  # a network disk may say only now that it is full
    except OSError as error:
        raise _cannot_write(journal, error) from error


def _start_worker() -> None:
    # Ctrl-C reaches every process of the terminal; only the first one may act on it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # decoders' remarks would tear the progress bar
    # a killed parent cannot end its workers, and they would wait for the next file for ever
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _convert_chunk(jobs: Sequence[Job], settings: Task, target: str) -> list[Outcome]:
    return [convert_file(job, settings, target) for job in jobs]


def _new_pool(workers: int) -> ProcessPoolExecutor:
    # spawn: the parent may have threads (a notebook, a decoder), which a fork would leave behind locked
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)


def _pool(todo: Sequence[Job], settings: Task, target: str, workers: int, record: Callable[[Outcome], None]) -> None:
    """Convert files in processes, even if there is one only: a decoder that crashes must not take the run with it."""
    length = max(1, min(8, len(todo) // (4 * workers)))
    waiting = deque(todo[start : start + length] for start in range(0, len(todo), length))
    while waiting:
        running = {}
        pool = _new_pool(min(workers, len(waiting)))
        try:
            while waiting or running:
                while waiting and len(running) < 2 * workers:
                    future = pool.submit(_convert_chunk, waiting[0], settings, target)
                    running[future] = waiting.popleft()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    outcomes = future.result()
                    del running[future]
                    for outcome in outcomes:
                        record(outcome)
        except BrokenProcessPool:
            _one_by_one([job for chunk in running.values() for job in chunk], settings, target, record)
        finally:
            pool.shutdown(cancel_futures=True)


def _one_by_one(suspects: Sequence[Job], settings: Task, target: str, record: Callable[[Outcome], None]) -> None:
    """Find the file that ended a process: each is tried alone, and the rest goes on."""
    pool = _new_pool(1)
    try:
        for job in suspects:
            try:
                outcome = pool.submit(convert_file, job, settings, target).result()
            except BrokenProcessPool:
                outcome = Outcome(
                    job.file,
                    reason="its decoder crashed or was killed (damaged file, or too little memory)",
                    final=False,
                )
                pool.shutdown()
                pool = _new_pool(1)
            record(outcome)
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------------------
# the command


def finish(
    target: Path,
    name: str,
    modality: str,
    splits: Mapping[str, Sequence[Mapping[str, Any]]],
    rejected: Mapping[str, str],
    outcomes: Mapping[str, Outcome],
    **extra: Any,
) -> int:
    """Write ``rejected.csv`` and ``datalist.json`` and say so.

    Args:
        target: folder of the converted dataset.
        name: dataset's name.
        modality: dataset's modality.
        splits: items per split.
        rejected: reason per file, in the order of the CSV.
        outcomes: what :func:`convert` gave.
        extra: other top-level keys of the datalist.

    Returns:
        The :func:`exit_code`.

    Raises:
        UserError: if there is no image at all.
    """
    clear_parts(target)
    reasons = target / "rejected.csv"
    write_rejected(reasons, rejected)
    images = sum(len(items) for items in splits.values())
    if images == 0:
        raise UserError(f"no image could be written, all {len(rejected)} files were rejected; see {reasons}")
    write_datalist(target / "datalist.json", name, modality, splits, **extra)
    for split, items in splits.items():
        print(f"{split}: {len(items)} images of {len({item['patient'] for item in items})} patients")
    empty = [split for split, items in splits.items() if not items]
    if empty:
        print(f"note: no images for {' and '.join(empty)}: too few patients, or --split says so", file=sys.stderr)
    why = f" (reasons: {reasons})" if rejected else ""
    print(
        f"wrote {images} images, rejected {len(rejected)} files{why}; datalist: {target / 'datalist.json'}", flush=True
    )
    return exit_code(outcomes, rejected)


def exit_code(outcomes: Mapping[str, Outcome], rejected: Collection[str]) -> int:
    """The exit code of a command that has gone through all of its files.

    Args:
        outcomes: of the files.
        rejected: what is in the table of rejected files.

    Returns:
        :data:`medgen.preemption.AGAIN` where files were rejected that the same command may convert the next time, which
        it also says; else 3 if something was rejected, else 0.
    """
    again = [outcome for outcome in outcomes.values() if not outcome.final]
    if again:
        print(
            f"error: {len(again)} files may be converted another time, the first is {again[0].file} "
            f"({again[0].reason}); run the same command again, and remove those that stay",
            file=sys.stderr,
        )
        return AGAIN
    return REJECTED if rejected else 0


def finish_shard(outcomes: Mapping[str, Outcome], shard: str) -> int:
    """Say what a shard has done; tables are for who has seen all files.

    Args:
        outcomes: of the shard's files.
        shard: which one.

    Returns:
        The :func:`exit_code`.
    """
    rejected = [file for file, outcome in outcomes.items() if outcome.reason]
    print(
        f"shard {shard}: {len(outcomes)} files are done, {len(rejected)} of them rejected; when all shards are, the "
        "same command without --shard merges them",
        flush=True,
    )
    return exit_code(outcomes, rejected)


def new_app(command: Callable[..., int], description: str) -> typer.Typer:
    """A typer application of one command, whose help is the description; its tables are kept as they are."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    paragraphs = description.replace("``", "").split("\n\n")
    # options may be written with either: --dataset_dir is how MONAI's bundles have it, --dataset-dir how shells do
    either = {"token_normalize_func": lambda token: token.replace("_", "-")}
    # a backspace in front tells click not to fill the paragraph
    text = "\n\n".join(f"\b\n{p}" if p.lstrip().startswith(("===", "python -m")) else p for p in paragraphs)
    app.command(help=text, context_settings=either)(command)
    return app


def new_steps(steps: Sequence[Callable[..., int]], description: str) -> typer.Typer:
    """A typer application of several commands, one a step, each with its own docstring as help."""
    app = typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        # steps and options may be written with either, - or _
        context_settings={"token_normalize_func": lambda token: token.replace("_", "-")},
        help="\n\n".join(f"\b\n{p}" if p.startswith("python -m") else p for p in description.split("\n\n")),
    )
    app.callback()(lambda: None)  # a single step would else need no name
    for step in steps:
        app.command(step.__name__.replace("_", "-"), help=step.__doc__.split("\n\n    Returns:")[0])(step)
    return app


def main(app: typer.Typer, arguments: Sequence[str] | None = None) -> int:
    """Run a command; mistakes are one line ``error: …`` on stderr, and SIGTERM interrupts it as Ctrl-C does.

    Args:
        app: the command.
        arguments: default: the command line.

    Returns:
        The exit code.
    """
    # The first process of a container would ignore SIGTERM, and be killed only when its grace period is over.
    is_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if is_main_thread else None
    try:
        code = app(args=arguments, standalone_mode=False) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        # typer's usage errors share no public base class across its versions; all of them can say what is wrong
        if not hasattr(error, "format_message"):
            raise
        print(f"error: {one_line(error.format_message())} (--help lists the options)", file=sys.stderr)
        return 2
    finally:
        if is_main_thread:
            signal.signal(signal.SIGTERM, before)
    if code == INTERRUPTED:  # typer turns Ctrl-C into this code, or into an exception, depending on its version
        print("error: interrupted; the same command again goes on from here", file=sys.stderr)
    return code


def _two_depths(bits: int) -> int:
    if bits not in (8, 16):
        raise typer.BadParameter(f"expected 8 or 16, got {bits}")
    return bits


def _known_shard(text: str | None) -> str | None:
    try:
        part = parse_shard(text)
    except UserError as error:
        raise typer.BadParameter(str(error)) from error
    return part and f"{part[0]}/{part[1]}"


def _default_workers() -> int:
    # not cpu_count(): a container or SLURM job owns some of the machine's cores only
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# options that mean the same in every command
Source = Annotated[Path, typer.Option(help="Folder with the dataset as it was published.", show_default=False)]
Target = Annotated[Path, typer.Option(help="Folder to write; the same again continues.", show_default=False)]
Size = Annotated[int, typer.Option(min=SMALLEST, max=LARGEST, help="Side of the PNGs in pixels; see --fit.")]
FitOption = Annotated[
    Fit,
    typer.Option(
        help="shorter: shorter side = size, aspect ratio kept; "
        "pad: longer side = size, black borders make it square; crop: shorter side = size, centre square."
    ),
]
Bits = Annotated[int, typer.Option(callback=_two_depths, help="Bits per pixel of grey PNGs, 8 or 16.")]
SplitOption = Annotated[
    tuple[float, float, float],
    typer.Option(metavar="TRAIN VAL TEST", help="Shares of the images; patients are never divided."),
]
Workers = Annotated[int, typer.Option(min=1, help="Processes; default: the cores this process may use.")]
ShardOption = Annotated[
    str | None,
    typer.Option(
        callback=_known_shard,
        metavar="I/N",
        help="Convert every N-th file only, from number I (0 to N - 1), as one of N processes that share the target; "
        "then the same command without it merges them.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the split.")]
DEFAULT_WORKERS = _default_workers()
DEFAULT_SPLIT = (0.8, 0.1, 0.1)
