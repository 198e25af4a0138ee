"""Images at every resolution of a growing network, decoded once, and the stream of batches that grows with it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from monai.transforms import Compose, Randomizable, Transform
from tqdm import tqdm

from medgen.data.growth import SMALLEST, GrowthSchedule
from medgen.data.reader import one_line
from medgen.data.stream import _AtPosition, derive_seed
from medgen.data.workers import CRASHED, map_each
from medgen.errors import UserError, find_user_error
from medgen.output import atomic_file, atomic_write_text
from medgen.transforms.check import CheckImage
from medgen.transforms.latents import transform_digest

__all__ = ["GrowingDataLoader", "ImagePyramid"]

logger = logging.getLogger(__name__)

VERSION = 1  # of what the files hold: another one makes other keys
INDEX, JOURNAL, LOCK = "pyramid.json", "done.npy", ".lock"
JOURNAL_SECONDS = 10.0  # of work that a killed build loses at most
BEAT_SECONDS = 30.0  # processes that wait hear of the one that builds; collectives time out after 10 minutes
WORTH_A_PROCESS = 1000  # images: a process takes ten seconds to import MONAI
HOPELESS = 20  # images that fail before any other succeeds: the setting is wrong, not the images


class ImagePyramid:
    """A data set at all resolutions from 4×4 up, kept on the disk as 8-bit images.

    Each image is decoded once and halved by 2×2 means in floating point; each level is rounded to whole numbers by
    itself, ties to even (as the official progressive GAN prepares its data). A level is one memory-mapped array:

    - ``0004.npy``, ``0008.npy``, …: (N, C, R, R) uint8, in the order of the data;
    - ``pyramid.json``: the images with size and time; written last, so that a pyramid counts once it is whole;
    - ``done.npy``: (N,) bool, which images a build that is under way, or was killed, has done;
    - ``.lock``: locked as long as a process builds; the system unlocks it when that process ends.

    They lie in a folder below ``cache_dir`` that is named by a hash of all that decides them: an image that changes, or
    another transform, makes a new folder. Old ones may be deleted at any time. In a distributed run rank 0 builds;
    ``cache_dir`` has to be on a disk that all machines share.

    Args:
        data: items with ``image`` (path) and, with classes, ``label`` (a whole number).
        transform: makes of an item one whose ``image`` is (C, S, S) in [0, 1]; not random.
        image_size: S, the side of the largest level in pixels; a power of two from 4 on.
        channels: C.
        cache_dir: where pyramids are kept.
        num_workers: processes that build; 0 builds in this one.

    Attributes:
        folder: where this pyramid lies.
        resolutions: sides of the levels in pixels, from 4 to ``image_size``.
        labels: (N,) int64; None unless all items have a whole number as ``label``.

    Raises:
        UserError: no images, or some that cannot be read or are not (C, S, S) in [0, 1]; a transform that is random; a
            disk that is too small; or ``image_size`` is no such power.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        transform: Transform,
        image_size: int,
        channels: int,
        cache_dir: str | os.PathLike,
        num_workers: int = 0,
    ) -> None:
        if image_size < SMALLEST or image_size & (image_size - 1):
            raise UserError(
                f"image_size must be a power of two from {SMALLEST} on, got {image_size}; set image_size to 64 or 128"
            )
        if not data:
            raise UserError("a pyramid takes at least one image, got none; name a datalist that holds some")
        _check_not_random(transform)
        self.resolutions = tuple(SMALLEST << i for i in range((image_size // SMALLEST).bit_length()))
        self._count, self._channels = len(data), channels
        labels = [item.get("label") for item in data]
        whole = all(isinstance(label, int | np.integer) and not isinstance(label, bool) for label in labels)
        self.labels = np.array(labels, dtype=np.int64) if whole else None
        self.folder = _on_rank_0(lambda beat: self._build(data, transform, Path(cache_dir), num_workers, beat))
        self._levels = self._open(self.folder)
        if self._levels is None:
            raise UserError(
                f"expected the pyramid in {self.folder}, which rank 0 has built, got none; let cache_dir be on a disk "
                "that all machines share"
            )

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, Any]:
        # a memory-mapped array would be pickled with all its data on the way to another process
        return {**self.__dict__, "_levels": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._levels = self._open(self.folder)

    def read(self, indices: Sequence[int] | np.ndarray, resolution: int) -> np.ndarray:
        """Some of the images.

        Args:
            indices: B numbers of images, in the order of the data.
            resolution: side in pixels.

        Returns:
            (B, C, resolution, resolution) uint8.

        Raises:
            UserError: no such resolution.
        """
        if resolution not in self.resolutions:
            raise UserError(f"resolution must be one of {', '.join(map(str, self.resolutions))}, got {resolution}")
        return self._levels[resolution][np.asarray(indices, dtype=np.int64)]

    def _shape(self, resolution: int) -> tuple[int, int, int, int]:
        return self._count, self._channels, resolution, resolution

    def _open(self, folder: Path) -> dict[int, np.ndarray] | None:
        """The levels; None where they are not there whole."""
        levels = {}
        for resolution in self.resolutions:
            try:
                level = np.load(_level_file(folder, resolution), mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError):
                return None
            if level.shape != self._shape(resolution) or level.dtype != np.uint8:
                return None
            # the plain array: a slice of a memmap is one, too, and costs its bookkeeping
            levels[resolution] = level.view(np.ndarray)
        return levels

    def _build(
        self,
        data: Sequence[Mapping[str, Any]],
        transform: Transform,
        cache_dir: Path,
        num_workers: int,
        beat: Callable[[], None],
    ) -> Path:
        """Build what is missing.

        Args:
            beat: to be called at least every few minutes.

        Returns:
            The folder.
        """
        header = {
            "version": VERSION,
            "image_size": self.resolutions[-1],
            "channels": self._channels,
            "transform": transform_digest(transform),
            "images": _fingerprints(data),
        }
        content = json.dumps(header)
        folder = cache_dir / hashlib.sha256(content.encode()).hexdigest()[:16]
        index = folder / INDEX
        if index.is_file() and self._open(folder) is not None:
            return folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder, beat):
                if not index.is_file() or self._open(folder) is None:
                    self._fill(folder, data, transform, num_workers, beat)
                    atomic_write_text(index, content)
                    (folder / JOURNAL).unlink()
        except OSError as error:
            raise UserError(
                f"the image pyramid cannot be written to {folder} ({error.strerror or one_line(error)}); make room "
                "there, and the build goes on where it was, or choose another cache_dir"
            ) from error
        return folder

    def _fill(
        self,
        folder: Path,
        data: Sequence[Mapping[str, Any]],
        transform: Transform,
        num_workers: int,
        beat: Callable[[], None],
    ) -> None:
        files = [_level_file(folder, resolution) for resolution in self.resolutions]
        (folder / INDEX).unlink(missing_ok=True)  # of a pyramid that has lost a level
        done = _read_journal(folder / JOURNAL, self._count)
        if done is None or self._open(folder) is None:
            done = np.zeros(self._count, dtype=bool)
            (folder / JOURNAL).unlink(missing_ok=True)
            for resolution, file in zip(self.resolutions, files, strict=True):
                file.unlink(missing_ok=True)  # a training may read the old one
                # a sparse file: rows are written, not mapped, so that a full disk is an error and no signal
                np.lib.format.open_memmap(file, "w+", np.uint8, self._shape(resolution))
        todo = np.flatnonzero(~done).tolist()
        self._check_room(folder, len(todo))
        check = CheckImage(self._channels, self.resolutions[-1])
        build = _Build(transform, check, folder, self.resolutions, self._count)
        tasks = [(row, data[row]) for row in todo]
        workers = min(num_workers, len(tasks) // WORTH_A_PROCESS)
        failed: list[str] = []
        saved = time.monotonic()
        bar = tqdm(
            desc="image pyramid",
            total=self._count,
            initial=self._count - len(todo),
            unit="image",
            leave=False,
            disable=None,
        )
        with bar, closing(map_each(_write_rows, build, tasks, workers, crashed=CRASHED)) as reasons:
            for row, reason in zip(todo, reasons, strict=True):
                done[row] = not reason
                if reason:
                    failed.append(f"{data[row]['image']}: {reason}" if reason == CRASHED else reason)
                    if len(failed) >= HOPELESS and not done.any():
                        break
                if time.monotonic() - saved >= JOURNAL_SECONDS:
                    _save_journal(folder, files, done)
                    saved = time.monotonic()
                bar.update()
                beat()
        _save_journal(folder, files, done)
        if failed:
            raise UserError(
                f"{len(failed)} of {self._count} images cannot be used for training, the first: {failed[0]} (mend the "
                f"datalist and delete {folder}, which holds the others)"
            )

    def _check_room(self, folder: Path, todo: int) -> None:
        """Say what the build needs, before it takes hours to find out."""
        row = sum(self._channels * resolution**2 for resolution in self.resolutions)
        free = shutil.disk_usage(folder).free
        needs = f"{todo:,} of {self._count:,} images to decode, {todo * row / 1e9:,.2f} GB of disk"
        logger.info(f"image pyramid in {folder}: {needs}, {free / 1e9:,.1f} GB are free")
        if todo * row > free:
            raise UserError(
                f"the image pyramid in {folder} needs more room: {needs}, {free / 1e9:,.2f} GB are free; choose "
                "another cache_dir or a smaller image_size"
            )


@dataclass(frozen=True)
class _Build:
    """What each building process is sent."""

    transform: Transform
    check: CheckImage
    folder: Path
    resolutions: tuple[int, ...]
    count: int


def _write_rows(build: _Build, task: tuple[int, Mapping[str, Any]]) -> str:
    """Decode one image and write its row of every level.

    Returns:
        Why the image cannot be used; "" if it can.

    Raises:
        OSError: the disk is full or fails.
    """
    row, item = task
    try:
        image = build.check(build.transform(dict(item))["image"], str(item["image"]))
    except Exception as error:  # one odd file must not stop the rest
        return find_user_error(error) or f"{item['image']}: {type(error).__name__}: {one_line(error)}"
    image = np.ascontiguousarray(image, dtype=np.float32) * 255  # gives back the whole numbers of 8-bit files exactly
    for resolution in reversed(build.resolutions):
        if image.shape[-1] != resolution:
            image = 0.25 * (image[:, ::2, ::2] + image[:, ::2, 1::2] + image[:, 1::2, ::2] + image[:, 1::2, 1::2])
        pixels = np.rint(image).clip(0, 255).astype(np.uint8)
        with open(_level_file(build.folder, resolution), "r+b") as file:
            file.seek((row - build.count) * pixels.nbytes, os.SEEK_END)  # rows reach to the end, behind the header
            file.write(pixels.data)
    return ""


def _check_not_random(transform: Transform) -> None:
    if type(transform) is Compose:  # not those that choose among their transforms
        for step in transform.transforms:
            _check_not_random(step)
    elif isinstance(transform, Randomizable):
        raise UserError(
            f"the transform of a pyramid must not be random, since images are decoded once, got "
            f"{type(transform).__name__}; take it out (GrowingDataLoader can mirror)"
        )


def _fingerprints(data: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Path, size and time of every image."""
    rows = []
    for item in data:
        path = os.path.abspath(item["image"])
        try:
            status = os.stat(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); mend the datalist or dataset_dir") from error
        rows.append([path, status.st_size, status.st_mtime_ns])
    return rows


def _level_file(folder: Path, resolution: int) -> Path:
    return folder / f"{resolution:04d}.npy"


def _read_journal(path: Path, count: int) -> np.ndarray | None:
    try:
        done = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return done if done.shape == (count,) and done.dtype == bool else None


def _save_journal(folder: Path, files: Sequence[Path], done: np.ndarray) -> None:
    """Write down which images are done, once they are on the disk."""
    for path in files:
        with open(path, "rb+") as file:
            os.fsync(file)
    with atomic_file(folder / JOURNAL) as file:
        np.save(file, done, allow_pickle=False)


@contextmanager
def _locked(folder: Path, beat: Callable[[], None]) -> Iterator[None]:
    """Keep other jobs from building in the folder; wait as long as one does."""
    import fcntl  # not there on Windows, where the rest of this module works

    with open(folder / LOCK, "a") as lock:
        waits = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waits:
                    logger.info(f"another process builds the image pyramid in {folder}; waiting for it")
                waits = True
                time.sleep(0.5)
                beat()
            except OSError as error:
                logger.warning(f"{folder} cannot be locked ({error}): see that no other job builds a pyramid there")
                break
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_UN)  # closing alone leaves it to forked processes that have a copy


def _on_rank_0(build: Callable[[Callable[[], None]], Path]) -> Path:
    """Have rank 0 build for all, for as long as that takes.

    Processes that wait at a barrier give up after 10 to 30 minutes. Here rank 0 lets the others hear of it while it
    works, in the calls of ``beat``, and at its end they learn the folder, or what went wrong.
    """
    if idist.get_world_size() == 1:
        return build(lambda: None)
    if idist.get_rank():
        while True:
            heard = json.loads(idist.broadcast("", src=0))
            if "error" in heard:
                raise UserError(heard["error"])
            if "folder" in heard:
                return Path(heard["folder"])
    told = time.monotonic()

    def beat() -> None:
        nonlocal told
        if time.monotonic() - told >= BEAT_SECONDS:
            tell({})
            told = time.monotonic()

    def tell(news: dict[str, str]) -> None:
        idist.broadcast(json.dumps(news), src=0)  # in ASCII: ignite counts characters for bytes

    try:
        folder = build(beat)
    except Exception as error:
        tell({"error": f"rank 0 has built no image pyramid: {find_user_error(error) or one_line(error)}"})
        raise
    tell({"folder": str(folder)})
    return folder


class GrowingDataLoader:
    """Endless batches whose resolution and size follow a :class:`GrowthSchedule`.

    Order and mirroring are functions of (seed, position in the stream) as in :class:`ResumableDataLoader`: batches do
    not depend on where a training was interrupted, and in a distributed run each rank takes every ``world_size``-th
    position. One batch is read ahead, in a thread that ends with its iterator.

    Each batch is a dictionary with ``image``, (b, C, R, R) uint8, and ``label``, (b,) int64, if the pyramid has labels;
    b is the level's batch size over the number of processes. On a machine with a GPU they are in pinned memory.

    Args:
        pyramid: the images.
        schedule: levels, all of which the pyramid has.
        seed: of order and mirroring.
        mirror: whether to flip left and right with probability 0.5.

    Attributes:
        images_seen: images handed out so far, on all ranks; set it before iterating to go on from there.
        global_batch_size: images of the step handed out last, on all ranks; before any, of the one to come.
        seed: as given.

    Raises:
        UserError: a level that the pyramid has not, or whose batch is larger than the data set or cannot be shared by
            the processes.
    """

    def __init__(self, pyramid: ImagePyramid, schedule: GrowthSchedule, seed: int = 0, mirror: bool = False) -> None:
        self.pyramid, self.schedule, self.seed, self.mirror = pyramid, schedule, seed, mirror
        self._rank, self._world_size = idist.get_rank(), idist.get_world_size()
        for resolution, batch_size in zip(schedule.resolutions, schedule.batch_sizes, strict=True):
            if resolution not in pyramid.resolutions:
                raise UserError(
                    f"the schedule's resolutions must be among {', '.join(map(str, pyramid.resolutions))}, got "
                    f"{resolution}; set image_size to the largest of the schedule"
                )
            if batch_size % self._world_size:
                raise UserError(
                    f"the batch of {batch_size} images at {resolution}×{resolution} cannot be shared evenly by "
                    f"{self._world_size} processes; start another number of them or change --batch_sizes"
                )
            if batch_size > len(pyramid):
                raise UserError(
                    f"a training step takes {batch_size} images at {resolution}×{resolution}, the training split holds "
                    f"{len(pyramid)}; lower --batch_sizes"
                )
        self.images_seen = 0

    @property
    def images_seen(self) -> int:
        return self._images_seen

    @images_seen.setter
    def images_seen(self, images: int) -> None:
        self._images_seen = images
        self.global_batch_size = self.schedule.at(images).batch_size

    def __len__(self) -> int:
        """Steps of the whole schedule, or a few more: one that begins in a level may end in the next."""
        levels = zip(self.schedule.images, self.schedule.batch_sizes, strict=True)
        return sum(-(-images // batch_size) for images, batch_size in levels)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Batches from position ``images_seen`` on; ``images_seen`` counts what was handed out, on all ranks."""
        stream = _AtPosition(range(len(self.pyramid)), self.seed)
        with ThreadPoolExecutor(1, "growing-data-loader") as ahead:
            coming = ahead.submit(self._batch, stream, self._images_seen)
            while True:
                batch = coming.result()
                stage = self.schedule.at(self._images_seen)
                self._images_seen += stage.batch_size
                self.global_batch_size = stage.batch_size
                coming = ahead.submit(self._batch, stream, self._images_seen)
                yield batch

    def _batch(self, stream: _AtPosition, images_seen: int) -> dict[str, torch.Tensor]:
        """This rank's part of the batch at a position of the stream."""
        stage = self.schedule.at(images_seen)
        positions = range(images_seen + self._rank, images_seen + stage.batch_size, self._world_size)
        indices = np.array([stream[position] for position in positions])
        pixels = self.pyramid.read(indices, stage.resolution)
        if self.mirror:
            passes = [divmod(position, len(self.pyramid)) for position in positions]
            flipped = np.array([_flips(self.seed, number, len(self.pyramid))[place] for number, place in passes])
            pixels[flipped] = pixels[flipped, ..., ::-1]
        batch = {"image": torch.from_numpy(pixels)}
        if self.pyramid.labels is not None:
            batch["label"] = torch.from_numpy(self.pyramid.labels[indices])
        return {name: value.pin_memory() if torch.cuda.is_available() else value for name, value in batch.items()}


@lru_cache(2)  # a batch may begin in one pass and end in the next
def _flips(seed: int, number: int, count: int) -> np.ndarray:
    """Which images of a pass over the data set are mirrored; (count,) bool. Drawn singly, it takes 10 µs an image."""
    return np.random.default_rng(derive_seed(seed, 1, number)).random(count) < 0.5
