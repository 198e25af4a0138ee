"""Posteriors of an autoencoder on the disk, encoded once for many trainings, and the factors that whiten them."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import posixpath
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from medgen.data.datalist import load_classes, load_datalist, validate_datalist
from medgen.data.image_set import file_sha256
from medgen.data.shard import parse_shard, shard_line, shard_of, warn_of_missing
from medgen.errors import UserError
from medgen.output import atomic_file, atomic_write_text, write_first

if TYPE_CHECKING:
    import torch

__all__ = ["LatentScaling", "LatentStore", "estimate_scaling", "load_latents"]

logger = logging.getLogger(__name__)

INDEX = "latents.json"
SCALING = "scaling.json"
KINDS = ("global", "channel")
LOCK = ".lock"
ROW = {"image", "size", "time", "sha256", "mean", "variance"}  # what is known of an image
ENDS = 1 << 16  # bytes at either end of an array that are compared at each start of a training
COMPARED = 16  # images whose content is compared then, where times alone have changed


@dataclass(frozen=True)
class LatentScaling:
    """The affine map between an autoencoder's latents and those of zero mean and unit variance.

    Attributes:
        scale: 1 / standard deviation; one for all channels (Rombach et al. 2022, arXiv 2112.10752, appendix G), or one
            for each (EDM2, Karras et al. 2024, arXiv 2312.02696, appendix B.1, has one for each).
        shift: mean, as many as ``scale``; 0 where there is one for all channels, as in the source.
        autoencoder_sha256: of the file of weights that made the latents.
        scale_standard_error: of each ``scale``; images are the independent units, since the pixels of one are not.
        shift_standard_error: of each ``shift``.
        n: images that were measured.
    """

    scale: tuple[float, ...]
    shift: tuple[float, ...]
    autoencoder_sha256: str
    scale_standard_error: tuple[float, ...] = ()
    shift_standard_error: tuple[float, ...] = ()
    n: int = 0

    @classmethod
    def read(cls, path: str | os.PathLike) -> LatentScaling:
        """Read what :meth:`write` wrote.

        Raises:
            UserError: no such file, or not such a file.
        """
        if not Path(path).is_file():
            raise UserError(
                f"no scaling of latents at {path}; encode.json writes it as {SCALING} into its --latents_dir, and "
                "training beside its model (is --model_path right?)"
            )
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            values = {name: content[name] for name in (field.name for field in fields(cls)) if name in content}
            scaling = cls(**{k: tuple(map(float, v)) if isinstance(v, list) else v for k, v in values.items()})
            well_formed = (
                all(math.isfinite(value) and value > 0 for value in scaling.scale)
                and all(map(math.isfinite, scaling.shift))
                and len(scaling.scale) == len(scaling.shift) > 0
                and isinstance(scaling.autoencoder_sha256, str)
            )
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{path} is no scaling of latents ({type(error).__name__}); run encode.json again"
            ) from error
        if not well_formed:
            raise UserError(
                f"{path} must hold as many finite shifts as scales above 0, and the autoencoder's SHA-256, got scale "
                f"{scaling.scale} and shift {scaling.shift}; run encode.json again"
            )
        return scaling

    def write(self, path: str | os.PathLike) -> None:
        """Write a flat JSON, all of it or nothing."""
        atomic_write_text(path, json.dumps(asdict(self), indent=4) + "\n")

    def check_autoencoder(self, path: str | os.PathLike) -> None:
        """See that these factors belong to an autoencoder.

        Args:
            path: its weights.

        Raises:
            UserError: they belong to another, or there is no such file.
        """
        _check_sha256("the scaling belongs to", self.autoencoder_sha256, _sha256_of_weights(path), path)

    def whiten(self, latent: torch.Tensor) -> torch.Tensor:
        """Raw latents => latents of unit variance, (C, h, w) or (B, C, h, w)."""
        return (latent - self._as(latent, self.shift)) * self._as(latent, self.scale)

    def unwhiten(self, latent: torch.Tensor) -> torch.Tensor:
        """Latents of unit variance => raw latents, (C, h, w) or (B, C, h, w)."""
        return latent / self._as(latent, self.scale) + self._as(latent, self.shift)

    def __str__(self) -> str:
        errors = self.scale_standard_error or [0.0] * len(self.scale)
        scales = ", ".join(map(_with_error, self.scale, errors))
        return f"scale {scales} over {self.n:,} images"

    @staticmethod
    def _as(latent: torch.Tensor, values: tuple[float, ...]) -> torch.Tensor:
        return latent.new_tensor(values).reshape(-1, 1, 1)


def _with_error(value: float, error: float) -> str:
    """To the first digit of the error: ``0.2987 ± 0.0004``."""
    if error <= 0:
        return f"{value:.4f}"
    digits = max(0, -math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def estimate_scaling(
    means: np.ndarray, variances: np.ndarray, autoencoder_sha256: str, scaling: str = "global"
) -> LatentScaling:
    """Factors that bring posterior samples to unit variance, with their standard errors.

    The variance is that of all samples that the posteriors can give, not of one draw: E[std²] + Var[mean], merged from
    the moments of single images, which are groups of one size: the mean of the variances within plus the variance of
    the means. The standard error is by the delta method.

    Args:
        means: (N, C) mean of each image's latent over its pixels.
        variances: (N, C) variance of each image's sampled latent over its pixels and draws.
        autoencoder_sha256: SHA-256 of the autoencoder's weights.
        scaling: ``global``, one factor for all channels and no shift (the source's), or ``channel``.

    Returns:
        The factors.

    Raises:
        UserError: an unknown ``scaling``, fewer than two images, or latents without variance.
    """
    check_scaling(scaling)
    n = len(means)
    if n < 2:
        raise UserError(f"a scaling with its standard error takes at least 2 training images, got {n}")
    means, variances = np.float64(means), np.float64(variances)
    if scaling == "global":
        variances = variances.mean(1, keepdims=True) + means.var(1, keepdims=True)
        means = means.mean(1, keepdims=True)
    shift = means.mean(0)
    contributions = variances + (means - shift) ** 2  # their mean is the variance
    variance = contributions.mean(0)
    if not variance.min() > 0:
        raise UserError("the latents of all training images are the same number; the autoencoder has collapsed")
    variance_error = contributions.std(0, ddof=1) / math.sqrt(n)
    shift_error = means.std(0, ddof=1) / math.sqrt(n)
    if scaling == "global":
        shift, shift_error = np.zeros(1), np.zeros(1)
    return LatentScaling(
        scale=tuple((variance**-0.5).tolist()),
        shift=tuple(shift.tolist()),
        autoencoder_sha256=autoencoder_sha256,
        scale_standard_error=tuple((0.5 * variance**-1.5 * variance_error).tolist()),
        shift_standard_error=tuple(shift_error.tolist()),
        n=n,
    )


def check_scaling(scaling: str) -> None:
    """See that a kind of scaling exists.

    Raises:
        UserError: it does not.
    """
    if scaling not in KINDS:
        raise UserError(f"scaling must be {' or '.join(KINDS)}, got {scaling!r}; set --scaling global")


class LatentStore:
    """Posteriors of the images of a datalist below ``latents_dir``, and what of them is still to be encoded.

    - ``latents.json``: what decides the latents beside the images: the SHA-256 of the autoencoder, a digest of the
      transform, the shape, how many augmented copies there are and from which seed, and the size of the batches, by
      which sums are rounded. Of shards that begin at once the first writes it;
    - ``00000.npy``: (N, 1 + copies, 2, C, h, w) float16, mean and standard deviation of ``shard_size`` images;
    - ``00000.json``: SHA-256 of the array and of the autoencoder, and the images, one a row, each with size, time and
      SHA-256 of its file and the moments of its latent. It is written after the array, and one that was there goes
      before, so that a shard counts once it is complete;
    - ``scaling.json``: the :class:`LatentScaling` of the training split;
    - ``.lock``: locked as long as a process encodes into the folder; the system unlocks it when that process ends.
      Processes that encode one of n shares of the images share it, and each has ``.lock-i-of-n`` to itself.

    Images are known by their paths in the datalist: other splits, and fields that are added later, change nothing.
    A run that was killed goes on with the shard it was at; batches never reach over the end of a shard, so that the
    resumed run meets the same batches and computes the same bits.

    Args:
        latents_dir: the folder.
        datalist: JSON file.
        splits: lists of it to encode.
        dataset_dir: base of the datalist's paths; default: its folder.
        autoencoder_path: weights of the autoencoder.
        latent_shape: (C, h, w).
        transform: digest of all that happens to an image before it is encoded.
        augmented_copies: latents of each image beside its own.
        seed: of the copies.
        shard_size: images in a shard.
        batch_size: images encoded together.
        scaling: ``global`` or ``channel``.
        write_latents: False measures the scaling alone, for a training from pixels.
        resume: go on with what is there; False refuses a folder that holds latents.
        shard: "i/n" encodes one of n shares, whatever of it is missing: each n-th of the files of ``shard_size``
            images, which have the numbers that one process would have given them. Others may encode theirs at the same
            time. The scaling is left to a run with ``resume`` and without ``shard``. None encodes all.

    Attributes:
        todo: items still to be encoded: ``image`` (path), ``number`` (position in this list) and ``seed`` (of the
            image's copies).
        batches: positions in ``todo``, for a data loader.
        copies: augmented copies to encode with each image.

    Raises:
        UserError: the folder holds latents of another autoencoder, of another transform or of images that have changed
            since, or latents at all and ``resume`` is False; or a setting is out of range; or a shard of a folder whose
            files are not those of this list.
    """

    def __init__(
        self,
        latents_dir: str | os.PathLike,
        datalist: str | os.PathLike,
        splits: Sequence[str],
        dataset_dir: str | os.PathLike | None,
        autoencoder_path: str | os.PathLike,
        latent_shape: Sequence[int],
        transform: str,
        augmented_copies: int = 0,
        seed: int = 0,
        shard_size: int = 1024,
        batch_size: int = 1,
        scaling: str = "global",
        write_latents: bool = True,
        resume: bool = False,
        shard: str | None = None,
    ) -> None:
        check_scaling(scaling)
        self.shard = None if parse_shard(shard) is None else shard
        self.folder, self.scaling, self.write_latents = Path(latents_dir), scaling, write_latents
        self.header = {
            "autoencoder_sha256": _sha256_of_weights(autoencoder_path),
            "transform": transform,
            "latent_shape": list(latent_shape),
            "augmented_copies": augmented_copies,
            "seed": seed if augmented_copies else None,
            "batch_size": batch_size,  # sums are rounded by it
        }
        self._autoencoder_path = autoencoder_path
        if not write_latents and "training" not in splits:
            raise UserError(f"a scaling is measured on the training split, got splits {list(splits)}; add training")
        if self.shard is not None and not write_latents:
            raise UserError("a scaling alone is measured by one process, got --write_latents false; leave --shard out")
        wanted = splits if write_latents else ["training"]
        self.copies = augmented_copies if write_latents else 0
        self.images = {split: _images(datalist, split, dataset_dir) for split in wanted}
        self._locks: list[IO[str]] = []
        names = {name: path for images in self.images.values() for name, path in images}
        self.count = len(names)
        self._moments: dict[str, tuple[list[float], list[float]]] = {}
        layout = [list(names)[i : i + shard_size] for i in range(0, len(names), shard_size)]
        own = {f"{number:05d}": layout[number] for number in shard_of(range(len(layout)), shard)}
        self._own = None if self.shard is None else own.keys()
        self.part = [name for stem in own for name in own[stem]]
        self._before = _shard_files(self.folder, self._own)
        shards = _read_shards(self.folder, self.header["autoencoder_sha256"], autoencoder_path, self._own, whole=True)
        self._found = bool(shards)
        if shards or (self.shard is not None and _shard_files(self.folder)):
            self._check_same_settings()
        if shards and write_latents and not resume and self.shard is None:
            raise UserError(
                f"{self.folder} holds latents of {sum(map(len, shards.values()))} images already; keep them and do "
                "the rest with --resume true, or choose another --latents_dir"
            )
        pending = {name: names[name] for name in self.part}
        if write_latents:
            _check_unchanged(
                self.folder, [(row, pending[row["image"]]) for row in _rows(shards) if row["image"] in pending]
            )
            for row in _rows(shards):
                pending.pop(row["image"], None)
                self._moments[row["image"]] = row["mean"], row["variance"]
        if self.shard is not None:
            self._check_layout(shards, own)
        self._names = list(pending)
        self.todo = [
            {"image": path, "number": number, "seed": _seed_of(name, seed)}
            for number, (name, path) in enumerate(pending.items())
        ]
        self._shards = [range(i, min(i + shard_size, len(self.todo))) for i in range(0, len(self.todo), shard_size)]
        self.batches = [
            list(shard[i : i + batch_size]) for shard in self._shards for i in range(0, len(shard), batch_size)
        ]
        if self.shard is None:
            taken = {int(stem) for stem in shards}
            free = (number for number in range(len(taken) + len(self._shards)) if number not in taken)
            self._stems = [f"{number:05d}" for number, _ in zip(free, self._shards, strict=False)]
        else:
            self._stems = [stem for stem in own if stem not in shards]
        self._rows: list[np.ndarray] = []
        self._done = 0

    def begin(self) -> None:
        """Lock the folder and record the settings.

        Raises:
            UserError: another process encodes into the folder, or has done so since this store was made, or shards have
                begun with other settings.
        """
        if not self.write_latents:
            return
        self._locks = _locked(self.folder, self.shard)
        if _shard_files(self.folder, self._own) != self._before:
            self.close()
            raise UserError(f"another run has encoded into {self.folder} meanwhile; start this one again")
        header = json.dumps(self.header, indent=4) + "\n"
        try:
            if self.shard is not None:  # another shard may have begun, and have written nothing else yet
                write_first(self.folder / INDEX, header)
            if self.shard is not None or self._found:
                self._check_same_settings()
        except BaseException:
            self.close()
            raise
        if self.shard is None:
            atomic_write_text(self.folder / INDEX, header)
        warn_of_missing(len(self.todo), self.count, self.shard)

    def close(self) -> None:
        """Let others encode into the folder."""
        while self._locks:
            import fcntl

            lock = self._locks.pop()
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_UN)  # closing alone leaves it to loader processes that have a copy
            lock.close()

    def add(self, number: int, latents: np.ndarray) -> None:
        """Take the next image's latents; the last of a shard writes the shard.

        Args:
            number: of the item in ``todo``; in that order.
            latents: (1 + copies, 2, C, h, w), mean and standard deviation of the image's posterior and its copies'.

        Raises:
            UserError: latents that are no finite numbers of float16, or of another shape.
            ValueError: not in order.
        """
        name = self._names[number]
        expected = (1 + self.copies, 2, *self.header["latent_shape"])
        if latents.shape != expected:
            raise UserError(
                f"latents of {name}: expected shape {expected}, got {latents.shape}; set image_size and "
                "autoencoder_channels as in the autoencoder's training"
            )
        with np.errstate(over="ignore"):
            row = latents.astype(np.float16)
        if not np.isfinite(row).all():
            raise UserError(f"latents of {name} are not finite in float16; train the autoencoder again")
        if number != self._done:
            raise ValueError(f"expected item {self._done}, got {number}")
        self._done += 1
        # of what training will read, thus after rounding
        mean, std = np.float64(row[0])
        within = (std**2).mean((1, 2)) + mean.var((1, 2))
        self._moments[name] = mean.mean((1, 2)).tolist(), within.tolist()
        if not self.write_latents:
            return
        self._rows.append(row)
        shard = self._shards[-len(self._stems)]
        if number == shard[-1]:
            self._write_shard(self._stems.pop(0), shard)

    def _write_shard(self, stem: str, shard: range) -> None:
        rows = []
        for number in shard:
            status = os.stat(self.todo[number]["image"])
            mean, variance = self._moments[self._names[number]]
            row = {"image": self._names[number], "size": status.st_size, "time": status.st_mtime_ns}
            rows.append({**row, "sha256": file_sha256(self.todo[number]["image"]), "mean": mean, "variance": variance})
        array, index = self.folder / f"{stem}.npy", self.folder / f"{stem}.json"
        index.unlink(missing_ok=True)  # of a broken shard: it would name other images than the new array has
        with atomic_file(array) as file:
            np.save(file, np.stack(self._rows), allow_pickle=False)
        digests = {"sha256": file_sha256(array), "ends_sha256": _ends_sha256(array)}
        digests = json.dumps({**digests, "autoencoder_sha256": self.header["autoencoder_sha256"]})[1:-1]
        text = ",\n".join(map(json.dumps, rows))
        atomic_write_text(index, f'{{{digests}, "images": [\n{text}\n]}}\n')
        self._rows.clear()

    def finish(self) -> str:
        """Estimate the scaling over the training split, where that was asked for, and write it; a shard does not.

        Returns:
            One line that says what is where.
        """
        self.close()
        if self.shard is not None:
            return shard_line(self.shard, self.part, range(self.count), self.folder)
        line = f"{self.count:,} images, {len(self.todo):,} of them encoded now"
        if self.write_latents:
            line += f": latents in {self.folder}"
        if "training" in self.images:
            moments = [self._moments[name] for name, _ in self.images["training"]]
            means, variances = (np.array(values) for values in zip(*moments, strict=True))
            scaling = estimate_scaling(means, variances, self.header["autoencoder_sha256"], self.scaling)
            scaling.write(self.folder / SCALING)
            offsets = np.abs(means.mean(0)) * scaling.scale[0]
            if self.scaling == "global" and offsets.max() > 1:
                logger.warning(
                    f"the mean of channel {offsets.argmax()} of the latents is {offsets.max():.2f} standard deviations "
                    "from 0, which one scale for all leaves; --scaling channel takes it out"
                )
            logger.info(str(scaling))
            line += f"; {scaling} in {self.folder / SCALING}"
        return line

    def _check_layout(self, shards: Mapping[str, Sequence[dict[str, Any]]], own: Mapping[str, Sequence[str]]) -> None:
        for stem, rows in shards.items():
            if [row["image"] for row in rows] != own[stem]:
                raise UserError(
                    f"{self.folder / stem}.npy holds other images than this datalist has there, or --shard_size was "
                    "another; encode as before, without --shard and with --resume true, or into another --latents_dir"
                )

    def _check_same_settings(self) -> None:
        before = {"batch_size": self.header["batch_size"], **_read_header(self.folder)}  # older ones do not say it
        sha256, other = self.header["autoencoder_sha256"], before["autoencoder_sha256"]
        _check_sha256(f"the latents in {self.folder} are of", other, sha256, self._autoencoder_path)
        for key, value in self.header.items():
            if before.get(key) != value:
                raise UserError(
                    f"the latents in {self.folder} were made with {key} {before.get(key)}, this run has {value}; "
                    f"choose another --latents_dir, or encode as before (where there are none yet, delete {INDEX})"
                )


def load_latents(
    latents_dir: str | os.PathLike,
    datalist: str | os.PathLike,
    split: str,
    dataset_dir: str | os.PathLike | None = None,
    autoencoder_path: str | os.PathLike | None = None,
    latent_shape: Sequence[int] | None = None,
    num_classes: int = 0,
) -> list[dict[str, Any]]:
    """Items of one split, each with the place of its latents, for :class:`medgen.transforms.LoadLatentd`.

    Images that are there must be those that were encoded: of the same size, and where times have changed, of the same
    content, which is compared for 16 of them, spread over the split. (encode.json compares all.) Without classes they
    need not be there: a training reads the latents alone. Arrays are compared by their sizes and ends.

    Args:
        latents_dir: folder that encode.json wrote.
        datalist: JSON file; it may have gained fields, or been split otherwise, since.
        split: ``training``, ``validation``, ``test`` or another list in it.
        dataset_dir: base of the relative paths; default: the datalist's folder.
        autoencoder_path: weights that the latents must be of; None: whatever they are of.
        latent_shape: (C, h, w) that they must have; None: whatever they have.
        num_classes: of the network; 0 leaves labels as they are.

    Returns:
        Items as :func:`load_classes` gives them, with ``latent``: ``file`` (path of the shard) and ``row``.

    Raises:
        UserError: no latents there, or of another autoencoder, another shape or other images, or not of all.
    """
    folder = Path(latents_dir)
    header = _read_header(folder)
    if autoencoder_path is not None:
        sha256 = _sha256_of_weights(autoencoder_path)
        _check_sha256(f"the latents in {folder} are of", header["autoencoder_sha256"], sha256, autoencoder_path)
    if latent_shape is not None and list(latent_shape) != header["latent_shape"]:
        raise UserError(
            f"the latents in {folder} are {header['latent_shape']}, this config has {list(latent_shape)}; use the "
            "overlay that they were encoded with, or encode into another --latents_dir"
        )
    places = {}
    for stem, rows in _read_shards(folder, header["autoencoder_sha256"], folder / INDEX).items():
        for number, row in enumerate(rows):
            places[row["image"]] = {"file": str(folder / f"{stem}.npy"), "row": number}, row
    images = _images(datalist, split, dataset_dir, require_files=False)
    missing = [name for name, _ in images if name not in places]
    if missing:
        raise UserError(
            f"{folder} has no latents of {missing[0]} ({len(missing)} of the {len(images)} images of split {split} are "
            f"missing); run encode.json on {datalist} with --resume true"
        )
    _check_unchanged(folder, [(places[name][1], path) for name, path in images], COMPARED)
    if num_classes:
        items = load_classes(datalist, split, dataset_dir, num_classes)
    else:
        items = load_datalist(datalist, split, dataset_dir, require_files=False)
    return [{**item, "latent": places[name][0]} for item, (name, _) in zip(items, images, strict=True)]


def _images(
    datalist: str | os.PathLike, split: str, dataset_dir: str | os.PathLike | None, require_files: bool = True
) -> list[tuple[str, str]]:
    """Name in the datalist and path of every image of a split."""
    items = load_datalist(datalist, split, dataset_dir, require_files)
    names = [posixpath.normpath(item["image"]) for item in validate_datalist(datalist)[split]]
    return [(name, item["image"]) for name, item in zip(names, items, strict=True)]


def _read_header(folder: Path) -> dict[str, Any]:
    try:
        header = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"no latents in {folder}; write them with encode.json, or name their folder with --latents_dir"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / INDEX} cannot be read ({error}); choose another --latents_dir") from error
    if not isinstance(header, dict) or not {"autoencoder_sha256", "transform", "latent_shape"} <= header.keys():
        raise UserError(f"{folder / INDEX} says nothing about latents; choose another --latents_dir")
    return header


def _shard_files(folder: Path, stems: Collection[str] | None = None) -> dict[Path, int]:
    """JSON file of every shard, or of those named, in their order, and when it was written."""
    if stems is None:
        stems = [path.stem for path in folder.glob("[0-9][0-9][0-9][0-9][0-9]*.json") if path.stem.isdecimal()]
    files = {}
    for stem in sorted(stems):
        path = folder / f"{stem}.json"
        with suppress(FileNotFoundError):
            files[path] = path.stat().st_mtime_ns
    return files


def _read_shards(
    folder: Path,
    autoencoder_sha256: str,
    known_from: str | os.PathLike,
    stems: Collection[str] | None = None,
    whole: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """Images of every complete shard, in their order; a shard of which a part is missing or broken is left out.

    That an array is the one that the JSON file was written for is seen by its ends, or by the whole of it. One of
    another autoencoder than the one wanted, of which the file ``known_from`` speaks, is a UserError; older files do not
    say of which they are.
    """
    shards = {}
    for path in _shard_files(folder, stems):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            rows, file = content["images"], path.with_suffix(".npy")
            complete = (
                content["ends_sha256"] == _ends_sha256(file)
                and (not whole or content["sha256"] == file_sha256(file))
                and len(np.load(file, mmap_mode="r", allow_pickle=False)) == len(rows)
                and all(row.keys() >= ROW for row in rows)
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError, EOFError):
            complete = False
        if complete:
            other = content.get("autoencoder_sha256", autoencoder_sha256)
            _check_sha256(f"the latents in {path.with_suffix('.npy')} are of", other, autoencoder_sha256, known_from)
            shards[path.stem] = rows
        else:
            logger.warning(f"{path} and its array are not a complete shard: its images count as not encoded")
    return shards


def _ends_sha256(path: Path) -> str:
    """SHA-256 of a file's size, beginning and end."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - ENDS))
        end = file.read()
        file.seek(0)
        return hashlib.sha256(f"{size} ".encode() + file.read(ENDS) + end).hexdigest()


def _locked(folder: Path, shard: str | None = None) -> list[IO[str]]:
    """The folder's lock file, open, and with it that of a shard; locked until they are closed."""
    import fcntl  # not there on Windows, where the rest of this module works

    folder.mkdir(parents=True, exist_ok=True)
    wanted = {LOCK: fcntl.LOCK_EX}
    if shard is not None:
        wanted = {LOCK: fcntl.LOCK_SH, f"{LOCK}-{shard.replace('/', '-of-')}": fcntl.LOCK_EX}
    locks: list[IO[str]] = []
    for name, kind in wanted.items():
        locks.append(open(folder / name, "a+"))  # over NFS a shared lock takes a file that can be read
        try:
            fcntl.flock(locks[-1], kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            for lock in locks:
                lock.close()
            raise UserError(
                f"another process encodes into {folder}; wait for it, or choose another --latents_dir"
            ) from error
        except OSError as error:
            logger.warning(f"{folder} cannot be locked ({error}): see that no other run encodes into it")
    return locks


def _rows(shards: Mapping[str, Sequence[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    for rows in shards.values():
        yield from rows


def _check_unchanged(folder: Path, pairs: Sequence[tuple[Mapping[str, Any], str]], at_most: int | None = None) -> None:
    """See that images are those that were encoded: by size and time, and where the time is another, by content.

    A copy of a data set has other times; images that are not there are passed over. ``at_most`` so many are read, taken
    evenly from those in doubt; None: all.
    """
    changed = "is not the image whose latents are in {}: it has changed since; encode into another --latents_dir"
    doubtful = []
    for row, path in pairs:
        try:
            status = os.stat(path)
        except OSError:
            continue
        if status.st_size != row["size"]:
            raise UserError(f"{path} {changed.format(folder)}")
        if status.st_mtime_ns != row["time"]:
            doubtful.append((row, path))
    if at_most is not None and len(doubtful) > at_most:
        logger.info(f"{len(doubtful):,} images have other times than when they were encoded; {at_most} are compared")
        doubtful = [doubtful[round(i)] for i in np.linspace(0, len(doubtful) - 1, at_most)]
    for row, path in tqdm(doubtful, desc="comparing images", unit="image", leave=False, disable=None):
        if file_sha256(path) != row["sha256"]:
            raise UserError(f"{path} {changed.format(folder)}")


def _seed_of(name: str, seed: int) -> int:
    """A 32-bit seed for the copies of an image, the same wherever it stands in the datalist."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:4], "big")


def _sha256_of_weights(path: str | os.PathLike) -> str:
    if not Path(path).is_file():
        raise UserError(f"no autoencoder at {path}; train one first and name its model.pt with --autoencoder_path")
    return file_sha256(path)


def _check_sha256(what: str, sha256: str, given: str, path: str | os.PathLike) -> None:
    if sha256 != given:
        raise UserError(
            f"{what} another autoencoder (SHA-256 {sha256[:12]}…) than {path} ({given[:12]}…); name that one with "
            "--autoencoder_path, or run encode.json into another --latents_dir"
        )
