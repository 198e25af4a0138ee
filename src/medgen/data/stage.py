"""``medgen stage``: the files of a datalist from a network volume to a disk of the node, before a training."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from medgen.data.datalist import PATH_FIELDS, validate_datalist
from medgen.data.latents import INDEX, SCALING, load_latents
from medgen.errors import UserError, end_when_told
from medgen.output import atomic_file, atomic_write_text

__all__ = ["Staged", "app", "stage_datalist"]

LOCK, PARTS, ORIGIN = ".stage.lock", ".stage", ".stage.json"  # in the target; unfinished copies lie in the second
LATENTS = "latents"  # folder of the target
THREADS = 16  # a network volume answers many at once, each after a while
TOGETHER = 256  # files that a thread looks up at a time
BLOCK = 4096  # bytes; what a small file takes of a disk, at least
TRIES = 3  # of a file that changes while it is copied
MB = 1e6  # bytes


@dataclass(frozen=True)
class Staged:
    """What :func:`stage_datalist` has done.

    Attributes:
        files: that the datalist names, or its latents.
        copied: how many of them were copied now.
        size: of these in bytes.
        seconds: that this took.
        datalist: path of the datalist in the target.
    """

    files: int
    copied: int
    size: int
    seconds: float
    datalist: Path

    def __str__(self) -> str:
        rate = f", {self.size / MB / self.seconds:,.1f} MB/s" if self.copied else ""
        return (
            f"staged {self.files:,} files, {self.copied:,} of them copied now: {self.size / MB:,.1f} MB in "
            f"{self.seconds:.1f} s{rate}; datalist: {self.datalist}"
        )


def stage_datalist(
    datalist: str | os.PathLike,
    target: str | os.PathLike,
    splits: Sequence[str] = (),
    dataset_dir: str | os.PathLike | None = None,
    latents_dir: str | os.PathLike | None = None,
    threads: int = THREADS,
) -> Staged:
    """Copy what a datalist names, and then the datalist, byte for byte.

    A file that is there with its source's size and time stays; copies have their sources' permissions. The datalist is
    written last, and taken away before any file is replaced, so that one in the target says that all files of the
    splits staged are there. Several processes may stage into one target: one copies, the others wait and find it done.
    Another data set, or the same with another datalist, is refused: a training may be reading the files there.

    Args:
        datalist: JSON file.
        target: folder on the disk of the node; paths below it are those of the datalist.
        splits: of the datalist, whose files are copied; empty for all.
        dataset_dir: base of the datalist's paths; default: its folder.
        latents_dir: folder that encode.json of cxr_latent_diffusion wrote: the latents of the splits are copied to
            ``target/latents``, in the place of the images.
        threads: that copy.

    Returns:
        What was done.

    Raises:
        UserError: the datalist is refused by :func:`medgen.data.validate_datalist`, lacks a split, or names files that
            are missing or change meanwhile; the target holds another data set, is too small, cannot be written to, or
            leads out of itself.
    """
    datalist, target = Path(datalist), Path(target)
    content = validate_datalist(datalist)
    text = datalist.read_bytes()
    there = [
        name for name, items in content.items() if isinstance(items, list) and items and isinstance(items[0], dict)
    ]
    unknown = [name for name in splits if name not in there]
    if unknown:
        raise UserError(f"--splits must be of {', '.join(there)} of {datalist}, got {', '.join(unknown)}")
    root = Path(dataset_dir) if dataset_dir else datalist.parent
    if latents_dir is None:
        named = {
            posixpath.normpath(item[field])
            for name in splits or there
            for item in content[name]
            for field in PATH_FIELDS
            if item.get(field)
        }
        files = {name: root / name for name in sorted(named)}
    else:
        root = Path(latents_dir)
        files = _files_of_latents(root, datalist, splits or there, dataset_dir)
    taken = {root.resolve(), datalist.parent.resolve()}
    if not taken.isdisjoint((target.resolve(), (target / LATENTS).resolve())):
        raise UserError(f"--target must be another folder than the data set's, got {target}; name one on a local disk")

    with _locked(target):
        begin = time.monotonic()
        origin = _origin(target, root, "images" if latents_dir is None else LATENTS, datalist.name, text)
        todo = _pending(files, target, threads)
        place = target / datalist.name
        if todo:
            _check_space(target, len(files), [size for _, size in todo])
            _make_folders(target, [name for name, _ in todo])
            if any(os.path.lexists(target / name) for name, _ in todo):
                place.unlink(missing_ok=True)
        _note_origin(target, origin)
        size = _copy_all([(files[name], target / name) for name, _ in todo], target / PARTS, threads)
        if not place.is_file() or place.read_bytes() != text:
            with atomic_file(place) as file:
                file.write(text)
    return Staged(len(files), len(todo), size, time.monotonic() - begin, place)


def _files_of_latents(
    folder: Path, datalist: Path, splits: Sequence[str], dataset_dir: str | os.PathLike | None
) -> dict[str, Path]:
    """Where the latents of some splits lie, by their places in the target."""
    items = [item for split in splits for item in load_latents(folder, datalist, split, dataset_dir)]
    arrays = [Path(file) for file in sorted({item["latent"]["file"] for item in items})]
    found = [*arrays, *(array.with_suffix(".json") for array in arrays), folder / INDEX]
    if (folder / SCALING).exists():  # of the training split; latents of others may be there without
        found.append(folder / SCALING)
    return {f"{LATENTS}/{path.name}": path for path in found}


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Let one process at a time stage into a folder; the system unlocks it when that process ends, however it ends."""
    import fcntl  # not there on Windows, where the rest of this package works

    try:
        target.mkdir(parents=True, exist_ok=True)
        lock = open(target / LOCK, "a")
    except OSError as error:
        raise UserError(
            f"--target must be a folder that can be written to, got {target} ({error.strerror}); choose another"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process stages into {target}; this one waits for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            print(f"note: {target} cannot be locked ({error.strerror}): let one process stage into it", file=sys.stderr)
        shutil.rmtree(target / PARTS, ignore_errors=True)  # of a process that was killed
        try:
            yield
        finally:
            shutil.rmtree(target / PARTS, ignore_errors=True)


def _origin(target: Path, root: Path, kind: str, datalist: str, text: bytes) -> dict[str, Any]:
    """What the target holds with this data set: files of one folder, by datalists that do not change."""
    record, digest = target / ORIGIN, hashlib.sha256(text).hexdigest()
    before = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    folder, datalists = before.get(kind, str(root.resolve())), before.get("datalists", {})
    what = f"files of {folder}, got {root.resolve()}" if folder != str(root.resolve()) else ""
    if datalists.get(datalist, digest) != digest:
        what = what or f"files by another {datalist} of {folder}"
    if what:
        raise UserError(
            f"--target {target} holds {what}; choose another --target, or remove it when no training reads it"
        )
    return {**before, kind: folder, "datalists": {**datalists, datalist: digest}}


def _note_origin(target: Path, origin: Mapping[str, Any]) -> None:
    record, text = target / ORIGIN, json.dumps(origin) + "\n"
    try:
        if not record.exists() or record.read_text(encoding="utf-8") != text:
            atomic_write_text(record, text)
    except OSError as error:
        raise UserError(f"{record} cannot be written ({error.strerror or error}); choose another --target") from error


def _pending(files: Mapping[str, Path], target: Path, threads: int) -> list[tuple[str, int]]:
    """Name and size of every file that is not in the target as its source is."""
    names = list(files)

    def look(chunk: Sequence[str]) -> list[tuple[str, int | None]]:
        found = []
        for name in chunk:
            source, copy = _status(files[name], os.stat), _status(target / name, os.lstat)
            if source is None or source != copy:
                found.append((name, source and source[0]))
        return found

    with ThreadPoolExecutor(threads) as pool:
        chunks = pool.map(look, [names[start : start + TOGETHER] for start in range(0, len(names), TOGETHER)])
        pending = [entry for chunk in chunks for entry in chunk]
    missing = [name for name, size in pending if size is None]
    if missing:
        raise UserError(
            f"{files[missing[0]]} is no file that can be read ({len(missing)} of {len(files)} are not); set "
            "--dataset_dir to the folder that the datalist's paths start from"
        )
    return pending


def _status(path: Path, look: Any) -> tuple[int, int] | None:
    """Size and time of change of a regular file; None of anything else."""
    try:
        status = look(path)
    except OSError:
        return None
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


def _make_folders(target: Path, names: Sequence[str]) -> None:
    """Make the folders of files, none of which may be a link that leads out of the target: others may write there."""
    root = target.resolve()
    for folder in sorted({(target / name).parent for name in names}):
        if not folder.resolve().is_relative_to(root):
            raise UserError(f"{folder} leads out of --target, to {folder.resolve()}; remove that link")
        _make_folder(folder)
    # nobody else reads a copy before it has the permissions of its source
    _make_folder(target / PARTS, mode=0o700, exist_ok=False)


def _make_folder(folder: Path, mode: int = 0o777, exist_ok: bool = True) -> None:
    try:
        folder.mkdir(mode, parents=True, exist_ok=exist_ok)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}); choose another --target") from error


def _check_space(target: Path, count: int, sizes: Sequence[int]) -> None:
    needed = sum(-(-size // BLOCK) * BLOCK for size in sizes)
    free = shutil.disk_usage(target).free
    said = f"{len(sizes):,} of {count:,} files need {needed / MB:,.1f} MB in {target}, {free / MB:,.1f} MB are free"
    if needed > free:
        raise UserError(f"{said}; choose a --target on a larger disk, or name fewer --splits")
    print(said, flush=True)


def _copy_all(pairs: Sequence[tuple[Path, Path]], parts: Path, threads: int) -> int:
    """Copy files; gives the number of bytes."""
    queue = iter(pairs)  # which all threads take from

    def work() -> int:
        size = 0
        try:
            for source, copy in queue:
                size += _copy(source, copy, parts)
        except BaseException:
            _drain(queue)
            raise
        return size

    with ThreadPoolExecutor(threads) as pool:
        try:
            return sum([future.result() for future in [pool.submit(work) for _ in range(threads)]])
        except BaseException:  # Ctrl-C: the files at work are finished, no other is begun
            _drain(queue)
            raise


def _drain(queue: Iterator[Any]) -> None:
    for _ in queue:
        pass


def _copy(source: Path, copy: Path, parts: Path) -> int:
    """Copy one file, whole or not at all, with its permissions and time of change; gives its size."""
    part = parts / secrets.token_hex(8)
    try:
        for _ in range(TRIES):
            before = os.stat(source)
            shutil.copyfile(source, part)
            if (
                _status(source, os.stat) == (before.st_size, before.st_mtime_ns)
                and part.stat().st_size == before.st_size
            ):
                shutil.copymode(source, part)
                os.utime(part, ns=(before.st_atime_ns, before.st_mtime_ns))
                os.replace(part, copy)
                return before.st_size
    except OSError as error:
        raise UserError(
            f"{source} cannot be copied to {copy} ({error.strerror or error}); mend that and run the same command again"
        ) from error
    raise UserError(f"{source} changes while it is copied; run the same command again when it does not any more")


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def stage(
    datalist: Annotated[Path, typer.Argument(help="Datalist (.json) of a preprocessed data set.", show_default=False)],
    target: Annotated[Path, typer.Option("--target", help="Folder on the disk of the node; the same again continues.")],
    splits: Annotated[
        str, typer.Option("--splits", help="Splits to copy the files of, such as training,validation.  [default: all]")
    ] = "",
    dataset_dir: Annotated[
        Path | None, typer.Option("--dataset_dir", help="Base of the datalist's paths.  [default: its folder]")
    ] = None,
    latents_dir: Annotated[
        Path | None,
        typer.Option(
            "--latents_dir",
            help="Folder of latents that encode.json wrote: they are copied to TARGET/latents, and no images.",
        ),
    ] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads that copy.")] = THREADS,
) -> None:
    """Copy the files of a datalist to a local disk, and then the datalist: one in the target means that all are there.

    Trainings then take --datalist TARGET/datalist.json, and with latents --latents_dir TARGET/latents, too.
    """
    end_when_told()
    wanted = [name.strip() for name in splits.split(",") if name.strip()]
    typer.echo(str(stage_datalist(datalist, target, wanted, dataset_dir, latents_dir, threads)))
