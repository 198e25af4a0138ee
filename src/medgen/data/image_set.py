"""A set of images, from a folder or a datalist, decoded one at a time and looked over before it is measured."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from medgen.data.datalist import (
    NOT_IMAGES,
    file_stem,
    list_files,
    load_datalist,
    printable,
    validate_datalist,
)
from medgen.data.reader import Frame, UnreadableImageError, has_known_content, one_line, read_some
from medgen.data.workers import CRASHED, map_each
from medgen.errors import UserError

__all__ = ["CHESTXRAY14_PATIENT", "LUMA", "ImageSet", "SetSummary", "file_sha256", "fit_image", "image_reason"]

CHESTXRAY14_PATIENT = r"^(\d{8})_\d{3}"  # 00000013_005.png is image 5 of patient 13
MODES = ("L", "RGB")
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as Pillow's mode L
SMALLEST, LARGEST = 1, 8192  # pixels
SINGLE_FRAME = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp")


@dataclass(frozen=True)
class SetSummary:
    """What one pass over a set found.

    Attributes:
        hashes: SHA-256 of the bytes of each image's file, hexadecimal.
        shapes: (C, H, W) of each image.
        histogram: (256,) int64, number of pixels whose value × 255 rounds to 0..255, of all images and channels.
        constant: files of the images all of whose pixels have one value.
        further_frames: how many images are not the first of their file.
    """

    hashes: tuple[str, ...]
    shapes: tuple[tuple[int, int, int], ...]
    histogram: np.ndarray
    constant: tuple[str, ...]
    further_frames: int = 0

    @property
    def mean(self) -> float:
        """Mean pixel value of the set, in [0, 1], from the histogram."""
        return float(self.histogram @ np.arange(256) / self.histogram.sum() / 255)

    @property
    def duplicates(self) -> int:
        """How many images have a file that is byte for byte one that came before; frames of one file do not count."""
        return sum(count - 1 for count in Counter(self.hashes).values()) - self.further_frames


@dataclass(frozen=True)
class _Seen:
    """What a process reports of one file or frame."""

    reason: str = ""
    count: int = 1
    digest: str = ""
    shape: tuple[int, int, int] = (0, 0, 0)
    histogram: np.ndarray | None = None
    constant: bool = False


class ImageSet(Sequence[np.ndarray]):
    """The images of a folder or a datalist; ``images[i]`` is (C, H, W) float32 in [0, 1], C = 1 (grey) or 3 (RGB).

    Nothing is held in memory but names: an image is read when it is asked for. A set can be sent to other processes.

    Example::

        reference = ImageSet.from_source("datalist.json", split="test", image_size=256, mode="L")
        reference.scan(num_workers=4)
        print(len(reference), reference.rejected)

    Attributes:
        name: what messages call the set.
        files: one per image, relative to the folder or as in the datalist; frames of a file with several end in
            ``#0``, ``#1``, ...
        patients: one per image; None where the source does not say.
        labels: ``label`` or ``labels`` of the datalist's items, one per image; None where no item has one.
        synthetic: one per image: whether its item says that it is synthetic.
        image_size: None, or the side of the centre square that images are brought to.
        mode: None, ``L`` or ``RGB``.
        rejected: reason per file that is no readable image; complete after :meth:`scan`.
        summary: what :meth:`scan` found; None before.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike],
        *,
        files: Sequence[str] | None = None,
        patients: Sequence[str] | None = None,
        labels: Sequence[Any] | None = None,
        synthetic: Sequence[bool] | None = None,
        image_size: int | None = None,
        mode: str | None = None,
        name: str = "images",
    ) -> None:
        """Make a set of files, one image each until :meth:`scan` or :meth:`from_source` finds more frames.

        Args:
            paths: where the files lie.
            files: what they are called; default: ``paths``.
            patients: one per file.
            labels: one per file.
            synthetic: one per file.
            image_size: bring the shorter side to this many pixels and keep the centre square.
            mode: ``L`` makes colour grey (ITU-R BT.601 luma), ``RGB`` repeats grey.
            name: what messages call the set.

        Raises:
            UserError: if ``image_size`` or ``mode`` is not one of those.
        """
        if mode is not None and mode not in MODES:
            raise UserError(f"mode must be L (grey) or RGB, got {mode!r}; set --mode")
        if image_size is not None and (
            isinstance(image_size, bool) or not isinstance(image_size, int) or not SMALLEST <= image_size <= LARGEST
        ):
            raise UserError(
                f"image_size must be a whole number from {SMALLEST} to {LARGEST} pixels, got {image_size!r}"
            )
        self.name = name
        self.image_size = image_size
        self.mode = mode
        self.rejected: dict[str, str] = {}
        self.summary: SetSummary | None = None
        self._paths = [os.fspath(path) for path in paths]
        self._names = [printable(file) for file in (self._paths if files is None else files)]
        self._patients = None if patients is None else [str(patient) for patient in patients]
        self._labels = None if labels is None or all(label is None for label in labels) else list(labels)
        self._synthetic = [False] * len(self._paths) if synthetic is None else [bool(value) for value in synthetic]
        self._images = [(number, 0, 1) for number in range(len(self._paths))]  # file, frame, frames of the file
        # of the file with several frames that was last: its frames; its number, time and size, and its digest
        self._read: tuple[int, list[Frame]] | None = None
        self._hashed: tuple[tuple[int, int, int], str] | None = None

    @classmethod
    def from_source(
        cls,
        source: str | os.PathLike,
        *,
        split: str | None = None,
        dataset_dir: str | os.PathLike | None = None,
        image_size: int | None = None,
        mode: str | None = None,
        max_images: int | None = None,
        seed: int = 0,
        patient_pattern: str | None = None,
        name: str | None = None,
    ) -> ImageSet:
        """The images of a folder with all folders below it, or of a datalist.

        Args:
            source: folder, or datalist (``.json``).
            split: which list of a datalist; default: all of them.
            dataset_dir: base of a datalist's paths; default: its folder.
            image_size: bring the shorter side to this many pixels, with antialiasing, and keep the centre square.
            mode: ``L`` or ``RGB``; default: as the files are.
            max_images: use a random sample of so many images; the order stays.
            seed: of that sample.
            patient_pattern: regular expression whose first group is the patient in the file's name (without folder),
                for a folder; such as :data:`CHESTXRAY14_PATIENT`. Default: patients of a folder are unknown.
            name: what messages call the set; default: the source's name.

        Returns:
            The set; frames of a file are images of their own. No image has been decoded yet, apart from the first
            frame of files that can hold several.

        Raises:
            UserError: if there is no such source, no image in it, or an argument does not fit it.
        """
        path = Path(source)
        if not path.exists():
            raise UserError(f"expected a folder of images or a datalist (.json), got {path}, which does not exist")
        if path.is_dir():
            images = cls._from_folder(path, split, dataset_dir, image_size, mode, patient_pattern, name)
        elif path.suffix.lower() == ".json":
            if patient_pattern is not None:
                raise UserError("patient_pattern is for folders: a datalist names its patients; leave it out")
            images = cls._from_datalist(path, split, dataset_dir, image_size, mode, name)
        else:
            raise UserError(f"expected a folder of images or a datalist (.json), got the file {path}")
        images._expand(images._frame_counts())
        if max_images is not None:
            if isinstance(max_images, bool) or not isinstance(max_images, int) or max_images < 1:
                raise UserError(f"max_images must be a whole number of at least 1, got {max_images!r}")
            if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
                raise UserError(f"seed must be a whole number of at least 0, got {seed!r}")
            if max_images < len(images):
                drawn = np.random.default_rng(seed).choice(len(images), max_images, replace=False)
                images._images = [images._images[i] for i in sorted(drawn.tolist())]
        return images

    @classmethod
    def _from_folder(
        cls,
        folder: Path,
        split: str | None,
        dataset_dir: str | os.PathLike | None,
        image_size: int | None,
        mode: str | None,
        patient_pattern: str | None,
        name: str | None,
    ) -> ImageSet:
        if split or dataset_dir:
            given = "split" if split else "dataset_dir"
            raise UserError(f"{given} belongs to a datalist, but {folder} is a folder; leave it out")
        found = list_files(folder)
        candidates = [file for file in found if not file.lower().endswith(NOT_IMAGES)]
        rejected, files = {}, []
        for file in candidates:
            # by the suffix, too: a truncated picture is an image that cannot be read, a PDF is none
            if file_stem(file) != os.path.basename(file) or has_known_content(folder / file):
                files.append(file)
            else:
                rejected[printable(file)] = "no image by its name or its content"
        if not files:
            there = f"{len(found)} other files" if found else "an empty folder"
            raise UserError(f"expected images below {folder}, got {there}; name the folder that holds them")
        patients = None
        if patient_pattern is not None:
            patients = []
            try:
                pattern = re.compile(patient_pattern)
            except re.error as error:
                raise UserError(f"patient_pattern {patient_pattern!r} is no regular expression ({error})") from error
            for file in files:
                match = pattern.search(os.path.basename(file))
                if match is None or match.lastindex is None or not match[1]:
                    raise UserError(
                        f"patient_pattern {patient_pattern} finds no patient (its first group) in {file} of "
                        f"{name or folder.name}"
                    )
                patients.append(match[1])
        images = cls(
            [os.path.join(folder, file) for file in files],
            files=files,
            patients=patients,
            image_size=image_size,
            mode=mode,
            name=name or folder.resolve().name,
        )
        images.rejected.update(rejected)
        return images

    @classmethod
    def _from_datalist(
        cls,
        path: Path,
        split: str | None,
        dataset_dir: str | os.PathLike | None,
        image_size: int | None,
        mode: str | None,
        name: str | None,
    ) -> ImageSet:
        content = validate_datalist(path)
        if split:
            splits = [split]
        else:
            splits = [key for key, value in content.items() if isinstance(value, list) and value and _is_split(value)]
            if not splits:
                raise UserError(f"datalist {path} holds no image; name one that does")
        pairs = [
            pair for key in splits for pair in zip(load_datalist(path, key, dataset_dir), content[key], strict=True)
        ]
        return cls(
            [item["image"] for item, _ in pairs],
            files=[item["image"] for _, item in pairs],
            patients=[str(item["patient"]) for item, _ in pairs],
            labels=[item.get("label", item.get("labels")) for item, _ in pairs],
            synthetic=[bool(item.get("synthetic")) for item, _ in pairs],
            image_size=image_size,
            mode=mode,
            name=name or (f"{path.stem} ({split})" if split else path.stem),
        )

    # -----------------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> np.ndarray:
        """One image.

        Returns:
            (C, H, W) float32 in [0, 1], C = 1 or 3.

        Raises:
            UnreadableImageError: the file is no readable image.
            OSError: the disk fails.
        """
        if isinstance(index, slice):
            raise TypeError("an ImageSet takes one index at a time; images.subset(range(...)) makes a smaller set")
        file, frame, count = self._images[index]
        return fit_image(self._pixels(file, frame, count), self.image_size, self.mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_read": None, "_hashed": None}

    def __repr__(self) -> str:
        return f"ImageSet({self.name!r}, {len(self)} images)"

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(
            self._names[file] if count == 1 else f"{self._names[file]}#{frame}" for file, frame, count in self._images
        )

    def path(self, index: int) -> str:
        """Path of one image's file."""
        return self._paths[self._images[index][0]]

    @property
    def patients(self) -> tuple[str, ...] | None:
        return None if self._patients is None else tuple(self._patients[file] for file, _, _ in self._images)

    @property
    def labels(self) -> tuple[Any, ...] | None:
        return None if self._labels is None else tuple(self._labels[file] for file, _, _ in self._images)

    @property
    def synthetic(self) -> tuple[bool, ...]:
        return tuple(self._synthetic[file] for file, _, _ in self._images)

    def subset(self, indices: Sequence[int]) -> ImageSet:
        """A set of some of the images, in the order given; what a scan found is kept but for the histogram's part."""
        chosen = object.__new__(type(self))
        chosen.__dict__.update(self.__dict__)
        chosen._images = [self._images[i] for i in indices]
        chosen.rejected = dict(self.rejected)
        chosen.summary = None
        chosen._read = chosen._hashed = None
        return chosen

    def content_key(self, index: int) -> str:
        """What decides the pixels of one image: its file's content, the frame, the size and the mode.

        Raises:
            OSError: the file cannot be read.
        """
        file, frame, count = self._images[index]
        digest = self.summary.hashes[index] if self.summary else self._digest(file, count)
        return f"{digest}:{frame}:{self.image_size}:{self.mode}"

    # -----------------------------------------------------------------------------------------------------------------

    def scan(self, num_workers: int = 0, progress: bool = True) -> ImageSet:
        """Read every image once; those that cannot be read drop out into :attr:`rejected`.

        Args:
            num_workers: processes that read; 0 reads in this one.
            progress: show a bar, if the output is a terminal.

        Returns:
            This set, with :attr:`summary`. A file that turned out to hold several frames has become several images.

        Raises:
            UserError: if no image is left.
        """
        before = len(self)
        if self.summary is None:
            seen, histogram = self._look(num_workers, progress)
            # frames that the file's name did not promise, such as those of a DICOM file called .png
            several = {self._images[i][0]: found.count for i, found in enumerate(seen) if found.count > 1}
            unexpected = {
                file: n for file, n in several.items() if any(i[0] == file and i[2] != n for i in self._images)
            }
            if unexpected:
                self._expand(unexpected)
                seen, histogram = self._look(num_workers, progress)
            self._take(seen, histogram)
        if not len(self):
            file, reason = next(iter(self.rejected.items()))
            raise UserError(f"none of the {before} images of {self.name} can be read; {file}: {reason}")
        return self

    def _look(self, num_workers: int, progress: bool) -> tuple[list[_Seen], np.ndarray]:
        looked = map_each(_look_at, self, range(len(self)), num_workers, crashed=_Seen(reason=CRASHED))
        bar = tqdm(
            looked,
            total=len(self),
            desc=f"reading {self.name}",
            unit="image",
            leave=False,
            disable=None if progress else True,
        )
        seen, histogram = [], np.zeros(256, dtype=np.int64)
        for found in bar:
            if found.histogram is not None:
                histogram += found.histogram
            seen.append(replace(found, histogram=None))  # 2 KiB an image otherwise
        return seen, histogram

    def _take(self, seen: Sequence[_Seen], histogram: np.ndarray) -> None:
        files = self.files
        self.rejected.update({file: found.reason for file, found in zip(files, seen, strict=True) if found.reason})
        kept = [i for i, found in enumerate(seen) if not found.reason]
        self._images = [self._images[i] for i in kept]
        self.summary = SetSummary(
            hashes=tuple(seen[i].digest for i in kept),
            shapes=tuple(seen[i].shape for i in kept),
            histogram=histogram,
            constant=tuple(files[i] for i in kept if seen[i].constant),
            further_frames=len(kept) - len({file for file, _, _ in self._images}),
        )

    def check_same_shape(self) -> tuple[int, int, int]:
        """See that all images have one size and mode; scans the set if that has not been done.

        Returns:
            (C, H, W) of every image.

        Raises:
            UserError: names the two commonest and an image of the rarer kind.
        """
        shapes = self._summary().shapes
        (first, often), *others = Counter(shapes).most_common()
        if others:
            second, seldom = others[0]
            rest = f" and {len(others) - 1} more kinds" if len(others) > 1 else ""
            raise UserError(
                f"the images of {self.name} differ: {often} are {_told(first)}, {seldom} {_told(second)} "
                f"({self.files[shapes.index(second)]}){rest}; give {self._remedy(shapes)}"
            )
        return first

    def check_comparable(self, other: ImageSet) -> None:
        """See that two sets have the same size and mode; scans them if that has not been done.

        Raises:
            UserError: one line that says what each set is and which option makes them equal.
        """
        mine, others = self.check_same_shape(), other.check_same_shape()
        if mine != others:
            raise UserError(
                f"{self.name} are {_told(mine)}, {other.name} {_told(others)}; give {self._remedy((mine, others))}"
            )

    def _summary(self) -> SetSummary:
        self.scan()
        assert self.summary is not None
        return self.summary

    @staticmethod
    def _remedy(shapes: Sequence[tuple[int, int, int]]) -> str:
        remedies = []
        if len({shape[1:] for shape in shapes}) > 1:
            remedies.append(f"--image_size {min(min(shape[1:]) for shape in shapes)}")
        if len({shape[0] for shape in shapes}) > 1:
            remedies.append("--mode L")
        return " ".join(remedies)

    # -----------------------------------------------------------------------------------------------------------------

    def _pixels(self, file: int, frame: int, count: int) -> np.ndarray:
        path = Path(self._paths[file])
        if count == 1:
            return read_some(path, None, frame)[0].pixels
        if self._read is None or self._read[0] != file:
            # a volume is unpacked and scaled as a whole: once for all of its slices, which come one after the other
            self._read = file, read_some(path, None, None)
        return self._read[1][frame].pixels

    def _digest(self, file: int, count: int) -> str:
        path = self._paths[file]
        if count == 1:
            return file_sha256(path)
        status = os.stat(path)
        state = file, status.st_mtime_ns, status.st_size
        if self._hashed is None or self._hashed[0] != state:  # once for all slices of a volume
            self._hashed = state, file_sha256(path)
        return self._hashed[1]

    def _frame_counts(self) -> dict[int, int]:
        """Frames of the files that can hold several, by their names; what cannot be read counts as one."""
        counts = {}
        for number, path in enumerate(self._paths):
            if not path.lower().endswith(SINGLE_FRAME):
                try:
                    counts[number] = read_some(Path(path), None, 0)[0].count
                except Exception:  # scan() reads it again, and says why it cannot
                    continue
        return counts

    def _expand(self, counts: dict[int, int]) -> None:
        """Give each frame of the files named its own image."""
        expanded: dict[tuple[int, int], tuple[int, int, int]] = {}
        for file, frame, count in self._images:
            total = counts.get(file, count)
            numbers = range(total) if total != count else [frame]
            expanded.update({(file, number): (file, number, total) for number in numbers})
        self._images = list(expanded.values())


def _is_split(value: Sequence[Any]) -> bool:
    return all(isinstance(item, dict) for item in value)


def _told(shape: tuple[int, int, int]) -> str:
    channels, height, width = shape
    return f"{width}×{height} {'grey' if channels == 1 else 'RGB'}"


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _look_at(images: ImageSet, index: int) -> _Seen:
    file, frame, count = images._images[index]
    try:
        if count == 1:
            first = read_some(Path(images._paths[file]), None, frame)[0]
            pixels, count = first.pixels, first.count
        else:
            pixels = images._pixels(file, frame, count)
        image = fit_image(pixels, images.image_size, images.mode)
        digest = images._digest(file, images._images[index][2])
    except Exception as error:  # one odd file must not stop the rest
        return _Seen(reason=image_reason(error))
    levels = np.floor(image * 255 + 0.5).astype(np.int64).ravel()
    return _Seen(
        count=count,
        digest=digest,
        shape=image.shape,
        histogram=np.bincount(levels, minlength=256),
        constant=bool(image.min() == image.max()),
    )


def image_reason(error: Exception) -> str:
    """Why an image could not be had, in one line without its name."""
    if isinstance(error, UserError):
        return one_line(error)
    if isinstance(error, MemoryError):
        return "too large for the memory"
    if isinstance(error, OSError):
        return one_line(error.strerror or error)
    return f"{type(error).__name__}: {one_line(error)}"


def fit_image(pixels: np.ndarray, image_size: int | None = None, mode: str | None = None) -> np.ndarray:
    """Bring one picture to a size and a mode.

    Args:
        pixels: (H, W) grey or (H, W, 3) colour, float32 in [0, 1].
        image_size: None, or: the shorter side becomes this many pixels by Pillow's BICUBIC on floats, which widens its
            kernel when shrinking (antialiasing), and the centre square is kept.
        mode: None, ``L`` (ITU-R BT.601 luma) or ``RGB``.

    Returns:
        (C, H, W) float32 in [0, 1].

    Raises:
        UnreadableImageError: some pixels are not finite.
    """
    if not np.isfinite(pixels.sum(dtype=np.float64)):
        raise UnreadableImageError("some pixels are not finite (NaN or infinity)")
    if mode == "L" and pixels.ndim == 3:
        pixels = pixels @ LUMA
    planes = [pixels] if pixels.ndim == 2 else [pixels[..., channel] for channel in range(3)]
    if image_size is not None:
        planes = [_centre_square(plane, image_size) for plane in planes]
    if mode == "RGB" and len(planes) == 1:
        planes *= 3
    # bicubic resampling overshoots at edges
    return np.clip(np.stack(planes).astype(np.float32, copy=False), 0, 1)


def _centre_square(plane: np.ndarray, size: int) -> np.ndarray:
    height, width = plane.shape
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    if side == size:
        return plane[top : top + side, left : left + side]
    image = Image.fromarray(np.ascontiguousarray(plane, dtype=np.float32))
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
